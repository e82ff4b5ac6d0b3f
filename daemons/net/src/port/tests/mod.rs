//! Ports at work: a front-end and its drivers against a port on an executor of its own.

mod carried;
mod commands;
mod guest;
mod hostile;
mod life;
mod probe;
mod switched;
