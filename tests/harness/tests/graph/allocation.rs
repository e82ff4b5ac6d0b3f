//! The hot path allocates nothing. Counts what every test of this binary allocates.
#![expect(unsafe_code, reason = "a counting allocator")]

use crate::rig::{graph, open_root, options, run};
use block::{Buffer, WriteFlags};
use serde_json::{Value, json};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    /// Bytes that this thread holds, as far as it allocated and freed them itself.
    static HELD: Cell<i64> = const { Cell::new(0) };
    static MOST_HELD: Cell<i64> = const { Cell::new(0) };
}

/// What `work` returns, and how many more bytes than before were held at once meanwhile.
pub(crate) fn peak<T>(work: impl FnOnce() -> T) -> (T, i64) {
    let before = HELD.get();
    MOST_HELD.set(before);
    let result = work();
    (result, MOST_HELD.get() - before)
}

// SAFETY: everything is done by the system's allocator; counting touches a `Cell` only.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        HELD.set(HELD.get() + layout.size() as i64);
        MOST_HELD.set(MOST_HELD.get().max(HELD.get()));
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        HELD.set(HELD.get() - layout.size() as i64);
        // SAFETY: passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of 100 reads and 100 writes, once warm.
fn allocations(definition: Value) -> u64 {
    run(async {
        let graph = graph();
        let node = graph.add(options(definition)).await.unwrap();
        let root = open_root(&node).attach();
        let buffer = Buffer::zeroed(4096);
        let round = async || {
            for block in 0..100 {
                root.read(block * 4096, buffer.clone()).await.unwrap();
                let write = root.write(block * 4096, buffer.clone(), WriteFlags::default());
                write.await.unwrap();
            }
        };
        round().await;
        let before = ALLOCATIONS.get();
        round().await;
        ALLOCATIONS.get() - before
    })
}

#[test]
fn aligned_requests_allocate_nothing() {
    let null = json!({"driver": "raw", "node-name": "r", "file": {"driver": "null-co"}});
    assert_eq!(allocations(null), 0, "null-co");
    for (place, direct) in [("/dev/shm", false), (env!("CARGO_TARGET_TMPDIR"), true)] {
        let directory = tempfile::TempDir::new_in(place).unwrap();
        let path = directory.path().join("image");
        std::fs::File::create(&path)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let file = json!({"driver": "raw", "node-name": "r", "cache": {"direct": direct},
            "file": {"driver": "file", "filename": path}});
        assert_eq!(allocations(file), 0, "{place}");
    }
}
