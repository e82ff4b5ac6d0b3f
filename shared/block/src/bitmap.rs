//! Dirty bitmaps: which parts of a node were written since.
//!
//! ```text
//!   Node ── BitmapSet ──┬── DirtyBitmap "backup0"   one bit for each granule
//!     every write,      ├── DirtyBitmap "mirror"
//!     zeroing, discard  └── ...
//! ```
//!
//! A request marks its range when it is submitted and again when it ends: before, so that a
//! request whose future is dropped counts as well; after, so that a job which clears a bit and
//! then reads the data never misses a write that lands in between. A bitmap may say too much,
//! never too little.
//!
//! Without a bitmap a write costs one relaxed load. With some, marking takes a read lock that only
//! threads of the same shard share, and touches a word only when its bits are not all set.
//! A bitmap records every request that began after the drain which follows its attachment;
//! requests that were in flight when it was attached may be missed.
//!
//! Must not know: where bitmaps are stored ([`BitmapStore`] is the seam), nor jobs.

mod dirty;
pub mod ops;
mod set;
mod words;

pub use dirty::{BitmapOptions, DirtyBitmap, SavedBits, Unusable};
pub use ops::NewBitmap;
pub use set::{BitmapSet, Consumed, Recording};

use crate::driver::BoxFuture;
use crate::error::Result;

/// Smallest granularity in bytes.
pub const MIN_GRANULARITY: u32 = 1 << 9;
/// Largest granularity in bytes.
pub const MAX_GRANULARITY: u32 = 1 << 31;
/// Longest name in bytes.
pub const MAX_NAME: usize = 1023;

/// Where a format keeps bitmaps beyond the life of the process.
pub trait BitmapStore {
    /// The bitmaps of the node, shared with it: those loaded with the image are in it from the
    /// start, and those that are persistent are stored when the driver is closed.
    fn set(&self) -> &std::sync::Arc<BitmapSet>;
    /// Whether a bitmap of this name and granularity (bytes) can be stored; called before it is
    /// made.
    fn can_store(&self, name: &str, granularity: u32) -> Result<()>;
    /// Removes what is stored of the bitmap `name`.
    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<()>>;
}
