//! The walk over the sources: what each part of them is, in pieces that are copied at once.

use super::sources::Sources;
use super::{Act, CopyError, CopyOptions, LONG_CHUNK_BYTES, Observer, OnReadError, SECTOR, Store};
use crate::driver::ByteRange;

/// Longest piece of any kind, in bytes.
const MAX_STEP: u64 = 1 << 30;

/// Whether the target has a backing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backed {
    /// No: everything is copied.
    #[default]
    No,
    /// It shows what the backing of the source does: what the source's own image does not hold is
    /// left alone.
    Alike {
        /// Bytes of the target's backing, when they are known. Beyond, zeroes show by themselves.
        length: Option<u64>,
    },
}

/// What a piece of the sources is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes.
    Data,
    /// It reads as zeroes.
    Zero,
    /// The target's backing shows it.
    Backing,
}

/// A piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where, in the sources and in the target.
    pub range: ByteRange,
    /// What it is.
    pub kind: Kind,
    /// Whether a portion ends with it: what is alike, in lengths of [`LONG_CHUNK_BYTES`] at most.
    pub ends_portion: bool,
}

/// A walk from the start to the end.
pub struct Walk<'a> {
    sources: &'a Sources,
    options: &'a CopyOptions,
    observer: &'a dyn Observer,
    at: u64,
    /// What is known, and up to where.
    kind: Kind,
    known_until: u64,
    portion_until: u64,
}

impl<'a> Walk<'a> {
    /// At the start.
    pub fn new(sources: &'a Sources, options: &'a CopyOptions, observer: &'a dyn Observer) -> Self {
        Self {
            sources,
            options,
            observer,
            at: 0,
            kind: Kind::Data,
            known_until: 0,
            portion_until: 0,
        }
    }

    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// `Act::Status`.
    pub async fn next(&mut self) -> Result<Option<Step>, CopyError> {
        let end = self.sources.length();
        if self.at >= end {
            return Ok(None);
        }
        if self.known_until <= self.at {
            self.look().await?;
        }
        let known = self.known_until - self.at;
        let chunk = self.options.chunk - self.at % self.options.chunk;
        let is_written = match self.kind {
            Kind::Data => true,
            Kind::Zero => self.options.sparse.is_none(),
            Kind::Backing => false,
        };
        let length = match (self.options.store, is_written) {
            // A compressed cluster is written as a whole.
            (Store::Compressed { cluster }, _) if known < cluster => {
                self.kind = Kind::Data;
                cluster.min(end - self.at)
            }
            (Store::Compressed { cluster }, true) => known.min(chunk) / cluster * cluster,
            (Store::Compressed { cluster }, false) => known / cluster * cluster,
            (Store::Plain, true) => known.min(chunk),
            (Store::Plain, false) => known,
        };
        if self.portion_until <= self.at {
            self.portion_until = self.known_until.min(self.at + LONG_CHUNK_BYTES);
        }
        let step = Step {
            range: ByteRange::new(self.at, length),
            kind: self.kind,
            ends_portion: self.at + length >= self.portion_until,
        };
        self.at += length;
        Ok(Some(step))
    }

    /// Finds out what begins here.
    async fn look(&mut self) -> Result<(), CopyError> {
        let part = self.sources.part_at(self.at);
        let offset = self.at - part.disk.start;
        let mut longest = (part.disk.length - offset).min(MAX_STEP);
        let mut beyond_backing = false;
        if let Backed::Alike {
            length: Some(backing),
        } = self.options.backed
        {
            beyond_backing = self.at >= backing;
            if !beyond_backing {
                longest = longest.min((backing - self.at).next_multiple_of(SECTOR));
            }
        }
        let (length, data, zero) = loop {
            let range = ByteRange::new(offset, longest);
            let errno = match part.status(range, self.options.backed).await {
                Ok(known) => break (known.length, known.data, known.zero),
                Err(errno) => errno,
            };
            if self.options.on_read_error == OnReadError::Fail {
                return Err(CopyError {
                    act: Act::Status,
                    offset,
                    errno,
                });
            }
            if longest <= SECTOR {
                self.observer.status_unknown(offset, errno);
                break (longest, true, false);
            }
            longest = longest.div_ceil(4).next_multiple_of(SECTOR);
        };
        // A sector of which not all is known alike is data.
        let (data, zero) = (data || length < SECTOR, zero && length >= SECTOR);
        let mut length = (length / SECTOR * SECTOR).max(SECTOR).min(longest);
        // Pieces end where the source can end a read.
        let beyond = (offset + length) % part.disk.alignment;
        if length > beyond {
            length -= beyond;
        }
        let has_backing = self.options.backed != Backed::No;
        self.kind = match (zero, data) {
            (true, _) if beyond_backing => Kind::Backing,
            (true, _) => Kind::Zero,
            (false, true) => Kind::Data,
            (false, false) if has_backing => Kind::Backing,
            (false, false) => Kind::Data,
        };
        self.known_until = self.at + length;
        Ok(())
    }
}
