//! The bitmaps of one node, and how requests mark them.

use super::dirty::{BitmapOptions, DirtyBitmap};
use crate::driver::ByteRange;
use crate::error::Result;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// Copies of the list, so that threads which mark at once do not share a lock.
const SHARDS: usize = 16;

type List = Arc<[Arc<DirtyBitmap>]>;

/// The bitmaps of a node, in order of attachment.
pub struct BitmapSet {
    /// Whether there are any: all that a write looks at when there are none.
    any: AtomicBool,
    shards: [Shard; SHARDS],
    /// Held while the list changes.
    changing: Mutex<()>,
}

#[repr(align(128))]
struct Shard(RwLock<List>);

impl Default for BitmapSet {
    fn default() -> Self {
        let empty: List = Arc::new([]);
        Self {
            any: AtomicBool::new(false),
            shards: std::array::from_fn(|_| Shard(RwLock::new(Arc::clone(&empty)))),
            changing: Mutex::default(),
        }
    }
}

impl BitmapSet {
    /// Whether requests have to be recorded.
    #[inline]
    pub fn is_empty(&self) -> bool {
        !self.any.load(Relaxed)
    }

    /// The bitmaps now.
    pub fn list(&self) -> Arc<[Arc<DirtyBitmap>]> {
        Arc::clone(
            &self.shards[0]
                .0
                .read()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    /// The bitmap of that name.
    pub fn find(&self, name: &str) -> Option<Arc<DirtyBitmap>> {
        let list = self.list();
        let named = |bitmap: &&Arc<DirtyBitmap>| bitmap.is_named() && bitmap.name() == name;
        list.iter().find(named).cloned()
    }

    /// Attaches a bitmap: it records from now on.
    pub fn attach(&self, bitmap: Arc<DirtyBitmap>) {
        self.change(|list| list.push(bitmap));
    }

    /// Detaches a bitmap.
    pub fn detach(&self, bitmap: &Arc<DirtyBitmap>) {
        self.change(|list| list.retain(|other| !Arc::ptr_eq(other, bitmap)));
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<DirtyBitmap>>)) {
        let _changing = self.changing();
        let mut list = self.list().to_vec();
        change(&mut list);
        let any = !list.is_empty();
        let list: List = list.into();
        if any {
            self.any.store(true, SeqCst);
        }
        for shard in &self.shards {
            *shard.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&list);
        }
        if !any {
            self.any.store(false, SeqCst);
        }
    }

    /// Marks a range in every bitmap that records.
    pub fn mark(&self, range: ByteRange) {
        let shard = &self.shards[shard_of_thread()];
        let list = shard.0.read().unwrap_or_else(PoisonError::into_inner);
        for bitmap in list.iter().filter(|bitmap| bitmap.is_recording()) {
            bitmap.mark(range);
        }
    }

    /// Marks a range now and when the result is dropped.
    pub fn record(self: &Arc<Self>, range: ByteRange) -> Recording {
        self.mark(range);
        Recording {
            set: Arc::clone(self),
            range,
        }
    }

    /// Follows a change of the node's length.
    pub fn resize(&self, size: u64) -> Result<()> {
        let list = self.list();
        list.iter().try_for_each(|bitmap| bitmap.resize(size))
    }

    /// Makes the bitmaps reach at least to `size`.
    pub fn grow(&self, size: u64) -> Result<()> {
        let list = self.list();
        list.iter().try_for_each(|bitmap| bitmap.grow(size))
    }

    /// Freezes `bitmap`: from now on a successor, which starts clean, records in its place.
    /// The caller has taken the bitmap.
    pub fn freeze(&self, bitmap: &Arc<DirtyBitmap>) -> Result<Arc<DirtyBitmap>> {
        let successor = Arc::new(DirtyBitmap::new(BitmapOptions {
            name: None,
            granularity: bitmap.granularity(),
            size: bitmap.size(),
        })?);
        if !bitmap.is_recording() {
            successor.disable();
        }
        // Both record for a moment: too much is better than too little.
        self.attach(Arc::clone(&successor));
        bitmap.disable();
        *bitmap.successor() = Some(Arc::clone(&successor));
        Ok(successor)
    }

    /// Ends a freeze: the bitmap goes on with what its successor recorded, and, unless it is
    /// `consumed`, with what it had.
    pub fn thaw(&self, bitmap: &Arc<DirtyBitmap>, consumed: Consumed) {
        let Some(successor) = bitmap.successor().take() else {
            return;
        };
        if consumed == Consumed::Yes {
            bitmap.clear_all();
        }
        if successor.is_recording() {
            bitmap.enable();
        }
        self.detach(&successor);
        bitmap.merge(&successor);
    }
}

/// Whether a frozen bitmap did what it was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consumed {
    /// A backup has copied what it said.
    Yes,
    /// It failed: everything is still to be copied.
    No,
}

fn shard_of_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static SHARD: usize = NEXT.fetch_add(1, Relaxed) % SHARDS;
    }
    SHARD.with(|shard| *shard)
}

/// A request that is recorded: marks its range again when it ends.
#[must_use = "the range is marked a second time when this is dropped"]
pub struct Recording {
    set: Arc<BitmapSet>,
    range: ByteRange,
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.set.mark(self.range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(name: &str) -> Arc<DirtyBitmap> {
        let options = BitmapOptions {
            name: Some(name.into()),
            granularity: 512,
            size: 1 << 20,
        };
        Arc::new(DirtyBitmap::new(options).unwrap())
    }

    #[test]
    fn a_bit_cleared_while_a_request_runs_is_set_when_it_ends() {
        let set = Arc::new(BitmapSet::default());
        let bitmap = bitmap("a");
        set.attach(Arc::clone(&bitmap));
        let request = set.record(ByteRange::new(0, 1));
        assert_eq!(bitmap.count(), 512, "marked before anything is written");
        bitmap.clear_all();
        drop(request);
        assert_eq!(bitmap.count(), 512);
    }

    #[test]
    fn a_frozen_bitmap_stands_still_and_gets_its_successors_bits_back() {
        let set = Arc::new(BitmapSet::default());
        let bitmap = bitmap("a");
        set.attach(Arc::clone(&bitmap));
        set.mark(ByteRange::new(0, 1));
        for (consumed, expected) in [(Consumed::No, 1024), (Consumed::Yes, 512)] {
            assert!(bitmap.try_take());
            set.freeze(&bitmap).unwrap();
            set.mark(ByteRange::new(4096, 1));
            assert!(!bitmap.is_recording() && bitmap.is_recorded());
            set.thaw(&bitmap, consumed);
            bitmap.give_back();
            assert_eq!(bitmap.count(), expected);
            assert!(bitmap.is_recording());
        }
        assert_eq!(set.list().len(), 1);
    }

    #[test]
    fn the_last_bitmap_detached_leaves_nothing_to_record() {
        let set = Arc::new(BitmapSet::default());
        let bitmap = bitmap("a");
        assert!(set.is_empty());
        set.attach(Arc::clone(&bitmap));
        assert!(!set.is_empty());
        set.detach(&bitmap);
        assert!(set.is_empty());
        set.mark(ByteRange::new(0, 1));
        assert_eq!(bitmap.count(), 0);
    }
}
