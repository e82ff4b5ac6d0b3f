//! What discards leave: mappings, refcounts, and holes in the file (`pass-discard-*`, `discard-no-unref`).

use super::checker::Checker;
use super::rig::{self, Disk, Setup, leaf, take_holes};
use crate::qcow2::{CreateOptions, DiscardPolicy};
use block::{ByteRange, NewSnapshot, Resize, WriteFlags, ZeroFlags};
use executor::Executor;
use executor::sim::{Config, World};
use std::ops::Range;
use std::path::Path;

const IMAGE: &str = "disk.qcow2";
const CLUSTER: u64 = 16 << 10;
/// Clusters of the disk.
const CLUSTERS: u64 = 64;
const ZERO: u64 = 1;
const COPIED: u64 = 1 << 63;
const SUBCLUSTERS: u64 = 16;

const KEEPING: DiscardPolicy = DiscardPolicy {
    request: true,
    snapshot: true,
    other: true,
    keeps_clusters: true,
};

const GIVING_BACK: DiscardPolicy = DiscardPolicy {
    keeps_clusters: false,
    ..KEEPING
};

/// A new image in a world of its own, open.
struct Rig {
    world: World,
    disk: Disk,
}

/// Runs `work` on a new image over a backing of those bytes, closes it, and checks that nothing leaked.
fn on_new_image(
    (discards, features, backing): (DiscardPolicy, u64, Option<u8>),
    work: impl AsyncFnOnce(&Rig),
) {
    let world = World::new(Config::default());
    Executor::simulated(&world).block_on(async {
        let options = CreateOptions {
            cluster_size: CLUSTER,
            ..CreateOptions::new(CLUSTERS * CLUSTER)
        };
        rig::make(Path::new(IMAGE), &options).await;
        rig::with_features(Path::new(IMAGE), CLUSTERS * CLUSTER, (features, 0)).await;
        let mut setup = Setup {
            discards,
            ..Setup::default()
        };
        if let Some(byte) = backing {
            let node = leaf(Path::new("backing.raw"));
            let bytes = vec![byte; (CLUSTERS * CLUSTER) as usize];
            let write = node.write(0, bytes[..].into(), WriteFlags::default());
            write.await.unwrap();
            setup.backing = Some(node);
        }
        let disk = Disk::open(Path::new(IMAGE), setup).await.unwrap();
        let rig = Rig { world, disk };
        take_holes();
        work(&rig).await;
        rig.disk.close().await.unwrap();
        let image = &rig.world.files()[Path::new(IMAGE)];
        assert_eq!(Checker::new(image).check(), Default::default());
    });
}

/// The bytes of so many guest clusters.
const fn clusters(range: Range<u64>) -> ByteRange {
    ByteRange::new(range.start * CLUSTER, (range.end - range.start) * CLUSTER)
}

impl Rig {
    async fn fill(&self, range: Range<u64>, byte: u8) {
        let bytes = vec![byte; clusters(range.clone()).length as usize];
        self.disk
            .write(range.start * CLUSTER, &bytes)
            .await
            .unwrap();
    }

    async fn discard(&self, range: ByteRange) {
        self.disk.root.discard(range).await.unwrap();
    }

    /// Until what was freed before is given back: durable, and no older request left.
    async fn settle(&self) {
        for _ in 0..4 {
            self.disk.root.flush().await.unwrap();
        }
    }

    /// The entry of a guest cluster in the file.
    fn entry(&self, number: u64) -> (u64, u64) {
        let files = self.world.files();
        Checker::new(&files[Path::new(IMAGE)]).entry(number * CLUSTER)
    }

    fn refcount(&self, host: u64) -> u64 {
        let files = self.world.files();
        Checker::new(&files[Path::new(IMAGE)]).refcount(host / CLUSTER)
    }

    /// Where a guest cluster with data is in the file.
    fn host(&self, number: u64) -> u64 {
        let (entry, _) = self.entry(number);
        assert_ne!(entry & COPIED, 0, "cluster {number} has a place of its own");
        entry & !COPIED
    }

    async fn expect(&self, range: Range<u64>, byte: u8) {
        for number in range {
            let content = self.disk.read(number * CLUSTER, CLUSTER as usize).await;
            let content = content.unwrap();
            assert!(content.iter().all(|found| *found == byte), "{number}");
        }
    }
}

/// The holes in the image file.
fn holes() -> Vec<Range<u64>> {
    let image = |hole: rig::Hole| {
        assert_eq!(hole.path, Path::new(IMAGE));
        hole.range
    };
    take_holes().into_iter().map(image).collect()
}

fn host_clusters(host: u64, count: u64) -> Range<u64> {
    host..host + count * CLUSTER
}

#[test]
fn a_discarded_cluster_is_given_back_and_its_storage_with_it() {
    on_new_image((GIVING_BACK, 0, None), async |rig| {
        rig.fill(0..4, 7).await;
        rig.settle().await;
        let host = rig.host(1);
        assert_eq!(holes(), []);
        rig.discard(clusters(1..3)).await;
        assert_eq!(holes(), [], "the discard is not durable yet");
        rig.settle().await;
        assert_eq!(holes(), [host_clusters(host, 2)]);
        for (number, host) in [(1, host), (2, host + CLUSTER)] {
            assert_eq!(rig.entry(number), (ZERO, 0));
            assert_eq!(rig.refcount(host), 0);
        }
        rig.expect(1..3, 0).await;
        // The next one to need a cluster gets it.
        rig.fill(9..10, 8).await;
        rig.settle().await;
        assert_eq!(rig.host(9), host);
    });
}

#[test]
fn a_kept_cluster_stays_counted_and_loses_its_storage() {
    on_new_image((KEEPING, 0, None), async |rig| {
        rig.fill(0..4, 7).await;
        rig.settle().await;
        let host = rig.host(1);
        rig.discard(clusters(1..3)).await;
        assert_eq!(holes(), [host_clusters(host, 2)]);
        rig.settle().await;
        let check_mapping = || {
            for (number, host) in [(1, host), (2, host + CLUSTER)] {
                assert_eq!(rig.entry(number), (host | COPIED | ZERO, 0));
                assert_eq!(rig.refcount(host), 1);
            }
        };
        check_mapping();
        rig.expect(1..3, 0).await;
        // A second time there is nothing to give up.
        rig.discard(clusters(0..3)).await;
        assert_eq!(holes(), [host_clusters(host - CLUSTER, 1)]);
        rig.settle().await;
        check_mapping();
        // Others do not get it; what is written there comes back to it.
        rig.fill(9..10, 8).await;
        rig.disk.write(CLUSTER + 1024, &[9; 512]).await.unwrap();
        rig.settle().await;
        assert_eq!(rig.host(1), host);
        let content = rig.disk.read(CLUSTER, CLUSTER as usize).await.unwrap();
        let mut right = vec![0; CLUSTER as usize];
        right[1024..1536].fill(9);
        assert!(content == right);
        assert_eq!(holes(), []);
    });
}

#[test]
fn kept_clusters_give_up_storage_for_zeroes_that_may_unmap_only() {
    on_new_image((KEEPING, 0, None), async |rig| {
        rig.fill(0..4, 7).await;
        rig.settle().await;
        let host = rig.host(0);
        for (number, may_unmap) in [(1, true), (2, false)] {
            let flags = ZeroFlags {
                may_unmap,
                ..ZeroFlags::default()
            };
            let zeroed = rig
                .disk
                .root
                .write_zeroes(clusters(number..number + 1), flags);
            zeroed.await.unwrap();
        }
        rig.settle().await;
        assert_eq!(holes(), [host_clusters(host + CLUSTER, 1)]);
        for number in 1..3 {
            let place = host + number * CLUSTER;
            assert_eq!(rig.entry(number).0, place | COPIED | ZERO);
            assert_eq!(rig.refcount(place), 1);
        }
        rig.expect(1..3, 0).await;
    });
}

#[test]
fn without_passing_requests_on_no_discard_reaches_the_file() {
    for keeps_clusters in [false, true] {
        let policy = DiscardPolicy {
            request: false,
            keeps_clusters,
            ..KEEPING
        };
        on_new_image((policy, 0, None), async |rig| {
            rig.fill(0..2, 7).await;
            rig.settle().await;
            let host = rig.host(0);
            rig.discard(clusters(0..1)).await;
            rig.settle().await;
            assert_eq!(holes(), []);
            assert_eq!(rig.refcount(host), u64::from(keeps_clusters));
            rig.expect(0..1, 0).await;
            // What was there must not show through around new data.
            rig.disk.write(512, &[9; 512]).await.unwrap();
            let content = rig.disk.read(0, CLUSTER as usize).await.unwrap();
            let mut right = vec![0; CLUSTER as usize];
            right[512..1024].fill(9);
            assert!(content == right, "{keeps_clusters}");
        });
    }
}

#[test]
fn discards_do_not_show_the_backing() {
    for (policy, features) in [(KEEPING, 0), (GIVING_BACK, 0), (KEEPING, SUBCLUSTERS)] {
        on_new_image((policy, features, Some(5)), async |rig| {
            rig.fill(0..2, 7).await;
            rig.settle().await;
            let (host, before) = (rig.host(0), rig.world.files()[Path::new(IMAGE)].len());
            rig.expect(4..5, 5).await;
            // One with data, one that nothing was written to.
            rig.discard(clusters(0..1)).await;
            rig.discard(clusters(4..5)).await;
            rig.settle().await;
            rig.expect(0..1, 0).await;
            rig.expect(4..5, 0).await;
            rig.expect(5..6, 5).await;
            assert_eq!(holes(), [host_clusters(host, 1)]);
            let kept = u64::from(policy.keeps_clusters);
            assert_eq!(rig.refcount(host), kept);
            let (entry, bits) = rig.entry(0);
            assert_eq!(entry & !(ZERO | COPIED), host * kept);
            let all_zero = u64::from(u32::MAX) << 32;
            let second = if features == SUBCLUSTERS { all_zero } else { 0 };
            assert_eq!(bits, second);
            let first = u64::from(features != SUBCLUSTERS);
            assert_eq!(rig.entry(4), (first, second), "zeroes need no storage");
            let after = rig.world.files()[Path::new(IMAGE)].len();
            assert_eq!(after, before, "a discard made the file longer");
        });
    }
}

#[test]
fn kept_subclusters_lose_their_storage_one_by_one() {
    const SUBCLUSTER: u64 = CLUSTER / 32;
    on_new_image((KEEPING, SUBCLUSTERS, None), async |rig| {
        rig.fill(0..2, 7).await;
        rig.settle().await;
        let host = rig.host(0);
        let all = u64::from(u32::MAX);
        assert_eq!(rig.entry(0), (host | COPIED, all));
        let unmap = ZeroFlags {
            may_unmap: true,
            ..ZeroFlags::default()
        };
        let part = ByteRange::new(4 * SUBCLUSTER, 3 * SUBCLUSTER);
        rig.disk.root.write_zeroes(part, unmap).await.unwrap();
        let gone = host + 4 * SUBCLUSTER..host + 7 * SUBCLUSTER;
        assert_eq!(holes(), [gone]);
        rig.settle().await;
        let zeroes = 0b111 << 4;
        assert_eq!(rig.entry(0), (host | COPIED, zeroes << 32 | all & !zeroes));
        // Nothing is discarded for less than a cluster.
        rig.discard(part).await;
        rig.discard(ByteRange::new(0, CLUSTER - SUBCLUSTER)).await;
        assert_eq!(holes(), []);
        rig.discard(clusters(0..1)).await;
        assert_eq!(holes(), [host_clusters(host, 1)]);
        rig.settle().await;
        assert_eq!(rig.entry(0), (host | COPIED, all << 32));
        assert_eq!(rig.refcount(host), 1);
        rig.expect(0..1, 0).await;
        rig.disk.write(SUBCLUSTER, &[9; 512]).await.unwrap();
        rig.settle().await;
        assert_eq!(rig.entry(0), (host | COPIED, (all & !0b10) << 32 | 0b10));
        rig.expect(1..2, 7).await;
    });
}

#[test]
fn clusters_of_a_snapshot_are_not_discarded_and_go_with_it() {
    for policy in [KEEPING, GIVING_BACK] {
        for snapshot in [true, false] {
            let policy = DiscardPolicy { snapshot, ..policy };
            on_new_image((policy, 0, None), async |rig| {
                rig.fill(0..2, 7).await;
                let taken = rig.disk.snapshots().create(NewSnapshot::now("one"));
                let taken = taken.await.unwrap();
                rig.settle().await;
                let host = rig.entry(0).0;
                assert_eq!(rig.refcount(host), 2);
                // Of tables that moved.
                take_holes();
                rig.discard(clusters(0..1)).await;
                rig.settle().await;
                assert_eq!(holes(), [], "a snapshot has this content");
                let kept = u64::from(policy.keeps_clusters);
                assert_eq!(rig.refcount(host), 1 + kept);
                rig.expect(0..1, 0).await;
                // The place is the snapshot's: new data goes elsewhere.
                rig.fill(0..1, 9).await;
                rig.settle().await;
                assert_ne!(rig.host(0), host);
                assert_eq!(rig.refcount(host), 1);
                rig.disk.snapshots().delete(&taken.id).await.unwrap();
                rig.settle().await;
                assert_eq!(rig.refcount(host), 0);
                let given_up = take_holes();
                let is_hole = |hole: &rig::Hole| hole.range.contains(&host);
                assert_eq!(given_up.iter().any(is_hole), snapshot);
                assert_eq!(given_up.is_empty(), !snapshot);
                rig.expect(0..1, 9).await;
                rig.expect(1..2, 7).await;
            });
        }
    }
}

#[test]
fn tables_that_moved_are_holes_when_other_discards_are_passed_on() {
    for other in [true, false] {
        let policy = DiscardPolicy {
            other,
            ..GIVING_BACK
        };
        on_new_image((policy, 0, None), async |rig| {
            rig.fill(0..2, 7).await;
            rig.settle().await;
            // A new L1 table: one cluster of it maps 2048 tables of 2048 clusters.
            let table = {
                let files = rig.world.files();
                let field = files[Path::new(IMAGE)][40..48].try_into().unwrap();
                u64::from_be_bytes(field)
            };
            let resize = Resize::to((CLUSTER / 8 + 1) * (CLUSTER / 8) * CLUSTER);
            rig.disk.node.resize(resize).await.unwrap();
            rig.settle().await;
            assert_eq!(rig.refcount(table), 0);
            let expected = other.then(|| host_clusters(table, 1));
            assert_eq!(holes(), Vec::from_iter(expected));
            // Nor is what a write replaces ever a hole.
            rig.disk
                .write_compressed(0, &[3; CLUSTER as usize])
                .await
                .unwrap();
            rig.fill(0..1, 9).await;
            rig.settle().await;
            assert_eq!(holes(), []);
        });
    }
}
