//! The types of network back-ends.
//!
//! A type is a module here, a variant of [`NetdevOptions`] and a line in [`open`].

mod address;
pub mod af_packet;
mod burst_queue;
mod busy;
mod datagrams;
pub mod dgram;
pub mod echo;
mod interface;
mod lease;
pub mod null;
pub mod passt;
pub mod stream;
pub mod switch;
pub mod tap;
#[cfg(test)]
pub(crate) mod test_support;
mod vectors;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;

use executor::Handle;
use serde::Deserialize;

use crate::netdev::{Netdev, Notice};

/// A back-end as the user describes it: `--netdev type=TYPE,...`, without its id. Read it from [`qmp::Arguments`], to which
/// the container's name is that of the member that chooses the variant; they also refuse what no variant knows.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename = "type", rename_all = "kebab-case")]
pub enum NetdevOptions {
    /// Takes every frame and gives none.
    Null(null::NullOptions),
    /// Gives every frame back to the queue that it came from.
    Echo(echo::EchoOptions),
    /// An interface of the host.
    AfPacket(af_packet::AfPacketOptions),
    /// A datagram socket.
    Dgram(dgram::DgramOptions),
    /// A passt process.
    Passt(passt::PasstOptions),
    /// A stream socket.
    Stream(stream::StreamOptions),
    /// A tap interface.
    Tap(tap::TapOptions),
    /// A macvtap interface.
    Macvtap(tap::MacvtapOptions),
    /// Connects ports with each other, and with an uplink.
    Switch(switch::SwitchOptions),
}

impl NetdevOptions {
    /// The socket that such a back-end makes in the file system, and removes at its end.
    pub fn socket_path(&self) -> Option<&Path> {
        let address = match self {
            NetdevOptions::Stream(options) if options.server => Some(&options.addr),
            NetdevOptions::Dgram(options) => options.local.as_ref(),
            _ => None,
        };
        match address? {
            address::SocketAddress::Unix { path } => Some(path),
            address::SocketAddress::Inet { .. } | address::SocketAddress::Fd { .. } => None,
        }
    }

    /// The TCP port that such a back-end connects to, now or again.
    pub fn tcp_peer(&self) -> Option<u16> {
        match self {
            NetdevOptions::Stream(options) if !options.server => options.addr.port(),
            _ => None,
        }
    }
}

/// What a back-end may ask of the daemon while it is opened.
pub struct Context<'a> {
    /// The back-end's id.
    pub id: &'a str,
    /// Takes over the descriptor that this names: a number that was inherited, or a name of socket activation or `getfd`.
    pub descriptor: &'a dyn Fn(&str) -> anyhow::Result<OwnedFd>,
    /// The `iothread` object of this name; without one, a thread that belongs to the back-end.
    pub thread: &'a dyn Fn(Option<&str>) -> anyhow::Result<Handle>,
    /// The back-end of this id, opened before.
    pub netdev: &'a dyn Fn(&str) -> anyhow::Result<Rc<dyn Netdev>>,
    /// Hears on the control thread what happens to the back-end later.
    pub notice: Rc<dyn Fn(Notice)>,
}

/// Opens a back-end on the current (control) executor.
///
/// # Errors
/// Names what was wrong or could not be opened.
pub fn open(options: &NetdevOptions, context: &Context<'_>) -> anyhow::Result<Rc<dyn Netdev>> {
    Ok(match options {
        NetdevOptions::Null(options) => Rc::new(null::Null::new(options)),
        NetdevOptions::Echo(options) => Rc::new(echo::Echo::new(options)),
        NetdevOptions::AfPacket(options) => Rc::new(af_packet::AfPacket::open(options)?),
        NetdevOptions::Dgram(options) => Rc::new(dgram::Dgram::open(options, context)?),
        NetdevOptions::Passt(options) => Rc::new(passt::Passt::open(options, context)?),
        NetdevOptions::Stream(options) => Rc::new(stream::Stream::open(options, context)?),
        NetdevOptions::Tap(options) => Rc::new(tap::Tap::open(options, context)?),
        NetdevOptions::Macvtap(options) => Rc::new(tap::Tap::open_macvtap(options, context)?),
        NetdevOptions::Switch(options) => Rc::new(switch::Switch::open(options, context)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> qmp::Result<NetdevOptions> {
        qmp::keyval::parse(text, Some("type"))?.parse()
    }

    #[test]
    fn options_of_no_type_are_refused() {
        assert!(parse(r#"{"type": "null"}"#).is_ok());
        assert!(parse("type=echo").is_ok() && parse("echo").is_ok());
        for (wrong, why) in [
            (r#"{}"#, "Parameter 'type' is missing"),
            ("nul", "Parameter 'type' does not accept value 'nul'"),
            ("null,ifname=tap0", "Parameter 'ifname' is unexpected"),
        ] {
            assert_eq!(parse(wrong).unwrap_err().to_string(), why);
        }
    }
}
