//! A small synchronous front-end: messages over a socket, memory in a memfd, one driver per ring.

#![expect(unsafe_code, reason = "the driver's side of shared memory")]

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::Duration;

use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use vhost::vhost_user::message::FrontendReq as Req;

pub const NEED_REPLY: u32 = 8;
/// Where the test's memory begins for the guest.
pub const GUEST_BASE: u64 = 0x10_0000;
/// Where the front-end says that it has it mapped.
pub const USER_BASE: u64 = 0x7f00_0000_0000;
/// How long a test waits for what must come.
pub const PATIENCE_MS: u16 = 10_000;

/// Shared memory, mapped.
pub struct Memory {
    pub fd: OwnedFd,
    base: *mut u8,
    len: usize,
}

// SAFETY: raw bytes, reached through raw pointers only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn new(len: usize) -> Arc<Memory> {
        let flags = nix::sys::memfd::MFdFlags::empty();
        let fd = nix::sys::memfd::memfd_create(c"guest", flags).unwrap();
        nix::unistd::ftruncate(&fd, len as i64).unwrap();
        Memory::map(fd, len)
    }

    pub fn map(fd: OwnedFd, len: usize) -> Arc<Memory> {
        // SAFETY: a fresh shared mapping of an open file.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        Arc::new(Memory {
            fd,
            base: base.cast(),
            len,
        })
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len);
        // SAFETY: inside the mapping.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.base.add(offset), bytes.len()) };
    }

    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.len);
        let mut bytes = vec![0; len];
        // SAFETY: inside the mapping.
        unsafe { std::ptr::copy(self.base.add(offset), bytes.as_mut_ptr(), len) };
        bytes
    }

    pub fn u16(&self, offset: usize) -> &AtomicU16 {
        assert!(offset + 2 <= self.len);
        // SAFETY: inside the mapping; offsets used are even.
        unsafe { &*self.base.add(offset).cast() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`, used by nobody else.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

pub fn eventfd() -> OwnedFd {
    use nix::sys::eventfd::{EfdFlags, EventFd};
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap().into()
}

/// Waits until `fd` is signalled and empties it; false when that does not happen in time.
pub fn wait(fd: BorrowedFd<'_>, timeout_ms: u16) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    if poll(&mut fds, PollTimeout::from(timeout_ms)).unwrap() == 0 {
        return false;
    }
    nix::unistd::read(fd, &mut [0; 8]).is_ok()
}

/// A ring as its driver sees it. Layout: descriptors, available, used, then 64 buffers of 4096.
pub struct Driver {
    pub memory: Arc<Memory>,
    pub offset: usize,
    pub size: u16,
    pub avail: u16,
    pub used: u16,
    pub kick: OwnedFd,
    pub call: OwnedFd,
    pub err: OwnedFd,
    pub event_idx: bool,
}

/// Flag of a descriptor.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

impl Driver {
    pub fn new(memory: &Arc<Memory>, offset: usize, size: u16) -> Driver {
        Driver {
            memory: memory.clone(),
            offset,
            size,
            avail: 0,
            used: 0,
            kick: eventfd(),
            call: eventfd(),
            err: eventfd(),
            event_idx: true,
        }
    }

    pub fn avail_offset(&self) -> usize {
        self.offset + 16 * usize::from(self.size)
    }

    pub fn used_offset(&self) -> usize {
        (self.avail_offset() + 6 + 2 * usize::from(self.size)).next_multiple_of(4)
    }

    /// Offset in memory of a head's 4096 bytes.
    pub fn buffer(&self, head: u16) -> usize {
        let rings = self.used_offset() + 6 + 8 * usize::from(self.size);
        rings.next_multiple_of(4096) + 4096 * usize::from(head)
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of a descriptor")]
    pub fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = self.offset + 16 * usize::from(index);
        self.memory.write(at, &addr.to_le_bytes());
        self.memory.write(at + 8, &len.to_le_bytes());
        self.memory.write(at + 12, &flags.to_le_bytes());
        self.memory.write(at + 14, &next.to_le_bytes());
    }

    /// Makes a request of `data` with as much room for the answer, in descriptors `head`,
    /// `head + 1`.
    pub fn request(&mut self, head: u16, data: &[u8]) {
        let at = self.buffer(head);
        self.memory.write(at, data);
        self.memory.write(at + 2048, &vec![0xaa; data.len()]);
        let guest = GUEST_BASE + at as u64;
        let len = data.len() as u32;
        self.descriptor(head, guest, len, NEXT, head + 1);
        self.descriptor(head + 1, guest + 2048, len, WRITE, 0);
        self.make_available(head);
    }

    pub fn make_available(&mut self, head: u16) {
        let slot = usize::from(self.avail % self.size);
        let entry = self.avail_offset() + 4 + 2 * slot;
        self.memory.u16(entry).store(head, Ordering::Relaxed);
        self.avail = self.avail.wrapping_add(1);
    }

    /// Shows the device what was made available; kicks when it wants that. Whether it did.
    pub fn publish(&mut self) -> bool {
        let index = self.memory.u16(self.avail_offset() + 2);
        let old = index.load(Ordering::Relaxed);
        index.store(self.avail, Ordering::Release);
        fence(Ordering::SeqCst);
        let used = self.used_offset();
        let kick = if self.event_idx {
            let at = used + 4 + 8 * usize::from(self.size);
            let event = self.memory.u16(at).load(Ordering::Relaxed);
            self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(old)
        } else {
            self.memory.u16(used).load(Ordering::Relaxed) & 1 == 0
        };
        if kick {
            nix::unistd::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
        }
        kick
    }

    /// The next used element, waiting for calls.
    pub fn complete(&mut self) -> (u32, u32) {
        loop {
            if let Some(element) = self.try_complete() {
                return element;
            }
            // Ask for a call at the next element, then look again.
            let event = self.avail_offset() + 4 + 2 * usize::from(self.size);
            self.memory.u16(event).store(self.used, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if self.used_idx() == self.used {
                assert!(
                    wait(self.call.as_fd(), PATIENCE_MS),
                    "no call: available {}, used {} of {}, event index {}",
                    self.avail,
                    self.used,
                    self.used_idx(),
                    self.event_idx
                );
            }
        }
    }

    pub fn used_idx(&self) -> u16 {
        let at = self.used_offset() + 2;
        self.memory.u16(at).load(Ordering::Acquire)
    }

    pub fn try_complete(&mut self) -> Option<(u32, u32)> {
        if self.used_idx() == self.used {
            return None;
        }
        let slot = usize::from(self.used % self.size);
        let element = self.memory.read(self.used_offset() + 4 + 8 * slot, 8);
        self.used = self.used.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
        Some((word(0), word(4)))
    }

    /// The answer to the request of `head`.
    pub fn answer(&self, head: u16, len: usize) -> Vec<u8> {
        self.memory.read(self.buffer(head) + 2048, len)
    }
}

/// A connection to the back-end.
pub struct FrontEnd {
    pub socket: UnixStream,
    pub ack: bool,
}

impl FrontEnd {
    /// Connects and negotiates everything but memory and rings.
    pub fn connect(path: &Path, protocol: u64) -> FrontEnd {
        let mut front_end = FrontEnd::plain(UnixStream::connect(path).unwrap());
        front_end.negotiate(protocol);
        front_end
    }

    pub fn plain(socket: UnixStream) -> FrontEnd {
        let patience = Duration::from_millis(u64::from(PATIENCE_MS));
        socket.set_read_timeout(Some(patience)).unwrap();
        FrontEnd { socket, ack: false }
    }

    pub fn negotiate(&mut self, protocol: u64) {
        self.send(Req::SET_OWNER, &[], &[]);
        // Split rings, nothing logged: the tests of the rest choose for themselves.
        let features = self.get(Req::GET_FEATURES) & !(1 << 34 | 1 << 26);
        let offered = self.get(Req::GET_PROTOCOL_FEATURES);
        assert_eq!(protocol & !offered, 0, "protocol features");
        self.send(Req::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[]);
        self.ack = protocol & 8 != 0;
        self.set(Req::SET_FEATURES, &features.to_ne_bytes(), &[]);
    }

    pub fn send_raw(&mut self, request: u32, flags: u32, payload: &[u8], fds: &[i32]) {
        let mut bytes = Vec::new();
        for word in [request, flags, payload.len() as u32] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(payload);
        if fds.is_empty() {
            // A back-end that ended the session is seen by whoever reads next.
            let _ = self.socket.write_all(&bytes);
            return;
        }
        let control = [ControlMessage::ScmRights(fds)];
        let iov = [IoSlice::new(&bytes)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        let _ = sendmsg::<()>(self.socket.as_raw_fd(), &iov, &control, flags, None);
    }

    pub fn send(&mut self, request: Req, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let fds: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        self.send_raw(request.into(), 1, payload, &fds);
    }

    /// The next reply's payload; `None` when the back-end ended the session.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        let mut head = [0; 12];
        self.socket.read_exact(&mut head).ok()?;
        let len = u32::from_ne_bytes(head[8..].try_into().unwrap());
        let mut payload = vec![0; len as usize];
        self.socket.read_exact(&mut payload).ok()?;
        Some(payload)
    }

    pub fn receive_fd(&mut self) -> (Vec<u8>, OwnedFd) {
        let mut bytes = [0; 64];
        let mut iov = [IoSliceMut::new(&mut bytes)];
        let mut space = cmsg_space!([i32; 1]);
        let fd = self.socket.as_raw_fd();
        let message = recvmsg::<()>(fd, &mut iov, Some(&mut space), MsgFlags::empty()).unwrap();
        let Some(ControlMessageOwned::ScmRights(fds)) = message.cmsgs().unwrap().next() else {
            panic!("no descriptor came along");
        };
        // SAFETY: a descriptor that this process has just received.
        let fd = unsafe { OwnedFd::from_raw_fd(fds[0]) };
        let len = message.bytes;
        (bytes[12..len].to_vec(), fd)
    }

    pub fn get(&mut self, request: Req) -> u64 {
        self.send(request, &[], &[]);
        let payload = self.receive().expect("a reply");
        u64::from_ne_bytes(payload.try_into().unwrap())
    }

    /// Sends a request and, when acknowledgements are on, gives what came back.
    pub fn try_set(&mut self, request: Req, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Option<u64> {
        let fds: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let flags = if self.ack { 1 | NEED_REPLY } else { 1 };
        self.send_raw(request.into(), flags, payload, &fds);
        if !self.ack {
            return Some(0);
        }
        let payload = self.receive()?;
        Some(u64::from_ne_bytes(payload.try_into().unwrap()))
    }

    pub fn set(&mut self, request: Req, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let answer = self.try_set(request, payload, fds);
        assert_eq!(answer, Some(0), "{request:?}");
    }

    pub fn region(memory: &Memory) -> Vec<u8> {
        let fields = [GUEST_BASE, memory.len as u64, USER_BASE, 0];
        fields.iter().flat_map(|f| f.to_ne_bytes()).collect()
    }

    pub fn set_memory(&mut self, memory: &Memory) {
        let mut payload = vec![1, 0, 0, 0, 0, 0, 0, 0];
        payload.extend(Self::region(memory));
        self.set(Req::SET_MEM_TABLE, &payload, &[memory.fd.as_fd()]);
    }

    pub fn state(index: u32, value: u32) -> Vec<u8> {
        [index.to_ne_bytes(), value.to_ne_bytes()].concat()
    }

    /// Everything about a ring but enabling it.
    pub fn set_ring(&mut self, index: u8, driver: &Driver) {
        let places = RingPlaces {
            size: driver.size,
            base: u32::from(driver.avail),
            parts: [driver.offset, driver.used_offset(), driver.avail_offset()],
            log: None,
            fds: [&driver.kick, &driver.call, &driver.err],
        };
        self.set_ring_places(index, &places);
    }

    pub fn set_ring_places(&mut self, index: u8, ring: &RingPlaces<'_>) {
        let state = |value: u32| Self::state(u32::from(index), value);
        self.set(Req::SET_VRING_NUM, &state(u32::from(ring.size)), &[]);
        self.set(Req::SET_VRING_BASE, &state(ring.base), &[]);
        self.set(Req::SET_VRING_ADDR, &ring.addresses(index), &[]);
        let index = u64::from(index).to_ne_bytes();
        let [kick, call, err] = ring.fds;
        self.set(Req::SET_VRING_ERR, &index, &[err.as_fd()]);
        self.set(Req::SET_VRING_CALL, &index, &[call.as_fd()]);
        self.set(Req::SET_VRING_KICK, &index, &[kick.as_fd()]);
    }

    pub fn enable(&mut self, index: u32, enable: bool) {
        let payload = Self::state(index, u32::from(enable));
        self.set(Req::SET_VRING_ENABLE, &payload, &[]);
    }

    /// Stops a ring; its next available index.
    pub fn get_base(&mut self, index: u32) -> u32 {
        self.send(Req::GET_VRING_BASE, &Self::state(index, 0), &[]);
        let payload = self.receive().expect("a base");
        u32::from_ne_bytes(payload[4..].try_into().unwrap())
    }
}

/// Where a ring is, whatever its layout.
pub struct RingPlaces<'a> {
    pub size: u16,
    pub base: u32,
    /// Offsets in memory of descriptors, used and available ring.
    pub parts: [usize; 3],
    /// The guest address that the used ring is logged at.
    pub log: Option<u64>,
    /// Kick, call and error.
    pub fds: [&'a OwnedFd; 3],
}

impl RingPlaces<'_> {
    /// Payload of SET_VRING_ADDR.
    pub fn addresses(&self, index: u8) -> Vec<u8> {
        let flags = u32::from(self.log.is_some());
        let mut payload = FrontEnd::state(u32::from(index), flags);
        for part in self.parts {
            payload.extend_from_slice(&(USER_BASE + part as u64).to_ne_bytes());
        }
        payload.extend_from_slice(&self.log.unwrap_or(0).to_ne_bytes());
        payload
    }
}
