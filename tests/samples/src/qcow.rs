//! qcow images, version 1, with compressed clusters.

use crate::is_zero;
use flate2::{Compress, Compression, FlushCompress};

/// log2 of the bytes of a cluster.
const CLUSTER_BITS: u32 = 12;
/// Bytes of a cluster.
pub const CLUSTER: usize = 1 << CLUSTER_BITS;
/// log2 of the entries of an L2 table.
const L2_BITS: u32 = 9;

/// Where things are, for those who change an image.
pub struct Places {
    /// The L1 table.
    pub l1: usize,
    /// The first L2 table.
    pub l2: usize,
}

/// Of every image.
pub const PLACES: Places = Places {
    l1: 48,
    l2: CLUSTER,
};

/// Raw deflate with the window that readers have; `None` when it gets no smaller.
fn deflate(cluster: &[u8]) -> Option<Vec<u8>> {
    let mut packed = vec![0; CLUSTER - 1];
    let level = Compression::default();
    let mut deflate = Compress::new_with_window_bits(level, false, CLUSTER_BITS as u8);
    let status = deflate.compress(cluster, &mut packed, FlushCompress::Finish);
    let is_done = status.ok()? == flate2::Status::StreamEnd;
    packed.truncate(deflate.total_out() as usize);
    is_done.then_some(packed)
}

/// The image of a disk of at most 2 MiB. Clusters of zeroes are left out, every other one is compressed if
/// that helps, the rest are plain, last first.
pub fn image(disk: &[u8]) -> Vec<u8> {
    assert!(disk.len() <= CLUSTER << L2_BITS);
    let mut entries = vec![0u64; 1 << L2_BITS];
    let mut image = vec![0; PLACES.l2 + entries.len() * 8];
    for (number, cluster) in disk.chunks(CLUSTER).enumerate().rev() {
        if is_zero(cluster) {
            continue;
        }
        let mut cluster = cluster.to_vec();
        cluster.resize(CLUSTER, 0);
        let packed = (number % 2 == 1).then(|| deflate(&cluster)).flatten();
        let (bytes, flags) = match packed {
            Some(packed) => {
                let length = (packed.len() as u64) << (63 - CLUSTER_BITS);
                (packed, 1 << 63 | length)
            }
            None => {
                image.resize(image.len().next_multiple_of(CLUSTER), 0);
                (cluster, 0)
            }
        };
        entries[number] = image.len() as u64 | flags;
        image.extend(bytes);
    }
    let mut put = |offset: usize, field: &[u8]| {
        image[offset..offset + field.len()].copy_from_slice(field);
    };
    put(0, b"QFI\xfb\0\0\0\x01");
    put(24, &(disk.len() as u64).to_be_bytes());
    put(32, &[CLUSTER_BITS as u8, L2_BITS as u8]);
    put(40, &(PLACES.l1 as u64).to_be_bytes());
    put(PLACES.l1, &(PLACES.l2 as u64).to_be_bytes());
    for (number, entry) in entries.into_iter().enumerate() {
        put(PLACES.l2 + 8 * number, &entry.to_be_bytes());
    }
    image
}
