//! What each sector of a disk may hold.
//!
//! A sector's history is a list of versions, the newest last. What a sector must hold at least is
//! its *floor*: the version that a completed flush covers. After a power cut it may hold the
//! floor or anything that was submitted since.

use std::cell::RefCell;

/// Bytes of a sector.
pub(super) const SECTOR: usize = 512;

/// What a sector holds in one version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// The bytes that the image came with.
    Initial,
    /// Every eight bytes are this number.
    Tag(u64),
    Zeroes,
    /// Discarded: whatever is read first.
    Anything,
}

#[derive(Clone, Copy, Debug)]
struct Version {
    content: Content,
    /// Length of the world's log when it was submitted.
    submitted: usize,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Pending,
    Completed,
    /// May have happened or not.
    Failed,
}

/// A completed flush: what it covers, and when it was done.
struct Flush {
    done: usize,
    /// Per sector, the index of the oldest version that it may hold afterwards.
    floors: Vec<usize>,
}

/// The histories of all sectors.
pub(super) struct History {
    initial: Vec<u8>,
    sectors: RefCell<Vec<Vec<Version>>>,
    flushes: RefCell<Vec<Flush>>,
}

/// Where in time an image is looked at.
#[derive(Clone, Copy, Debug)]
pub(super) enum Moment {
    /// All that completed is there.
    Now,
    /// The power was cut after this many log entries.
    Cut(usize),
    /// The process ended without a successful close.
    Ended,
}

impl History {
    pub(super) fn new(initial: Vec<u8>) -> Self {
        let first = Version {
            content: Content::Initial,
            submitted: 0,
            state: State::Completed,
        };
        let sectors = initial.len() / SECTOR;
        Self {
            initial,
            sectors: RefCell::new(vec![vec![first]; sectors]),
            flushes: RefCell::default(),
        }
    }

    pub(super) fn sectors(&self) -> usize {
        self.initial.len() / SECTOR
    }

    /// Notes a change of sectors that is about to be submitted.
    pub(super) fn begin(&self, sectors: std::ops::Range<usize>, content: Content, log_len: usize) {
        for versions in &mut self.sectors.borrow_mut()[sectors] {
            versions.push(Version {
                content,
                submitted: log_len,
                state: State::Pending,
            });
        }
    }

    /// Notes how the newest change of the sectors ended.
    pub(super) fn end(&self, sectors: std::ops::Range<usize>, succeeded: bool) {
        for versions in &mut self.sectors.borrow_mut()[sectors] {
            let newest = versions.last_mut().expect("a change was begun");
            newest.state = match succeeded {
                true => State::Completed,
                false => State::Failed,
            };
        }
    }

    /// What a flush that is submitted now will cover.
    pub(super) fn floors(&self) -> Vec<usize> {
        self.sectors.borrow().iter().map(|v| floor(v)).collect()
    }

    /// Notes that a flush succeeded.
    pub(super) fn flushed(&self, floors: Vec<usize>, log_len: usize) {
        self.flushes.borrow_mut().push(Flush {
            done: log_len,
            floors,
        });
    }

    /// Judges what was read of a range of sectors.
    pub(super) fn judge(&self, first: usize, bytes: &[u8], moment: Moment) -> Result<(), String> {
        let flushes = self.flushes.borrow();
        let mut floors: Vec<usize> = vec![0; bytes.len() / SECTOR];
        for flush in flushes.iter() {
            let counts = match moment {
                Moment::Cut(log_len) => flush.done <= log_len,
                Moment::Now | Moment::Ended => true,
            };
            if counts {
                for (floor, other) in floors.iter_mut().zip(&flush.floors[first..]) {
                    *floor = (*floor).max(*other);
                }
            }
        }
        for (index, sector) in bytes.chunks(SECTOR).enumerate() {
            self.judge_sector(first + index, sector, (moment, floors[index]))?;
        }
        Ok(())
    }

    fn judge_sector(
        &self,
        index: usize,
        bytes: &[u8],
        (moment, flushed): (Moment, usize),
    ) -> Result<(), String> {
        let sectors = self.sectors.borrow();
        let versions = &sectors[index];
        let lowest = match moment {
            Moment::Now => floor(versions),
            Moment::Cut(_) | Moment::Ended => flushed,
        };
        let possible = versions[lowest..].iter().filter(|version| match moment {
            Moment::Cut(log_len) => version.submitted <= log_len,
            Moment::Now | Moment::Ended => true,
        });
        let initial = &self.initial[index * SECTOR..][..SECTOR];
        for version in possible {
            let fits = match version.content {
                Content::Initial => bytes == initial,
                Content::Tag(tag) => bytes.chunks(8).all(|word| word == tag.to_le_bytes()),
                Content::Zeroes => bytes.iter().all(|byte| *byte == 0),
                Content::Anything => true,
            };
            if fits {
                return Ok(());
            }
        }
        Err(format!(
            "sector {index} at {moment:?} holds {:?}.. (from version {lowest} on of {versions:?})",
            &bytes[..16]
        ))
    }
}

/// The newest version that completed: nothing older may be read once it is flushed.
fn floor(versions: &[Version]) -> usize {
    versions
        .iter()
        .rposition(|version| version.state == State::Completed)
        .expect("the initial version is completed")
}
