//! The block graph with its real leaves: files in temporary directories, `null-co`, `raw`.

#![expect(clippy::unwrap_used, reason = "tests")]

mod allocation;
mod catalogue;
mod compress;
mod copy_on_read;
mod damage;
mod drain;
mod files;
mod http;
mod locks;
mod log_writes;
mod memory;
mod names;
mod naming;
mod nbd;
mod preallocate;
mod quorum;
mod rig;
mod threads;
mod vmdk;
