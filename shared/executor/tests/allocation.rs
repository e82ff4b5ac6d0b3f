//! A warm executor allocates nothing for pooled tasks and file operations.
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(unsafe_code, reason = "a counting allocator")]

use executor::{Buffer, Config, Executor, File, OpenOptions, TaskPool, time};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is done by the system's allocator; counting touches a `Cell` only.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
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

/// One request: a read that the ring serves, another one, and a pause.
async fn request(file: File, buffer: Buffer, offset: u64) {
    file.read_at(buffer.clone(), offset).await.unwrap();
    file.write_at(buffer.clone(), offset).await.unwrap();
    time::yield_now().await;
    file.sync_data().await.unwrap();
}

#[test]
fn a_warm_pool_allocates_nothing() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let options = OpenOptions {
        write: true,
        create: true,
        ..OpenOptions::default()
    };
    let executor = Executor::new(&Config::default()).unwrap();
    executor.block_on(async {
        let file = File::open(&directory.path().join("file"), &options).unwrap();
        file.write_at(Buffer::zeroed(1 << 20), 0).await.unwrap();
        let buffers: Vec<Buffer> = (0..16).map(|_| Buffer::zeroed(4096)).collect();
        let pool = TaskPool::with_capacity(16);
        let mut warm = 0;
        for round in 0..8 {
            for (index, buffer) in (0..).zip(&buffers) {
                pool.spawn(request(file.clone(), buffer.clone(), index * 4096));
            }
            while pool.active() > 0 {
                time::sleep(std::time::Duration::from_micros(50)).await;
            }
            if round == 3 {
                warm = ALLOCATIONS.get();
            }
        }
        // A timer is an entry of a tree, which allocates a node when it was empty: one per sleep.
        let sleeps = ALLOCATIONS.get() - warm;
        let before = ALLOCATIONS.get();
        for (index, buffer) in (0..).zip(&buffers) {
            pool.spawn(request(file.clone(), buffer.clone(), index * 4096));
        }
        while pool.active() > 0 {
            time::yield_now().await;
        }
        assert_eq!(ALLOCATIONS.get(), before, "after {sleeps} in four rounds");
    });
}
