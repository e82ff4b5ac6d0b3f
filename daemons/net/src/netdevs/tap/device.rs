//! Descriptors of tap and macvtap interfaces: opening them, and the ioctls that set them up.
//!
//! Both kinds of interface take the same ioctls. Each descriptor is one queue; all of an interface share its offloads.

#![expect(unsafe_code, reason = "ioctls take C structures")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use libc::{
    TUNGETIFF, TUNGETSNDBUF, TUNSETIFF, TUNSETOFFLOAD, TUNSETQUEUE, TUNSETSNDBUF, TUNSETVNETHDRSZ,
    TUNSETVNETLE,
};

use crate::frame::VnetHeader;
use crate::link::Offloads;
use crate::netdevs::interface::{InterfaceName, name_of};
use crate::netdevs::vectors;

const TUN: &str = "/dev/net/tun";

/// What a descriptor of an interface is asked to be.
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// ioctls that a queue makes while it serves, for the sandbox.
pub const SERVING_IOCTLS: [u64; 2] = [TUNSETOFFLOAD, TUNSETQUEUE];

/// A descriptor of an interface.
#[derive(Debug)]
pub(super) struct Device {
    fd: OwnedFd,
    /// The interface's name when the descriptor was set up.
    name: String,
    flags: i32,
}

impl Device {
    /// Makes `name` a queue of a tap interface, which is created when it does not exist.
    pub(super) fn tap(name: &str, multi_queue: bool) -> io::Result<Device> {
        let fd = open(Path::new(TUN)).map_err(|error| {
            let what = format!("cannot open {TUN}: {error} (is the tun module loaded?)");
            io::Error::new(error.kind(), what)
        })?;
        let mut request = match name {
            // The kernel numbers these.
            "" => InterfaceName::new("tap%d")?.request(),
            _ => InterfaceName::new(name)?.request(),
        };
        set_flags(&fd, &mut request, multi_queue)?;
        Device::set_up(fd)
    }

    /// A queue of the macvtap interface with this number.
    pub(super) fn macvtap(index: u32) -> io::Result<Device> {
        let path = format!("/dev/tap{index}");
        let fd = open(Path::new(&path)).map_err(|error| {
            io::Error::new(error.kind(), format!("cannot open {path}: {error}"))
        })?;
        // SAFETY: all-zero is a valid request; the name is not looked at.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        set_flags(&fd, &mut request, true)?;
        Device::set_up(fd)
    }

    /// A descriptor that somebody else opened and attached to an interface.
    pub(super) fn inherited(fd: OwnedFd) -> io::Result<Device> {
        vectors::set_nonblocking(&fd)?;
        Device::set_up(fd)
    }

    fn set_up(fd: OwnedFd) -> io::Result<Device> {
        // SAFETY: all-zero is a valid request.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        ioctl(&fd, TUNGETIFF, &raw mut request).map_err(|error| {
            let what = format!("the descriptor is not one of a tap interface: {error}");
            io::Error::new(error.kind(), what)
        })?;
        // SAFETY: the kernel filled this member in.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & libc::IFF_TAP == 0 {
            let what = "the descriptor is one of a tun interface, which has no Ethernet frames";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        if flags & libc::IFF_NO_PI == 0 {
            let what = "the tap interface puts packet information before frames (needs IFF_NO_PI)";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let device = Device {
            name: name_of(&request),
            fd,
            flags,
        };
        if device.has_header() {
            let mut size = VnetHeader::LEN as i32;
            ioctl(&device.fd, TUNSETVNETHDRSZ, &raw mut size)?;
            let mut on = 1i32;
            ioctl(&device.fd, TUNSETVNETLE, &raw mut on)?;
        }
        Ok(device)
    }

    /// The descriptor, as somebody else would pass it on.
    #[cfg(test)]
    pub(super) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// The interface's name; kernels number `tap%d`.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether frames have a virtio-net header before them.
    pub(super) fn has_header(&self) -> bool {
        self.flags & libc::IFF_VNET_HDR != 0
    }

    /// Whether the interface can have several queues.
    pub(super) fn is_multi_queue(&self) -> bool {
        self.flags & libc::IFF_MULTI_QUEUE != 0
    }

    /// Limits what frames that were sent and not taken in may occupy, in bytes.
    pub(super) fn set_send_buffer(&self, bytes: i32) -> io::Result<()> {
        let mut bytes = bytes;
        ioctl(&self.fd, TUNSETSNDBUF, &raw mut bytes)
    }

    /// Whether the interface takes or refuses a frame at once, however many came before. Not known of macvtap.
    pub(super) fn never_waits(&self) -> bool {
        let mut bytes = 0i32;
        ioctl(&self.fd, TUNGETSNDBUF, &raw mut bytes).is_ok() && bytes == i32::MAX
    }

    /// Whether the kernel gives frames to this queue. The interface's last one may be left out too.
    pub(super) fn set_attached(&self, attached: bool) -> io::Result<()> {
        // SAFETY: all-zero is a valid request.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let flags = match attached {
            true => libc::IFF_ATTACH_QUEUE,
            false => libc::IFF_DETACH_QUEUE,
        };
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        ioctl(&self.fd, TUNSETQUEUE, &raw mut request)
    }

    /// Tells the interface what its reader does by itself.
    pub(super) fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let bits = offload_bits(offloads);
        // SAFETY: the argument is a number.
        match unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                TUNSETOFFLOAD,
                libc::c_ulong::from(bits),
            )
        } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// What this kernel's interfaces can be told in [`Device::set_offloads`]; told afterwards: nothing.
    pub(super) fn probe_offloads(&self) -> io::Result<Offloads> {
        if !self.has_header() {
            return Ok(Offloads::NONE);
        }
        // Segmentation of UDP is known since Linux 6.2.
        let without_uso = Offloads {
            uso4: false,
            uso6: false,
            ..Offloads::ALL
        };
        let known = match self.set_offloads(Offloads::ALL) {
            Ok(()) => Offloads::ALL,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => without_uso,
            Err(error) => return Err(error),
        };
        self.set_offloads(Offloads::NONE)?;
        Ok(known)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// `TUN_F_*`. Nothing goes without checksums, and UDP is segmented for both versions of IP or for none.
fn offload_bits(offloads: Offloads) -> u32 {
    if !offloads.csum {
        return 0;
    }
    let mut bits = libc::TUN_F_CSUM;
    if offloads.tso4 {
        bits |= libc::TUN_F_TSO4;
    }
    if offloads.tso6 {
        bits |= libc::TUN_F_TSO6;
    }
    if offloads.ecn && (offloads.tso4 || offloads.tso6) {
        bits |= libc::TUN_F_TSO_ECN;
    }
    if offloads.uso4 && offloads.uso6 {
        bits |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
    }
    bits
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    Ok(options.custom_flags(libc::O_NONBLOCK).open(path)?.into())
}

fn set_flags(fd: &OwnedFd, request: &mut libc::ifreq, multi_queue: bool) -> io::Result<()> {
    let multi_queue = if multi_queue {
        libc::IFF_MULTI_QUEUE
    } else {
        0
    };
    request.ifr_ifru.ifru_flags = (FLAGS | multi_queue) as libc::c_short;
    ioctl(fd, TUNSETIFF, request)
}

fn ioctl<T>(fd: &OwnedFd, code: libc::Ioctl, argument: *mut T) -> io::Result<()> {
    // SAFETY: every code here is called with what it reads and writes: an `ifreq` or an `i32`.
    match unsafe { libc::ioctl(fd.as_raw_fd(), code, argument) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_that_go_only_together_are_asked_for_together() {
        assert_eq!(offload_bits(Offloads::NONE), 0);
        assert_eq!(
            offload_bits(Offloads::ALL),
            0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40
        );
        let without_csum = Offloads {
            csum: false,
            ..Offloads::ALL
        };
        assert_eq!(offload_bits(without_csum), 0);
        let half = Offloads {
            csum: true,
            ecn: true,
            uso4: true,
            ..Offloads::NONE
        };
        assert_eq!(offload_bits(half), 0x1);
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let error = Device::inherited(file.into()).unwrap_err();
        assert!(
            error.to_string().contains("not one of a tap interface"),
            "{error}"
        );
    }
}
