//! What every device daemon needs to be a vhost-user back-end.

pub mod server;
pub mod wire;

pub use server::Address;
