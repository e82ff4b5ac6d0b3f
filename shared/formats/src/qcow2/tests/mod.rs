//! Tests of the whole driver: on the simulated world (crashes, failures, kills), on real files
//! with QEMU's tools as oracle, and on hostile images.

mod bitmaps;
mod cases;
mod change;
mod checker;
mod checks;
mod compressed;
mod crash;
mod encrypted;
mod hostile;
mod pace;
pub(crate) mod peers;
pub(crate) mod rig;
mod snapshots;
mod threads;
mod workload;
