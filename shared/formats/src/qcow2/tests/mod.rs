//! Tests of the whole driver: on the simulated world (crashes, failures, kills), on real files
//! with QEMU's tools as oracle, and on hostile images.

mod checker;
mod crash;
mod rig;
mod workload;
