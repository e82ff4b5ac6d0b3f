//! Reading a log and carrying it out ([MS-VHDX] 2.3.2 and 2.3.3).
//!
//! ```text
//!   scan: sound entries of the header's GUID ─► runs: each entry where the one before ends, one number higher
//!     ─► of the heads whose tail is in their run, the one with the highest number
//!     ─► all descriptors from tail to head are checked ─► ... are written ─► flush
//! ```
//!
//! Nothing is written before all has been checked, and writing it again does no harm: the header refers to the log until
//! what was written is durable. Promises: memory and time are bounded by the log's length, whatever
//! it says. Must not know: who uses what is written.

use super::super::header::{Guid, Header};
use super::super::regions::{MAX_FILE, PLACES};
use super::super::{FileRegion, MIB, corrupt};
use super::entry::{
    DESCRIPTOR_BYTES, Descriptor, EntryHeader, HEADER_BYTES, PAGE, RunningSum, descriptor_area,
    restore,
};
use crate::bytes::{read_bytes, write_bytes};
use block::{ByteRange, Edge, Error, ErrorKind, Resize, ZeroFlags};
use std::collections::BTreeMap;

/// How often, on average, a byte of the log is added to a checksum before the log is given up.
const MAX_SUMS: u64 = 4;
/// Most bytes that a log zeroes: the longest table of blocks takes half of it.
const MAX_ZEROED: u64 = 1 << 30;
/// Descriptors in a sector.
const PER_SECTOR: u32 = (PAGE / DESCRIPTOR_BYTES) as u32;

/// A sound entry, and where in the log it is.
#[derive(Clone, Copy, Debug)]
struct Found {
    at: u64,
    header: EntryHeader,
}

/// A log that has something to be carried out.
pub(in super::super) struct Replay {
    log: FileRegion,
    /// Oldest first.
    entries: Vec<Found>,
}

fn unreadable(errno: block::Errno) -> Error {
    Error::io("Could not read the log", errno)
}

/// Reads `length` bytes at an offset of the log, which begins again behind its end.
async fn read_log(
    file: &Edge,
    log: FileRegion,
    (at, length): (u64, u64),
) -> Result<Vec<u8>, Error> {
    let at = at % log.length;
    let before = length.min(log.length - at);
    let mut bytes = read_bytes(file, log.offset + at, before as usize)
        .await
        .map_err(unreadable)?;
    if before < length {
        let rest = read_bytes(file, log.offset, (length - before) as usize).await;
        bytes.extend(rest.map_err(unreadable)?);
    }
    Ok(bytes)
}

impl Replay {
    /// What the log of `file` holds; `None` when there is nothing to be done.
    ///
    /// # Errors
    /// `Corrupt` when the log takes too long to make out, `Io`.
    pub(in super::super) async fn find(
        file: &Edge,
        header: &Header,
    ) -> Result<Option<Self>, Error> {
        let log = header.log;
        let found = scan(file, log, &header.log_guid).await?;
        let entries = active(&found, log.length);
        Ok((!entries.is_empty()).then_some(Self { log, entries }))
    }

    /// Carries it out, durably.
    ///
    /// # Errors
    /// `Corrupt`: then nothing was changed. `Io`.
    pub(in super::super) async fn apply(&self, file: &Edge) -> Result<(), Error> {
        let node = file.node();
        let (mut flushed, mut last) = (0, 0);
        for entry in &self.entries {
            flushed = flushed.max(entry.header.flushed);
            last = last.max(entry.header.last);
        }
        if flushed > node.length() {
            return Err(corrupt(format!(
                "the file is shorter than the 0x{flushed:x} bytes that its log was written for"
            )));
        }
        if last > MAX_FILE {
            return Err(corrupt(format!("a file of 0x{last:x} bytes")));
        }
        let end = last.next_multiple_of(MIB).max(node.length());
        let mut zeroed = 0;
        for entry in &self.entries {
            self.each(file, entry, async |change| {
                if let Change::Zero { length, .. } = change {
                    zeroed += length;
                }
                self.check(&change, (zeroed, end))
            })
            .await?;
        }
        if end > node.length() {
            let resize = Resize::to(end);
            node.resize(resize).await?;
        }
        for entry in &self.entries {
            self.each(file, entry, async |change| carry_out(file, change).await)
                .await?;
        }
        let flushed = node.flush().await;
        flushed.map_err(|errno| Error::io("Could not replay the log", errno))
    }

    /// Whether a change touches nothing but what a log may change.
    fn check(&self, change: &Change, (zeroed, end): (u64, u64)) -> Result<(), Error> {
        let (offset, length) = match change {
            Change::Page { offset, .. } => (*offset, PAGE as u64),
            Change::Zero { offset, length } => (*offset, *length),
        };
        let target = FileRegion { offset, length };
        let is_inside =
            offset >= PLACES[0] && offset.checked_add(length).is_some_and(|to| to <= end);
        if !is_inside || target.overlaps(&self.log) || zeroed > MAX_ZEROED {
            return Err(corrupt(format!(
                "the log changes 0x{length:x} bytes at 0x{offset:x}"
            )));
        }
        Ok(())
    }

    /// Shows all changes of an entry.
    async fn each(
        &self,
        file: &Edge,
        entry: &Found,
        mut show: impl AsyncFnMut(Change) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Found { at, header } = *entry;
        let mut data = descriptor_area(header.descriptors);
        let lies = || corrupt(format!("entry {} of the log lies", header.sequence));
        // As many descriptors at a time as a sector holds, with their data.
        let mut done = 0;
        while done < header.descriptors {
            let place = HEADER_BYTES as u64 + u64::from(done) * DESCRIPTOR_BYTES as u64;
            let count = PER_SECTOR.min(header.descriptors - done);
            let length = u64::from(count) * DESCRIPTOR_BYTES as u64;
            let bytes = read_log(file, self.log, (at + place, length)).await?;
            let descriptors: Option<Vec<Descriptor>> = bytes
                .chunks_exact(DESCRIPTOR_BYTES)
                .map(|descriptor| Descriptor::parse(descriptor, header.sequence))
                .collect();
            let descriptors = descriptors.ok_or_else(lies)?;
            let is_data = |one: &&Descriptor| matches!(one, Descriptor::Data { .. });
            let length = (descriptors.iter().filter(is_data).count() * PAGE) as u64;
            if data + length > header.length {
                return Err(lies());
            }
            let sectors = read_log(file, self.log, (at + data, length)).await?;
            data += length;
            let mut sectors = sectors.chunks_exact(PAGE);
            for descriptor in descriptors {
                let change = match descriptor {
                    Descriptor::Zero { offset, length } => Change::Zero { offset, length },
                    Descriptor::Data {
                        offset,
                        first,
                        last,
                    } => {
                        let sector = sectors.next().ok_or_else(lies)?;
                        let bytes = restore(sector, (first, last), header.sequence);
                        let bytes = bytes.ok_or_else(lies)?;
                        Change::Page { offset, bytes }
                    }
                };
                show(change).await?;
            }
            done += count;
        }
        Ok(())
    }
}

/// What one descriptor does to the file.
enum Change {
    Page { offset: u64, bytes: Vec<u8> },
    Zero { offset: u64, length: u64 },
}

async fn carry_out(file: &Edge, change: Change) -> Result<(), Error> {
    let done = match change {
        Change::Page { offset, bytes } => write_bytes(file, offset, &bytes).await,
        Change::Zero { length: 0, .. } => Ok(()),
        Change::Zero { offset, length } => {
            let range = ByteRange::new(offset, length);
            file.node().write_zeroes(range, ZeroFlags::default()).await
        }
    };
    done.map_err(|errno| Error::io("Could not replay the log", errno))
}

/// All sound entries. Sectors within one are not looked at: none of them begins like an entry.
async fn scan(file: &Edge, log: FileRegion, guid: &Guid) -> Result<Vec<Found>, Error> {
    let mut found: Vec<Found> = Vec::new();
    let mut sums = log.length * MAX_SUMS;
    let mut next = 0;
    for start in (0..log.length).step_by(MIB as usize) {
        if next >= start + MIB {
            continue;
        }
        let bytes = read_log(file, log, (start, MIB)).await?;
        for (number, sector) in bytes.chunks_exact(PAGE).enumerate() {
            let at = start + (number * PAGE) as u64;
            if at < next {
                continue;
            }
            let Some(header) = EntryHeader::parse(sector, guid, log.length) else {
                continue;
            };
            let Some(rest) = sums.checked_sub(header.length) else {
                let message = "VHDX log is corrupt: too many of its entries are broken";
                return Err(Error::new(ErrorKind::Corrupt, message));
            };
            sums = rest;
            if is_sound(file, log, (at, header.length)).await? {
                found.push(Found { at, header });
                next = at + header.length;
            }
        }
    }
    Ok(found)
}

async fn is_sound(file: &Edge, log: FileRegion, (at, length): (u64, u64)) -> Result<bool, Error> {
    let mut sum = RunningSum::new();
    let mut first = Vec::new();
    let mut done = 0;
    while done < length {
        let piece = MIB.min(length - done);
        let bytes = read_log(file, log, (at + done, piece)).await?;
        sum.add(&bytes);
        if done == 0 {
            first = bytes[..HEADER_BYTES].to_vec();
        }
        done += piece;
    }
    Ok(sum.is_that_of(&first))
}

/// The entries that have to be replayed, oldest first.
fn active(found: &[Found], log: u64) -> Vec<Found> {
    let by_place: BTreeMap<u64, usize> = (found.iter().map(|entry| entry.at)).zip(0..).collect();
    let follower = |index: usize| {
        let Found { at, header } = found[index];
        let next = *by_place.get(&((at + header.length) % log))?;
        let follows = Some(found[next].header.sequence) == header.sequence.checked_add(1);
        follows.then_some(next)
    };
    let mut is_first = vec![true; found.len()];
    for next in (0..found.len()).filter_map(follower) {
        is_first[next] = false;
    }
    // Every entry is in one run: numbers ascend, so no run is a circle.
    let mut run = vec![0; found.len()];
    for first in (0..found.len()).filter(|index| is_first[*index]) {
        let mut member = Some(first);
        while let Some(index) = member {
            run[index] = first;
            member = follower(index);
        }
    }
    let tail = |head: usize| {
        let tail = *by_place.get(&found[head].header.tail)?;
        let is_before = found[tail].header.sequence <= found[head].header.sequence;
        (is_before && run[tail] == run[head]).then_some(tail)
    };
    let heads = (0..found.len()).filter_map(|head| Some((head, tail(head)?)));
    let Some((head, tail)) = heads.max_by_key(|(head, _)| found[*head].header.sequence) else {
        return Vec::new();
    };
    let chain = std::iter::successors(Some(tail), |index| follower(*index));
    let count = found[head].header.sequence - found[tail].header.sequence + 1;
    chain
        .take(count as usize)
        .map(|index| found[index])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries at sectors of a log of eight, by (place, sectors, tail, number).
    fn numbers(entries: &[(u64, u64, u64, u64)]) -> Vec<u64> {
        let page = PAGE as u64;
        let found: Vec<Found> = entries
            .iter()
            .map(|&(at, sectors, tail, sequence)| Found {
                at: at * page,
                header: EntryHeader {
                    length: sectors * page,
                    tail: tail * page,
                    sequence,
                    descriptors: 0,
                    flushed: 0,
                    last: 0,
                },
            })
            .collect();
        let active = active(&found, 8 * page);
        active.iter().map(|entry| entry.header.sequence).collect()
    }

    #[test]
    fn the_active_run_is_that_of_the_highest_head_with_its_tail() {
        assert!(numbers(&[]).is_empty());
        assert_eq!(numbers(&[(0, 2, 0, 1), (2, 2, 0, 2)]), [1, 2]);
        assert_eq!(numbers(&[(0, 2, 0, 1), (2, 2, 2, 2)]), [2]);
        // A gap in the numbers, or in the places.
        assert_eq!(numbers(&[(0, 2, 0, 1), (2, 2, 2, 3)]), [3]);
        assert_eq!(numbers(&[(0, 2, 0, 1), (4, 2, 4, 2)]), [2]);
        // The later run has lost its tail.
        assert_eq!(numbers(&[(0, 2, 0, 1), (2, 2, 0, 3)]), [1]);
        // Around the end.
        assert_eq!(numbers(&[(0, 2, 6, 8), (2, 2, 2, 3), (6, 2, 6, 7)]), [7, 8]);
        // A tail that is later than its head.
        assert!(numbers(&[(0, 2, 2, 1), (2, 2, 6, 2)]).is_empty());
    }
}
