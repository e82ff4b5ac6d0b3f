//! QED images (QEMU docs/interop/qed_spec.txt), with little clusters.

use crate::{SECTOR, is_zero};

/// Bytes of a cluster.
pub const CLUSTER: usize = 4096;
/// Clusters of a table.
const TABLE: usize = 2;
const ENTRIES: usize = TABLE * CLUSTER / 8;

/// What a header says beside the sizes.
pub const NEED_CHECK: u64 = 2;

/// Where things are, for those who change an image.
pub struct Places {
    /// The L1 table.
    pub l1: usize,
    /// The first L2 table.
    pub l2: usize,
}

/// Of every image of a disk that is not all zeroes.
pub const PLACES: Places = Places {
    l1: CLUSTER,
    l2: CLUSTER * (1 + TABLE),
};

/// The image of a disk of whole sectors, of at most 4 MiB. Every other cluster of zeroes is stored as
/// such, the rest of them as nothing; the others are stored last first.
pub fn image(disk: &[u8], features: u64) -> Vec<u8> {
    assert!(disk.len().is_multiple_of(SECTOR) && disk.len() <= ENTRIES * CLUSTER);
    let mut entries = vec![0u64; ENTRIES];
    let data = PLACES.l2 + TABLE * CLUSTER;
    let mut stored = Vec::new();
    for (number, cluster) in disk.chunks(CLUSTER).enumerate().rev() {
        if is_zero(cluster) {
            entries[number] = number as u64 % 2;
            continue;
        }
        entries[number] = (data + stored.len()) as u64;
        stored.extend_from_slice(cluster);
        stored.resize(stored.len().next_multiple_of(CLUSTER), 0);
    }
    let mut image = vec![0; data];
    let mut put = |offset: usize, field: &[u8]| {
        image[offset..offset + field.len()].copy_from_slice(field);
    };
    put(0, b"QED\0");
    for (offset, field) in [(4, CLUSTER), (8, TABLE), (12, 1)] {
        put(offset, &(field as u32).to_le_bytes());
    }
    for (offset, field) in [
        (16, features),
        (40, PLACES.l1 as u64),
        (48, disk.len() as u64),
        (PLACES.l1, PLACES.l2 as u64),
    ] {
        put(offset, &field.to_le_bytes());
    }
    for (number, entry) in entries.into_iter().enumerate() {
        put(PLACES.l2 + 8 * number, &entry.to_le_bytes());
    }
    image.extend(stored);
    image
}
