use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::offload::{self, NEEDS_CSUM, Scratch};

/// A frame to all with tags of these types and values.
fn tagged(station: u8, tags: &[(u16, u16)]) -> Vec<u8> {
    let plain = frame(
        mac(station),
        ALL,
        "text that is long enough for any header to be looked at",
    );
    let mut bytes = plain[..12].to_vec();
    for (ethertype, control) in tags {
        bytes.extend(ethertype.to_be_bytes());
        bytes.extend(control.to_be_bytes());
    }
    bytes.extend(&plain[12..]);
    bytes
}

fn trunk(vlans: &[u16], native: Option<u16>) -> VlanMode {
    VlanMode::Trunk {
        vlans: vlans.to_vec(),
        native,
    }
}

/// The tags that a frame arrives with at a port of `to`, when it is sent with `tags` by a port of `from`. `Err`: it was dropped
/// where it came in; `Ok(None)`: it did not come out.
fn pass(
    from: VlanMode,
    to: VlanMode,
    tags: &[(u16, u16)],
) -> Result<Option<Vec<(u16, u16)>>, DropReason> {
    let rig = Rig::new(SwitchOptions::default());
    let a = rig.queue(&attachment(1, from), 0);
    let b = rig.queue(&attachment(2, to), 0);
    if let Some(reason) = a.send_one(&tagged(1, tags)) {
        assert!(b.guest.got().is_empty());
        return Err(reason);
    }
    let got = b.guest.got();
    let Some(frame) = got.first() else {
        return Ok(None);
    };
    let mut left = Vec::new();
    let mut at = 12;
    while matches!(frame[at..at + 2], [0x81, 0] | [0x88, 0xa8]) {
        let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
        left.push((word(at), word(at + 2)));
        at += 4;
    }
    assert_eq!(*frame, tagged(1, &left));
    Ok(Some(left))
}

#[test]
fn every_mode_meets_every_other() {
    const Q: u16 = 0x8100;
    const PROVIDER: u16 = 0x88a8;
    let transparent = VlanMode::Transparent;
    let access = VlanMode::Access;
    let none: &[(u16, u16)] = &[];
    let out = |tags: &[(u16, u16)]| Ok(Some(tags.to_vec()));
    let dropped = Err(DropReason::Vlan);
    let table = [
        // Transparent ports pass everything on to each other.
        (transparent.clone(), transparent.clone(), none, out(none)),
        (
            transparent.clone(),
            transparent.clone(),
            &[(Q, 10)],
            out(&[(Q, 10)]),
        ),
        (
            transparent.clone(),
            transparent.clone(),
            &[(Q, 0xa000)],
            out(&[(Q, 0xa000)]),
        ),
        (
            transparent.clone(),
            transparent.clone(),
            &[(PROVIDER, 10), (Q, 5)],
            out(&[(PROVIDER, 10), (Q, 5)]),
        ),
        (
            transparent.clone(),
            transparent.clone(),
            &[(Q, 4095)],
            dropped.clone(),
        ),
        // An access port is in its VLAN only.
        (access(10), access(10), none, out(none)),
        (access(10), access(20), none, Ok(None)),
        (access(10), access(10), &[(Q, 0xe000)], out(none)),
        (access(10), access(10), &[(Q, 10)], dropped.clone()),
        (access(10), access(20), &[(Q, 20)], dropped.clone()),
        (access(10), access(10), &[(PROVIDER, 20)], dropped.clone()),
        (access(10), access(10), &[(0x9100, 20)], dropped.clone()),
        // A tag for the priority alone hides no other one.
        (access(10), access(10), &[(Q, 0), (Q, 20)], Ok(None)),
        // Between an access port and a trunk the tag comes and goes.
        (access(10), trunk(&[10, 20], None), none, out(&[(Q, 10)])),
        (
            access(10),
            trunk(&[10, 20], None),
            &[(Q, 0x6000)],
            out(&[(Q, 0x600a)]),
        ),
        (access(10), trunk(&[20], None), none, Ok(None)),
        (access(10), trunk(&[], None), none, out(&[(Q, 10)])),
        (access(10), trunk(&[20], Some(10)), none, out(none)),
        (
            trunk(&[10, 20], None),
            access(10),
            &[(Q, 0x600a)],
            out(none),
        ),
        (trunk(&[10, 20], None), access(10), &[(Q, 20)], Ok(None)),
        (
            trunk(&[10, 20], None),
            access(10),
            &[(Q, 30)],
            dropped.clone(),
        ),
        (trunk(&[10, 20], None), access(10), none, dropped.clone()),
        (trunk(&[10, 20], Some(10)), access(10), none, out(none)),
        (trunk(&[20], Some(10)), access(10), &[(Q, 0)], out(none)),
        (trunk(&[20], Some(10)), access(10), &[(Q, 10)], out(none)),
        (
            trunk(&[], None),
            access(10),
            &[(PROVIDER, 10)],
            dropped.clone(),
        ),
        // Out of its VLAN with a second tag: not by a native VLAN, not by an access port.
        (
            trunk(&[10], None),
            access(10),
            &[(Q, 10), (Q, 20)],
            Ok(None),
        ),
        (
            trunk(&[10], Some(10)),
            trunk(&[10, 20], Some(10)),
            &[(Q, 10), (Q, 20)],
            Ok(None),
        ),
        (
            trunk(&[10], None),
            trunk(&[10], None),
            &[(Q, 10), (Q, 20)],
            out(&[(Q, 10), (Q, 20)]),
        ),
        // Between trunks.
        (
            trunk(&[10], None),
            trunk(&[10], None),
            &[(Q, 0xe00a)],
            out(&[(Q, 0xe00a)]),
        ),
        (trunk(&[10], Some(5)), trunk(&[10], Some(6)), none, Ok(None)),
        (
            trunk(&[10], Some(5)),
            trunk(&[5], Some(6)),
            none,
            out(&[(Q, 5)]),
        ),
        (
            trunk(&[10], Some(5)),
            trunk(&[5], Some(6)),
            &[(Q, 0x2000)],
            out(&[(Q, 0x2005)]),
        ),
        // A transparent port is in all VLANs by its tags, and alone in the one without.
        (transparent.clone(), access(10), none, Ok(None)),
        (transparent.clone(), access(10), &[(Q, 10)], out(none)),
        (access(10), transparent.clone(), none, out(&[(Q, 10)])),
        (
            access(10),
            transparent.clone(),
            &[(Q, 0x6000)],
            out(&[(Q, 0x600a)]),
        ),
        (transparent.clone(), trunk(&[10], Some(5)), none, Ok(None)),
        (
            transparent.clone(),
            trunk(&[10], Some(5)),
            &[(Q, 5)],
            out(none),
        ),
        (
            trunk(&[10], Some(5)),
            transparent.clone(),
            none,
            out(&[(Q, 5)]),
        ),
        (
            trunk(&[10], Some(5)),
            transparent,
            &[(Q, 10)],
            out(&[(Q, 10)]),
        ),
    ];
    for (from, to, tags, expected) in table {
        let got = pass(from.clone(), to.clone(), tags);
        assert_eq!(got, expected, "{from:?} to {to:?} with {tags:x?}");
    }
}

#[test]
fn a_tag_that_is_cut_off_is_refused() {
    let rig = Rig::new(SwitchOptions::default());
    let a = rig.port(1);
    let whole = tagged(1, &[(0x8100, 10)]);
    for len in 14..18 {
        assert_eq!(
            a.send_one(&whole[..len]),
            Some(DropReason::TooShort),
            "{len} bytes"
        );
    }
    assert_eq!(a.send_one(&whole[..18]), None);
}

#[test]
fn an_address_is_known_in_each_vlan_by_itself() {
    let rig = Rig::new(SwitchOptions::default());
    let a = rig.queue(&attachment(1, VlanMode::Access(10)), 0);
    let b = rig.queue(&attachment(2, VlanMode::Access(20)), 0);
    let up = rig.queue(&attachment(3, trunk(&[], None)), 0);
    let nested = mac(50);
    a.send_one(&frame(nested, ALL, ""));
    b.send_one(&frame(nested, ALL, ""));
    up.guest.got();
    let mut to = frame(mac(9), nested, "to");
    to.splice(12..12, [0x81, 0, 0, 20]);
    assert_eq!(up.send_one(&to), None);
    assert_eq!((a.guest.got().len(), b.guest.got().len()), (0, 1));
    assert_eq!(rig.count("moves"), 0);
}

#[test]
fn a_checksum_is_right_behind_any_tag() {
    let seed: u64 = SmallRng::from_os_rng().random();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let rig = Rig::new(SwitchOptions::default());
    let access = rig.queue(&attachment(1, VlanMode::Access(10)), 0);
    let trunk = rig.queue(&attachment(2, trunk(&[10], None)), 0);
    let finished = |header: VnetHeader, bytes: &[u8]| {
        let mut result = Vec::new();
        let frame = Frame::new(header, bytes);
        let take = &mut |frame: &Frame<'_>| frame.append_to(&mut result, usize::MAX);
        offload::finish(&frame, Offloads::NONE, &mut Scratch::default(), take).unwrap();
        result
    };
    for _ in 0..500 {
        let mut bytes = frame(mac(1), mac(2), "");
        bytes.extend((0..rng.random_range(30..1500)).map(|_| rng.random::<u8>()));
        let start = rng.random_range(14..bytes.len() - 2);
        let header = VnetHeader {
            flags: NEEDS_CSUM,
            csum_start: start as u16,
            csum_offset: rng.random_range(0..=bytes.len() - 2 - start) as u16,
            hdr_len: start as u16,
            ..VnetHeader::default()
        };
        assert_eq!(access.send_with_headers(&[(header, bytes.clone())]), []);
        let (with_tag, there) = trunk.guest.frames.take().remove(0);
        assert_eq!(with_tag.hdr_len, header.hdr_len + 4);
        let mut expected = finished(header, &bytes);
        expected.splice(12..12, [0x81, 0, 0, 10]);
        assert_eq!(finished(with_tag, &there), expected);
        // And back.
        let mut back = there;
        back[..6].copy_from_slice(&mac(1).0);
        back[6..12].copy_from_slice(&mac(2).0);
        assert_eq!(trunk.send_with_headers(&[(with_tag, back)]), []);
        let (header_back, mut bytes_back) = access.guest.frames.take().remove(0);
        bytes_back[..12].copy_from_slice(&bytes[..12]);
        assert_eq!((header_back, bytes_back), (header, bytes));
    }
    // A checksum that covers the tag cannot be kept.
    let header = VnetHeader {
        flags: NEEDS_CSUM,
        csum_start: 15,
        ..VnetHeader::default()
    };
    let bytes = tagged(2, &[(0x8100, 10)]);
    let mut to_one = bytes.clone();
    to_one[..6].copy_from_slice(&mac(1).0);
    assert_eq!(
        trunk.send_with_headers(&[(header, to_one)]),
        [DropReason::BadHeader]
    );
}

#[test]
fn the_longest_frame_has_no_room_for_a_tag() {
    let rig = Rig::new(SwitchOptions::default());
    let access = rig.queue(&attachment(1, VlanMode::Access(10)), 0);
    let trunk = rig.queue(&attachment(2, trunk(&[10], None)), 0);
    let mut known = frame(mac(2), mac(1), "");
    known.splice(12..12, [0x81, 0, 0, 10]);
    assert_eq!(trunk.send_one(&known), None);
    let mut longest = frame(mac(1), mac(2), "");
    longest.resize(crate::frame::MAX_FRAME, 1);
    assert_eq!(access.send_one(&longest), Some(DropReason::TooLong));
    longest.truncate(crate::frame::MAX_FRAME - 4);
    assert_eq!(access.send_one(&longest), None);
    assert_eq!(trunk.guest.got()[0].len(), crate::frame::MAX_FRAME);
}

#[test]
fn damaged_frames_do_no_harm_and_leave_no_vlan() {
    let seed: u64 = SmallRng::from_os_rng().random();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let rig = Rig::new(SwitchOptions::default());
    let modes = [
        VlanMode::Transparent,
        VlanMode::Access(10),
        VlanMode::Access(20),
        trunk(&[10, 20], None),
        trunk(&[], Some(20)),
        trunk(&[10], Some(30)),
    ];
    let mut ports = Vec::new();
    for (station, mode) in (0..).zip(&modes) {
        let port = rig.queue(&attachment(station, mode.clone()), 0);
        if station % 2 == 0 {
            port.guest.offloads.set(Offloads::NONE);
        }
        ports.push(port);
    }
    let mut arrived = 0;
    for _ in 0..20_000 {
        let from = rng.random_range(0..modes.len());
        let tags: Vec<_> = (0..rng.random_range(0..4))
            .map(|_| {
                let ethertype = [0x8100, 0x8100, 0x88a8, 0x9100][rng.random_range(0..4)];
                (ethertype, [0, 10, 20, 30, 4095][rng.random_range(0..5)])
            })
            .collect();
        let mut bytes = tagged(from as u8, &tags);
        bytes.resize(rng.random_range(12..400), 7);
        bytes[5] = rng.random_range(0..8);
        bytes[0] = if rng.random() { 0xff } else { 2 };
        let header = VnetHeader {
            flags: rng.random_range(0..2),
            gso_type: [0, 0, 1, 4, 5, 0x81][rng.random_range(0..6)],
            gso_size: rng.random_range(0..100),
            csum_start: rng.random_range(0..500),
            csum_offset: rng.random_range(0..500),
            hdr_len: rng.random(),
            num_buffers: rng.random(),
        };
        ports[from].send_with_headers(&[(header, bytes)]);
        for (to, port) in ports.iter().enumerate() {
            for frame in port.guest.got() {
                arrived += 1;
                let is_access = matches!(modes[to], VlanMode::Access(_));
                let is_tagged = crate::packet::word(&frame, 12).is_some_and(crate::packet::is_tag);
                assert!(!(is_access && is_tagged), "{frame:02x?} came out at {to}");
                assert!(!(is_access && from + to == 3), "from one VLAN to another");
            }
        }
    }
    assert!(arrived > 1000, "{arrived}");
}
