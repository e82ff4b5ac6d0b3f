//! The network daemon as its users see it, and the driver that judges it against DPDK's back-end.
//!
//! One binary, because linking dominates build time. A scenario's name states what holds.

mod control;
mod driver;
mod traffic;
