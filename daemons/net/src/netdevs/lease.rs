//! What a back-end lends to the queues of a port: descriptors and sockets, each of which comes back when its queue goes.
//!
//! ```text
//!   back-end (control thread) ── lend ──> Lease (queue thread)
//!        Pool   <──────────── dropped ──────┘
//! ```
//!
//! Promises: one port at a time has anything of a pool; what is lent has one user.
//!
//! Must not know: what it is that is lent.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Things to lend, each in a place of its own.
#[derive(Debug)]
pub(super) struct Pool<T> {
    state: Arc<Mutex<State<T>>>,
}

#[derive(Debug)]
struct State<T> {
    /// `None` where it is lent.
    places: Vec<Option<T>>,
    /// The port that has what is not here.
    user: Option<String>,
}

/// Which one is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Whichever is there.
    Any,
    /// That in the place of this index.
    At(u16),
}

impl<T> Pool<T> {
    /// Of these, in this order.
    pub(super) fn new(things: impl IntoIterator<Item = T>) -> Pool<T> {
        let state = State {
            places: things.into_iter().map(Some).collect(),
            user: None,
        };
        Pool {
            state: Arc::new(Mutex::new(state)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        lock(&self.state)
    }

    /// Those that are not lent.
    pub(super) fn for_each_free<E>(&self, each: impl FnMut(&T) -> Result<(), E>) -> Result<(), E> {
        self.lock().places.iter().flatten().try_for_each(each)
    }

    /// Adds what `open` gives until there are `count`.
    ///
    /// # Errors
    /// Those of `open`.
    pub(super) fn grow_to<E>(
        &self,
        count: u16,
        mut open: impl FnMut() -> Result<T, E>,
    ) -> Result<(), E> {
        let mut state = self.lock();
        while state.places.len() < usize::from(count) {
            state.places.push(Some(open()?));
        }
        Ok(())
    }

    /// Lends one to `port`, or where it is not there what `more` gives. `name` says what the pool belongs to.
    ///
    /// # Errors
    /// `ResourceBusy` when another port has some of them; those of `more`.
    pub(super) fn lend(
        &self,
        port: &str,
        (name, wanted): (&str, Wanted),
        more: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<Lease<T>> {
        let mut state = self.lock();
        if let Some(user) = state.user.as_deref().filter(|user| *user != port) {
            let what = format!("{name} is used by port '{user}'");
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, what));
        }
        let place = match wanted {
            Wanted::Any => state.places.iter().position(Option::is_some),
            Wanted::At(index) => Some(usize::from(index)),
        };
        let found = place.and_then(|place| Some((place, state.places.get_mut(place)?.take()?)));
        let (place, thing) = match found {
            Some(found) => found,
            None => {
                let thing = more()?;
                state.places.push(None);
                (state.places.len() - 1, thing)
            }
        };
        state.user = Some(port.to_owned());
        Ok(Lease {
            thing: Some(thing),
            place,
            state: Arc::clone(&self.state),
        })
    }
}

fn lock<T>(state: &Mutex<State<T>>) -> MutexGuard<'_, State<T>> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something that is lent. Goes back to its pool.
#[derive(Debug)]
pub(super) struct Lease<T> {
    thing: Option<T>,
    place: usize,
    state: Arc<Mutex<State<T>>>,
}

impl<T> Deref for Lease<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.thing.as_ref().expect("taken out on drop only")
    }
}

impl<T> DerefMut for Lease<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.thing.as_mut().expect("taken out on drop only")
    }
}

impl<T> Drop for Lease<T> {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        state.places[self.place] = self.thing.take();
        if state.places.iter().all(Option::is_some) {
            state.user = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none<T>() -> io::Result<T> {
        Err(io::Error::other("no more"))
    }

    #[test]
    fn one_port_at_a_time_has_them_and_each_comes_back_to_its_place() {
        let pool = Pool::new(["a", "b"]);
        let lend = |port, wanted| pool.lend(port, ("it", wanted), none);
        let second = lend("p0", Wanted::At(1)).unwrap();
        assert_eq!(*second, "b");
        let busy = lend("p1", Wanted::Any).unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::ResourceBusy);
        assert_eq!(busy.to_string(), "it is used by port 'p0'");
        assert!(lend("p0", Wanted::At(1)).is_err() && lend("p0", Wanted::At(2)).is_err());
        let first = lend("p0", Wanted::Any).unwrap();
        assert_eq!(*first, "a");
        assert!(lend("p0", Wanted::Any).is_err());
        drop(second);
        assert!(lend("p1", Wanted::Any).is_err());
        assert_eq!(*lend("p0", Wanted::At(1)).unwrap(), "b");
        drop(first);
        assert_eq!(*lend("p1", Wanted::At(0)).unwrap(), "a");
    }

    #[test]
    fn more_are_made_where_there_can_be_more() {
        let pool = Pool::new([0]);
        pool.grow_to(2, || Ok::<_, io::Error>(1)).unwrap();
        let mut leases = Vec::new();
        for expected in 0..4 {
            let lease = pool.lend("p0", ("it", Wanted::Any), || Ok(expected));
            assert_eq!(*lease.as_deref().unwrap(), expected);
            leases.push(lease);
        }
        leases.remove(2).unwrap();
        let mut free = Vec::new();
        let noted = pool.for_each_free(|thing| {
            free.push(*thing);
            Ok::<_, io::Error>(())
        });
        assert!(noted.is_ok() && free == [2]);
        let lease = pool.lend("p0", ("it", Wanted::Any), none).unwrap();
        assert_eq!(*lease, 2);
    }
}
