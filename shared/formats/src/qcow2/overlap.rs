//! Where metadata is, so that nothing is ever allocated or written on top of it.
//!
//! A damaged or hostile image can claim that the cluster of its own L1 table is free. Every newly
//! allocated cluster and every new place of metadata is checked against this map first; places
//! that metadata has already were checked against each other when the image was opened. Which
//! structures count is the option `overlap-check`.

use super::tables::{ClusterRun, HostCluster};
use block::{Error, ErrorKind};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

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

/// The option as a mode, its mode when it has flags, and what the names of all of these begin with.
const MODE: &str = "overlap-check";
const TEMPLATE: &str = "overlap-check.template";
const FLAGS: &str = "overlap-check.";

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

    /// See [`block::open::SupersedeFn`]: a new mode replaces the old one and its flags; flags alone change single ones.
    pub(super) fn supersede(
        new: &mut Map<String, Value>,
        old: &mut Map<String, Value>,
    ) -> Result<(), Error> {
        for options in [&mut *new, &mut *old] {
            let Some(mode) = options.shift_remove(MODE) else {
                continue;
            };
            if let Some(template) = options.get(TEMPLATE).filter(|template| **template != mode) {
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                return Err(wrong(format!(
                    "Conflicting values for qcow2 options '{MODE}' ('{}') and '{TEMPLATE}' ('{}')",
                    text(&mode),
                    text(template)
                )));
            }
            options.insert(TEMPLATE.to_owned(), mode);
        }
        if new.contains_key(TEMPLATE) {
            old.retain(|name, _| !name.starts_with(FLAGS));
        }
        Ok(())
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
///
/// An image can have 65536 snapshots, each with an L1 table, and every allocation is compared with
/// all of them: so structures are ordered by place, and do not overlap.
#[derive(Default)]
pub(super) struct MetadataMap {
    /// By first cluster: the structure, and the cluster behind it.
    fixed: BTreeMap<u64, (Fixed, u64)>,
    /// Two structures, the lower one first, that claimed one cluster.
    clash: Option<(Fixed, Fixed)>,
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
    /// Adds a structure; an empty one has no place. Of one that overlaps another, only what is left
    /// is added, and [`Self::fixed_conflict`] tells of it.
    pub(super) fn add_fixed(&mut self, what: Fixed, run: ClusterRun) {
        let mut free = run.first.0..run.end();
        let others: Vec<_> = self.fixed_within(run).collect();
        for (first, (other, end)) in others.into_iter().rev() {
            let pair = match first < run.first.0 {
                true => (other, what),
                false => (what, other),
            };
            self.clash.get_or_insert(pair);
            self.insert_fixed(what, free.start..first);
            free.start = end;
        }
        self.insert_fixed(what, free);
    }
    fn insert_fixed(&mut self, what: Fixed, clusters: Range<u64>) {
        if !clusters.is_empty() {
            self.fixed.insert(clusters.start, (what, clusters.end));
        }
    }
    /// The structures that have a cluster of the run, the highest first.
    fn fixed_within(&self, run: ClusterRun) -> impl Iterator<Item = (u64, (Fixed, u64))> {
        let below = self.fixed.range(..run.end()).rev();
        below
            .map(|(first, structure)| (*first, *structure))
            .take_while(move |(_, (_, end))| *end > run.first.0)
            .take_while(move |_| run.count != 0)
    }
    /// The structure has moved.
    pub(super) fn move_fixed(&mut self, what: Fixed, run: ClusterRun) {
        self.fixed.retain(|_, (kind, _)| *kind != what);
        self.add_fixed(what, run);
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
        let mut fixed = self.fixed_within(run);
        if let Some((_, (what, _))) = fixed.find(|(_, (what, _))| self.checks.has(*what)) {
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
        let (lower, upper) = self.clash?;
        Some(format!("{} and {}", lower.text(), upper.text()))
    }

    /// Whether two kinds of metadata claim one cluster; tells which cluster.
    pub(super) fn conflict(&self) -> Option<(HostCluster, &'static str)> {
        let inside = |first| {
            let cluster = ClusterRun { first, count: 1 };
            self.fixed_within(cluster).next().is_some()
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
    fn a_new_mode_replaces_the_old_one_and_its_flags() {
        let options = |value: Value| value.as_object().unwrap().clone();
        let joined = |new: Value, old: Value| {
            let (mut new, mut old) = (options(new), options(old));
            let joined = OverlapChecks::supersede(&mut new, &mut old);
            joined.map(|()| (new, old)).map_err(|error| error.message)
        };
        let (all, header) = (
            json!({"overlap-check": "all"}),
            json!({"overlap-check.main-header": "on"}),
        );
        let template = json!({"overlap-check.template": "all"});
        assert_eq!(
            joined(all.clone(), header.clone()),
            Ok((options(template.clone()), options(json!({}))))
        );
        assert_eq!(
            joined(header.clone(), all),
            Ok((options(header), options(template)))
        );
        let both = json!({"overlap-check": "constant", "overlap-check.template": "all"});
        let message = "Conflicting values for qcow2 options 'overlap-check' ('constant') and \
                       'overlap-check.template' ('all')";
        assert_eq!(joined(both, json!({})), Err(message.to_owned()));
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

    fn run(first: u64, count: u64) -> ClusterRun {
        ClusterRun {
            first: HostCluster(first),
            count,
        }
    }

    #[test]
    fn an_empty_structure_is_nowhere() {
        let mut map = MetadataMap::default();
        map.add_fixed(Structure::SnapshotL1Table, run(5, 0));
        map.add_fixed(Structure::SnapshotL1Table, run(5, 0));
        assert_eq!(map.overlap(run(4, 3)), None);
        map.add_fixed(Structure::L1Table, run(4, 3));
        assert_eq!(map.fixed_conflict(), None);
        assert_eq!(map.overlap(run(5, 0)), None, "nothing is overwritten");
    }

    #[test]
    fn structures_in_one_place_are_told_and_stay_known() {
        let structures = [
            (Structure::L1Table, run(4, 2)),
            (Structure::SnapshotL1Table, run(8, 1)),
            (Structure::RefcountTable, run(2, 8)),
        ];
        let mut map = MetadataMap::default();
        for (what, run) in structures {
            map.add_fixed(what, run);
        }
        let expected = "refcount table and active L1 table";
        assert_eq!(map.fixed_conflict().as_deref(), Some(expected));
        let (table, l1, inactive) = ("refcount table", "active L1 table", "inactive L1 table");
        let found: Vec<_> = (1..11).map(|at| map.overlap(run(at, 1))).collect();
        let texts = [table, table, l1, l1, table, table, inactive, table];
        assert_eq!(found[0], None);
        assert_eq!(found[1..9], texts.map(Some));
        assert_eq!(found[9], None);
        map.move_fixed(Structure::RefcountTable, run(20, 2));
        assert_eq!(map.overlap(run(6, 2)), None);
        assert_eq!(map.overlap(run(19, 2)), Some(table));
    }

    #[test]
    fn neighbours_do_not_overlap() {
        let mut map = MetadataMap::default();
        for first in (0..2000).rev().step_by(2) {
            map.add_fixed(Structure::SnapshotL1Table, run(first, 2));
        }
        assert_eq!(map.fixed_conflict(), None);
        assert_eq!(map.overlap(run(2001, 9)), None);
        assert!((0..2000).all(|at| map.overlap(run(at + 1, 1)).is_some()));
        assert_eq!(map.conflict(), None);
        map.add_l2_table(HostCluster(1999));
        assert_eq!(map.conflict(), Some((HostCluster(1999), "an L2 table")));
    }

    #[test]
    fn only_what_is_checked_is_found() {
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
