//! Where metadata is, so that nothing is ever allocated or written on top of it.
//!
//! A damaged or hostile image can claim that the cluster of its own L1 table is free. Every newly
//! allocated cluster and every metadata write is checked against this map first.

use super::tables::{ClusterRun, HostCluster};
use std::collections::HashSet;

/// A structure of fixed place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fixed {
    Header,
    L1Table,
    RefcountTable,
    SnapshotTable,
    SnapshotL1Table,
    BitmapDirectory,
}

impl Fixed {
    const fn text(self) -> &'static str {
        match self {
            Self::Header => "the header",
            Self::L1Table => "the active L1 table",
            Self::RefcountTable => "the refcount table",
            Self::SnapshotTable => "the snapshot table",
            Self::SnapshotL1Table => "a snapshot's L1 table",
            Self::BitmapDirectory => "the bitmap directory",
        }
    }
}

/// All metadata clusters of an image that is open for writing.
#[derive(Default)]
pub(super) struct MetadataMap {
    fixed: Vec<(Fixed, ClusterRun)>,
    l2_tables: HashSet<HostCluster>,
    refcount_blocks: HashSet<HostCluster>,
}

impl MetadataMap {
    /// Adds a structure.
    pub(super) fn add_fixed(&mut self, what: Fixed, run: ClusterRun) {
        self.fixed.push((what, run));
    }
    /// The structure has moved.
    pub(super) fn move_fixed(&mut self, what: Fixed, run: ClusterRun) {
        self.fixed.retain(|(kind, _)| *kind != what);
        self.fixed.push((what, run));
    }
    pub(super) fn add_l2_table(&mut self, cluster: HostCluster) {
        self.l2_tables.insert(cluster);
    }
    pub(super) fn remove_l2_table(&mut self, cluster: HostCluster) {
        self.l2_tables.remove(&cluster);
    }
    /// False when there was one at that place already.
    pub(super) fn add_refcount_block(&mut self, cluster: HostCluster) -> bool {
        self.refcount_blocks.insert(cluster)
    }

    /// What a run of clusters would overwrite.
    pub(super) fn overlap(&self, run: ClusterRun) -> Option<&'static str> {
        let fixed = self
            .fixed
            .iter()
            .find(|(_, other)| run.first.0 < other.end() && other.first.0 < run.end());
        if let Some((what, _)) = fixed {
            return Some(what.text());
        }
        (run.first.0..run.end())
            .map(HostCluster)
            .find_map(|cluster| {
                if self.l2_tables.contains(&cluster) {
                    Some("an active L2 table")
                } else if self.refcount_blocks.contains(&cluster) {
                    Some("a refcount block")
                } else {
                    None
                }
            })
    }

    /// Two fixed structures that claim one cluster.
    pub(super) fn fixed_conflict(&self) -> Option<String> {
        let mut sorted: Vec<_> = self
            .fixed
            .iter()
            .filter(|(_, run)| run.count != 0)
            .collect();
        sorted.sort_by_key(|(_, run)| run.first);
        let pairs = sorted.iter().zip(sorted.iter().skip(1));
        pairs
            .clone()
            .find(|((_, lower), (_, upper))| lower.end() > upper.first.0)
            .map(|((lower, _), (upper, _))| format!("{} and {}", lower.text(), upper.text()))
    }

    /// Whether two kinds of metadata claim one cluster; tells which cluster.
    pub(super) fn conflict(&self) -> Option<(HostCluster, &'static str)> {
        let inside = |cluster: HostCluster| {
            self.fixed
                .iter()
                .any(|(_, run)| (run.first.0..run.end()).contains(&cluster.0))
        };
        let blocks = self.refcount_blocks.iter().copied();
        let tables = self.l2_tables.iter().copied();
        blocks
            .clone()
            .find(|&cluster| inside(cluster))
            .map(|cluster| (cluster, "a refcount block"))
            .or_else(|| {
                let mut tables = tables;
                tables
                    .find(|cluster| inside(*cluster) || self.refcount_blocks.contains(cluster))
                    .map(|cluster| (cluster, "an L2 table"))
            })
    }
}
