//! One dirty bitmap and its states.
//!
//! | state | meaning |
//! |---|---|
//! | recording | writes are marked |
//! | busy | a job or an export uses it: not to be changed, nor removed |
//! | frozen | busy, with a successor that records in its place |
//! | read-only | its stored form cannot be changed: image opened read-only |
//! | inconsistent | its stored form was not written back: only to be removed |

use super::words::{MAX_WORDS, WORD_BITS, Wanted, Words};
use super::{MAX_GRANULARITY, MIN_GRANULARITY};
use crate::driver::ByteRange;
use crate::error::{Error, ErrorKind, Result};
use sha2::{Digest, Sha256};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a new bitmap is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapOptions {
    /// Its name; a job's own bitmap has none.
    pub name: Option<String>,
    /// Bytes of a granule: a power of two, 512 B to 2 GiB.
    pub granularity: u32,
    /// Bytes of the node.
    pub size: u64,
}

/// A dirty bitmap.
pub struct DirtyBitmap {
    name: Option<String>,
    granularity_bits: u32,
    /// Bytes of the node.
    size: AtomicU64,
    words: Words,
    recording: AtomicBool,
    persistent: AtomicBool,
    inconsistent: AtomicBool,
    read_only: AtomicBool,
    busy: AtomicBool,
    successor: Mutex<Option<Arc<DirtyBitmap>>>,
}

/// What keeps a bitmap from being used for something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unusable {
    /// Also when it is in use.
    pub busy: bool,
    /// Also when it cannot be changed.
    pub read_only: bool,
    /// Also when its content is not known.
    pub inconsistent: bool,
}

impl Unusable {
    /// Nothing may be in the way.
    pub const ANY: Self = Self {
        busy: true,
        read_only: true,
        inconsistent: true,
    };
    /// A bitmap that cannot be changed may be read.
    pub const BUSY_OR_INCONSISTENT: Self = Self {
        read_only: false,
        ..Self::ANY
    };
    /// An inconsistent bitmap may be removed.
    pub const BUSY_OR_READ_ONLY: Self = Self {
        inconsistent: false,
        ..Self::ANY
    };
}

/// The bits that a bitmap had at some time.
pub struct SavedBits {
    /// Words that were not zero, by index.
    words: Vec<(u64, u64)>,
}

impl DirtyBitmap {
    /// A clean bitmap that records.
    ///
    /// # Errors
    /// `Invalid` for a granularity out of bounds, and for a bitmap of more than 512 MiB.
    pub fn new(options: BitmapOptions) -> Result<Self> {
        let granularity = options.granularity;
        if !granularity.is_power_of_two()
            || !(MIN_GRANULARITY..=MAX_GRANULARITY).contains(&granularity)
        {
            let message =
                format!("Granularity must be power of 2, 512 to 2147483648: {granularity}");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let bitmap = Self {
            name: options.name,
            granularity_bits: granularity.trailing_zeros(),
            size: AtomicU64::new(0),
            words: Words::new(),
            recording: AtomicBool::new(true),
            persistent: AtomicBool::new(false),
            inconsistent: AtomicBool::new(false),
            read_only: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            successor: Mutex::default(),
        };
        bitmap.resize(options.size)?;
        Ok(bitmap)
    }

    /// Its name; `""` when it has none.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }
    /// Whether it has a name.
    pub fn is_named(&self) -> bool {
        self.name.is_some()
    }
    /// Bytes of a granule.
    pub fn granularity(&self) -> u32 {
        1 << self.granularity_bits
    }
    /// Bytes of the node.
    pub fn size(&self) -> u64 {
        self.size.load(Acquire)
    }
    /// Granules, the last one perhaps partial.
    pub fn granules(&self) -> u64 {
        self.granules_of(self.size())
    }
    fn granules_of(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.granularity_bits)
    }
    /// Words that its bits fill.
    fn word_count(&self) -> u64 {
        self.granules().div_ceil(WORD_BITS)
    }

    /// Follows a change of the node's length. New parts are clean.
    pub fn resize(&self, size: u64) -> Result<()> {
        self.reserve(size)?;
        let (old, new) = (self.granules(), self.granules_of(size));
        self.size.store(size, Release);
        if new < old {
            self.words.clear(new, old - 1);
        }
        if let Some(successor) = &*self.successor() {
            successor.resize(size)?;
        }
        Ok(())
    }

    /// Makes the bitmap reach at least to `size`: writes beyond the end of a node that grows.
    pub fn grow(&self, size: u64) -> Result<()> {
        if size <= self.size() {
            return Ok(());
        }
        self.reserve(size)?;
        self.size.fetch_max(size, AcqRel);
        Ok(())
    }

    fn reserve(&self, size: u64) -> Result<()> {
        let words = self.granules_of(size).div_ceil(WORD_BITS);
        if words > MAX_WORDS {
            let message = "Dirty bitmap too large; use a larger granularity";
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        self.words.reserve(words);
        Ok(())
    }

    /// The granules that a range touches.
    fn granules_in(&self, range: ByteRange) -> Option<(u64, u64)> {
        let end = range.checked_end().unwrap_or(u64::MAX).min(self.size());
        (range.offset < end).then(|| {
            let bits = self.granularity_bits;
            (range.offset >> bits, (end - 1) >> bits)
        })
    }

    /// The range is dirty.
    pub fn mark(&self, range: ByteRange) {
        if let Some((first, last)) = self.granules_in(range) {
            self.words.set(first, last);
        }
    }
    /// The granules that the range touches are clean.
    pub fn clear(&self, range: ByteRange) {
        if let Some((first, last)) = self.granules_in(range) {
            self.words.clear(first, last);
        }
    }
    /// Everything is clean; the answer brings it back.
    pub fn clear_all(&self) -> SavedBits {
        let taken = (0..self.word_count()).map(|index| (index, self.words.take(index)));
        SavedBits {
            words: taken.filter(|(_, word)| *word != 0).collect(),
        }
    }
    /// What is dirty now, to be brought back later.
    pub fn saved(&self) -> SavedBits {
        let words = (0..self.word_count()).map(|index| (index, self.words.get(index)));
        SavedBits {
            words: words.filter(|(_, word)| *word != 0).collect(),
        }
    }
    /// What was dirty before is dirty again, besides what became dirty since.
    pub fn restore(&self, saved: &SavedBits) {
        for &(index, bits) in &saved.words {
            self.words.or(index, bits);
        }
    }
    /// Whether the granule of a byte is dirty.
    pub fn is_dirty(&self, offset: u64) -> bool {
        self.next_dirty(ByteRange::new(offset, 1)).is_some()
    }
    /// The first dirty part of `range`, as long as it is contiguous.
    pub fn next_dirty(&self, range: ByteRange) -> Option<ByteRange> {
        let (first, last) = self.granules_in(range)?;
        let start = self.words.find(first, last + 1, Wanted::Set)?;
        let end = self.words.find(start, last + 1, Wanted::Clear);
        let end = end.unwrap_or(last + 1) << self.granularity_bits;
        let offset = (start << self.granularity_bits).max(range.offset);
        let limit = range.checked_end().unwrap_or(u64::MAX).min(self.size());
        Some(ByteRange::new(offset, end.min(limit) - offset))
    }
    /// Every dirty area in order.
    pub fn dirty_areas(&self) -> impl Iterator<Item = ByteRange> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let rest = self.size().checked_sub(from)?;
            let area = self.next_dirty(ByteRange::new(from, rest))?;
            from = area.offset + area.length;
            Some(area)
        })
    }
    /// Dirty bytes, in whole granules.
    pub fn count(&self) -> u64 {
        let words =
            (0..self.word_count()).map(|index| u64::from(self.words.get(index).count_ones()));
        words.sum::<u64>() << self.granularity_bits
    }
    /// What is dirty in `other` is dirty here too, in this bitmap's granularity.
    pub fn merge(&self, other: &DirtyBitmap) {
        if self.granularity_bits == other.granularity_bits {
            let words = self.word_count().min(other.word_count());
            (0..words).for_each(|index| self.words.or(index, other.words.get(index)));
        } else {
            other.dirty_areas().for_each(|area| self.mark(area));
        }
    }

    /// The bytes of the words `first..first + count`, least significant bit first.
    pub fn to_bytes(&self, first: u64, count: u64) -> Vec<u8> {
        (first..first + count)
            .flat_map(|index| self.words.get(index).to_le_bytes())
            .collect()
    }
    /// Adds bits in the form of [`DirtyBitmap::to_bytes`], from word `first` on.
    pub fn add_bytes(&self, first: u64, bytes: &[u8]) {
        let granules = self.granules();
        for (index, chunk) in (first..).zip(bytes.chunks(8)) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let valid = granules.saturating_sub(index * WORD_BITS);
            let mask = match valid {
                64.. => u64::MAX,
                valid => (1 << valid) - 1,
            };
            self.words.or(index, u64::from_le_bytes(word) & mask);
        }
    }
    /// SHA-256 of the words in the order of the host, in hexadecimal.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        for index in 0..self.word_count().max(1) {
            hash.update(self.words.get(index).to_ne_bytes());
        }
        hash.finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// Whether writes are marked.
    pub fn is_recording(&self) -> bool {
        self.recording.load(Relaxed)
    }
    /// Whether writes are marked, here or in the successor that took its place.
    pub fn is_recorded(&self) -> bool {
        self.is_recording()
            || self
                .successor()
                .as_ref()
                .is_some_and(|next| next.is_recording())
    }
    /// Starts recording.
    pub fn enable(&self) {
        self.recording.store(true, Release);
    }
    /// Stops recording.
    pub fn disable(&self) {
        self.recording.store(false, Release);
    }
    /// Whether it is stored with the image.
    pub fn is_persistent(&self) -> bool {
        self.persistent.load(Acquire)
    }
    /// Has it stored with the image, or not.
    pub fn set_persistent(&self, persistent: bool) {
        self.persistent.store(persistent, Release);
    }
    /// Whether its content is not to be relied on.
    pub fn is_inconsistent(&self) -> bool {
        self.inconsistent.load(Acquire)
    }
    /// Its content is not to be relied on, for good.
    pub fn set_inconsistent(&self) {
        self.disable();
        self.inconsistent.store(true, Release);
    }
    /// Whether it cannot be changed.
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Acquire)
    }
    /// Allows or forbids changes.
    pub fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Release);
    }
    /// Whether a job or an export uses it.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Acquire)
    }
    /// Takes it for a job or an export; false when it is taken.
    #[must_use]
    pub fn try_take(&self) -> bool {
        !self.busy.swap(true, Acquire)
    }
    /// Gives it back.
    pub fn give_back(&self) {
        self.busy.store(false, Release);
    }

    /// The successor that records in its place while it is frozen.
    pub fn successor_of(&self) -> Option<Arc<DirtyBitmap>> {
        self.successor().clone()
    }

    pub(super) fn successor(&self) -> MutexGuard<'_, Option<Arc<DirtyBitmap>>> {
        self.successor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// What keeps it from being used, in QEMU's words.
    pub fn check(&self, unusable: Unusable) -> Result<()> {
        let name = self.name();
        if unusable.busy && self.is_busy() {
            return Err(super::ops::busy(self));
        }
        if unusable.read_only && self.is_read_only() {
            let message = format!("Bitmap '{name}' is readonly and cannot be modified");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        if unusable.inconsistent && self.is_inconsistent() {
            let message = format!("Bitmap '{name}' is inconsistent and cannot be used");
            let hint = "Try block-dirty-bitmap-remove to delete this bitmap from disk";
            return Err(Error::new(ErrorKind::Corrupt, message).with_hint(hint));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(size: u64, granularity: u32) -> DirtyBitmap {
        DirtyBitmap::new(BitmapOptions {
            name: Some("b".into()),
            granularity,
            size,
        })
        .unwrap()
    }

    fn areas(bitmap: &DirtyBitmap) -> Vec<(u64, u64)> {
        bitmap
            .dirty_areas()
            .map(|area| (area.offset, area.length))
            .collect()
    }

    #[test]
    fn areas_end_where_the_node_ends() {
        let bitmap = bitmap(1000, 512);
        bitmap.mark(ByteRange::new(999, 5000));
        assert_eq!(areas(&bitmap), [(512, 488)]);
        assert_eq!(bitmap.count(), 512);
        bitmap.mark(ByteRange::new(1000, 1));
        assert_eq!(bitmap.count(), 512, "beyond the end is nothing");
    }

    #[test]
    fn shrinking_forgets_and_growing_is_clean() {
        let bitmap = bitmap(1 << 20, 512);
        bitmap.mark(ByteRange::new(0, 1 << 20));
        bitmap.resize(4096).unwrap();
        bitmap.resize(64 << 20).unwrap();
        assert_eq!(areas(&bitmap), [(0, 4096)]);
        bitmap.mark(ByteRange::new((64 << 20) - 1, 1));
        assert_eq!(bitmap.count(), 4096 + 512);
    }

    #[test]
    fn a_restored_bitmap_has_old_and_new_bits() {
        let bitmap = bitmap(1 << 20, 4096);
        bitmap.mark(ByteRange::new(0, 4096));
        let saved = bitmap.clear_all();
        assert_eq!(bitmap.count(), 0);
        bitmap.mark(ByteRange::new(65536, 1));
        bitmap.restore(&saved);
        assert_eq!(areas(&bitmap), [(0, 4096), (65536, 4096)]);
    }

    #[test]
    fn merging_never_loses_a_bit_whatever_the_granularities() {
        let (fine, coarse) = (bitmap(1 << 20, 512), bitmap(1 << 20, 65536));
        fine.mark(ByteRange::new(70_000, 1));
        coarse.merge(&fine);
        assert_eq!(areas(&coarse), [(65536, 65536)]);
        let other = bitmap(1 << 20, 512);
        other.merge(&coarse);
        assert_eq!(areas(&other), [(65536, 65536)]);
    }

    #[test]
    fn bytes_beyond_the_last_granule_are_ignored() {
        let bitmap = bitmap(3 * 512, 512);
        bitmap.add_bytes(0, &[0xff; 16]);
        assert_eq!(areas(&bitmap), [(0, 3 * 512)]);
        assert_eq!(bitmap.to_bytes(0, 1), [7, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn impossible_bitmaps_are_refused() {
        for (granularity, size) in [(0, 0), (256, 0), (768, 0), (512, u64::MAX)] {
            let options = BitmapOptions {
                name: None,
                granularity,
                size,
            };
            assert!(DirtyBitmap::new(options).is_err(), "{granularity} {size}");
        }
    }

    #[test]
    fn threads_that_mark_at_once_lose_nothing() {
        let bitmap = Arc::new(bitmap(16 << 20, 512));
        let threads: Vec<_> = (0..4_u64)
            .map(|thread| {
                let bitmap = Arc::clone(&bitmap);
                std::thread::spawn(move || {
                    for granule in (thread..16 << 11).step_by(4) {
                        bitmap.mark(ByteRange::new(granule * 512, 1));
                    }
                })
            })
            .collect();
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        assert_eq!(bitmap.count(), 16 << 20);
    }
}
