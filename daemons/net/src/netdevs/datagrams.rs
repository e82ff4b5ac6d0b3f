//! Bursts of frames on sockets where each message is a frame: `recvmmsg` and `sendmmsg`.
//!
//! ```text
//!   Inbox: slot i = │ tag room (4) │ frame, up to MAX_FRAME, one byte more to tell "too long" │     header and tag beside it
//! ```
//!
//! A received frame stays in the inbox until it is taken, so that a guest that is not ready loses nothing. A VLAN tag that the
//! kernel took out of a frame is put back in place: the two addresses move into the room before it.

#![expect(
    unsafe_code,
    reason = "message headers point at buffers and at guest memory"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::vectors;
use crate::frame::{Frame, MAX_FRAME, VnetHeader};
use crate::link::BURST;

/// Bytes of a VLAN tag.
const TAG_LEN: usize = 4;
/// Both addresses.
const ADDRESSES_LEN: usize = 12;
const SLOT_LEN: usize = (TAG_LEN + MAX_FRAME + 1).next_multiple_of(64);
/// Room for one control message of `struct tpacket_auxdata`, as u64s.
const CONTROL_LEN: usize = 8;

/// `linux/if_packet.h`
const PACKET_AUXDATA: i32 = 8;
const TP_STATUS_VLAN_VALID: u32 = 1 << 4;
const TP_STATUS_VLAN_TPID_VALID: u32 = 1 << 6;

/// `struct tpacket_auxdata`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Auxdata {
    status: u32,
    len: u32,
    snaplen: u32,
    mac: u16,
    net: u16,
    vlan_tci: u16,
    vlan_tpid: u16,
}

/// What is before a frame in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// Nothing.
    Plain,
    /// `struct virtio_net_hdr`, 10 bytes; auxiliary data comes along.
    Packet,
}

impl Shape {
    fn header_len(self) -> usize {
        match self {
            Shape::Plain => 0,
            Shape::Packet => 10,
        }
    }
}

/// Frames that were received and not taken.
pub(super) struct Inbox {
    shape: Shape,
    room: Box<[u8]>,
    headers: [[u8; VnetHeader::LEN]; BURST],
    controls: [[u64; CONTROL_LEN]; BURST],
    /// Length of each frame, and where it begins in its slot.
    frames: [(usize, usize); BURST],
    next: usize,
    count: usize,
}

fn empty_message() -> libc::mmsghdr {
    // SAFETY: all-zero is a valid message header.
    unsafe { std::mem::zeroed() }
}

const NO_PIECE: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

impl Inbox {
    pub(super) fn new(shape: Shape) -> Inbox {
        Inbox {
            shape,
            room: vec![0; BURST * SLOT_LEN].into(),
            headers: [[0; VnetHeader::LEN]; BURST],
            controls: [[0; CONTROL_LEN]; BURST],
            frames: [(0, 0); BURST],
            next: 0,
            count: 0,
        }
    }

    /// The oldest frame; one that was cut off is longer than [`MAX_FRAME`].
    pub(super) fn front(&self) -> Option<Frame<'_>> {
        if self.next == self.count {
            return None;
        }
        let (len, start) = self.frames[self.next];
        let slot = &self.room[self.next * SLOT_LEN..][..SLOT_LEN];
        let header = VnetHeader::from_bytes(&self.headers[self.next]);
        Some(Frame::new(header, &slot[start..start + len]))
    }

    /// Takes the oldest frame out.
    pub(super) fn pop(&mut self) {
        self.next = (self.next + 1).min(self.count);
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        (self.next, self.count) = (0, 0);
    }

    /// Receives what is there, up to a burst. The inbox has to be empty.
    pub(super) fn fill(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.clear();
        let header_len = self.shape.header_len();
        let mut pieces = [[NO_PIECE; 2]; BURST];
        let mut messages = [empty_message(); BURST];
        let slots = self.room.chunks_exact_mut(SLOT_LEN);
        let beside = self.headers.iter_mut().zip(&mut self.controls);
        let targets = messages.iter_mut().zip(&mut pieces);
        for ((slot, (header, control)), (message, pieces)) in slots.zip(beside).zip(targets) {
            *header = [0; VnetHeader::LEN];
            pieces[0] = vectors::piece_mut(&mut header[..header_len]);
            pieces[1] = vectors::piece_mut(&mut slot[TAG_LEN..TAG_LEN + MAX_FRAME + 1]);
            message.msg_hdr.msg_iov = pieces.as_mut_ptr();
            message.msg_hdr.msg_iovlen = pieces.len();
            if self.shape == Shape::Packet {
                message.msg_hdr.msg_control = control.as_mut_ptr().cast();
                message.msg_hdr.msg_controllen = size_of_val(control);
            }
        }
        let (start, flags) = (messages.as_mut_ptr(), libc::MSG_DONTWAIT);
        let no_limit = std::ptr::null_mut();
        // SAFETY: BURST headers, whose pieces and control buffers are distinct parts of this inbox.
        let count = unsafe { libc::recvmmsg(fd.as_raw_fd(), start, BURST as u32, flags, no_limit) };
        self.count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for (index, message) in messages[..self.count].iter().enumerate() {
            self.arrange(index, message);
        }
        Ok(())
    }

    /// Finds where frame `index` is, and puts its tag back.
    fn arrange(&mut self, index: usize, message: &libc::mmsghdr) {
        let received = message.msg_len as usize;
        let len = received.saturating_sub(self.shape.header_len());
        self.frames[index] = (len, TAG_LEN);
        let Some((tpid, tci)) = tag(message).filter(|_| len >= ADDRESSES_LEN) else {
            return;
        };
        let slot = &mut self.room[index * SLOT_LEN..][..SLOT_LEN];
        slot.copy_within(TAG_LEN..TAG_LEN + ADDRESSES_LEN, 0);
        slot[ADDRESSES_LEN..ADDRESSES_LEN + 2].copy_from_slice(&tpid.to_be_bytes());
        slot[ADDRESSES_LEN + 2..ADDRESSES_LEN + 4].copy_from_slice(&tci.to_be_bytes());
        self.frames[index] = (len + TAG_LEN, 0);
        // What the header counts from the frame's first byte is further behind now.
        let mut header = VnetHeader::from_bytes(&self.headers[index]);
        if header != VnetHeader::default() {
            header.csum_start = header.csum_start.saturating_add(TAG_LEN as u16);
            header.hdr_len = header.hdr_len.saturating_add(TAG_LEN as u16);
            self.headers[index] = header.to_bytes();
        }
    }
}

/// The VLAN tag, TPID and TCI, that the kernel took out of a frame.
fn tag(message: &libc::mmsghdr) -> Option<(u16, u16)> {
    if message.msg_hdr.msg_control.is_null() {
        return None;
    }
    // SAFETY: the kernel has filled the control buffer up to `msg_controllen` with whole control messages.
    let control = unsafe { libc::CMSG_FIRSTHDR(&raw const message.msg_hdr).as_ref()? };
    let is_auxdata = control.cmsg_level == libc::SOL_PACKET
        && control.cmsg_type == PACKET_AUXDATA
        // SAFETY: only computes.
        && control.cmsg_len >= unsafe { libc::CMSG_LEN(size_of::<Auxdata>() as u32) } as usize;
    if !is_auxdata {
        return None;
    }
    // SAFETY: the message holds that many bytes, and any bytes are an `Auxdata`.
    let auxdata = unsafe { libc::CMSG_DATA(control).cast::<Auxdata>().read_unaligned() };
    if auxdata.status & TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let tpid = match auxdata.status & TP_STATUS_VLAN_TPID_VALID {
        0 => libc::ETH_P_8021Q as u16,
        _ => auxdata.vlan_tpid,
    };
    Some((tpid, auxdata.vlan_tci))
}

/// What sending reuses.
#[derive(Default)]
pub(super) struct Outbox {
    pieces: Vec<libc::iovec>,
    flat: Vec<u8>,
}

impl Outbox {
    /// Sends up to a burst of frames. How many went; the error of the first one when none did.
    pub(super) fn send(
        &mut self,
        fd: BorrowedFd<'_>,
        shape: Shape,
        frames: &[Frame<'_>],
    ) -> io::Result<usize> {
        let mut headers = [[0; VnetHeader::LEN]; BURST];
        let mut ranges = [(0, 0); BURST];
        let mut count = 0;
        self.pieces.clear();
        for (frame, header) in frames.iter().zip(&mut headers) {
            // A frame in very many pieces goes alone, put together.
            let many = frame.tail().len() + 2 > vectors::MAX_PIECES;
            if many && count > 0 {
                break;
            }
            let start = self.pieces.len();
            *header = frame.header.to_bytes();
            self.pieces
                .push(vectors::piece(&header[..shape.header_len()]));
            if many {
                self.flat.clear();
                frame.append_to(&mut self.flat, frame.len());
                self.pieces.push(vectors::piece(&self.flat));
            } else {
                self.pieces.push(vectors::piece(frame.head()));
                self.pieces.extend_from_slice(frame.tail());
            }
            ranges[count] = (start, self.pieces.len() - start);
            count += 1;
            if many {
                break;
            }
        }
        let mut messages = [empty_message(); BURST];
        for (message, (start, len)) in messages.iter_mut().zip(ranges) {
            message.msg_hdr.msg_iov = self.pieces[start..].as_mut_ptr();
            message.msg_hdr.msg_iovlen = len;
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let start = messages.as_mut_ptr();
        // SAFETY: `count` headers, whose pieces are ours or those of frames, which are readable while they are there.
        let sent = unsafe { libc::sendmmsg(fd.as_raw_fd(), start, count as u32, flags) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_goes_back_between_addresses_and_type() {
        let mut inbox = Inbox::new(Shape::Packet);
        let frame: Vec<u8> = (0..60).collect();
        inbox.room[SLOT_LEN + TAG_LEN..][..60].copy_from_slice(&frame);
        let header = VnetHeader {
            flags: 1,
            csum_start: 34,
            csum_offset: 6,
            ..VnetHeader::default()
        };
        inbox.headers[1] = header.to_bytes();
        inbox.controls[1][0] = 16 + size_of::<Auxdata>() as u64;
        inbox.controls[1][1] = libc::SOL_PACKET as u64 | (PACKET_AUXDATA as u64) << 32;
        let auxdata = Auxdata {
            status: TP_STATUS_VLAN_VALID | TP_STATUS_VLAN_TPID_VALID,
            vlan_tci: 0x2005,
            vlan_tpid: 0x88a8,
            ..Auxdata::default()
        };
        let mut message = empty_message();
        message.msg_len = 70;
        message.msg_hdr.msg_control = inbox.controls[1].as_mut_ptr().cast();
        message.msg_hdr.msg_controllen = size_of_val(&inbox.controls[1]);
        // SAFETY: behind the control message's header, in a buffer of 64 bytes.
        unsafe {
            inbox.controls[1]
                .as_mut_ptr()
                .add(2)
                .cast::<Auxdata>()
                .write(auxdata)
        };
        inbox.arrange(1, &message);
        (inbox.next, inbox.count) = (1, 2);
        let tagged = inbox.front().unwrap();
        let expected = [&frame[..12], &[0x88, 0xa8, 0x20, 0x05], &frame[12..]].concat();
        assert_eq!(tagged.head(), expected);
        assert_eq!(
            (tagged.header.csum_start, tagged.header.csum_offset),
            (38, 6)
        );
    }
}
