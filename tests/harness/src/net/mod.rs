//! What drives and judges the network daemon from outside.
//!
//! ```text
//!   FrontEnd   (control: negotiation, memory, rings, config space, dirty log, reconnect)
//!     |                     shares guest memory with
//!   Pair x N, ControlQueue  (data: frames with their virtio-net header, control commands)
//! ```
//!
//! The driver is as the block one: front-end and guest in one process, over a memfd, without a VM. It shares no code with the
//! daemon, and is itself tested against DPDK's back-end. Beside it: the peers that a network daemon has in the field.

mod control;
mod device;
mod dirty_log;
pub mod features;
pub mod frames;
pub mod guest;
pub mod iperf;
pub mod namespace;
mod queue;
pub mod rig;
pub mod testpmd;

pub use control::{ControlQueue, command, mac_table};
pub use device::{FrontEnd, NetDevice, Options};
pub use dirty_log::DirtyLog;
pub use features::{Header, NetConfig};
pub use queue::{Pair, ReceiveQueue, Received, TransmitQueue, wait};
