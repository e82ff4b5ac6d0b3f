//! The block graph with its real leaves: files in temporary directories, `null-co`, `raw`.

mod catalogue;
mod drain;
mod files;
mod locks;
mod rig;
