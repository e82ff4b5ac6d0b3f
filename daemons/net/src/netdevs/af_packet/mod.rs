//! `type=af-packet`: an interface of the host that exists, such as a physical one or an end of a veth pair.
//!
//! ```text
//!   AfPacket (control thread): `queues` packet sockets in one fanout group ── attach ──> Lease ──> BurstQueue (queue thread)
//! ```
//!
//! The guest shares the interface with the host: the host hears what the network sends and the other way round, but the host
//! and the guest do not hear each other, as with macvtap. Offloads: what the guest leaves undone, the kernel does; what the
//! network leaves undone and the guest cannot do is done in software ([`crate::offload`]).
//!
//! A socket cannot leave its group. One that the guest does not read keeps a frame or two, and the kernel gives what else is
//! meant for it to the others.

mod socket;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use self::socket::{PacketSocket, index_of};
use super::burst_queue::{BurstQueue, Endpoint, SendError};
use super::datagrams::Shape;
use super::interface::InterfaceName;
use super::lease::{Lease, Pool, Wanted};
use crate::link::{DropReason, Offloads};
use crate::netdev::{Attachment, Netdev, QueueMaker};

/// Sockets of one fanout group (256), and enough for any guest here.
const MAX_QUEUES: u16 = 256;

/// Options of `type=af-packet`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct AfPacketOptions {
    /// The interface.
    pub ifname: String,
    /// Queue pairs that a port may have; absent: 1.
    pub queues: Option<u16>,
}

/// The back-end.
pub struct AfPacket {
    name: InterfaceName,
    queues: u16,
    offloads: Offloads,
    /// Sockets by the index of their queue.
    pool: Pool<PacketSocket>,
}

/// A socket in use.
struct Used {
    socket: Lease<PacketSocket>,
    name: InterfaceName,
}

impl AfPacket {
    /// Opens the sockets.
    ///
    /// # Errors
    /// An interface that is not there; what the host refuses, with what to do about it.
    pub fn open(options: &AfPacketOptions) -> Result<AfPacket> {
        let name = InterfaceName::new(&options.ifname)?;
        let queues = options.queues.unwrap_or(1);
        ensure!(
            (1..=MAX_QUEUES).contains(&queues),
            "'queues' has to be 1 to {MAX_QUEUES}, not {queues}"
        );
        let index = index_of(&name)?;
        let open = || PacketSocket::open(index);
        let sockets: io::Result<Vec<_>> = (0..queues).map(|_| open()).collect();
        let sockets = sockets.map_err(|error| {
            let advice = match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => ": that needs CAP_NET_RAW",
                _ => "",
            };
            anyhow::Error::new(error)
                .context(format!("cannot attach to interface '{name}'{advice}"))
        })?;
        if let [first, others @ ..] = &sockets[..]
            && !others.is_empty()
        {
            let failed =
                || format!("cannot divide '{name}' among {queues} queues (ip link set {name} up?)");
            let id = first.found_group().with_context(failed)?;
            for socket in others {
                socket.join_group(id).with_context(failed)?;
            }
        }
        for socket in &sockets {
            socket
                .set_in_use(false)
                .context("cannot set a receive buffer")?;
        }
        Ok(AfPacket {
            name,
            queues,
            offloads: kernel_offloads()?,
            pool: Pool::new(sockets),
        })
    }
}

/// What packet sockets of this kernel take from, and give to, a guest.
fn kernel_offloads() -> io::Result<Offloads> {
    let uname = nix::sys::utsname::uname()?;
    let release = uname.release().to_string_lossy();
    let mut numbers = release
        .split(['.', '-'])
        .map(|part| part.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    // VIRTIO_NET_HDR_GSO_UDP_L4 came with Linux 6.2.
    let uso = version >= (6, 2);
    Ok(Offloads {
        uso4: uso,
        uso6: uso,
        ..Offloads::ALL
    })
}

impl Endpoint for Used {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn shape(&self) -> Shape {
        Shape::Packet
    }

    fn set_in_use(&self, in_use: bool) -> io::Result<()> {
        let socket = &self.socket;
        if in_use {
            // What came while there was no guest is old.
            socket.drain();
        }
        socket.set_in_use(in_use)
    }

    fn receive_error(&self, error: io::Error) -> io::Result<()> {
        match error.raw_os_error() {
            // Down, and perhaps up again later; or gone.
            Some(libc::ENETDOWN | libc::ENXIO | libc::ENODEV) => {
                if self.socket.has_interface()? {
                    return Ok(());
                }
                let what = format!("interface '{}' was removed", self.name);
                Err(io::Error::new(io::ErrorKind::NotConnected, what))
            }
            // One frame that has no virtio-net header, or had no memory.
            Some(libc::EINVAL | libc::ENOMEM | libc::ENOBUFS) => Ok(()),
            _ => Err(error),
        }
    }

    fn send_error(&self, error: &io::Error) -> SendError {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => SendError::Wait,
            Some(libc::ENETDOWN | libc::ENXIO | libc::ENODEV) => {
                SendError::Drop(DropReason::LinkDown)
            }
            Some(libc::EMSGSIZE) => SendError::Drop(DropReason::TooLong),
            Some(libc::EINVAL) => SendError::Drop(DropReason::BadHeader),
            // The interface's own queue is full.
            Some(libc::ENOBUFS) => SendError::Drop(DropReason::Busy),
            _ => SendError::Drop(DropReason::SendFailed),
        }
    }
}

impl Netdev for AfPacket {
    fn kind(&self) -> &'static str {
        "af-packet"
    }

    fn max_queues(&self) -> Option<u16> {
        Some(self.queues)
    }

    fn host_offloads(&self) -> Offloads {
        self.offloads
    }

    fn guest_offloads(&self) -> Offloads {
        self.offloads
    }

    fn attach(&self, port: &Attachment, index: u16) -> io::Result<QueueMaker> {
        let name = self.name.clone();
        let none = || {
            let what = format!("'{name}' has no queue {index} left ('queues=')");
            Err(io::Error::other(what))
        };
        let what = format!("interface '{name}'");
        let socket = self
            .pool
            .lend(&port.port, (&what, Wanted::At(index)), none)?;
        let used = Used { socket, name };
        Ok(Box::new(move || Ok(Rc::new(BurstQueue::new(used)))))
    }

    fn details(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut details = serde_json::Map::new();
        details.insert("ifname".to_owned(), self.name.to_string().into());
        details.insert("queues".to_owned(), self.queues.into());
        details
    }
}
