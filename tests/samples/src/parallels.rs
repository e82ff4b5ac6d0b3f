//! Parallels' expandable images (QEMU docs/interop/parallels.txt).

use crate::{SECTOR, is_zero};

/// What an image is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The older one: blocks at any sector.
    Sectors,
    /// The newer one.
    Blocks,
    /// The newer one, with an extension whose checksum is wrong.
    Extended,
}

/// The shape of an image.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Which form.
    pub form: Form,
    /// Sectors of a block.
    pub block_sectors: usize,
}

/// The image of a disk of whole sectors. Blocks of zeroes are left out; the others are stored last first,
/// in the older form with a sector of noise between them.
pub fn image(shape: Shape, disk: &[u8]) -> Vec<u8> {
    let block = shape.block_sectors * SECTOR;
    let blocks: Vec<&[u8]> = disk.chunks(block).collect();
    let is_older = shape.form == Form::Sectors;
    let start = (64 + 4 * blocks.len()).next_multiple_of(if is_older { SECTOR } else { block });
    let mut image = vec![0; start];
    let mut put = |offset: usize, field: &[u8]| {
        image[offset..offset + field.len()].copy_from_slice(field);
    };
    put(
        0,
        if is_older {
            b"WithoutFreeSpace"
        } else {
            b"WithouFreSpacExt"
        },
    );
    for (offset, field) in [
        (16, 2),
        (20, 16),
        (24, 1),
        (28, shape.block_sectors),
        (32, blocks.len()),
        (36, disk.len() / SECTOR),
        // The older form may leave it to the reader to find out.
        (48, if is_older { 0 } else { start / SECTOR }),
        (
            56,
            if shape.form == Form::Extended {
                start / SECTOR
            } else {
                0
            },
        ),
    ] {
        put(offset, &(field as u32).to_le_bytes());
    }
    for (number, content) in blocks.iter().enumerate().rev() {
        if is_zero(content) {
            continue;
        }
        if is_older {
            image.extend([0x5a; SECTOR]);
        }
        let unit = if is_older { SECTOR } else { block };
        let entry = (image.len() / unit) as u32;
        image[64 + 4 * number..][..4].copy_from_slice(&entry.to_le_bytes());
        image.extend_from_slice(content);
        // What the last block has behind the disk, too.
        image.resize(image.len() + block - content.len(), 0);
    }
    image
}
