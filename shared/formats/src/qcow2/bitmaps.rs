//! Persistent dirty bitmaps (QEMU docs/interop/qcow2.txt, "Bitmaps").
//!
//! ```text
//!   header extension ──► directory ──► entry: name, granularity, flags ──► table ──► data clusters
//!   extension.rs         directory.rs                                      stored.rs
//! ```
//!
//! - Loaded when the image is opened. If it is opened for writing, every entry is then marked as in
//!   use, durably, before anything else is written: whoever finds that mark knows that the stored
//!   bits are out of date.
//! - Stored when the image is closed, all anew: data, tables and directory go to new places, are made
//!   durable together with their refcounts, then the extension is switched in one sector.
//! - A bitmap found in use is inconsistent: it is kept as it is and can only be removed.
//! - Entries with extra data that nobody here knows are used when they say that they may be, and left
//!   alone otherwise (but marked as in use, as the disk changes).
//!
//! Bits are valid only while the autoclear bit of bitmaps is set; a program that does not know
//! bitmaps clears it.

mod directory;
mod extension;
mod stored;

use super::header::AUTOCLEAR_BITMAPS;
use super::tables::{HostOffset, MAX_HOST_OFFSET};
use super::{Qcow2, read_bytes};
use block::bitmap::{
    BitmapOptions, BitmapSet, BitmapStore, DirtyBitmap, MAX_GRANULARITY, MAX_NAME,
};
use block::{BoxFuture, Error, ErrorKind};
use directory::{Entry, MAX_BITMAPS, MAX_DIRECTORY_BYTES, MAX_PHYSICAL_BYTES, flag};
use executor::sync::Mutex as AsyncMutex;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most memory of all bitmaps of an image, in bytes.
const MAX_MEMORY: u64 = 1 << 30;

/// The bitmaps of an open image.
#[derive(Default)]
pub(super) struct Bitmaps {
    set: Arc<BitmapSet>,
    stored: Mutex<Stored>,
    /// One change of what is stored at a time.
    changing: AsyncMutex<()>,
}

/// What the file has.
#[derive(Clone, Default)]
pub(super) struct Stored {
    entries: Vec<Entry>,
    /// Where the directory is.
    pub(super) offset: HostOffset,
    /// Its length in bytes.
    pub(super) length: u64,
}

impl Bitmaps {
    pub(super) fn stored(&self) -> MutexGuard<'_, Stored> {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stored {
    fn position(&self, name: &str) -> Option<usize> {
        self.entries
            .iter()
            .position(|entry| entry.name == name.as_bytes())
    }
}

fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

impl Qcow2 {
    /// Reads the directory and loads every bitmap that can be used.
    pub(super) async fn load_bitmaps(&self) -> Result<(), Error> {
        if self.header.autoclear & AUTOCLEAR_BITMAPS == 0 {
            return Ok(());
        }
        let Some(extension) = self.header.bitmaps else {
            return Ok(());
        };
        let entries = self.read_directory(&extension).await?;
        let mut memory = 0;
        for entry in &entries {
            memory += entry.memory(self.disk_size());
            if memory > MAX_MEMORY {
                return Err(corrupt(
                    "qcow2: the bitmaps of the image need too much memory",
                ));
            }
            if let Some(bitmap) = self.load_bitmap(entry).await? {
                self.bitmaps.set.attach(bitmap);
            }
        }
        *self.bitmaps.stored() = Stored {
            entries,
            offset: extension.offset,
            length: extension.length,
        };
        if self.writable {
            let failed = |errno| Error::io("Could not mark bitmaps as in use", errno);
            self.mark_in_use().await.map_err(failed)?;
        }
        Ok(())
    }

    async fn read_directory(&self, extension: &Extension) -> Result<Vec<Entry>, Error> {
        let failed = |errno| Error::io("Could not read the bitmap directory", errno);
        if extension.count == 0 || extension.count > MAX_BITMAPS {
            let message = format!("bitmaps_ext: {} bitmaps", extension.count);
            return Err(corrupt(message));
        }
        if extension.length > MAX_DIRECTORY_BYTES
            || !self.geometry.is_aligned(extension.offset.0)
            || extension.offset.0 >= MAX_HOST_OFFSET
        {
            return Err(corrupt("bitmaps_ext: invalid bitmap directory"));
        }
        let bytes = read_bytes(&self.file, extension.offset.0, extension.length as usize);
        let bytes = bytes.await.map_err(failed)?;
        directory::parse(&bytes, extension.count, &self.geometry)
    }

    async fn load_bitmap(&self, entry: &Entry) -> Result<Option<Arc<DirtyBitmap>>, Error> {
        if !entry.is_usable() {
            return Ok(None);
        }
        let name = entry.text();
        let bitmap = DirtyBitmap::new(BitmapOptions {
            name: Some(name.clone()),
            granularity: 1 << entry.granularity_bits,
            size: self.disk_size(),
        })?;
        bitmap.set_persistent(true);
        bitmap.set_read_only(!self.writable);
        if entry.flags & flag::IN_USE != 0 {
            bitmap.set_inconsistent();
        } else {
            let loaded = self.load_bits(entry, &bitmap).await;
            loaded.map_err(|error| error.context(format!("Could not read bitmap '{name}'")))?;
            if entry.flags & flag::AUTO == 0 {
                bitmap.disable();
            }
        }
        Ok(Some(Arc::new(bitmap)))
    }

    /// Sees to it that no bitmap is in the way of a change of the disk's length.
    pub(super) fn check_bitmaps_resizable(&self) -> Result<(), Error> {
        let stored = self.bitmaps.stored();
        stored
            .entries
            .iter()
            .try_for_each(|entry| match self.bitmaps.set.find(&entry.text()) {
                Some(bitmap) => bitmap.check(block::bitmap::Unusable::ANY),
                None => Ok(()),
            })
    }

    /// The bitmaps that the file has, for `info`.
    pub(super) fn describe_bitmaps(&self) -> Option<Value> {
        let stored = self.bitmaps.stored();
        let describe = |entry: &Entry| {
            let named = [(flag::IN_USE, "in-use"), (flag::AUTO, "auto")];
            let flags = named.iter().filter(|(bit, _)| entry.flags & bit != 0);
            json!({
                "flags": flags.map(|(_, name)| *name).collect::<Vec<_>>(),
                "name": entry.text(),
                "granularity": 1_u64 << entry.granularity_bits,
            })
        };
        (!stored.entries.is_empty()).then(|| stored.entries.iter().map(describe).collect())
    }
}

impl BitmapStore for Qcow2 {
    fn set(&self) -> &Arc<BitmapSet> {
        &self.bitmaps.set
    }

    fn can_store(&self, name: &str, granularity: u32) -> Result<(), Error> {
        let refuse = |message: String| Err(Error::new(ErrorKind::Invalid, message));
        if self.header.version < 3 {
            return refuse("Cannot store dirty bitmaps in qcow2 v2 files".into());
        }
        if name.len() > MAX_NAME {
            return refuse(format!(
                "Name length exceeds maximum ({MAX_NAME} characters)"
            ));
        }
        if granularity > MAX_GRANULARITY {
            return refuse(format!(
                "Granularity exceeds maximum ({MAX_GRANULARITY} bytes)"
            ));
        }
        let bytes = self
            .disk_size()
            .div_ceil(u64::from(granularity))
            .div_ceil(8);
        if bytes > MAX_PHYSICAL_BYTES {
            let message = "Too much space will be occupied by the bitmap. Use larger granularity";
            return refuse(message.into());
        }
        let list = self.bitmaps.set.list();
        let new = list.iter().filter(|bitmap| bitmap.is_persistent());
        let stored = self.bitmaps.stored();
        let new: Vec<_> = new
            .filter(|bitmap| stored.position(bitmap.name()).is_none())
            .collect();
        if stored.entries.len() + new.len() >= MAX_BITMAPS as usize {
            return refuse("Maximum number of persistent bitmaps is already reached".into());
        }
        let taken = stored.length
            + new
                .iter()
                .map(|bitmap| directory::length(bitmap.name()))
                .sum::<u64>();
        if taken + directory::length(name) > MAX_DIRECTORY_BYTES {
            return refuse("Not enough space in the bitmap directory".into());
        }
        Ok(())
    }

    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(self.remove_bitmap(name))
    }
}

/// The header extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extension {
    /// Bitmaps in the directory.
    pub(super) count: u32,
    /// Bytes of the directory.
    pub(super) length: u64,
    pub(super) offset: HostOffset,
}
/// Bytes that copies of the persistent ones of `bitmaps` take in an image with clusters of
/// `cluster_size`: their tables, their bits, and the directory.
pub(super) fn measure(bitmaps: &[Arc<DirtyBitmap>], cluster_size: u64) -> u64 {
    let kept = bitmaps
        .iter()
        .filter(|bitmap| bitmap.is_persistent() && !bitmap.is_inconsistent());
    let (mut bytes, mut directory) = (0, 0);
    for bitmap in kept {
        let clusters = bitmap.granules().div_ceil(8).div_ceil(cluster_size);
        bytes += clusters * cluster_size + (clusters * 8).next_multiple_of(cluster_size);
        directory += directory::length(bitmap.name());
    }
    bytes + u64::next_multiple_of(directory, cluster_size)
}
