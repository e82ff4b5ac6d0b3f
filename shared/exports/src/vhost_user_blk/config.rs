//! The configuration space of a virtio-blk device (virtio 1.2 section 5.2.4).

use std::mem::offset_of;

use block::Limits;
use virtio_bindings::virtio_blk::virtio_blk_config as Layout;

/// Unit of `capacity` and of all sector numbers, in bytes, whatever the logical block size.
pub(super) const SECTOR: u64 = 512;
/// Most data segments of a request that drivers are asked to keep to. With header and status it
/// still fits a ring of 128 without indirect descriptors.
const SEG_MAX: u32 = 126;
/// Longest segment that drivers are asked to keep to, in bytes. SeaBIOS multiplies it with
/// [`SEG_MAX`] and counts the blocks in 16 bits.
const SIZE_MAX: u32 = 1 << 17;
/// Longest discard or write of zeroes, in sectors: just below 2 GiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 0x003f_ffff;
/// Most ranges of one discard or write of zeroes.
pub(super) const MAX_RANGES: usize = 32;
/// Offset of the `writeback` byte, the only writable one.
pub(super) const WRITEBACK_OFFSET: usize = offset_of!(Layout, wce);
/// Length of the fields that are defined for the features that are always offered, in bytes.
const CONFIG_LEN: usize = 60;
/// The same with those of SECURE_ERASE.
const CONFIG_LEN_SECURE_ERASE: usize = 72;

/// What the fields are made of.
pub(super) struct Geometry {
    /// Length of the disk in bytes.
    pub(super) length: u64,
    /// Logical block size in bytes.
    pub(super) block_size: u32,
    /// Physical block size in bytes, a multiple of the logical one.
    pub(super) physical_block_size: u32,
    /// Whether the disk can be written.
    pub(super) writable: bool,
    /// Whether SECURE_ERASE is offered.
    pub(super) secure_erase: bool,
    /// Queues offered.
    pub(super) num_queues: u16,
    /// Whether the write cache is on.
    pub(super) writeback: bool,
    /// What suits the node.
    pub(super) limits: Limits,
}

impl Geometry {
    /// The configuration space as bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let block_size = self.block_size;
        let alignment = (self.limits.zero_alignment.max(block_size) / SECTOR as u32).max(1);
        let len = if self.secure_erase {
            CONFIG_LEN_SECURE_ERASE
        } else {
            CONFIG_LEN
        };
        let mut bytes = vec![0; len];
        let mut put = |offset: usize, field: &[u8]| {
            bytes[offset..offset + field.len()].copy_from_slice(field);
        };
        put(
            offset_of!(Layout, capacity),
            &(self.length / SECTOR).to_le_bytes(),
        );
        put(offset_of!(Layout, min_io_size), &1u16.to_le_bytes());
        put(WRITEBACK_OFFSET, &[u8::from(self.writeback)]);
        put(
            offset_of!(Layout, num_queues),
            &self.num_queues.to_le_bytes(),
        );
        let blocks = self.physical_block_size / block_size;
        put(
            offset_of!(Layout, physical_block_exp),
            &[blocks.trailing_zeros() as u8],
        );
        let mut words = vec![
            (offset_of!(Layout, size_max), SIZE_MAX),
            (offset_of!(Layout, seg_max), SEG_MAX),
            (offset_of!(Layout, blk_size), block_size),
            (
                offset_of!(Layout, opt_io_size),
                (self.limits.optimal_transfer / block_size).max(1),
            ),
        ];
        if self.writable {
            put(offset_of!(Layout, write_zeroes_may_unmap), &[1]);
            words.extend([
                (offset_of!(Layout, max_discard_sectors), MAX_RANGE_SECTORS),
                (offset_of!(Layout, max_discard_seg), MAX_RANGES as u32),
                (offset_of!(Layout, discard_sector_alignment), alignment),
                (
                    offset_of!(Layout, max_write_zeroes_sectors),
                    MAX_RANGE_SECTORS,
                ),
                (offset_of!(Layout, max_write_zeroes_seg), MAX_RANGES as u32),
            ]);
        }
        if self.secure_erase {
            words.extend([
                (
                    offset_of!(Layout, max_secure_erase_sectors),
                    MAX_RANGE_SECTORS,
                ),
                (offset_of!(Layout, max_secure_erase_seg), MAX_RANGES as u32),
                (
                    offset_of!(Layout, secure_erase_sector_alignment),
                    (block_size / SECTOR as u32).max(1),
                ),
            ]);
        }
        for (offset, value) in words {
            put(offset, &value.to_le_bytes());
        }
        bytes
    }
}
