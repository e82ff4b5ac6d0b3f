//! What a disk must show: the changes of a script, the newest last.

use block::ByteRange;

/// The changes made to a disk.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// Range, and what fills it; `None` when that is not known.
    changes: Vec<(ByteRange, Option<u8>)>,
}

impl Model {
    /// The range is filled with a byte, or with anything.
    pub fn change(&mut self, range: ByteRange, fill: Option<u8>) {
        self.changes.push((range, fill));
    }

    /// The disk was another one before.
    pub fn forget(&mut self) {
        self.changes.clear();
    }

    /// What lies beyond `length` is not known any more.
    pub fn cut(&mut self, length: u64) {
        let beyond = ByteRange::new(length, u64::MAX - length);
        self.changes.push((beyond, None));
    }

    /// The ranges whose content is known, at least in part.
    pub fn ranges(&self) -> impl Iterator<Item = ByteRange> {
        let known = self.changes.iter().filter(|(_, fill)| fill.is_some());
        known.map(|(range, _)| *range)
    }

    /// Compares what was read at `offset`.
    ///
    /// # Errors
    /// A byte that is another one than was written.
    pub fn compare(&self, offset: u64, read: &[u8]) -> Result<(), String> {
        let mut expected: Vec<Option<u8>> = vec![None; read.len()];
        let end = offset + read.len() as u64;
        for (range, fill) in &self.changes {
            let last = range.checked_end().unwrap_or(u64::MAX);
            let (from, to) = (range.offset.max(offset), last.min(end));
            if from < to {
                expected[(from - offset) as usize..(to - offset) as usize].fill(*fill);
            }
        }
        for (at, (read, expected)) in read.iter().zip(expected).enumerate() {
            if expected.is_some_and(|expected| expected != *read) {
                let at = offset + at as u64;
                return Err(format!("byte {at} is {read:#x}, was written {expected:x?}"));
            }
        }
        Ok(())
    }
}
