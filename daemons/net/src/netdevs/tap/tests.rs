use std::rc::Rc;

use crate::frame::{Frame, MAX_FRAME, VnetHeader};
use crate::link::{DropReason, Offloads, Received};
use crate::netdev::Netdev;
use crate::netdevs::test_support::*;

/// Opens a tap interface, or says why not.
fn open_tap(text: &str) -> Option<Rc<dyn Netdev>> {
    match open(text) {
        Ok(netdev) => Some(netdev),
        Err(error) => {
            let text = format!("{error:#}");
            let missing = text.contains("/dev/net/tun") || text.contains("CAP_NET_ADMIN");
            assert!(missing, "{text}");
            println!("skipped: {text}");
            None
        }
    }
}

/// A packet socket on `name`, to be the network.
struct Network {
    socket: std::os::fd::OwnedFd,
}

#[expect(unsafe_code, reason = "packet sockets are raw system calls")]
impl Network {
    fn on(name: &str) -> Network {
        use std::os::fd::FromRawFd;
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: takes no pointers; the descriptor is new.
        let socket = unsafe {
            let fd = libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                i32::from(protocol),
            );
            assert!(fd >= 0);
            std::os::fd::OwnedFd::from_raw_fd(fd)
        };
        let name = crate::netdevs::interface::InterfaceName::new(name).unwrap();
        // SAFETY: all-zero is a valid address, which outlives the call.
        unsafe {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = name.index().unwrap() as i32;
            let len = size_of_val(&address) as u32;
            let bound = libc::bind(
                std::os::fd::AsRawFd::as_raw_fd(&socket),
                (&raw const address).cast(),
                len,
            );
            assert_eq!(bound, 0);
        }
        Network { socket }
    }

    fn send(&self, bytes: &[u8]) {
        nix::unistd::write(&self.socket, bytes).unwrap();
    }

    /// The next frame of ours: other than what the host says by itself.
    async fn receive(&self) -> Vec<u8> {
        use std::os::fd::AsFd;
        loop {
            executor::net::poll_fd(self.socket.as_fd(), libc::POLLIN)
                .await
                .unwrap();
            let mut bytes = vec![0; MAX_FRAME];
            let len = nix::unistd::read(&self.socket, &mut bytes).unwrap();
            if bytes[12..14] == [0x88, 0xb5] {
                bytes.truncate(len);
                return bytes;
            }
        }
    }
}

/// Frames of the tests' own protocol.
fn ours(sink: &TestSink) -> Vec<Vec<u8>> {
    let mut frames = sink.bytes();
    frames.retain(|bytes| bytes[12..14] == [0x88, 0xb5]);
    frames
}

#[test]
fn frames_go_both_ways_through_a_new_interface() {
    in_namespace(|| async {
        let Some(tap) = open_tap("tap,ifname=ob-tap0,mtu=9000") else {
            return;
        };
        assert_eq!(tap.details()["ifname"], "ob-tap0");
        assert!(run(["ip", "link", "show", "ob-tap0"]).contains("mtu 9000"));
        let network = Network::on("ob-tap0");
        let queue = queue(&*tap, 0);
        let sink = TestSink::new(1000);
        queue.connect(sink.clone());
        for (seed, len) in [(1, 60), (2, 1500), (3, 9014), (4, 200)] {
            let bytes = frame_bytes(seed, len);
            send(&*queue, &bytes);
            assert_eq!(network.receive().await, bytes);
        }
        // Larger than what is reserved at first: nothing is cut off.
        let sent = [60, 9014, 9014, 1514, 64].map(|len| frame_bytes(7, len));
        sent.iter().for_each(|bytes| network.send(bytes));
        receive_until(&*queue, &sink, |sink| ours(sink).len() == sent.len()).await;
        assert_eq!(ours(&sink), sent);
        assert!(sink.in_place.get() > 0 && sink.flushes.get() > 0);
        drop(queue);
        drop(tap);
        assert!(open_error("macvtap,ifname=ob-tap0").contains("there is no interface 'ob-tap0'"));
    });
}

#[test]
fn bursts_go_out_in_order_however_they_are_written() {
    in_namespace(|| async {
        for (name, more, batched) in [("ob-tap9", "", true), ("ob-tap10", ",sndbuf=65536", false)] {
            let Some(tap) = open_tap(&format!("tap,ifname={name}{more}")) else {
                return;
            };
            let network = Network::on(name);
            let queue = queue(&*tap, 0);
            queue.connect(TestSink::new(100));
            let frames: Vec<_> = (0..75)
                .map(|seed| frame_bytes(seed, 60 + 19 * usize::from(seed)))
                .collect();
            let tails: Vec<Vec<_>> = frames
                .iter()
                .map(|bytes| {
                    bytes[60..]
                        .chunks(400)
                        .map(crate::netdevs::vectors::piece)
                        .collect()
                })
                .collect();
            let parts = frames.iter().zip(&tails);
            #[expect(unsafe_code, reason = "frames in pieces")]
            // SAFETY: the pieces are parts of `frames`.
            let mut burst: Vec<_> = parts
                .map(|(bytes, tail)| unsafe {
                    Frame::with_tail(VnetHeader::default(), &bytes[..60], tail)
                })
                .collect();
            // One in very many pieces among them, and one that the kernel refuses.
            let long = frame_bytes(99, 1500);
            let crumbs: Vec<_> = long[14..]
                .chunks(1)
                .map(crate::netdevs::vectors::piece)
                .collect();
            #[expect(unsafe_code, reason = "frames in pieces")]
            // SAFETY: the pieces are parts of `long`.
            burst.insert(40, unsafe {
                Frame::with_tail(VnetHeader::default(), &long[..14], &crumbs)
            });
            burst.insert(
                10,
                burst[0].with_header(VnetHeader {
                    gso_type: 0x7f,
                    ..VnetHeader::default()
                }),
            );
            let mut reasons = Vec::new();
            assert_eq!(
                queue.transmit(&burst, &mut |reason| reasons.push(reason)),
                burst.len()
            );
            assert_eq!(reasons, [DropReason::BadHeader], "batched: {batched}");
            let mut expected = frames.clone();
            expected.insert(40, long.clone());
            for bytes in &expected {
                assert!(network.receive().await == *bytes, "batched: {batched}");
            }
            run(["ip", "link", "set", name, "down"]);
            reasons.clear();
            assert_eq!(
                queue.transmit(&burst[..8], &mut |reason| reasons.push(reason)),
                8
            );
            assert_eq!(reasons, [DropReason::LinkDown; 8]);
        }
    });
}

#[test]
fn a_guest_without_buffers_loses_nothing_and_keeps_the_order() {
    in_namespace(|| async {
        let Some(tap) = open_tap("tap,ifname=ob-tap1,mtu=9000") else {
            return;
        };
        let network = Network::on("ob-tap1");
        let queue = queue(&*tap, 0);
        let sink = TestSink::new(0);
        sink.reserve_limit.set(300);
        queue.connect(sink.clone());
        let sent: Vec<_> = (1..=20)
            .map(|seed| frame_bytes(seed, 100 * usize::from(seed)))
            .collect();
        sent.iter().for_each(|bytes| network.send(bytes));
        assert_eq!(queue.receive(32).unwrap(), Received::NotReady);
        while ours(&sink).len() < sent.len() {
            sink.give_credit(1);
            queue.receive(32).unwrap();
        }
        assert_eq!(ours(&sink), sent);
    });
}

#[test]
fn a_removed_interface_is_an_error_of_receiving() {
    in_namespace(|| async {
        let Some(tap) = open_tap("tap,ifname=ob-tap2") else {
            return;
        };
        let queue = queue(&*tap, 0);
        let sink = TestSink::new(100);
        queue.connect(sink.clone());
        while queue.receive(32).unwrap() != Received::Drained {}
        run(["ip", "link", "del", "ob-tap2"]);
        queue.readable().await;
        let error = loop {
            match queue.receive(32) {
                Ok(_) => queue.readable().await,
                Err(error) => break error,
            }
        };
        assert_eq!(error.to_string(), "interface 'ob-tap2' was removed");
        let mut reasons = Vec::new();
        let bytes = frame_bytes(1, 60);
        let dealt = with_frame(VnetHeader::default(), &bytes, |frame| {
            queue.transmit(&[*frame], &mut |reason| reasons.push(reason))
        });
        assert_eq!((dealt, reasons), (1, vec![DropReason::LinkDown]));
        queue.disconnect();
    });
}

#[test]
fn an_interface_that_is_down_drops_and_comes_back() {
    in_namespace(|| async {
        let Some(tap) = open_tap("tap,ifname=ob-tap3,up=off") else {
            return;
        };
        let queue = queue(&*tap, 0);
        let sink = TestSink::new(100);
        queue.connect(sink.clone());
        let bytes = frame_bytes(1, 60);
        let mut reasons = Vec::new();
        with_frame(VnetHeader::default(), &bytes, |frame| {
            queue.transmit(&[*frame], &mut |reason| reasons.push(reason))
        });
        assert_eq!(reasons, [DropReason::LinkDown]);
        assert_eq!(queue.receive(1).unwrap(), Received::Drained);
        run(["ip", "link", "set", "ob-tap3", "up"]);
        let network = Network::on("ob-tap3");
        send(&*queue, &bytes);
        assert_eq!(network.receive().await, bytes);
    });
}

#[test]
fn queues_that_no_guest_reads_get_no_frames() {
    in_namespace(|| async {
        let Some(tap) = open_tap("tap,ifname=ob-tap4,queues=2") else {
            return;
        };
        let network = Network::on("ob-tap4");
        let (first, second) = (queue(&*tap, 0), queue(&*tap, 1));
        let sink = TestSink::new(10_000);
        first.connect(sink.clone());
        // Different flows: different sources.
        let sent: Vec<_> = (0..64).map(|seed| frame_bytes(seed, 60)).collect();
        sent.iter().for_each(|bytes| network.send(bytes));
        receive_until(&*first, &sink, |sink| ours(sink).len() == sent.len()).await;
        assert_eq!(ours(&sink), sent);
        // Once it is read, the second one takes part: ping makes flows that the kernel tells apart.
        let other = TestSink::new(10_000);
        second.connect(other.clone());
        assert_eq!(second.receive(32).unwrap(), Received::Drained);
        first.disconnect();
        sent.iter().for_each(|bytes| network.send(bytes));
        receive_until(&*second, &other, |sink| ours(sink).len() == sent.len()).await;
        let busy = tap.attach(&attachment("p1", 1), 0).err().unwrap();
        assert_eq!(busy.to_string(), "interface 'ob-tap4' is used by port 'p0'");
        drop((first, second));
        assert!(tap.attach(&attachment("p1", 1), 0).is_ok());
    });
}

#[test]
fn an_interface_made_by_others_is_used_as_it_is() {
    in_namespace(|| async {
        let Some(probe) = open_tap("tap,ifname=ob-probe") else {
            return;
        };
        drop(probe);
        run([
            "ip", "tuntap", "add", "dev", "ob-tap5", "mode", "tap", "vnet_hdr",
        ]);
        let tap = open("tap,ifname=ob-tap5,up=on").unwrap();
        assert_eq!(tap.max_queues(), Some(1));
        assert!(open_error("tap,ifname=ob-tap5").contains("another process has it open"));
        let queue = queue(&*tap, 0);
        assert!(tap.attach(&attachment("p0", 2), 1).is_err());
        queue.connect(TestSink::new(1));
        drop((queue, tap));
        let refused = open_error("tap,ifname=ob-tap5,queues=2");
        assert!(
            refused.contains("mode tap multi_queue vnet_hdr"),
            "{refused}"
        );
        run([
            "ip", "link", "add", "ob-veth0", "type", "veth", "peer", "name", "ob-veth1",
        ]);
        assert!(open_error("tap,ifname=ob-veth0,queues=1").contains("it is no tap interface"));
    });
}

#[test]
fn an_interface_that_a_killed_process_still_holds_is_waited_for() {
    in_namespace(|| async {
        let Some(probe) = open_tap("tap,ifname=ob-probe") else {
            return;
        };
        drop(probe);
        run([
            "ip", "tuntap", "add", "dev", "ob-tap11", "mode", "tap", "vnet_hdr",
        ]);
        let held = super::device::Device::tap("ob-tap11", false).unwrap();
        let (opened, receiver) = std::sync::mpsc::channel::<()>();
        // Held until long after the first try, unless that was enough.
        let holder = std::thread::spawn(move || {
            let held_for = std::time::Duration::from_millis(100);
            let early = receiver.recv_timeout(held_for).is_ok();
            drop(held);
            early
        });
        let tap = open("tap,ifname=ob-tap11");
        let _ = opened.send(());
        assert!(!holder.join().unwrap(), "the interface was not held");
        assert!(tap.is_ok());
    });
}

#[test]
fn a_bridge_gets_the_interface_as_a_port() {
    in_namespace(|| async {
        let Some(probe) = open_tap("tap,ifname=ob-probe") else {
            return;
        };
        drop(probe);
        let missing = open_error("tap,ifname=ob-tap6,br=ob-br0");
        assert!(
            missing.contains("cannot put 'ob-tap6' in bridge 'ob-br0'"),
            "{missing}"
        );
        run(["ip", "link", "add", "ob-br0", "type", "bridge"]);
        let _tap = open("tap,ifname=ob-tap6,br=ob-br0").unwrap();
        let shown = run(["ip", "link", "show", "ob-tap6"]);
        assert!(
            shown.contains("master ob-br0") && shown.contains("UP"),
            "{shown}"
        );
    });
}

#[test]
fn the_guests_offloads_reach_the_interface_and_change() {
    in_namespace(|| async {
        let Some(tap) = open_tap("tap,ifname=ob-tap7") else {
            return;
        };
        let queue = queue(&*tap, 0);
        let features = || run(["ethtool", "-k", "ob-tap7"]);
        let on = |text: &str, name: &str| text.contains(&format!("{name}: on"));
        let sink = TestSink::new(10);
        sink.offloads.set(Offloads::ALL);
        queue.connect(sink.clone());
        let all = features();
        for name in [
            "tx-checksum-ip-generic",
            "tx-tcp-segmentation",
            "tx-tcp6-segmentation",
            "tx-tcp-ecn-segmentation",
        ] {
            assert!(on(&all, name), "{name} in {all}");
        }
        assert_eq!(
            on(&all, "tx-udp-segmentation"),
            tap.details()["uso"] == true
        );
        queue.set_guest_offloads(Offloads::NONE).unwrap();
        let none = features();
        assert!(
            !on(&none, "tx-checksum-ip-generic") && !on(&none, "tx-tcp-segmentation"),
            "{none}"
        );
        let csum_only = Offloads {
            csum: true,
            ..Offloads::NONE
        };
        queue.set_guest_offloads(csum_only).unwrap();
        let some = features();
        assert!(
            on(&some, "tx-checksum-ip-generic") && !on(&some, "tx-tcp-segmentation"),
            "{some}"
        );
    });
}

#[test]
fn macvtap_carries_frames_to_its_parents_network() {
    in_namespace(|| async {
        run([
            "ip", "link", "add", "ob-mv0", "type", "veth", "peer", "name", "ob-mv1",
        ]);
        run(["ip", "link", "set", "ob-mv0", "up"]);
        run(["ip", "link", "set", "ob-mv1", "up"]);
        run([
            "ip", "link", "add", "link", "ob-mv0", "name", "ob-mtap0", "type", "macvtap", "mode",
            "bridge",
        ]);
        run(["ip", "link", "set", "ob-mtap0", "up"]);
        let tap = match open("macvtap,ifname=ob-mtap0,queues=2") {
            Ok(tap) => tap,
            Err(error) => {
                println!("skipped: {error:#}");
                return;
            }
        };
        assert_eq!(tap.kind(), "macvtap");
        let queue = queue(&*tap, 0);
        let sink = TestSink::new(100);
        queue.connect(sink.clone());
        let network = Network::on("ob-mv1");
        let bytes = frame_bytes(9, 500);
        send(&*queue, &bytes);
        assert_eq!(network.receive().await, bytes);
        network.send(&bytes);
        receive_until(&*queue, &sink, |sink| !ours(sink).is_empty()).await;
        assert_eq!(ours(&sink), [bytes]);
    });
}

#[test]
fn inherited_descriptors_are_queues() {
    in_namespace(|| async {
        let Some(probe) = open_tap("tap,ifname=ob-probe") else {
            return;
        };
        drop(probe);
        let opened = || {
            super::device::Device::tap("ob-tap8", true)
                .unwrap()
                .into_fd()
        };
        let fds = vec![("a", opened()), ("b", opened())];
        let tap = open_with("tap,fds=a:b", fds).unwrap();
        assert_eq!(
            (tap.max_queues(), tap.details()["ifname"].as_str()),
            (Some(2), Some("ob-tap8"))
        );
        let queue = queue(&*tap, 0);
        queue.connect(TestSink::new(1));
        run(["ip", "link", "set", "ob-tap8", "up"]);
        let network = Network::on("ob-tap8");
        let bytes = frame_bytes(1, 77);
        send(&*queue, &bytes);
        assert_eq!(network.receive().await, bytes);
    });
}

#[test]
fn options_that_make_no_sense_are_refused() {
    on_executor(async {
        for (text, why) in [
            ("tap,script=/etc/qemu-ifup", "scripts are not run"),
            ("tap,ifname=a/b", "cannot be the name"),
            ("tap,queues=0", "'queues' has to be 1 to 256, not 0"),
            ("tap,fd=3,fds=4:5", "'fd' does not go with 'fds'"),
            ("tap,fd=x", "there is no descriptor 'x'"),
            ("macvtap", "one of 'ifname', 'fd' and 'fds' is needed"),
            (
                "macvtap,ifname=ob-none0",
                "ip link add link PARENT name ob-none0",
            ),
        ] {
            let error = open_error(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    });
}
