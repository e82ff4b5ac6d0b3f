//! What a virtio-net header leaves to be done for a frame, done in software: checksums, segmentation of TCP and UDP.
//!
//! ```text
//!   guest ── check_header ──> needs_work? ── no ──> goes on as it is
//!                                 └─ yes ──> finish: one private copy, then
//!                                              checksum        one frame
//!                                              segmentation    frames of up to gso_size bytes of payload each
//! ```
//!
//! Virtio 1.2 section 5.1.6.2. Only what the receiver cannot do is done: segments for one that fills checksums in keep theirs
//! open. Work happens on a copy in [`Scratch`], which a thread keeps: a checksum is right for the bytes that go out, whatever the
//! guest does with its memory meanwhile. A segment is one piece of that copy, its headers written over payload that is gone.

mod checksum;
mod segment;
#[cfg(test)]
mod tests;

use crate::frame::{Frame, VnetHeader};
use crate::link::{DropReason, Offloads};

use checksum::Sum;

/// The checksum is not filled in: `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
pub const NEEDS_CSUM: u8 = 1;
/// The checksum was found right: `VIRTIO_NET_HDR_F_DATA_VALID`. Only towards a guest that negotiated `GUEST_CSUM`.
pub const DATA_VALID: u8 = 2;

/// One packet as it is: `VIRTIO_NET_HDR_GSO_NONE`.
pub const GSO_NONE: u8 = 0;
/// TCP over IPv4 to be segmented: `VIRTIO_NET_HDR_GSO_TCPV4`.
pub const GSO_TCPV4: u8 = 1;
/// TCP over IPv6 to be segmented: `VIRTIO_NET_HDR_GSO_TCPV6`.
pub const GSO_TCPV6: u8 = 4;
/// UDP to be segmented: `VIRTIO_NET_HDR_GSO_UDP_L4`.
pub const GSO_UDP_L4: u8 = 5;
/// With one of the TCP types: the packet has congestion notification bits, `VIRTIO_NET_HDR_GSO_ECN`.
pub const GSO_ECN: u8 = 0x80;

/// Segments that one frame is cut into at most: 32 bytes of payload each of the longest frame. A guest that asks for smaller
/// ones makes work for others, not traffic.
pub const MAX_SEGMENTS: usize = 2048;

/// Memory for the work, kept by a thread from frame to frame. It grows to the longest frame.
#[derive(Debug, Default)]
pub struct Scratch {
    frame: Vec<u8>,
    headers: Vec<u8>,
}

/// Whether a header leaves anything to be done.
#[inline]
pub fn has_work(header: VnetHeader) -> bool {
    header.flags & NEEDS_CSUM != 0 || header.gso_type != GSO_NONE
}

/// Checks the virtio-net header of a frame of `frame_len` bytes from a guest that may leave `negotiated` undone, and gives the
/// one to go on with: without flags that are not a guest's to set, and with a header length that is inside of the frame.
///
/// # Errors
/// [`DropReason::BadHeader`] for a kind of segmentation that was not negotiated or lacks its size or its checksum, and for a
/// checksum that was not negotiated or lies outside of the frame.
#[inline]
pub fn check_header(
    header: VnetHeader,
    frame_len: usize,
    negotiated: Offloads,
) -> Result<VnetHeader, DropReason> {
    if !has_work(header) {
        return Ok(VnetHeader::default());
    }
    check_work(header, frame_len, negotiated)
}

fn check_work(
    header: VnetHeader,
    frame_len: usize,
    negotiated: Offloads,
) -> Result<VnetHeader, DropReason> {
    let checksum_end = usize::from(header.csum_start) + usize::from(header.csum_offset) + 2;
    let segments_well = match header.gso_type {
        GSO_NONE => true,
        _ => header.gso_size > 0 && takes(header.gso_type, negotiated),
    };
    if header.flags & NEEDS_CSUM == 0
        || !negotiated.csum
        || checksum_end > frame_len
        || !segments_well
    {
        return Err(DropReason::BadHeader);
    }
    let gso_size = match header.gso_type {
        GSO_NONE => 0,
        _ => header.gso_size,
    };
    Ok(VnetHeader {
        flags: NEEDS_CSUM,
        hdr_len: header
            .hdr_len
            .min(u16::try_from(frame_len).unwrap_or(u16::MAX)),
        gso_size,
        num_buffers: 0,
        ..header
    })
}

/// Whether a receiver with `offloads` segments frames of `gso_type`, whichever IP they are.
fn takes(gso_type: u8, offloads: Offloads) -> bool {
    match gso_type & !GSO_ECN {
        GSO_TCPV4 => offloads.tso4 && (gso_type & GSO_ECN == 0 || offloads.ecn),
        GSO_TCPV6 => offloads.tso6 && (gso_type & GSO_ECN == 0 || offloads.ecn),
        GSO_UDP_L4 => gso_type & GSO_ECN == 0 && offloads.uso4 && offloads.uso6,
        _ => false,
    }
}

/// Whether a frame with this header has to go through [`finish`] for a receiver with `offloads`.
#[inline]
pub fn needs_work(header: VnetHeader, offloads: Offloads) -> bool {
    if !has_work(header) {
        return false;
    }
    !offloads.csum || (header.gso_type != GSO_NONE && !takes(header.gso_type, offloads))
}

/// Emits the frames that `frame` is for a receiver with `offloads`, in their order. Their headers say what is left to do, which
/// such a receiver does. What [`check_header`] promises of the header is checked again: a network's header can be wrong too.
///
/// # Errors
/// [`DropReason::BadHeader`] when the frame is not what its header says; nothing was emitted then.
pub fn finish(
    frame: &Frame<'_>,
    offloads: Offloads,
    scratch: &mut Scratch,
    emit: &mut dyn FnMut(&Frame<'_>),
) -> Result<(), DropReason> {
    if !needs_work(frame.header, offloads) {
        emit(frame);
        return Ok(());
    }
    scratch.frame.clear();
    frame.append_to(&mut scratch.frame, frame.len());
    if frame.header.gso_type != GSO_NONE {
        return segment::segment(frame.header, offloads, scratch, emit);
    }
    fill_checksum(frame.header, &mut scratch.frame)?;
    emit(&Frame::new(VnetHeader::default(), &scratch.frame));
    Ok(())
}

/// Fills in the checksum that `header` leaves open: what is in its place already is the sum of the pseudo header.
fn fill_checksum(header: VnetHeader, frame: &mut [u8]) -> Result<(), DropReason> {
    let covered = frame
        .get_mut(usize::from(header.csum_start)..)
        .ok_or(DropReason::BadHeader)?;
    let sum = Sum::default().add(covered);
    let at = usize::from(header.csum_offset);
    let field = covered.get_mut(at..at + 2).ok_or(DropReason::BadHeader)?;
    field.copy_from_slice(&sum.nonzero());
    Ok(())
}
