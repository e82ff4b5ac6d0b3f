//! User-creatable objects as the daemons have them: what `object-add` asks of every type, and the type `iothread`.
//!
//! Users of an iothread hold it in an `Rc`; one that somebody else holds is in use and stays.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use executor::{Handle, IoThread, IoThreadOptions};
use qmp::{Arguments, Error, Result, Value, json};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// An object's identity.
#[derive(Deserialize)]
struct Identity {
    id: String,
}

/// What `object-add` is to make.
pub struct NewObject {
    /// The type's name.
    pub type_name: String,
    /// The object's name.
    pub id: String,
    /// The rest.
    pub properties: Arguments,
}

/// Takes apart the arguments of `object-add`.
///
/// # Errors
/// No type or id.
pub fn take_identity(mut arguments: Arguments) -> Result<NewObject> {
    // The type goes first, as the most telling mistake.
    let type_name = match arguments.take_value("qom-type") {
        None => return Err(Error::missing_parameter("qom-type")),
        Some(Value::String(name)) => name,
        Some(_) => return Err(Error::parameter_type("qom-type", "string")),
    };
    let Identity { id } = arguments.take()?;
    Ok(NewObject {
        type_name,
        id,
        properties: arguments,
    })
}

/// The error for an id that is used already.
pub fn taken(id: &str) -> Error {
    Error::generic(format!(
        "attempt to add duplicate property '{id}' to object (type 'container')"
    ))
}

/// The arguments of `object-add`: the properties of its type, and its id, which must not be `taken`.
///
/// # Errors
/// No type or id, wrong properties, an id that is none or is taken.
pub fn parse_new<T: DeserializeOwned>(
    mut arguments: Arguments,
    is_taken: impl FnOnce(&str) -> bool,
) -> Result<(T, String)> {
    // The type goes first, as the most telling mistake.
    if arguments.get("qom-type").is_none() {
        return Err(Error::missing_parameter("qom-type"));
    }
    let object = arguments.take()?;
    let Identity { id } = arguments.parse()?;
    if !qmp::is_identifier(&id) {
        return Err(Error::parameter_expects("id", "an identifier"));
    }
    if is_taken(&id) {
        return Err(taken(&id));
    }
    Ok((object, id))
}

/// The argument of `object-del`.
///
/// # Errors
/// No id, or more than that.
pub fn parse_id(arguments: Arguments) -> Result<String> {
    let Identity { id } = arguments.parse()?;
    Ok(id)
}

/// Starts a thread, named in the error when it cannot.
///
/// # Errors
/// The host's.
pub fn start_iothread(id: &str, options: IoThreadOptions) -> Result<Rc<IoThread>> {
    let started = IoThread::start(id, options);
    let failed = |error| Error::generic(format!("Cannot start iothread '{id}': {error}"));
    started.map(Rc::new).map_err(failed)
}

/// The error for a time or number of the property `name` that is negative.
pub fn out_of_range(name: &str) -> Error {
    let range = format!("[0, {}]", i64::MAX);
    Error::generic(format!("{name} value must be in range {range}"))
}

fn poll_max(nanoseconds: i64) -> Result<Duration> {
    let nanoseconds = u64::try_from(nanoseconds).map_err(|_| out_of_range("poll-max-ns"))?;
    Ok(Duration::from_nanos(nanoseconds))
}

/// The `iothread` objects of a daemon. Lives on the control thread.
#[derive(Default)]
pub struct IoThreads {
    list: RefCell<Vec<Rc<IoThread>>>,
}

impl IoThreads {
    /// Makes the object `id`, which does not exist, with the property `poll-max-ns` as it was given.
    ///
    /// # Errors
    /// A time out of range; a thread that cannot be started.
    pub fn add(&self, id: &str, poll_max_ns: Option<i64>) -> Result<()> {
        let mut options = IoThreadOptions::default();
        if let Some(nanoseconds) = poll_max_ns {
            options.poll_max = poll_max(nanoseconds)?;
        }
        let iothread = start_iothread(id, options)?;
        self.list.borrow_mut().push(iothread);
        Ok(())
    }

    /// Changes the property `poll-max-ns` of the object `id`, which may be in use.
    ///
    /// # Errors
    /// A time out of range; no such object.
    pub fn set_poll_max(&self, id: &str, nanoseconds: i64) -> Result<()> {
        let poll_max = poll_max(nanoseconds)?;
        self.find(id)?.set_options(IoThreadOptions { poll_max });
        Ok(())
    }

    /// Deletes the object `id`.
    ///
    /// # Errors
    /// There is none; it is in use.
    pub fn remove(&self, id: &str) -> Result<()> {
        let mut list = self.list.borrow_mut();
        let Some(index) = list.iter().position(|iothread| iothread.id() == id) else {
            return Err(Error::generic(format!("object '{id}' not found")));
        };
        if Rc::strong_count(&list[index]) > 1 {
            return Err(Error::generic(format!(
                "object '{id}' is in use, can not be deleted"
            )));
        }
        list.remove(index);
        Ok(())
    }

    /// Ends all threads that nobody else holds.
    pub fn clear(&self) {
        self.list.borrow_mut().clear();
    }

    /// The object `id`.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, id: &str) -> Result<Rc<IoThread>> {
        let list = self.list.borrow();
        let found = list.iter().find(|iothread| iothread.id() == id);
        found
            .cloned()
            .ok_or_else(|| Error::generic(format!("iothread \"{id}\" not found")))
    }

    /// The executors of all.
    pub fn handles(&self) -> Vec<Handle> {
        let list = self.list.borrow();
        list.iter().map(|one| one.handle().clone()).collect()
    }

    /// The answer to `query-iothreads`.
    pub fn describe(&self) -> Value {
        let list = self.list.borrow();
        let described = list.iter().map(|iothread| {
            let poll_max = iothread.options().poll_max;
            json!({ "id": iothread.id(), "poll-max-ns": poll_max.as_nanos() as u64 })
        });
        described.collect()
    }
}
