//! What an image is like: its creation options, drawn at random.

use rand::Rng;
use rand::rngs::SmallRng;

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
}

impl Shape {
    /// Any shape; `has_backing` excludes what does not go with a backing.
    pub(crate) fn random(random: &mut SmallRng, has_backing: bool) -> Self {
        let cluster_bits = match random.random_range(0..10) {
            0 => 21,
            1..4 => 16,
            _ => random.random_range(9..=15),
        };
        let is_v3 = random.random_bool(0.8);
        let cluster_size = 1 << cluster_bits;
        let clusters = random.random_range(1..=if cluster_bits == 21 { 3 } else { 48 });
        let spare = random.random_range(0..cluster_size / 512) * 512;
        let preallocation = match random.random_range(0..6) {
            0 if !has_backing => "metadata",
            1 if !has_backing => "falloc",
            2 if !has_backing => "full",
            _ => "off",
        };
        Self {
            size: cluster_size * clusters + spare,
            cluster_size,
            is_v3,
            refcount_bits: if is_v3 {
                1 << random.random_range(0..=6)
            } else {
                16
            },
            preallocation,
            lazy_refcounts: is_v3 && random.random_bool(0.2),
        }
    }

    /// What follows `-o` of `qemu-img create`.
    pub(crate) fn options(&self) -> String {
        let compat = if self.is_v3 { "1.1" } else { "0.10" };
        let lazy = if self.lazy_refcounts { "on" } else { "off" };
        format!(
            "compat={compat},cluster_size={},refcount_bits={},preallocation={},lazy_refcounts={lazy}",
            self.cluster_size, self.refcount_bits, self.preallocation
        )
    }
}
