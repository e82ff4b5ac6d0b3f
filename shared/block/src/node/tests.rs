use super::*;
use crate::edge::Permissions;
use crate::memory::{Call, Memory};
use crate::root::Root;
use executor::Executor;
use executor::sim::{Config, World};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use std::time::Duration;

fn run<F: Future>(future: F) -> F::Output {
    Executor::simulated(&World::new(Config::default())).block_on(future)
}

fn node(options: NodeOptions, memory: &Memory) -> Arc<Node> {
    Node::new(options, Box::new(memory.clone()))
}

fn filled(length: usize, byte: u8) -> Buffer {
    let buffer = Buffer::zeroed(length);
    buffer.fill(byte);
    buffer
}

fn writable() -> NodeOptions {
    NodeOptions {
        discard: Discard::Unmap,
        ..NodeOptions::default()
    }
}

#[test]
fn long_transfers_are_split_at_the_limit() {
    let mut memory = Memory::new(vec![0; 65536]);
    memory.limits.max_transfer = 4096;
    run(async {
        let node = node(writable(), &memory);
        let write = node.write(0, filled(10000, 1), WriteFlags::default());
        write.await.unwrap();
        assert_eq!(
            memory.calls(),
            [
                Call::Write(0, 4096),
                Call::Write(4096, 4096),
                Call::Write(8192, 1808)
            ]
        );
        node.read(100, Buffer::zeroed(4097)).await.unwrap();
        assert_eq!(memory.calls(), [Call::Read(100, 4096), Call::Read(4196, 1)]);
    });
    assert!(memory.bytes()[..10000].iter().all(|byte| *byte == 1));
}

#[test]
fn unaligned_writes_read_only_the_blocks_at_their_ends() {
    let mut memory = Memory::new(vec![9; 65536]);
    memory.limits.request_alignment = 4096;
    run(async {
        let node = node(writable(), &memory);
        let write = node.write(5000, filled(20000, 1), WriteFlags::default());
        write.await.unwrap();
        assert_eq!(
            memory.calls(),
            [
                Call::Read(4096, 4096),
                Call::Read(24576, 4096),
                Call::Write(4096, 24576)
            ]
        );
        let write = node.write(100, filled(10, 2), WriteFlags::default());
        write.await.unwrap();
        assert_eq!(memory.calls(), [Call::Read(0, 4096), Call::Write(0, 4096)]);
    });
    let mut expected = vec![9; 65536];
    expected[5000..25000].fill(1);
    expected[100..110].fill(2);
    assert!(memory.bytes() == expected);
}

#[test]
fn memory_that_the_driver_cannot_use_is_copied() {
    let mut memory = Memory::new(vec![0; 65536]);
    memory.limits.memory_alignment = 512;
    memory.limits.request_alignment = 512;
    run(async {
        let node = node(writable(), &memory);
        let buffer = filled(1024, 3).slice(1..513);
        node.write(512, buffer, WriteFlags::default())
            .await
            .unwrap();
        let whole = Buffer::zeroed(1024);
        node.read(512, whole.slice(3..515)).await.unwrap();
        assert_eq!(whole.to_heap()[3..515], [3; 512]);
    });
    assert_eq!(memory.bytes()[512..1024], [3; 512]);
}

#[test]
fn overlapping_blocks_written_at_once_keep_every_byte() {
    for seed in 0..20 {
        println!("seed {seed}");
        let mut memory = Memory::new(vec![0; 65536]);
        memory.limits.request_alignment = 4096;
        memory.delay = Duration::from_micros(10);
        run(async {
            let node = node(writable(), &memory);
            let mut random = SmallRng::seed_from_u64(seed);
            // Disjoint ranges, cut anywhere: half of their blocks have two writers.
            let mut cuts: Vec<u64> = (0..40).map(|_| random.random_range(0..65536)).collect();
            cuts.extend([0, 8192, 12288, 65536]);
            cuts.sort_unstable();
            let tasks: Vec<_> = cuts
                .windows(2)
                .zip(1..)
                .map(|(ends, tag)| {
                    let (node, start, end) = (Arc::clone(&node), ends[0], ends[1]);
                    let data = filled((end - start) as usize, tag);
                    let wait = random.random_range(0..40);
                    executor::spawn(async move {
                        executor::time::sleep(Duration::from_micros(wait)).await;
                        let write = node.write(start, data, WriteFlags::default());
                        write.await.unwrap();
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            let bytes = memory.bytes();
            for (ends, tag) in cuts.windows(2).zip(1u8..) {
                let written = &bytes[ends[0] as usize..ends[1] as usize];
                assert!(written.iter().all(|byte| *byte == tag), "{ends:?}");
            }
        });
    }
}

#[test]
fn zeroes_that_the_driver_cannot_make_are_written() {
    let memory = Memory::new(vec![9; 4 << 20]);
    run(async {
        let node = node(writable(), &memory);
        let range = ByteRange::new(1000, 3 << 20);
        node.write_zeroes(range, ZeroFlags::default())
            .await
            .unwrap();
        // In bounded pieces.
        assert_eq!(memory.calls().len(), 12);
        let metadata_only = ZeroFlags {
            no_fallback: true,
            ..ZeroFlags::default()
        };
        let refused = node.write_zeroes(range, metadata_only).await;
        assert_eq!(refused, Err(Errno::EOPNOTSUPP));
    });
    let bytes = memory.bytes();
    assert!(bytes[1000..][..3 << 20].iter().all(|byte| *byte == 0));
    assert!(bytes[..1000].iter().all(|byte| *byte == 9));
}

#[test]
fn detected_zeroes_become_metadata() {
    let mut memory = Memory::new(vec![9; 65536]);
    memory.zeroes = true;
    let options = NodeOptions {
        detect_zeroes: DetectZeroes::Unmap,
        ..writable()
    };
    run(async {
        let node = node(options, &memory);
        let flags = WriteFlags::default();
        node.write(0, Buffer::zeroed(4096), flags).await.unwrap();
        node.write(4096, filled(4096, 1), flags).await.unwrap();
        assert_eq!(
            memory.calls(),
            [Call::WriteZeroes(0, 4096), Call::Write(4096, 4096)]
        );
    });
}

#[test]
fn a_forced_write_is_flushed_after_it_is_written() {
    let memory = Memory::new(vec![0; 65536]);
    run(async {
        let node = node(writable(), &memory);
        let fua = WriteFlags {
            fua: true,
            ..WriteFlags::default()
        };
        node.write(0, filled(512, 1), fua).await.unwrap();
        assert_eq!(memory.calls(), [Call::Write(0, 512), Call::Flush]);
        let flags = ZeroFlags {
            fua: true,
            ..ZeroFlags::default()
        };
        let range = ByteRange::new(0, 512);
        node.write_zeroes(range, flags).await.unwrap();
        assert_eq!(memory.calls(), [Call::Write(0, 512), Call::Flush]);
    });
}

#[test]
fn each_write_through_a_root_that_writes_through_is_flushed() {
    let memory = Memory::new(vec![0; 65536]);
    run(async {
        let node = node(writable(), &memory);
        let root = Root::new("", &node, Permissions::READ_WRITE, Permissions::ALL).unwrap();
        root.write_through();
        let handle = root.attach();
        let flags = WriteFlags::default();
        handle.write(0, filled(512, 1), flags).await.unwrap();
        assert_eq!(memory.calls(), [Call::Write(0, 512), Call::Flush]);
        let range = ByteRange::new(0, 4096);
        let zeroed = handle.write_zeroes(range, ZeroFlags::default());
        zeroed.await.unwrap();
        assert_eq!(memory.calls().last(), Some(&Call::Flush));
    });
}

#[test]
fn a_failed_flush_is_final() {
    let memory = Memory::new(vec![0; 4096]);
    run(async {
        let node = node(writable(), &memory);
        node.flush().await.unwrap();
        memory.arrange(Err(Errno::EIO));
        assert_eq!(node.flush().await, Err(Errno::EIO));
        assert_eq!(node.flush().await, Err(Errno::EIO));
        let fua = WriteFlags {
            fua: true,
            ..WriteFlags::default()
        };
        let forced = node.write(0, filled(512, 1), fua);
        assert_eq!(forced.await, Err(Errno::EIO));
        node.write(0, filled(512, 1), WriteFlags::default())
            .await
            .unwrap();
    });
}

#[test]
fn a_flush_in_flight_that_fails_fails_those_that_wait_for_it() {
    let mut memory = Memory::new(vec![0; 4096]);
    memory.delay = Duration::from_micros(10);
    run(async {
        let node = node(writable(), &memory);
        memory.arrange(Err(Errno::EIO));
        let flush = |node: &Arc<Node>| {
            let node = Arc::clone(node);
            executor::spawn(async move { node.flush().await })
        };
        let flushes: Vec<_> = (0..4).map(|_| flush(&node)).collect();
        for flush in flushes {
            assert_eq!(flush.await, Err(Errno::EIO));
        }
    });
}

#[test]
fn flushes_that_wait_share_the_next_one() {
    let mut memory = Memory::new(vec![0; 4096]);
    memory.delay = Duration::from_micros(10);
    run(async {
        let node = node(writable(), &memory);
        let flushes: Vec<_> = (0..10)
            .map(|_| {
                let node = Arc::clone(&node);
                executor::spawn(async move { node.flush().await })
            })
            .collect();
        for flush in flushes {
            flush.await.unwrap();
        }
        assert!(memory.calls().len() <= 2);
    });
}

#[test]
fn a_flush_whose_caller_goes_away_still_tells() {
    let mut memory = Memory::new(vec![0; 4096]);
    memory.delay = Duration::from_micros(10);
    run(async {
        let node = node(writable(), &memory);
        memory.arrange(Err(Errno::EIO));
        let flush = node.flush();
        let gone = executor::time::timeout(Duration::from_micros(1), flush).await;
        assert!(gone.is_none());
        assert_eq!(node.flush().await, Err(Errno::EIO));
    });
}

#[test]
fn options_forbid_what_they_say() {
    let memory = Memory::new(vec![0; 4096]);
    run(async {
        let range = ByteRange::new(0, 512);
        let ignoring = node(NodeOptions::default(), &memory);
        ignoring.discard(range).await.unwrap();
        let unflushed = NodeOptions {
            cache_no_flush: true,
            ..NodeOptions::default()
        };
        node(unflushed, &memory).flush().await.unwrap();
        assert_eq!(memory.calls(), []);
        let options = NodeOptions {
            read_only: true,
            ..writable()
        };
        let fixed = node(options, &memory);
        let write = fixed.write(0, filled(512, 1), WriteFlags::default());
        assert_eq!(write.await, Err(Errno::EPERM));
        assert_eq!(fixed.discard(range).await, Err(Errno::EPERM));
        let zero = fixed.write_zeroes(range, ZeroFlags::default());
        assert_eq!(zero.await, Err(Errno::EPERM));
        assert_eq!(memory.calls(), []);
    });
}

#[test]
fn past_the_end_there_are_zeroes_and_no_room() {
    let memory = Memory::new(vec![9; 1000]);
    run(async {
        let node = node(writable(), &memory);
        let buffer = filled(1000, 5);
        node.read(900, buffer.clone()).await.unwrap();
        let bytes = buffer.to_heap();
        assert!(bytes[..100].iter().all(|byte| *byte == 9));
        assert!(bytes[100..].iter().all(|byte| *byte == 0));
        let far = filled(512, 5);
        node.read(1 << 40, far.clone()).await.unwrap();
        assert!(far.is_zero());
        let flags = WriteFlags::default();
        assert_eq!(
            node.write(900, filled(101, 1), flags).await,
            Err(Errno::EINVAL)
        );
        let wrapped = node.write(u64::MAX - 1, filled(512, 1), flags);
        assert_eq!(wrapped.await, Err(Errno::EINVAL));
        let range = ByteRange::new(u64::MAX - 1, 10);
        assert_eq!(node.discard(range).await, Err(Errno::EINVAL));
    });
    assert!(memory.bytes().iter().all(|byte| *byte == 9));
}

#[test]
fn random_requests_match_a_model_under_any_limits() {
    for seed in 0..50 {
        println!("seed {seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        let mut memory = Memory::new(vec![0; 65536]);
        memory.limits.request_alignment = [1, 512, 4096][random.random_range(0..3)];
        // As with direct I/O: memory is not aligned more than offsets.
        let alignments: [u32; 3] = [1, 16, 512];
        memory.limits.memory_alignment =
            alignments[random.random_range(0..3)].min(memory.limits.request_alignment);
        memory.limits.max_transfer = [0, 4096, 10000][random.random_range(0..3)];
        memory.zeroes = random.random();
        let mut model = vec![0; 65536];
        let node = node(writable(), &memory);
        run(async {
            for _ in 0..60 {
                request(&node, &mut model, &mut random).await;
            }
        });
        assert!(memory.bytes() == model);
    }
}

async fn request(node: &Node, model: &mut [u8], random: &mut SmallRng) {
    let length = random.random_range(0..30000);
    let offset = random.random_range(0..=model.len() - length);
    let span = offset..offset + length;
    let shift = random.random_range(0..20);
    let buffer = Buffer::zeroed(length + shift).slice(shift..length + shift);
    match random.random_range(0..3) {
        0 => {
            random.fill_bytes(&mut model[span.clone()]);
            buffer.copy_from_slice(&model[span]);
            let write = node.write(offset as u64, buffer, WriteFlags::default());
            write.await.unwrap();
        }
        1 => {
            model[span].fill(0);
            let range = ByteRange::new(offset as u64, length as u64);
            let zero = node.write_zeroes(range, ZeroFlags::default());
            zero.await.unwrap();
        }
        _ => {
            node.read(offset as u64, buffer.clone()).await.unwrap();
            assert!(buffer.to_heap()[..] == model[span]);
        }
    }
}
