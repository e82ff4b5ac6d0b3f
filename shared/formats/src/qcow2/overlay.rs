//! What a killed writer had not flushed, for an image that is only read.
//!
//! A writable image takes the redo log over as dirty metadata and flushes it. One that is only read
//! must not write, and its log belongs to the next writer: so the log stays as it is, L1 entries are
//! replaced in memory, and L2 entries whenever their slice is read from the file. Nobody writes
//! meanwhile: the image's locks keep writers out. Refcounts are not asked for by readers.

use super::Qcow2;
use super::redo::{L2Run, RedoRecord, does_not_fit};
use super::tables::{Geometry, GuestCluster};
use block::Error;
use block::redo_log::Record;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::AcqRel;

/// Changes of L2 entries that the file lacks.
#[derive(Default)]
pub(super) struct Overlay {
    /// In the order in which they were made, for each slice that they touch.
    by_slice: BTreeMap<u64, Vec<L2Run>>,
}

impl Overlay {
    fn add(&mut self, geometry: &Geometry, run: L2Run) {
        let end = run.first.0 + run.count;
        let mut cluster = run.first;
        while cluster.0 < end {
            let slice = geometry.entry_position(cluster).slice;
            self.by_slice.entry(slice).or_default().push(run);
            cluster = geometry.l2_slice_end(cluster);
        }
    }

    /// Brings the bytes of an L2 slice up to date.
    pub(super) fn apply(&self, geometry: &Geometry, slice: u64, bytes: &mut [u8]) {
        for run in self.by_slice.get(&slice).into_iter().flatten() {
            for number in run.first.0..run.first.0 + run.count {
                let position = geometry.entry_position(GuestCluster(number));
                if position.slice != slice {
                    continue;
                }
                let step = match run.contiguous {
                    true => geometry.cluster_size(),
                    false => 0,
                };
                let distance = (number - run.first.0) * step;
                let descriptor = run.value.descriptor.0.wrapping_add(distance);
                let at = geometry.l2_word(position.entry) * 8;
                bytes[at..at + 8].copy_from_slice(&descriptor.to_be_bytes());
                if geometry.extended_l2 {
                    bytes[at + 8..at + 16].copy_from_slice(&run.value.bitmap.to_be_bytes());
                }
            }
        }
    }
}

impl Qcow2 {
    /// Shows what a killed writer had told its guest is done.
    ///
    /// # Errors
    /// `Corrupt` when the records are not of this image.
    pub(super) fn show_left_behind(&mut self, records: &[Record]) -> Result<(), Error> {
        for record in records {
            let record = RedoRecord::decode(record).ok_or_else(does_not_fit)?;
            // Readers look at no refcounts, whose table is not in memory.
            if matches!(record, RedoRecord::RefcountTable { .. }) {
                continue;
            }
            if !self.fits(&record) {
                return Err(does_not_fit());
            }
            match record {
                RedoRecord::L1 { index, value } => self.l1.set(index, value),
                RedoRecord::Refcount { run, .. } => {
                    let end = run.end() << self.geometry.cluster_bits;
                    self.host_end.fetch_max(end, AcqRel);
                }
                RedoRecord::L2(run) => self.overlay.add(&self.geometry, run),
                RedoRecord::RefcountTable { .. } | RedoRecord::Free { .. } => {}
            }
        }
        Ok(())
    }
}
