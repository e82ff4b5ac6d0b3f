//! An uplink: a queue of another back-end, on the switch's thread, whose frames come in here and which takes those for outside.
//!
//! Frames are received into memory of the switch's own: who they are for is known only when they are there.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::ensure;
use executor::Handle;

use crate::frame::{Frame, MAX_FRAME, MacAddress, VnetHeader};
use crate::link::{self, Delivery, DropReason, LocalFuture, NetQueue, Offloads, Sink};
use crate::netdev::{Attachment, Netdev};

use super::Access;
use super::member::Description;
use super::outlet::{Outlet, Target};
use super::plane::Plane;
use super::stats::Stats;
use super::table::MemberId;

/// Where an uplink's frames go.
struct UplinkSink {
    plane: Rc<Plane>,
    stats: Arc<Stats>,
    member: MemberId,
    /// A virtio-net header and a frame that are being received.
    buffer: RefCell<Vec<u8>>,
}

impl UplinkSink {
    fn forward(&self, frame: &Frame<'_>) -> Delivery {
        let mut delivery = Delivery::Taken;
        let frames = std::slice::from_ref(frame);
        self.plane.forward(self.member, frames, &mut |reason| {
            self.stats.dropped(reason);
            delivery = Delivery::Dropped(reason);
        });
        delivery
    }
}

impl Sink for UplinkSink {
    /// The switch finishes what a receiver cannot.
    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn ready(&self) -> bool {
        true
    }

    fn until_ready(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }

    fn deliver(&self, frame: &Frame<'_>) -> Delivery {
        self.forward(frame)
    }

    fn reserve(&self, len: usize, buffers: &mut Vec<libc::iovec>) -> usize {
        let mut buffer = self.buffer.borrow_mut();
        let len = VnetHeader::LEN + len.min(MAX_FRAME);
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        buffers.push(libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: len,
        });
        len
    }

    fn commit(&self, written: usize) -> Delivery {
        let buffer = self.buffer.take();
        let delivery = match buffer
            .get(..written)
            .and_then(|bytes| bytes.split_first_chunk())
        {
            Some((header, frame)) => {
                let header = VnetHeader::from_bytes(header);
                self.forward(&Frame::new(header, frame))
            }
            None => {
                self.stats.dropped(DropReason::TooShort);
                Delivery::Dropped(DropReason::TooShort)
            }
        };
        self.buffer.replace(buffer);
        delivery
    }

    fn flush(&self) {
        self.plane.flush();
    }
}

/// The uplink as the control thread sees it. It ends with the switch's data path.
pub(super) struct Uplink {
    id: String,
    is_running: Arc<AtomicBool>,
    /// It is there for as long as its queue is used.
    _netdev: Rc<dyn Netdev>,
}

impl Uplink {
    /// Takes the first queue of `netdev` to the switch's thread.
    ///
    /// # Errors
    /// It lives on another thread, is a switch, or cannot be opened. What fails on the switch's thread is logged.
    pub(super) fn open(
        description: Description,
        netdev: Rc<dyn Netdev>,
        access: &Access,
        thread: &Handle,
    ) -> anyhow::Result<Uplink> {
        let is_elsewhere = netdev.thread().is_some_and(|other| !other.is_same(thread));
        ensure!(!is_elsewhere, "it lives on another thread");
        ensure!(netdev.switch().is_none(), "it is a switch");
        let attachment = Attachment {
            port: description.name.clone(),
            mac: MacAddress::default(),
            queues: 1,
            vlan: description.vlan.clone(),
            isolated: description.is_isolated,
        };
        let make = netdev.attach(&attachment, 0)?;
        let offloads = netdev.host_offloads();
        let id = description.name.clone();
        let is_running = Arc::new(AtomicBool::new(false));
        let (access, running) = (access.clone(), Arc::clone(&is_running));
        let started = thread.spawn(move || async move {
            let plane = access.plane();
            let started = make().and_then(|queue| {
                Connection::new(&plane, &description, (queue, offloads), running)
            });
            match started {
                Ok(connection) => {
                    let task = executor::spawn(run(connection, access.stats()));
                    plane.keep(task);
                }
                Err(error) => tracing::error!(uplink = description.name, %error, "cannot open"),
            }
        });
        ensure!(started, "the switch's thread has ended");
        Ok(Uplink {
            id,
            is_running,
            _netdev: netdev,
        })
    }

    /// The back-end's id.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Whether frames go through it.
    pub(super) fn is_running(&self) -> bool {
        self.is_running.load(Ordering::Relaxed)
    }
}

/// An uplink that is a member until this is dropped.
struct Connection {
    name: String,
    plane: Rc<Plane>,
    member: MemberId,
    outlet: Rc<Outlet>,
    queue: Rc<dyn NetQueue>,
    is_running: Arc<AtomicBool>,
}

impl Connection {
    fn new(
        plane: &Rc<Plane>,
        description: &Description,
        (queue, offloads): (Rc<dyn NetQueue>, Offloads),
        is_running: Arc<AtomicBool>,
    ) -> io::Result<Connection> {
        let member = plane.attach(description)?;
        is_running.store(true, Ordering::Relaxed);
        Ok(Connection {
            name: description.name.clone(),
            plane: Rc::clone(plane),
            member,
            outlet: plane.open(member, Target::Queue(Rc::clone(&queue), offloads)),
            queue,
            is_running,
        })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.is_running.store(false, Ordering::Relaxed);
        self.plane.close(self.member, &self.outlet);
        self.queue.disconnect();
        self.plane.detach(self.member);
    }
}

/// Receives until the back-end fails.
async fn run(connection: Connection, stats: Arc<Stats>) {
    let sink = Rc::new(UplinkSink {
        plane: Rc::clone(&connection.plane),
        stats,
        member: connection.member,
        buffer: RefCell::default(),
    });
    let queue = Rc::clone(&connection.queue);
    queue.connect(Rc::clone(&sink) as Rc<dyn Sink>);
    let result = match queue.set_guest_offloads(Offloads::ALL) {
        Ok(()) => link::receive_all(&*queue, &*sink).await,
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        tracing::error!(uplink = connection.name, %error, "receives nothing more");
    }
}
