//! The block graph: what a disk is made of, and the rules every request obeys.
//!
//! ```text
//!   export / tool
//!        │ Root (per-thread RootHandle: counts, drain, request epochs)
//!        ▼
//!   Node "top"  ── Driver: FormatNode<qcow2> ── moves data; asks Format "where is it"
//!     │ file edge        │ backing edge
//!     ▼                  ▼
//!   Node "file"        Node "base" ...
//! ```
//!
//! Owns: the [`Driver`] and [`Format`] seams, nodes and edges, permissions, roots and drain,
//! request epochs. Promises: a request enters only at a root; any node may be entered from any
//! thread at the same time; edges change only while drained. Must not know: a concrete format or
//! protocol, guests, QMP.

pub mod accounting;
pub mod amend;
pub mod bitmap;
pub mod check;
pub mod cipher;
pub mod copy;
pub mod create;
pub mod debug;
pub mod driver;
pub mod edge;
pub mod epoch;
pub mod error;
pub mod events;
pub mod format;
pub mod format_node;
pub mod graph;
pub mod machine_state;
pub mod measure;
#[cfg(test)]
mod memory;
pub mod naming;
pub mod node;
pub mod objects;
pub mod open;
pub mod read_only;
pub mod redo_log;
pub mod root;
pub mod secret;
pub mod snapshot;
mod turns;
pub mod upkeep;

pub use amend::{AmendRequest, Amender};
pub use bitmap::{BitmapSet, BitmapStore, DirtyBitmap};
pub use check::{CheckOptions, CheckResult, CheckSink, Purpose, Repair, Silent};
pub use cipher::{SectorCipher, Tweak};
pub use create::{CreateRequest, Creator, OptionKind, OptionSpec};
pub use debug::{Debugger, Event};
pub use driver::{
    BackingReference, BlockStatus, BoxFuture, ByteRange, ChildrenChange, ChildrenRefusal, Driver,
    IoFuture, Limits, Preallocation, Resize, StatusExtent, Stored, StoredUse, WriteFlags,
    ZeroFlags,
};
pub use edge::{Edge, EdgeSpec, Permissions};
pub use error::{Error, ErrorKind};
pub use executor::{Buffer, Errno, HeapBuffer};
pub use format::{EncodedBytes, Extent, Fill, Format, Lookup, Mapping, WritePlan};
pub use format_node::FormatNode;
pub use graph::Graph;
pub use machine_state::MachineState;
pub use measure::Measured;
pub use naming::{Layer, Names, Protocol, Reach};
pub use node::{DetectZeroes, Discard, Node, NodeOptions};
pub use open::{ChildRole, DriverEntry, OpenRequest};
pub use read_only::{ReadFormat, ReadOnly};
pub use redo_log::{ImageIdentity, RedoLog};
pub use root::{Drained, Root, RootFuture, RootHandle};
pub use secret::{Secret, Secrets};
pub use snapshot::{NewSnapshot, SnapshotInfo, Snapshots};
