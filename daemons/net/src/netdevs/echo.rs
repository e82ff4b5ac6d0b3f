//! `type=echo`: every frame comes back as it went, on the queue pair that it came from. For measurement.
//!
//! A guest that gives no receive buffers holds its own transmit ring up; nothing is dropped.

use std::cell::RefCell;
use std::future::pending;
use std::io;
use std::rc::Rc;

use serde::Deserialize;

use crate::frame::Frame;
use crate::link::{Delivery, DropReason, LocalFuture, NetQueue, Offloads, Received, Sink};
use crate::netdev::{Attachment, Netdev, QueueMaker};

/// Options of `type=echo`: none.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EchoOptions {}

/// The back-end.
#[derive(Debug)]
pub struct Echo;

impl Echo {
    /// Opens it.
    pub fn new(_options: &EchoOptions) -> Echo {
        Echo
    }
}

impl Netdev for Echo {
    fn kind(&self) -> &'static str {
        "echo"
    }

    fn max_queues(&self) -> Option<u16> {
        None
    }

    /// A frame can not be finished on its way: the guest would get what it left to others.
    fn host_offloads(&self) -> Offloads {
        Offloads::NONE
    }

    fn guest_offloads(&self) -> Offloads {
        Offloads::NONE
    }

    fn attach(&self, _port: &Attachment, _index: u16) -> io::Result<QueueMaker> {
        Ok(Box::new(|| Ok(Rc::new(EchoQueue::default()))))
    }
}

#[derive(Default)]
struct EchoQueue {
    sink: RefCell<Option<Rc<dyn Sink>>>,
}

impl NetQueue for EchoQueue {
    fn connect(&self, sink: Rc<dyn Sink>) {
        self.sink.replace(Some(sink));
    }

    fn disconnect(&self) {
        self.sink.replace(None);
    }

    fn transmit(&self, frames: &[Frame<'_>], _dropped: &mut dyn FnMut(DropReason)) -> usize {
        let sink = self.sink.borrow();
        let Some(sink) = &*sink else {
            return 0;
        };
        let refused = |frame: &Frame<'_>| matches!(sink.deliver(frame), Delivery::NotReady(_));
        let taken = frames.iter().position(refused).unwrap_or(frames.len());
        sink.flush();
        taken
    }

    fn writable(&self) -> LocalFuture<'_, ()> {
        let sink = self.sink.borrow().clone();
        Box::pin(async move {
            match sink {
                Some(sink) => sink.until_ready().await,
                None => pending().await,
            }
        })
    }

    fn receive(&self, _budget: usize) -> io::Result<Received> {
        Ok(Received::Drained)
    }

    fn readable(&self) -> LocalFuture<'_, ()> {
        Box::pin(pending())
    }

    fn set_guest_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }
}
