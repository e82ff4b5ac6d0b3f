//! How large a new image becomes, by the same reckoning as the peer's: data, and the metadata for a
//! disk that is written all over.
//!
//! ```text
//!   header | L1 table | L2 tables | [encryption header] | data | refcount table and blocks for all that
//! ```

use super::create::{MIN_EXTENDED_CLUSTER, too_large};
use super::header::CLUSTER_BITS;
use super::tables::MAX_L1_BYTES;
use super::{bitmaps, crypto};
use crate::luks;
use block::copy::status::above;
use block::create::CreateRequest;
use block::measure::Measured;
use block::{ByteRange, Error, ErrorKind, Preallocation, RootHandle};

/// Longest range whose status is asked for at once, in bytes.
const MAX_RANGE: u64 = 1 << 40;

/// What counts of the options of a new image.
struct Plan {
    cluster_size: u64,
    refcount_bits: u64,
    extended_l2: bool,
    has_bitmaps: bool,
    preallocation: Preallocation,
    has_backing: bool,
    /// Bytes before the data when it is encrypted.
    crypto_header: u64,
}

/// See [`block::measure::MeasureFn`].
pub(super) async fn measure(
    request: &mut CreateRequest<'_>,
    source: Option<&RootHandle>,
) -> Result<Measured, Error> {
    let plan = Plan::take(request)?;
    let size = match source {
        Some(source) => source.length(),
        None => request.take_size("size")?.unwrap_or(0),
    };
    let disk = plan.round_up(size)?;
    let fully_allocated = plan.whole(disk)?;
    let data = match source {
        _ if plan.is_preallocated() => disk,
        Some(_) if plan.has_backing => disk,
        Some(source) => plan.data_of(source).await?,
        None => 0,
    };
    let bitmaps = source.filter(|_| plan.has_bitmaps).map(async |source| {
        let visit = source.visit().await;
        let node = visit.node();
        let stores = node.driver().bitmap_store().is_some();
        stores.then(|| bitmaps::measure(&node.bitmaps().list(), plan.cluster_size))
    });
    let bitmaps = match bitmaps {
        Some(bitmaps) => bitmaps.await,
        None => None,
    };
    Ok(Measured {
        required: fully_allocated - disk + data,
        fully_allocated,
        bitmaps,
    })
}

impl Plan {
    fn take(request: &mut CreateRequest<'_>) -> Result<Self, Error> {
        let invalid = |message: &str| Err(Error::new(ErrorKind::Invalid, message));
        let extended_l2 = request.take_bool("extended-l2")?.unwrap_or(false);
        let cluster_size = request.take_size("cluster-size")?.unwrap_or(65536);
        let bits = cluster_size.trailing_zeros();
        if !cluster_size.is_power_of_two() || !CLUSTER_BITS.contains(&bits) {
            return invalid("Cluster size must be a power of two between 512 and 2048k");
        }
        if extended_l2 && cluster_size < MIN_EXTENDED_CLUSTER {
            return invalid(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            );
        }
        let version = match request.take_str("version")?.as_deref() {
            None | Some("v3") => 3,
            Some("v2") => 2,
            Some(other) => {
                return invalid(&format!("Invalid compatibility level: '{other}'"));
            }
        };
        let refcount_bits = request.take_size("refcount-bits")?.unwrap_or(16);
        if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
            return invalid("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if version < 3 && refcount_bits != 16 {
            return invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use compat=1.1 or greater)",
            );
        }
        let preallocation = match request.take_str("preallocation")?.as_deref() {
            None | Some("off") => Preallocation::Off,
            Some("metadata") => Preallocation::Metadata,
            Some("falloc") => Preallocation::Falloc,
            Some("full") => Preallocation::Full,
            Some(other) => return invalid(&format!("invalid parameter value: {other}")),
        };
        let crypto_header = match crypto::take_luks(request)? {
            Some(options) => luks::Volume::header_bytes(&options).next_multiple_of(cluster_size),
            None => 0,
        };
        Ok(Self {
            cluster_size,
            refcount_bits,
            extended_l2,
            has_bitmaps: version >= 3,
            preallocation,
            has_backing: request.take_str("backing-file")?.is_some(),
            crypto_header,
        })
    }

    fn is_preallocated(&self) -> bool {
        matches!(
            self.preallocation,
            Preallocation::Falloc | Preallocation::Full
        )
    }

    fn round_up(&self, bytes: u64) -> Result<u64, Error> {
        let rounded = bytes.checked_next_multiple_of(self.cluster_size);
        rounded
            .filter(|bytes| *bytes <= i64::MAX as u64)
            .ok_or_else(too_large)
    }

    /// Bytes of a file with all of a disk of `disk` bytes, whole clusters, in it.
    fn whole(&self, disk: u64) -> Result<u64, Error> {
        let cluster = self.cluster_size;
        let entry = if self.extended_l2 { 16 } else { 8 };
        let l2_entries = (disk / cluster).next_multiple_of(cluster / entry);
        let l2_bytes = l2_entries * entry;
        let l1_bytes = l2_bytes / cluster * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(too_large());
        }
        let counted = cluster + l2_bytes + l1_bytes.next_multiple_of(cluster) + disk;
        let refcounts = self.refcount_clusters(counted / cluster) * cluster;
        let all = counted.checked_add(refcounts + self.crypto_header);
        all.filter(|bytes| *bytes <= i64::MAX as u64)
            .ok_or_else(too_large)
    }

    /// Clusters of the refcount table and blocks for `clusters` others and themselves.
    fn refcount_clusters(&self, clusters: u64) -> u64 {
        let per_block = self.cluster_size * 8 / self.refcount_bits;
        let per_table_cluster = self.cluster_size / 8;
        let mut refcounts = 0;
        loop {
            let blocks = (clusters + refcounts).div_ceil(per_block);
            let needed = blocks + blocks.div_ceil(per_table_cluster);
            if needed == refcounts {
                return refcounts;
            }
            refcounts = needed;
        }
    }

    /// Bytes of the clusters that `source` has data in.
    async fn data_of(&self, source: &RootHandle) -> Result<u64, Error> {
        let length = source.length();
        let (mut at, mut data) = (0, 0);
        while at < length {
            let range = ByteRange::new(at, (length - at).min(MAX_RANGE));
            let visit = source.visit().await;
            let found = above(visit.node(), None, range).await;
            let found = found.map_err(|errno| Error::io("Unable to get block status", errno))?;
            let mut end = at + found.length;
            if !found.status.zero && found.status.data && found.status.allocated {
                end = end.next_multiple_of(self.cluster_size);
                data += end - at + at % self.cluster_size;
            }
            at = end;
        }
        Ok(data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_counted_for_all_of_the_disk() {
        let mut plan = Plan {
            cluster_size: 65536,
            refcount_bits: 16,
            extended_l2: false,
            has_bitmaps: true,
            preallocation: Preallocation::Off,
            has_backing: false,
            crypto_header: 0,
        };
        assert_eq!(plan.whole(0).unwrap(), 196_608);
        assert_eq!(plan.whole(2 << 30).unwrap(), 2_148_073_472);
        assert_eq!(plan.whole(1 << 40).unwrap(), 1_099_679_662_080);
        assert!(plan.whole(7 << 60).is_err());
        plan.cluster_size = 512;
        plan.refcount_bits = 1;
        assert!(plan.whole(1 << 40).is_err());
    }
}
