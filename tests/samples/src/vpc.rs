//! Dynamic virtual hard disks (Microsoft's "Virtual Hard Disk Image Format Specification", 1.0).

use crate::{SECTOR, is_zero};

/// The image of a disk of whole sectors, with blocks of so many bytes, a power of two. Blocks of zeroes are
/// left out; the others are stored last first, and bits are set for the sectors that are not zeroes.
pub fn image(block_bytes: usize, disk: &[u8]) -> Vec<u8> {
    let blocks: Vec<&[u8]> = disk.chunks(block_bytes).collect();
    let mut footer = vec![0; SECTOR];
    put(&mut footer, 0, b"conectix");
    put(&mut footer, 8, &[0, 0, 0, 2, 0, 1, 0, 0]);
    put(&mut footer, 16, &512_u64.to_be_bytes());
    put(&mut footer, 28, b"win \x00\x06\x00\x01Wi2k");
    for offset in [40, 48] {
        put(&mut footer, offset, &(disk.len() as u64).to_be_bytes());
    }
    put(&mut footer, 56, &[0, 1, 4, 17, 0, 0, 0, 3]);
    put(&mut footer, 68, &[0x11; 16]);
    sum(&mut footer, 64);
    let mut header = vec![0; 1024];
    put(&mut header, 0, b"cxsparse");
    put(&mut header, 8, &[0xff; 8]);
    put(&mut header, 16, &1536_u64.to_be_bytes());
    put(&mut header, 24, &[0, 1, 0, 0]);
    put(&mut header, 28, &(blocks.len() as u32).to_be_bytes());
    put(&mut header, 32, &(block_bytes as u32).to_be_bytes());
    sum(&mut header, 36);
    let mut image = [footer.clone(), header].concat();
    image.resize(
        image.len() + (4 * blocks.len()).next_multiple_of(SECTOR),
        0xff,
    );
    for (number, content) in blocks.iter().enumerate().rev() {
        if is_zero(content) {
            continue;
        }
        let entry = (image.len() / SECTOR) as u32;
        put(&mut image, 1536 + 4 * number, &entry.to_be_bytes());
        let mut bitmap = vec![0; (block_bytes / SECTOR).div_ceil(8).next_multiple_of(SECTOR)];
        for (sector, bytes) in content.chunks(SECTOR).enumerate() {
            bitmap[sector / 8] |= u8::from(!is_zero(bytes)) << (7 - sector % 8);
        }
        image.extend(bitmap);
        image.extend_from_slice(content);
        image.resize(image.len() + block_bytes - content.len(), 0);
    }
    image.extend(footer);
    image
}

fn put(bytes: &mut [u8], offset: usize, field: &[u8]) {
    bytes[offset..offset + field.len()].copy_from_slice(field);
}

/// The complement of the sum of all bytes.
fn sum(bytes: &mut [u8], offset: usize) {
    let sum = !bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    put(bytes, offset, &sum.to_be_bytes());
}
