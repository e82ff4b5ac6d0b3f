//! Tests of the whole driver: on the simulated world (crashes, failures, kills), on real files
//! with QEMU's tools as oracle, and on hostile images.

mod bitmaps;
mod change;
mod checker;
mod checks;
mod compressed;
mod crash;
mod hostile;
mod pace;
mod peers;
mod rig;
mod snapshots;
mod threads;
mod workload;
