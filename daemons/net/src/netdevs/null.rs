//! `type=null`: takes every frame, gives none. For measurement, and for a guest that is to have no network.

use std::future::pending;
use std::io;
use std::rc::Rc;

use serde::Deserialize;

use crate::frame::Frame;
use crate::link::{DropReason, LocalFuture, NetQueue, Offloads, Received, Sink};
use crate::netdev::{Attachment, Netdev, QueueMaker};

/// Options of `type=null`: none.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NullOptions {}

/// The back-end.
#[derive(Debug)]
pub struct Null;

impl Null {
    /// Opens it.
    pub fn new(_options: &NullOptions) -> Null {
        Null
    }
}

impl Netdev for Null {
    fn kind(&self) -> &'static str {
        "null"
    }

    fn max_queues(&self) -> Option<u16> {
        None
    }

    fn host_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn guest_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn attach(&self, _port: &Attachment, _index: u16) -> io::Result<QueueMaker> {
        Ok(Box::new(|| Ok(Rc::new(NullQueue))))
    }
}

struct NullQueue;

impl NetQueue for NullQueue {
    fn connect(&self, _sink: Rc<dyn Sink>) {}

    fn disconnect(&self) {}

    fn transmit(&self, frames: &[Frame<'_>], _dropped: &mut dyn FnMut(DropReason)) -> usize {
        frames.len()
    }

    fn writable(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {})
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
