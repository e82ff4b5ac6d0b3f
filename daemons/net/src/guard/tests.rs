//! Honest guests pass; each way around the rules is a test.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::frame::{HEAD_LEN, VnetHeader};

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const OTHER_MAC: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];
const IPV4: [u8; 4] = [10, 0, 0, 5];
const OTHER_IPV4: [u8; 4] = [10, 0, 0, 6];

fn ipv6(text: &str) -> [u8; 16] {
    text.parse::<Ipv6Addr>().unwrap().octets()
}

fn own() -> [u8; 16] {
    ipv6("fd00::5")
}

fn other() -> [u8; 16] {
    ipv6("fd00::6")
}

fn derived() -> [u8; 16] {
    ipv6("fe80::5054:ff:fe01:203")
}

fn strict() -> Guard {
    Guard::new(GuardOptions {
        mac: Some(vec![MacAddress(MAC)]),
        ipv4: Some(vec!["10.0.0.5".parse().unwrap()]),
        ipv6: Some(vec!["fd00::5".parse().unwrap()]),
        ..GuardOptions::default()
    })
    .unwrap()
}

fn check(guard: &Guard, bytes: &[u8]) -> Result<(), DropReason> {
    let (head, rest) = bytes.split_at(bytes.len().min(HEAD_LEN));
    let tail = [libc::iovec {
        iov_base: rest.as_ptr().cast_mut().cast(),
        iov_len: rest.len(),
    }];
    #[expect(unsafe_code, reason = "a tail is raw memory")]
    // SAFETY: the piece is borrowed for longer than the frame.
    let frame = unsafe { Frame::with_tail(VnetHeader::default(), head, &tail) };
    guard.check(&frame)
}

/// Whether the strict rules let a frame pass.
fn strictly(bytes: &[u8]) -> Result<(), DropReason> {
    check(&strict(), bytes)
}

fn ethernet(source: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x33, 0x33, 0, 0, 0, 1];
    bytes.extend(source);
    bytes.extend(ethertype.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The frame with tags of these types in front of its ethertype.
fn tagged(frame: &[u8], tags: &[u16]) -> Vec<u8> {
    let mut bytes = frame[..12].to_vec();
    for tag in tags {
        bytes.extend(tag.to_be_bytes());
        bytes.extend([0, 10]);
    }
    bytes.extend(&frame[12..]);
    bytes
}

/// An IPv4 packet; `fragment` is the field with the flags and the offset in units of 8 bytes.
fn ipv4_packet(source: [u8; 4], protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + payload.len() as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(source);
    packet.extend([0xff; 4]);
    packet.extend(payload);
    packet
}

fn ipv4_frame(source: [u8; 4], protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    ethernet(
        MAC,
        0x0800,
        &ipv4_packet(source, protocol, fragment, payload),
    )
}

fn udp(source: u16, destination: u16) -> Vec<u8> {
    let mut packet = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    packet.extend([0, 16, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    packet
}

fn ipv6_packet(source: [u8; 16], next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 255]);
    packet.extend(source);
    packet.extend(ipv6("ff02::1"));
    packet.extend(payload);
    packet
}

fn ipv6_frame(source: [u8; 16], next: u8, payload: &[u8]) -> Vec<u8> {
    ethernet(MAC, 0x86dd, &ipv6_packet(source, next, payload))
}

fn arp(operation: u8, sender: [u8; 6], address: [u8; 4]) -> Vec<u8> {
    let mut message = vec![0, 1, 8, 0, 6, 4, 0, operation];
    message.extend(sender);
    message.extend(address);
    message.extend([0; 6]);
    message.extend([10, 0, 0, 1]);
    ethernet(MAC, 0x0806, &message)
}

/// A neighbour discovery message with a target and one option that tells a MAC address.
fn discovery(kind: u8, target: [u8; 16], option: u8, mac: [u8; 6]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target);
    message.extend([option, 1]);
    message.extend(mac);
    message
}

fn fragment_header(next: u8, offset_and_more: u16) -> Vec<u8> {
    let mut header = vec![next, 0];
    header.extend(offset_and_more.to_be_bytes());
    header.extend([0, 0, 0, 1]);
    header
}

const SPOOFED_MAC: Result<(), DropReason> = Err(DropReason::SpoofedMac);
const SPOOFED_IP: Result<(), DropReason> = Err(DropReason::SpoofedIp);
const ROGUE: Result<(), DropReason> = Err(DropReason::RogueServer);

#[test]
fn an_honest_guest_passes() {
    let honest = [
        ipv4_frame(IPV4, 6, 0x4000, &[0; 20]),
        ipv4_frame(IPV4, 17, 0, &udp(5353, 5353)),
        ipv4_frame(IPV4, 17, 0, &udp(68, 67)),
        ipv4_frame([0; 4], 17, 0, &udp(68, 67)),
        // A datagram in two fragments.
        ipv4_frame(IPV4, 17, 0x2000, &udp(5000, 5001)),
        ipv4_frame(IPV4, 17, 2, &[0; 9]),
        arp(1, MAC, IPV4),
        arp(2, MAC, IPV4),
        arp(1, MAC, [0; 4]),
        ipv6_frame(own(), 6, &[0; 20]),
        ipv6_frame(derived(), 17, &udp(546, 547)),
        ipv6_frame(own(), 58, &discovery(135, other(), 1, MAC)),
        ipv6_frame(own(), 58, &discovery(136, own(), 2, MAC)),
        ipv6_frame(derived(), 58, &discovery(136, derived(), 2, MAC)),
        // What comes before it has an address: the search for another user, listener reports, a question for routers.
        ipv6_frame([0; 16], 58, &discovery(135, own(), 14, [1; 6])),
        ipv6_frame(
            [0; 16],
            0,
            &[&[58, 0, 5, 2, 0, 0, 1, 0][..], &[143, 0, 0, 0, 0, 0, 0, 0]].concat(),
        ),
        ipv6_frame([0; 16], 58, &[133, 0, 0, 0, 0, 0, 0, 0]),
        ipv6_frame(own(), 58, &[128, 0, 0, 0, 0, 1, 0, 1]),
    ];
    for frame in honest {
        assert_eq!(strictly(&frame), Ok(()), "{frame:02x?}");
        assert_eq!(strictly(&tagged(&frame, &[0x8100])), Ok(()), "{frame:02x?}");
        assert_eq!(
            strictly(&tagged(&frame, &[0x88a8, 0x8100])),
            Ok(()),
            "{frame:02x?}"
        );
    }
}

#[test]
fn source_addresses_are_held_to_the_lists() {
    let payload = ipv4_packet(IPV4, 6, 0, &[0; 20]);
    assert_eq!(
        strictly(&ethernet(OTHER_MAC, 0x0800, &payload)),
        SPOOFED_MAC
    );
    assert_eq!(
        strictly(&ethernet([1, 0, 0, 0, 0, 1], 0x0800, &payload)),
        SPOOFED_MAC
    );
    assert_eq!(
        strictly(&ipv4_frame(OTHER_IPV4, 6, 0, &[0; 20])),
        SPOOFED_IP
    );
    assert_eq!(
        strictly(&ipv4_frame([127, 0, 0, 1], 6, 0, &[0; 20])),
        SPOOFED_IP
    );
    assert_eq!(strictly(&ipv6_frame(other(), 6, &[0; 20])), SPOOFED_IP);
    assert_eq!(
        strictly(&ipv6_frame(ipv6("fe80::1"), 6, &[0; 20])),
        SPOOFED_IP
    );
    assert_eq!(
        strictly(&ipv6_frame(ipv6("::ffff:10.0.0.6"), 6, &[0; 20])),
        SPOOFED_IP
    );
    let any_link_local = Guard::new(GuardOptions {
        ipv6: Some(vec!["fe80::/64".parse().unwrap()]),
        ..GuardOptions::default()
    });
    let frame = ipv6_frame(ipv6("fe80::1"), 6, &[0; 20]);
    assert_eq!(check(&any_link_local.unwrap(), &frame), Ok(()));
}

#[test]
fn the_unspecified_address_is_for_dhcp_only() {
    for (protocol, fragment, payload) in [
        (6, 0, vec![0; 20]),
        (17, 0, udp(67, 67)),
        (17, 0, udp(68, 53)),
        (17, 0x2000, udp(68, 67)),
        (17, 1, udp(68, 67)),
    ] {
        let frame = ipv4_frame([0; 4], protocol, fragment, &payload);
        assert_eq!(strictly(&frame), SPOOFED_IP, "{protocol} {fragment:#x}");
    }
    let mut to_one = ipv4_frame([0; 4], 17, 0, &udp(68, 67));
    to_one[30..34].copy_from_slice(&[10, 0, 0, 1]);
    assert_eq!(strictly(&to_one), SPOOFED_IP);
    // Longer than any DHCP header: options that hide the ports are looked behind.
    let mut with_options = ipv4_frame([0; 4], 17, 0, &[[0; 8].to_vec(), udp(53, 53)].concat());
    with_options[14] = 0x47;
    assert_eq!(strictly(&with_options), SPOOFED_IP);
}

#[test]
fn arp_tells_only_the_guests_addresses() {
    assert_eq!(strictly(&arp(2, OTHER_MAC, IPV4)), SPOOFED_MAC);
    assert_eq!(strictly(&arp(2, MAC, OTHER_IPV4)), SPOOFED_IP);
    assert_eq!(strictly(&arp(1, MAC, OTHER_IPV4)), SPOOFED_IP);
    let mut reverse = arp(3, OTHER_MAC, [0; 4]);
    reverse[12..14].copy_from_slice(&[0x80, 0x35]);
    assert_eq!(strictly(&reverse), SPOOFED_MAC);
    // Another hardware type, other lengths: the addresses would be elsewhere.
    for at in [14, 15, 16, 18, 19] {
        let mut odd = arp(2, MAC, IPV4);
        odd[at] ^= 1;
        assert_eq!(strictly(&odd), SPOOFED_IP, "byte {at}");
    }
    let whole = arp(2, MAC, IPV4);
    for len in 14..whole.len() {
        assert_eq!(strictly(&whole[..len]), SPOOFED_IP, "{len} bytes");
    }
}

#[test]
fn tags_hide_nothing() {
    for frame in [
        ipv4_frame(OTHER_IPV4, 6, 0, &[0; 20]),
        arp(2, MAC, OTHER_IPV4),
    ] {
        for tags in [
            &[0x8100][..],
            &[0x88a8],
            &[0x9100],
            &[0x8100, 0x8100],
            &[0x88a8, 0x8100],
        ] {
            assert_eq!(strictly(&tagged(&frame, tags)), SPOOFED_IP, "{tags:x?}");
        }
        assert_eq!(strictly(&tagged(&frame, &[0x8100; 3])), SPOOFED_IP);
    }
    let honest = ipv4_frame(IPV4, 6, 0, &[0; 20]);
    assert_eq!(strictly(&tagged(&honest, &[0x8100; 3])), SPOOFED_IP);
    assert_eq!(strictly(&tagged(&honest, &[0x8100; 60])), SPOOFED_IP);
}

#[test]
fn other_encapsulations_are_no_way_around() {
    let packet = ipv4_packet(OTHER_IPV4, 6, 0, &[0; 20]);
    // LLC and SNAP carry IP too; some hosts take it.
    let snap = [&[0xaa, 0xaa, 3, 0, 0, 0, 8, 0][..], &packet].concat();
    assert_eq!(
        strictly(&ethernet(MAC, snap.len() as u16, &snap)),
        SPOOFED_IP
    );
    assert_eq!(strictly(&ethernet(MAC, 0x8847, &packet)), SPOOFED_IP);
    assert_eq!(strictly(&ethernet(MAC, 0x8864, &packet)), SPOOFED_IP);
    let permissive = Guard::new(GuardOptions {
        other_protocols: true,
        ..strict().options
    });
    let permissive = permissive.unwrap();
    assert_eq!(check(&permissive, &ethernet(MAC, 0x8864, &packet)), Ok(()));
    assert_eq!(
        check(&permissive, &ethernet(MAC, snap.len() as u16, &snap)),
        SPOOFED_IP
    );
    // An ethertype and a version that disagree.
    assert_eq!(
        strictly(&ethernet(MAC, 0x86dd, &ipv4_packet(IPV4, 6, 0, &[0; 20]))),
        SPOOFED_IP
    );
    assert_eq!(
        strictly(&ethernet(MAC, 0x0800, &ipv6_packet(own(), 6, &[0; 20]))),
        SPOOFED_IP
    );
}

#[test]
fn a_guest_is_no_dhcp_server() {
    for ports in [(67, 68), (67, 67), (4011, 68), (68, 68), (67, 1068)] {
        let payload = udp(ports.0, ports.1);
        assert_eq!(
            strictly(&ipv4_frame(IPV4, 17, 0, &payload)),
            ROGUE,
            "{ports:?}"
        );
        let tagged = tagged(&ipv4_frame(IPV4, 17, 0, &payload), &[0x8100]);
        assert_eq!(strictly(&tagged), ROGUE, "{ports:?}");
    }
    for ports in [(547, 546), (547, 547), (1, 546)] {
        let payload = udp(ports.0, ports.1);
        assert_eq!(
            strictly(&ipv6_frame(own(), 17, &payload)),
            ROGUE,
            "{ports:?}"
        );
        let behind_options = [&[17, 0, 1, 4, 0, 0, 0, 0][..], &payload].concat();
        assert_eq!(
            strictly(&ipv6_frame(own(), 60, &behind_options)),
            ROGUE,
            "{ports:?}"
        );
    }
    let allowed = Guard::new(GuardOptions {
        dhcp_server: true,
        ..strict().options
    })
    .unwrap();
    assert_eq!(
        check(&allowed, &ipv4_frame(IPV4, 17, 0, &udp(67, 68))),
        Ok(())
    );
    assert_eq!(
        check(&allowed, &ipv6_frame(own(), 17, &udp(547, 546))),
        Ok(())
    );
}

#[test]
fn a_first_fragment_shows_its_ports() {
    assert_eq!(strictly(&ipv4_frame(IPV4, 17, 0x2000, &udp(67, 68))), ROGUE);
    assert_eq!(
        strictly(&ipv4_frame(IPV4, 17, 0x2000, &udp(53, 53)[..7])),
        SPOOFED_IP
    );
    // The packet ends before the ports; harmless ones follow as padding.
    let mut short = ipv4_frame(IPV4, 17, 0x2000, &udp(53, 53));
    short[16..18].copy_from_slice(&[0, 20]);
    assert_eq!(strictly(&short), SPOOFED_IP);

    let first = |payload: &[u8]| [fragment_header(17, 1), payload.to_vec()].concat();
    assert_eq!(
        strictly(&ipv6_frame(own(), 44, &first(&udp(547, 546)))),
        ROGUE
    );
    assert_eq!(
        strictly(&ipv6_frame(own(), 44, &first(&udp(53, 53)))),
        Ok(())
    );
    assert_eq!(strictly(&ipv6_frame(own(), 44, &first(&[]))), SPOOFED_IP);
    let mut short = ipv6_frame(own(), 44, &first(&udp(53, 53)));
    short[18..20].copy_from_slice(&[0, 8]);
    assert_eq!(strictly(&short), SPOOFED_IP);
    // The header chain goes on in the second fragment.
    let chain = [fragment_header(60, 1), vec![58, 3, 1, 4, 0, 0, 0, 0]].concat();
    assert_eq!(strictly(&ipv6_frame(own(), 44, &chain)), SPOOFED_IP);
}

#[test]
fn a_guest_is_no_router() {
    let advertisement = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(strictly(&ipv6_frame(derived(), 58, &advertisement)), ROGUE);
    let redirect = [&[137, 0, 0, 0, 0, 0, 0, 0][..], &[0; 32]].concat();
    assert_eq!(strictly(&ipv6_frame(derived(), 58, &redirect)), ROGUE);
    for (next, header) in [(0, 0), (60, 0), (43, 0), (51, 4)] {
        let mut extension = vec![58, header, 0, 0, 0, 0, 0, 0];
        extension.resize(if next == 51 { 24 } else { 8 }, 0);
        let hidden = [extension, advertisement.to_vec()].concat();
        assert_eq!(
            strictly(&ipv6_frame(derived(), next, &hidden)),
            ROGUE,
            "{next}"
        );
    }
    let atomic = [fragment_header(58, 0), advertisement.to_vec()].concat();
    assert_eq!(strictly(&ipv6_frame(derived(), 44, &atomic)), ROGUE);
    let first = [fragment_header(58, 1), advertisement.to_vec()].concat();
    assert_eq!(strictly(&ipv6_frame(derived(), 44, &first)), ROGUE);
    let long_chain = [[58, 0, 1, 4, 0, 0, 0, 0]; 1].concat();
    let many = [
        [60, 0, 1, 4, 0, 0, 0, 0].repeat(20),
        long_chain,
        advertisement.to_vec(),
    ]
    .concat();
    assert_eq!(strictly(&ipv6_frame(derived(), 60, &many)), SPOOFED_IP);
    let far = [vec![58, 20, 1, 4], vec![0; 164], advertisement.to_vec()].concat();
    assert_eq!(
        strictly(&ipv6_frame(derived(), 60, &far)),
        SPOOFED_IP,
        "beyond the head"
    );
    let router = Guard::new(GuardOptions {
        router: true,
        ..strict().options
    })
    .unwrap();
    assert_eq!(
        check(&router, &ipv6_frame(derived(), 58, &advertisement)),
        Ok(())
    );
    assert_eq!(
        check(&router, &ipv6_frame(derived(), 58, &redirect)),
        Ok(())
    );
}

#[test]
fn neighbour_discovery_tells_only_the_guests_addresses() {
    let spoofs = [
        (discovery(136, other(), 2, MAC), SPOOFED_IP),
        (discovery(136, own(), 2, OTHER_MAC), SPOOFED_MAC),
        (discovery(135, other(), 1, OTHER_MAC), SPOOFED_MAC),
        (discovery(136, own(), 1, OTHER_MAC), SPOOFED_MAC),
        (
            [&[133, 0, 0, 0, 0, 0, 0, 0, 1, 1][..], &OTHER_MAC].concat(),
            SPOOFED_MAC,
        ),
    ];
    for (message, reason) in spoofs {
        assert_eq!(
            strictly(&ipv6_frame(own(), 58, &message)),
            reason,
            "{message:x?}"
        );
        let hidden = [&[58, 0, 1, 4, 0, 0, 0, 0][..], &message].concat();
        assert_eq!(
            strictly(&ipv6_frame(own(), 0, &hidden)),
            reason,
            "{message:x?}"
        );
    }
    // Another's address is not taken by asking whether it is free.
    let probe = discovery(135, other(), 14, [1; 6]);
    assert_eq!(strictly(&ipv6_frame([0; 16], 58, &probe)), SPOOFED_IP);
    assert_eq!(
        strictly(&ipv6_frame([0; 16], 58, &discovery(136, own(), 2, MAC))),
        SPOOFED_IP
    );
    assert_eq!(strictly(&ipv6_frame([0; 16], 6, &[0; 20])), SPOOFED_IP);
    for (next, rest) in [(1, [0, 0]), (0, [0, 1])] {
        let message = [
            fragment_header(58, u16::from_be_bytes(rest) | next),
            discovery(136, own(), 2, MAC),
        ];
        assert_eq!(
            strictly(&ipv6_frame(own(), 44, &message.concat())),
            SPOOFED_IP
        );
    }
}

#[test]
fn every_option_of_a_discovery_message_is_seen() {
    let base = discovery(136, own(), 2, MAC);
    let with = |options: &[u8]| ipv6_frame(own(), 58, &[&base[..], options].concat());
    let spoof = [&[2, 1][..], &OTHER_MAC].concat();
    assert_eq!(strictly(&with(&spoof)), SPOOFED_MAC);
    assert_eq!(
        strictly(&with(&[&[14, 2][..], &[0; 14], &spoof].concat())),
        SPOOFED_MAC
    );
    assert_eq!(
        strictly(&with(
            &[[14, 0, 0, 0, 0, 0, 0, 0].to_vec(), spoof.clone()].concat()
        )),
        SPOOFED_IP
    );
    assert_eq!(strictly(&with(&[14, 2, 0, 0, 0, 0, 0, 0])), SPOOFED_IP);
    assert_eq!(strictly(&with(&[2])), SPOOFED_IP);
    let long = [&[2, 2][..], &MAC, &[0; 8]].concat();
    assert_eq!(strictly(&with(&long)), SPOOFED_MAC);
    // 14 + 40 + 32 bytes are there; options end where the head does, and one more follows.
    let filler = [253, 1, 0, 0, 0, 0, 0, 0].repeat((HEAD_LEN - 86) / 8);
    let beyond = with(&[filler, vec![253, 1, 0, 0, 0, 0, 0, 0], spoof].concat());
    assert!(beyond.len() > HEAD_LEN);
    assert_eq!(strictly(&beyond), SPOOFED_IP);
}

#[test]
fn rules_apply_one_by_one() {
    let spoofed = ipv4_frame(OTHER_IPV4, 6, 0, &[0; 20]);
    let server = ipv4_frame(OTHER_IPV4, 17, 0, &udp(67, 68));
    let only_servers = Guard::new(GuardOptions::default()).unwrap();
    assert_eq!(check(&only_servers, &spoofed), Ok(()));
    assert_eq!(check(&only_servers, &server), ROGUE);
    assert_eq!(check(&only_servers, &arp(2, OTHER_MAC, OTHER_IPV4)), Ok(()));
    let open = Guard::new(GuardOptions {
        dhcp_server: true,
        router: true,
        ..GuardOptions::default()
    });
    let open = open.unwrap();
    assert_eq!(check(&open, &server), Ok(()));
    assert_eq!(check(&open, &ethernet(OTHER_MAC, 20, &[0; 20])), Ok(()));
    assert_eq!(check(&open, &[0; 13]), Err(DropReason::TooShort));
    let no_ipv6 = Guard::new(GuardOptions {
        ipv6: Some(vec![]),
        ..GuardOptions::default()
    })
    .unwrap();
    assert_eq!(check(&no_ipv6, &spoofed), Ok(()));
    assert_eq!(check(&no_ipv6, &ipv6_frame(own(), 6, &[0; 20])), SPOOFED_IP);
    assert_eq!(check(&no_ipv6, &ipv6_frame(derived(), 6, &[0; 20])), Ok(()));
}

#[test]
fn rules_that_cannot_be_held_to_are_refused() {
    let mac = |mac: Vec<MacAddress>| {
        Guard::new(GuardOptions {
            mac: Some(mac),
            ..GuardOptions::default()
        })
    };
    assert!(matches!(
        mac(vec![MacAddress::BROADCAST]),
        Err(GuardError::NoStation(_))
    ));
    assert!(matches!(
        mac(vec![MacAddress(MAC); 257]),
        Err(GuardError::TooMany("mac", 257))
    ));
    let options = r#"{"mac": ["52:54:00:01:02:03"], "ipv4": ["10.0.0.0/24"], "dhcp-server": true}"#;
    let options: GuardOptions = serde_json::from_str(options).unwrap();
    assert!(options.dhcp_server && options.ipv6.is_none());
    assert!(serde_json::from_str::<GuardOptions>(r#"{"ipv4": ["10.0.0.1/24"]}"#).is_err());
    assert!(serde_json::from_str::<GuardOptions>(r#"{"ip": []}"#).is_err());
}

#[test]
fn damaged_frames_never_do_harm() {
    let seed: u64 = SmallRng::from_os_rng().random();
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let guard = strict();
    let seeds = [
        ipv4_frame(IPV4, 17, 0, &udp(68, 67)),
        ipv6_frame(
            own(),
            44,
            &[fragment_header(58, 0), discovery(136, own(), 2, MAC)].concat(),
        ),
        ipv6_frame(
            own(),
            0,
            &[
                [58, 0, 5, 2, 0, 0, 1, 0].to_vec(),
                discovery(135, own(), 1, MAC),
            ]
            .concat(),
        ),
        arp(1, MAC, IPV4),
    ];
    let mut passed = 0;
    for _ in 0..100_000 {
        let mut frame = seeds[rng.random_range(0..seeds.len())].clone();
        for _ in 0..rng.random_range(0..4) {
            let at = rng.random_range(0..frame.len());
            frame[at] = rng.random();
        }
        frame.truncate(rng.random_range(0..=frame.len() * 2).max(1));
        passed += u32::from(check(&guard, &frame).is_ok());
    }
    assert!(passed > 1000);
}
