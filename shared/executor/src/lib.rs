//! The per-thread executor: one thread, one io_uring, tasks, timers and owned buffers.
//!
//! ```text
//!   task ──await──> FileOp ──SQE──> kernel ──CQE──> wake task
//!    ▲                 │ keeps the Buffer alive until the CQE, even when dropped
//!    └── run queue ◄── Handle::spawn (other threads), timers, pollers
//! ```
//!
//! Promises: a future is polled only on the thread that spawned it; a buffer handed to an
//! operation stays valid until the kernel is done with it; an executor with nothing to do sleeps
//! in the kernel. The same API runs on a simulated world ([`sim`]), in which completion order,
//! latency, faults and power cuts come from a seed.
//!
//! What computes for long runs on a few other threads ([`workers`]).
//!
//! System calls once it runs, for allow-lists: `io_uring_enter`, `io_uring_register`, `pread64`,
//! `pwrite64`, `preadv2`, `pwritev2`, `read`, `write` (eventfds), `fallocate`, `ftruncate`,
//! `lseek`, `fstat`, `fstatfs`, `shutdown`, `close`, `fcntl`, `futex`, `clock_gettime`, `mmap`,
//! `munmap`, `mincore`, `utimensat` (without a path), `rt_sigaction` (SIGBUS);
//! making an executor or opening files and sockets needs more.
//!
//! Must not know: images, guests, sockets' protocols.

pub mod buffer;
mod crew;
mod errno;
pub mod file;
mod hold;
mod iothread;
pub mod net;
mod op;
mod poller;
pub mod pool;
pub mod ready_set;
mod remote;
mod ring;
pub mod runtime;
pub mod shared_memory;
pub mod sigbus;
pub mod sim;
pub mod sync;
mod task;
pub mod time;
mod turn;
pub mod word_arena;
pub mod workers;

pub use buffer::{Buffer, HEAP_ALIGN, HeapBuffer};
pub use crew::Crew;
pub use errno::{Errno, reason};
pub use file::{File, FileOp, OpenOptions};
pub use hold::{Hold, hold_open};
pub use iothread::{IoThread, IoThreadOptions};
pub use op::{Unfinished, after_abandoned, unfinished};
pub use pool::TaskPool;
pub use runtime::{BufferedWrites, Config, Executor, Handle, JoinHandle, Poller, spawn};
pub use shared_memory::SharedMemory;
pub use word_arena::WordArena;
