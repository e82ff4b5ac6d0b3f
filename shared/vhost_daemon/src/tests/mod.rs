//! The whole crate at work: a small front-end against a server on real executors.

mod device;
mod front_end;
mod hostile;
mod life;
mod messages;
mod migration;
mod packed;
mod packed_driver;
mod rings;
mod survival;
