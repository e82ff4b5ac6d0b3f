//! What an image is like: its creation options, drawn at random.

use crate::sequence::Family;
use rand::Rng;
use rand::rngs::SmallRng;

/// Smallest clusters that have subclusters, in bytes.
const MIN_EXTENDED_CLUSTER: u64 = 16 << 10;

/// Creation options of a qcow2 image.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// Virtual size in bytes.
    pub(crate) size: u64,
    /// Bytes of a cluster.
    pub(crate) cluster_size: u64,
    /// Whether it is version 3.
    pub(crate) is_v3: bool,
    refcount_bits: u32,
    preallocation: &'static str,
    lazy_refcounts: bool,
    /// Whether compressed data is written to it.
    pub(crate) compresses: bool,
    compression_type: &'static str,
    /// Whether clusters have subclusters.
    pub(crate) extended_l2: bool,
    /// Whether data lies in a file of its own, and whether that is a raw image.
    data_file: Option<bool>,
}

impl Shape {
    /// Any shape that the family allows.
    pub(crate) fn random(random: &mut SmallRng, family: Family) -> Self {
        let has_backing = family == Family::Backed;
        let compresses = family == Family::Compressed;
        let cluster_bits = match random.random_range(0..10) {
            0 => 21,
            1..4 => 16,
            _ => random.random_range(9..=15),
        };
        let is_v3 = random.random_bool(0.8);
        let cluster_size = 1 << cluster_bits;
        let clusters = random.random_range(1..=if cluster_bits == 21 { 3 } else { 48 });
        let spare = random.random_range(0..cluster_size / 512) * 512;
        let may_preallocate = !has_backing && !compresses;
        let preallocation = match random.random_range(0..6) {
            0 if may_preallocate => "metadata",
            1 if may_preallocate => "falloc",
            2 if may_preallocate => "full",
            _ => "off",
        };
        let extended_l2 = is_v3 && cluster_size >= MIN_EXTENDED_CLUSTER && random.random();
        // The peer keeps neither compressed clusters nor snapshots beside an external file.
        let may_be_external = is_v3 && matches!(family, Family::Plain | Family::Backed);
        let data_file =
            (may_be_external && random.random_bool(0.2)).then(|| !has_backing && random.random());
        Self {
            extended_l2,
            data_file,
            size: cluster_size * clusters + spare,
            cluster_size,
            is_v3,
            refcount_bits: match family {
                _ if !is_v3 => 16,
                // Snapshots share clusters: counts must go beyond one.
                Family::Snapshots => 1 << random.random_range(3..=6),
                _ => 1 << random.random_range(0..=6),
            },
            preallocation,
            lazy_refcounts: is_v3 && random.random_bool(0.2),
            compresses,
            compression_type: match compresses && is_v3 && random.random() {
                true => "zstd",
                false => "zlib",
            },
        }
    }

    /// What follows `-o` of `qemu-img create` for the image of this name.
    pub(crate) fn options(&self, image: &str) -> String {
        let compat = if self.is_v3 { "1.1" } else { "0.10" };
        let lazy = if self.lazy_refcounts { "on" } else { "off" };
        let mut options = format!(
            "compat={compat},cluster_size={},refcount_bits={},preallocation={},lazy_refcounts={lazy},\
             compression_type={}",
            self.cluster_size, self.refcount_bits, self.preallocation, self.compression_type
        );
        if self.extended_l2 {
            options += ",extended_l2=on";
        }
        if let Some(is_raw) = self.data_file {
            let is_raw = if is_raw { "on" } else { "off" };
            options += &format!(",data_file={image}.data,data_file_raw={is_raw}");
        }
        options
    }
}
