use std::net::UdpSocket;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::frame::VnetHeader;
use crate::link::{DropReason, NetQueue, Offloads, Received};
use crate::netdev::Netdev;
use crate::netdevs::test_support::*;
use crate::offload::{GSO_NONE, NEEDS_CSUM};

/// Opens `text` on one end of a veth pair `NAME0`, `NAME1`, both up; or says why not.
fn open_veth(name: &str, more: &str) -> Option<Rc<dyn Netdev>> {
    let (ours, other) = (format!("{name}0"), format!("{name}1"));
    run([
        "ip", "link", "add", &ours, "type", "veth", "peer", "name", &other,
    ]);
    // No frames that nobody asked for.
    for end in [&ours, &other] {
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{end}/disable_ipv6"), "1");
        run(["ip", "link", "set", end, "up"]);
    }
    await_carrier(&ours, &other);
    match open(&format!("af-packet,ifname={ours}{more}")) {
        Ok(netdev) => Some(netdev),
        Err(error) => {
            let text = format!("{error:#}");
            assert!(text.contains("CAP_NET_RAW"), "{text}");
            println!("skipped: {text}");
            None
        }
    }
}

/// Waits until the kernel has noticed that both ends have a carrier: what is sent before is lost.
fn await_carrier(ours: &str, other: &str) {
    let start = Instant::now();
    for end in [ours, other] {
        while !run(["ip", "-br", "link", "show", "dev", end]).contains(" UP ") {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "{end} does not come up"
            );
        }
    }
}

/// Frames of the tests' own protocol.
fn ours(sink: &TestSink) -> Vec<Vec<u8>> {
    let mut frames = sink.bytes();
    frames.retain(|bytes| bytes[12..14] == [0x88, 0xb5]);
    frames
}

/// A connected queue on the other end, for the network's part.
fn other_end(name: &str, sink: &Rc<TestSink>) -> (Rc<dyn Netdev>, Rc<dyn NetQueue>) {
    let netdev = open(&format!("af-packet,ifname={name}1")).unwrap();
    let queue = queue(&*netdev, 0);
    queue.connect(sink.clone());
    (netdev, queue)
}

/// An IPv4 UDP frame of `payload` bytes to a port, whose UDP checksum is open.
fn udp_frame(port: u16, payload: usize) -> (VnetHeader, Vec<u8>) {
    let udp_len = (8 + payload) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_len).to_be_bytes());
    ip.extend([0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let sum = |bytes: &[u8]| {
        let words = bytes
            .chunks(2)
            .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
        let sum: u32 = words.sum();
        ((sum & 0xffff) + (sum >> 16)) as u16
    };
    let header_sum = !sum(&ip);
    ip[10..12].copy_from_slice(&header_sum.to_be_bytes());
    // The pseudo header's sum, as a checksum that is to be filled in begins.
    let pseudo = [&ip[12..20], &[0, 17], &udp_len.to_be_bytes()].concat();
    let mut bytes = [&[0xff; 6][..], &[2, 0, 0, 0, 0, 9, 8, 0], &ip].concat();
    bytes.extend(1000u16.to_be_bytes());
    bytes.extend(port.to_be_bytes());
    bytes.extend(udp_len.to_be_bytes());
    bytes.extend(sum(&pseudo).to_be_bytes());
    bytes.extend((0..payload).map(|at| at as u8));
    let header = VnetHeader {
        flags: NEEDS_CSUM,
        gso_type: GSO_NONE,
        csum_start: 34,
        csum_offset: 6,
        ..VnetHeader::default()
    };
    (header, bytes)
}

#[test]
fn frames_go_both_ways_in_bursts() {
    in_namespace(|| async {
        let Some(netdev) = open_veth("ob-ap", "") else {
            return;
        };
        assert_eq!((netdev.kind(), netdev.max_queues()), ("af-packet", Some(1)));
        let (near, far) = (TestSink::new(1000), TestSink::new(1000));
        let (_other, there) = other_end("ob-ap", &far);
        let here = queue(&*netdev, 0);
        here.connect(near.clone());
        let frames: Vec<_> = (0..100)
            .map(|seed| frame_bytes(seed, 60 + 14 * usize::from(seed)))
            .collect();
        for bytes in &frames {
            send(&*here, bytes);
        }
        receive_until(&*there, &far, |sink| ours(sink).len() == frames.len()).await;
        assert_eq!(ours(&far), frames);
        let burst: Vec<_> = frames
            .iter()
            .map(|bytes| crate::frame::Frame::new(VnetHeader::default(), bytes))
            .collect();
        assert_eq!(
            there.transmit(&burst, &mut |reason| panic!("{reason:?}")),
            burst.len()
        );
        receive_until(&*here, &near, |sink| ours(sink).len() == frames.len()).await;
        assert_eq!(ours(&near), frames, "and nothing of what went out");
        let busy = netdev.attach(&attachment("p1", 1), 0).err().unwrap();
        assert_eq!(busy.to_string(), "interface 'ob-ap0' is used by port 'p0'");
    });
}

#[test]
fn an_open_checksum_reaches_guests_that_can_and_is_filled_in_for_others() {
    in_namespace(|| async {
        let Some(netdev) = open_veth("ob-ck", "") else {
            return;
        };
        let far = TestSink::new(1000);
        let (_other, there) = other_end("ob-ck", &far);
        let here = queue(&*netdev, 0);
        here.connect(TestSink::new(1000));
        let (header, bytes) = udp_frame(7, 101);
        let mut results = Vec::new();
        for offloads in [Offloads::ALL, Offloads::NONE] {
            far.offloads.set(offloads);
            far.frames.borrow_mut().clear();
            let sent = with_frame(header, &bytes, |frame| {
                here.transmit(&[*frame], &mut |reason| panic!("{reason:?}"))
            });
            assert_eq!(sent, 1);
            receive_until(&*there, &far, |sink| !sink.frames.borrow().is_empty()).await;
            results.push(far.frames.borrow()[0].clone());
        }
        assert_eq!(
            (results[0].0.flags & NEEDS_CSUM, &results[0].1),
            (NEEDS_CSUM, &bytes)
        );
        assert_eq!(results[1].0, VnetHeader::default());
        assert_ne!(results[1].1[40..42], bytes[40..42]);
        // The host's own judgement: a socket behind the other end takes the frame only when its checksum is right.
        run(["ip", "addr", "add", "10.0.0.2/24", "dev", "ob-ck1"]);
        run([
            "ip",
            "neigh",
            "replace",
            "10.0.0.1",
            "lladdr",
            "02:00:00:00:00:09",
            "dev",
            "ob-ck1",
        ]);
        let socket = UdpSocket::bind("10.0.0.2:7").unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let mac = std::fs::read_to_string("/sys/class/net/ob-ck1/address");
        if let Ok(mac) = mac {
            let mac: crate::frame::MacAddress = mac.trim().parse().unwrap();
            let mut finished = results[1].1.clone();
            finished[..6].copy_from_slice(&mac.0);
            send(&*here, &finished);
            let mut room = [0; 200];
            assert_eq!(socket.recv(&mut room).unwrap(), 101);
        }
    });
}

#[test]
fn a_tag_that_the_kernel_took_out_is_put_back() {
    in_namespace(|| async {
        let Some(netdev) = open_veth("ob-vl", "") else {
            return;
        };
        let near = TestSink::new(1000);
        let (_other, there) = other_end("ob-vl", &TestSink::new(1));
        let here = queue(&*netdev, 0);
        here.connect(near.clone());
        // Linux takes the outer tag out of whatever it receives.
        let plain = frame_bytes(3, 100);
        let tags: [&[u8]; 3] = [
            &[0x81, 0, 0x20, 5],
            &[0x88, 0xa8, 0, 7],
            &[0x88, 0xa8, 0, 7, 0x81, 0, 0, 5],
        ];
        let frames = tags.map(|tag| [&plain[..12], tag, &plain[12..]].concat());
        frames.iter().for_each(|bytes| send(&*there, bytes));
        receive_until(&*here, &near, |sink| sink.frames.borrow().len() == 3).await;
        assert_eq!(near.bytes(), frames);
    });
}

#[test]
fn a_guest_without_buffers_loses_nothing() {
    in_namespace(|| async {
        let Some(netdev) = open_veth("ob-bp", "") else {
            return;
        };
        let (near, far) = (TestSink::new(0), TestSink::new(0));
        let (_other, there) = other_end("ob-bp", &far);
        let here = queue(&*netdev, 0);
        here.connect(near.clone());
        let frames: Vec<_> = (0..80).map(|seed| frame_bytes(seed, 60)).collect();
        frames.iter().for_each(|bytes| send(&*there, bytes));
        assert_eq!(here.receive(32).unwrap(), Received::NotReady);
        while near.frames.borrow().len() < frames.len() {
            near.give_credit(7);
            here.receive(32).unwrap();
        }
        assert_eq!(near.bytes(), frames);
    });
}

#[test]
fn flows_are_divided_among_queues_in_use_only() {
    in_namespace(|| async {
        let Some(netdev) = open_veth("ob-fo", ",queues=2") else {
            return;
        };
        let far = TestSink::new(1000);
        let (_other, there) = other_end("ob-fo", &far);
        let (first, second) = (queue(&*netdev, 0), queue(&*netdev, 1));
        let (one, two) = (TestSink::new(10_000), TestSink::new(10_000));
        first.connect(one.clone());
        let frames: Vec<_> = (0..64).map(|port| udp_frame(2000 + port, 100)).collect();
        let send_all = || {
            for (header, bytes) in &frames {
                with_frame(*header, bytes, |frame| {
                    there.transmit(&[*frame], &mut |reason| panic!("{reason:?}"))
                });
            }
        };
        let is_udp = |bytes: &&Vec<u8>| bytes[12..14] == [8, 0];
        let count = |sink: &TestSink| sink.bytes().iter().filter(is_udp).count();
        send_all();
        // The other one's smallest buffer takes a frame or two.
        receive_until(&*first, &one, |sink| count(sink) >= frames.len() - 2).await;
        second.connect(two.clone());
        one.frames.borrow_mut().clear();
        send_all();
        let receive_both = async {
            while count(&one) + count(&two) < frames.len() {
                for queue in [&first, &second] {
                    queue.receive(32).unwrap();
                }
                executor::time::yield_now().await;
            }
        };
        receive_both.await;
        assert!(
            count(&one) > 8 && count(&two) > 8,
            "{} {}",
            count(&one),
            count(&two)
        );
    });
}

#[test]
fn an_interface_that_goes_down_comes_back_and_one_that_goes_away_is_an_error() {
    in_namespace(|| async {
        let Some(netdev) = open_veth("ob-rm", "") else {
            return;
        };
        let near = TestSink::new(100);
        let (_other, there) = other_end("ob-rm", &near);
        let here = queue(&*netdev, 0);
        here.connect(near.clone());
        run(["ip", "link", "set", "ob-rm0", "down"]);
        here.readable().await;
        while here.receive(32).unwrap() != Received::Drained {}
        let mut reasons = Vec::new();
        let bytes = frame_bytes(1, 60);
        with_frame(VnetHeader::default(), &bytes, |frame| {
            here.transmit(&[*frame], &mut |reason| reasons.push(reason))
        });
        assert_eq!(reasons, [DropReason::LinkDown]);
        run(["ip", "link", "set", "ob-rm0", "up"]);
        // The other end may be told of the link a moment later, and loses frames until then.
        loop {
            with_frame(VnetHeader::default(), &bytes, |frame| {
                there.transmit(&[*frame], &mut |_| {})
            });
            there.flush();
            let arrives = receive_until(&*here, &near, |sink| !ours(sink).is_empty());
            if executor::time::timeout(Duration::from_millis(20), arrives)
                .await
                .is_some()
            {
                break;
            }
        }
        run(["ip", "link", "del", "ob-rm0"]);
        let error = loop {
            match here.receive(32) {
                Ok(_) => here.readable().await,
                Err(error) => break error,
            }
        };
        assert_eq!(error.to_string(), "interface 'ob-rm0' was removed");
    });
}

#[test]
fn a_frame_longer_than_the_interface_takes_is_dropped_alone() {
    in_namespace(|| async {
        let Some(netdev) = open_veth("ob-lg", "") else {
            return;
        };
        let far = TestSink::new(100);
        let (_other, there) = other_end("ob-lg", &far);
        let here = queue(&*netdev, 0);
        here.connect(TestSink::new(1));
        let frames = [60, 1600, 61].map(|len| frame_bytes(1, len));
        let burst = frames
            .each_ref()
            .map(|bytes| crate::frame::Frame::new(VnetHeader::default(), bytes));
        let mut reasons = Vec::new();
        assert_eq!(here.transmit(&burst, &mut |reason| reasons.push(reason)), 3);
        assert_eq!(reasons, [DropReason::TooLong]);
        receive_until(&*there, &far, |sink| ours(sink).len() == 2).await;
        assert_eq!(ours(&far), [frames[0].clone(), frames[2].clone()]);
    });
}

#[test]
fn interfaces_that_are_not_there_are_refused() {
    on_executor(async {
        for (text, why) in [
            ("af-packet", "Parameter 'ifname' is missing"),
            (
                "af-packet,ifname=ob-none0",
                "there is no interface 'ob-none0'",
            ),
            (
                "af-packet,ifname=lo,queues=0",
                "'queues' has to be 1 to 256, not 0",
            ),
        ] {
            let error = open_error(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    });
}
