//! Dynamic disks of VirtualBox (VDICore.h).

use crate::{SECTOR, is_zero};

/// Bytes of a block.
const BLOCK: usize = 1 << 20;

/// The image of a disk of whole sectors. Blocks of zeroes are left out, every other one of them as
/// discarded; the others are stored last first.
pub fn image(disk: &[u8]) -> Vec<u8> {
    let blocks: Vec<&[u8]> = disk.chunks(BLOCK).collect();
    let mut map = vec![u32::MAX; blocks.len()];
    let mut stored = Vec::new();
    for (number, block) in blocks.iter().enumerate().rev() {
        if is_zero(block) {
            map[number] -= number as u32 % 2;
            continue;
        }
        map[number] = (stored.len() / BLOCK) as u32;
        stored.extend_from_slice(block);
        stored.resize(stored.len().next_multiple_of(BLOCK), 0);
    }
    let data = SECTOR + (4 * map.len()).next_multiple_of(SECTOR);
    let mut image = vec![0; data];
    let mut put = |offset: usize, field: u32| {
        image[offset..offset + 4].copy_from_slice(&field.to_le_bytes());
    };
    for (offset, field) in [
        (64, 0xbeda_107f),
        (68, 0x0001_0001),
        (72, 0x180),
        (76, 1),
        (340, SECTOR as u32),
        (344, data as u32),
        (360, SECTOR as u32),
        (368, disk.len() as u32),
        (376, BLOCK as u32),
        (384, map.len() as u32),
        (388, (stored.len() / BLOCK) as u32),
    ] {
        put(offset, field);
    }
    for (number, entry) in map.into_iter().enumerate() {
        put(SECTOR + 4 * number, entry);
    }
    image.extend(stored);
    image
}
