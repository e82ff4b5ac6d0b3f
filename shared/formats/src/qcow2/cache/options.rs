//! How much memory the caches may take: options as in QEMU, and a default per image.
//!
//! By default an image's metadata takes at most 64 MiB: what is in memory as a whole (L1 table,
//! refcount table, the positions of all tables) comes off, refcounts get a sixteenth, L2 tables the
//! rest. Options give the bytes of one cache or of both together.

use super::super::header::Header;
use super::super::open::SLICE_BITS;
use block::{Error, ErrorKind};
use serde_json::{Map, Value};
use std::time::Duration;

/// Default for all metadata of an image, in bytes.
const DEFAULT_BUDGET: u64 = 64 << 20;
/// Least default for the caches when other metadata takes most of the budget, in bytes.
const LEAST_CACHES: u64 = 8 << 20;
/// Bytes for the position of one table.
const POSITION: u64 = 18;
/// Most memory that options may ask for one cache, in bytes.
const MAX_CACHE: u64 = 4 << 30;
/// Refcounts get at least so many clusters of a budget for both caches.
const LEAST_REFCOUNT_CLUSTERS: u64 = 4;
/// After how long unused metadata is forgotten, unless an option says.
const DEFAULT_CLEAN_INTERVAL_S: u64 = 600;
/// Least size of a cached piece of a table in bytes.
const LEAST_ENTRY_SIZE: u64 = 512;

/// What the user says about the caches. Sizes in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheOptions {
    /// `cache-size`: both caches together.
    pub total: Option<u64>,
    /// `l2-cache-size`
    pub l2: Option<u64>,
    /// `l2-cache-entry-size`: how much of an L2 table is cached as one.
    pub l2_entry: Option<u64>,
    /// `refcount-cache-size`
    pub refcounts: Option<u64>,
    /// `cache-clean-interval` in seconds; 0: never.
    pub clean_interval_s: Option<u64>,
}

/// Memory for each cache, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) struct CacheSizes {
    pub(in crate::qcow2) l2: u64,
    pub(in crate::qcow2) refcounts: u64,
}

impl CacheOptions {
    /// See [`block::open::SupersedeFn`]: a new size of both caches replaces those of single ones; those of single ones
    /// together replace the old size of both.
    pub(in crate::qcow2) fn supersede(new: &Map<String, Value>, old: &mut Map<String, Value>) {
        let single = ["l2-cache-size", "refcount-cache-size"];
        if new.contains_key("cache-size") {
            old.retain(|name, _| !single.contains(&name.as_str()));
        } else if single
            .iter()
            .all(|name| new.contains_key(*name) || old.contains_key(*name))
        {
            old.shift_remove("cache-size");
        }
    }

    /// Memory for each cache of the image.
    pub(in crate::qcow2) fn sizes(&self, header: &Header) -> Result<CacheSizes, Error> {
        let cluster_size = 1_u64 << header.cluster_bits;
        let default = default_sizes(header);
        let covering = header
            .geometry()
            .l1_entries_for(header.size)
            .saturating_mul(cluster_size);
        let (l2, refcounts) = match (self.total, self.l2, self.refcounts) {
            (Some(_), Some(_), Some(_)) => {
                return Err(invalid(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same \
                     time",
                ));
            }
            (Some(total), Some(l2), None) => {
                let rest = total.checked_sub(l2);
                (
                    l2,
                    rest.ok_or_else(|| invalid("l2-cache-size may not exceed cache-size"))?,
                )
            }
            (Some(total), None, Some(refcounts)) => {
                let rest = total.checked_sub(refcounts);
                let exceeds = || invalid("refcount-cache-size may not exceed cache-size");
                (rest.ok_or_else(exceeds)?, refcounts)
            }
            (Some(total), None, None) => {
                let least = LEAST_REFCOUNT_CLUSTERS * cluster_size;
                let l2 = covering.min(total.saturating_sub(least));
                (l2, total - l2)
            }
            (None, l2, refcounts) => (
                l2.unwrap_or(default.l2),
                refcounts.unwrap_or(default.refcounts),
            ),
        };
        self.check_entry_size(cluster_size)?;
        let entry = self.l2_entry.unwrap_or(1 << SLICE_BITS);
        if l2.min(covering) / entry > i32::MAX as u64 {
            return Err(invalid("L2 cache size too big"));
        }
        if refcounts / cluster_size > i32::MAX as u64 {
            return Err(invalid("Refcount cache size too big"));
        }
        Ok(CacheSizes {
            l2: l2.min(MAX_CACHE),
            refcounts: refcounts.min(MAX_CACHE),
        })
    }

    fn check_entry_size(&self, cluster_size: u64) -> Result<(), Error> {
        let fits =
            |size: u64| size.is_power_of_two() && (LEAST_ENTRY_SIZE..=cluster_size).contains(&size);
        if self.l2_entry.is_none_or(fits) {
            return Ok(());
        }
        Err(invalid(&format!(
            "L2 cache entry size must be a power of two between {LEAST_ENTRY_SIZE} and the cluster \
             size ({cluster_size})"
        )))
    }

    /// After how long unused metadata is forgotten; `None`: never.
    pub(in crate::qcow2) fn clean_interval(&self) -> Result<Option<Duration>, Error> {
        let seconds = self.clean_interval_s.unwrap_or(DEFAULT_CLEAN_INTERVAL_S);
        if seconds > u64::from(u32::MAX) {
            return Err(invalid("Cache clean interval too big"));
        }
        Ok((seconds != 0).then(|| Duration::from_secs(seconds)))
    }
}

fn default_sizes(header: &Header) -> CacheSizes {
    let refcount_table = header.refcount_table_clusters << header.cluster_bits;
    let tables = header.l1_entries.saturating_add(refcount_table / 8);
    let whole = (8 + POSITION).saturating_mul(tables);
    let caches = DEFAULT_BUDGET.saturating_sub(whole).max(LEAST_CACHES);
    let refcounts = caches / 16;
    CacheSizes {
        l2: caches - refcounts,
        refcounts,
    }
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of 1 TiB with clusters of 64 KiB.
    fn header() -> Header {
        let mut bytes = vec![0; 512];
        let mut put = |at: usize, word: &[u8]| bytes[at..at + word.len()].copy_from_slice(word);
        put(0, b"QFI\xfb\0\0\0\x03");
        put(20, &16_u32.to_be_bytes());
        put(24, &(1_u64 << 40).to_be_bytes());
        put(36, &2048_u32.to_be_bytes());
        put(40, &(3_u64 << 16).to_be_bytes());
        put(48, &(1_u64 << 16).to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        put(96, &4_u32.to_be_bytes());
        put(100, &104_u32.to_be_bytes());
        Header::parse(&bytes).unwrap()
    }

    fn sizes(
        total: Option<u64>,
        l2: Option<u64>,
        refcounts: Option<u64>,
    ) -> Result<(u64, u64), String> {
        let options = CacheOptions {
            total,
            l2,
            refcounts,
            ..CacheOptions::default()
        };
        let sizes = options.sizes(&header()).map_err(|error| error.message)?;
        Ok((sizes.l2, sizes.refcounts))
    }

    #[test]
    fn sizes_follow_from_each_other_as_in_qemu() {
        let mib = |count: u64| count << 20;
        assert_eq!(
            sizes(Some(mib(8)), Some(mib(6)), None),
            Ok((mib(6), mib(2)))
        );
        assert_eq!(
            sizes(Some(mib(8)), None, Some(mib(2))),
            Ok((mib(6), mib(2)))
        );
        let least = 4 << 16;
        assert_eq!(sizes(Some(mib(8)), None, None), Ok((mib(8) - least, least)));
        assert_eq!(sizes(Some(mib(200)), None, None), Ok((mib(128), mib(72))));
        let (l2, refcounts) = sizes(None, None, None).unwrap();
        assert!((mib(60)..mib(64)).contains(&(l2 + refcounts)));
    }

    #[test]
    fn new_sizes_replace_old_ones_that_contradict_them() {
        let left = |new: &[&str], old: &[&str]| {
            let options = |names: &[&str]| -> Map<String, Value> {
                let named = names
                    .iter()
                    .map(|name| ((*name).to_owned(), Value::from(1)));
                named.collect()
            };
            let mut old = options(old);
            CacheOptions::supersede(&options(new), &mut old);
            old.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        let (total, l2, refcounts) = ("cache-size", "l2-cache-size", "refcount-cache-size");
        assert_eq!(left(&[total], &[l2, refcounts, "other"]), ["other"]);
        assert_eq!(left(&[l2], &[total]), [total]);
        assert_eq!(left(&[l2], &[total, refcounts]), [refcounts]);
    }

    #[test]
    fn contradictions_are_refused_in_qemus_words() {
        let message = sizes(Some(1), Some(2), None).unwrap_err();
        assert_eq!(message, "l2-cache-size may not exceed cache-size");
        let message = sizes(Some(1), None, Some(2)).unwrap_err();
        assert_eq!(message, "refcount-cache-size may not exceed cache-size");
        let message = sizes(Some(3), Some(1), Some(2)).unwrap_err();
        let expected =
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time";
        assert_eq!(message, expected);
        let message = sizes(None, None, Some(u64::MAX >> 1)).unwrap_err();
        assert_eq!(message, "Refcount cache size too big");
        for entry in [0, 256, 1000, 128 << 10] {
            let options = CacheOptions {
                l2_entry: Some(entry),
                ..CacheOptions::default()
            };
            let message = options.sizes(&header()).unwrap_err().message;
            let expected = "L2 cache entry size must be a power of two between 512 and the \
                            cluster size (65536)";
            assert_eq!(message, expected);
        }
        let options = CacheOptions {
            l2: Some(1 << 40),
            l2_entry: Some(512),
            ..CacheOptions::default()
        };
        assert!(options.sizes(&header()).is_ok());
        let huge = Header {
            size: 1 << 53,
            ..header()
        };
        let message = options.sizes(&huge).unwrap_err().message;
        assert_eq!(message, "L2 cache size too big");
        let options = CacheOptions {
            clean_interval_s: Some(1 << 32),
            ..CacheOptions::default()
        };
        let message = options.clean_interval().unwrap_err().message;
        assert_eq!(message, "Cache clean interval too big");
    }
}
