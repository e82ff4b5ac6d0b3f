//! Commands on character devices, for the command tables of daemons: `chardev-add`, `-change`,
//! `-remove`, `-send-break`, `query-chardev`, `query-chardev-backends`, `ringbuf-read`, `-write`.

use std::rc::Rc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use qmp::{Arguments, Error, Result, Value, json};
use serde::Deserialize;
use vhost_daemon::notify::NamedFds;

use super::options::{BACKENDS, Backend};
use super::ring::Ring;
use super::{Chardevs, open};

#[derive(Deserialize)]
struct ById {
    id: String,
}

fn not_found(id: &str) -> Error {
    Error::generic(format!("Chardev '{id}' not found"))
}

impl Chardevs {
    /// `chardev-add`
    ///
    /// # Errors
    /// An id that is taken; what keeps the device from being opened.
    pub async fn add(&self, fds: &NamedFds, arguments: Arguments) -> Result<Value> {
        let (id, backend) = Backend::from_command(arguments)?;
        if !qmp::is_identifier(&id) {
            return Err(Error::generic(format!("Invalid chardev id '{id}'")));
        }
        if self.find(&id).is_some() {
            let what = format!("Chardev with id '{id}' already exists");
            return Err(Error::generic(what));
        }
        let device = open::open(fds, backend).await.map_err(|error| {
            Error::generic(format!("Failed to add chardev '{id}': {}", error.desc))
        })?;
        let answer = match device.filename.strip_prefix("pty:") {
            Some(path) => json!({ "pty": path }),
            None => json!({}),
        };
        self.insert(id, device);
        Ok(answer)
    }

    /// `chardev-change`
    ///
    /// # Errors
    /// A device that a monitor uses, or that is not there; what keeps the new one from being opened.
    pub async fn change(&self, fds: &NamedFds, arguments: Arguments) -> Result<Value> {
        let (id, backend) = Backend::from_command(arguments)?;
        let chardev = self
            .find(&id)
            .ok_or_else(|| Error::generic(format!("Chardev '{id}' does not exist")))?;
        if chardev.taken.get() {
            let what = "Chardev user does not support chardev hotswap";
            return Err(Error::generic(what));
        }
        let device = open::open(fds, backend).await?;
        *chardev.device.borrow_mut() = device;
        Ok(json!({}))
    }

    /// `chardev-remove`
    ///
    /// # Errors
    /// A device that a monitor uses, or that is not there.
    pub fn remove(&self, arguments: Arguments) -> Result<Value> {
        let ById { id } = arguments.parse()?;
        let chardev = self.find(&id).ok_or_else(|| not_found(&id))?;
        if chardev.taken.get() {
            return Err(Error::generic(format!("Chardev '{id}' is busy")));
        }
        let mut list = self.list.borrow_mut();
        list.retain(|known| !Rc::ptr_eq(known, &chardev));
        Ok(json!({}))
    }

    /// `chardev-send-break`: none of the devices has a line to break.
    ///
    /// # Errors
    /// A device that is not there.
    pub fn send_break(&self, arguments: Arguments) -> Result<Value> {
        let ById { id } = arguments.parse()?;
        self.find(&id).ok_or_else(|| not_found(&id))?;
        Ok(json!({}))
    }

    /// `query-chardev`
    ///
    /// # Errors
    /// Arguments.
    pub fn query(&self, arguments: Arguments) -> Result<Value> {
        arguments.finish()?;
        let list = self.list.borrow();
        Ok(list.iter().map(|chardev| chardev.describe()).collect())
    }

    /// `query-chardev-backends`
    ///
    /// # Errors
    /// Arguments.
    pub fn query_backends(arguments: Arguments) -> Result<Value> {
        arguments.finish()?;
        let names = BACKENDS.iter().rev();
        Ok(names.map(|name| json!({ "name": name })).collect())
    }

    /// Runs `work` on the buffer of the device `id`.
    fn with_ring<T>(&self, id: &str, work: impl FnOnce(&mut Ring) -> T) -> Result<T> {
        let chardev = self.find(id);
        let chardev = chardev.ok_or_else(|| Error::generic(format!("Device '{id}' not found")))?;
        let device = chardev.device.borrow();
        let ring = device.ring.as_ref();
        let ring = ring.ok_or_else(|| Error::generic(format!("{id} is not a ringbuf device")))?;
        Ok(work(&mut ring.borrow_mut()))
    }

    /// `ringbuf-write`
    ///
    /// # Errors
    /// No such buffer; data that is no base64.
    pub fn ringbuf_write(&self, arguments: Arguments) -> Result<Value> {
        let RingbufWrite {
            device,
            data,
            format,
        } = arguments.parse()?;
        // The device goes first.
        self.with_ring(&device, |_| ())?;
        let bytes = match format {
            DataFormat::Utf8 => data.into_bytes(),
            DataFormat::Base64 => BASE64
                .decode(data)
                .map_err(|_| Error::generic("Base64 data is not valid"))?,
        };
        self.with_ring(&device, |ring| ring.write(&bytes))?;
        Ok(json!({}))
    }

    /// `ringbuf-read`
    ///
    /// # Errors
    /// No such buffer; a size that is none.
    pub fn ringbuf_read(&self, arguments: Arguments) -> Result<Value> {
        let RingbufRead {
            device,
            size,
            format,
        } = arguments.parse()?;
        self.with_ring(&device, |_| ())?;
        let size = usize::try_from(size).ok().filter(|size| *size > 0);
        let size = size.ok_or_else(|| Error::generic("size must be greater than zero"))?;
        let bytes = self.with_ring(&device, |ring| ring.read(size))?;
        Ok(Value::String(match format {
            DataFormat::Utf8 => String::from_utf8_lossy(&bytes).into_owned(),
            DataFormat::Base64 => BASE64.encode(&bytes),
        }))
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum DataFormat {
    #[default]
    Utf8,
    Base64,
}

#[derive(Deserialize)]
struct RingbufWrite {
    device: String,
    data: String,
    #[serde(default)]
    format: DataFormat,
}

#[derive(Deserialize)]
struct RingbufRead {
    device: String,
    size: i64,
    #[serde(default)]
    format: DataFormat,
}
