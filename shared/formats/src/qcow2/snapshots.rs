//! The snapshot table, as far as writing needs it: where the snapshots' L1 tables are.
//!
//! Snapshots share clusters with the active image. A shared cluster has a refcount above one and
//! no COPIED flag, so a write goes to a new cluster and the snapshot keeps the old one.

use super::header::Header;
use super::read_bytes;
use super::tables::{HostOffset, MAX_HOST_OFFSET, MAX_L1_BYTES};
use block::{Edge, Error, ErrorKind};

/// Largest snapshot table in bytes.
const MAX_TABLE_BYTES: u64 = 64 << 20;
/// Largest extra data of an entry in bytes.
const MAX_EXTRA: u32 = 1024;
/// The fixed part of an entry: 0 L1 offset u64, 8 L1 entries u32, 12 id length u16, 14 name
/// length u16, 16 date, 24 clock, 32 VM state size u32, 36 extra data length u32.
const FIXED: usize = 40;

/// What is known of the snapshots.
#[derive(Default)]
pub(super) struct SnapshotTable {
    /// Length of the table in bytes.
    pub(super) length: u64,
    /// Offset and length in bytes of each snapshot's L1 table.
    pub(super) l1_tables: Vec<(HostOffset, u64)>,
}

impl SnapshotTable {
    /// Reads the table that `header` refers to.
    pub(super) async fn read(file: &Edge, header: &Header) -> Result<Self, Error> {
        let mut table = Self::default();
        let failed = |errno| Error::io("Could not read snapshots", errno);
        for number in 0..header.snapshots {
            let at = header.snapshots_offset.0 + table.length;
            let fixed = read_bytes(file, at, FIXED).await.map_err(failed)?;
            let half = |at: usize| u64::from(u16::from_be_bytes([fixed[at], fixed[at + 1]]));
            let word = |at: usize| (half(at) << 16 | half(at + 2)) as u32;
            let l1_offset = u64::from(word(0)) << 32 | u64::from(word(4));
            let l1_bytes = u64::from(word(8)) * 8;
            let extra = word(36);
            let aligned = l1_offset & ((1 << header.cluster_bits) - 1) == 0;
            if !aligned || l1_offset >= MAX_HOST_OFFSET || l1_bytes > MAX_L1_BYTES {
                let message = format!("Snapshot table entry {number} has an invalid L1 table");
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
            if extra > MAX_EXTRA {
                let message = format!("Snapshot table entry {number}: too much extra metadata");
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
            table.l1_tables.push((HostOffset(l1_offset), l1_bytes));
            let length = FIXED as u64 + u64::from(extra) + half(12) + half(14);
            table.length += length.next_multiple_of(8);
            if table.length > MAX_TABLE_BYTES {
                return Err(Error::new(ErrorKind::Corrupt, "Snapshot table too large"));
            }
        }
        Ok(table)
    }
}
