//! Packet sockets (packet(7)): opening one on an interface, and its options.

#![expect(unsafe_code, reason = "socket options and addresses are C structures")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::netdevs::interface::InterfaceName;

// `linux/if_packet.h`
const PACKET_AUXDATA: i32 = 8;
const PACKET_VNET_HDR: i32 = 15;
const PACKET_FANOUT: i32 = 18;
const PACKET_IGNORE_OUTGOING: i32 = 23;
const PACKET_FANOUT_HASH: i32 = 0;
const PACKET_FANOUT_FLAG_ROLLOVER: i32 = 0x1000;
const PACKET_FANOUT_FLAG_UNIQUEID: i32 = 0x2000;

/// Bytes that frames waiting for a guest may occupy.
const RECEIVE_BUFFER: i32 = 4 << 20;
/// The same where nobody reads: the kernel makes it its smallest.
const SMALLEST_BUFFER: i32 = 1;

/// A packet socket bound to an interface.
#[derive(Debug)]
pub(super) struct PacketSocket {
    fd: OwnedFd,
}

impl PacketSocket {
    /// A socket that sends to, and receives from, the interface with this number.
    pub(super) fn open(index: u32) -> io::Result<PacketSocket> {
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // Of no protocol: nothing is received before the socket is bound.
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = PacketSocket {
            // SAFETY: a call that succeeded gives a new descriptor, which nobody else owns.
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
        };
        socket.set(libc::SOL_PACKET, PACKET_VNET_HDR, &1i32)?;
        socket.set(libc::SOL_PACKET, PACKET_AUXDATA, &1i32)?;
        socket.set(libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, &1i32)?;
        // Frames are for the guest's address, not for the interface's.
        let membership = libc::packet_mreq {
            mr_ifindex: index as i32,
            mr_type: libc::PACKET_MR_PROMISC as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        socket.set(libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &membership)?;
        socket.bind(index)?;
        Ok(socket)
    }

    fn bind(&self, index: u32) -> io::Result<()> {
        // SAFETY: all-zero is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index as i32;
        let len = size_of_val(&address) as libc::socklen_t;
        let start = (&raw const address).cast();
        // SAFETY: an address as long as told.
        match unsafe { libc::bind(self.fd.as_raw_fd(), start, len) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn set<T>(&self, level: i32, option: i32, value: &T) -> io::Result<()> {
        let (start, len) = (std::ptr::from_ref(value).cast(), size_of::<T>() as u32);
        // SAFETY: a value as long as told.
        match unsafe { libc::setsockopt(self.fd.as_raw_fd(), level, option, start, len) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes the socket the first of a group among which the kernel divides flows; the group's number.
    pub(super) fn found_group(&self) -> io::Result<u16> {
        self.set(
            libc::SOL_PACKET,
            PACKET_FANOUT,
            &(group(0) | PACKET_FANOUT_FLAG_UNIQUEID << 16),
        )?;
        let mut value = 0i32;
        let mut len = size_of_val(&value) as libc::socklen_t;
        let start = (&raw mut value).cast();
        let (fd, level) = (self.fd.as_raw_fd(), libc::SOL_PACKET);
        // SAFETY: room as long as told.
        match unsafe { libc::getsockopt(fd, level, PACKET_FANOUT, start, &raw mut len) } {
            0 => Ok(value as u16),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes the socket one of a group.
    pub(super) fn join_group(&self, id: u16) -> io::Result<()> {
        self.set(libc::SOL_PACKET, PACKET_FANOUT, &group(id))
    }

    /// Sets how much may wait. A socket that nobody reads is full with a frame or two, and the others of its group get its
    /// flows then.
    pub(super) fn set_in_use(&self, in_use: bool) -> io::Result<()> {
        if !in_use {
            return self.set(libc::SOL_SOCKET, libc::SO_RCVBUF, &SMALLEST_BUFFER);
        }
        // Beyond the host's limit where that is allowed.
        let forced = self.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &RECEIVE_BUFFER);
        forced.or_else(|_| self.set(libc::SOL_SOCKET, libc::SO_RCVBUF, &RECEIVE_BUFFER))
    }

    /// Throws away what waits. Gives up on a network that is faster than that.
    pub(super) fn drain(&self) {
        for _ in 0..100_000 {
            let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
            let mut byte = [0u8; 16];
            let (start, len) = (byte.as_mut_ptr().cast(), byte.len());
            // SAFETY: room as long as told.
            if unsafe { libc::recv(self.fd.as_raw_fd(), start, len, flags) } < 0 {
                break;
            }
        }
    }

    /// Whether the interface is still there.
    pub(super) fn has_interface(&self) -> io::Result<bool> {
        // SAFETY: all-zero is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut len = size_of_val(&address) as libc::socklen_t;
        let start = (&raw mut address).cast();
        // SAFETY: room as long as told.
        match unsafe { libc::getsockname(self.fd.as_raw_fd(), start, &raw mut len) } {
            0 => Ok(address.sll_ifindex > 0),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What PACKET_FANOUT is told of group `id`.
fn group(id: u16) -> i32 {
    i32::from(id) | (PACKET_FANOUT_HASH | PACKET_FANOUT_FLAG_ROLLOVER) << 16
}

/// What kind of interface there is under `name`, as errors need it: its number.
pub(super) fn index_of(name: &InterfaceName) -> io::Result<u32> {
    let missing = || {
        let what = format!("there is no interface '{name}' in this network namespace");
        io::Error::new(io::ErrorKind::NotFound, what)
    };
    name.index().ok_or_else(missing)
}
