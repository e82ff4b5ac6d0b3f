use super::*;
use crate::offload::{DATA_VALID, GSO_TCPV4, NEEDS_CSUM};

#[test]
fn unknown_goes_to_all_and_known_to_one() {
    let rig = Rig::new(SwitchOptions::default());
    let [a, b, c] = [1, 2, 3].map(|station| rig.port(station));
    let nested = mac(77);
    let question = frame(mac(1), nested, "who is it");
    assert_eq!(a.send_one(&question), None);
    assert_eq!(
        (b.guest.got(), c.guest.got()),
        (vec![question.clone()], vec![question.clone()])
    );
    assert!(a.guest.got().is_empty());
    let answer = frame(nested, mac(1), "me");
    assert_eq!(b.send_one(&answer), None);
    assert_eq!(a.guest.got(), [answer]);
    assert!(c.guest.got().is_empty());
    assert_eq!(a.send_one(&question), None);
    assert_eq!(
        (b.guest.got(), c.guest.got()),
        (vec![question.clone()], vec![])
    );
    assert_eq!((rig.count("forwarded"), rig.count("flooded")), (2, 1));
    let known = rig.stations();
    let there = known.iter().find(|station| station.mac == nested).unwrap();
    assert_eq!(
        (there.member.as_str(), there.fixed, there.vlan),
        ("p2", false, 0)
    );
    assert_eq!(known.iter().filter(|station| station.fixed).count(), 3);
}

#[test]
fn a_guests_own_address_is_known_before_it_says_a_word() {
    let rig = Rig::new(SwitchOptions::default());
    let [a, b, c] = [1, 2, 3].map(|station| rig.port(station));
    let hello = frame(mac(1), mac(2), "hello");
    assert_eq!(a.send_one(&hello), None);
    assert_eq!((b.guest.got(), c.guest.got()), (vec![hello], vec![]));
    // Another guest that claims it gets nothing of it.
    assert_eq!(c.send_one(&frame(mac(2), ALL, "I am 2")), None);
    let secret = frame(mac(1), mac(2), "secret");
    assert_eq!(a.send_one(&secret), None);
    assert_eq!(b.guest.got().last(), Some(&secret));
    assert!(c.guest.got().is_empty());
    assert_eq!(rig.count("moves-refused"), 1);
}

#[test]
fn frames_of_one_pair_keep_their_order_and_are_shown_once() {
    let rig = Rig::new(SwitchOptions::default());
    let [a, b, c] = [1, 2, 3].map(|station| rig.port(station));
    let to = |i: usize| if i.is_multiple_of(3) { mac(3) } else { mac(2) };
    let frames: Vec<_> = (0..32)
        .map(|i| frame(mac(1), to(i), &i.to_string()))
        .collect();
    assert_eq!(a.send(&frames), []);
    let of = |station: u8| {
        frames
            .iter()
            .filter(move |f| f[5] == station)
            .cloned()
            .collect::<Vec<_>>()
    };
    assert_eq!(b.guest.got(), of(2));
    assert_eq!(c.guest.got(), of(3));
    assert_eq!(
        (
            b.guest.flushes.get(),
            c.guest.flushes.get(),
            a.guest.flushes.get()
        ),
        (1, 1, 0)
    );
}

#[test]
fn frames_that_belong_nowhere_are_told_why() {
    let rig = Rig::new(SwitchOptions::default());
    let [a, b] = [1, 2].map(|station| rig.port(station));
    assert_eq!(a.send_one(&[0; 13]), Some(DropReason::TooShort));
    assert_eq!(
        a.send_one(&frame(mac(1), mac(1), "")),
        Some(DropReason::SamePort)
    );
    let group = MacAddress([3, 0, 0, 0, 0, 1]);
    assert_eq!(
        a.send_one(&frame(group, mac(2), "")),
        Some(DropReason::Filtered)
    );
    let bridges = MacAddress([1, 0x80, 0xc2, 0, 0, 0]);
    assert_eq!(
        a.send_one(&frame(mac(1), bridges, "spanning tree")),
        Some(DropReason::Filtered)
    );
    b.queue.disconnect();
    assert_eq!(
        a.send_one(&frame(mac(1), mac(2), "")),
        Some(DropReason::LinkDown)
    );
    assert!(b.guest.got().is_empty());
}

#[test]
fn isolated_ports_hear_only_the_others() {
    let rig = Rig::new(SwitchOptions::default());
    let isolated = |station| {
        let attachment = Attachment {
            isolated: true,
            ..attachment(station, VlanMode::Transparent)
        };
        rig.queue(&attachment, 0)
    };
    let (a, b, server) = (isolated(1), isolated(2), rig.port(3));
    assert_eq!(
        a.send_one(&frame(mac(1), mac(2), "psst")),
        Some(DropReason::Isolated)
    );
    assert_eq!(a.send_one(&frame(mac(1), ALL, "all")), None);
    assert_eq!(a.send_one(&frame(mac(1), mac(3), "server")), None);
    assert!(b.guest.got().is_empty());
    assert_eq!(server.guest.got().len(), 2);
    assert_eq!(server.send_one(&frame(mac(3), mac(2), "b")), None);
    assert_eq!(server.send_one(&frame(mac(3), ALL, "all")), None);
    assert_eq!((a.guest.got().len(), b.guest.got().len()), (1, 2));
}

#[test]
fn a_connection_stays_on_one_pair_and_many_use_all() {
    let rig = Rig::new(SwitchOptions::default());
    let a = rig.port(1);
    let pairs = [0, 1, 2, 3].map(|index| rig.queue(&attachment(2, VlanMode::Transparent), index));
    let packet = |port: u16, text: &str| {
        let mut bytes = [mac(2).0, mac(1).0].concat();
        bytes.extend([
            8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        bytes.extend(port.to_be_bytes());
        bytes.extend([0, 80]);
        bytes.extend(text.as_bytes());
        bytes
    };
    for port in 0..64 {
        a.send(&[packet(port, "one"), packet(port, "two")]);
    }
    let got = pairs.each_ref().map(|pair| pair.guest.got());
    for frames in &got {
        assert!(frames.len() >= 8, "{:?}", got.each_ref().map(Vec::len));
        for pair in frames.chunks(2) {
            assert_eq!(pair[0][..38], pair[1][..38], "both frames of a connection");
            assert_eq!((&pair[0][38..], &pair[1][38..]), (&b"one"[..], &b"two"[..]));
        }
    }
    // A frame to all comes once.
    a.send_one(&frame(mac(1), ALL, "all"));
    assert_eq!(
        pairs
            .iter()
            .map(|pair| pair.guest.got().len())
            .sum::<usize>(),
        1
    );
    // A pair that stops leaves its connections to the others.
    pairs[1].queue.disconnect();
    for port in 0..64 {
        assert_eq!(a.send_one(&packet(port, "")), None);
    }
    assert_eq!(
        pairs
            .iter()
            .map(|pair| pair.guest.got().len())
            .sum::<usize>(),
        64
    );
    // They send as one port.
    assert_eq!(pairs[2].send_one(&frame(mac(2), ALL, "hi")), None);
    assert!(pairs.iter().all(|pair| pair.guest.got().is_empty()));
}

#[test]
fn what_a_receiver_cannot_do_is_done_for_it() {
    let rig = Rig::new(SwitchOptions::default());
    let [a, able, unable] = [1, 2, 3].map(|station| rig.port(station));
    unable.guest.offloads.set(Offloads::NONE);
    let mut bytes = [ALL.0, mac(1).0].concat();
    bytes.extend([
        8, 0, 0x45, 0, 0x0b, 0xe0, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    bytes.extend([
        0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x18, 1, 1, 0, 0, 0, 0,
    ]);
    bytes.extend([7; 3000]);
    let header = VnetHeader {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1000,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    assert_eq!(a.send_with_headers(&[(header, bytes.clone())]), []);
    assert_eq!(*able.guest.frames.borrow(), [(header, bytes.clone())]);
    let segments = unable.guest.frames.take();
    assert_eq!(
        segments
            .iter()
            .map(|(_, bytes)| bytes.len())
            .collect::<Vec<_>>(),
        [1054; 3]
    );
    assert!(
        segments
            .iter()
            .all(|(header, _)| *header == VnetHeader::default())
    );
    // What is not what it says does not reach those for whom it would have to be finished.
    bytes[23] = 17;
    let mut to_one = bytes.clone();
    to_one[..6].copy_from_slice(&mac(3).0);
    assert_eq!(
        a.send_with_headers(&[(header, to_one)]),
        [DropReason::BadHeader]
    );
    assert!(unable.guest.frames.borrow().is_empty());
    // A checksum that was found right needs nothing.
    let valid = VnetHeader {
        flags: DATA_VALID,
        ..VnetHeader::default()
    };
    assert_eq!(
        a.send_with_headers(&[(valid, frame(mac(1), mac(2), ""))]),
        []
    );
}

#[test]
fn a_port_that_comes_back_is_found_again() {
    let rig = Rig::new(SwitchOptions::default());
    let [a, b, c] = [1, 2, 3].map(|station| rig.port(station));
    let hello = frame(mac(1), mac(2), "hello");
    b.queue.disconnect();
    b.queue.connect(Rc::clone(&b.guest) as Rc<dyn Sink>);
    assert_eq!(a.send_one(&hello), None);
    assert_eq!(b.guest.got(), std::slice::from_ref(&hello));
    // It is gone for good: its address is no one's.
    drop(b.queue);
    assert_eq!(a.send_one(&hello), None);
    assert_eq!(c.guest.got(), std::slice::from_ref(&hello));
    let again = rig.port(2);
    assert_eq!(a.send_one(&hello), None);
    assert_eq!((again.guest.got(), c.guest.got()), (vec![hello], vec![]));
}

/// A guest whose rings break while it is given a frame.
struct Breaking {
    guest: Rc<Guest>,
    queue: RefCell<Option<Rc<dyn NetQueue>>>,
}

impl Sink for Breaking {
    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }
    fn ready(&self) -> bool {
        true
    }
    fn until_ready(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }
    fn deliver(&self, frame: &Frame<'_>) -> Delivery {
        if let Some(queue) = self.queue.take() {
            queue.disconnect();
        }
        self.guest.deliver(frame)
    }
    fn reserve(&self, _len: usize, _buffers: &mut Vec<libc::iovec>) -> usize {
        0
    }
    fn commit(&self, _written: usize) -> Delivery {
        Delivery::NotReady(DropReason::NoBuffers)
    }
    fn flush(&self) {}
}

#[test]
fn a_port_may_go_while_it_is_given_a_frame() {
    let rig = Rig::new(SwitchOptions::default());
    let [a, b] = [1, 2].map(|station| rig.port(station));
    let breaking = Breaking {
        guest: Guest::new(),
        queue: RefCell::new(Some(Rc::clone(&b.queue))),
    };
    b.queue.connect(Rc::new(breaking));
    let hello = frame(mac(1), mac(2), "hello");
    assert_eq!(a.send(&vec![hello.clone(); 3]), [DropReason::LinkDown; 2]);
    assert_eq!(a.send_one(&hello), Some(DropReason::LinkDown));
}
