//! What the executor's building blocks cost on this machine, in nanoseconds.
//!
//! `cargo run --release -p executor --example cost [DIRECTORY ON A DISK]`
#![expect(clippy::unwrap_used, reason = "a measuring tool")]

use executor::runtime::register_poller;
use executor::sim::{self, Image, PowerCut, Subset, World};
use executor::sync::{Mutex, RangeLock};
use executor::{Buffer, Config, Executor, File, OpenOptions, Poller, TaskPool, net, spawn, time};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::Pid;
use std::cell::Cell;
use std::os::fd::AsFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const FILE_LEN: u64 = 64 << 20;
const BLOCK: usize = 4096;

/// Runs `step` for a while; nanoseconds of wall clock and of CPU per call.
async fn measure(name: &str, per_call: u64, mut step: impl AsyncFnMut()) {
    let limit = Duration::from_millis(300);
    let (start, cpu) = (Instant::now(), cpu_time());
    let mut calls = 0;
    while start.elapsed() < limit {
        for _ in 0..16 {
            step().await;
        }
        calls += 16 * per_call;
    }
    let wall = start.elapsed().as_nanos() as f64 / calls as f64;
    let cpu = (cpu_time() - cpu).as_nanos() as f64 / calls as f64;
    println!("{name:<40} {wall:>9.1} ns  {cpu:>8.1} ns CPU");
}

fn cpu_time() -> Duration {
    let usage = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID);
    Duration::from(usage.unwrap())
}

/// A cheap sequence of block offsets.
struct Offsets(Cell<u64>);

impl Offsets {
    fn next(&self) -> u64 {
        let next = self
            .0
            .get()
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        self.0.set(next);
        (next >> 33) % (FILE_LEN / BLOCK as u64) * BLOCK as u64
    }
}

/// A queue in which there is never anything.
struct Idle;

impl Poller for Idle {
    fn poll(&self) -> bool {
        false
    }
    fn arm(&self) -> bool {
        false
    }
    fn disarm(&self) {}
}

async fn make(path: &Path) {
    let options = OpenOptions {
        write: true,
        create: true,
        ..OpenOptions::default()
    };
    let file = File::open(path, &options).unwrap();
    let data = Buffer::zeroed(1 << 20);
    data.fill(0x5a);
    for offset in (0..FILE_LEN).step_by(1 << 20) {
        file.write_at(data.clone(), offset).await.unwrap();
    }
    file.sync_data().await.unwrap();
}

async fn reads(name: &str, file: &File, depth: u64) {
    let offsets = Rc::new(Offsets(Cell::new(depth)));
    if depth == 1 {
        let buffer = Buffer::zeroed(BLOCK);
        measure(name, 1, async || {
            file.read_at(buffer.clone(), offsets.next()).await.unwrap();
        })
        .await;
        return;
    }
    measure(name, depth * 8, async || {
        let tasks: Vec<_> = (0..depth)
            .map(|_| {
                let (file, offsets) = (file.clone(), Rc::clone(&offsets));
                spawn(async move {
                    let buffer = Buffer::zeroed(BLOCK);
                    for _ in 0..8 {
                        file.read_at(buffer.clone(), offsets.next()).await.unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
    })
    .await;
}

async fn files(directory: &Path, label: &str) {
    let path = directory.join(format!("executor-cost-{}", std::process::id()));
    make(&path).await;
    let cached = File::open(&path, &OpenOptions::default()).unwrap();
    for depth in [1, 32] {
        reads(
            &format!("{label} cached read, depth {depth}"),
            &cached,
            depth,
        )
        .await;
    }
    let options = OpenOptions {
        direct: true,
        ..OpenOptions::default()
    };
    match File::open(&path, &options) {
        Ok(_) if label == "tmpfs" => {}
        Ok(direct) => {
            for depth in [1, 4, 32, 128] {
                let name = format!("{label} O_DIRECT read, depth {depth}");
                reads(&name, &direct, depth).await;
                let poller = register_poller(Rc::new(Idle));
                reads(&format!("{name}, polling"), &direct, depth).await;
                drop(poller);
            }
        }
        Err(error) => println!("{label} O_DIRECT: skipped, {error}"),
    }
    std::fs::remove_file(path).unwrap();
}

async fn blocks() {
    let ready = EventFd::from_value(1).unwrap();
    measure("ring operation, one at a time", 1, async || {
        net::poll_fd(ready.as_fd(), 1).await.unwrap();
    })
    .await;
    measure("ring operation, batches of 32", 32, async || {
        let ready = &ready;
        let mut polls: Vec<_> = (0..32)
            .map(|_| Box::pin(net::poll_fd(ready.as_fd(), 1)))
            .collect();
        std::future::poll_fn(|context| {
            polls.retain_mut(|poll| poll.as_mut().poll(context).is_pending());
            if polls.is_empty() {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        })
        .await;
    })
    .await;
    measure("task switch (yield_now)", 1, time::yield_now).await;
    measure("spawn and join", 1, async || spawn(async {}).await).await;
    let pool = TaskPool::with_capacity(32);
    measure("TaskPool, ready at once", 1, async || {
        pool.spawn(std::future::ready(()));
    })
    .await;
    let pool = TaskPool::with_capacity(32);
    measure("TaskPool, one wake", 32, async || {
        for _ in 0..32 {
            pool.spawn(time::yield_now());
        }
        time::yield_now().await;
        time::yield_now().await;
    })
    .await;
    let (mutex, ranges) = (Mutex::new(()), RangeLock::new());
    measure("mutex", 1, async || drop(mutex.lock().await)).await;
    measure("range lock", 1, async || drop(ranges.lock(0..4096).await)).await;
    let zeroes = Buffer::zeroed(65536);
    measure("64 KiB is_zero", 1, async || assert!(zeroes.is_zero())).await;
}

fn calls() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let executor = Executor::new(&Config::default()).unwrap();
        sender.send(executor.handle()).unwrap();
        executor.run();
    });
    let handle = receiver.recv().unwrap();
    let executor = Executor::new(&Config::default()).unwrap();
    executor.block_on(measure("call of another thread", 1, async || {
        handle.call(|| async {}).await.unwrap();
    }));
    handle.stop();
    thread.join().unwrap();
}

/// A queue of one request, as a guest has it: a counter to watch, and an eventfd for when nobody
/// does.
struct Mailbox {
    asked: AtomicU64,
    answered: AtomicU64,
    armed: AtomicBool,
    kick: EventFd,
}

impl Mailbox {
    fn take(&self) -> bool {
        let asked = self.asked.load(Ordering::Acquire);
        self.answered.swap(asked, Ordering::AcqRel) != asked
    }
}

struct Served(Arc<Mailbox>);

impl Poller for Served {
    fn poll(&self) -> bool {
        self.0.take()
    }
    fn arm(&self) -> bool {
        self.0.armed.store(true, Ordering::SeqCst);
        self.0.asked.load(Ordering::SeqCst) != self.0.answered.load(Ordering::SeqCst)
    }
    fn disarm(&self) {
        self.0.armed.store(false, Ordering::SeqCst);
    }
}

/// Keeps the thread on one processor: the scheduler likes to put both ends on the same.
fn pin(processor: usize) {
    let mut set = CpuSet::new();
    set.set(processor).unwrap();
    // A machine with one processor measures without.
    let _ = sched_setaffinity(Pid::from_raw(0), &set);
}

/// Answer times of a polling thread to one that asks `pause` after each answer.
fn ping_pong(pause: Duration) {
    let mailbox = Arc::new(Mailbox {
        asked: AtomicU64::new(0),
        answered: AtomicU64::new(0),
        armed: AtomicBool::new(false),
        kick: EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap(),
    });
    let (sender, receiver) = std::sync::mpsc::channel();
    let served = Arc::clone(&mailbox);
    let thread = std::thread::spawn(move || {
        pin(1);
        let executor = Executor::new(&Config::default()).unwrap();
        sender.send(executor.handle()).unwrap();
        let kicked = Arc::clone(&served);
        executor.block_on(async {
            let task = spawn(async move {
                loop {
                    net::poll_fd(kicked.kick.as_fd(), libc::POLLIN)
                        .await
                        .unwrap();
                    kicked.kick.read().unwrap();
                }
            });
            drop(task);
        });
        let _registration = executor.block_on(async { register_poller(Rc::new(Served(served))) });
        executor.run();
        cpu_time()
    });
    let handle = receiver.recv().unwrap();
    pin(0);
    let rounds = 2000;
    let mut times = Vec::new();
    for round in 1..=rounds {
        let start = Instant::now();
        mailbox.asked.store(round, Ordering::SeqCst);
        if mailbox.armed.swap(false, Ordering::SeqCst) {
            mailbox.kick.write(1).unwrap();
        }
        while mailbox.answered.load(Ordering::Acquire) != round {
            std::hint::spin_loop();
        }
        times.push(start.elapsed());
        let answered = Instant::now();
        while answered.elapsed() < pause {
            std::hint::spin_loop();
        }
    }
    handle.stop();
    let cpu = thread.join().unwrap();
    times.sort();
    let (median, slow) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    let name = format!("answer to a request every {pause:?}");
    println!(
        "{name:<40} {median:>9.1?}, p99 {slow:.1?}, CPU {:.1?} each",
        cpu / rounds as u32
    );
}

/// What a crash test pays: a world of 4 MiB, cut at every point, brought up and read a bit.
fn crash_points() {
    let path = Path::new("disk");
    let image = Image::from([(path.to_path_buf(), vec![0x5a; 4 << 20])]);
    let world = World::with_files(sim::Config::default(), image);
    let options = OpenOptions {
        write: true,
        ..OpenOptions::default()
    };
    let executor = Executor::simulated(&world);
    let file = File::open(path, &options).unwrap();
    executor.block_on(async {
        for index in 0..5000u64 {
            let offset = index * 7 % 1000 * BLOCK as u64;
            file.write_at(Buffer::zeroed(BLOCK), offset).await.unwrap();
            if index.is_multiple_of(20) {
                file.sync_data().await.unwrap();
            }
        }
    });
    drop(executor);
    let start = Instant::now();
    let points = world.log_len();
    for prefix in 0..points {
        let subset = Subset::Random(prefix as u64);
        let cut = PowerCut {
            prefix,
            subset,
            tear: 512,
        };
        let after = world.restart(&cut, sim::Config::default());
        let executor = Executor::simulated(&after);
        let file = File::open(path, &options).unwrap();
        let read = executor.block_on(file.read_at(Buffer::zeroed(65536), 0));
        read.unwrap();
    }
    let each = start.elapsed().as_micros() as f64 / points as f64;
    println!("{:<40} {each:>9.1} us", "crash point of 4 MiB");
}

fn main() {
    let directory = std::env::args().nth(1).unwrap_or_else(|| ".".into());
    let executor = Executor::new(&Config::default()).unwrap();
    executor.block_on(async {
        blocks().await;
        files(Path::new("/dev/shm"), "tmpfs").await;
        files(Path::new(&directory), "disk").await;
    });
    calls();
    for pause_us in [0, 10, 20, 50, 200] {
        ping_pong(Duration::from_micros(pause_us));
    }
    crash_points();
}
