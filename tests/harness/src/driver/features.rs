//! Feature bits and configuration space of a virtio-blk device (virtio 1.2, sections 5.2.3, 5.2.4).

use anyhow::{Result, ensure};

use crate::wire::{read_u32, read_u64};

#[expect(missing_docs, reason = "the names are the specification's own")]
pub mod bits {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_PACKED: u64 = 1 << 34;
    pub const IN_ORDER: u64 = 1 << 35;
}

/// Every device feature that the driver can use, ring layout apart.
pub const ALL_BLOCK: u64 = bits::SIZE_MAX
    | bits::SEG_MAX
    | bits::RO
    | bits::BLK_SIZE
    | bits::FLUSH
    | bits::TOPOLOGY
    | bits::CONFIG_WCE
    | bits::MQ
    | bits::DISCARD
    | bits::WRITE_ZEROES;

/// Bytes of the configuration space up to and including `write_zeroes_may_unmap` and its padding.
pub const CONFIG_BYTES: usize = 60;

/// Offset of the `writeback` byte.
pub const CONFIG_WRITEBACK_AT: u32 = 32;

/// The configuration space, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockConfig {
    /// Size of the disk in sectors.
    pub capacity: u64,
    /// Largest segment in bytes, when `SIZE_MAX` is offered.
    pub size_max: u32,
    /// Most data segments in a request, when `SEG_MAX` is offered.
    pub seg_max: u32,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// 1 when the cache is write-back.
    pub writeback: u8,
    /// Number of virtqueues.
    pub num_queues: u16,
    /// Longest range of a discard in sectors.
    pub max_discard_sectors: u32,
    /// Most ranges in a discard.
    pub max_discard_seg: u32,
    /// Longest range of a write-zeroes in sectors.
    pub max_write_zeroes_sectors: u32,
    /// Most ranges in a write-zeroes.
    pub max_write_zeroes_seg: u32,
    /// 1 when write-zeroes may unmap.
    pub write_zeroes_may_unmap: u8,
}

impl BlockConfig {
    /// Decodes what `GET_CONFIG` returned.
    ///
    /// # Errors
    /// When there are fewer than [`CONFIG_BYTES`] bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        ensure!(
            bytes.len() >= CONFIG_BYTES,
            "configuration space of {} bytes",
            bytes.len()
        );
        Ok(Self {
            capacity: read_u64(bytes, 0),
            size_max: read_u32(bytes, 8),
            seg_max: read_u32(bytes, 12),
            block_size: read_u32(bytes, 20),
            writeback: bytes[32],
            num_queues: u16::from_le_bytes([bytes[34], bytes[35]]),
            max_discard_sectors: read_u32(bytes, 36),
            max_discard_seg: read_u32(bytes, 40),
            max_write_zeroes_sectors: read_u32(bytes, 48),
            max_write_zeroes_seg: read_u32(bytes, 52),
            write_zeroes_may_unmap: bytes[56],
        })
    }
}
