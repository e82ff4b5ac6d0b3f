//! A real guest, the VMM that runs it and the daemons that serve its disk and its network, as processes under one hand.
//!
//! ```text
//!   BackEnd (outboard-blkd, outboard-netd) ── vhost-user ── Guest: outboard-vmm or QEMU
//!        │ QMP                   │ Network (tap)              │ QMP     │ console: commands in, answers out
//!        └───────────────── the scene: this process ──────────┴─────────┘
//! ```
//!
//! What happens in which order is the program `vm-scene`'s business; tests and the demo start that program with [`Stage`], on
//! this machine if it has KVM, in a nested one otherwise. Nothing here knows what a disk image is.

mod back_end;
mod front_end;
mod guest;
mod network;
mod stage;

pub use back_end::{BackEnd, PORT};
pub use front_end::{Boot, FrontEnd, Rings};
pub use guest::Guest;
pub use network::{IperfServer, Network};
pub use stage::{Stage, kvm_runs_guests, trial_boot};

use std::env;
use std::path::{Path, PathBuf};

/// Finds a program: beside this one, then in the folder above (where cargo puts programs while tests are one below), then by
/// `PATH`, then where Debian puts administrators' programs, which an ordinary user's `PATH` leaves out.
pub fn program(name: &str) -> PathBuf {
    let own = env::current_exe().unwrap_or_default();
    let beside = own.ancestors().skip(1).take(2).map(Path::to_owned);
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let directories = beside.chain(env::split_paths(&path)).chain(system);
    let found = directories
        .map(|directory| directory.join(name))
        .find(|file| file.is_file());
    found.unwrap_or_else(|| Path::new(name).into())
}
