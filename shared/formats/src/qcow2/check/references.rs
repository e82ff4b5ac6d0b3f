//! How often each host cluster is referred to.
//!
//! Pages of 4096 counts, made when the first of them becomes non-zero and as wide as their largest
//! count needs: one bit for clusters that are used once, so a full image of 64 TiB takes 130 MiB,
//! and a sparse file of any length takes no more than what is referred to in it. Counts stop at the
//! largest refcount that the image can express.

use super::super::refcount::{get_in_bytes, set_in_bytes};
use super::super::tables::HostCluster;
use executor::Errno;

/// log2 of the counts of a page.
const PAGE_BITS: u32 = 12;
/// Most clusters of a file: QEMU's limit, too.
const MAX_CLUSTERS: u64 = i32::MAX as u64;

struct Page {
    /// log2 of the bits of a count.
    order: u32,
    bytes: Box<[u8]>,
}

impl Page {
    fn new(order: u32) -> Self {
        Self {
            order,
            bytes: vec![0; Self::length(order)].into(),
        }
    }
    /// Bytes of a page.
    const fn length(order: u32) -> usize {
        (1 << (PAGE_BITS + order)) / 8
    }
    fn get(&self, position: u64) -> u64 {
        get_in_bytes(&self.bytes, self.order, position)
    }
    fn widened(&self, order: u32) -> Self {
        let mut page = Self::new(order);
        for position in 0..1 << PAGE_BITS {
            set_in_bytes(&mut page.bytes, order, position, self.get(position));
        }
        page
    }
}

/// The counts.
pub(super) struct References {
    pages: Vec<Option<Box<Page>>>,
    clusters: u64,
    /// Largest count.
    max: u64,
    /// Bytes in use by pages.
    used: u64,
    /// Most bytes of pages.
    limit: u64,
}

impl References {
    /// Counts for a file of `clusters`, all zero.
    ///
    /// # Errors
    /// `EFBIG` when the file has more clusters than can be counted.
    pub(super) fn new(clusters: u64, max: u64, limit: u64) -> Result<Self, Errno> {
        let mut references = Self {
            pages: Vec::new(),
            clusters: 0,
            max,
            used: 0,
            limit,
        };
        references.grow(clusters)?;
        Ok(references)
    }

    /// Makes room for `clusters`.
    pub(super) fn grow(&mut self, clusters: u64) -> Result<(), Errno> {
        if clusters > MAX_CLUSTERS {
            return Err(Errno::EFBIG);
        }
        if clusters > self.clusters {
            self.clusters = clusters;
            let pages = clusters.div_ceil(1 << PAGE_BITS) as usize;
            self.pages.resize_with(pages, || None);
        }
        Ok(())
    }

    /// Clusters that are counted.
    pub(super) fn clusters(&self) -> u64 {
        self.clusters
    }

    /// Bytes that the counts take.
    pub(super) fn memory(&self) -> u64 {
        self.used + self.pages.len() as u64 * 8
    }

    pub(super) fn get(&self, cluster: HostCluster) -> u64 {
        let page = self.pages.get((cluster.0 >> PAGE_BITS) as usize);
        match page.and_then(Option::as_ref) {
            Some(page) => page.get(cluster.0 & ((1 << PAGE_BITS) - 1)),
            None => 0,
        }
    }

    /// Adds `more` references; answers with how many are beyond the largest count.
    ///
    /// # Errors
    /// `ENOMEM` when the counts would take more memory than allowed, `EFBIG` as [`Self::new`].
    pub(super) fn add(&mut self, cluster: HostCluster, more: u64) -> Result<u64, Errno> {
        let sum = self.get(cluster).saturating_add(more);
        let value = sum.min(self.max);
        self.set(cluster, value)?;
        Ok(sum - value)
    }

    /// Takes one reference away, if there is one.
    pub(super) fn remove(&mut self, cluster: HostCluster) {
        let value = self.get(cluster);
        if value > 0 {
            self.put(cluster, value - 1);
        }
    }

    fn set(&mut self, cluster: HostCluster, value: u64) -> Result<(), Errno> {
        self.grow(cluster.0 + 1)?;
        let index = (cluster.0 >> PAGE_BITS) as usize;
        let order = order_for(value);
        let held = self.pages[index].as_ref().map(|page| page.order);
        if held.is_none_or(|held| held < order) {
            let before = held.map_or(0, |held| Page::length(held) as u64);
            let used = self.used - before + Page::length(order) as u64;
            if used > self.limit {
                return Err(Errno::ENOMEM);
            }
            let page = match &self.pages[index] {
                Some(page) => page.widened(order),
                None => Page::new(order),
            };
            self.used = used;
            self.pages[index] = Some(Box::new(page));
        }
        self.put(cluster, value);
        Ok(())
    }

    /// Stores a value that fits the page, which exists.
    fn put(&mut self, cluster: HostCluster, value: u64) {
        let index = (cluster.0 >> PAGE_BITS) as usize;
        if let Some(page) = &mut self.pages[index] {
            let position = cluster.0 & ((1 << PAGE_BITS) - 1);
            set_in_bytes(&mut page.bytes, page.order, position, value);
        }
    }

    /// The first cluster from `from` on that may have references; the end when there is none.
    pub(super) fn next_used(&self, from: HostCluster) -> HostCluster {
        let mut at = from.0;
        while at < self.clusters && self.pages[(at >> PAGE_BITS) as usize].is_none() {
            at = ((at >> PAGE_BITS) + 1) << PAGE_BITS;
        }
        HostCluster(at.min(self.clusters))
    }
}

/// The least order that holds `value`.
const fn order_for(value: u64) -> u32 {
    let bits = 64 - value.leading_zeros();
    match bits {
        0 | 1 => 0,
        bits => u32::BITS - (bits - 1).leading_zeros(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_kept_at_any_width() {
        let mut references = References::new(10_000, u64::MAX, 1 << 20).unwrap();
        let values = [1, 2, 3, 4, 15, 16, 255, 256, 65535, 65536, 1 << 32, 1 << 40];
        for (cluster, &value) in (5000..).zip(&values) {
            assert_eq!(references.add(HostCluster(cluster), value), Ok(0));
        }
        for (cluster, &value) in (5000..).zip(&values) {
            assert_eq!(references.get(HostCluster(cluster)), value);
        }
        assert_eq!(references.get(HostCluster(4999)), 0);
        assert_eq!(references.next_used(HostCluster(0)), HostCluster(4096));
    }

    #[test]
    fn references_beyond_the_largest_count_are_told() {
        let mut references = References::new(1, 3, 1 << 20).unwrap();
        assert_eq!(references.add(HostCluster(0), 2), Ok(0));
        assert_eq!(references.add(HostCluster(0), 4), Ok(3));
        assert_eq!(references.get(HostCluster(0)), 3);
    }

    #[test]
    fn memory_has_a_limit() {
        let mut references = References::new(1 << 30, u64::MAX, 2000).unwrap();
        for page in 0..3 {
            assert_eq!(references.add(HostCluster(page << PAGE_BITS), 1), Ok(0));
        }
        assert_eq!(references.add(HostCluster(1 << 29), 1), Err(Errno::ENOMEM));
        let too_many = References::new(1 << 31, 1, 2000);
        assert_eq!(too_many.err(), Some(Errno::EFBIG));
    }
}
