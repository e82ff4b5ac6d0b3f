use super::*;
use crate::file::Fallocate;
use crate::{Buffer, Executor, File, OpenOptions, spawn, time};
use rand::Rng;
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

const PATH: &str = "disk";

fn create() -> OpenOptions {
    OpenOptions {
        write: true,
        create: true,
        ..OpenOptions::default()
    }
}

fn world(seed: u64) -> World {
    let config = Config {
        seed,
        ..Config::default()
    };
    World::new(config)
}

fn bytes(byte: u8, len: usize) -> Buffer {
    let buffer = Buffer::zeroed(len);
    buffer.fill(byte);
    buffer
}

fn cut(prefix: usize, subset: Subset) -> PowerCut {
    PowerCut {
        prefix,
        subset,
        tear: 512,
    }
}

fn disk(image: &Image) -> &[u8] {
    &image[Path::new(PATH)]
}

/// Runs `program` on a fresh executor of `world` with the file open.
fn run<F: Future>(world: &World, program: impl FnOnce(File) -> F) -> F::Output {
    let executor = Executor::simulated(world);
    let file = File::open(Path::new(PATH), &create()).unwrap();
    executor.block_on(program(file))
}

#[test]
fn transfers_are_whole_despite_short_ones() {
    let world = World::new(Config {
        seed: 7,
        max_delay_us: 10,
        short_transfers: true,
    });
    run(&world, |file| async move {
        for round in 0..50u8 {
            let data = bytes(round, 60_000);
            file.write_at(data.clone(), 100).await.unwrap();
            let back = Buffer::zeroed(70_000);
            back.fill(0xff);
            file.read_at(back.clone(), 100).await.unwrap();
            assert_eq!(*back.slice(0..60_000).to_heap(), *data.to_heap());
            assert!(back.slice(60_000..70_000).is_zero());
        }
    });
    assert!(world.op_count() > 110);
    assert_eq!(disk(&world.files()).len(), 60_100);
}

#[test]
fn only_what_a_sync_covers_is_sure_to_survive() {
    let world = world(1);
    let (synced, end) = run(&world, |file| async move {
        file.write_at(bytes(1, 4096), 0).await.unwrap();
        file.sync_data().await.unwrap();
        let synced = world_len(&file);
        file.write_at(bytes(2, 4096), 4096).await.unwrap();
        // Submitted while the write is in flight, so it does not cover it.
        let write = file.write_at(bytes(3, 4096), 8192);
        file.sync_data().await.unwrap();
        write.await.unwrap();
        (synced, world_len(&file))
    });
    assert_eq!((synced, end), (2, 5));
    let before = world.power_cut(&cut(1, Subset::None));
    assert_eq!(disk(&before).len(), 0);
    let first = world.power_cut(&cut(synced, Subset::None));
    assert_eq!(disk(&first), [1; 4096]);
    let last = world.power_cut(&cut(end, Subset::None));
    assert_eq!(disk(&last), [[1; 4096], [2; 4096]].concat());
    let all = world.power_cut(&cut(end, Subset::All));
    assert_eq!(all, world.files());
}

fn world_len(file: &File) -> usize {
    file.sim().world().log_len()
}

#[test]
fn random_cuts_tear_at_sectors_and_keep_what_is_durable() {
    let world = world(2);
    run(&world, |file| async move {
        file.write_at(bytes(1, 8192), 0).await.unwrap();
        file.sync_data().await.unwrap();
        file.write_at(bytes(2, 4096), 2048).await.unwrap();
    });
    let mut torn = false;
    for seed in 0..200 {
        let image = world.power_cut(&cut(3, Subset::Random(seed)));
        let disk = disk(&image);
        assert_eq!(disk.len(), 8192);
        assert!(
            disk[..2048]
                .iter()
                .chain(&disk[6144..])
                .all(|&byte| byte == 1)
        );
        let sectors: Vec<u8> = disk[2048..6144]
            .chunks(512)
            .map(|sector| sector[0])
            .collect();
        for sector in disk[2048..6144].chunks(512) {
            assert!(sector.iter().all(|&byte| byte == sector[0]));
        }
        torn |= sectors.contains(&1) && sectors.contains(&2);
    }
    assert!(torn);
}

#[test]
fn a_failed_sync_is_not_made_good_by_the_next_one() {
    let mut lost = 0;
    for seed in 0..20 {
        let world = world(seed);
        world.inject(Fault {
            op_index: 1,
            errno: Errno::EIO,
            sticky: false,
        });
        run(&world, |file| async move {
            file.write_at(bytes(1, 512), 0).await.unwrap();
            assert_eq!(file.sync_data().await, Err(Errno::EIO));
            file.sync_data().await.unwrap();
        });
        let image = world.power_cut(&cut(usize::MAX, Subset::None));
        lost += u32::from(disk(&image).is_empty());
        assert_eq!(disk(&world.files()), [1; 512]);
    }
    assert!(lost > 0 && lost < 20);
}

#[test]
fn the_nth_operation_fails_and_a_dead_disk_stays_dead() {
    for nth in 0..4 {
        for sticky in [false, true] {
            let world = world(nth);
            world.inject(Fault {
                op_index: nth,
                errno: Errno::ENOSPC,
                sticky,
            });
            let results = run(&world, |file| async move {
                let mut results = Vec::new();
                results.push(file.write_at(bytes(1, 512), 0).await);
                results.push(file.fallocate(Fallocate::Allocate, 0, 4096).await);
                results.push(file.set_len(100).await);
                results.push(file.read_at(bytes(1, 512), 0).await);
                results
            });
            for (index, result) in results.into_iter().enumerate() {
                let fails = index as u64 == nth || (sticky && index as u64 > nth);
                assert_eq!(result.is_err(), fails);
            }
        }
    }
}

/// Order of completion, final time and content of a busy program.
fn busy(seed: u64) -> (Vec<u64>, Duration, Image, Image) {
    let world = World::new(Config {
        seed,
        max_delay_us: 50,
        short_transfers: true,
    });
    let order = Rc::new(RefCell::new(Vec::new()));
    let end = run(&world, |file| {
        let order = Rc::clone(&order);
        async move {
            let task = |index: u64| {
                let (file, order) = (file.clone(), Rc::clone(&order));
                spawn(async move {
                    time::sleep(Duration::from_micros(index % 5)).await;
                    let write = file.write_at(bytes(index as u8, 3000), index * 1000);
                    write.await.unwrap();
                    order.borrow_mut().push(index);
                })
            };
            for task in (0..40).map(task).collect::<Vec<_>>() {
                task.await;
            }
            time::now()
        }
    });
    let image = world.power_cut(&cut(25, Subset::Random(seed)));
    (order.take(), end, world.files(), image)
}

#[test]
fn the_seed_decides_everything() {
    assert_eq!(busy(11), busy(11));
    assert_ne!(busy(11).0, busy(12).0);
}

#[test]
fn a_restarted_world_equals_the_image_of_the_cut() {
    let seed = SmallRng::from_os_rng().random();
    eprintln!("seed {seed}");
    let world = world(seed);
    run(&world, |file| async move {
        for index in 0..30u64 {
            let write = file.write_at(bytes(index as u8, 5000), index * 777);
            if index % 3 == 0 {
                write.await.unwrap();
            } else {
                drop(write);
            }
            if index % 7 == 0 {
                file.sync_data().await.unwrap();
            }
            if index % 11 == 0 {
                let punch = file.fallocate(Fallocate::PunchHole, index * 100, 6000);
                punch.await.unwrap();
            }
        }
    });
    let forward: Vec<Image> = (0..=world.log_len())
        .map(|prefix| world.power_cut(&cut(prefix, Subset::Random(seed))))
        .collect();
    for prefix in (0..=world.log_len()).rev() {
        let cut = cut(prefix, Subset::Random(seed));
        assert_eq!(
            world.restart(&cut, Config::default()).files(),
            forward[prefix]
        );
    }
}

#[test]
#[should_panic(expected = "deadlock: ")]
fn a_hang_is_a_panic() {
    run(&world(0), |_| std::future::pending::<()>());
}

#[test]
fn virtual_time_costs_none() {
    let start = std::time::Instant::now();
    run(&world(0), |_| async {
        time::sleep(Duration::from_secs(1_000_000)).await;
        assert!(time::now() >= Duration::from_secs(1_000_000));
    });
    assert!(start.elapsed() < Duration::from_secs(1000));
}

#[test]
fn holes_and_data_are_told_apart() {
    let world = world(0);
    run(&world, |file| async move {
        file.set_len(1 << 40).await.unwrap();
        file.write_at(bytes(1, 4096), 1 << 30).await.unwrap();
        let data = (1 << 30, (1 << 30) + 4096);
        assert_eq!(file.next_data(0).unwrap(), Some(data));
        assert_eq!(file.next_data(data.1).unwrap(), None);
    });
}
