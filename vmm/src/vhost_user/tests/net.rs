//! A network card: whose address, MTU and number of pairs count, where the control queue goes, what a successor is told.

use super::*;
use crate::vhost_user::net::{CTRL_VQ, Card, MAC, MQ, MTU, STATUS};

const OWN: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const THEIRS: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
const GSO: u64 = 1 << 11;
const RSS: u64 = 1 << 60;

/// A back-end with that many pairs, its link up, an MTU of 1400.
fn card_server(pairs: u16) -> Character {
    Character {
        features: PROTOCOL_FEATURES | VERSION_1 | GSO | MAC | MTU | STATUS | CTRL_VQ | MQ | RSS,
        protocol: Protocol::all() - Protocol::INFLIGHT_SHMFD,
        queues: u64::from(2 * pairs + 1),
        config: config(THEIRS, 1, pairs, 1400),
        ..Character::default()
    }
}

fn config(mac: [u8; 6], status: u16, pairs: u16, mtu: u16) -> [u8; 16] {
    let mut config = [0; 16];
    config[..6].copy_from_slice(&mac);
    config[6..8].copy_from_slice(&status.to_le_bytes());
    config[8..10].copy_from_slice(&pairs.to_le_bytes());
    config[10..12].copy_from_slice(&mtu.to_le_bytes());
    config
}

fn card(options: &str) -> Rig {
    let options = format!("socket=unused{options}").parse().unwrap();
    Rig::with(Card::describe(0, &options).unwrap().model)
}

/// Sets up all queues of a card, as Linux does; their used rings are 4096 bytes apart.
fn activate(rig: &Rig, features: u64) {
    let ring = |queue: u16| {
        let start = 0x10_000 + 0x3000 * u64::from(queue);
        Some(RingSetup {
            size: 64,
            descriptors: start,
            available: start + 0x1000,
            used: start + 0x2000,
        })
    };
    rig.device.activate(Activation {
        features: features | VERSION_1 | MAC,
        rings: (0..rig.device.num_queues()).map(ring).collect(),
    });
}

/// The numbers and bases of the rings that are started, in order.
fn started_rings(back_end: &BackEnd, count: usize) -> Vec<(u32, u32)> {
    let rings = (0..count).map(|_| {
        let base = back_end.expect(FrontendReq::SET_VRING_BASE);
        (base.word(0), base.word(1))
    });
    rings.collect()
}

fn enabled_rings(back_end: &BackEnd, count: usize) -> Vec<u32> {
    let enables = (0..count).map(|_| back_end.expect(FrontendReq::SET_VRING_ENABLE));
    enables
        .map(|seen| {
            assert_eq!(seen.word(1), 1);
            seen.word(0)
        })
        .collect()
}

#[test]
fn the_command_line_wins_and_the_back_end_is_told() {
    let rig = card(",mac=52:54:00:00:00:01,mtu=9000,queues=2");
    let back_end = rig.connect(card_server(2));
    let (seen, _) = rig.device.config().unwrap();
    assert_eq!(seen, config(OWN, 1, 2, 9000)[..12]);
    let features = VERSION_1 | GSO | MAC | MTU | STATUS | CTRL_VQ | MQ;
    assert_eq!(rig.device.features(), Some(features), "no RSS");
    activate(&rig, features);
    let told = back_end.expect(FrontendReq::SET_CONFIG);
    assert_eq!((told.word(0), told.word(1)), (0, 6));
    assert_eq!(told.payload[12..], OWN);
    let mtu = back_end.expect(FrontendReq::NET_SET_MTU);
    assert_eq!(mtu.payload, 9000_u64.to_ne_bytes());
    back_end.expect(FrontendReq::SET_STATUS);
}

#[test]
fn what_the_command_line_leaves_open_is_the_back_ends() {
    let rig = card("");
    let back_end = rig.connect(card_server(2));
    let (seen, _) = rig.device.config().unwrap();
    assert_eq!(seen, config(THEIRS, 1, 1, 1400)[..12]);
    activate(&rig, MTU);
    let mut requests = Vec::new();
    while requests.last() != Some(&FrontendReq::SET_VRING_ENABLE) {
        let seen = back_end.seen.recv_timeout(Duration::from_secs(10)).unwrap();
        requests.push(seen.request);
    }
    let unwanted = [FrontendReq::SET_CONFIG, FrontendReq::NET_SET_MTU];
    assert!(requests.iter().all(|request| !unwanted.contains(request)));
}

#[test]
fn a_back_end_without_configuration_gets_a_card_with_an_address_of_its_own() {
    let rig = card("");
    let back_end = rig.connect(Character {
        protocol: Protocol::MQ | Protocol::REPLY_ACK,
        features: PROTOCOL_FEATURES | VERSION_1 | GSO | STATUS | MTU,
        ..Character::default()
    });
    let (first, _) = rig.device.config().unwrap();
    assert_eq!(
        (&first[..3], &first[6..]),
        (&OWN[..3], &[0, 0, 1, 0, 0, 0][..])
    );
    let features = VERSION_1 | GSO | MAC;
    assert_eq!(
        rig.device.features(),
        Some(features),
        "nothing that is not told"
    );
    activate(&rig, features);
    let acked = back_end.expect(FrontendReq::SET_FEATURES);
    let known = VERSION_1 | GSO | PROTOCOL_FEATURES;
    assert_eq!(acked.payload, known.to_ne_bytes(), "what it knows");
    back_end.kill();
    let successor = rig.connect(Character {
        protocol: Protocol::MQ | Protocol::REPLY_ACK,
        features: PROTOCOL_FEATURES | VERSION_1 | GSO,
        ..Character::default()
    });
    successor.expect(FrontendReq::SET_VRING_ENABLE);
    assert_eq!(rig.device.config().unwrap().0, first);
}

#[test]
fn a_back_end_may_keep_its_own_address() {
    let rig = card(",mac=52:54:00:00:00:01");
    let back_end = rig.connect(Character {
        rejects: Some(FrontendReq::SET_CONFIG),
        ..card_server(1)
    });
    assert_eq!(rig.device.config().unwrap().0[..6], OWN);
    activate(&rig, 0);
    back_end.expect(FrontendReq::SET_VRING_ENABLE);
}

#[test]
fn the_control_queue_follows_the_last_pair_that_the_back_end_has() {
    let rig = card(",queues=2");
    assert_eq!(rig.device.num_queues(), 5);
    let back_end = rig.connect(card_server(4));
    activate(&rig, CTRL_VQ | MQ);
    let rings = started_rings(&back_end, 5);
    assert_eq!(rings, [(0, 0), (1, 0), (2, 0), (3, 0), (8, 0)]);
    assert_eq!(enabled_rings(&back_end, 5), [0, 1, 2, 3, 8]);
    rig.device.pause().unwrap();
    let drained: Vec<_> = (0..5)
        .map(|_| back_end.expect(FrontendReq::GET_VRING_BASE).word(0))
        .collect();
    assert_eq!(drained, [0, 1, 2, 3, 8]);
    rig.device.resume();
    let rings = started_rings(&back_end, 5);
    assert_eq!(rings, [(0, 7), (1, 7), (2, 7), (3, 7), (8, 7)]);
}

#[test]
fn without_several_pairs_the_control_queue_follows_the_first() {
    let rig = card("");
    let back_end = rig.connect(card_server(4));
    activate(&rig, CTRL_VQ);
    assert_eq!(enabled_rings(&back_end, 3), [0, 1, 2]);
}

#[test]
fn a_control_queue_that_is_not_served_is_not_shown() {
    let rig = card(",ctrl_vq=off");
    let _back_end = rig.connect(card_server(1));
    let features = VERSION_1 | GSO | MAC | MTU | STATUS;
    assert_eq!(rig.device.features(), Some(features));
    assert_eq!(rig.device.num_queues(), 3, "its place stays");
}

#[test]
fn a_successor_goes_on_with_all_rings_at_their_used_indices() {
    let rig = card(",queues=2");
    let first = rig.connect(card_server(2));
    activate(&rig, CTRL_VQ | MQ);
    enabled_rings(&first, 5);
    for queue in 0..5_u16 {
        let used = 0x12_000 + 0x3000 * u64::from(queue);
        rig.memory
            .write(used + 2, &(100 + queue).to_le_bytes())
            .unwrap();
    }
    // A pause is over when the start before it is, kicks included.
    rig.device.pause().unwrap();
    let kicks = &rig.device.notifiers().kicks;
    assert!(kicks.iter().all(|kick| kick.clear()));
    first.kill();
    rig.device.resume();
    let second = rig.back_end(card_server(2));
    let rings = started_rings(&second, 5);
    assert_eq!(rings, [(0, 100), (1, 101), (2, 102), (3, 103), (4, 104)]);
    assert_eq!(enabled_rings(&second, 5), [0, 1, 2, 3, 4]);
    rig.device.pause().unwrap();
    let looked_for = "frames that the dead one took are looked for";
    assert!(kicks.iter().all(|kick| kick.is_raised()), "{looked_for}");
}

#[test]
fn packed_rings_are_not_offered_without_inflight_tracking() {
    let rig = card("");
    let _back_end = rig.connect(Character {
        features: card_server(1).features | RING_PACKED,
        ..card_server(1)
    });
    assert_eq!(rig.device.features().unwrap() & RING_PACKED, 0);
}

#[test]
fn the_guest_is_interrupted_when_the_link_goes_down() {
    let rig = card("");
    let first = rig.connect(card_server(1));
    activate(&rig, STATUS);
    first.expect(FrontendReq::SET_STATUS);
    let (_, before) = rig.device.config().unwrap();
    rig.device.notifiers().config.clear();
    first.kill();
    let seen = rig.gate.device_changes();
    let _second = rig.back_end(Character {
        config: config(THEIRS, 0, 1, 1400),
        ..card_server(1)
    });
    rig.gate.wait_for_change(seen);
    let (config, after) = rig.device.config().unwrap();
    assert_eq!(config[6..8], [0, 0]);
    assert_ne!(before, after);
    assert!(rig.device.notifiers().config.is_raised());
}

/// Waits until the card leaves `back_end`, which must not be told of rings.
fn is_left_without_rings(back_end: &BackEnd) {
    while let Ok(seen) = back_end.seen.recv() {
        assert_ne!(seen.request, FrontendReq::SET_VRING_NUM);
    }
}

/// Connects a back-end that does not fit, then one that does: only the second is told of rings.
fn refuses_for_two_pairs(unfit: Character) {
    let rig = card(",queues=2");
    is_left_without_rings(&rig.back_end(unfit));
    let second = rig.connect(card_server(2));
    activate(&rig, CTRL_VQ | MQ);
    enabled_rings(&second, 5);
}

#[test]
fn a_back_end_with_too_few_pairs_is_refused() {
    refuses_for_two_pairs(card_server(1));
}

#[test]
fn a_back_end_without_control_queue_is_refused_for_several_pairs() {
    refuses_for_two_pairs(Character {
        features: PROTOCOL_FEATURES | VERSION_1 | MQ,
        ..card_server(2)
    });
}

#[test]
fn a_back_end_that_cannot_carry_the_mtu_is_refused() {
    let rig = card(",mtu=9000");
    let narrow = rig.connect(Character {
        rejects: Some(FrontendReq::NET_SET_MTU),
        ..card_server(1)
    });
    activate(&rig, MTU);
    is_left_without_rings(&narrow);
    let wide = rig.back_end(card_server(1));
    enabled_rings(&wide, 3);
}
