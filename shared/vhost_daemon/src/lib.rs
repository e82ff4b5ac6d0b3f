//! What every device daemon needs to be a vhost-user back-end.
//!
//! ```text
//!  front-end (VMM)                          control thread
//!    unix socket ──bytes+fds──> wire ──Message──> session ──┐   one loop for all devices
//!    BACKEND_REQ <──config change, ...───────────── session │
//!                                                           ▼
//!                                                 Device: features, config, start_queue / stop_queue
//!                                                           │ QueueSetup (Send)
//!                                          queue thread     ▼
//!    guest memory <──descriptors, data, used──> ring ── queue ── Handler (the device's requests)
//! ```
//!
//! Promises: whatever the front-end or the guest sends, the daemon survives; a bad message ends or
//! refuses that connection, a bad ring ends that queue. Requests in flight keep the memory they
//! use mapped. A request that was in flight when the daemon died is served again by its successor
//! when the front-end keeps an inflight region.
//!
//! Must not know: what a device does with its requests, block nodes, QMP.

pub mod device;
pub mod dirty_log;
pub mod inflight;
pub mod memory;
pub mod notify;
pub mod queue;
pub mod ring;
pub mod sandbox;
pub mod server;
pub mod session;
mod store;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod wire;

pub use device::{Device, DeviceError};
pub use queue::{
    Handler, Queue, QueueError, QueueRemote, QueueSetup, RingState, RunningQueue, ServedRing,
    Stopped,
};
pub use ring::{Chain, RingOrigin};
pub use server::{Address, Server};

#[cfg(test)]
mod tests;
