//! Unix and TCP stream sockets and descriptor readiness on the ring.
//!
//! In a simulated world there are no sockets: everything that would wait gives `ENOSYS`.
#![expect(
    unsafe_code,
    reason = "message headers and socket addresses are raw C structures"
)]

mod gather;

pub(crate) use gather::Gather;
pub use gather::Part;

use crate::op::{InFlight, Op};
use crate::{Buffer, Errno};
use io_uring::types;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr,
    bind, connect, getpeername, getsockname, getsockopt, listen, setsockopt, shutdown, socket,
    sockopt::{Ipv6V6Only, PeerCredentials, ReuseAddr, TcpNoDelay},
};
use std::io;
use std::mem::{self, MaybeUninit};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::ptr;
use std::sync::Arc;

/// Descriptors that one message can carry (SCM_MAX_FD of the kernel).
const MAX_FDS: usize = 253;

/// Most bytes of one transfer (MAX_RW_COUNT of the kernel).
const MAX_TRANSFER: usize = 0x7fff_f000;

/// A socket that operations in flight keep open.
#[derive(Clone)]
pub(crate) struct Socket {
    fd: Arc<OwnedFd>,
}

impl Socket {
    fn new(fd: OwnedFd) -> io::Result<Socket> {
        // The ring fails at once on a non-blocking socket instead of waiting.
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        if flags.contains(OFlag::O_NONBLOCK) {
            fcntl(&fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
        }
        Ok(Socket { fd: Arc::new(fd) })
    }

    /// Takes the result of an accept.
    pub(crate) fn accepted(result: i32) -> Option<Socket> {
        let valid = result >= 0;
        // SAFETY: an accept that succeeded gives a new descriptor, which nobody else owns.
        let fd = valid.then(|| unsafe { OwnedFd::from_raw_fd(result) })?;
        Some(Socket { fd: Arc::new(fd) })
    }

    pub(crate) fn fd(&self) -> types::Fd {
        types::Fd(self.fd.as_raw_fd())
    }

    fn shutdown(&self) {
        // An error says that the peer has already gone.
        let _ = shutdown(self.fd.as_raw_fd(), Shutdown::Both);
    }
}

/// The address of a socket, for the kernel to read.
pub(crate) enum SocketAddress {
    Unix(UnixAddr),
    Inet(SockaddrStorage),
}

impl SocketAddress {
    pub(crate) fn as_ptr(&self) -> *const libc::sockaddr {
        match self {
            SocketAddress::Unix(address) => address.as_ptr().cast(),
            SocketAddress::Inet(address) => address.as_ptr(),
        }
    }

    pub(crate) fn len(&self) -> libc::socklen_t {
        match self {
            SocketAddress::Unix(address) => SockaddrLike::len(address),
            SocketAddress::Inet(address) => SockaddrLike::len(address),
        }
    }
}

/// A message with descriptors, for `recvmsg` and `sendmsg`.
pub(crate) struct Message {
    pub(crate) socket: Socket,
    data: Vec<u8>,
    /// Space for control messages, aligned for their headers.
    control: Vec<u64>,
    control_len: usize,
    iovec: libc::iovec,
    header: libc::msghdr,
    /// Descriptors being sent, kept open until they are.
    _fds: Vec<OwnedFd>,
}

impl Message {
    fn new(socket: Socket, data: Vec<u8>, fds: usize) -> Box<Message> {
        let control_len = if fds == 0 {
            0
        } else {
            // SAFETY: only computes.
            unsafe { libc::CMSG_SPACE((fds * size_of::<RawFd>()) as u32) as usize }
        };
        Box::new(Message {
            socket,
            data,
            control: vec![0; control_len.div_ceil(size_of::<u64>())],
            control_len,
            iovec: libc::iovec {
                iov_base: ptr::null_mut(),
                iov_len: 0,
            },
            // SAFETY: all-zero is a valid header.
            header: unsafe { MaybeUninit::zeroed().assume_init() },
            _fds: Vec::new(),
        })
    }

    /// The header, pointing into this (boxed, hence unmoving) message.
    pub(crate) fn header(&mut self) -> *mut libc::msghdr {
        self.header.msg_iov = &raw mut self.iovec;
        self.header.msg_iovlen = 1;
        if self.control_len > 0 {
            self.header.msg_control = self.control.as_mut_ptr().cast();
            self.header.msg_controllen = self.control_len;
        }
        &raw mut self.header
    }

    fn receiving(socket: Socket, len: usize, max_fds: usize) -> Box<Message> {
        // One more than allowed, to tell "too many" from "all".
        let room = (max_fds + 1).min(MAX_FDS);
        let mut message = Self::new(socket, Vec::with_capacity(len), room);
        message.iovec = libc::iovec {
            iov_base: message.data.as_mut_ptr().cast(),
            iov_len: len,
        };
        message
    }

    fn sending(socket: Socket, data: Vec<u8>, fds: Vec<OwnedFd>) -> Box<Message> {
        let mut message = Self::new(socket, data, fds.len());
        message.iovec = libc::iovec {
            iov_base: message.data.as_mut_ptr().cast(),
            iov_len: message.data.len(),
        };
        if fds.is_empty() {
            return message;
        }
        let header = message.header();
        // SAFETY: the header names the control buffer, which has room for one message with all
        // descriptors (`new`).
        unsafe {
            let control = libc::CMSG_FIRSTHDR(header);
            (*control).cmsg_level = libc::SOL_SOCKET;
            (*control).cmsg_type = libc::SCM_RIGHTS;
            let bytes = (fds.len() * size_of::<RawFd>()) as u32;
            (*control).cmsg_len = libc::CMSG_LEN(bytes) as usize;
            let place = libc::CMSG_DATA(control).cast::<RawFd>();
            for (index, fd) in fds.iter().enumerate() {
                place.add(index).write_unaligned(fd.as_raw_fd());
            }
        }
        message._fds = fds;
        message
    }

    /// The descriptors that came with a received message; a second call gives none.
    pub(crate) fn take_fds(&mut self) -> Vec<OwnedFd> {
        let mut fds = Vec::new();
        if self.header.msg_controllen == 0 || self.header.msg_control.is_null() {
            return fds;
        }
        let header = &raw mut self.header;
        // SAFETY: the kernel has filled the control buffer up to `msg_controllen` with whole
        // control messages; every descriptor in it is new and owned by nobody else.
        unsafe {
            let mut control = libc::CMSG_FIRSTHDR(header);
            while !control.is_null() {
                if (*control).cmsg_level == libc::SOL_SOCKET
                    && (*control).cmsg_type == libc::SCM_RIGHTS
                {
                    let bytes = (*control).cmsg_len - libc::CMSG_LEN(0) as usize;
                    let place = libc::CMSG_DATA(control).cast::<RawFd>();
                    for index in 0..bytes / size_of::<RawFd>() {
                        let fd = place.add(index).read_unaligned();
                        fds.push(OwnedFd::from_raw_fd(fd));
                    }
                }
                control = libc::CMSG_NXTHDR(header, control);
            }
        }
        self.header.msg_controllen = 0;
        fds
    }
}

/// A connected stream socket (unix or TCP).
pub struct Stream {
    socket: Socket,
}

impl Stream {
    /// Takes over a connected socket.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Stream> {
        let socket = Socket::new(fd)?;
        Ok(Stream { socket })
    }

    /// A connection on the socket that the process was started with under this number.
    pub fn duplicate(number: RawFd) -> io::Result<Stream> {
        // SAFETY: the number is only handed to system calls, which check it.
        let inherited = unsafe { BorrowedFd::borrow_raw(number) };
        getsockopt(&inherited, nix::sys::socket::sockopt::SockType)?;
        Self::from_fd(inherited.try_clone_to_owned()?)
    }

    /// Connects to a unix socket.
    pub async fn connect_unix(path: &Path) -> Result<Stream, Errno> {
        let address = UnixAddr::new(path)?;
        let socket = Socket {
            fd: Arc::new(unix_socket()?),
        };
        Self::connect(socket, SocketAddress::Unix(address)).await
    }

    /// Connects to a TCP port. Small messages are sent at once.
    pub async fn connect_tcp(address: SocketAddr) -> Result<Stream, Errno> {
        let fd = tcp_socket(address)?;
        setsockopt(&fd, TcpNoDelay, &true)?;
        let socket = Socket { fd: Arc::new(fd) };
        Self::connect(socket, SocketAddress::Inet(address.into())).await
    }

    async fn connect(socket: Socket, address: SocketAddress) -> Result<Stream, Errno> {
        InFlight::begin(Op::Connect(socket.clone(), Box::new(address)))
            .finish()
            .await?;
        Ok(Stream { socket })
    }

    /// Fills `buffer`; resolves to the number of bytes received, which is smaller only at the end of the stream. At
    /// most 2 GiB. Dropping the future loses what was received.
    pub async fn recv_exact(&self, buffer: Buffer) -> Result<usize, Errno> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if buffer.len() > MAX_TRANSFER {
            return Err(Errno::EMSGSIZE);
        }
        let gather = Gather::new(self.socket.clone(), vec![Part::Buffer(buffer)]);
        let (count, _op) = InFlight::begin(Op::Fill(gather)).finish().await?;
        Ok(count as usize)
    }

    /// Sends all of `parts`, in order and without copying them. At most 2 GiB.
    pub async fn send_parts(&self, parts: Vec<Part>) -> Result<(), Errno> {
        let gather = Gather::new(self.socket.clone(), parts);
        match gather.length() {
            0 => Ok(()),
            1..=MAX_TRANSFER => {
                let sent = InFlight::begin(Op::SendGather(gather));
                sent.finish().await.map(drop)
            }
            _ => Err(Errno::EMSGSIZE),
        }
    }

    /// The peer's address, when it has one of TCP.
    pub fn peer_address(&self) -> Option<SocketAddr> {
        let address: SockaddrStorage = getpeername(self.socket.fd.as_raw_fd()).ok()?;
        inet_address(&address)
    }

    /// Receives at most `len` bytes; empty at end of stream.
    pub async fn recv(&self, len: usize) -> Result<Vec<u8>, Errno> {
        let data = Vec::with_capacity(len);
        let received = InFlight::begin(Op::Recv(self.socket.clone(), data));
        let (count, op) = received.finish().await?;
        let Op::Recv(_, mut data) = op else {
            unreachable!("an operation comes back as it went in");
        };
        // SAFETY: the kernel has written `count` bytes into the spare capacity of the empty list.
        unsafe { data.set_len(count as usize) };
        data.truncate(len);
        Ok(data)
    }

    /// Receives at most `len` bytes and at most `max_fds` descriptors passed along. More
    /// descriptors than that are closed and the result is `EMSGSIZE`.
    pub async fn recv_with_fds(
        &self,
        len: usize,
        max_fds: usize,
    ) -> Result<(Vec<u8>, Vec<OwnedFd>), Errno> {
        let message = Message::receiving(self.socket.clone(), len, max_fds);
        let received = InFlight::begin(Op::RecvMessage(message));
        let (count, op) = received.finish().await?;
        let Op::RecvMessage(mut message) = op else {
            unreachable!("an operation comes back as it went in");
        };
        let fds = message.take_fds();
        if fds.len() > max_fds || message.header.msg_flags & libc::MSG_CTRUNC != 0 {
            return Err(Errno::EMSGSIZE);
        }
        let mut data = mem::take(&mut message.data);
        // SAFETY: the kernel has written `count` bytes from the start of the list's memory, at
        // most the `len` of its capacity that the iovec named.
        unsafe { data.set_len(count as usize) };
        Ok((data, fds))
    }

    /// Sends all of `data`.
    pub async fn send_all(&self, data: Vec<u8>) -> Result<(), Errno> {
        if data.is_empty() {
            return Ok(());
        }
        let op = Op::Send(self.socket.clone(), data, 0);
        InFlight::begin(op).finish().await.map(drop)
    }

    /// Sends all of `data`, passing `fds` with its first byte.
    pub async fn send_with_fds(&self, data: Vec<u8>, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        if fds.is_empty() {
            return self.send_all(data).await;
        }
        if data.is_empty() || fds.len() > MAX_FDS {
            return Err(Errno::EINVAL);
        }
        let kept = fds.iter().map(BorrowedFd::try_clone_to_owned);
        let kept = kept.collect::<io::Result<Vec<_>>>();
        let kept = kept.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
        let message = Message::sending(self.socket.clone(), data, kept);
        let sent = InFlight::begin(Op::SendMessage(message));
        let (count, op) = sent.finish().await?;
        let Op::SendMessage(mut message) = op else {
            unreachable!("an operation comes back as it went in");
        };
        let mut rest = mem::take(&mut message.data);
        rest.drain(..count as usize);
        self.send_all(rest).await
    }

    /// Shuts both directions down; pending receives end.
    pub fn shutdown(&self) {
        self.socket.shutdown();
    }

    /// Shuts the stream down from elsewhere, another thread perhaps.
    pub fn closer(&self) -> Closer {
        Closer(self.socket.clone())
    }
}

/// Ends a [`Stream`] that somebody else has. Keeps its descriptor open.
#[derive(Clone)]
pub struct Closer(Socket);

impl Closer {
    /// Shuts both directions down; pending receives end.
    pub fn shutdown(&self) {
        self.0.shutdown();
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.fd.as_fd()
    }
}

/// A listening socket.
pub struct Listener {
    socket: Socket,
}

impl Listener {
    /// Takes over a bound, listening socket (socket activation).
    pub fn from_fd(fd: OwnedFd) -> io::Result<Listener> {
        let socket = Socket::new(fd)?;
        Ok(Listener { socket })
    }

    /// Binds a unix socket, replacing a stale one that nobody listens on.
    pub fn bind_unix(path: &Path) -> io::Result<Listener> {
        let address = UnixAddr::new(path)?;
        let fd = unix_socket()?;
        let mut bound = bind(fd.as_raw_fd(), &address);
        if bound == Err(Errno::EADDRINUSE) && is_stale(path, &address)? {
            std::fs::remove_file(path)?;
            bound = bind(fd.as_raw_fd(), &address);
        }
        bound?;
        listen(&fd, Backlog::MAXCONN)?;
        Self::from_fd(fd)
    }

    /// Binds a TCP port; 0 takes a free one. An IPv6 address takes no IPv4 clients. Small messages of accepted connections are sent at
    /// once.
    pub fn bind_tcp(address: SocketAddr) -> io::Result<Listener> {
        let fd = tcp_socket(address)?;
        setsockopt(&fd, ReuseAddr, &true)?;
        // Accepted sockets inherit it.
        setsockopt(&fd, TcpNoDelay, &true)?;
        if address.is_ipv6() {
            setsockopt(&fd, Ipv6V6Only, &true)?;
        }
        bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
        listen(&fd, Backlog::MAXCONN)?;
        Self::from_fd(fd)
    }

    /// The address that it is bound to, when it is one of TCP.
    pub fn local_address(&self) -> Option<SocketAddr> {
        let address: SockaddrStorage = getsockname(self.socket.fd.as_raw_fd()).ok()?;
        inet_address(&address)
    }

    /// The next connection.
    pub async fn accept(&self) -> Result<Stream, Errno> {
        let op = Op::Accept(self.socket.clone());
        let (fd, _op) = InFlight::begin(op).finish().await?;
        let socket = Socket::accepted(fd as i32).expect("a result that is not an error");
        Ok(Stream { socket })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.fd.as_fd()
    }
}

fn unix_socket() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

fn tcp_socket(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
}

fn inet_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address
        .as_sockaddr_in()
        .map(|v4| SocketAddr::V4((*v4).into()));
    v4.or_else(|| {
        address
            .as_sockaddr_in6()
            .map(|v6| SocketAddr::V6((*v6).into()))
    })
}

/// Whether `path` is a socket that nobody listens on any more.
fn is_stale(path: &Path, address: &UnixAddr) -> io::Result<bool> {
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Ok(false);
    }
    let probe = unix_socket()?;
    fcntl(&probe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    match connect(probe.as_raw_fd(), address) {
        Err(Errno::ECONNREFUSED) => Ok(true),
        // A killed process' ring keeps its listener for a moment after the process is gone.
        Ok(()) => Ok(getsockopt(&probe, PeerCredentials).is_ok_and(|peer| has_ended(peer.pid()))),
        Err(_) => Ok(false),
    }
}

/// Whether process `pid` is gone or a zombie; false when that cannot be told.
fn has_ended(pid: libc::pid_t) -> bool {
    if pid <= 0 {
        return false;
    }
    // SAFETY: no pointers are passed.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if result < 0 {
        return Errno::last() == Errno::ESRCH;
    }
    // SAFETY: a call that succeeded gives a new descriptor, which nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(result as RawFd) };
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ended| ended > 0)
}

/// Waits for `events` (`libc::POLLIN`, ...) on a descriptor; resolves to the events seen.
pub async fn poll_fd(fd: BorrowedFd<'_>, events: i16) -> Result<i16, Errno> {
    let op = Op::Poll(fd.as_raw_fd(), u32::from(events as u16));
    let (seen, _op) = InFlight::begin(op).finish().await?;
    Ok(seen as i16)
}
