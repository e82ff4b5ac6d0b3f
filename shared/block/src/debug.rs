//! Events inside the block layer, for tests that fail or stop requests at chosen points.
//!
//! ```text
//!   a format about to read an L2 table ──Node::event(L2Load)──► its file's driver, if it listens
//!   a node about to write              ──Node::event(Pwritev)─► its own driver, if it listens
//! ```
//!
//! Owns: the names of the events, and the seam of the drivers that listen. Promises: where nobody
//! listens an event is one look at a flag of a node that is used anyway. Must not know: what a
//! listener does.

use crate::driver::BoxFuture;
use executor::Errno;

macro_rules! events {
    ($($(#[$doc:meta])* $event:ident = $name:literal,)*) => {
        /// A point that requests pass, by QEMU's names.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Event { $($(#[$doc])* $event,)* }

        impl Event {
            /// Every event.
            pub const ALL: &'static [Event] = &[$(Event::$event),*];

            /// What users call it.
            pub const fn name(self) -> &'static str {
                match self { $(Event::$event => $name,)* }
            }
        }
    };
}

events! {
    /// An entry of the L1 table is written.
    L1Update = "l1_update",
    /// Space is allocated for a larger L1 table.
    L1GrowAllocTable = "l1_grow_alloc_table",
    /// A larger L1 table is written.
    L1GrowWriteTable = "l1_grow_write_table",
    /// A larger L1 table comes into use.
    L1GrowActivateTable = "l1_grow_activate_table",
    /// An L2 table is read.
    L2Load = "l2_load",
    /// An L2 table is written.
    L2Update = "l2_update",
    /// An L2 entry of a compressed cluster changes.
    L2UpdateCompressed = "l2_update_compressed",
    /// An L2 table that is to be copied is read.
    L2AllocCowRead = "l2_alloc_cow_read",
    /// A new L2 table is written.
    L2AllocWrite = "l2_alloc_write",
    /// Data is read.
    ReadAio = "read_aio",
    /// Data of the backing is read.
    ReadBackingAio = "read_backing_aio",
    /// Compressed data is read.
    ReadCompressed = "read_compressed",
    /// Data is written.
    WriteAio = "write_aio",
    /// Compressed data is written.
    WriteCompressed = "write_compressed",
    /// Machine state is read.
    VmstateLoad = "vmstate_load",
    /// Machine state is written.
    VmstateSave = "vmstate_save",
    /// Old content around a write is read.
    CowRead = "cow_read",
    /// Old content around a write is written.
    CowWrite = "cow_write",
    /// The refcount table is read.
    ReftableLoad = "reftable_load",
    /// The refcount table grows.
    ReftableGrow = "reftable_grow",
    /// An entry of the refcount table is written.
    ReftableUpdate = "reftable_update",
    /// A refcount block is read.
    RefblockLoad = "refblock_load",
    /// A refcount block is written.
    RefblockUpdate = "refblock_update",
    /// A part of a refcount block is written.
    RefblockUpdatePart = "refblock_update_part",
    /// A refcount block is allocated.
    RefblockAlloc = "refblock_alloc",
    /// A new refcount block comes into use.
    RefblockAllocHookup = "refblock_alloc_hookup",
    /// A new refcount block is written.
    RefblockAllocWrite = "refblock_alloc_write",
    /// The refcount blocks of a larger table are written.
    RefblockAllocWriteBlocks = "refblock_alloc_write_blocks",
    /// A larger refcount table is written.
    RefblockAllocWriteTable = "refblock_alloc_write_table",
    /// A larger refcount table comes into use.
    RefblockAllocSwitchTable = "refblock_alloc_switch_table",
    /// Clusters are allocated.
    ClusterAlloc = "cluster_alloc",
    /// Space for compressed data is allocated.
    ClusterAllocBytes = "cluster_alloc_bytes",
    /// Clusters are freed.
    ClusterFree = "cluster_free",
    /// A node hands what it holds to the host.
    FlushToOs = "flush_to_os",
    /// A node asks for what it handed over to be made durable.
    FlushToDisk = "flush_to_disk",
    /// The first block of an unaligned write is read.
    PwritevRmwHead = "pwritev_rmw_head",
    /// It was read.
    PwritevRmwAfterHead = "pwritev_rmw_after_head",
    /// The last block of an unaligned write is read.
    PwritevRmwTail = "pwritev_rmw_tail",
    /// It was read.
    PwritevRmwAfterTail = "pwritev_rmw_after_tail",
    /// A write reaches the driver.
    Pwritev = "pwritev",
    /// A write of zeroes reaches the driver.
    PwritevZero = "pwritev_zero",
    /// A write has left the driver.
    PwritevDone = "pwritev_done",
    /// An image is about to be emptied.
    EmptyImagePrepare = "empty_image_prepare",
    /// A shorter L1 table is written.
    L1ShrinkWriteTable = "l1_shrink_write_table",
    /// The L2 tables behind a shorter L1 table are freed.
    L1ShrinkFreeL2Clusters = "l1_shrink_free_l2_clusters",
    /// What a read found below is written.
    CorWrite = "cor_write",
    /// Space around a write is made to read as zeroes.
    ClusterAllocSpace = "cluster_alloc_space",
    /// Nothing: passed once, when the listener is opened.
    None = "none",
}

impl Event {
    /// The event called `name`.
    pub fn parse(name: &str) -> Option<Event> {
        Self::ALL.iter().copied().find(|event| event.name() == name)
    }
}

/// What became of a request at a breakpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was stopped.
    Suspended,
    /// It goes on.
    Resumed,
}

/// Hears what becomes of requests at breakpoints: the change, and the breakpoint's tag.
pub type Watcher = fn(Change, &str);

/// A driver that listens to events. Any thread may call.
pub trait Debugger: Send + Sync {
    /// A request has reached `event`; it goes on when this resolves.
    fn event(&self, event: Event) -> BoxFuture<'_, ()>;
    /// Stops the next request that reaches `event`.
    fn set_breakpoint(&self, event: Event, tag: &str);
    /// Removes breakpoints and lets the requests go that they stopped; `ENOENT` when there are none.
    fn remove_breakpoint(&self, tag: &str) -> Result<(), Errno>;
    /// Lets a stopped request go; `ENOENT` when there is none.
    fn resume(&self, tag: &str) -> Result<(), Errno>;
    /// Resolves when a request is stopped at a breakpoint.
    fn until_suspended<'a>(&'a self, tag: &'a str) -> BoxFuture<'a, ()>;
    /// Lets `watcher`, and nobody else, hear of changes.
    fn watch(&self, watcher: Watcher);
}
