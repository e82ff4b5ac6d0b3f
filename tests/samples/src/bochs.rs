//! Growing redologs of Bochs (iodev/hdimage/hdimage.h).

use crate::{SECTOR, is_zero};

/// Choices of an image.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// 1 or 2.
    pub version: u32,
    /// Bytes of an extent: a power of two, 512 at least.
    pub extent_bytes: usize,
    /// Extents that the catalog has room for beyond those of the disk.
    pub spare: usize,
}

/// The image of a disk of whole sectors. Extents without data are left out; of the others the sectors
/// that hold zeroes are not marked as stored, and hold noise. Extents are stored last first.
pub fn image(shape: Shape, disk: &[u8]) -> Vec<u8> {
    let extents: Vec<&[u8]> = disk.chunks(shape.extent_bytes).collect();
    let sectors = shape.extent_bytes / SECTOR;
    let bitmap_bytes = sectors.div_ceil(8);
    let entries = extents.len() + shape.spare;
    let mut image = vec![0; SECTOR];
    let mut put = |offset: usize, bytes: &[u8]| {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"Bochs Virtual HD Image");
    put(32, b"Redolog");
    put(48, b"Growing");
    let version = shape.version as usize;
    let fields = [
        version << 16,
        SECTOR,
        entries,
        bitmap_bytes,
        shape.extent_bytes,
    ];
    for (number, field) in fields.into_iter().enumerate() {
        put(64 + 4 * number, &(field as u32).to_le_bytes());
    }
    let length = (disk.len() as u64).to_le_bytes();
    put(if shape.version == 1 { 84 } else { 88 }, &length);

    let mut catalog = vec![u32::MAX; entries];
    let mut stored = Vec::new();
    for (index, extent) in extents.iter().enumerate().rev() {
        if is_zero(extent) {
            continue;
        }
        catalog[index] = (stored.len() / stride(bitmap_bytes, sectors)) as u32;
        let mut bitmap = vec![0; bitmap_bytes.next_multiple_of(SECTOR)];
        let mut data = vec![0xa5; shape.extent_bytes];
        for (number, sector) in extent.chunks(SECTOR).enumerate() {
            if !is_zero(sector) {
                bitmap[number / 8] |= 1 << (number % 8);
                data[number * SECTOR..][..SECTOR].copy_from_slice(sector);
            }
        }
        stored.extend(bitmap);
        stored.extend(data);
    }
    image.extend(catalog.iter().flat_map(|entry| entry.to_le_bytes()));
    image.extend(stored);
    image
}

/// Bytes from one stored extent to the next.
fn stride(bitmap_bytes: usize, sectors: usize) -> usize {
    bitmap_bytes.next_multiple_of(SECTOR) + sectors * SECTOR
}
