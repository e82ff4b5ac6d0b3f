//! A receive ring's buffers: chains fetched ahead, used in their order.
//!
//! ```text
//!   ring ──fetch──> │ used │ next ... end │ spare chains │
//!                            └─ what holds the next frame ─> copied to or read into, returned to the ring
//! ```
//!
//! Promises: a chain is returned to the ring only when a frame lies in it, in the order of fetching; what is left is fetched
//! again by whoever comes next. Every chain holds a virtio-net header at least; one that does not breaks the ring.

#![expect(
    unsafe_code,
    reason = "frames are copied between pieces of guest memory"
)]

use std::rc::Rc;

use vhost_daemon::ring::RingError;
use vhost_daemon::{Chain, QueueSetup, ServedRing};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::features::has;
use crate::frame::{Frame, VnetHeader};

/// Chains fetched at once.
const FETCH: usize = 32;
/// Where the number of buffers is in a virtio-net header.
const NUM_BUFFERS_AT: usize = 10;
/// Most pieces of memory that one system call takes (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Whether a frame finds room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// In the next so many chains.
    Chains(usize),
    /// When the guest gives more.
    Later,
    /// Never: it is longer than the guest's buffers.
    Never,
}

/// A receive ring and the chains fetched from it.
pub(super) struct Fifo {
    /// The ring.
    pub(super) served: Rc<ServedRing>,
    chains: Vec<Chain>,
    next: usize,
    end: usize,
    /// A frame may lie in several chains.
    mergeable: bool,
    size: usize,
    /// Returned and not shown to the guest.
    unpublished: bool,
}

impl Fifo {
    /// Of a ring that was just opened.
    pub(super) fn new(served: Rc<ServedRing>, setup: &QueueSetup) -> Fifo {
        let size = usize::from(setup.size);
        let chains = (0..FETCH.min(size)).map(|_| served.chain()).collect();
        Fifo {
            served,
            chains,
            next: 0,
            end: 0,
            mergeable: has(setup.features, VIRTIO_NET_F_MRG_RXBUF),
            size,
            unpublished: false,
        }
    }

    /// Whether a chain is there.
    #[inline]
    pub(super) fn has_chain(&self) -> bool {
        self.next < self.end || self.has_more()
    }

    /// Whether the guest gave more than was fetched.
    #[inline]
    pub(super) fn has_more(&self) -> bool {
        !self.served.is_broken() && self.served.ring().borrow().has_work()
    }

    /// Finds room for `need` bytes, header included.
    #[inline]
    pub(super) fn room(&mut self, need: usize) -> Room {
        if self.next == self.end && !self.fetch() {
            return Room::Later;
        }
        if self.chains[self.next].writable_len() >= need {
            return Room::Chains(1);
        }
        if !self.mergeable {
            return Room::Never;
        }
        self.merged(need)
    }

    fn merged(&mut self, need: usize) -> Room {
        let (mut count, mut bytes) = (0, 0);
        loop {
            while self.next + count < self.end {
                bytes += self.chains[self.next + count].writable_len();
                count += 1;
                if bytes >= need {
                    return Room::Chains(count);
                }
            }
            if count == self.size {
                return Room::Never;
            }
            if !self.fetch() {
                return Room::Later;
            }
        }
    }

    /// Fetches more chains behind those that are there; whether there were any.
    fn fetch(&mut self) -> bool {
        if self.served.is_broken() {
            return false;
        }
        // A ring takes back what it gave before it gives more.
        self.publish();
        if self.next == self.end {
            (self.next, self.end) = (0, 0);
        } else if self.end + FETCH > self.chains.len() {
            self.chains[..self.end].rotate_left(self.next);
            (self.next, self.end) = (0, self.end - self.next);
            let wanted = (self.end + FETCH).min(self.size);
            let served = &self.served;
            if wanted > self.chains.len() {
                self.chains.resize_with(wanted, || served.chain());
            }
        }
        let until = (self.end + FETCH).min(self.chains.len());
        let targets = &mut self.chains[self.end..until];
        let (count, mut error) = self.served.ring().borrow_mut().fetch(targets);
        let short = |chain: &Chain| chain.writable_len() < VnetHeader::LEN;
        let sound = targets[..count].iter().position(short);
        if sound.is_some() {
            error = Some(RingError::Request(
                "a receive buffer without room for a header",
            ));
        }
        self.end += sound.unwrap_or(count);
        self.served.settle(error);
        sound.unwrap_or(count) > 0
    }

    /// Copies a frame into the next `count` chains, which have room for it, and returns them to the ring.
    #[inline]
    pub(super) fn put(&mut self, count: usize, header: VnetHeader, frame: &Frame<'_>) {
        let header = VnetHeader {
            num_buffers: count as u16,
            ..header
        };
        let bytes = header.to_bytes();
        let chains = &self.chains[self.next..self.next + count];
        if let ([chain], []) = (chains, frame.tail()) {
            chain.copy_writable(0, &bytes);
            chain.copy_writable(VnetHeader::LEN, frame.head());
        } else {
            let mut target = Scatter { chains, offset: 0 };
            target.put(bytes.as_ptr(), bytes.len());
            target.put(frame.head().as_ptr(), frame.head().len());
            for piece in frame.tail() {
                target.put(piece.iov_base.cast(), piece.iov_len);
            }
        }
        self.give(count, VnetHeader::LEN + frame.len());
    }

    /// Appends the pieces of memory of the next chains, for up to `len` bytes, to `buffers`; how many bytes they hold.
    pub(super) fn pieces(&mut self, len: usize, buffers: &mut Vec<libc::iovec>) -> usize {
        let count = match self.room(len) {
            Room::Chains(count) => count,
            _ if self.mergeable => self.end - self.next,
            _ => (self.end - self.next).min(1),
        };
        let (start, mut bytes) = (buffers.len(), 0);
        for chain in &self.chains[self.next..self.next + count] {
            let part = chain.writable_len().min(len - bytes);
            chain.writable_pieces(0..part, |base, len| {
                if buffers.len() - start < MAX_PIECES {
                    buffers.push(libc::iovec {
                        iov_base: base.cast(),
                        iov_len: len,
                    });
                    bytes += len;
                }
            });
        }
        bytes
    }

    /// The chains that the first `written` bytes from the next one on lie in.
    pub(super) fn chains_of(&self, written: usize) -> &[Chain] {
        let (mut count, mut bytes) = (0, 0);
        while bytes < written && self.next + count < self.end {
            bytes += self.chains[self.next + count].writable_len();
            count += 1;
        }
        &self.chains[self.next..self.next + count]
    }

    /// A frame of `written` bytes, header included, was written into the next chains: says in its header how many these are, and
    /// returns them to the ring.
    pub(super) fn written(&mut self, written: usize) {
        let chains = self.chains_of(written);
        let count = chains.len();
        if let Some(first) = chains.first() {
            first.copy_writable(NUM_BUFFERS_AT, &(count as u16).to_le_bytes());
        }
        self.give(count, written);
    }

    #[inline]
    fn give(&mut self, count: usize, bytes: usize) {
        let mut left = bytes;
        let mut ring = self.served.ring().borrow_mut();
        for chain in &self.chains[self.next..self.next + count] {
            let part = left.min(chain.writable_len());
            ring.push_used(chain.head(), part as u32);
            left -= part;
        }
        self.next += count;
        self.unpublished = true;
    }

    /// Shows the guest what was returned.
    #[inline]
    pub(super) fn publish(&mut self) {
        if std::mem::take(&mut self.unpublished) {
            self.served.publish();
        }
    }

    /// Gives what was fetched and not used back to the ring, to be fetched again from whatever memory is then the guest's.
    pub(super) fn rewind(&mut self) {
        self.publish();
        self.served.ring().borrow_mut().rewind();
        (self.next, self.end) = (0, 0);
    }

    /// The memory table changed: chains to fetch into are made anew.
    pub(super) fn renew(&mut self) {
        let served = &self.served;
        self.chains.fill_with(|| served.chain());
    }
}

/// Writes one source after the other into a row of chains that have room for them all.
struct Scatter<'a> {
    chains: &'a [Chain],
    /// Bytes of the first chain that are written.
    offset: usize,
}

impl Scatter<'_> {
    /// Copies `len` bytes at `source`, which is readable and may be the guest's own memory.
    fn put(&mut self, mut source: *const u8, mut len: usize) {
        while len > 0 {
            let Some(chain) = self.chains.first() else {
                return;
            };
            let part = len.min(chain.writable_len() - self.offset);
            chain.writable_pieces(self.offset..self.offset + part, |target, len| {
                // SAFETY: `len` bytes of a mapped piece of guest memory and of the source, which are readable as the
                // caller's frame says. Both may be the same guest's memory, so they may overlap.
                unsafe {
                    std::ptr::copy(source, target, len);
                    source = source.add(len);
                }
            });
            len -= part;
            self.offset += part;
            if self.offset == chain.writable_len() {
                self.chains = &self.chains[1..];
                self.offset = 0;
            }
        }
    }
}
