//! The kernel as the judge: it cuts what goes from one tap interface to another one without offloads.

use std::rc::Rc;

use super::*;
use crate::link::Sink;
use crate::netdevs::test_support::{TestSink, in_namespace, open, queue, receive_until, run};

/// Frames that are cut; each is looked for among what the kernel gives.
const FRAMES: usize = 200;

#[test]
fn segments_are_those_of_the_kernel() {
    in_namespace(|| async {
        if let Err(error) = std::fs::metadata("/dev/net/tun") {
            println!("skipped: no tap interfaces here: {error}");
            return;
        }
        // Nothing of the kernel's own on the way.
        run([
            "sh",
            "-c",
            "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6",
        ]);
        run(["ip", "link", "add", "bridge0", "type", "bridge"]);
        run(["ip", "link", "set", "bridge0", "mtu", "9000", "up"]);
        let [from, to] = ["a", "b"].map(|name| {
            let netdev = open(&format!("tap,ifname={name}0,br=bridge0,mtu=9000,up=on"));
            let netdev = netdev.unwrap();
            let queue = queue(&*netdev, 0);
            (netdev, queue)
        });
        let sinks = [TestSink::new(usize::MAX), TestSink::new(usize::MAX)];
        for ((_, queue), sink) in [&from, &to].into_iter().zip(&sinks) {
            queue.connect(Rc::clone(sink) as Rc<dyn Sink>);
            queue.set_guest_offloads(Offloads::NONE).unwrap();
        }
        let host = from.0.host_offloads();
        assert!(host.tso4 && host.tso6);
        let seed: u64 = SmallRng::from_os_rng().random();
        println!("seed {seed}");
        let mut rng = SmallRng::seed_from_u64(seed);
        for _ in 0..FRAMES {
            let mut packet = Packet::random(&mut rng);
            packet.udp &= host.uso4 && host.uso6;
            packet.gso_size = rng.random_range(500..3000);
            if packet.payload.len() <= usize::from(packet.gso_size) {
                // The kernel drops some that are one segment.
                continue;
            }
            let (bytes, header) = (packet.bytes(), packet.header());
            let expected = finished(&Frame::new(header, &bytes), Offloads::NONE).unwrap();
            let mut lost = |reason| panic!("{packet:?} was dropped: {reason:?}");
            let sent = with_pieces(&bytes, header, |frame| {
                from.1.transmit(std::slice::from_ref(frame), &mut lost)
            });
            from.1.flush();
            assert_eq!(sent, 1);
            let count = expected.len();
            // The kernel may say something of its own.
            let is_ours = |(_, frame): &(VnetHeader, Vec<u8>)| frame[6..12] == bytes[6..12];
            receive_until(&*to.1, &sinks[1], |sink| {
                let frames = sink.frames.borrow();
                frames.iter().filter(|frame| is_ours(frame)).count() >= count
            })
            .await;
            let mut got = sinks[1].frames.take();
            for (_, other) in got.iter().filter(|frame| !is_ours(frame)) {
                println!("from others: {other:02x?}");
            }
            got.retain(is_ours);
            assert_eq!(got.len(), count);
            for ((_, got), (_, expected)) in got.iter().zip(&expected) {
                assert!(
                    got == expected,
                    "{packet:?}\nours   {expected:02x?}\nkernel {got:02x?}"
                );
            }
        }
    });
}
