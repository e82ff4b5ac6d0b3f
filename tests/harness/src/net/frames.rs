//! Frames to send, and what to ask of those that come back.

use anyhow::{Result, ensure};

/// A station's address.
pub type Mac = [u8; 6];

/// All stations.
pub const BROADCAST: Mac = [0xff; 6];
/// EtherType of experiments within one network (IEEE 802).
pub const EXPERIMENT: u16 = 0x88b5;
/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of a VLAN tag.
pub const VLAN: u16 = 0x8100;

/// Bytes of an Ethernet header.
pub const ETHERNET_BYTES: usize = 14;
/// Bytes of the shortest numbered frame.
pub const SHORTEST_NUMBERED: usize = ETHERNET_BYTES + 8;

/// The address of station `number`: locally administered, unicast.
pub const fn station(number: u8) -> Mac {
    [0x52, 0x54, 0, 0, 0, number]
}

/// An Ethernet frame.
pub fn ethernet(destination: Mac, source: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(ETHERNET_BYTES + payload.len());
    frame.extend_from_slice(&destination);
    frame.extend_from_slice(&source);
    frame.extend_from_slice(&kind.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// `frame` with a tag of VLAN `id`.
pub fn tagged(frame: &[u8], id: u16) -> Vec<u8> {
    let mut bytes = frame[..12].to_vec();
    bytes.extend_from_slice(&VLAN.to_be_bytes());
    bytes.extend_from_slice(&id.to_be_bytes());
    bytes.extend_from_slice(&frame[12..]);
    bytes
}

/// A frame of `bytes` bytes that carries `number`, and bytes that follow from it.
///
/// # Panics
/// When it is shorter than [`SHORTEST_NUMBERED`].
pub fn numbered((destination, source): (Mac, Mac), number: u64, bytes: usize) -> Vec<u8> {
    assert!(
        bytes >= SHORTEST_NUMBERED,
        "a numbered frame of {bytes} bytes"
    );
    let mut frame = ethernet(destination, source, EXPERIMENT, &number.to_be_bytes());
    let mut state = number ^ 0x9e37_79b9_7f4a_7c15;
    while frame.len() < bytes {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let word = (state ^ state >> 29).to_le_bytes();
        let left = bytes - frame.len();
        frame.extend_from_slice(&word[..left.min(8)]);
    }
    frame
}

/// The number of a frame that [`numbered`] made, whose every byte is right. Where it was sent from and to is not looked at.
///
/// # Errors
/// When it is none.
pub fn number_of(frame: &[u8]) -> Result<u64> {
    ensure!(
        frame.len() >= SHORTEST_NUMBERED,
        "frame of {} bytes",
        frame.len()
    );
    let mut word = [0; 8];
    word.copy_from_slice(&frame[ETHERNET_BYTES..SHORTEST_NUMBERED]);
    let number = u64::from_be_bytes(word);
    let right = numbered((BROADCAST, BROADCAST), number, frame.len());
    let differs = (12..frame.len()).find(|&at| frame[at] != right[at]);
    ensure!(
        differs.is_none(),
        "frame that says it is number {number}, {} bytes, is wrong from byte {differs:?} on",
        frame.len()
    );
    Ok(number)
}

/// Internet checksum of `bytes` (RFC 1071), from a sum so far.
pub fn checksum(start: u32, bytes: &[u8]) -> u16 {
    let mut sum = u64::from(start);
    for pair in bytes.chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u64::from(u16::from_be_bytes([pair[0], low]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Ends of a TCP or UDP conversation over IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// From and to, addresses.
    pub macs: (Mac, Mac),
    /// From and to, addresses.
    pub addresses: ([u8; 4], [u8; 4]),
    /// From and to, ports.
    pub ports: (u16, u16),
}

/// Sum over the pseudo-header of a TCP or UDP segment of `bytes` bytes.
fn pseudo_sum(flow: &Flow, protocol: u8, bytes: usize) -> u32 {
    let words = |address: [u8; 4]| {
        u32::from(u16::from_be_bytes([address[0], address[1]]))
            + u32::from(u16::from_be_bytes([address[2], address[3]]))
    };
    words(flow.addresses.0) + words(flow.addresses.1) + u32::from(protocol) + bytes as u32
}

fn ipv4(flow: &Flow, protocol: u8, segment: &[u8]) -> Vec<u8> {
    let total = (20 + segment.len()) as u16;
    let mut header = vec![0x45, 0];
    header.extend_from_slice(&total.to_be_bytes());
    header.extend_from_slice(&[0, 1, 0x40, 0, 64, protocol, 0, 0]);
    header.extend_from_slice(&flow.addresses.0);
    header.extend_from_slice(&flow.addresses.1);
    let sum = checksum(0, &header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header.extend_from_slice(segment);
    ethernet(flow.macs.1, flow.macs.0, IPV4, &header)
}

/// Where the TCP header of a [`tcp`] frame begins.
pub const TCP_AT: usize = ETHERNET_BYTES + 20;
/// Where the payload of a [`tcp`] frame begins.
pub const TCP_PAYLOAD_AT: usize = TCP_AT + 20;

/// A TCP segment at sequence number `sequence`; its checksum covers only the pseudo-header, as a guest leaves it that has
/// checksum offload.
pub fn tcp(flow: &Flow, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let mut segment = Vec::with_capacity(20 + payload.len());
    segment.extend_from_slice(&flow.ports.0.to_be_bytes());
    segment.extend_from_slice(&flow.ports.1.to_be_bytes());
    segment.extend_from_slice(&sequence.to_be_bytes());
    segment.extend_from_slice(&[0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend_from_slice(payload);
    let sum = !checksum(pseudo_sum(flow, 6, segment.len()), &[]);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    ipv4(flow, 6, &segment)
}

/// A whole UDP datagram without a checksum.
pub fn udp(flow: &Flow, payload: &[u8]) -> Vec<u8> {
    let mut segment = Vec::with_capacity(8 + payload.len());
    segment.extend_from_slice(&flow.ports.0.to_be_bytes());
    segment.extend_from_slice(&flow.ports.1.to_be_bytes());
    segment.extend_from_slice(&((8 + payload.len()) as u16).to_be_bytes());
    segment.extend_from_slice(&[0, 0]);
    segment.extend_from_slice(payload);
    ipv4(flow, 17, &segment)
}

/// Whether the checksums of a TCP frame of `flow` are right.
///
/// # Errors
/// Says which one is wrong.
pub fn check_tcp(flow: &Flow, frame: &[u8]) -> Result<()> {
    ensure!(frame.len() >= TCP_PAYLOAD_AT, "{} bytes", frame.len());
    let header = checksum(0, &frame[ETHERNET_BYTES..TCP_AT]);
    ensure!(header == 0, "checksum of the IP header");
    let total = u16::from_be_bytes([frame[16], frame[17]]);
    ensure!(
        usize::from(total) == frame.len() - ETHERNET_BYTES,
        "IP length {total} in a frame of {} bytes",
        frame.len()
    );
    let segment = &frame[TCP_AT..];
    let sum = checksum(pseudo_sum(flow, 6, segment.len()), segment);
    ensure!(sum == 0, "checksum of the TCP segment");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_numbered_frame_is_known_by_every_byte() {
        let pair = (station(1), station(2));
        for bytes in [22, 23, 60, 1514, 65535] {
            let mut frame = numbered(pair, 77, bytes);
            assert_eq!(frame.len(), bytes);
            assert_eq!(number_of(&frame).unwrap(), 77);
            let last = bytes - 1;
            frame[last] ^= 1;
            assert_ne!(number_of(&frame).ok(), Some(77), "{bytes}");
        }
        assert!(number_of(&[0; 21]).is_err());
    }

    #[test]
    fn an_unfinished_tcp_checksum_is_seen() {
        let flow = Flow {
            macs: (station(1), station(2)),
            addresses: ([10, 0, 0, 1], [10, 0, 0, 2]),
            ports: (1, 2),
        };
        let mut frame = tcp(&flow, 5, b"payload");
        assert!(check_tcp(&flow, &frame).is_err());
        // Finished as a receiver of such a frame does it.
        let sum = checksum(0, &frame[TCP_AT..]);
        frame[TCP_AT + 16..TCP_AT + 18].copy_from_slice(&sum.to_be_bytes());
        check_tcp(&flow, &frame).unwrap();
    }
}
