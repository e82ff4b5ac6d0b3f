//! Segmentation of TCP and UDP.
//!
//! ```text
//!   copy of the frame:   headers │ payload 0 │ payload 1 │ payload 2 │
//!   segment 0            headers │ payload 0 │
//!   segment 1               (gone) headers'  │ payload 1 │
//!   segment 2                           (gone) headers'' │ payload 2 │
//! ```
//!
//! As the kernel's: IPv4 identifications count up, PSH and FIN stay on the last segment only, CWR on the first only (RFC 3168
//! section 6.1.2), sequence numbers follow the payload, UDP lengths are each segment's.

use crate::frame::{Frame, VnetHeader};
use crate::link::{DropReason, Offloads};
use crate::packet::{self, Fragment, Transport};

use super::checksum::Sum;
use super::{
    GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, MAX_SEGMENTS, NEEDS_CSUM, Scratch,
};

const TCP_SEQUENCE_AT: usize = 4;
const TCP_DATA_OFFSET_AT: usize = 12;
const TCP_FLAGS_AT: usize = 13;
const TCP_CHECKSUM_AT: usize = 16;
const TCP_HEADER_LEN: usize = 20;
const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

const UDP_LENGTH_AT: usize = 4;
const UDP_CHECKSUM_AT: usize = 6;
const UDP_HEADER_LEN: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IpVersion {
    V4,
    V6,
}

/// Where the headers of a frame to be segmented are; all of them lie inside of it.
#[derive(Clone, Copy, Debug)]
struct Layout {
    version: IpVersion,
    protocol: u8,
    network: usize,
    transport: usize,
    payload: usize,
    /// From the frame's start.
    checksum: usize,
}

impl Layout {
    /// Finds the headers of `frame`, which have to be those that `header` tells.
    fn find(header: VnetHeader, frame: &[u8]) -> Option<Layout> {
        let network = packet::network(frame)?;
        let (version, transport) = match network.ethertype {
            packet::ETHERTYPE_IPV4 => (IpVersion::V4, packet::ipv4_transport(frame, network.at)?),
            packet::ETHERTYPE_IPV6 => (IpVersion::V6, packet::ipv6_transport(frame, network.at)?),
            _ => return None,
        };
        let Transport {
            protocol,
            at,
            fragment,
        } = transport;
        let matches = matches!(
            (header.gso_type & !GSO_ECN, version, protocol),
            (GSO_TCPV4, IpVersion::V4, packet::PROTOCOL_TCP)
                | (GSO_TCPV6, IpVersion::V6, packet::PROTOCOL_TCP)
                | (GSO_UDP_L4, _, packet::PROTOCOL_UDP)
        );
        let (header_len, checksum_at) = match protocol {
            packet::PROTOCOL_TCP => {
                let data_offset = *frame.get(at + TCP_DATA_OFFSET_AT)? >> 4;
                (usize::from(data_offset) * 4, TCP_CHECKSUM_AT)
            }
            _ => (UDP_HEADER_LEN, UDP_CHECKSUM_AT),
        };
        let whole_header = protocol != packet::PROTOCOL_TCP || header_len >= TCP_HEADER_LEN;
        let layout = Layout {
            version,
            protocol,
            network: network.at,
            transport: at,
            payload: at + header_len,
            checksum: at + checksum_at,
        };
        let valid = matches
            && whole_header
            && fragment == Fragment::Whole
            && layout.payload <= frame.len()
            && header.flags & NEEDS_CSUM != 0
            && usize::from(header.csum_start) == at
            && usize::from(header.csum_offset) == checksum_at;
        valid.then_some(layout)
    }

    /// Whether the receiver segments this frame by itself.
    fn is_taken(&self, gso_type: u8, offloads: Offloads) -> bool {
        let this_kind = match (self.protocol, self.version) {
            (packet::PROTOCOL_TCP, IpVersion::V4) => offloads.tso4,
            (packet::PROTOCOL_TCP, IpVersion::V6) => offloads.tso6,
            (_, IpVersion::V4) => offloads.uso4,
            (_, IpVersion::V6) => offloads.uso6,
        };
        offloads.csum && this_kind && (gso_type & GSO_ECN == 0 || offloads.ecn)
    }

    /// Sum of the pseudo header of a segment of `len` bytes from the transport header on, which `frame` begins with.
    fn pseudo_header(&self, frame: &[u8], len: u16) -> Sum {
        let addresses = match self.version {
            IpVersion::V4 => &frame[self.network + 12..self.network + 20],
            IpVersion::V6 => &frame[self.network + 8..self.network + 40],
        };
        Sum::default()
            .add(addresses)
            .add_word(u16::from(self.protocol))
            .add_word(len)
    }
}

/// Which segment of how many.
#[derive(Clone, Copy, Debug)]
struct Place {
    index: usize,
    is_last: bool,
    /// Payload bytes before it.
    offset: usize,
}

/// Cuts the frame in `scratch.frame` and emits the segments.
///
/// # Errors
/// [`DropReason::BadHeader`] when the frame is not what `header` says; nothing was emitted then.
pub(super) fn segment(
    header: VnetHeader,
    offloads: Offloads,
    scratch: &mut Scratch,
    emit: &mut dyn FnMut(&Frame<'_>),
) -> Result<(), DropReason> {
    let Scratch { frame, headers } = scratch;
    let layout = Layout::find(header, frame).ok_or(DropReason::BadHeader)?;
    if layout.is_taken(header.gso_type, offloads) {
        emit(&Frame::new(header, frame));
        return Ok(());
    }
    let size = usize::from(header.gso_size);
    let total = frame.len() - layout.payload;
    // What follows the fixed IP header has to be countable in 16 bits, in every segment.
    let longest = layout.payload - layout.network + size.min(total);
    if size == 0 || total.div_ceil(size) > MAX_SEGMENTS || longest > usize::from(u16::MAX) {
        return Err(DropReason::BadHeader);
    }
    let left = VnetHeader {
        flags: if offloads.csum { NEEDS_CSUM } else { 0 },
        gso_type: GSO_NONE,
        hdr_len: if offloads.csum {
            layout.payload as u16
        } else {
            0
        },
        gso_size: 0,
        csum_start: if offloads.csum { header.csum_start } else { 0 },
        csum_offset: if offloads.csum { header.csum_offset } else { 0 },
        num_buffers: 0,
    };
    headers.clear();
    headers.extend_from_slice(&frame[..layout.payload]);
    let count = total.div_ceil(size).max(1);
    for index in 0..count {
        let offset = index * size;
        let payload = size.min(total - offset);
        // Its headers go over those, or the payload, of the segment before, which is gone.
        let bytes = &mut frame[offset..offset + layout.payload + payload];
        bytes[..layout.payload].copy_from_slice(headers);
        let place = Place {
            index,
            is_last: index + 1 == count,
            offset,
        };
        write_network(&layout, bytes, index);
        write_transport(&layout, bytes, place);
        write_checksum(&layout, bytes, offloads.csum);
        emit(&Frame::new(left, bytes));
    }
    Ok(())
}

/// Lengths, identification and header checksum of a segment's IP header.
fn write_network(layout: &Layout, bytes: &mut [u8], index: usize) {
    let len = bytes.len() - layout.network;
    let ip = &mut bytes[layout.network..layout.transport];
    match layout.version {
        IpVersion::V4 => {
            ip[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            let first = u16::from_be_bytes([ip[4], ip[5]]);
            let identification = first.wrapping_add(index as u16);
            ip[4..6].copy_from_slice(&identification.to_be_bytes());
            ip[10..12].fill(0);
            let checksum = Sum::default().add(ip).complement();
            ip[10..12].copy_from_slice(&checksum);
        }
        IpVersion::V6 => {
            // The payload length counts extension headers, but not the fixed header.
            ip[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
        }
    }
}

/// Sequence number and flags of a TCP segment, length of a UDP one.
fn write_transport(layout: &Layout, bytes: &mut [u8], place: Place) {
    let transport = &mut bytes[layout.transport..];
    if layout.protocol != packet::PROTOCOL_TCP {
        let len = transport.len() as u16;
        transport[UDP_LENGTH_AT..UDP_LENGTH_AT + 2].copy_from_slice(&len.to_be_bytes());
        return;
    }
    let field = &mut transport[TCP_SEQUENCE_AT..TCP_SEQUENCE_AT + 4];
    let first = u32::from_be_bytes([field[0], field[1], field[2], field[3]]);
    field.copy_from_slice(&first.wrapping_add(place.offset as u32).to_be_bytes());
    if !place.is_last {
        transport[TCP_FLAGS_AT] &= !(TCP_FIN | TCP_PSH);
    }
    if place.index > 0 {
        transport[TCP_FLAGS_AT] &= !TCP_CWR;
    }
}

/// The transport checksum of a segment: of the pseudo header alone when the receiver does the rest.
fn write_checksum(layout: &Layout, bytes: &mut [u8], is_left_open: bool) {
    let len = (bytes.len() - layout.transport) as u16;
    let pseudo = layout.pseudo_header(bytes, len);
    let field = layout.checksum..layout.checksum + 2;
    if is_left_open {
        bytes[field].copy_from_slice(&pseudo.partial());
        return;
    }
    bytes[field.clone()].fill(0);
    let checksum = pseudo.add(&bytes[layout.transport..]).nonzero();
    bytes[field].copy_from_slice(&checksum);
}
