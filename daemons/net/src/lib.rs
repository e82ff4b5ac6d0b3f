//! What `outboard-netd` is made of: vhost-user-net ports, network back-ends, and what lies between them.
//!
//! ```text
//!   control thread     port: vhost-user session, features, control queue     netdev: opens its queues
//!                             │                                                 │
//!   queue thread i            ▼                                                 ▼
//!     guest memory <──> queue pair i ── transmit(frames) ──────────────> NetQueue ──> tap, socket, switch, ...
//!                       (rings, limits, <───── Sink: deliver, reserve ────┘
//!                        filters, capture)
//! ```
//!
//! A queue pair and its [`link::NetQueue`] live on one thread and call each other directly; nothing between them is locked
//! or queued. Frames go on in the order in which they came, and a ring can always be gone on with at its used index.

pub mod capture;
pub mod control;
pub mod counters;
pub mod frame;
pub mod guard;
pub mod limit;
pub mod link;
pub mod live;
pub mod metrics;
pub mod netdev;
pub mod netdevs;
pub mod offload;
pub mod options;
mod packet;
pub mod port;
