//! Scenarios: the daemons as their users see them, driven and judged by the harness.
//!
//! One binary, because linking dominates build time. Each module takes one side of the product; a
//! scenario's name states what holds.

mod blkio;
mod block_stats;
mod clear;
mod corrupt;
mod device;
mod exports;
mod fat;
mod guests;
mod hostile;
mod in_memory;
mod kill;
mod lifecycle;
mod memory;
mod monitor;
mod peers;
mod qmp_wire;
mod units;
mod verify;
mod web;
