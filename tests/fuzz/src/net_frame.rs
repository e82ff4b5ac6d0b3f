//! What a network port does with a guest's frame before it goes on, on any bytes: header check, guard, checksum, segmentation.
//!
//! ```text
//!   input = negotiated offloads ++ receiver's offloads ++ guard's rules ++ place of the cut ++ virtio-net header ++ frame
//! ```
//!
//! No bytes may make them panic or use memory beyond their limits. Beyond that: what the guard lets pass by a frame's head it lets
//! pass by the whole frame; what goes out needs no more than the receiver does; where a frame lies in memory changes nothing.

#![expect(
    unsafe_code,
    reason = "a frame's tail is raw memory, here of a vector that outlives it"
)]

use std::net::{Ipv4Addr, Ipv6Addr};

use netd::frame::{Frame, HEAD_LEN, MAX_FRAME, MacAddress, VnetHeader};
use netd::guard::{Guard, GuardOptions};
use netd::link::Offloads;
use netd::offload::{
    GSO_NONE, MAX_SEGMENTS, NEEDS_CSUM, Scratch, check_header, finish, needs_work,
};

/// Bytes of an input before the frame.
pub const PREFIX: usize = 4 + VnetHeader::LEN;
/// The station that guards with a MAC rule know.
pub const STATION: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

/// Runs one input.
///
/// # Panics
/// When a property does not hold.
pub fn run(input: &[u8]) {
    let Some((prefix, bytes)) = input.split_first_chunk::<PREFIX>() else {
        return;
    };
    let bytes = &bytes[..bytes.len().min(MAX_FRAME)];
    let [negotiated, receiver, rules, cut, header @ ..] = *prefix;
    let (negotiated, receiver) = (offloads(negotiated), offloads(receiver));
    check_guard(&guard(rules), bytes);
    let header = VnetHeader::from_bytes(&header);
    // A header that was never checked: a network's.
    let _ = finished(&Frame::new(header, bytes), receiver);
    let Ok(header) = check_header(header, bytes.len(), negotiated) else {
        return;
    };
    assert_eq!(header.flags & !NEEDS_CSUM, 0, "{header:?}");
    assert!(usize::from(header.hdr_len) <= bytes.len(), "{header:?}");
    assert!(!needs_work(header, negotiated), "{header:?}");
    let frame = Frame::new(header, bytes);
    let whole = finished(&frame, receiver);
    check_finished(&frame, receiver, whole.as_deref());
    let pieces = Pieces::new(bytes, usize::from(cut));
    assert_eq!(finished(&pieces.frame(header), receiver), whole);
}

/// A frame that went out.
type Finished = (VnetHeader, Vec<u8>);

/// What goes out for `frame`; `None` when it is refused.
fn finished(frame: &Frame<'_>, receiver: Offloads) -> Option<Vec<Finished>> {
    let mut out = Vec::new();
    let mut scratch = Scratch::default();
    let result = finish(frame, receiver, &mut scratch, &mut |frame| {
        let mut bytes = Vec::new();
        frame.append_to(&mut bytes, usize::MAX);
        assert_eq!(bytes.len(), frame.len());
        out.push((frame.header, bytes));
    });
    if result.is_err() {
        assert!(out.is_empty(), "a refused frame went out");
        return None;
    }
    Some(out)
}

fn check_finished(frame: &Frame<'_>, receiver: Offloads, out: Option<&[Finished]>) {
    let Some(out) = out else {
        assert_ne!(
            frame.header.gso_type, GSO_NONE,
            "a checked header was refused"
        );
        return;
    };
    assert!((1..=MAX_SEGMENTS).contains(&out.len()), "{}", out.len());
    // A header does not say which IP a datagram is of; a receiver may take those of one only.
    let uso = receiver.uso4 || receiver.uso6;
    let of_either = Offloads {
        uso4: uso,
        uso6: uso,
        ..receiver
    };
    for (header, bytes) in out {
        assert!(!needs_work(*header, of_either), "{header:?}");
        assert!(bytes.len() <= frame.len(), "{} bytes", bytes.len());
    }
    let payload: usize = out.iter().map(|(_, bytes)| bytes.len()).sum();
    assert!(payload >= frame.len(), "{payload} of {} bytes", frame.len());
    if let ([(_, bytes)], GSO_NONE) = (out, frame.header.gso_type) {
        let at = usize::from(frame.header.csum_start) + usize::from(frame.header.csum_offset);
        let filled = frame.header.flags & NEEDS_CSUM != 0;
        for (place, (new, old)) in bytes.iter().zip(frame.head()).enumerate() {
            assert!(
                new == old || (filled && (at..at + 2).contains(&place)),
                "byte {place} changed"
            );
        }
    }
}

/// What is seen in a frame's head decides as what is seen in the whole does, but for what the head does not show.
fn check_guard(guard: &Guard, bytes: &[u8]) {
    let pieces = Pieces::new(bytes, HEAD_LEN);
    let header = VnetHeader::default();
    let verdict = guard.check(&pieces.frame(header));
    assert_eq!(guard.check(&pieces.frame(header)), verdict);
    if verdict.is_ok() {
        assert_eq!(guard.check(&Frame::new(header, bytes)), Ok(()));
    }
    let source = pieces.frame(header).source();
    assert!(verdict.is_err() || !source.is_multicast(), "{source}");
}

/// A frame whose tail is in pieces of seven bytes.
struct Pieces<'a> {
    head: &'a [u8],
    tail: Vec<libc::iovec>,
}

impl<'a> Pieces<'a> {
    fn new(bytes: &'a [u8], cut: usize) -> Self {
        let (head, rest) = bytes.split_at(cut.min(bytes.len()));
        let piece = |bytes: &[u8]| libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        Self {
            head,
            tail: rest.chunks(7).map(piece).collect(),
        }
    }

    fn frame(&self, header: VnetHeader) -> Frame<'_> {
        // SAFETY: the pieces are parts of a slice that is borrowed for longer than the frame.
        unsafe { Frame::with_tail(header, self.head, &self.tail) }
    }
}

fn offloads(bits: u8) -> Offloads {
    let bit = |at: u8| bits >> at & 1 != 0;
    Offloads {
        csum: bit(0),
        tso4: bit(1),
        tso6: bit(2),
        ecn: bit(3),
        uso4: bit(4),
        uso6: bit(5),
    }
}

fn guard(bits: u8) -> Guard {
    let bit = |at: u8| bits >> at & 1 != 0;
    let four = Ipv4Addr::new(10, 0, 0, 1).to_string() + "/32";
    let six = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).to_string() + "/128";
    let options = GuardOptions {
        mac: bit(0).then(|| vec![MacAddress(STATION)]),
        ipv4: bit(1).then(|| vec![four.parse().expect("a prefix")]),
        ipv6: bit(2).then(|| vec![six.parse().expect("a prefix")]),
        dhcp_server: bit(3),
        router: bit(4),
        other_protocols: bit(5),
    };
    Guard::new(options).expect("rules of one entry each")
}
