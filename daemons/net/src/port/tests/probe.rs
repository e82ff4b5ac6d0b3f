//! A back-end that shows what reaches it, gives what it is told, and refuses when it is told.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use executor::sync::Notify;

use crate::frame::{Frame, VnetHeader};
use crate::link::{Delivery, DropReason, LocalFuture, NetQueue, Offloads, Received, Sink};
use crate::netdev::{Attachment, Netdev, QueueMaker};

/// What happened at a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Connected(u16),
    Disconnected(u16),
    Offloads(u16, Offloads),
    Sent(u16, VnetHeader, Vec<u8>),
    /// What became of a frame for the guest.
    Given(u16, Delivery),
}

/// What test and back-end share.
pub(super) struct Control {
    events: Sender<Event>,
    /// Frames are not taken.
    pub(super) full: AtomicBool,
    changed: Notify,
    /// Frames for the guest, by pair.
    waiting: Mutex<Vec<(u16, VnetHeader, Vec<u8>)>>,
    /// Frames are read into the guest's buffers.
    pub(super) in_place: AtomicBool,
}

impl Control {
    pub(super) fn new() -> (Arc<Control>, Events) {
        let (events, receiver) = channel();
        let control = Control {
            events,
            full: AtomicBool::new(false),
            changed: Notify::new(),
            waiting: Mutex::default(),
            in_place: AtomicBool::new(false),
        };
        (Arc::new(control), Events(receiver))
    }

    /// Gives the guest a frame as soon as it takes it.
    pub(super) fn give(&self, pair: u16, header: VnetHeader, frame: &[u8]) {
        let mut waiting = self.waiting.lock().unwrap();
        waiting.push((pair, header, frame.to_vec()));
        drop(waiting);
        self.changed.notify_all();
    }

    pub(super) fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn tell(&self, event: Event) {
        // A test that has ended listens no more.
        let _ = self.events.send(event);
    }
}

/// What happened, in order.
pub(super) struct Events(Receiver<Event>);

impl Events {
    /// The next event.
    pub(super) fn next(&self) -> Event {
        let patience = Duration::from_secs(10);
        self.0.recv_timeout(patience).expect("an event")
    }

    /// The next frame from the guest: pair and bytes.
    pub(super) fn sent(&self) -> (u16, Vec<u8>) {
        loop {
            if let Event::Sent(pair, _, frame) = self.next() {
                return (pair, frame);
            }
        }
    }

    /// What became of the next frame for the guest.
    pub(super) fn given(&self) -> Delivery {
        loop {
            if let Event::Given(_, delivery) = self.next() {
                return delivery;
            }
        }
    }

    /// Everything that has happened by now.
    pub(super) fn all(&self) -> Vec<Event> {
        self.0.try_iter().collect()
    }
}

pub(super) struct Probe(pub(super) Arc<Control>);

impl Netdev for Probe {
    fn kind(&self) -> &'static str {
        "probe"
    }

    fn max_queues(&self) -> Option<u16> {
        Some(4)
    }

    fn host_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn guest_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn attach(&self, _port: &Attachment, index: u16) -> io::Result<QueueMaker> {
        let control = self.0.clone();
        Ok(Box::new(move || {
            Ok(Rc::new(ProbeQueue {
                control,
                index,
                sink: RefCell::new(None),
            }))
        }))
    }
}

struct ProbeQueue {
    control: Arc<Control>,
    index: u16,
    sink: RefCell<Option<Rc<dyn Sink>>>,
}

impl ProbeQueue {
    fn take(&self) -> Option<(VnetHeader, Vec<u8>)> {
        let mut waiting = self.control.waiting.lock().unwrap();
        let mine = waiting.iter().position(|(pair, ..)| *pair == self.index)?;
        let (_, header, frame) = waiting.remove(mine);
        Some((header, frame))
    }

    fn put_back(&self, header: VnetHeader, frame: Vec<u8>) {
        let mut waiting = self.control.waiting.lock().unwrap();
        waiting.insert(0, (self.index, header, frame));
    }

    fn deliver(&self, sink: &dyn Sink, header: VnetHeader, bytes: &[u8]) -> Delivery {
        if !self.control.in_place.load(Ordering::SeqCst) {
            return sink.deliver(&Frame::new(header, bytes));
        }
        let mut buffers = Vec::new();
        let whole = [header.to_bytes().as_slice(), bytes].concat();
        let room = sink.reserve(bytes.len(), &mut buffers);
        if room < whole.len() {
            return Delivery::NotReady(DropReason::NoBuffers);
        }
        let mut left = whole.as_slice();
        for buffer in &buffers {
            let (part, rest) = left.split_at(buffer.iov_len.min(left.len()));
            left = rest;
            write(buffer, part);
        }
        sink.commit(whole.len())
    }
}

#[expect(unsafe_code, reason = "a buffer of the guest's is written")]
fn write(buffer: &libc::iovec, part: &[u8]) {
    let target = buffer.iov_base.cast::<u8>();
    // SAFETY: the sink says that the buffer may be written, and the part is no longer than it.
    unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), target, part.len()) };
}

impl NetQueue for ProbeQueue {
    fn connect(&self, sink: Rc<dyn Sink>) {
        self.sink.replace(Some(sink));
        self.control.tell(Event::Connected(self.index));
    }

    fn disconnect(&self) {
        self.sink.replace(None);
        self.control.tell(Event::Disconnected(self.index));
    }

    fn transmit(&self, frames: &[Frame<'_>], _dropped: &mut dyn FnMut(DropReason)) -> usize {
        if self.control.full.load(Ordering::SeqCst) {
            return 0;
        }
        for frame in frames {
            let mut bytes = Vec::new();
            frame.append_to(&mut bytes, usize::MAX);
            self.control
                .tell(Event::Sent(self.index, frame.header, bytes));
        }
        frames.len()
    }

    fn writable(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            loop {
                let changed = self.control.changed.notified();
                if !self.control.full.load(Ordering::SeqCst) {
                    return;
                }
                changed.await;
            }
        })
    }

    fn receive(&self, budget: usize) -> io::Result<Received> {
        let sink = self
            .sink
            .borrow()
            .clone()
            .expect("a queue that is connected");
        let mut received = Received::More;
        for _ in 0..budget {
            let Some((header, frame)) = self.take() else {
                received = Received::Drained;
                break;
            };
            let delivery = self.deliver(&*sink, header, &frame);
            if matches!(delivery, Delivery::NotReady(_)) {
                self.put_back(header, frame);
                received = Received::NotReady;
                break;
            }
            self.control.tell(Event::Given(self.index, delivery));
        }
        sink.flush();
        Ok(received)
    }

    fn readable(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            loop {
                let changed = self.control.changed.notified();
                let mine = |(pair, ..): &(u16, VnetHeader, Vec<u8>)| *pair == self.index;
                if self.control.waiting.lock().unwrap().iter().any(mine) {
                    return;
                }
                changed.await;
            }
        })
    }

    fn set_guest_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.control.tell(Event::Offloads(self.index, offloads));
        Ok(())
    }
}
