//! Network interfaces of the host, by the ioctls that change them: only while a back-end is opened.

#![expect(unsafe_code, reason = "ioctls take C structures")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Adds an interface to a bridge; `linux/sockios.h`.
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// The name of an interface: 1 to 15 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct InterfaceName(String);

impl InterfaceName {
    /// Checks `name`.
    ///
    /// # Errors
    /// `EINVAL`: no interface can have it.
    pub(super) fn new(name: &str) -> io::Result<InterfaceName> {
        let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
        let fits = (1..libc::IFNAMSIZ).contains(&name.len()) && name != "." && name != "..";
        if fits && name.bytes().all(plain) {
            return Ok(InterfaceName(name.to_owned()));
        }
        let what = format!(
            "'{name}' cannot be the name of a network interface (1 to 15 letters or digits)"
        );
        Err(io::Error::new(io::ErrorKind::InvalidInput, what))
    }

    /// A request that names it.
    pub(super) fn request(&self) -> libc::ifreq {
        // SAFETY: all-zero is a valid request.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (target, byte) in request.ifr_name.iter_mut().zip(self.0.bytes()) {
            *target = byte as libc::c_char;
        }
        request
    }

    /// The interface's number, `None` when there is no such interface in this network namespace.
    pub(super) fn index(&self) -> Option<u32> {
        let name = CString::new(self.0.as_str()).ok()?;
        // SAFETY: a string that ends with NUL.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        (index > 0).then_some(index)
    }
}

impl std::fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name in a request that the kernel filled in.
pub(super) fn name_of(request: &libc::ifreq) -> String {
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0);
    String::from_utf8_lossy(&name.map(|byte| *byte as u8).collect::<Vec<_>>()).into_owned()
}

/// Changes interfaces of the calling thread's network namespace.
pub(super) struct Interfaces {
    socket: OwnedFd,
}

impl Interfaces {
    /// Opens what the ioctls are made on.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn open() -> io::Result<Interfaces> {
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_INET, kind, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Interfaces {
            // SAFETY: a call that succeeded gives a new descriptor, which nobody else owns.
            socket: unsafe { OwnedFd::from_raw_fd(fd) },
        })
    }

    fn ioctl(&self, code: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
        let request: *mut libc::ifreq = request;
        // SAFETY: every code used here reads and writes one `ifreq`.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), code, request) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Sets the largest packet in bytes, without the Ethernet header.
    ///
    /// # Errors
    /// The host's: no permission, or a size that the interface does not do.
    pub(super) fn set_mtu(&self, name: &InterfaceName, mtu: u32) -> io::Result<()> {
        let mut request = name.request();
        request.ifr_ifru.ifru_mtu = i32::try_from(mtu).map_err(io::Error::other)?;
        self.ioctl(libc::SIOCSIFMTU, &mut request)
    }

    /// Brings the interface up or down.
    ///
    /// # Errors
    /// The host's: no permission.
    pub(super) fn set_up(&self, name: &InterfaceName, up: bool) -> io::Result<()> {
        let mut request = name.request();
        self.ioctl(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel filled this member in.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let bit = libc::IFF_UP as libc::c_short;
        let wanted = if up { flags | bit } else { flags & !bit };
        if wanted == flags {
            return Ok(());
        }
        request.ifr_ifru.ifru_flags = wanted;
        self.ioctl(libc::SIOCSIFFLAGS, &mut request)
    }

    /// Makes the interface a port of `bridge`. Nothing happens when it is one already.
    ///
    /// # Errors
    /// The host's: no permission, no such bridge, a port of another bridge.
    pub(super) fn add_to_bridge(
        &self,
        name: &InterfaceName,
        bridge: &InterfaceName,
    ) -> io::Result<()> {
        let index = name.index();
        let index = index.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
        let mut request = bridge.request();
        request.ifr_ifru.ifru_ifindex = index as i32;
        let added = self.ioctl(SIOCBRADDIF, &mut request);
        match added {
            // A port already: of this bridge?
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let port = format!("/sys/class/net/{bridge}/brif/{name}");
                match std::path::Path::new(&port).exists() {
                    true => Ok(()),
                    false => Err(error),
                }
            }
            added => added,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        assert_eq!(InterfaceName::new("tap0").unwrap().to_string(), "tap0");
        for wrong in ["", "a/b", "a b", ".", "..", "sixteen-letters-", "tap\0"] {
            let error = InterfaceName::new(wrong).unwrap_err();
            assert!(error.to_string().contains("cannot be the name"), "{wrong}");
        }
    }

    #[test]
    fn an_interface_that_is_not_there_has_no_number() {
        assert_eq!(InterfaceName::new("no-such-iface").unwrap().index(), None);
        assert!(InterfaceName::new("lo").unwrap().index().is_some());
    }
}
