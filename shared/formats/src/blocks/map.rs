//! A map of blocks in memory: one atomic for each block of the disk.

use crate::bytes::read_bytes;
use block::{Edge, Error, ErrorKind};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Bytes of a map that are read at a time: an image may have tens of MiB of it.
const READ_STEP: usize = 1 << 20;

/// An entry of a map as it is kept in memory.
pub(crate) trait Entry: Copy + Eq + Send + Sync + 'static {
    /// Where it is kept.
    type Atomic: Send + Sync;
    /// A place to keep it.
    fn kept(self) -> Self::Atomic;
    /// What is kept.
    fn load(atomic: &Self::Atomic) -> Self;
    /// Keeps another one.
    fn store(self, atomic: &Self::Atomic);
}

macro_rules! entry {
    ($entry:ty, $atomic:ty) => {
        impl Entry for $entry {
            type Atomic = $atomic;
            fn kept(self) -> $atomic {
                <$atomic>::new(self)
            }
            fn load(atomic: &$atomic) -> Self {
                atomic.load(Ordering::Acquire)
            }
            fn store(self, atomic: &$atomic) {
                atomic.store(self, Ordering::Release);
            }
        }
    };
}

entry!(u32, AtomicU32);
entry!(u64, AtomicU64);

/// The entries of all blocks; of none when the image is only described.
pub(crate) struct BlockMap<E: Entry>(Box<[E::Atomic]>);

impl<E: Entry> BlockMap<E> {
    /// The `count` entries of `N` bytes at `offset` of a file.
    ///
    /// # Errors
    /// `Corrupt` when the file ends before they do, `Io`; said behind `context`.
    pub(crate) async fn read<const N: usize>(
        file: &Edge,
        (offset, count): (u64, usize),
        (decode, context): (impl Fn([u8; N]) -> E, &str),
    ) -> Result<Self, Error> {
        let end = offset.saturating_add((count * N) as u64);
        let length = file.node().length();
        if end > length {
            let message =
                format!("{context}: it ends at {end}, beyond the end of the file ({length})");
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        let mut entries = Vec::with_capacity(count);
        while entries.len() < count {
            let next = (count - entries.len()).min(READ_STEP / N);
            let at = offset + (entries.len() * N) as u64;
            let bytes = read_bytes(file, at, next * N).await;
            let bytes = bytes.map_err(|errno| Error::io(context, errno))?;
            let (read, _) = bytes.as_chunks();
            entries.extend(read.iter().map(|entry| decode(*entry).kept()));
        }
        Ok(Self(entries.into()))
    }
    /// The number of blocks that have an entry.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
    /// The entry of a block; `None` behind the last one.
    pub(crate) fn get(&self, block: u64) -> Option<E> {
        let entry = self.0.get(usize::try_from(block).ok()?);
        entry.map(E::load)
    }
    /// Changes the entry of a block that has one.
    pub(crate) fn set(&self, block: u64, entry: E) {
        entry.store(&self.0[block as usize]);
    }
    /// All entries, in the order of the disk.
    pub(crate) fn iter(&self) -> impl Iterator<Item = E> {
        self.0.iter().map(E::load)
    }
}

impl<E: Entry> FromIterator<E> for BlockMap<E> {
    fn from_iter<I: IntoIterator<Item = E>>(entries: I) -> Self {
        Self(entries.into_iter().map(E::kept).collect())
    }
}
