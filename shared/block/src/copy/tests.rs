//! Copies in a simulated world: every option, failures at every request.

use super::*;
use crate::driver::ByteRange;
use crate::edge::Permissions;
use crate::memory::{Call, Memory};
use crate::node::{Node, NodeOptions};
use crate::root::Root;
use executor::Executor;
use executor::sim::{Config, World};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use std::cell::RefCell;
use std::time::Duration;

const CHUNK: u64 = 8192;

fn simulated(test: impl AsyncFnOnce()) {
    Executor::simulated(&World::new(Config::default())).block_on(test());
}

fn root(disk: &Memory) -> Root {
    let options = NodeOptions {
        node_name: "disk".into(),
        ..NodeOptions::default()
    };
    let node = Node::new(options, Box::new(disk.clone()));
    Root::new("", &node, Permissions::READ_WRITE, Permissions::ALL).unwrap()
}

fn slow(bytes: Vec<u8>, delay_us: u64) -> Memory {
    let mut disk = Memory::new(bytes);
    disk.delay = Duration::from_micros(delay_us);
    disk.zeroes = true;
    disk
}

fn options() -> CopyOptions {
    CopyOptions {
        chunk: CHUNK,
        ..CopyOptions::default()
    }
}

/// Data in blocks of sectors, about half of them zeroes.
fn content(seed: u64, sectors: usize) -> Vec<u8> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut bytes = vec![0; sectors * SECTOR as usize];
    let mut at = 0;
    while at < bytes.len() {
        let length = random.random_range(1..24) * SECTOR as usize;
        let end = bytes.len().min(at + length);
        if random.random_bool(0.5) {
            random.fill_bytes(&mut bytes[at..end]);
        }
        at = end;
    }
    bytes
}

async fn copy(from: &[&Memory], to: &Memory, options: &CopyOptions) -> Result<(), CopyError> {
    let roots: Vec<Root> = from.iter().map(|disk| root(disk)).collect();
    let sources = Sources::new(&roots).unwrap();
    let target = root(to).attach();
    Copy::new((&sources, &target), options, &Unobserved)
        .run()
        .await
}

#[test]
fn the_target_reads_as_the_sources_end_to_end() {
    for seed in 0..40 {
        simulated(async || {
            let (first, second) = (content(seed, 37), content(seed + 1000, 50));
            let (from, behind) = (slow(first.clone(), seed % 3), slow(second.clone(), 1));
            let to = slow(vec![0xaa; 90 * SECTOR as usize], seed % 2);
            let options = CopyOptions {
                in_flight: 1 + seed as usize % 5,
                order: [Order::Ascending, Order::Any][seed as usize % 2],
                sparse: [None, Some(512), Some(4096), Some(12288)][seed as usize % 4],
                ..options()
            };
            copy(&[&from, &behind], &to, &options).await.unwrap();
            let expected = [first, second, vec![0xaa; 3 * SECTOR as usize]].concat();
            assert!(to.bytes() == expected, "seed {seed}");
        });
    }
}

/// On a real executor: readers are threads.
fn copy_with_readers(from: &Memory, to: &Memory, options: &CopyOptions) -> Result<(), CopyError> {
    let executor = Executor::new(&executor::Config::default()).unwrap();
    executor.block_on(async {
        let (source, target) = (root(from), root(to).attach());
        let sources = Sources::new([&source]).unwrap();
        let disks = sources.disks();
        let readers = Crew::start("reader", 2, move || disks.attach()).unwrap();
        let copy = Copy::new((&sources, &target), options, &Unobserved);
        copy.with_readers(Some(&readers)).run().await
    })
}

#[test]
fn chunks_that_other_threads_read_are_written_as_if_they_were_not() {
    for seed in 0..12 {
        let bytes = content(seed, 600);
        let (from, to) = (slow(bytes.clone(), 0), slow(vec![0xaa; bytes.len()], 0));
        let options = CopyOptions {
            in_flight: 1 + seed as usize * 2,
            sparse: [None, Some(4096)][seed as usize % 2],
            ..options()
        };
        copy_with_readers(&from, &to, &options).unwrap();
        assert!(to.bytes() == bytes, "seed {seed}");
        let offset = |call: &Call| match call {
            Call::Write(offset, _) => Some(*offset),
            _ => None,
        };
        let written: Vec<u64> = to.calls().iter().filter_map(offset).collect();
        assert!(written.is_sorted(), "seed {seed}: {written:?}");
    }
}

#[test]
fn what_another_thread_cannot_read_ends_the_copy_with_its_offset() {
    let (from, to) = (slow(vec![7; 64 << 10], 0), slow(vec![0; 64 << 10], 0));
    from.arrange(Ok(()));
    from.arrange(Ok(()));
    from.arrange(Err(Errno::EIO));
    let error = copy_with_readers(&from, &to, &options()).unwrap_err();
    assert_eq!((error.act, error.errno), (Act::Read, Errno::EIO));
    assert!(error.offset.is_multiple_of(CHUNK));
}

#[test]
fn zeroes_are_not_written_where_the_target_has_them() {
    simulated(async || {
        let mut bytes = vec![0; 64 << 10];
        bytes[20 << 10..24 << 10].fill(1);
        let (from, to) = (slow(bytes.clone(), 1), slow(vec![0; 64 << 10], 1));
        let options = CopyOptions {
            unwritten: Unwritten::Zeroes,
            ..options()
        };
        copy(&[&from], &to, &options).await.unwrap();
        assert_eq!(to.calls(), [Call::Write(20 << 10, 4 << 10)]);
        assert_eq!(to.bytes(), bytes);
    });
}

#[test]
fn writes_ascend_unless_they_may_come_in_any_order() {
    simulated(async || {
        let from = slow(vec![1; 64 << 10], 10);
        let to = slow(vec![0; 64 << 10], 3);
        copy(&[&from], &to, &options()).await.unwrap();
        let writes: Vec<_> = (0..8).map(|n| Call::Write(n * CHUNK, CHUNK)).collect();
        assert_eq!(to.calls(), writes);
    });
}

#[test]
fn reads_go_on_while_a_write_waits_for_its_turn() {
    simulated(async || {
        let from = slow(vec![1; 64 << 10], 100);
        let to = slow(vec![0; 64 << 10], 1);
        let begun = executor::time::now();
        copy(&[&from], &to, &options()).await.unwrap();
        let took = executor::time::now() - begun;
        assert!(took < Duration::from_micros(200), "{took:?}");
    });
}

#[test]
fn a_failure_at_any_request_ends_the_copy_and_is_told() {
    for failing in 0..8 {
        for (order, write_fails) in [
            (Order::Ascending, true),
            (Order::Any, true),
            (Order::Ascending, false),
        ] {
            simulated(async || {
                let (from, to) = (slow(vec![7; 64 << 10], 5), slow(vec![0; 64 << 10], 7));
                let disk = if write_fails { &to } else { &from };
                for _ in 0..failing {
                    disk.arrange(Ok(()));
                }
                disk.arrange(Err(Errno::EIO));
                let options = CopyOptions {
                    in_flight: 3,
                    order,
                    ..options()
                };
                let error = copy(&[&from], &to, &options).await.unwrap_err();
                assert_eq!(error.errno, Errno::EIO);
                assert_eq!(error.act == Act::Write, write_fails);
                assert_eq!(error.offset, failing * CHUNK);
                let calls = to.calls().len() as u64;
                assert!(calls <= failing + 3, "{calls} writes after a failure");
                if order == Order::Ascending && write_fails {
                    let mut expected = vec![0; 64 << 10];
                    expected[..error.offset as usize].fill(7);
                    assert!(to.bytes() == expected);
                }
            });
        }
    }
}

#[test]
fn a_range_that_begins_within_a_sector_reads_the_same() {
    for seed in 0..20 {
        simulated(async || {
            let bytes = content(seed, 64);
            let (from, to) = (slow(bytes.clone(), 1), slow(vec![0; 64 << 10], 1));
            let (source, target) = (root(&from), root(&to).attach());
            let (start, length) = (100 + seed * 97, 20_000 + seed * 31);
            let range = ByteRange::new(start, length);
            let sources = Sources::of_range(&source, range).unwrap();
            let options = options();
            let copy = Copy::new((&sources, &target), &options, &Unobserved);
            copy.run().await.unwrap();
            let (start, length) = (start as usize, length as usize);
            assert!(to.bytes()[..length] == bytes[start..start + length]);
            assert!(to.bytes()[length..].iter().all(|byte| *byte == 0));
        });
    }
}

#[derive(Default)]
struct Lost(RefCell<Vec<u64>>);

impl Observer for Lost {
    fn copied(&self, _bytes: u64) {}
    fn lost(&self, offset: u64, _errno: Errno) {
        self.0.borrow_mut().push(offset);
    }
    fn status_unknown(&self, _offset: u64, _errno: Errno) {}
}

#[test]
fn what_cannot_be_read_is_zeroes_when_the_rest_is_salvaged() {
    simulated(async || {
        let from = Memory::new(vec![3; 4096]);
        let to = slow(vec![0; 4096], 0);
        // The whole, then the third sector.
        for result in [Err(Errno::EIO), Ok(()), Ok(()), Err(Errno::EIO)] {
            from.arrange(result);
        }
        let (source, target) = (root(&from), root(&to).attach());
        let sources = Sources::new([&source]).unwrap();
        let options = CopyOptions {
            on_read_error: OnReadError::Salvage,
            sparse: None,
            ..options()
        };
        let lost = Lost::default();
        let done = Copy::new((&sources, &target), &options, &lost).run().await;
        assert_eq!((done, lost.0.take()), (Ok(()), vec![1024]));
        let mut expected = vec![3; 4096];
        expected[1024..1536].fill(0);
        assert_eq!(to.bytes(), expected);
    });
}

#[derive(Default)]
struct Portions(RefCell<Vec<u64>>);

impl Observer for Portions {
    fn copied(&self, bytes: u64) {
        self.0.borrow_mut().push(bytes);
    }
    fn lost(&self, _offset: u64, _errno: Errno) {}
    fn status_unknown(&self, _offset: u64, _errno: Errno) {}
}

#[test]
fn progress_is_told_in_portions_however_short_the_chunks_are() {
    simulated(async || {
        let length = (5 << 20) as usize / 2;
        let from = slow(vec![1; length], 0);
        let (source, target) = (root(&from), root(&slow(vec![0; length], 0)).attach());
        let sources = Sources::new([&source]).unwrap();
        let options = CopyOptions {
            chunk: CHUNK_BYTES,
            ..options()
        };
        let told = Portions::default();
        let copy = Copy::new((&sources, &target), &options, &told);
        copy.run().await.unwrap();
        assert_eq!(told.0.take(), [LONG_CHUNK_BYTES, CHUNK_BYTES]);
    });
}

#[test]
fn a_rate_is_kept() {
    simulated(async || {
        let (from, to) = (slow(vec![1; 64 << 10], 0), slow(vec![0; 64 << 10], 0));
        let options = CopyOptions {
            rate: Some(64 << 10),
            ..options()
        };
        let begun = executor::time::now();
        copy(&[&from], &to, &options).await.unwrap();
        let took = executor::time::now() - begun;
        // The last chunk need not wait for its own time.
        assert!(took >= Duration::from_millis(870), "{took:?}");
        assert!(took <= Duration::from_millis(1010), "{took:?}");
    });
}

#[test]
fn compressed_chunks_are_whole_clusters() {
    simulated(async || {
        let from = slow(vec![1; 20 * SECTOR as usize], 0);
        let source = root(&from);
        let sources = Sources::new([&source]).unwrap();
        let options = CopyOptions {
            store: Store::Compressed { cluster: 4096 },
            ..options()
        };
        let mut walk = Walk::new(&sources, &options, &Unobserved);
        let mut ranges = Vec::new();
        while let Some(step) = walk.next().await.unwrap() {
            assert_eq!(step.kind, Kind::Data);
            ranges.push(step.range);
        }
        let expected = [(0, 8192), (8192, 2048)];
        assert_eq!(ranges, expected.map(|(at, long)| ByteRange::new(at, long)));
    });
}

#[test]
fn a_visit_waits_for_the_end_of_a_drain_and_holds_up_the_next() {
    simulated(async || {
        let root = root(&slow(vec![0; 4096], 0));
        let handle = root.attach();
        let drained = root.drain().await;
        let mut visit = Box::pin(handle.visit());
        let first = poll_fn(|cx| Poll::Ready(visit.as_mut().poll(cx).is_ready())).await;
        assert!(!first);
        drop(drained);
        let visit = visit.await;
        assert_eq!(visit.node().length(), 4096);
        let mut drain = Box::pin(root.drain());
        let early = poll_fn(|cx| Poll::Ready(drain.as_mut().poll(cx).is_ready())).await;
        assert!(!early);
        drop(visit);
        drop(drain.await);
    });
}
