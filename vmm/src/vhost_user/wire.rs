//! vhost-user messages on a UNIX socket: framing, file descriptors, replies and acknowledgements.
//!
//! The `vhost` crate's front-end has no STATUS and cannot be interrupted while it waits, so only its numbers and flags are used.
//! While a reply is awaited, requests of the back-end (configuration changes) are answered, because a back-end may
//! wait for that answer before it goes on. Every length is checked; a message that breaks the rules ends the connection.

#![expect(
    unsafe_code,
    reason = "descriptors that a message carries are taken into ownership"
)]

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use thiserror::Error;
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::{BackendReq, FrontendReq};

use crate::events::Notifier;

const HEADER_SIZE: usize = 12;
const MAX_PAYLOAD: usize = 4096;
const MAX_FDS: usize = 8;
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
/// Flag of a message that answers another.
pub(super) const REPLY: u32 = 1 << 2;
/// Flag of a message whose receiver has to acknowledge it.
pub(super) const NEED_REPLY: u32 = 1 << 3;

/// Why a conversation ended.
#[derive(Debug, Error)]
pub(super) enum LinkError {
    /// The back-end closed the connection or died.
    #[error("the back-end went away ({0})")]
    Gone(#[source] io::Error),
    /// An order came while waiting for an answer that may take long.
    #[error("interrupted")]
    Interrupted,
    /// The back-end acknowledged a request with an error; the conversation may go on.
    #[error("the back-end failed at {0:?}")]
    Rejected(FrontendReq),
    /// The back-end cannot serve this guest, or breaks the protocol.
    #[error("{0}")]
    Refused(String),
}

impl From<Errno> for LinkError {
    fn from(error: Errno) -> Self {
        Self::Gone(error.into())
    }
}

impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> Self {
        Self::Gone(error)
    }
}

type Result<T> = std::result::Result<T, LinkError>;

/// One connection to a back-end.
pub(super) struct Link {
    socket: UnixStream,
    /// Requests of the back-end.
    channel: Option<UnixStream>,
    /// Negotiated protocol features.
    protocol: Protocol,
    /// Ends a wait early while set.
    interrupt: Option<Arc<Notifier>>,
    config_changed: bool,
}

/// A reply's payload and descriptors.
pub(super) struct Reply {
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Reply {
    /// A reply that is one number.
    pub(super) fn as_u64(&self) -> Result<u64> {
        let bytes = self.payload.as_slice().try_into();
        bytes
            .map(u64::from_ne_bytes)
            .map_err(|_| LinkError::Refused("odd reply size".into()))
    }
}

/// One message, whoever sent it.
pub(super) struct Message {
    pub(super) request: u32,
    pub(super) flags: u32,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Link {
    /// Takes over a connected, non-blocking socket; waits end when `interrupt` is raised, until [`Link::commit`].
    pub(super) fn new(socket: UnixStream, interrupt: Arc<Notifier>) -> Self {
        Self {
            socket,
            channel: None,
            protocol: Protocol::empty(),
            interrupt: Some(interrupt),
            config_changed: false,
        }
    }

    /// The back-end is known to answer: waits are no longer interrupted.
    pub(super) fn commit(&mut self) {
        self.interrupt = None;
    }

    /// Negotiated protocol features.
    pub(super) fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Sets the negotiated protocol features.
    pub(super) fn set_protocol(&mut self, protocol: Protocol) {
        self.protocol = protocol;
    }

    /// Sets the channel on which the back-end sends requests.
    pub(super) fn set_channel(&mut self, channel: UnixStream) {
        self.channel = Some(channel);
    }

    /// Whether the back-end said that its configuration has changed, since the last call.
    pub(super) fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    /// Sends a request that has a reply of its own and waits for it.
    pub(super) fn call(&mut self, request: FrontendReq, payload: &[u8]) -> Result<Reply> {
        self.send(request.into(), 0, payload, &[])?;
        self.wait_for_reply(request)
    }

    /// Sends a request without reply of its own; waits for its acknowledgement if those are negotiated.
    pub(super) fn order(
        &mut self,
        request: FrontendReq,
        payload: &[u8],
        fds: &[RawFd],
    ) -> Result<()> {
        let acknowledged = self.protocol.contains(Protocol::REPLY_ACK);
        let flags = if acknowledged { NEED_REPLY } else { 0 };
        self.send(request.into(), flags, payload, fds)?;
        if acknowledged && self.wait_for_reply(request)?.as_u64()? != 0 {
            return Err(LinkError::Rejected(request));
        }
        Ok(())
    }

    fn send(&mut self, request: u32, flags: u32, payload: &[u8], fds: &[RawFd]) -> Result<()> {
        let message = encode(request, flags, payload);
        let mut sent = 0;
        while sent < message.len() {
            let rights = [ControlMessage::ScmRights(fds)];
            let control = if fds.is_empty() || sent > 0 {
                &[][..]
            } else {
                &rights[..]
            };
            let parts = [IoSlice::new(&message[sent..])];
            let flags = MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(self.socket.as_raw_fd(), &parts, control, flags, None) {
                Ok(count) => sent += count,
                Err(Errno::EAGAIN) => self.wait_for_socket(PollFlags::POLLOUT)?,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn wait_for_reply(&mut self, request: FrontendReq) -> Result<Reply> {
        self.wait_for_socket(PollFlags::POLLIN)?;
        let message = receive(&self.socket)?;
        let expected = message.request == u32::from(request) && message.flags & REPLY != 0;
        if !expected {
            let other = message.request;
            let text = format!("message {other} instead of a reply to {request:?}");
            return Err(LinkError::Refused(text));
        }
        Ok(Reply {
            payload: message.payload,
            fds: message.fds,
        })
    }

    fn wait_for_socket(&mut self, events: PollFlags) -> Result<()> {
        loop {
            let ready = self.poll(events)?;
            if ready.channel {
                self.serve_channel()?;
            }
            if ready.socket {
                return Ok(());
            }
            if ready.interrupted {
                return Err(LinkError::Interrupted);
            }
        }
    }

    fn poll(&self, events: PollFlags) -> Result<Ready> {
        let mut fds = vec![PollFd::new(self.socket.as_fd(), events)];
        fds.extend(
            self.channel
                .iter()
                .map(|channel| PollFd::new(channel.as_fd(), PollFlags::POLLIN)),
        );
        let interrupt = self.interrupt.iter();
        fds.extend(interrupt.map(|event| PollFd::new(event.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |index: usize| fds.get(index).is_some_and(|fd| fd.any().unwrap_or(false));
        let after_socket = 1 + usize::from(self.channel.is_some());
        Ok(Ready {
            socket: ready(0),
            channel: self.channel.is_some() && ready(1),
            interrupted: ready(after_socket),
        })
    }

    /// Serves one request of the back-end. A back-end may close this channel and go on.
    pub(super) fn serve_channel(&mut self) -> Result<()> {
        let Some(channel) = &mut self.channel else {
            return Ok(());
        };
        let message = match receive(channel) {
            Ok(message) => message,
            Err(LinkError::Gone(_)) => {
                self.channel = None;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let known = message.request == u32::from(BackendReq::CONFIG_CHANGE_MSG);
        self.config_changed |= known;
        if message.flags & NEED_REPLY != 0 {
            let result = u64::from(!known).to_ne_bytes();
            channel.write_all(&encode(message.request, REPLY, &result))?;
        }
        Ok(())
    }

    /// Something arrived while nothing is awaited: only the end of the connection may.
    pub(super) fn unexpected(&self) -> LinkError {
        match receive(&self.socket) {
            Ok(message) => {
                LinkError::Refused(format!("message {} that nobody asked for", message.request))
            }
            Err(error) => error,
        }
    }

    /// The connection.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// The channel for the back-end's requests.
    pub(super) fn channel(&self) -> Option<&UnixStream> {
        self.channel.as_ref()
    }
}

/// What ended a wait.
struct Ready {
    socket: bool,
    channel: bool,
    interrupted: bool,
}

/// The bytes of a message.
pub(super) fn encode(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    assert!(payload.len() <= MAX_PAYLOAD);
    let mut message = Vec::with_capacity(HEADER_SIZE + payload.len());
    for word in [request, flags | VERSION, payload.len() as u32] {
        message.extend_from_slice(&word.to_ne_bytes());
    }
    message.extend_from_slice(payload);
    message
}

/// Receives one whole message; a peer that has sent a part of it is waited for.
pub(super) fn receive(socket: &UnixStream) -> Result<Message> {
    let mut header = [0; HEADER_SIZE];
    let (count, fds) = receive_start(socket, &mut header)?;
    read_rest(socket, &mut header[count..])?;
    let word = |at: usize| {
        u32::from_ne_bytes(
            header[at..at + 4]
                .try_into()
                .expect("a word is 4 bytes long"),
        )
    };
    let (request, flags, size) = (word(0), word(4), word(8) as usize);
    if flags & VERSION_MASK != VERSION || size > MAX_PAYLOAD {
        return Err(LinkError::Refused(format!(
            "malformed message {request}, {size} bytes"
        )));
    }
    let mut payload = vec![0; size];
    read_rest(socket, &mut payload)?;
    Ok(Message {
        request,
        flags,
        payload,
        fds,
    })
}

fn receive_start(socket: &UnixStream, header: &mut [u8]) -> Result<(usize, Vec<OwnedFd>)> {
    loop {
        let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
        let mut parts = [IoSliceMut::new(header)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Ok(message) if message.bytes == 0 => return Err(end_of_file()),
            Ok(message) => {
                let fds = message.cmsgs()?.flat_map(take_descriptors).collect();
                return Ok((message.bytes, fds));
            }
            Err(Errno::EAGAIN) => wait_readable(socket)?,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn take_descriptors(control: ControlMessageOwned) -> Vec<OwnedFd> {
    let ControlMessageOwned::ScmRights(fds) = control else {
        return Vec::new();
    };
    // SAFETY: the kernel has just opened these descriptors for this process; nothing else knows of them.
    fds.into_iter()
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
        .collect()
}

fn read_rest(mut socket: &UnixStream, mut rest: &mut [u8]) -> Result<()> {
    while !rest.is_empty() {
        match socket.read(rest) {
            Ok(0) => return Err(end_of_file()),
            Ok(count) => rest = &mut rest[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait_readable(socket)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn wait_readable(socket: &UnixStream) -> Result<()> {
    match poll(
        &mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)],
        PollTimeout::NONE,
    ) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn end_of_file() -> LinkError {
    LinkError::Gone(io::ErrorKind::UnexpectedEof.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link() -> (Link, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Link::new(ours, Arc::new(Notifier::new().unwrap())), theirs)
    }

    #[test]
    fn a_call_returns_the_reply_that_belongs_to_it() {
        let (mut link, mut peer) = link();
        let request = u32::from(FrontendReq::GET_FEATURES);
        peer.write_all(&encode(request, REPLY, &7_u64.to_ne_bytes()))
            .unwrap();
        let reply = link.call(FrontendReq::GET_FEATURES, &[]).unwrap();
        assert_eq!(reply.as_u64().unwrap(), 7);
        peer.write_all(&encode(request, REPLY, &[0; 8])).unwrap();
        assert!(matches!(
            link.call(FrontendReq::GET_CONFIG, &[]),
            Err(LinkError::Refused(_))
        ));
    }

    #[test]
    fn hostile_lengths_and_versions_end_the_conversation() {
        for header in [[2, 5, u32::MAX], [2, 4, 8], [2, 5, 4097]] {
            let (mut link, mut peer) = link();
            let bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
            peer.write_all(&bytes).unwrap();
            let result = link.call(FrontendReq::GET_FEATURES, &[]);
            assert!(matches!(result, Err(LinkError::Refused(_))), "{header:?}");
        }
    }

    #[test]
    fn a_configuration_change_is_acknowledged_while_a_reply_is_awaited() {
        let (mut link, mut peer) = link();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        link.set_channel(ours);
        theirs
            .write_all(&encode(
                BackendReq::CONFIG_CHANGE_MSG.into(),
                NEED_REPLY,
                &[],
            ))
            .unwrap();
        let back_end = std::thread::spawn(move || {
            let mut acknowledgement = [0; HEADER_SIZE + 8];
            theirs.read_exact(&mut acknowledgement).unwrap();
            let request = FrontendReq::GET_FEATURES.into();
            peer.write_all(&encode(request, REPLY, &[0; 8])).unwrap();
            (acknowledgement, peer)
        });
        link.call(FrontendReq::GET_FEATURES, &[]).unwrap();
        assert!(link.take_config_change());
        assert!(!link.take_config_change());
        assert_eq!(back_end.join().unwrap().0[HEADER_SIZE..], [0; 8]);
    }

    #[test]
    fn a_closed_socket_is_told_apart_and_an_order_interrupts_a_wait() {
        let (mut link, peer) = link();
        link.interrupt.as_ref().unwrap().raise();
        let result = link.call(FrontendReq::GET_FEATURES, &[]);
        assert!(matches!(result, Err(LinkError::Interrupted)));
        drop(peer);
        link.commit();
        let result = link.wait_for_reply(FrontendReq::GET_FEATURES);
        assert!(matches!(result, Err(LinkError::Gone(_))));
    }
}
