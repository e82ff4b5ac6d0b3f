//! Segments put together again are what was cut; checksums are right by a slow and independent sum.

mod kernel;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

/// The one's complement sum by its definition: words of 16 bits, each carry added at once.
pub(crate) fn slow_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A frame to be segmented, as a guest makes one.
#[derive(Clone, Debug)]
struct Packet {
    tags: usize,
    v6: bool,
    udp: bool,
    ip_options: usize,
    tcp_options: usize,
    tcp_flags: u8,
    identification: u16,
    sequence: u32,
    payload: Vec<u8>,
    gso_size: u16,
}

impl Packet {
    fn random(rng: &mut SmallRng) -> Packet {
        let v6 = rng.random();
        let len = match rng.random_range(0..4) {
            0 => rng.random_range(0..64),
            1 => 60_000,
            _ => rng.random_range(0..9000),
        };
        Packet {
            tags: rng.random_range(0..3),
            v6,
            udp: rng.random(),
            ip_options: rng.random_range(0..3) * if v6 { 8 } else { 4 },
            tcp_options: rng.random_range(0..=10) * 4,
            tcp_flags: rng.random(),
            identification: rng.random(),
            sequence: rng.random(),
            payload: (0..len).map(|_| rng.random()).collect(),
            gso_size: rng.random_range(40..3000),
        }
    }

    fn network_at(&self) -> usize {
        14 + 4 * self.tags
    }

    fn transport_at(&self) -> usize {
        self.network_at() + if self.v6 { 40 } else { 20 } + self.ip_options
    }

    fn payload_at(&self) -> usize {
        self.transport_at() + if self.udp { 8 } else { 20 + self.tcp_options }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for _ in 0..self.tags {
            bytes.extend([0x81, 0, 0, 10]);
        }
        let protocol = if self.udp { 17 } else { 6 };
        let transport_len = self.payload_at() - self.transport_at() + self.payload.len();
        if self.v6 {
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            bytes.extend(((transport_len + self.ip_options) as u16).to_be_bytes());
            bytes.extend([if self.ip_options > 0 { 60 } else { protocol }, 64]);
            bytes.extend([0xfd; 16]);
            bytes.extend([0xfe; 16]);
            if self.ip_options > 0 {
                bytes.extend([protocol, (self.ip_options / 8 - 1) as u8, 1]);
                bytes.push((self.ip_options - 4) as u8);
                bytes.resize(self.transport_at(), 0);
            }
        } else {
            bytes.extend([8, 0, 0x45 + (self.ip_options / 4) as u8, 0]);
            bytes.extend(((transport_len + 20 + self.ip_options) as u16).to_be_bytes());
            bytes.extend(self.identification.to_be_bytes());
            bytes.extend([0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            bytes.resize(self.transport_at(), 1);
            let sum = slow_sum(&bytes[self.network_at()..]);
            let at = self.network_at() + 10;
            bytes[at..at + 2].copy_from_slice(&(!sum).to_be_bytes());
        }
        bytes.extend([0x12, 0x34, 0x56, 0x78]);
        if self.udp {
            bytes.extend((transport_len as u16).to_be_bytes());
            bytes.extend(self.pseudo_sum(&bytes, transport_len).to_be_bytes());
        } else {
            bytes.extend(self.sequence.to_be_bytes());
            bytes.extend([
                9,
                9,
                9,
                9,
                (5 + self.tcp_options as u8 / 4) << 4,
                self.tcp_flags,
            ]);
            bytes.extend([1, 0]);
            bytes.extend(self.pseudo_sum(&bytes, transport_len).to_be_bytes());
            bytes.extend([0, 0]);
            bytes.resize(self.payload_at(), 1);
        }
        bytes.extend(&self.payload);
        bytes
    }

    fn pseudo_sum(&self, bytes: &[u8], len: usize) -> u16 {
        let ip = &bytes[self.network_at()..];
        let mut pseudo = if self.v6 {
            ip[8..40].to_vec()
        } else {
            ip[12..20].to_vec()
        };
        pseudo.extend([0, if self.udp { 17 } else { 6 }]);
        pseudo.extend((len as u16).to_be_bytes());
        slow_sum(&pseudo)
    }

    fn header(&self) -> VnetHeader {
        VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: match (self.udp, self.v6) {
                (true, _) => GSO_UDP_L4,
                (false, true) => GSO_TCPV6,
                (false, false) => GSO_TCPV4,
            },
            hdr_len: self.payload_at() as u16,
            gso_size: self.gso_size,
            csum_start: self.transport_at() as u16,
            csum_offset: if self.udp { 6 } else { 16 },
            num_buffers: 0,
        }
    }

    /// Checks one segment all by itself and gives its payload.
    fn check_segment(&self, bytes: &[u8], index: usize, offset: usize, is_last: bool) -> Vec<u8> {
        let ip = &bytes[self.network_at()..];
        let transport = &bytes[self.transport_at()..];
        let word = |bytes: &[u8], at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        if self.v6 {
            assert_eq!(usize::from(word(ip, 4)), ip.len() - 40);
        } else {
            assert_eq!(usize::from(word(ip, 2)), ip.len());
            assert_eq!(word(ip, 4), self.identification.wrapping_add(index as u16));
            assert_eq!(
                slow_sum(&ip[..20 + self.ip_options]),
                0xffff,
                "IPv4 header checksum"
            );
        }
        let mut covered = transport.to_vec();
        covered.resize(covered.len().next_multiple_of(2), 0);
        covered.extend(self.pseudo_sum(bytes, transport.len()).to_be_bytes());
        assert_eq!(slow_sum(&covered), 0xffff, "transport checksum");
        if self.udp {
            assert_eq!(usize::from(word(transport, 4)), transport.len());
        } else {
            let sequence = u32::from_be_bytes(transport[4..8].try_into().unwrap());
            assert_eq!(sequence, self.sequence.wrapping_add(offset as u32));
            let mut flags = self.tcp_flags;
            flags &= if is_last { 0xff } else { !0x09 };
            flags &= if index == 0 { 0xff } else { !0x80 };
            assert_eq!(transport[13], flags, "segment {index}, last: {is_last}");
        }
        bytes[self.payload_at()..].to_vec()
    }
}

fn finished(
    frame: &Frame<'_>,
    offloads: Offloads,
) -> Result<Vec<(VnetHeader, Vec<u8>)>, DropReason> {
    let mut frames = Vec::new();
    finish(frame, offloads, &mut Scratch::default(), &mut |frame| {
        let mut bytes = Vec::new();
        frame.append_to(&mut bytes, usize::MAX);
        frames.push((frame.header, bytes));
    })?;
    Ok(frames)
}

/// The frame with a tail in pieces, as a guest's is.
fn with_pieces<R>(bytes: &[u8], header: VnetHeader, f: impl FnOnce(&Frame<'_>) -> R) -> R {
    let (head, rest) = bytes.split_at(bytes.len().min(crate::frame::HEAD_LEN));
    let tail: Vec<libc::iovec> = rest
        .chunks(1000)
        .map(|piece| libc::iovec {
            iov_base: piece.as_ptr().cast_mut().cast(),
            iov_len: piece.len(),
        })
        .collect();
    // SAFETY: the pieces are borrowed for longer than the frame.
    #[expect(unsafe_code, reason = "a tail is raw memory")]
    f(&unsafe { Frame::with_tail(header, head, &tail) })
}

#[test]
fn segments_put_together_are_what_was_cut() {
    let seed: u64 = SmallRng::from_os_rng().random();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    for _ in 0..300 {
        let packet = Packet::random(&mut rng);
        let bytes = packet.bytes();
        let header = check_header(packet.header(), bytes.len(), Offloads::ALL).unwrap();
        let frames = with_pieces(&bytes, header, |frame| finished(frame, Offloads::NONE)).unwrap();
        let count = packet
            .payload
            .len()
            .div_ceil(usize::from(packet.gso_size))
            .max(1);
        assert_eq!(frames.len(), count, "{packet:?}");
        let mut payload = Vec::new();
        for (index, (header, segment)) in frames.iter().enumerate() {
            assert_eq!(*header, VnetHeader::default());
            let is_last = index + 1 == count;
            let part = packet.check_segment(segment, index, payload.len(), is_last);
            assert!(is_last || part.len() == usize::from(packet.gso_size));
            payload.extend(part);
        }
        assert_eq!(payload, packet.payload);
    }
}

#[test]
fn segments_with_an_open_checksum_are_closed_to_the_same_bytes() {
    let mut rng = SmallRng::seed_from_u64(7);
    let only_checksums = Offloads {
        csum: true,
        ..Offloads::NONE
    };
    for _ in 0..50 {
        let packet = Packet::random(&mut rng);
        let bytes = packet.bytes();
        let frame = Frame::new(packet.header(), &bytes);
        let closed = finished(&frame, Offloads::NONE).unwrap();
        for ((_, closed), (header, open)) in
            closed.iter().zip(finished(&frame, only_checksums).unwrap())
        {
            assert_eq!(header.flags, NEEDS_CSUM);
            assert_eq!(header.gso_type, GSO_NONE);
            assert!(!needs_work(header, only_checksums));
            let again = finished(&Frame::new(header, &open), Offloads::NONE).unwrap();
            assert_eq!(again[0].1, *closed);
        }
    }
}

#[test]
fn a_receiver_gets_what_it_can_do_itself() {
    let mut rng = SmallRng::seed_from_u64(8);
    for _ in 0..100 {
        let packet = Packet::random(&mut rng);
        let bytes = packet.bytes();
        let header = packet.header();
        assert!(!needs_work(header, Offloads::ALL));
        let same = vec![(header, bytes.clone())];
        assert_eq!(
            finished(&Frame::new(header, &bytes), Offloads::ALL).unwrap(),
            same
        );
        // UDP is asked for with one type; what counts is the IP version of this frame.
        let uso = Offloads {
            uso4: !packet.v6,
            uso6: packet.v6,
            ..Offloads::ALL
        };
        if packet.udp {
            assert!(needs_work(header, uso));
            assert_eq!(finished(&Frame::new(header, &bytes), uso).unwrap(), same);
        } else {
            let ecn = VnetHeader {
                gso_type: header.gso_type | GSO_ECN,
                ..header
            };
            let without = Offloads {
                ecn: false,
                ..Offloads::ALL
            };
            assert!(!needs_work(header, without));
            assert!(needs_work(ecn, without));
            let frames = finished(&Frame::new(ecn, &bytes), without).unwrap();
            assert_eq!(
                frames,
                finished(
                    &Frame::new(header, &bytes),
                    Offloads {
                        csum: true,
                        ..Offloads::NONE
                    }
                )
                .unwrap()
            );
        }
    }
}

#[test]
fn a_checksum_is_filled_in_at_any_place() {
    let mut bytes: Vec<u8> = (0..99).collect();
    let header = VnetHeader {
        flags: NEEDS_CSUM,
        csum_start: 35,
        csum_offset: 62,
        ..VnetHeader::default()
    };
    bytes[97..].fill(0);
    let expected = !slow_sum(&bytes[35..]);
    let frames = finished(&Frame::new(header, &bytes), Offloads::NONE).unwrap();
    assert_eq!(frames[0].1[97..], expected.to_be_bytes());
    assert_eq!(frames[0].0, VnetHeader::default());
    for (start, offset) in [(35, 63), (99, 0), (98, 0), (1000, 6), (65_535, 65_535)] {
        let header = VnetHeader {
            csum_start: start,
            csum_offset: offset,
            ..header
        };
        assert_eq!(
            check_header(header, bytes.len(), Offloads::ALL),
            Err(DropReason::BadHeader)
        );
        assert_eq!(
            finished(&Frame::new(header, &bytes), Offloads::NONE),
            Err(DropReason::BadHeader)
        );
    }
}

#[test]
fn a_header_is_held_to_what_was_negotiated() {
    let plain = VnetHeader {
        flags: 0xfe,
        hdr_len: 9,
        csum_start: 3,
        num_buffers: 4,
        ..VnetHeader::default()
    };
    assert_eq!(
        check_header(plain, 60, Offloads::NONE),
        Ok(VnetHeader::default())
    );
    let open = VnetHeader {
        flags: 0xff,
        hdr_len: 900,
        csum_start: 34,
        csum_offset: 16,
        gso_size: 5,
        num_buffers: 1,
        ..plain
    };
    let clean = VnetHeader {
        flags: NEEDS_CSUM,
        hdr_len: 60,
        gso_size: 0,
        num_buffers: 0,
        ..open
    };
    assert_eq!(check_header(open, 60, Offloads::ALL), Ok(clean));
    assert_eq!(
        check_header(open, 60, Offloads::NONE),
        Err(DropReason::BadHeader)
    );
    let types: [(u8, Offloads); 5] = [
        (
            GSO_TCPV4,
            Offloads {
                tso4: false,
                ..Offloads::ALL
            },
        ),
        (
            GSO_TCPV6,
            Offloads {
                tso6: false,
                ..Offloads::ALL
            },
        ),
        (
            GSO_TCPV4 | GSO_ECN,
            Offloads {
                ecn: false,
                ..Offloads::ALL
            },
        ),
        (
            GSO_UDP_L4,
            Offloads {
                uso6: false,
                ..Offloads::ALL
            },
        ),
        (
            GSO_TCPV6,
            Offloads {
                csum: false,
                ..Offloads::ALL
            },
        ),
    ];
    for (gso_type, negotiated) in types {
        let header = VnetHeader {
            gso_type,
            gso_size: 1000,
            ..clean
        };
        assert_eq!(
            check_header(header, 60, Offloads::ALL),
            Ok(header),
            "{gso_type:#x}"
        );
        assert_eq!(
            check_header(header, 60, negotiated),
            Err(DropReason::BadHeader),
            "{gso_type:#x}"
        );
        let no_size = VnetHeader {
            gso_size: 0,
            ..header
        };
        assert_eq!(
            check_header(no_size, 60, Offloads::ALL),
            Err(DropReason::BadHeader)
        );
        let no_checksum = VnetHeader { flags: 0, ..header };
        assert_eq!(
            check_header(no_checksum, 60, Offloads::ALL),
            Err(DropReason::BadHeader)
        );
    }
    // UDP fragmentation (3), ECN with UDP or alone, and what no one has defined.
    for gso_type in [2, 3, 6, 0x40, GSO_ECN, GSO_UDP_L4 | GSO_ECN] {
        let header = VnetHeader {
            gso_type,
            gso_size: 1000,
            ..clean
        };
        assert_eq!(
            check_header(header, 60, Offloads::ALL),
            Err(DropReason::BadHeader),
            "{gso_type:#x}"
        );
    }
}

#[test]
fn tiny_segments_of_a_large_frame_are_refused() {
    let mut rng = SmallRng::seed_from_u64(9);
    let mut packet = Packet::random(&mut rng);
    packet.payload = vec![1; MAX_SEGMENTS * 8];
    for (size, count) in [(8, Some(MAX_SEGMENTS)), (7, None), (1, None)] {
        packet.gso_size = size;
        let bytes = packet.bytes();
        let frames = finished(&Frame::new(packet.header(), &bytes), Offloads::NONE);
        assert_eq!(frames.ok().map(|frames| frames.len()), count);
    }
}

#[test]
fn a_frame_that_is_not_what_its_header_says_is_refused() {
    let mut rng = SmallRng::seed_from_u64(10);
    let mut packet = Packet::random(&mut rng);
    (packet.v6, packet.udp, packet.tags, packet.ip_options) = (false, false, 0, 0);
    packet.payload = vec![1; 5000];
    let (bytes, header) = (packet.bytes(), packet.header());
    assert!(finished(&Frame::new(header, &bytes), Offloads::NONE).is_ok());
    // Ethertype, version, header length, fragment, protocol, TCP header length.
    let damages = [
        (12, 9),
        (14, 0x65),
        (14, 0x44),
        (20, 0x20),
        (21, 1),
        (23, 17),
        (46, 0x40),
    ];
    for (at, value) in damages {
        let mut bytes = bytes.clone();
        bytes[at] = value;
        let result = finished(&Frame::new(header, &bytes), Offloads::NONE);
        assert_eq!(result, Err(DropReason::BadHeader), "byte {at}");
    }
    for wrong in [
        VnetHeader {
            gso_type: GSO_TCPV6,
            ..header
        },
        VnetHeader {
            gso_type: GSO_UDP_L4,
            ..header
        },
        VnetHeader {
            csum_start: 33,
            ..header
        },
        VnetHeader {
            csum_offset: 6,
            ..header
        },
        VnetHeader { flags: 0, ..header },
        VnetHeader {
            gso_size: 0,
            ..header
        },
    ] {
        let result = finished(&Frame::new(wrong, &bytes), Offloads::NONE);
        assert_eq!(result, Err(DropReason::BadHeader), "{wrong:?}");
    }
    for len in 0..packet.payload_at() {
        let result = finished(&Frame::new(header, &bytes[..len]), Offloads::NONE);
        assert_eq!(result, Err(DropReason::BadHeader), "{len} bytes");
    }
}

#[test]
fn damaged_frames_and_headers_never_do_harm() {
    let seed: u64 = SmallRng::from_os_rng().random();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut scratch = Scratch::default();
    for _ in 0..3000 {
        let mut packet = Packet::random(&mut rng);
        packet.payload.truncate(400);
        let mut bytes = packet.bytes();
        let mut header = packet.header().to_bytes();
        for _ in 0..rng.random_range(0..4) {
            let at = rng.random_range(0..header.len());
            header[at] = rng.random();
        }
        for _ in 0..rng.random_range(0..6) {
            let at = rng.random_range(0..bytes.len().min(80));
            bytes[at] = rng.random();
        }
        bytes.truncate(rng.random_range(0..=bytes.len()));
        let offloads = if rng.random() {
            Offloads::NONE
        } else {
            Offloads {
                csum: true,
                ..Offloads::NONE
            }
        };
        let header = VnetHeader::from_bytes(&header);
        let mut emitted = 0;
        let result = with_pieces(&bytes, header, |frame| {
            finish(frame, offloads, &mut scratch, &mut |segment| {
                assert!(segment.len() <= bytes.len());
                assert!(!needs_work(segment.header, offloads));
                emitted += 1;
            })
        });
        assert_eq!(result.is_ok(), emitted > 0);
    }
}
