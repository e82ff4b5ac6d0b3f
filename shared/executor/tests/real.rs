//! The executor on the real kernel.
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(
    unsafe_code,
    reason = "scattered buffers name their memory by pointers"
)]

use executor::buffer::IoVecs;
use executor::file::Fallocate;
use executor::runtime::{PollerRegistration, register_poller};
use executor::sync::{Mutex, Notify, RangeLock, Semaphore};
use executor::{
    Buffer, BufferedWrites, Config, Executor, File, Handle, OpenOptions, Poller, spawn, time,
};
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

fn real() -> Executor {
    Executor::new(&Config::default()).unwrap()
}

fn create() -> OpenOptions {
    OpenOptions {
        write: true,
        create: true,
        ..OpenOptions::default()
    }
}

/// A directory on tmpfs, and one on the disk.
fn directories() -> [tempfile::TempDir; 2] {
    [
        tempfile::tempdir_in("/dev/shm").unwrap(),
        tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
    ]
}

fn pattern(len: usize, seed: u8) -> Buffer {
    let bytes: Vec<u8> = (0..len).map(|at| (at / 7) as u8 ^ seed).collect();
    Buffer::from(&bytes[..])
}

async fn round_trip(file: &File) {
    let data = pattern(65536, 3);
    file.write_at(data.clone(), 8192).await.unwrap();
    assert_eq!(file.len().unwrap(), 8192 + 65536);
    let back = Buffer::zeroed(65536);
    file.read_at(back.clone(), 8192).await.unwrap();
    assert_eq!(*back.to_heap(), *data.to_heap());
    file.sync_data().await.unwrap();
    // Past the end, and across it.
    back.fill(0xee);
    file.read_at(back.clone(), 8192 + 32768).await.unwrap();
    assert_eq!(
        *back.slice(0..32768).to_heap(),
        *data.slice(32768..65536).to_heap()
    );
    assert!(back.slice(32768..65536).is_zero());
    back.fill(0xee);
    file.read_at(back.clone(), 1 << 40).await.unwrap();
    assert!(back.is_zero());
    match file.fallocate(Fallocate::PunchHole, 8192, 4096).await {
        Ok(()) => {
            file.read_at(back.slice(0..4096), 8192).await.unwrap();
            assert!(back.slice(0..4096).is_zero());
        }
        Err(errno) => assert_eq!(errno, executor::Errno::EOPNOTSUPP),
    }
    file.set_len(10000).await.unwrap();
    assert_eq!(file.len().unwrap(), 10000);
    back.fill(0xee);
    file.read_at(back.slice(0..8192), 8192).await.unwrap();
    assert!(back.slice(10000 - 8192..8192).is_zero());
}

#[test]
fn files_of_every_kind_keep_what_is_written() {
    let executor = real();
    for directory in directories() {
        let path = directory.path().join("file");
        executor.block_on(async {
            round_trip(&File::open(&path, &create()).unwrap()).await;
            let direct = OpenOptions {
                direct: true,
                truncate: true,
                ..create()
            };
            match File::open(&path, &direct) {
                Ok(file) => round_trip(&file).await,
                Err(error) => eprintln!("skipped O_DIRECT on {}: {error}", path.display()),
            }
        });
    }
}

#[test]
fn an_executor_that_writes_in_place_has_written_when_the_call_returns() {
    let config = Config {
        buffered_writes: BufferedWrites::InPlace,
        ..Config::default()
    };
    for directory in directories() {
        let path = directory.path().join("file");
        Executor::new(&config).unwrap().block_on(async {
            let file = File::open(&path, &create()).unwrap();
            let write = file.write_at(pattern(1 << 20, 5), 4096);
            assert_eq!(write.result(), Some(Ok(())));
            let written = std::fs::read(&path).unwrap();
            assert_eq!(written[4096..], *pattern(1 << 20, 5).to_heap());
            round_trip(&File::open(&directory.path().join("other"), &create()).unwrap()).await;
        });
    }
}

#[test]
fn operations_beyond_the_queue_sizes_all_finish() {
    let config = Config {
        ring_entries: 4,
        ..Config::default()
    };
    let executor = Executor::new(&config).unwrap();
    let directory = &directories()[1];
    let file = executor
        .block_on(async { File::open(&directory.path().join("file"), &create()) })
        .unwrap();
    executor.block_on(async {
        let writes: Vec<_> = (0..500u64)
            .map(|at| file.write_at(pattern(4096, at as u8), at * 4096))
            .collect();
        for write in writes {
            write.await.unwrap();
        }
        for at in 0..500u64 {
            let back = Buffer::zeroed(4096);
            file.read_at(back.clone(), at * 4096).await.unwrap();
            assert_eq!(*back.to_heap(), *pattern(4096, at as u8).to_heap());
        }
    });
}

#[test]
fn a_dropped_write_still_reaches_the_file() {
    let directory = &directories()[1];
    let path = directory.path().join("file");
    {
        let executor = real();
        executor.block_on(async {
            let file = File::open(&path, &create()).unwrap();
            drop(file.write_at(pattern(1 << 20, 9), 0));
        });
    }
    assert_eq!(std::fs::read(path).unwrap(), *pattern(1 << 20, 9).to_heap());
}

#[test]
fn dropped_operations_are_waited_for() {
    let [_, disk] = directories();
    real().block_on(async {
        let called = Rc::new(Cell::new(false));
        let caller = |called: &Rc<Cell<bool>>| {
            let called = Rc::clone(called);
            move || called.set(true)
        };
        executor::after_abandoned(caller(&called));
        assert!(called.take(), "nothing is in flight");
        let file = File::open(&disk.path().join("file"), &create()).unwrap();
        let sync = file.sync_data();
        drop(sync);
        executor::after_abandoned(caller(&called));
        assert!(!called.get(), "the kernel has not been asked yet");
        while !called.get() {
            time::sleep(Duration::from_micros(100)).await;
        }
    });
}

#[test]
fn other_threads_wake_spawn_and_call() {
    let executor = real();
    let handle = executor.handle();
    let thread = std::thread::spawn(move || {
        let local = real();
        for round in 0..1000u32 {
            let answer = local.block_on(handle.call(move || async move { round + 1 }));
            assert_eq!(answer, Some(round + 1));
        }
        assert!(!handle.is_current());
        assert!(handle.spawn(|| async { Handle::current().stop() }));
        handle
    });
    executor.run();
    drop(executor);
    let handle = thread.join().unwrap();
    assert!(!handle.spawn(|| async {}));
    let local = real();
    assert_eq!(local.block_on(handle.call(|| async { 1 })), None);
}

#[test]
fn timers_fire_in_order_of_their_deadlines() {
    let executor = real();
    let order = Rc::new(RefCell::new(Vec::new()));
    executor.block_on(async {
        let mut tasks = Vec::new();
        for ms in [30u64, 10, 20] {
            let order = Rc::clone(&order);
            tasks.push(spawn(async move {
                time::sleep(Duration::from_millis(ms)).await;
                order.borrow_mut().push(ms);
            }));
        }
        for task in tasks {
            task.await;
        }
        let never = std::future::pending::<()>();
        assert!(
            time::timeout(Duration::from_millis(1), never)
                .await
                .is_none()
        );
        assert_eq!(
            time::timeout(Duration::from_secs(60), async { 5 }).await,
            Some(5)
        );
    });
    assert_eq!(*order.borrow(), [10, 20, 30]);
}

#[test]
fn locks_exclude_across_threads() {
    let count = Mutex::new(0u64);
    let ranges = RangeLock::new();
    let permits = Semaphore::new(2);
    let plain = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let executor = real();
                executor.block_on(async {
                    for _ in 0..2000 {
                        let mut guard = count.lock().await;
                        time::yield_now().await;
                        *guard += 1;
                        drop(guard);
                        let _range = ranges.lock(10..20).await;
                        let _permit = permits.acquire().await;
                        let seen = plain.load(std::sync::atomic::Ordering::Relaxed);
                        time::yield_now().await;
                        plain.store(seen + 1, std::sync::atomic::Ordering::Relaxed);
                    }
                });
            });
        }
    });
    assert_eq!(count.into_inner(), 6000);
    assert_eq!(plain.into_inner(), 6000);
}

struct Counter {
    polls: Cell<u64>,
    arms: Cell<u64>,
    disarms: Cell<u64>,
    work: Cell<bool>,
    notify: Notify,
}

impl Poller for Counter {
    fn poll(&self) -> bool {
        self.polls.set(self.polls.get() + 1);
        if self.work.replace(false) {
            self.notify.notify_all();
            return true;
        }
        false
    }
    fn arm(&self) -> bool {
        self.arms.set(self.arms.get() + 1);
        false
    }
    fn disarm(&self) {
        self.disarms.set(self.disarms.get() + 1);
    }
}

#[test]
fn pollers_are_spun_armed_and_disarmed() {
    let executor = real();
    let counter = Rc::new(Counter {
        polls: Cell::new(0),
        arms: Cell::new(0),
        disarms: Cell::new(0),
        work: Cell::new(true),
        notify: Notify::new(),
    });
    executor.block_on(async {
        let registration: PollerRegistration =
            register_poller(Rc::clone(&counter) as Rc<dyn Poller>);
        counter.notify.notified().await;
        time::sleep(Duration::from_millis(2)).await;
        drop(registration);
        let polls = counter.polls.get();
        time::sleep(Duration::from_millis(1)).await;
        assert_eq!(counter.polls.get(), polls);
    });
    assert!(counter.polls.get() > 1);
    assert!(counter.arms.get() > 0);
    assert_eq!(counter.arms.get(), counter.disarms.get());
}

/// Readies a task in `arm` without telling.
struct Late(Notify, Cell<bool>);

impl Poller for Late {
    fn poll(&self) -> bool {
        false
    }
    fn arm(&self) -> bool {
        if self.1.replace(false) {
            self.0.notify_all();
        }
        false
    }
    fn disarm(&self) {}
}

#[test]
fn a_task_that_arming_readies_is_run_before_sleeping() {
    let executor = real();
    executor.block_on(async {
        let late = Rc::new(Late(Notify::new(), Cell::new(false)));
        let _registration = register_poller(Rc::clone(&late) as Rc<dyn Poller>);
        for _ in 0..100 {
            let waiter = Rc::clone(&late);
            let task = spawn(async move { waiter.0.notified().await });
            time::yield_now().await;
            late.1.set(true);
            let woken = time::timeout(Duration::from_secs(60), task).await;
            assert!(woken.is_some());
        }
    });
}

#[test]
fn turns_run_everything_when_the_descriptor_says_so() {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let executor = real();
    let handle = executor.handle();
    let directory = &directories()[1];
    let path = directory.path().join("file");
    executor.turn().unwrap();
    assert!(handle.spawn({
        let path = path.clone();
        move || async move {
            let file = File::open(&path, &create()).unwrap();
            file.write_at(Buffer::zeroed(4096), 0).await.unwrap();
            file.sync_data().await.unwrap();
        }
    }));
    let task = handle.clone();
    std::thread::spawn(move || {
        task.spawn(|| async { time::sleep(Duration::from_millis(5)).await })
    });
    let file_len = || std::fs::metadata(Path::new(&path)).map_or(0, |data| data.len());
    while file_len() == 0 {
        let mut fds = [PollFd::new(executor.fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(5000u16)).unwrap();
        executor.turn().unwrap();
    }
}

#[test]
fn memory_of_dropped_reads_is_not_reused_too_early() {
    let directory = &directories()[1];
    let path = directory.path().join("file");
    let executor = real();
    executor.block_on(async {
        let file = File::open(&path, &create()).unwrap();
        file.write_at(pattern(1 << 20, 1), 0).await.unwrap();
        file.sync_data().await.unwrap();
        let options = OpenOptions {
            direct: true,
            ..OpenOptions::default()
        };
        let Ok(file) = File::open(&path, &options) else {
            eprintln!("skipped: no O_DIRECT here");
            return;
        };
        for round in 0..50u64 {
            let mut kept = Vec::new();
            for at in 0..16u64 {
                // Dropped with its buffer while the device still writes to the memory.
                drop(file.read_at(Buffer::zeroed(16384), (round + at) % 64 * 16384));
                let fresh = Buffer::zeroed(16384);
                fresh.fill(0xa5);
                kept.push(fresh);
            }
            file.read_at(Buffer::zeroed(4096), 0).await.unwrap();
            for fresh in kept {
                assert!(fresh.to_heap().iter().all(|&byte| byte == 0xa5));
            }
        }
    });
}

#[test]
fn scattered_buffers_of_thousands_of_pieces_are_transferred_whole() {
    let executor = real();
    for directory in directories() {
        executor.block_on(async {
            let file = File::open(&directory.path().join("file"), &create()).unwrap();
            let memory = Buffer::zeroed(3000 * 64);
            let mut iovecs = IoVecs::new();
            memory.for_each_piece(|base, _| {
                for piece in 0..3000 {
                    // Every other half line, so that no two pieces touch.
                    // SAFETY: within `memory`, which is the owner.
                    unsafe { iovecs.push(base.add(piece * 64), 32) };
                }
            });
            iovecs.set_owner(Rc::new(memory.clone()));
            let scattered = Buffer::from_iovecs(Rc::new(iovecs));
            let data = pattern(3000 * 32, 5);
            scattered.copy_from(&data);
            file.write_at(scattered.clone(), 77).await.unwrap();
            memory.fill(0);
            file.read_at(scattered.clone(), 77).await.unwrap();
            assert_eq!(*scattered.to_heap(), *data.to_heap());
            let part = scattered.slice(33..90_001);
            memory.fill(0);
            file.read_at(part.clone(), 77 + 33).await.unwrap();
            assert_eq!(*part.to_heap(), data.to_heap()[33..90_001]);
            assert!(scattered.slice(0..33).is_zero());
        });
    }
}

#[test]
fn a_cancelled_task_is_dropped_and_others_go_on() {
    struct OnDrop(Rc<Cell<bool>>);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.set(true);
        }
    }
    let executor = real();
    let dropped = Rc::new(Cell::new(false));
    executor.block_on(async {
        let guard = OnDrop(Rc::clone(&dropped));
        let task = spawn(async move {
            let _guard = guard;
            std::future::pending::<()>().await;
        });
        time::yield_now().await;
        task.cancel();
        time::yield_now().await;
        assert!(dropped.get());
        assert_eq!(spawn(async { 7 }).await, 7);
    });
    // Tasks that are left when the executor goes are dropped, too.
    dropped.set(false);
    let guard = OnDrop(Rc::clone(&dropped));
    executor.block_on(async {
        spawn(async move {
            let _guard = guard;
            time::sleep(Duration::from_secs(3600)).await;
        });
        time::yield_now().await;
    });
    drop(executor);
    assert!(dropped.get());
}

#[test]
fn a_panic_of_a_task_leaves_through_block_on() {
    let executor = real();
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        executor.block_on(async {
            spawn(async { panic!("the task's own words") });
            std::future::pending::<()>().await;
        });
    }));
    let words = panic.unwrap_err();
    assert_eq!(words.downcast_ref(), Some(&"the task's own words"));
    assert_eq!(executor.block_on(async { spawn(async { 3 }).await }), 3);
}

#[test]
fn executors_of_one_thread_keep_apart() {
    let (first, second) = (real(), real());
    let handle = first.handle();
    assert_ne!(handle.index(), second.handle().index());
    let inner = first.block_on(async {
        assert!(handle.is_current());
        let inside = second.block_on(async {
            assert!(!handle.is_current());
            spawn(async { 1 }).await
        });
        assert!(handle.is_current());
        inside + spawn(async { 1 }).await
    });
    assert_eq!(inner, 2);
}

#[test]
fn wakes_from_many_threads_are_not_lost() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    let executor = real();
    let turn = Arc::new((AtomicU32::new(0), Notify::new()));
    let threads: Vec<_> = (0..2u32)
        .map(|me| {
            let turn = Arc::clone(&turn);
            std::thread::spawn(move || {
                let executor = real();
                executor.block_on(async {
                    for _ in 0..2000 {
                        loop {
                            let changed = turn.1.notified();
                            if turn.0.load(Ordering::SeqCst) % 3 == me {
                                break;
                            }
                            changed.await;
                        }
                        turn.0.fetch_add(1, Ordering::SeqCst);
                        turn.1.notify_all();
                    }
                });
            })
        })
        .collect();
    executor.block_on(async {
        for _ in 0..2000 {
            loop {
                let changed = turn.1.notified();
                if turn.0.load(Ordering::SeqCst) % 3 == 2 {
                    break;
                }
                changed.await;
            }
            turn.0.fetch_add(1, Ordering::SeqCst);
            turn.1.notify_all();
        }
    });
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(turn.0.load(Ordering::SeqCst), 6000);
}

#[test]
fn what_threads_share_is_send_and_sync() {
    fn shared<T: Send + Sync>() {}
    shared::<File>();
    shared::<Handle>();
    shared::<Mutex<u64>>();
    shared::<RangeLock>();
    shared::<Semaphore>();
    shared::<Notify>();
    shared::<executor::sim::World>();
}
