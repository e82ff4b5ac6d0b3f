//! The whole crate at work: a small front-end against a server on real executors.

mod device;
mod hostile;
mod life;
mod messages;
mod migration;
mod packed;
mod rings;
mod survival;
