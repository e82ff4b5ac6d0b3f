//! References of persistent bitmaps: the directory, each bitmap's table, and the clusters of its
//! bits ("Bitmaps"). A directory that makes no sense ends the check: its clusters would look
//! leaked, and a repair would give them back.

use super::super::tables::{HostOffset, OFFSET_MASK};
use super::Check;
use super::layout::{Directory, Extent, Raw};
use block::Errno;

/// Length of the fixed part of a directory entry: 0 u64 table offset, 8 u32 table entries, 12 u32
/// flags, 16 u8 type, 17 u8 granularity bits, 18 u16 name length, 20 u32 extra data length.
const FIXED: usize = 24;
/// The only type: dirty tracking.
const TYPE_DIRTY: u8 = 1;
/// Flags: in use, auto, extra data compatible.
const FLAGS: u32 = 7;
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
const MAX_NAME: u16 = 1023;
/// Most entries of a bitmap's table.
const MAX_TABLE: u32 = 0x0800_0000;
/// Most bytes of a bitmap.
const MAX_BYTES: u64 = 0x2000_0000;
/// Reserved bits of a table entry.
const RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Table entry without a cluster: all bits are one.
const ALL_ONES: u64 = 1;

impl Check<'_> {
    pub(super) async fn walk_bitmaps(&mut self) -> Result<(), Errno> {
        let Some(directory) = self.layout.bitmaps else {
            return Ok(());
        };
        self.count(directory.place, 1)?;
        let tables = self.read_directory(directory).await?;
        for table in tables {
            self.count(table, 1)?;
            self.check_memory(table.bytes.min(self.io.length()))?;
            let read = self.io.words(table).await;
            let entries = read.map_err(|errno| self.unreadable("a bitmap's table", errno))?;
            for entry in entries {
                self.walk_bitmap_entry(entry)?;
            }
        }
        Ok(())
    }

    fn walk_bitmap_entry(&mut self, entry: u64) -> Result<(), Errno> {
        let offset = entry & OFFSET_MASK;
        let sound = entry & RESERVED == 0
            && self.layout.is_aligned(offset)
            && (offset == 0 || entry & ALL_ONES == 0);
        if !sound {
            self.report.say(format_args!(
                "ERROR bitmap table entry {entry:#x} is not valid"
            ));
            self.result.corruptions += 1;
            return Ok(());
        }
        let bytes = if offset == 0 {
            0
        } else {
            self.layout.cluster_size()
        };
        let offset = HostOffset(offset);
        self.count(Extent { offset, bytes }, 1)
    }

    /// The tables of the bitmaps.
    async fn read_directory(&mut self, directory: Directory) -> Result<Vec<Extent>, Errno> {
        let bytes = directory.place.bytes;
        self.check_memory(bytes)?;
        let read = self.io.read(directory.place.offset.0, bytes).await;
        let bytes = read.map_err(|errno| self.unreadable("the bitmap directory", errno))?;
        let mut tables = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let parsed = self
                .parse_entry(rest)
                .filter(|(_, length)| *length <= rest.len());
            let Some((table, length)) = parsed else {
                return Err(self.bad_directory());
            };
            tables.push(table);
            rest = &rest[length..];
        }
        if tables.len() != directory.bitmaps as usize {
            return Err(self.bad_directory());
        }
        Ok(tables)
    }

    fn bad_directory(&mut self) -> Errno {
        self.report
            .say(format_args!("ERROR the bitmap directory is not valid"));
        self.result.corruptions += 1;
        Errno::EINVAL
    }

    /// A directory entry's table, and the entry's length.
    fn parse_entry(&self, bytes: &[u8]) -> Option<(Extent, usize)> {
        let fixed = bytes.get(..FIXED)?;
        let raw = Raw(fixed);
        let (offset, entries, name) = (raw.u64(0), raw.u32(8), raw.u16(18));
        let sound = fixed[16] == TYPE_DIRTY
            && raw.u32(12) & !FLAGS == 0
            && GRANULARITY_BITS.contains(&fixed[17])
            && (1..=MAX_NAME).contains(&name)
            && raw.u32(20) == 0
            && (1..=MAX_TABLE).contains(&entries)
            && u64::from(entries) * self.layout.cluster_size() <= MAX_BYTES
            && offset != 0
            && offset < super::super::tables::MAX_HOST_OFFSET
            && self.layout.is_aligned(offset);
        let place = Extent {
            offset: HostOffset(offset),
            bytes: u64::from(entries) * 8,
        };
        let length = (FIXED + usize::from(name)).next_multiple_of(8);
        sound.then_some((place, length))
    }
}
