//! The corpus of the network target to start from: a frame of each kind that the code tells apart.

use crate::net_frame::{PREFIX, STATION};
use crate::seeds::Seed;

/// Everything, in the bits of an input.
const ALL: u8 = 0x3f;

/// Seeds of the frame target.
pub fn net_frame() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for (name, frame) in frames() {
        for (kind, header) in headers(&frame) {
            for (receiver, rules) in [(0, 0), (ALL, 0x07), (1, 0x1f), (0, ALL)] {
                let mut input = vec![ALL, receiver, rules, 54];
                input.extend_from_slice(&header);
                debug_assert_eq!(input.len(), PREFIX);
                input.extend_from_slice(&frame);
                seeds.push(Seed {
                    name: format!("{name}-{kind}-{receiver:02x}-{rules:02x}"),
                    input,
                });
            }
        }
    }
    seeds
}

/// Headers that leave nothing, the checksum, or the segmentation of the frame undone.
fn headers(frame: &[u8]) -> Vec<(&'static str, [u8; 12])> {
    let header = |gso: u8, start: u16, offset: u16| {
        let mut bytes = [0; 12];
        bytes[0] = 1;
        bytes[1] = gso;
        bytes[2..4].copy_from_slice(&(start + 20).to_le_bytes());
        bytes[4..6].copy_from_slice(&100_u16.to_le_bytes());
        bytes[6..8].copy_from_slice(&start.to_le_bytes());
        bytes[8..10].copy_from_slice(&offset.to_le_bytes());
        bytes
    };
    let tags = 4 * u16::from(frame[12] == 0x81);
    let (four, six) = (34 + tags, 54 + tags);
    vec![
        ("plain", [0; 12]),
        ("csum4", header(0, four, 16)),
        ("tso4", header(1, four, 16)),
        ("tso6", header(0x84, six, 16)),
        ("uso4", header(5, four, 6)),
        ("uso6", header(5, six, 6)),
    ]
}

fn frames() -> Vec<(String, Vec<u8>)> {
    let tcp = [
        &[
            0, 80, 4, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x19, 1, 0, 0, 0, 0, 0,
        ][..],
        &[7; 350],
    ]
    .concat();
    let udp = |ports: [u8; 4]| {
        let mut segment = [&ports[..], &[0, 0, 0, 0], &[5; 300]].concat();
        let length = (segment.len() as u16).to_be_bytes();
        segment[4..6].copy_from_slice(&length);
        segment
    };
    // A neighbour advertisement and a router advertisement, each with an address option.
    let icmp = |kind: u8| {
        [
            &[kind, 0, 0, 0, 0x60, 0, 0, 0][..],
            &[0xfd; 16],
            &[2, 1],
            &STATION,
        ]
        .concat()
    };
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend_from_slice(&STATION);
    arp.extend_from_slice(&[10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2]);
    let plain = [
        ("tcp4", ethernet(0x0800, &ipv4(6, &tcp))),
        ("udp4", ethernet(0x0800, &ipv4(17, &udp([4, 0, 5, 0])))),
        ("dhcp", ethernet(0x0800, &ipv4(17, &udp([0, 67, 0, 68])))),
        ("tcp6", ethernet(0x86dd, &ipv6(6, &tcp))),
        ("udp6", ethernet(0x86dd, &ipv6(17, &udp([4, 0, 5, 0])))),
        ("dhcp6", ethernet(0x86dd, &ipv6(17, &udp([2, 35, 2, 34])))),
        ("neighbour", ethernet(0x86dd, &ipv6(58, &icmp(136)))),
        ("router", ethernet(0x86dd, &ipv6(58, &icmp(134)))),
        (
            "options6",
            ethernet(
                0x86dd,
                &ipv6(0, &[&[6, 0, 1, 4, 0, 0, 0, 0][..], &tcp].concat()),
            ),
        ),
        (
            "fragment6",
            ethernet(
                0x86dd,
                &ipv6(44, &[&[17, 0, 0, 1, 0, 0, 0, 1][..], &[9; 64]].concat()),
            ),
        ),
        ("arp", ethernet(0x0806, &arp)),
        ("llc", ethernet(64, &[0xaa; 64])),
    ];
    let mut frames: Vec<_> = plain
        .iter()
        .map(|(name, frame)| ((*name).to_owned(), frame.clone()))
        .collect();
    for (name, frame) in plain {
        let tagged = [&frame[..12], &[0x81, 0, 0, 7], &frame[12..]].concat();
        frames.push((format!("{name}-tagged"), tagged));
    }
    frames
}

fn ethernet(kind: u16, payload: &[u8]) -> Vec<u8> {
    [&[0xff; 6], &STATION[..], &kind.to_be_bytes(), payload].concat()
}

fn ipv4(protocol: u8, segment: &[u8]) -> Vec<u8> {
    let total = (20 + segment.len() as u16).to_be_bytes();
    let header = [0x45, 0, total[0], total[1], 0, 1, 0, 0, 64, protocol, 0, 0];
    [&header[..], &[10, 0, 0, 1, 10, 0, 0, 2], segment].concat()
}

fn ipv6(next: u8, segment: &[u8]) -> Vec<u8> {
    let length = (segment.len() as u16).to_be_bytes();
    let mut source = [0; 16];
    (source[0], source[15]) = (0xfd, 1);
    [
        &[0x60, 0, 0, 0, length[0], length[1], next, 255][..],
        &source,
        &[0xfd; 16],
        segment,
    ]
    .concat()
}
