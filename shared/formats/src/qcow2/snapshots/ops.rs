//! The operations on snapshots.

use super::super::cache::MAX_SLICES;
use super::super::header::MAX_SNAPSHOTS;
use super::super::open::OpenOptions;
use super::super::{CacheOptions, Qcow2};
use super::SnapshotEntry;
use super::shadow::Failure;
use super::transition::{Change, Readers};
use block::edge::EdgeSpec;
use block::open::ChildRole;
use block::{
    BoxFuture, Driver, Edge, Errno, Error, ErrorKind, FormatNode, NewSnapshot, SnapshotInfo,
    Snapshots,
};

/// Longest identifier and name in bytes.
const MAX_TEXT: usize = u16::MAX as usize;

impl Snapshots for Qcow2 {
    fn check(&self) -> Result<(), Error> {
        match self.geometry.external_data {
            false => Ok(()),
            // Clusters of an external data file are not counted and cannot be shared.
            true => Err(Failure::Io(Errno::EOPNOTSUPP).into_error()),
        }
    }

    fn list(&self) -> Vec<SnapshotInfo> {
        let disk_size = self.disk_size();
        let state = self.state();
        let entries = state.snapshots.entries.iter();
        entries.map(|entry| entry.info(disk_size)).collect()
    }

    fn create(&self, new: NewSnapshot) -> BoxFuture<'_, Result<SnapshotInfo, Error>> {
        Box::pin(self.create_snapshot(new))
    }

    fn apply<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(self.apply_snapshot(id))
    }

    fn delete<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(self.delete_snapshot(id))
    }

    fn open<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Box<dyn Driver>, Error>> {
        Box::pin(self.open_snapshot(id))
    }
}

impl Qcow2 {
    fn check_changeable(&self) -> Result<(), Error> {
        self.check()?;
        self.check_writable()
            .and(if self.is_sound() {
                Ok(())
            } else {
                Err(Errno::EIO)
            })
            .map_err(|errno| Failure::Io(errno).into_error())
    }

    /// The entry with identifier `id`, and its index.
    fn snapshot(&self, id: &str) -> Result<(usize, SnapshotEntry), Error> {
        let state = self.state();
        let mut entries = state.snapshots.entries.iter().enumerate();
        entries
            .find(|(_, entry)| entry.has_id(id))
            .map(|(index, entry)| (index, entry.clone()))
            .ok_or_else(|| Error {
                errno: Some(Errno::ENOENT),
                ..Error::new(ErrorKind::NotFound, "Can't find the snapshot")
            })
    }

    async fn create_snapshot(&self, new: NewSnapshot) -> Result<SnapshotInfo, Error> {
        let _one_at_a_time = self.snapshotting.lock().await;
        self.check_changeable()?;
        let quiet = self.quiet().await;
        let mut snapshots = self.state().snapshots.entries.clone();
        if snapshots.len() >= MAX_SNAPSHOTS as usize {
            return Err(Failure::Io(Errno::EFBIG).into_error());
        }
        let highest = snapshots.iter().map(SnapshotEntry::numeric_id).max();
        let info = SnapshotInfo {
            id: highest.unwrap_or(0).wrapping_add(1).to_string(),
            name: new.name,
            vm_state_size: 0,
            date_seconds: new.date_seconds,
            date_ns: new.date_ns,
            vm_clock_ns: new.vm_clock_ns,
            icount: new.icount,
            disk_size: self.disk_size(),
        };
        if info.name.len() > MAX_TEXT {
            return Err(Failure::Io(Errno::ENAMETOOLONG).into_error());
        }
        snapshots.push(SnapshotEntry::new(&info));
        let active = self.active_l1();
        let copied = super::super::tables::COPIED;
        let change = Change {
            dropped: Vec::new(),
            added: active.clone(),
            new_l1: Some(active.iter().map(|entry| entry & !copied).collect()),
            active,
            disk_size: info.disk_size,
            snapshots,
            old_l1: None,
            readers: Readers::Requests,
        };
        let done = self.transition(&quiet, change).await;
        drop(quiet);
        self.conclude(done).await?;
        Ok(info)
    }

    async fn apply_snapshot(&self, id: &str) -> Result<(), Error> {
        let _one_at_a_time = self.snapshotting.lock().await;
        self.check_changeable()?;
        let (_, entry) = self.snapshot(id)?;
        let disk_size = entry.info(self.disk_size()).disk_size;
        let l1 = self
            .snapshot_l1(&entry)
            .await
            .map_err(Failure::into_error)?;
        if self.geometry.l1_entries_for(disk_size) > l1.len() as u64 || disk_size % 512 != 0 {
            let what = "the snapshot's L1 table is too small for its disk".to_owned();
            return Err(Failure::Corrupt(what).into_error());
        }
        let slices_per_table = 1 << (self.geometry.cluster_bits - self.geometry.l2_slice_bits);
        if l1.len() as u64 * slices_per_table > MAX_SLICES {
            return Err(Failure::Io(Errno::EFBIG).into_error());
        }
        let quiet = self.quiet().await;
        let dropped = self.active_l1();
        let mut active = l1.clone();
        // The table in memory only grows.
        active.resize(dropped.len().max(active.len()), 0);
        let change = Change {
            dropped,
            added: l1,
            active,
            disk_size,
            snapshots: self.state().snapshots.entries.clone(),
            new_l1: None,
            old_l1: None,
            readers: Readers::Requests,
        };
        let done = self.transition(&quiet, change).await;
        drop(quiet);
        self.conclude(done).await
    }

    async fn delete_snapshot(&self, id: &str) -> Result<(), Error> {
        let _one_at_a_time = self.snapshotting.lock().await;
        self.check_changeable()?;
        let (index, entry) = self.snapshot(id)?;
        // The table's entry and `entry` hold one each.
        if std::sync::Arc::strong_count(&entry.shown) > 2 {
            let message = format!("Snapshot '{id}' is in use");
            return Err(Error::new(ErrorKind::Busy, message));
        }
        let dropped = self
            .snapshot_l1(&entry)
            .await
            .map_err(Failure::into_error)?;
        let quiet = self.quiet().await;
        let mut snapshots = self.state().snapshots.entries.clone();
        snapshots.remove(index);
        let l1_run = self.clusters_of(entry.l1_offset, u64::from(entry.l1_entries) * 8);
        let change = Change {
            dropped,
            added: Vec::new(),
            active: self.active_l1(),
            disk_size: self.disk_size(),
            snapshots,
            new_l1: None,
            old_l1: (l1_run.count != 0).then_some(l1_run),
            readers: Readers::None,
        };
        let done = self.transition(&quiet, change).await;
        drop(quiet);
        self.conclude(done).await
    }

    /// Writes the snapshot table anew when its entries lack what version 3 needs of them.
    pub(in super::super) async fn complete_snapshots(&self) -> Result<(), Error> {
        let _one_at_a_time = self.snapshotting.lock().await;
        let disk_size = self.disk_size();
        let snapshots = self.state().snapshots.entries.clone();
        if !snapshots.iter().any(SnapshotEntry::is_incomplete) {
            return Ok(());
        }
        self.check_changeable()?;
        let quiet = self.quiet().await;
        let snapshots = snapshots.iter().map(|entry| entry.completed(disk_size));
        let change = Change {
            dropped: Vec::new(),
            added: Vec::new(),
            active: self.active_l1(),
            disk_size,
            snapshots: snapshots.collect(),
            new_l1: None,
            old_l1: None,
            readers: Readers::None,
        };
        let done = self.transition(&quiet, change).await;
        drop(quiet);
        self.conclude(done).await
    }

    /// Gives back what the old state alone referred to; its failure is none of the operation.
    async fn conclude(&self, done: Result<(), Failure>) -> Result<(), Error> {
        match done {
            Ok(()) => {}
            Err(Failure::Corrupt(what)) => {
                self.corruption(&what).await;
                return Err(Failure::Corrupt(what).into_error());
            }
            Err(failure) => return Err(failure.into_error()),
        }
        if self.flush_metadata().await.is_ok() {
            self.reclaim(super::super::reclaim::Requests::MayRun, usize::MAX)
                .await;
        }
        Ok(())
    }

    async fn open_snapshot(&self, id: &str) -> Result<Box<dyn Driver>, Error> {
        let _one_at_a_time = self.snapshotting.lock().await;
        let (_, entry) = self.snapshot(id)?;
        let mut header = self.header.clone();
        header.size = entry.info(self.disk_size()).disk_size;
        header.l1_offset = entry.l1_offset;
        header.l1_entries = u64::from(entry.l1_entries);
        header.snapshots = 0;
        header.bitmaps = None;
        if self.geometry.l1_entries_for(header.size) > header.l1_entries {
            let what = "the snapshot's L1 table is too small for its disk".to_owned();
            return Err(Failure::Corrupt(what).into_error());
        }
        let file = share(&self.file, "file")?;
        let backing = self.backing.as_ref().map(|edge| share(edge, "backing"));
        let options = OpenOptions {
            read_only: true,
            caches: CacheOptions {
                l2: Some(VIEW_CACHE),
                refcounts: Some(0),
                ..CacheOptions::default()
            },
            crypto: self.crypto.clone(),
            reporter: self.reporter.clone(),
            ..OpenOptions::default()
        };
        let mut view = Self::open_parsed(file, backing.transpose()?, header, options).await?;
        view.shows = Some(entry.shown);
        Ok(Box::new(FormatNode::new(view)))
    }
}

/// Memory for the L2 tables of a view, in bytes.
const VIEW_CACHE: u64 = 4 << 20;

/// An edge to the same child that only reads, whatever others do: a snapshot's clusters do not
/// change.
fn share(edge: &Edge, name: &'static str) -> Result<Edge, Error> {
    let spec = EdgeSpec {
        parent: "snapshot".into(),
        name,
        role: ChildRole::Filtered,
        read_only: true,
    };
    Edge::attach(edge.child(), spec)
}
