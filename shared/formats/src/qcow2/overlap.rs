//! Where metadata is, so that nothing is ever allocated or written on top of it.
//!
//! A damaged or hostile image can claim that the cluster of its own L1 table is free. Every newly
//! allocated cluster and every new place of metadata is checked against this map first; places
//! that metadata has already were checked against each other when the image was opened. Which
//! structures count is the option `overlap-check`.

use super::tables::{ClusterRun, HostCluster};
use block::{Error, ErrorKind};
use serde_json::Value;
use std::collections::HashSet;

/// A structure that `overlap-check` can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Structure {
    Header,
    L1Table,
    L2Table,
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    SnapshotL1Table,
    SnapshotL2Table,
    BitmapDirectory,
}

/// A structure of fixed place.
pub(super) use Structure as Fixed;

impl Structure {
    const ALL: [Self; 9] = [
        Self::Header,
        Self::L1Table,
        Self::L2Table,
        Self::RefcountTable,
        Self::RefcountBlock,
        Self::SnapshotTable,
        Self::SnapshotL1Table,
        Self::SnapshotL2Table,
        Self::BitmapDirectory,
    ];

    /// What messages call it.
    const fn text(self) -> &'static str {
        match self {
            Self::Header => "qcow2_header",
            Self::L1Table => "active L1 table",
            Self::L2Table => "active L2 table",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::SnapshotTable => "snapshot table",
            Self::SnapshotL1Table => "inactive L1 table",
            Self::SnapshotL2Table => "inactive L2 table",
            Self::BitmapDirectory => "bitmap directory",
        }
    }

    /// Its flag in `Qcow2OverlapCheckFlags`.
    const fn option(self) -> &'static str {
        match self {
            Self::Header => "main-header",
            Self::L1Table => "active-l1",
            Self::L2Table => "active-l2",
            Self::RefcountTable => "refcount-table",
            Self::RefcountBlock => "refcount-block",
            Self::SnapshotTable => "snapshot-table",
            Self::SnapshotL1Table => "inactive-l1",
            Self::SnapshotL2Table => "inactive-l2",
            Self::BitmapDirectory => "bitmap-directory",
        }
    }
}

/// Which structures are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlapChecks(u16);

impl Default for OverlapChecks {
    /// All whose places are in memory anyway (`cached`).
    fn default() -> Self {
        Self::ALL.without(Structure::SnapshotL2Table)
    }
}

impl OverlapChecks {
    const NONE: Self = Self(0);
    const ALL: Self = Self((1 << Structure::ALL.len()) - 1);

    const fn with(self, structure: Structure) -> Self {
        Self(self.0 | 1 << structure as u16)
    }
    const fn without(self, structure: Structure) -> Self {
        Self(self.0 & !(1 << structure as u16))
    }
    /// Whether the structure is checked.
    pub(super) const fn has(self, structure: Structure) -> bool {
        self.0 >> structure as u16 & 1 != 0
    }

    /// The value of `overlap-check`: a mode, or an object of a template and flags.
    pub(super) fn parse(value: &Value) -> Result<Self, Error> {
        let members = match value {
            Value::String(mode) => return Self::template(mode),
            Value::Object(members) => members,
            _ => return Err(wrong("'overlap-check' expects a mode or flags".to_owned())),
        };
        let mut checks = match members.get("template") {
            None => Self::default(),
            Some(Value::String(mode)) => Self::template(mode)?,
            Some(_) => return Err(wrong("'overlap-check.template' expects a mode".to_owned())),
        };
        for (name, value) in members.iter().filter(|(name, _)| *name != "template") {
            let known = |structure: &&Structure| structure.option() == name;
            let Some(structure) = Structure::ALL.iter().find(known) else {
                let message = format!("Parameter 'overlap-check.{name}' is unexpected");
                return Err(wrong(message));
            };
            checks = match is_on(value) {
                Some(true) => checks.with(*structure),
                Some(false) => checks.without(*structure),
                None => {
                    let message = format!("Parameter 'overlap-check.{name}' expects 'on' or 'off'");
                    return Err(wrong(message));
                }
            };
        }
        Ok(checks)
    }

    fn template(mode: &str) -> Result<Self, Error> {
        Ok(match mode {
            "none" => Self::NONE,
            "constant" => Self::NONE
                .with(Structure::Header)
                .with(Structure::L1Table)
                .with(Structure::RefcountTable)
                .with(Structure::SnapshotTable)
                .with(Structure::BitmapDirectory),
            "cached" => Self::default(),
            "all" => Self::ALL,
            _ => {
                return Err(wrong(format!(
                    "Unsupported value '{mode}' for qcow2 option 'overlap-check'. Allowed are any \
                     of the following: none, constant, cached, all"
                )));
            }
        })
    }
}

fn is_on(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(value) => Some(*value),
        Value::String(text) if text == "on" => Some(true),
        Value::String(text) if text == "off" => Some(false),
        _ => None,
    }
}

fn wrong(message: String) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

/// All metadata clusters of an image that is open for writing.
#[derive(Default)]
pub(super) struct MetadataMap {
    fixed: Vec<(Fixed, ClusterRun)>,
    l2_tables: HashSet<HostCluster>,
    refcount_blocks: HashSet<HostCluster>,
    /// L2 tables of snapshots, when they are checked; unknown once snapshots have changed.
    snapshot_l2_tables: HashSet<HostCluster>,
    checks: OverlapChecks,
}

impl MetadataMap {
    /// A map without any metadata yet.
    pub(super) fn new(checks: OverlapChecks) -> Self {
        Self {
            checks,
            ..Self::default()
        }
    }
    /// Forgets all places, to be told anew.
    pub(super) fn forget(&mut self) {
        *self = Self::new(self.checks);
    }
    /// Which structures are checked.
    pub(super) fn checks(&self) -> OverlapChecks {
        self.checks
    }
    pub(super) fn add_snapshot_l2_table(&mut self, cluster: HostCluster) {
        self.snapshot_l2_tables.insert(cluster);
    }
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
        let fixed = self.fixed.iter().find(|(what, other)| {
            self.checks.has(*what) && run.first.0 < other.end() && other.first.0 < run.end()
        });
        if let Some((what, _)) = fixed {
            return Some(what.text());
        }
        let sets = [
            (Structure::L2Table, &self.l2_tables),
            (Structure::RefcountBlock, &self.refcount_blocks),
            (Structure::SnapshotL2Table, &self.snapshot_l2_tables),
        ];
        let held = |cluster: HostCluster| {
            let holds = |(what, set): &&(Structure, &HashSet<HostCluster>)| {
                self.checks.has(*what) && set.contains(&cluster)
            };
            sets.iter().find(holds).map(|(what, _)| what.text())
        };
        (run.first.0..run.end()).map(HostCluster).find_map(held)
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: Value) -> Result<OverlapChecks, String> {
        OverlapChecks::parse(&value).map_err(|error| error.message)
    }

    #[test]
    fn modes_and_flags_choose_what_is_checked() {
        assert_eq!(parse(json!("none")), Ok(OverlapChecks::NONE));
        assert_eq!(parse(json!("cached")), Ok(OverlapChecks::default()));
        let constant = parse(json!("constant")).unwrap();
        assert!(constant.has(Structure::L1Table) && !constant.has(Structure::L2Table));
        let flags = json!({"template": "none", "main-header": true, "inactive-l2": "on"});
        let expected = OverlapChecks::NONE
            .with(Structure::Header)
            .with(Structure::SnapshotL2Table);
        assert_eq!(parse(flags), Ok(expected));
        let without = parse(json!({"active-l2": false})).unwrap();
        assert_eq!(
            without,
            OverlapChecks::default().without(Structure::L2Table)
        );
    }

    #[test]
    fn other_values_are_refused_with_what_is_allowed() {
        let message = "Unsupported value 'some' for qcow2 option 'overlap-check'. Allowed are any \
                       of the following: none, constant, cached, all";
        assert_eq!(parse(json!("some")), Err(message.to_owned()));
        let unknown = parse(json!({"header": true})).unwrap_err();
        assert_eq!(unknown, "Parameter 'overlap-check.header' is unexpected");
    }

    #[test]
    fn only_what_is_checked_is_found() {
        let run = |first, count| ClusterRun {
            first: HostCluster(first),
            count,
        };
        let all = |checks| {
            let mut map = MetadataMap::new(checks);
            map.add_fixed(Structure::Header, run(0, 1));
            map.add_l2_table(HostCluster(5));
            map.add_snapshot_l2_table(HostCluster(7));
            [run(0, 1), run(4, 2), run(6, 4), run(9, 1)].map(|run| map.overlap(run))
        };
        let (header, active, inactive) = ("qcow2_header", "active L2 table", "inactive L2 table");
        let found = all(OverlapChecks::ALL);
        assert_eq!(found, [Some(header), Some(active), Some(inactive), None]);
        let found = all(OverlapChecks::default());
        assert_eq!(found, [Some(header), Some(active), None, None]);
        assert_eq!(all(OverlapChecks::NONE), [None; 4]);
    }
}
