//! What can be said on the command line and over QMP, as typed values.
//!
//! A `--port` option and the arguments of `port-add` are the same thing in two spellings ([`qmp::Arguments`]). Words that
//! stand for several values (`rate-rx=10M` for `rate-rx.bytes=10M`, one `iothread=` for a list) are taken apart here.

pub mod help;
mod port;

pub use port::{PortArguments, RateSetting, SocketAddress, default_mac, take_guard, take_rate};
