//! vhost-user messages as bytes on a Unix socket (QEMU's `docs/interop/vhost-user.rst`).
//!
//! Owns the message numbers, the header and the passing of file descriptors. Deliberately not built
//! on the `vhost` crate, which the daemons use: both ends sharing one misreading would hide it.
//! Knows nothing of what a message means, so that the hostile front-end can send nonsense with it.

use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Message numbers of the front-end's requests.
pub mod request {
    #![expect(missing_docs, reason = "the names are the specification's own")]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// Message numbers of the back-end's requests on the channel of `SET_BACKEND_REQ_FD`.
pub mod backend_request {
    /// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
    pub const CONFIG_CHANGE: u32 = 2;
}

/// Bits of `SET_PROTOCOL_FEATURES`.
pub mod protocol_feature {
    #![expect(missing_docs, reason = "the names are the specification's own")]
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const RARP: u64 = 1 << 2;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const NET_MTU: u64 = 1 << 4;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

/// Bits of the header's flags word.
pub mod flag {
    /// Protocol version, in every message.
    pub const VERSION: u32 = 1;
    /// This message is a reply.
    pub const REPLY: u32 = 4;
    /// The sender wants a `u64` reply, 0 meaning success.
    pub const NEED_REPLY: u32 = 8;
}

/// Bytes of a header: request, flags and body size, each a little-endian `u32`.
pub const HEADER_BYTES: usize = 12;

/// Largest body accepted from a back-end, in bytes; above it the stream is taken for garbage.
pub const MAX_BODY_BYTES: usize = 4096;

/// One received message.
#[derive(Debug)]
pub struct Message {
    /// Message number.
    pub request: u32,
    /// Flags word, see [`flag`].
    pub flags: u32,
    /// Body bytes.
    pub body: Vec<u8>,
    /// Descriptor that came with it; no reply of the protocol carries more than one.
    pub file: Option<File>,
}

impl Message {
    /// The body as one `u64`, as in most replies.
    ///
    /// # Errors
    /// `InvalidData` when the body has another size.
    pub fn value(&self) -> io::Result<u64> {
        match <[u8; 8]>::try_from(self.body.as_slice()) {
            Ok(bytes) => Ok(u64::from_le_bytes(bytes)),
            Err(_) => Err(invalid(format!(
                "reply to request {} has {} bytes instead of 8",
                self.request,
                self.body.len()
            ))),
        }
    }
}

/// Encodes header and body.
pub fn encode(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend_from_slice(&request.to_le_bytes());
    bytes.extend_from_slice(&(flags | flag::VERSION).to_le_bytes());
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// Sends `bytes` in one piece with descriptors attached to its first byte.
///
/// # Errors
/// The socket's error, or `WriteZero` when only a part was taken.
pub fn send_raw(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent != bytes.len() {
        return Err(io::Error::new(
            io::ErrorKind::WriteZero,
            format!("sent {sent} of {} bytes", bytes.len()),
        ));
    }
    Ok(())
}

/// Sends one message.
///
/// # Errors
/// As [`send_raw`].
pub fn send(
    socket: &UnixStream,
    (request, flags): (u32, u32),
    body: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    send_raw(socket, &encode(request, flags, body), fds)
}

/// Receives one message; waits no longer than the socket's read timeout.
///
/// # Errors
/// `UnexpectedEof` when the peer closed, `WouldBlock` on timeout, `InvalidData` for an oversized body.
pub fn receive(socket: &UnixStream) -> io::Result<Message> {
    let mut header = [0u8; HEADER_BYTES];
    let (got, file) = socket
        .recv_with_fd(&mut header)
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    if got == 0 {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "peer closed the connection",
        ));
    }
    let mut reader = socket;
    reader.read_exact(&mut header[got..])?;
    let [request, flags, size] = [0, 4, 8].map(|at| read_u32(&header, at));
    if size as usize > MAX_BODY_BYTES {
        return Err(invalid(format!(
            "message {request} announces a body of {size} bytes"
        )));
    }
    let mut body = vec![0; size as usize];
    reader.read_exact(&mut body)?;
    Ok(Message {
        request,
        flags,
        body,
        file,
    })
}

/// Little-endian `u32` at `at`.
///
/// # Panics
/// When fewer than `at + 4` bytes are there.
pub fn read_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("the slice has 4 bytes"))
}

/// Little-endian `u64` at `at`.
///
/// # Panics
/// When fewer than `at + 8` bytes are there.
pub fn read_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("the slice has 8 bytes"))
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}
