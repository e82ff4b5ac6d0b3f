//! Ports with receivers that only note what they get, around a real data path.

mod bounds;
mod forwarding;
mod uplink;
mod vlans;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use executor::sync::Notify;
use executor::{Config, Executor, Handle};

use super::*;
use crate::frame::{HEAD_LEN, VnetHeader};
use crate::link::Delivery;

/// A guest that notes its frames.
pub(super) struct Guest {
    offloads: Cell<Offloads>,
    /// Frames that it takes before it takes no more.
    room: Cell<usize>,
    frames: RefCell<Vec<(VnetHeader, Vec<u8>)>>,
    /// Frames that were shown by a flush.
    shown: Cell<usize>,
    flushes: Cell<usize>,
    ready: Notify,
}

impl Guest {
    fn new() -> Rc<Guest> {
        Rc::new(Guest {
            offloads: Cell::new(Offloads::ALL),
            room: Cell::new(usize::MAX),
            frames: RefCell::default(),
            shown: Cell::new(0),
            flushes: Cell::new(0),
            ready: Notify::new(),
        })
    }

    fn give_room(&self, frames: usize) {
        self.room.set(frames);
        self.ready.notify_all();
    }

    /// What came since the last look, without headers.
    fn got(&self) -> Vec<Vec<u8>> {
        let frames = self.frames.take();
        assert_eq!(self.shown.replace(0), frames.len(), "all of it was shown");
        frames.into_iter().map(|(_, bytes)| bytes).collect()
    }
}

impl Sink for Guest {
    fn offloads(&self) -> Offloads {
        self.offloads.get()
    }

    fn ready(&self) -> bool {
        self.room.get() > 0
    }

    fn until_ready(&self) -> LocalFuture<'_, ()> {
        let notified = self.ready.notified();
        Box::pin(async move {
            if self.room.get() == 0 {
                notified.await;
            }
        })
    }

    fn deliver(&self, frame: &Frame<'_>) -> Delivery {
        if self.room.get() == 0 {
            return Delivery::NotReady(DropReason::NoBuffers);
        }
        self.room.set(self.room.get() - 1);
        let mut bytes = Vec::new();
        frame.append_to(&mut bytes, usize::MAX);
        assert_eq!(bytes.len(), frame.len());
        self.frames.borrow_mut().push((frame.header, bytes));
        Delivery::Taken
    }

    fn reserve(&self, _len: usize, _buffers: &mut Vec<libc::iovec>) -> usize {
        0
    }

    fn commit(&self, _written: usize) -> Delivery {
        Delivery::NotReady(DropReason::NoBuffers)
    }

    fn flush(&self) {
        self.shown.set(self.frames.borrow().len());
        self.flushes.set(self.flushes.get() + 1);
    }
}

/// A port and its guest.
pub(super) struct TestPort {
    queue: Rc<dyn NetQueue>,
    guest: Rc<Guest>,
}

impl TestPort {
    /// Sends frames and shows what they brought; the reasons for those that went nowhere.
    fn send(&self, frames: &[Vec<u8>]) -> Vec<DropReason> {
        let frames: Vec<_> = frames
            .iter()
            .map(|bytes| (VnetHeader::default(), bytes.clone()))
            .collect();
        self.send_with_headers(&frames)
    }

    fn send_with_headers(&self, frames: &[(VnetHeader, Vec<u8>)]) -> Vec<DropReason> {
        let tails: Vec<libc::iovec> = frames
            .iter()
            .map(|(_, bytes)| {
                let tail = &bytes[bytes.len().min(HEAD_LEN)..];
                libc::iovec {
                    iov_base: tail.as_ptr().cast_mut().cast(),
                    iov_len: tail.len(),
                }
            })
            .collect();
        let frames: Vec<Frame<'_>> = frames
            .iter()
            .zip(&tails)
            .map(|((header, bytes), tail)| {
                let head = &bytes[..bytes.len().min(HEAD_LEN)];
                #[expect(unsafe_code, reason = "a tail is raw memory")]
                // SAFETY: the pieces are borrowed for longer than the frames.
                unsafe {
                    Frame::with_tail(*header, head, std::slice::from_ref(tail))
                }
            })
            .collect();
        let mut reasons = Vec::new();
        let taken = self
            .queue
            .transmit(&frames, &mut |reason| reasons.push(reason));
        assert_eq!(taken, frames.len());
        self.queue.flush();
        reasons
    }

    fn send_one(&self, frame: &[u8]) -> Option<DropReason> {
        let reasons = self.send(&[frame.to_vec()]);
        assert!(reasons.len() <= 1);
        reasons.first().copied()
    }
}

/// A switch on an executor of the test's own.
pub(super) struct Rig {
    switch: Switch,
    executor: Executor,
}

impl Rig {
    fn new(options: SwitchOptions) -> Rig {
        Rig::with_uplink(options, None)
    }

    fn with_uplink(options: SwitchOptions, uplink: Option<Rc<dyn Netdev>>) -> Rig {
        let executor = Executor::new(&Config::default()).unwrap();
        let switch = open(&options, uplink, executor.handle()).unwrap();
        let rig = Rig { switch, executor };
        rig.turn();
        rig
    }

    /// Lets tasks run until none is ready.
    fn turn(&self) {
        self.executor.turn().unwrap();
    }

    fn queue(&self, attachment: &Attachment, index: u16) -> TestPort {
        let queue = self.switch.attach(attachment, index).unwrap()().unwrap();
        let guest = Guest::new();
        queue.connect(Rc::clone(&guest) as Rc<dyn Sink>);
        TestPort { queue, guest }
    }

    fn port(&self, station: u8) -> TestPort {
        self.queue(&attachment(station, VlanMode::Transparent), 0)
    }

    fn count(&self, name: &str) -> u64 {
        self.switch.details()[name].as_u64().unwrap()
    }

    fn stations(&self) -> Vec<Station> {
        self.executor.block_on(self.switch.stations())
    }
}

fn open(
    options: &SwitchOptions,
    uplink: Option<Rc<dyn Netdev>>,
    thread: Handle,
) -> anyhow::Result<Switch> {
    let context = Context {
        id: "s0",
        descriptor: &|name| anyhow::bail!("no descriptor '{name}'"),
        thread: &|_| Ok(thread.clone()),
        netdev: &|id| uplink.clone().with_context(|| format!("no netdev '{id}'")),
        notice: Rc::new(|_| ()),
    };
    Switch::open(options, &context)
}

/// The port of a station, named and addressed by its number.
fn attachment(station: u8, vlan: VlanMode) -> Attachment {
    Attachment {
        port: format!("p{station}"),
        mac: mac(station),
        queues: 1,
        vlan,
        isolated: false,
    }
}

fn mac(station: u8) -> MacAddress {
    MacAddress([2, 0, 0, 0, 0, station])
}

const ALL: MacAddress = MacAddress::BROADCAST;

fn frame(from: MacAddress, to: MacAddress, text: &str) -> Vec<u8> {
    let mut bytes = [to.0, from.0].concat();
    bytes.extend([0x88, 0xb5]);
    bytes.extend(text.as_bytes());
    bytes
}
