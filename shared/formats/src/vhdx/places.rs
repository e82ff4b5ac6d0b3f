//! Where in the file the next block goes.
//!
//! ```text
//!   ... in use ... │ spare │ in use │ end of the file ─► the next: the file is made longer, and reads as zeroes there
//!                    └ taken before, and given back: may hold something
//! ```

use super::MIB;
use block::{Edge, Errno, Preallocation, Resize};

/// A place for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Where it is in the file, in whole MiB.
    pub(super) offset: u64,
    /// Nothing has ever been written there.
    pub(super) is_fresh: bool,
}

/// The places of a file that are free.
pub(super) struct Places {
    block_bytes: u64,
    /// No place ends behind this.
    most: u64,
    /// All blocks, and all else, end here or before.
    end: u64,
    spare: Vec<u64>,
    /// Places that are one block's and no other's, by the block.
    kept: Vec<(u64, u64)>,
}

impl Places {
    /// Behind `end`.
    pub(super) fn new(block_bytes: u64, end: u64, most: u64) -> Self {
        Self {
            block_bytes,
            most,
            end,
            spare: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// Takes a place for a block, making the file longer when there is no other.
    ///
    /// # Errors
    /// `ENOSPC` when the file may not become longer, what it answers when it does not.
    pub(super) async fn take(&mut self, block: u64, file: &Edge) -> Result<Place, Errno> {
        let kept = self.kept.iter().position(|(of, _)| *of == block);
        let kept = kept.map(|at| self.kept.swap_remove(at).1);
        if let Some(offset) = kept.or_else(|| self.spare.pop()) {
            let is_fresh = false;
            return Ok(Place { offset, is_fresh });
        }
        let node = file.node();
        let offset = self.end.max(node.length()).next_multiple_of(MIB);
        let length = offset + self.block_bytes;
        if length > self.most {
            return Err(Errno::ENOSPC);
        }
        let preallocation = Preallocation::Off;
        let resize = Resize {
            length,
            preallocation,
        };
        let resized = node.resize(resize).await;
        resized.map_err(|error| error.errno.unwrap_or(Errno::ENOSPC))?;
        self.end = length;
        let is_fresh = true;
        Ok(Place { offset, is_fresh })
    }

    /// Gives a place back.
    pub(super) fn give_back(&mut self, place: Place) {
        self.spare.push(place.offset);
    }

    /// Keeps a place for the block that it was taken for.
    pub(super) fn keep_for(&mut self, block: u64, place: Place) {
        self.kept.push((block, place.offset));
    }
}
