//! A guest on the test's thread, and a port on a thread of its own.

use std::cell::RefCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use executor::{Config, Executor, Handle};
use vhost::vhost_user::message::FrontendReq as Req;
use vhost_daemon::Address;
use vhost_daemon::testing::front_end::{
    Driver, FrontEnd, GUEST_BASE, Memory, NEXT, PATIENCE_MS, RingPlaces, WRITE, wait,
};
use vhost_daemon::testing::packed_driver::PackedDriver;

use crate::frame::{MacAddress, VnetHeader};
use crate::netdev::Netdev;
use crate::port::{Port, PortHooks, PortOptions};

/// The guest's address.
pub(super) const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0, 0, 1]);
/// Descriptors of each ring.
pub(super) const SIZE: u16 = 64;
/// Room of a ring with its buffers.
const RING_ROOM: usize = 1 << 19;
/// Descriptors of one buffer id.
const PIECES: u16 = 4;
/// Bytes of one buffer id.
pub(super) const BUFFER: usize = 4096;

/// Protocol features of the tests: LOG_SHMFD, RARP, REPLY_ACK, MTU, CONFIG, STATUS, BACKEND_REQ.
pub(super) const PROTOCOL: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 9 | 1 << 16 | 1 << 5;

thread_local! {
    static PORT: RefCell<Option<Rc<Port>>> = const { RefCell::new(None) };
}

/// A port on its thread.
pub(super) struct BackEnd {
    pub(super) path: PathBuf,
    pub(super) hooks: PortHooks,
    handle: Handle,
    thread: Option<JoinHandle<()>>,
    dir: Option<tempfile::TempDir>,
}

pub(super) fn options(pairs: u16) -> PortOptions {
    PortOptions {
        queues: pairs,
        mtu: Some(1500),
        ..PortOptions::new("p0", MAC)
    }
}

impl BackEnd {
    pub(super) fn start<N: Netdev + 'static>(
        options: PortOptions,
        netdev: impl FnOnce() -> N + Send + 'static,
    ) -> BackEnd {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let mut back_end = BackEnd::start_at(path, options, netdev);
        back_end.dir = Some(dir);
        back_end
    }

    /// Another one in the place of this one, which was killed.
    pub(super) fn succeeded<N: Netdev + 'static>(
        mut self,
        options: PortOptions,
        netdev: impl FnOnce() -> N + Send + 'static,
    ) -> BackEnd {
        let mut successor = BackEnd::start_at(self.path.clone(), options, netdev);
        successor.dir = self.dir.take();
        successor
    }

    fn start_at<N: Netdev + 'static>(
        path: PathBuf,
        options: PortOptions,
        netdev: impl FnOnce() -> N + Send + 'static,
    ) -> BackEnd {
        let hooks = PortHooks::new(options.queues);
        let (sender, started) = mpsc::channel();
        let (socket, its_hooks) = (path.clone(), hooks.clone());
        let thread = std::thread::spawn(move || {
            let executor = Executor::new(&Config::default()).unwrap();
            executor.block_on(async {
                let address = Address::Listen(socket);
                let port = Port::start(options, Rc::new(netdev()), address, vec![], its_hooks);
                PORT.set(Some(Rc::new(port.await.unwrap())));
            });
            sender.send(executor.handle()).unwrap();
            executor.run();
            // Whatever is left dies with the executor, as in a daemon that is killed.
            drop(executor);
            PORT.take();
        });
        BackEnd {
            path,
            hooks,
            handle: started.recv().unwrap(),
            thread: Some(thread),
            dir: None,
        }
    }

    /// Does something with the port, on its thread.
    pub(super) fn with<T, F>(&self, work: impl FnOnce(Rc<Port>) -> F + Send + 'static) -> T
    where
        F: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (sender, done) = mpsc::channel();
        self.handle.spawn(move || async move {
            let port = PORT.with_borrow(Clone::clone).expect("a port that runs");
            sender.send(work(port).await).unwrap();
        });
        done.recv().unwrap()
    }

    /// Ends it in the middle of what it does; the socket's path is free again.
    pub(super) fn kill(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the port's thread");
            std::fs::remove_file(&self.path).unwrap();
        }
    }

    /// Stops the port, with all of its queues.
    pub(super) fn stop(mut self) {
        let (sender, done) = mpsc::channel();
        self.handle.spawn(move || async move {
            let port = PORT.take().and_then(Rc::into_inner).expect("the only user");
            port.stop().await;
            sender.send(()).unwrap();
        });
        done.recv().unwrap();
        assert!(!self.path.exists());
        self.handle.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

/// A ring of either layout. Buffer id `i` has 4096 bytes and four descriptors.
pub(super) enum Ring {
    Split(Driver),
    Packed(PackedDriver),
}

/// How rings lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    Split,
    Packed,
}

pub(super) const LAYOUTS: [Layout; 2] = [Layout::Split, Layout::Packed];

impl Ring {
    fn new(layout: Layout, memory: &Arc<Memory>, index: usize) -> Ring {
        let offset = index * RING_ROOM;
        match layout {
            Layout::Split => Ring::Split(Driver::new(memory, offset, SIZE)),
            Layout::Packed => Ring::Packed(PackedDriver::new(memory, offset, SIZE)),
        }
    }

    fn memory(&self) -> &Arc<Memory> {
        match self {
            Ring::Split(driver) => &driver.memory,
            Ring::Packed(driver) => &driver.memory,
        }
    }

    /// Offset of a buffer in memory.
    pub(super) fn buffer(&self, id: u16) -> usize {
        match self {
            Ring::Split(driver) => driver.buffer(id),
            Ring::Packed(driver) => driver.buffer(id),
        }
    }

    /// Makes a chain of pieces `(address, length, flags)` available.
    pub(super) fn push(&mut self, id: u16, pieces: &[(u64, u32, u16)]) {
        match self {
            Ring::Packed(driver) => driver.push(id, pieces),
            Ring::Split(driver) => {
                let head = PIECES * id;
                for (number, (addr, len, flags)) in (0u16..).zip(pieces) {
                    let last = usize::from(number) + 1 == pieces.len();
                    let next = if last { 0 } else { NEXT };
                    driver.descriptor(head + number, *addr, *len, flags | next, head + number + 1);
                }
                driver.make_available(head);
            }
        }
    }

    /// A frame to send, in `pieces` pieces after its header.
    pub(super) fn send(&mut self, id: u16, header: VnetHeader, frame: &[u8]) {
        let at = self.buffer(id);
        let whole = [header.to_bytes().as_slice(), frame].concat();
        self.memory().write(at, &whole);
        let address = GUEST_BASE + at as u64;
        let first = (whole.len() / 2) as u32;
        let rest = whole.len() as u32 - first;
        let second = address + u64::from(first);
        self.push(id, &[(address, first, 0), (second, rest, 0)]);
        self.publish();
    }

    /// A receive buffer of `len` bytes.
    pub(super) fn offer(&mut self, id: u16, len: u32) {
        let at = self.buffer(id);
        self.memory().write(at, &vec![0xee; BUFFER]);
        let address = GUEST_BASE + at as u64;
        let (first, second) = (len / 3, len - len / 3);
        let pieces = [
            (address, first, WRITE),
            (address + u64::from(first), second, WRITE),
        ];
        self.push(id, &pieces);
        self.publish();
    }

    /// Shows the device what was made available.
    pub(super) fn publish(&mut self) {
        match self {
            Ring::Split(driver) => driver.publish(),
            Ring::Packed(driver) => driver.publish(),
        };
    }

    /// The next used element: buffer id and length.
    pub(super) fn complete(&mut self) -> (u16, u32) {
        match self {
            Ring::Split(driver) => {
                let (head, len) = driver.complete();
                (head as u16 / PIECES, len)
            }
            Ring::Packed(driver) => driver.complete(),
        }
    }

    /// The next used element, if it is there.
    pub(super) fn try_complete(&mut self) -> Option<(u16, u32)> {
        match self {
            Ring::Split(driver) => {
                let (head, len) = driver.try_complete()?;
                Some((head as u16 / PIECES, len))
            }
            Ring::Packed(driver) => driver.try_complete(),
        }
    }

    /// The first bytes of a buffer.
    pub(super) fn read(&self, id: u16, len: usize) -> Vec<u8> {
        self.memory().read(self.buffer(id), len)
    }

    /// The next received frame: its header, bytes, and the buffers that it came in.
    pub(super) fn receive(&mut self) -> (VnetHeader, Vec<u8>, Vec<u16>) {
        let (id, len) = self.complete();
        let mut bytes = self.read(id, len as usize);
        let header = VnetHeader::from_bytes(bytes.first_chunk().unwrap());
        let mut ids = vec![id];
        for _ in 1..header.num_buffers {
            let (id, len) = self.complete();
            bytes.extend(self.read(id, len as usize));
            ids.push(id);
        }
        bytes.drain(..VnetHeader::LEN);
        (header, bytes, ids)
    }

    pub(super) fn err(&self) -> BorrowedFd<'_> {
        match self {
            Ring::Split(driver) => driver.err.as_fd(),
            Ring::Packed(driver) => driver.err.as_fd(),
        }
    }

    fn places(&self, base: u32) -> RingPlaces<'_> {
        match self {
            Ring::Split(driver) => RingPlaces {
                size: driver.size,
                base,
                parts: [driver.offset, driver.used_offset(), driver.avail_offset()],
                log: None,
                fds: [&driver.kick, &driver.call, &driver.err],
            },
            Ring::Packed(driver) => RingPlaces {
                base,
                ..driver.places()
            },
        }
    }

    /// Where a ring begins, and one whose daemon was killed goes on: for a packed ring what the driver saw used.
    fn used_base(&self) -> u32 {
        match self {
            // A front-end that knows no better tells what was made available.
            Ring::Split(driver) => u32::from(driver.avail),
            Ring::Packed(driver) => {
                let used = u32::from(driver.used.to_wire(driver.size));
                used | used << 16
            }
        }
    }
}

/// A guest with its rings, connected to a port.
pub(super) struct Guest {
    pub(super) front_end: FrontEnd,
    pub(super) rings: Vec<Ring>,
    pub(super) memory: Arc<Memory>,
    pub(super) features: u64,
}

impl Guest {
    /// A guest of `layout` that acknowledges `features` besides those of the layout, with `rings` rings that run.
    pub(super) fn start(back_end: &BackEnd, layout: Layout, features: u64, rings: usize) -> Guest {
        Guest::start_at(&back_end.path, layout, features, rings)
    }

    /// The same at the port that listens on `path`.
    pub(super) fn start_at(path: &Path, layout: Layout, features: u64, rings: usize) -> Guest {
        let memory = Memory::new(rings * RING_ROOM);
        let features = match layout {
            Layout::Split => features,
            Layout::Packed => features | 1 << 34,
        };
        let mut guest = Guest {
            front_end: connect(path, features),
            rings: (0..rings).map(|i| Ring::new(layout, &memory, i)).collect(),
            memory,
            features: features | BASIC,
        };
        guest.run();
        guest
    }

    /// Connects again, to a back-end that took the place of another.
    pub(super) fn reconnect(&mut self, back_end: &BackEnd) {
        self.front_end = connect(&back_end.path, self.features);
        self.run();
    }

    fn run(&mut self) {
        self.front_end.set_memory(&self.memory);
        for (index, ring) in (0u8..).zip(&self.rings) {
            let places = ring.places(ring.used_base());
            self.front_end.set_ring_places(index, &places);
            self.front_end.enable(u32::from(index), true);
        }
    }

    /// Starts ring `index` where `base` says.
    pub(super) fn restart(&mut self, index: u8, base: u32) {
        let places = self.rings[usize::from(index)].places(base);
        self.front_end.set_ring_places(index, &places);
        self.front_end.enable(u32::from(index), true);
    }

    /// Executes a command on the last ring; its answer.
    pub(super) fn command(&mut self, bytes: &[u8]) -> u8 {
        let ring = self.rings.last_mut().unwrap();
        let at = ring.buffer(0);
        self.memory.write(at, bytes);
        self.memory.write(at + bytes.len(), &[0x55]);
        let address = GUEST_BASE + at as u64;
        let len = bytes.len() as u32;
        let answer = address + u64::from(len);
        ring.push(0, &[(address, len, 0), (answer, 1, WRITE)]);
        ring.publish();
        assert_eq!(ring.complete(), (0, 1));
        ring.read(0, bytes.len() + 1)[bytes.len()]
    }

    /// The configuration space.
    pub(super) fn config(&mut self) -> Vec<u8> {
        let words = [0u32, 12, 0];
        let mut payload: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        payload.extend([0; 12]);
        self.front_end.send(Req::GET_CONFIG, &payload, &[]);
        self.front_end.receive().expect("a configuration")[12..].to_vec()
    }

    /// The channel for the back-end's own messages.
    pub(super) fn channel(&mut self) -> OwnedFd {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let message = Req::SET_BACKEND_REQ_FD;
        self.front_end.set(message, &[], &[theirs.as_fd()]);
        ours.into()
    }
}

/// Waits for a message on the back-end's channel and takes it.
pub(super) fn notified(channel: &OwnedFd) {
    assert!(wait_readable(channel), "no message of the back-end");
    nix::unistd::read(channel, &mut [0; 64]).unwrap();
}

fn wait_readable(fd: &OwnedFd) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::from(PATIENCE_MS)).unwrap() == 1
}

/// Whether the device said that a ring is broken.
pub(super) fn is_broken(ring: &Ring) -> bool {
    wait(ring.err(), PATIENCE_MS)
}

/// VERSION_1, EVENT_IDX, INDIRECT and the protocol features.
const BASIC: u64 = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 30;

fn connect(path: &Path, features: u64) -> FrontEnd {
    let socket = std::os::unix::net::UnixStream::connect(path).unwrap();
    let mut front_end = FrontEnd::plain(socket);
    front_end.send(Req::SET_OWNER, &[], &[]);
    let wanted = features | BASIC;
    let offered = front_end.get(Req::GET_FEATURES);
    assert_eq!(wanted & !offered, 0, "features that are not offered");
    assert_eq!(PROTOCOL & !front_end.get(Req::GET_PROTOCOL_FEATURES), 0);
    front_end.send(Req::SET_PROTOCOL_FEATURES, &PROTOCOL.to_ne_bytes(), &[]);
    front_end.ack = true;
    front_end.set(Req::SET_FEATURES, &wanted.to_ne_bytes(), &[]);
    front_end
}
