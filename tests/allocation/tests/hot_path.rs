//! A request that is served from one plain, mapped extent allocates nothing, all the way from the
//! guest's ring to the file and back: export, root, node, format, file, executor.
//!
//! ```text
//!   test thread: the harness's front-end ── vhost-user, shared memory ──┐
//!   control thread: an engine, as in the daemon                         │
//!   iothread: its allocations are counted <── the ring ─────────────────┘
//! ```
#![expect(unsafe_code, reason = "a counting allocator")]
#![expect(clippy::unwrap_used, reason = "a test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use engine::{Engine, EngineOptions, NamePolicy};
use executor::sync::Notify;
use executor::{Config, Executor, Handle};
use harness::driver::{Endpoint, FrontEnd, Operation, Options, Queue, Request, SectorRange};
use qmp::{Arguments, Value, Version, json};

/// Requests in flight.
const DEPTH: usize = 16;
/// Blocks of 4 KiB on the disk.
const BLOCKS: u64 = 256;
const BLOCK: usize = 4096;
const SECTORS: u64 = 8;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: everything is done by the system's allocator; counting touches an atomic and a `Cell`.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTED.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A daemon's engine on a thread of its own, with one export on one iothread.
struct Daemon {
    control: Option<JoinHandle<()>>,
    stop: Arc<Notify>,
    iothread: Handle,
}

impl Daemon {
    fn start(node: Value, socket: &Path) -> Daemon {
        let (sender, started) = mpsc::channel();
        let stop = Arc::new(Notify::new());
        let (stopped, socket) = (stop.clone(), socket.to_owned());
        let control = std::thread::spawn(move || {
            let executor = Executor::new(&Config::default()).unwrap();
            executor.block_on(async {
                let ended = stopped.notified();
                let engine = Engine::new(EngineOptions {
                    name_policy: NamePolicy::default(),
                    redo_dir: None,
                    fds: Default::default(),
                    version: Version::announced("test"),
                    chardevs: Default::default(),
                });
                let export = json!({"type": "vhost-user-blk", "id": "e", "node-name": "n",
                    "iothread": "io", "writable": true,
                    "addr": {"type": "unix", "path": socket}});
                let iothread = json!({"qom-type": "iothread", "id": "io"});
                let commands = [
                    ("object-add", iothread),
                    ("blockdev-add", node),
                    ("block-export-add", export),
                ];
                for (name, arguments) in commands {
                    let Value::Object(members) = arguments else {
                        unreachable!("arguments are objects")
                    };
                    let result = engine.run(name, Arguments::from_json(members)).await;
                    result.unwrap_or_else(|error| panic!("{name}: {}", error.desc));
                }
                sender.send(engine.thread_handles()).unwrap();
                ended.await;
                engine.shut_down().await.unwrap();
            });
        });
        let own = |handle: &Handle| !handle.is_current();
        let handles: Vec<Handle> = started.recv().unwrap();
        let iothread = handles.into_iter().rfind(own).unwrap();
        Daemon {
            control: Some(control),
            stop,
            iothread,
        }
    }

    /// Counts the allocations of the iothread from now on; waits until it does.
    fn count(&self) {
        let (sender, counting) = mpsc::channel();
        assert!(self.iothread.spawn(move || async move {
            COUNTED.set(true);
            sender.send(()).unwrap();
        }));
        counting.recv().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.notify_all();
        let ended = self.control.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().unwrap();
        }
    }
}

/// Reads and writes every block, with `DEPTH` requests in flight.
fn round(queue: &mut Queue) {
    let data = vec![0x5a; BLOCK];
    let mut issue = (0..BLOCKS)
        .flat_map(|block| [Operation::Write, Operation::Read].map(|operation| (operation, block)));
    let mut left = 2 * BLOCKS;
    while left > 0 {
        while queue.outstanding() < DEPTH
            && let Some((operation, block)) = issue.next()
        {
            let range = SectorRange::new(block * SECTORS, SECTORS);
            let bytes: &[u8] = match operation {
                Operation::Write => &data,
                _ => &[],
            };
            let request = Request::contiguous(operation, range);
            queue.submit(request, bytes, block).unwrap();
        }
        queue.completion().unwrap().ok().unwrap();
        left -= 1;
    }
}

/// Allocations of the iothread for 512 requests, once warm.
fn allocations(node: Value, directory: &Path) -> u64 {
    let socket = directory.join("socket");
    let daemon = Daemon::start(node, &socket);
    let options = Options {
        queues: 1,
        depth: DEPTH,
        ..Options::default()
    };
    let (mut front_end, mut queues) =
        FrontEnd::connect(Endpoint::Connect(socket.clone()), options).unwrap();
    round(&mut queues[0]);
    round(&mut queues[0]);
    daemon.count();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    round(&mut queues[0]);
    let after = ALLOCATIONS.load(Ordering::Relaxed);
    // What is no plain extent does allocate: the counter counts.
    let clear = Request::clear(Operation::WriteZeroes, SectorRange::new(0, SECTORS));
    queues[0].run(clear, &[]).unwrap().ok().unwrap();
    assert!(ALLOCATIONS.load(Ordering::Relaxed) > after);
    front_end.disconnect();
    drop(daemon);
    std::fs::remove_file(&socket).ok();
    after - before
}

/// One test, so that no other thread's iothread is counted.
#[test]
fn requests_through_the_export_allocate_nothing() {
    let null = json!({"driver": "null-co", "node-name": "n", "size": BLOCKS * BLOCK as u64});
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    assert_eq!(allocations(null, directory.path()), 0, "null-co");
    for (place, direct) in [("/dev/shm", false), (env!("CARGO_TARGET_TMPDIR"), true)] {
        for format in ["raw", "qcow2"] {
            let directory = tempfile::tempdir_in(place).unwrap();
            let image = directory.path().join("image");
            harness::peer::create(format, &image, BLOCKS * BLOCK as u64, "").unwrap();
            let node = json!({"driver": format, "node-name": "n",
                "file": {"driver": "file", "filename": image, "cache": {"direct": direct}}});
            let count = allocations(node, directory.path());
            assert_eq!(count, 0, "{format} in {place}");
        }
    }
}
