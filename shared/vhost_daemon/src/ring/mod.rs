//! Virtqueues seen from the device: fetching chains, returning used elements, notifications.
//!
//! [`SplitRing`] is the split layout of virtio 1.2 section 2.7. What [`crate::queue`] needs of a
//! ring is `fetch`, `refetch`, `push_used`, `publish`, `needs_call`, `arm`, `disarm` and
//! `relocate`; another layout is another type with these.
//!
//! Promises: each descriptor is read once and then validated; no access outside of the memory
//! table; every loop is bounded by the ring size or [`MAX_CHAIN`]; a chain holds each byte
//! count below 4 GiB. A guest that breaks the rules gets a [`RingError`], after which its ring is
//! not read again.

mod chain;
mod split;

pub use chain::{Chain, GuestBytes, MAX_CHAIN, Segment, SharedMemory};
pub(crate) use split::is_mapped;
pub use split::{RingParts, SplitRing, StartError};

/// How a guest or front-end broke a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The ring size is not a power of two within the device's limit.
    #[error("ring size {0}")]
    Size(u32),
    /// A part of the ring is outside of shared memory or misaligned.
    #[error("ring part at {0:#x} is not in shared memory or misaligned")]
    Unmapped(u64),
    /// More available entries than the ring has.
    #[error("available index {index} is more than {size} ahead of {next}")]
    AvailableIndex {
        /// What the driver wrote.
        index: u16,
        /// What comes next.
        next: u16,
        /// Ring size.
        size: u16,
    },
    /// A descriptor index beyond the table.
    #[error("descriptor {0} does not exist")]
    DescriptorIndex(u16),
    /// A head that the device has not returned yet.
    #[error("descriptor {0} was made available twice")]
    Duplicate(u16),
    /// A chain longer than its table: it loops.
    #[error("chain of descriptor {0} is too long or loops")]
    ChainLength(u16),
    /// A buffer outside of shared memory.
    #[error("buffer {addr:#x}+{len:#x} is not in shared memory")]
    Buffer {
        /// Guest address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// Readable descriptors after writable ones.
    #[error("chain of descriptor {0} has a readable buffer after a writable one")]
    Order(u16),
    /// 4 GiB or more in one direction.
    #[error("chain of descriptor {0} is 4 GiB or longer")]
    TotalLength(u16),
    /// An indirect table where none may be, or of a bad length.
    #[error("chain of descriptor {head} has an invalid indirect table of {len} bytes")]
    Indirect {
        /// Head of the chain.
        head: u16,
        /// Length of the table in bytes.
        len: u32,
    },
    /// The front-end truncated memory that it shares.
    #[error("shared memory was truncated by the front-end")]
    Truncated,
    /// A request that its device cannot even refuse.
    #[error("{0}")]
    Request(&'static str),
    /// The kick descriptor failed.
    #[error("kick descriptor: {0}")]
    Kick(nix::errno::Errno),
}
