//! Transfers between a stream and several places in memory, without copies.

use super::Socket;
use crate::Buffer;
use std::mem::MaybeUninit;

/// Pieces that one system call takes.
const MAX_PIECES: usize = 64;

/// A piece of a message.
#[derive(Clone, Debug)]
pub enum Part {
    /// Bytes of its own.
    Bytes(Vec<u8>),
    /// Data of a request.
    Buffer(Buffer),
}

impl Part {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        match self {
            Part::Bytes(bytes) => bytes.len(),
            Part::Buffer(buffer) => buffer.len(),
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A transfer to or from all of `parts`, and how far it is.
pub(crate) struct Gather {
    pub(crate) socket: Socket,
    parts: Vec<Part>,
    len: usize,
    done: usize,
    iovecs: Vec<libc::iovec>,
    header: libc::msghdr,
}

impl Gather {
    pub(super) fn new(socket: Socket, parts: Vec<Part>) -> Box<Gather> {
        Box::new(Gather {
            socket,
            len: parts.iter().map(Part::len).sum(),
            parts,
            done: 0,
            iovecs: Vec::new(),
            // SAFETY: all-zero is a valid header.
            header: unsafe { MaybeUninit::zeroed().assume_init() },
        })
    }

    pub(super) fn length(&self) -> usize {
        self.len
    }

    /// The header for what is left, pointing into this (boxed, hence unmoving) value.
    pub(crate) fn header(&mut self) -> *mut libc::msghdr {
        let iovecs = &mut self.iovecs;
        iovecs.clear();
        let mut skip = self.done;
        for part in &mut self.parts {
            let len = part.len();
            if skip >= len {
                skip -= len;
                continue;
            }
            match part {
                // Sent, never received into: the memory is only read.
                Part::Bytes(bytes) => {
                    let rest = &mut bytes[skip..];
                    iovecs.push(libc::iovec {
                        iov_base: rest.as_mut_ptr().cast(),
                        iov_len: rest.len(),
                    });
                }
                Part::Buffer(buffer) => {
                    let room = MAX_PIECES.saturating_sub(iovecs.len());
                    buffer.for_each_iovec(skip, room, |iovec| iovecs.push(iovec));
                }
            }
            skip = 0;
            if iovecs.len() >= MAX_PIECES {
                break;
            }
        }
        self.header.msg_iov = iovecs.as_mut_ptr();
        self.header.msg_iovlen = iovecs.len();
        &raw mut self.header
    }

    /// Takes in a result: the final one (bytes transferred in all), or `None` when there is more to do.
    pub(crate) fn advance(&mut self, result: i32) -> Option<i32> {
        if result < 0 {
            return Some(result);
        }
        self.done += result as usize;
        // Nothing transferred is the end of the stream.
        (result == 0 || self.done == self.len).then_some(self.done as i32)
    }
}
