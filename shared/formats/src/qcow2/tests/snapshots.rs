//! Operations on snapshots beside a workload, and what the snapshots may hold afterwards.

use super::checker::Checker;
use super::rig::{self, Disk, Setup};
use super::workload::{Check, Fill, History, SECTOR};
use crate::qcow2::CreateOptions;
use block::check::Silent;
use block::{
    Buffer, ByteRange, CheckOptions, Errno, NewSnapshot, Node, NodeOptions, SnapshotInfo,
    WriteFlags,
};
use executor::Executor;
use executor::sim::{Config, World};
use rand::Rng;
use rand::rngs::SmallRng;
use std::path::Path;
use std::rc::Rc;

/// A snapshot that was asked for.
pub(super) struct Taken {
    name: String,
    /// When it was asked for, by the order of events and by the log's length.
    begun: (u64, usize),
    /// The log's length when it was there.
    created: Option<usize>,
    delete_begun: Option<usize>,
    deleted: Option<usize>,
}

/// Creates, deletes and applies snapshots at random.
pub(super) async fn operate(
    disk: Disk,
    history: Rc<History>,
    mut random: SmallRng,
    operations: usize,
) {
    for number in 0..operations {
        let list = disk.snapshots().list();
        let chosen = |random: &mut SmallRng| list[random.random_range(0..list.len())].clone();
        // Snapshots are not applied below bitmaps.
        let kinds = if disk.node.bitmaps().is_empty() { 6 } else { 5 };
        match random.random_range(0..kinds) {
            3 | 4 if !list.is_empty() => delete(&disk, &history, &chosen(&mut random)).await,
            5 if !list.is_empty() => apply(&disk, &history, &chosen(&mut random)).await,
            _ => create(&disk, &history, format!("s{number}")).await,
        }
    }
}

async fn create(disk: &Disk, history: &History, name: String) {
    let begun = (history.event(), history.now());
    let index = history.snapshots.borrow().len();
    history.snapshots.borrow_mut().push(Taken {
        name: name.clone(),
        begun,
        created: None,
        delete_begun: None,
        deleted: None,
    });
    match disk.snapshots().create(NewSnapshot::now(name)).await {
        Ok(_) => history.snapshots.borrow_mut()[index].created = Some(history.now()),
        Err(_) => history.failures.set(history.failures.get() + 1),
    }
}

async fn delete(disk: &Disk, history: &History, snapshot: &SnapshotInfo) {
    let note = |change: &dyn Fn(&mut Taken)| {
        let mut snapshots = history.snapshots.borrow_mut();
        let taken = snapshots
            .iter_mut()
            .find(|taken| taken.name == snapshot.name);
        change(taken.expect("every snapshot was asked for"));
    };
    let begun = history.now();
    note(&|taken| taken.delete_begun = Some(begun));
    match disk.snapshots().delete(&snapshot.id).await {
        Ok(()) => note(&|taken| taken.deleted = Some(history.now())),
        Err(_) => history.failures.set(history.failures.get() + 1),
    }
}

async fn apply(disk: &Disk, history: &History, snapshot: &SnapshotInfo) {
    let _locked = history.locks.lock(0..u64::MAX).await;
    let Ok(content) = read(disk, snapshot).await else {
        history.failures.set(history.failures.get() + 1);
        return;
    };
    {
        let snapshots = history.snapshots.borrow();
        let taken = snapshots.iter().find(|taken| taken.name == snapshot.name);
        let taken = taken.expect("every snapshot was asked for");
        taken.check(history, &content, history.now()).unwrap();
    }
    let sector = |number: usize| ByteRange::new((number * SECTOR) as u64, SECTOR as u64);
    for (number, bytes) in content.chunks(SECTOR).enumerate() {
        let fill = Fill::from_le_bytes(bytes[..8].try_into().unwrap());
        history.begin(sector(number), fill);
    }
    let result = disk.node.apply_snapshot(&snapshot.id).await;
    for number in 0..content.len() / SECTOR {
        let result = result.as_ref().map_err(|_| Errno::EIO);
        history.end(sector(number), result.copied());
    }
}

async fn read(disk: &Disk, snapshot: &SnapshotInfo) -> Result<Vec<u8>, block::Error> {
    let driver = disk.snapshots().open(&snapshot.id).await?;
    let options = NodeOptions {
        node_name: "view".into(),
        read_only: true,
        ..NodeOptions::default()
    };
    let node = Node::new(options, driver);
    let buffer = Buffer::zeroed(snapshot.disk_size as usize);
    let done = node.read(0, buffer.clone()).await;
    done.map_err(|errno| block::Error::io("read", errno))?;
    Ok(buffer.to_heap().to_vec())
}

impl Taken {
    fn check(&self, history: &History, content: &[u8], moment: usize) -> Check {
        let moment = self.created.unwrap_or(moment);
        let certain = |ended: Option<u64>| ended.is_some_and(|ended| ended < self.begun.0);
        history.check(content, &[], moment, |change| certain(change.ended))
    }
}

/// Checks the snapshots of an image as it is after a crash at `moment`.
pub(super) fn check(history: &History, image: &Checker<'_>, moment: usize) -> Check {
    let mut present = image.snapshots();
    for taken in history.snapshots.borrow().iter() {
        let name = &taken.name;
        let found = present.iter().position(|snapshot| snapshot.name == *name);
        let before = |time: Option<usize>| time.is_some_and(|time| time <= moment);
        let Some(found) = found else {
            if before(taken.created) && !before(taken.delete_begun) {
                return Err(format!("snapshot {name} is gone"));
            }
            continue;
        };
        if taken.begun.1 > moment || before(taken.deleted) {
            return Err(format!("snapshot {name} is there"));
        }
        let snapshot = present.swap_remove(found);
        let content = image.read_snapshot(&snapshot);
        let checked = taken.check(history, &content, moment);
        checked.map_err(|wrong| format!("snapshot {name}: {wrong}"))?;
    }
    match present.first() {
        None => Ok(()),
        Some(snapshot) => Err(format!("nobody made snapshot {}", snapshot.name)),
    }
}

/// A run of clusters too short for a table, at the end of what a refcount block counts, is skipped: the
/// state that is being made counts it until it is given back.
#[test]
fn clusters_that_a_snapshot_s_tables_skip_are_given_back_once() {
    let world = World::new(Config::default());
    Executor::simulated(&world).block_on(async {
        let path = Path::new("disk.qcow2");
        // A refcount block counts 64 clusters; an L1 table takes two.
        let options = CreateOptions {
            cluster_size: SECTOR as u64,
            refcount_bits: 64,
            ..CreateOptions::new(4 << 20)
        };
        rig::make(path, &options).await;
        let disk = Disk::open(path, Setup::default()).await.unwrap();
        for round in 0..200 {
            let at = round * SECTOR as u64;
            disk.write(at, &[round as u8; SECTOR]).await.unwrap();
            let new = NewSnapshot::now(format!("s{round}"));
            let taken = disk.snapshots().create(new).await.unwrap();
            if round % 5 != 0 {
                disk.snapshots().delete(&taken.id).await.unwrap();
            }
            disk.root.flush().await.unwrap();
        }
        disk.close().await.unwrap();
        let file = rig::image_edge(path);
        let checked = crate::qcow2::check(&file, CheckOptions::default(), &mut Silent).await;
        let result = checked.unwrap();
        let found = (result.corruptions, result.check_errors, result.leaks);
        assert_eq!(found, (0, 0, 0), "{result:?}");
    });
}

#[test]
fn the_widest_refcount_at_its_maximum_is_no_corruption() {
    let world = World::new(Config::default());
    Executor::simulated(&world).block_on(async {
        let path = Path::new("disk.qcow2");
        let options = CreateOptions {
            refcount_bits: 64,
            ..CreateOptions::new(1 << 20)
        };
        rig::make(path, &options).await;
        let disk = Disk::open(path, Setup::default()).await.unwrap();
        disk.write(0, &[1; SECTOR]).await.unwrap();
        let first = disk.node.block_status(ByteRange::new(0, 65536)).await;
        let cluster = first.unwrap().status.offset.unwrap() / 65536;
        disk.close().await.unwrap();
        let word = |at: usize| {
            let bytes = &world.files()[path][at..at + 8];
            u64::from_be_bytes(bytes.try_into().unwrap())
        };
        // The header's refcount table, whose first entry is the first block.
        let block = word(word(48) as usize);
        let most = Buffer::from(&u64::MAX.to_be_bytes()[..]);
        let leaf = rig::leaf(path);
        let written = leaf.write(block + cluster * 8, most, WriteFlags::default());
        written.await.unwrap();
        let disk = Disk::open(path, Setup::default()).await.unwrap();
        let refused = disk.snapshots().create(NewSnapshot::now("s".to_owned()));
        assert_eq!(refused.await.unwrap_err().errno, Some(Errno::EINVAL));
        disk.write(0, &[2; SECTOR]).await.unwrap();
        disk.close().await.unwrap();
    });
}
