//! An in-process virtio-blk driver: a vhost-user front-end and rings of either layout over a memfd, no VM.
//!
//! ```text
//! FrontEnd  (control: negotiation, memory table, rings, inflight region, reconnect)
//!   |                          shares guest memory with
//! Queue x N (data: one per thread, requests in, completions out)
//! ```
//!
//! A [`FrontEnd`] plays the VMM, the [`Queue`]s play the guest. They meet only in guest memory and in
//! the eventfds, as in a VM: when a back-end dies the queues go on undisturbed while the front-end
//! reconnects. Everything the driver can check without knowing the data it checks by itself; what the
//! data should be is the [oracle](crate::oracle)'s business.

pub(crate) mod backend_channel;
pub(crate) mod either_ring;
mod endpoint;
pub mod features;
mod front_end;
pub mod memory;
pub(crate) mod negotiation;
pub mod packed_ring;
mod pool;
mod queue;
mod request;
mod ring;
pub(crate) mod session;
pub(crate) mod setup;

pub use either_ring::Ring;
pub use endpoint::Endpoint;
pub use features::BlockConfig;
pub use front_end::{FrontEnd, Start};
pub use packed_ring::PackedRing;
pub use pool::{DataPool, Lease};
pub use queue::{MAX_RANGES, Queue, Wait};
pub use request::{
    Alignment, Completion, ID_BYTES, LANES, Layout, Operation, Request, SECTOR_BYTES, STATUS_IOERR,
    STATUS_OK, STATUS_UNSUPPORTED, SectorRange, Segment,
};
pub use ring::{Buffer, RingParts, SplitRing, device_used_idx};
pub use setup::Options;
