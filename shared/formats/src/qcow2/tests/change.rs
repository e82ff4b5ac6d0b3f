//! Changes of an image as a whole (size, refcount width, version) on the simulated world: after a
//! power cut or a failure anywhere the image is consistent and is the old one or the new one.

use super::checker::Checker;
use super::rig::{self, Disk, Setup};
use super::workload::pattern;
use crate::qcow2::CreateOptions;
use crate::qcow2::amend::amend_parts;
use crate::qcow2::crypto::Crypto;
use crate::qcow2::entry::Parts;
use crate::qcow2::open::{OpenOptions, read_header};
use block::amend::{AmendRequest, Force};
use block::{ByteRange, Error, Preallocation, Resize, ZeroFlags};
use executor::sim::{Config, Fault, PowerCut, Subset, World};
use executor::{Errno, Executor};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

const IMAGE: &str = "disk.qcow2";
const CLUSTER: u64 = 1024;
const SIZE: u64 = 200 * CLUSTER;
/// Random parts of what was not flushed that are tried in each epoch.
const SUBSETS: usize = 50;

/// What is done to the image.
#[derive(Clone, Debug)]
enum Change {
    /// `block_resize`
    Resize(Resize),
    /// `amend`, with members as QMP has them.
    Amend(Value),
}

fn resize(length: u64, preallocation: Preallocation) -> Change {
    Change::Resize(Resize {
        length,
        preallocation,
    })
}

impl Change {
    async fn make(&self) -> Result<(), Error> {
        let path = Path::new(IMAGE);
        match self {
            Self::Resize(resize) => {
                let disk = Disk::open(path, Setup::default()).await?;
                let resized = disk.node.resize(*resize).await;
                let closed = disk.close().await;
                resized?;
                closed.map_err(|errno| Error::io("close", errno))
            }
            Self::Amend(members) => amend(path, None, members.clone()).await,
        }
    }

    /// Bytes of the disk afterwards.
    fn size(&self) -> u64 {
        match self {
            Self::Resize(resize) => resize.length,
            Self::Amend(members) => members["size"].as_u64().unwrap_or(SIZE),
        }
    }
}

/// Amends an image by members as QMP has them.
pub(super) async fn amend(path: &Path, key: Option<&str>, members: Value) -> Result<(), Error> {
    let file = rig::image_edge(path);
    let header = read_header(&file).await?;
    let crypto = match key {
        Some(key) => Crypto::open(&file, &header, &rig::password(key)).await?,
        None => None,
    };
    let parts = Parts {
        header,
        file,
        backing: None,
        options: OpenOptions {
            crypto: crypto.map(Arc::new),
            ..OpenOptions::default()
        },
    };
    let members = members.as_object().unwrap().clone();
    let mut progress = |_, _| {};
    let mut changes = AmendRequest::new(members, Force::Refuse, &mut progress);
    amend_parts(parts, &mut changes).await
}

/// Changes of version 3 images, then of version 2.
fn changes() -> Vec<(u32, Change)> {
    let version_3 = [
        resize(SIZE + 300 * CLUSTER, Preallocation::Off),
        resize(SIZE + 40 * CLUSTER + 512, Preallocation::Metadata),
        resize(SIZE + 20 * CLUSTER, Preallocation::Full),
        resize(SIZE - 60 * CLUSTER - 512, Preallocation::Off),
        resize(3 * CLUSTER, Preallocation::Off),
        Change::Amend(json!({"refcount-bits": 1})),
        Change::Amend(json!({"refcount-bits": 64})),
        Change::Amend(json!({"version": "v2"})),
        Change::Amend(json!({"size": SIZE / 2, "lazy-refcounts": true, "refcount-bits": 8})),
    ];
    let version_2 = [
        Change::Amend(json!({"version": "v3", "refcount-bits": 32})),
        resize(SIZE / 2, Preallocation::Off),
    ];
    let of = |version| move |change| (version, change);
    version_3
        .into_iter()
        .map(of(3))
        .chain(version_2.into_iter().map(of(2)))
        .collect()
}

/// A world with a closed image that holds data, zeroes of both kinds, and nothing in places.
fn world(version: u32) -> (World, Vec<u8>) {
    let config = Config::default();
    let world = World::new(config.clone());
    let options = CreateOptions {
        cluster_size: CLUSTER,
        version,
        ..CreateOptions::new(SIZE)
    };
    let content = Executor::simulated(&world).block_on(async {
        rig::make(Path::new(IMAGE), &options).await;
        let disk = Disk::open(Path::new(IMAGE), Setup::default())
            .await
            .unwrap();
        for (fill, start) in (1..).zip([0, 30, 100, 137, 190]) {
            let bytes = pattern(fill, 10 * CLUSTER as usize);
            disk.write(start * CLUSTER, &bytes).await.unwrap();
        }
        for (start, may_unmap) in [(32, true), (104, false), (60, true)] {
            let range = ByteRange::new(start * CLUSTER, 4 * CLUSTER);
            let flags = ZeroFlags {
                may_unmap,
                ..ZeroFlags::default()
            };
            disk.root.write_zeroes(range, flags).await.unwrap();
        }
        let content = disk.read_all().await.unwrap();
        disk.close().await.unwrap();
        content
    });
    let all = cut(world.log_len(), Subset::All);
    (world.restart(&all, config), content)
}

pub(super) fn cut(prefix: usize, subset: Subset) -> PowerCut {
    PowerCut {
        prefix,
        subset,
        tear: 512,
    }
}

/// Asserts that the image is sound, and the old or the new one.
fn assert_old_or_new(bytes: &[u8], old: &[u8], size: u64, context: &str) {
    let checker = Checker::new(bytes);
    let findings = checker.check();
    assert!(findings.corruptions.is_empty(), "{context}: {findings:#x?}");
    let content = checker.read_all(&[]);
    let found = content.len() as u64;
    assert!(found == SIZE || found == size, "{context}: {found} bytes");
    let expected = resized(old, found);
    assert!(content == expected, "{context}: the content differs");
}

/// `old`, cut off or continued with zeroes.
fn resized(old: &[u8], size: u64) -> Vec<u8> {
    let mut content = old.to_vec();
    content.resize(size as usize, 0);
    content
}

#[test]
fn a_power_cut_leaves_the_old_image_or_the_new_one() {
    for (version, change) in changes() {
        let (world, old) = world(version);
        println!("v{version} {change:?}");
        Executor::simulated(&world).block_on(change.make()).unwrap();
        let files = world.files();
        let done = Checker::new(&files[Path::new(IMAGE)]);
        assert_eq!(done.check(), Default::default(), "{change:?}");
        assert!(done.read_all(&[]) == resized(&old, change.size()));
        each_cut(&world, |cut| {
            let files = world.power_cut(cut);
            let context = format!("v{version} {change:?}, {cut:?}");
            assert_old_or_new(&files[Path::new(IMAGE)], &old, change.size(), &context);
        });
    }
}

/// Cuts the power at every entry of a world's log.
pub(super) fn each_cut(world: &World, mut judge: impl FnMut(&PowerCut)) {
    for epoch in world.epochs() {
        let random = SUBSETS.div_ceil(epoch.len()) as u64;
        for prefix in epoch {
            let parts = (0..random).map(Subset::Random);
            for subset in [Subset::None, Subset::All].into_iter().chain(parts) {
                judge(&cut(prefix, subset));
            }
        }
    }
}

#[test]
fn what_a_cut_off_change_leaves_never_shows_when_the_disk_grows() {
    let (larger, change) = (
        SIZE + 80 * CLUSTER,
        resize(7 * CLUSTER + 512, Preallocation::Off),
    );
    let (world, old) = world(3);
    Executor::simulated(&world).block_on(change.make()).unwrap();
    for prefix in 0..=world.log_len() {
        for subset in [Subset::None, Subset::All, Subset::Random(prefix as u64)] {
            let cut = cut(prefix, subset);
            let after = world.restart(&cut, Config::default());
            let before = Checker::new(&after.files()[Path::new(IMAGE)]).read_all(&[]);
            let grow = resize(larger, Preallocation::Off);
            Executor::simulated(&after).block_on(grow.make()).unwrap();
            let files = after.files();
            let checker = Checker::new(&files[Path::new(IMAGE)]);
            let findings = checker.check();
            assert!(findings.corruptions.is_empty(), "{cut:?}: {findings:#x?}");
            let expected = resized(&old[..before.len()], larger);
            assert!(checker.read_all(&[]) == expected, "{cut:?}");
        }
    }
}

#[test]
fn a_failing_disk_leaves_the_old_image_or_the_new_one() {
    for (version, change) in changes() {
        println!("v{version} {change:?}");
        let operations = change_with_fault((version, &change), None);
        for op_index in 0..operations {
            for sticky in [false, true] {
                let fault = Fault {
                    op_index,
                    errno: Errno::EIO,
                    sticky,
                };
                change_with_fault((version, &change), Some(fault));
            }
        }
    }
}

/// Makes a change with a fault, then cuts the power; answers with the number of operations.
fn change_with_fault((version, change): (u32, &Change), fault: Option<Fault>) -> u64 {
    let (world, old) = world(version);
    if let Some(fault) = fault {
        world.inject(fault);
    }
    let done = Executor::simulated(&world).block_on(change.make());
    let context = format!("v{version} {change:?}, {fault:?}");
    assert!(done.is_ok() || fault.is_some(), "{context}: {done:?}");
    for subset in [Subset::None, Subset::All, Subset::Random(1)] {
        let files = world.power_cut(&cut(world.log_len(), subset));
        let bytes = &files[Path::new(IMAGE)];
        assert_old_or_new(bytes, &old, change.size(), &context);
        if done.is_ok() {
            let size = Checker::new(bytes).read_all(&[]).len() as u64;
            assert_eq!(size, change.size(), "{context}: not durable");
        }
    }
    world.op_count()
}
