//! `type=dgram`: a frame is a datagram, on unix sockets or UDP, as in QEMU's `-netdev dgram`.
//!
//! There are no offloads. The socket is connected: it hears its remote alone, and waits while that takes no more. A remote that
//! is not there, or has been replaced, is connected to again with the next frame; until then frames are dropped.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::Context;
use super::address::{SocketAddress, resolve};
use super::burst_queue::{BurstQueue, Endpoint, SendError};
use super::busy::while_busy;
use super::datagrams::Shape;
use super::lease::{Lease, Pool, Wanted};
use super::vectors;
use crate::link::{DropReason, Offloads};
use crate::netdev::{Attachment, Netdev, QueueMaker};

/// Options of `type=dgram`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct DgramOptions {
    /// Where frames come to; with `fd` a connected socket, and no remote.
    pub local: Option<SocketAddress>,
    /// Where frames go, and come from.
    pub remote: Option<SocketAddress>,
}

/// The back-end.
pub struct Dgram {
    socket: Pool<Socket>,
}

enum Socket {
    Unix {
        socket: UnixDatagram,
        /// Removed with it.
        local: PathBuf,
        remote: PathBuf,
    },
    Udp(UdpSocket),
    Given(OwnedFd),
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Socket::Unix { local, .. } = self
            && let Err(error) = std::fs::remove_file(&local)
        {
            tracing::debug!(path = %local.display(), %error, "cannot remove a socket");
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Unix { socket, .. } => socket.as_fd(),
            Socket::Udp(socket) => socket.as_fd(),
            Socket::Given(fd) => fd.as_fd(),
        }
    }
}

impl Socket {
    fn open(options: &DgramOptions, context: &Context<'_>) -> Result<Socket> {
        match (&options.local, &options.remote) {
            (Some(SocketAddress::Fd { str }), None) => {
                let fd = (context.descriptor)(str)?;
                Ok(Socket::Given(fd))
            }
            (
                Some(SocketAddress::Unix { path: local }),
                Some(SocketAddress::Unix { path: remote }),
            ) => Self::unix(local, remote),
            (local, Some(SocketAddress::Inet { host, port })) => {
                let remote = resolve(host, port)?;
                let local = match local {
                    None => None,
                    Some(SocketAddress::Inet { host, port }) => Some(resolve(host, port)?),
                    Some(_) => bail!("'local' has to be of type inet like 'remote'"),
                };
                Self::udp(local, remote)
            }
            _ => bail!(
                "needs 'local' and 'remote' of type unix, 'remote' and perhaps 'local' of type inet, or 'local' of type fd"
            ),
        }
    }

    fn unix(local: &Path, remote: &Path) -> Result<Socket> {
        let failed = || format!("cannot bind a socket to '{}'", local.display());
        // The working directory may change.
        let local = std::path::absolute(local).with_context(failed)?;
        let remote = std::path::absolute(remote).with_context(failed)?;
        let in_use = |error: &io::Error| error.kind() == io::ErrorKind::AddrInUse;
        let socket = while_busy(in_use, || match UnixDatagram::bind(&local) {
            Err(error) if in_use(&error) && is_stale(&local) => {
                std::fs::remove_file(&local)?;
                UnixDatagram::bind(&local)
            }
            bound => bound,
        });
        let socket = Socket::Unix {
            socket: socket.with_context(failed)?,
            local,
            remote,
        };
        // It may come later.
        let _ = socket.connect();
        Ok(socket)
    }

    fn udp(local: Option<SocketAddr>, remote: SocketAddr) -> Result<Socket> {
        if remote.ip().is_multicast() {
            bail!("{remote} is a multicast address, which is not supported");
        }
        let any = match remote {
            SocketAddr::V4(_) => "0.0.0.0:0",
            SocketAddr::V6(_) => "[::]:0",
        };
        let socket = match local {
            Some(local) => UdpSocket::bind(local),
            None => UdpSocket::bind(any),
        };
        let socket = socket.context("cannot bind a UDP socket")?;
        let connected = socket.connect(remote);
        connected.with_context(|| format!("cannot connect to {remote}"))?;
        Ok(Socket::Udp(socket))
    }

    /// Connects to the remote that is there now.
    fn connect(&self) -> io::Result<()> {
        match self {
            Socket::Unix { socket, remote, .. } => socket.connect(remote),
            Socket::Udp(_) | Socket::Given(_) => Ok(()),
        }
    }
}

/// Whether `path` is a datagram socket that nobody has open.
fn is_stale(path: &Path) -> bool {
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    let probe = UnixDatagram::unbound();
    probe.is_ok_and(|probe| probe.connect(path).is_err_and(refused))
}

impl Dgram {
    /// Opens it.
    ///
    /// # Errors
    /// Addresses that do not go together; what the host refuses.
    pub fn open(options: &DgramOptions, context: &Context<'_>) -> Result<Dgram> {
        let socket = Socket::open(options, context)?;
        vectors::set_nonblocking(&socket)?;
        Ok(Dgram {
            socket: Pool::new([socket]),
        })
    }
}

impl Endpoint for Lease<Socket> {
    fn fd(&self) -> BorrowedFd<'_> {
        (**self).as_fd()
    }

    fn shape(&self) -> Shape {
        Shape::Plain
    }

    fn set_in_use(&self, _in_use: bool) -> io::Result<()> {
        Ok(())
    }

    fn receive_error(&self, error: io::Error) -> io::Result<()> {
        match error.raw_os_error() {
            // An answer to what was sent: the remote is not there.
            Some(
                libc::ECONNREFUSED | libc::ECONNRESET | libc::EHOSTUNREACH | libc::ENETUNREACH,
            ) => Ok(()),
            _ => Err(error),
        }
    }

    fn send_error(&self, error: &io::Error) -> SendError {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => SendError::Wait,
            Some(libc::EMSGSIZE) => SendError::Drop(DropReason::TooLong),
            Some(libc::ENOTCONN | libc::ECONNREFUSED | libc::ECONNRESET | libc::EDESTADDRREQ) => {
                let unix = matches!(**self, Socket::Unix { .. });
                match self.connect() {
                    Ok(()) if unix => SendError::Again,
                    _ => SendError::Drop(DropReason::LinkDown),
                }
            }
            _ => SendError::Drop(DropReason::SendFailed),
        }
    }
}

impl Netdev for Dgram {
    fn kind(&self) -> &'static str {
        "dgram"
    }

    fn max_queues(&self) -> Option<u16> {
        Some(1)
    }

    fn host_offloads(&self) -> Offloads {
        Offloads::NONE
    }

    fn guest_offloads(&self) -> Offloads {
        Offloads::NONE
    }

    fn attach(&self, port: &Attachment, index: u16) -> io::Result<QueueMaker> {
        let none = || Err(io::Error::other("a datagram socket has one queue"));
        let lease = self
            .socket
            .lend(&port.port, ("the socket", Wanted::At(index)), none)?;
        Ok(Box::new(move || Ok(Rc::new(BurstQueue::new(lease)))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{MAX_FRAME, VnetHeader};
    use crate::link::{NetQueue, Received};
    use crate::netdevs::test_support::*;

    /// A unix back-end with its peer's address, in a directory of its own.
    fn unix(credit: usize) -> (tempfile::TempDir, PathBuf, Rc<dyn NetQueue>, Rc<TestSink>) {
        let directory = tempfile::tempdir().unwrap();
        let (ours, theirs) = (directory.path().join("a"), directory.path().join("b"));
        let (local, remote) = (ours.display(), theirs.display());
        let text = format!(
            "dgram,local.type=unix,local.path={local},remote.type=unix,remote.path={remote}"
        );
        let netdev = open(&text).unwrap();
        let queue = queue(&*netdev, 0);
        let sink = TestSink::new(credit);
        queue.connect(sink.clone());
        (directory, theirs, queue, sink)
    }

    fn drop_reasons(queue: &dyn NetQueue, len: usize) -> Vec<DropReason> {
        let mut reasons = Vec::new();
        with_frame(VnetHeader::default(), &frame_bytes(1, len), |frame| {
            queue.transmit(&[*frame], &mut |reason| reasons.push(reason))
        });
        reasons
    }

    #[test]
    fn a_datagram_is_a_frame_and_a_replaced_peer_is_found_again() {
        on_executor(async {
            let (directory, theirs, queue, sink) = unix(100);
            assert_eq!(drop_reasons(&*queue, 60), [DropReason::LinkDown]);
            for round in 0..3 {
                let peer = UnixDatagram::bind(&theirs).unwrap();
                for len in [60, 1514, 65_549] {
                    let bytes = frame_bytes(round, len);
                    send(&*queue, &bytes);
                    let mut got = vec![0; MAX_FRAME];
                    let len = peer.recv(&mut got).unwrap();
                    assert_eq!(got[..len], bytes);
                    peer.send_to(&bytes, directory.path().join("a")).unwrap();
                }
                let count = 3 * (usize::from(round) + 1);
                receive_until(&*queue, &sink, |sink| sink.frames.borrow().len() == count).await;
                drop(peer);
                std::fs::remove_file(&theirs).unwrap();
            }
            drop(queue);
            assert!(!directory.path().join("a").exists());
        });
    }

    #[test]
    fn hostile_datagrams_are_refused_one_by_one() {
        on_executor(async {
            let (directory, theirs, queue, sink) = unix(100);
            let peer = UnixDatagram::bind(&theirs).unwrap();
            let ours = directory.path().join("a");
            send(&*queue, &frame_bytes(1, 60));
            for len in [0, 1, 13, 100_000, MAX_FRAME + 1, 60] {
                peer.send_to(&frame_bytes(2, 100_000)[..len], &ours)
                    .unwrap();
            }
            receive_until(&*queue, &sink, |sink| !sink.frames.borrow().is_empty()).await;
            assert_eq!(sink.bytes(), [frame_bytes(2, 60)]);
            let (short, long) = (DropReason::TooShort, DropReason::TooLong);
            assert_eq!(*sink.dropped.borrow(), [short, short, short, long, long]);
        });
    }

    #[test]
    fn what_is_held_up_keeps_its_order_both_ways() {
        on_executor(async {
            let (directory, theirs, queue, sink) = unix(0);
            let peer = UnixDatagram::bind(&theirs).unwrap();
            peer.set_nonblocking(true).unwrap();
            let frames: Vec<_> = (0..200).map(|seed| frame_bytes(seed, 60)).collect();
            let (mut sent, mut got, mut held_up) = (0, Vec::new(), 0);
            while sent < frames.len() {
                let burst = &frames[sent..frames.len().min(sent + 40)];
                let burst: Vec<_> = burst
                    .iter()
                    .map(|bytes| crate::frame::Frame::new(VnetHeader::default(), bytes))
                    .collect();
                let taken = queue.transmit(&burst, &mut |reason| panic!("{reason:?}"));
                sent += taken;
                if taken == burst.len() {
                    continue;
                }
                held_up += 1;
                let mut room = [0; 100];
                while let Ok(len) = peer.recv(&mut room) {
                    got.push(room[..len].to_vec());
                }
                queue.writable().await;
            }
            let mut room = [0; 100];
            while let Ok(len) = peer.recv(&mut room) {
                got.push(room[..len].to_vec());
            }
            assert!(held_up > 0 && got == frames);
            let ours = directory.path().join("a");
            let first = &frames[..8];
            for bytes in first {
                peer.send_to(bytes, &ours).unwrap();
            }
            assert_eq!(queue.receive(32).unwrap(), Received::NotReady);
            while sink.frames.borrow().len() < first.len() {
                sink.give_credit(1);
                queue.receive(32).unwrap();
            }
            assert_eq!(sink.bytes(), first);
        });
    }

    #[test]
    fn udp_and_descriptors_carry_frames_too() {
        on_executor(async {
            let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
            let port = peer.local_addr().unwrap().port();
            let text = format!("dgram,remote.type=inet,remote.host=127.0.0.1,remote.port={port}");
            let udp = open(&text).unwrap();
            let (ours, other) = UnixDatagram::pair().unwrap();
            let given =
                open_with("dgram,local.type=fd,local.str=x", vec![("x", ours.into())]).unwrap();
            let (udp_sink, fd_sink) = (TestSink::new(2), TestSink::new(1));
            let (udp, fd) = (queue(&*udp, 0), queue(&*given, 0));
            udp.connect(udp_sink.clone());
            fd.connect(fd_sink.clone());
            let bytes = frame_bytes(1, 60);
            send(&*udp, &bytes);
            let mut room = [0; 100];
            let (len, from) = peer.recv_from(&mut room).unwrap();
            assert_eq!(room[..len], bytes);
            peer.send_to(&bytes, from).unwrap();
            other.send(&bytes).unwrap();
            receive_until(&*udp, &udp_sink, |sink| sink.bytes() == [bytes.clone()]).await;
            receive_until(&*fd, &fd_sink, |sink| sink.bytes() == [bytes.clone()]).await;
            // A remote that has gone is no error, and one that comes back is heard.
            drop(peer);
            send(&*udp, &bytes);
            udp.readable().await;
            assert_eq!(udp.receive(1).unwrap(), Received::More);
            assert_eq!(udp.receive(1).unwrap(), Received::Drained);
            let peer = UdpSocket::bind(("127.0.0.1", port)).unwrap();
            peer.send_to(&bytes, from).unwrap();
            receive_until(&*udp, &udp_sink, |sink| sink.frames.borrow().len() == 2).await;
            assert!(given.attach(&attachment("p1", 1), 0).is_err());
        });
    }

    #[test]
    fn addresses_that_do_not_go_together_are_refused() {
        on_executor(async {
            for (text, why) in [
                ("dgram", "needs 'local' and 'remote'"),
                (
                    "dgram,local.type=unix,local.path=/x",
                    "needs 'local' and 'remote'",
                ),
                (
                    "dgram,remote.type=inet,remote.host=230.0.0.1,remote.port=1",
                    "multicast",
                ),
                (
                    "dgram,local.type=unix,local.path=/nonexistent/a,remote.type=unix,remote.path=/x",
                    "cannot bind a socket",
                ),
                (
                    "dgram,local.type=unix,local.path=/x,remote.type=inet,remote.host=::1,remote.port=1",
                    "'local' has to be of type inet",
                ),
            ] {
                let error = open_error(text);
                assert!(error.contains(why), "{text}: {error}");
            }
        });
    }
}
