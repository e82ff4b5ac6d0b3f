//! Where in the file the next cluster or table goes: at its end, which is made sure of first.
//!
//! ```text
//!   0 ... │ in use │ spare │ in use ... │ next │ never handed out: zeroes │ end of the file, durable
//!                     └ given back by a write that failed
//! ```
//!
//! Nothing is handed out before the file is that long on stable storage: no entry of a table that
//! survives a power cut leads beyond the end, and what was handed out and never written reads as
//! zeroes. So the file is made longer ahead of use, in steps that grow with it, and cut off again
//! when the image is closed. Must not know: what the space is for.

use block::{Edge, Errno, Resize};
use executor::sync::Mutex as AsyncMutex;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// By how much the file gets longer than it has to be, in bytes.
const MIN_AHEAD: u64 = 1 << 20;
const MAX_AHEAD: u64 = 64 << 20;

/// A part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// Nothing was ever written there: it reads as zeroes.
    pub(crate) is_fresh: bool,
}

#[derive(Debug)]
struct Inner {
    next: u64,
    /// From here on nothing was ever handed out.
    fresh: u64,
    spare: Vec<Place>,
}

/// The space of a file behind what is in use.
pub(super) struct Space {
    /// How long the file is, durably, as far as anything may be handed out.
    end: AtomicU64,
    inner: Mutex<Inner>,
    growing: AsyncMutex<()>,
    /// The file was made longer, perhaps than it has to be.
    has_grown: AtomicBool,
}

impl Space {
    /// Of a file of which nothing from `next` on is in use.
    pub(super) fn new(file: &Edge, next: u64) -> Self {
        Self {
            end: AtomicU64::new(file.node().length()),
            inner: Mutex::new(Inner {
                next,
                fresh: next,
                spare: Vec::new(),
            }),
            growing: AsyncMutex::new(()),
            has_grown: AtomicBool::new(false),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the file is, in bytes.
    pub(super) fn end(&self) -> u64 {
        self.end.load(Acquire)
    }

    /// Where the part in use ends.
    pub(super) fn next(&self) -> u64 {
        self.inner().next
    }

    /// Takes `length` bytes that begin at a multiple of `alignment`, if the file is long enough;
    /// else says how long it has to be.
    fn try_take(&self, length: u64, alignment: u64) -> Result<Result<Place, u64>, Errno> {
        let mut inner = self.inner();
        let fits = |place: &Place| place.length >= length && place.offset.is_multiple_of(alignment);
        if let Some(index) = inner.spare.iter().position(fits) {
            let spare = &mut inner.spare[index];
            let place = Place { length, ..*spare };
            spare.offset += length;
            spare.length -= length;
            if spare.length == 0 {
                inner.spare.swap_remove(index);
            }
            return Ok(Ok(place));
        }
        let offset = inner.next.checked_next_multiple_of(alignment);
        let end = offset.and_then(|offset| offset.checked_add(length));
        let (Some(offset), Some(end)) = (offset, end) else {
            return Err(Errno::EFBIG);
        };
        if end > i64::MAX as u64 {
            return Err(Errno::EFBIG);
        }
        if end > self.end() {
            return Ok(Err(end));
        }
        let is_fresh = offset >= inner.fresh;
        inner.next = end;
        inner.fresh = inner.fresh.max(end);
        Ok(Ok(Place {
            offset,
            length,
            is_fresh,
        }))
    }

    /// Takes `length` bytes that begin at a multiple of `alignment`. `prepare` is awaited before the
    /// flush that makes a longer file durable.
    ///
    /// # Errors
    /// `ENOSPC`, `EFBIG`, those of the file and of `prepare`.
    pub(super) async fn take<P>(
        &self,
        file: &Edge,
        (length, alignment): (u64, u64),
        prepare: impl Fn() -> P,
    ) -> Result<Place, Errno>
    where
        P: Future<Output = Result<(), Errno>>,
    {
        loop {
            let needed = match self.try_take(length, alignment)? {
                Ok(place) => return Ok(place),
                Err(needed) => needed,
            };
            let _growing = self.growing.lock().await;
            if needed > self.end() {
                prepare().await?;
                self.grow(file, needed).await?;
            }
        }
    }

    async fn grow(&self, file: &Edge, needed: u64) -> Result<(), Errno> {
        let node = file.node();
        if !node.grows() {
            return Err(Errno::ENOSPC);
        }
        self.has_grown.store(true, Release);
        let ahead = (needed / 8).clamp(MIN_AHEAD, MAX_AHEAD);
        let target = needed.saturating_add(ahead).min(i64::MAX as u64);
        let target = match set_length(file, target).await {
            Ok(()) => target,
            // There may be a limit in between.
            Err(_) => {
                set_length(file, needed).await?;
                needed
            }
        };
        node.flush().await?;
        self.end.store(target, Release);
        Ok(())
    }

    /// Gives a place back that nothing refers to.
    pub(super) fn give_back(&self, place: Place) {
        let mut inner = self.inner();
        match place.offset + place.length == inner.next {
            true => inner.next = place.offset,
            false => inner.spare.push(Place {
                is_fresh: false,
                ..place
            }),
        }
    }

    /// Forgets all places from `next` on, which nothing refers to any more, and cuts the file off there.
    pub(super) async fn restart(&self, file: &Edge, next: u64) -> Result<(), Errno> {
        let _growing = self.growing.lock().await;
        {
            let mut inner = self.inner();
            self.end.store(next, Release);
            *inner = Inner {
                next,
                fresh: u64::MAX,
                spare: Vec::new(),
            };
        }
        if file.node().grows() {
            set_length(file, next).await?;
            self.inner().fresh = next;
        }
        Ok(())
    }

    /// Cuts the file off where the part in use ends, if it was made longer. Nothing is taken any more.
    pub(super) async fn trim(&self, file: &Edge) -> Result<(), Errno> {
        let next = self.next();
        let node = file.node();
        if !self.has_grown.load(Acquire) || node.length() <= next {
            return Ok(());
        }
        set_length(file, next).await
    }
}

async fn set_length(file: &Edge, length: u64) -> Result<(), Errno> {
    let resize = Resize::to(length);
    let resized = file.node().resize(resize).await;
    resized.map_err(|error| error.errno.unwrap_or(Errno::EIO))
}
