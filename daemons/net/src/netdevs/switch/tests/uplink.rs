use super::*;

use std::collections::VecDeque;

/// A network outside: notes what it is sent, and gives what a test puts in.
#[derive(Default)]
struct Outside {
    sent: RefCell<Vec<(VnetHeader, Vec<u8>)>>,
    batches: Cell<usize>,
    room: Cell<usize>,
    coming: RefCell<VecDeque<(VnetHeader, Vec<u8>)>>,
    changed: Notify,
    sink: RefCell<Option<Rc<dyn Sink>>>,
    fails: Cell<bool>,
}

impl Outside {
    fn give(&self, header: VnetHeader, bytes: &[u8]) {
        self.coming.borrow_mut().push_back((header, bytes.to_vec()));
        self.changed.notify_all();
    }

    fn sent(&self) -> Vec<Vec<u8>> {
        self.sent
            .take()
            .into_iter()
            .map(|(_, bytes)| bytes)
            .collect()
    }
}

struct OutsideQueue(Rc<Outside>);

impl NetQueue for OutsideQueue {
    fn connect(&self, sink: Rc<dyn Sink>) {
        self.0.sink.replace(Some(sink));
    }

    fn disconnect(&self) {
        self.0.sink.replace(None);
    }

    fn transmit(&self, frames: &[Frame<'_>], _dropped: &mut dyn FnMut(DropReason)) -> usize {
        let taken = frames.len().min(self.0.room.get());
        self.0.room.set(self.0.room.get() - taken);
        self.0.batches.set(self.0.batches.get() + 1);
        for frame in &frames[..taken] {
            let mut bytes = Vec::new();
            frame.append_to(&mut bytes, usize::MAX);
            self.0.sent.borrow_mut().push((frame.header, bytes));
        }
        taken
    }

    fn writable(&self) -> LocalFuture<'_, ()> {
        let notified = self.0.changed.notified();
        Box::pin(async move {
            if self.0.room.get() == 0 {
                notified.await;
            }
        })
    }

    fn receive(&self, budget: usize) -> io::Result<Received> {
        if self.0.fails.get() {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let sink = self.0.sink.borrow().clone().unwrap();
        for i in 0..budget {
            let Some((header, bytes)) = self.0.coming.borrow_mut().pop_front() else {
                sink.flush();
                return Ok(Received::Drained);
            };
            // Both ways in which a back-end gives frames.
            if i % 2 == 0 {
                sink.deliver(&Frame::new(header, &bytes));
                continue;
            }
            let mut buffers = Vec::new();
            assert_eq!(
                sink.reserve(bytes.len(), &mut buffers),
                bytes.len() + VnetHeader::LEN
            );
            let whole = [&header.to_bytes()[..], &bytes].concat();
            #[expect(unsafe_code, reason = "reserved buffers are raw memory")]
            // SAFETY: one buffer of that length, reserved for us.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    whole.as_ptr(),
                    buffers[0].iov_base.cast(),
                    whole.len(),
                );
            }
            sink.commit(whole.len());
        }
        sink.flush();
        Ok(Received::More)
    }

    fn readable(&self) -> LocalFuture<'_, ()> {
        let notified = self.0.changed.notified();
        Box::pin(async move {
            if self.0.coming.borrow().is_empty() && !self.0.fails.get() {
                notified.await;
            }
        })
    }

    fn set_guest_offloads(&self, offloads: Offloads) -> io::Result<()> {
        assert_eq!(offloads, Offloads::ALL);
        Ok(())
    }
}

struct OutsideNetdev {
    /// Shared with the test; the maker takes it to the switch's thread, which is the test's.
    outside: Rc<Outside>,
    offloads: Offloads,
}

thread_local! {
    static OUTSIDE: RefCell<Option<Rc<Outside>>> = RefCell::default();
}

impl Netdev for OutsideNetdev {
    fn kind(&self) -> &'static str {
        "outside"
    }

    fn max_queues(&self) -> Option<u16> {
        Some(1)
    }

    fn host_offloads(&self) -> Offloads {
        self.offloads
    }

    fn guest_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn attach(&self, _port: &Attachment, index: u16) -> io::Result<QueueMaker> {
        assert_eq!(index, 0);
        OUTSIDE.replace(Some(Rc::clone(&self.outside)));
        Ok(Box::new(|| {
            let outside = OUTSIDE.take().expect("the maker runs on the test's thread");
            Ok(Rc::new(OutsideQueue(outside)))
        }))
    }
}

fn rig(options: SwitchOptions, offloads: Offloads) -> (Rig, Rc<Outside>) {
    let outside = Rc::new(Outside {
        room: Cell::new(usize::MAX),
        ..Outside::default()
    });
    let netdev = OutsideNetdev {
        outside: Rc::clone(&outside),
        offloads,
    };
    let options = SwitchOptions {
        uplink: Some("n0".into()),
        ..options
    };
    (Rig::with_uplink(options, Some(Rc::new(netdev))), outside)
}

#[test]
fn frames_go_out_in_one_batch_and_come_in() {
    let (rig, outside) = rig(SwitchOptions::default(), Offloads::ALL);
    assert_eq!(rig.switch.details()["uplink-running"], true);
    let [a, b] = [1, 2].map(|station| rig.port(station));
    let server = mac(200);
    outside.give(VnetHeader::default(), &frame(server, ALL, "who has 1"));
    outside.give(VnetHeader::default(), &frame(server, mac(1), "to 1"));
    rig.turn();
    assert_eq!((a.guest.got().len(), b.guest.got().len()), (2, 1));
    let mut frames: Vec<_> = (0..10)
        .map(|i| frame(mac(1), server, &i.to_string()))
        .collect();
    frames.push(frame(mac(1), mac(2), "inside"));
    frames.push(frame(mac(1), ALL, "to all"));
    assert_eq!(a.send(&frames), []);
    assert_eq!(outside.batches.replace(0), 1);
    let sent = outside.sent();
    assert_eq!(sent[..10], frames[..10]);
    assert_eq!(sent[10..], frames[11..]);
    assert_eq!(b.guest.got(), frames[10..]);
    let known = rig.stations();
    assert!(
        known
            .iter()
            .any(|station| station.mac == server && station.member == "n0")
    );
}

#[test]
fn what_the_uplink_does_not_take_now_goes_later() {
    let (rig, outside) = rig(SwitchOptions::default(), Offloads::ALL);
    let a = rig.port(1);
    outside.room.set(2);
    let frames: Vec<_> = (0..9).map(|i| frame(mac(1), ALL, &i.to_string())).collect();
    assert_eq!(a.send(&frames[..5]), []);
    assert_eq!(outside.sent(), frames[..2]);
    rig.turn();
    assert_eq!(a.send(&frames[5..]), []);
    outside.room.set(usize::MAX);
    outside.changed.notify_all();
    rig.turn();
    assert_eq!(outside.sent(), frames[2..]);
}

#[test]
fn an_uplink_gets_finished_frames_if_it_needs_them() {
    let (rig, outside) = rig(SwitchOptions::default(), Offloads::NONE);
    let a = rig.port(1);
    let mut bytes = frame(mac(1), ALL, "");
    bytes.extend([0; 50]);
    let open = VnetHeader {
        flags: 1,
        csum_start: 20,
        csum_offset: 4,
        ..VnetHeader::default()
    };
    let plain = frame(mac(1), ALL, "plain");
    let frames = [
        (VnetHeader::default(), plain.clone()),
        (open, bytes.clone()),
        (VnetHeader::default(), plain.clone()),
    ];
    assert_eq!(a.send_with_headers(&frames), []);
    let sent = outside.sent.take();
    assert!(
        sent.iter()
            .all(|(header, _)| *header == VnetHeader::default())
    );
    bytes[24..26].fill(0xff);
    let expected = [plain.clone(), bytes, plain];
    assert_eq!(
        sent.into_iter().map(|(_, bytes)| bytes).collect::<Vec<_>>(),
        expected
    );
}

#[test]
fn an_uplink_can_be_a_trunk() {
    let options = SwitchOptions {
        trunk: Some("10:20".into()),
        native: Some(5),
        ..SwitchOptions::default()
    };
    let (rig, outside) = rig(options, Offloads::ALL);
    let a = rig.queue(&attachment(1, VlanMode::Access(10)), 0);
    let native = rig.queue(&attachment(2, VlanMode::Access(5)), 0);
    let other = rig.queue(&attachment(3, VlanMode::Access(30)), 0);
    assert_eq!(a.send_one(&frame(mac(1), ALL, "ten")), None);
    assert_eq!(native.send_one(&frame(mac(2), ALL, "native")), None);
    assert_eq!(other.send_one(&frame(mac(3), ALL, "thirty")), None);
    let mut tagged = frame(mac(1), ALL, "ten");
    tagged.splice(12..12, [0x81, 0, 0, 10]);
    assert_eq!(outside.sent(), [tagged, frame(mac(2), ALL, "native")]);
    let mut from_outside = frame(mac(200), mac(1), "in");
    from_outside.splice(12..12, [0x81, 0, 0, 10]);
    outside.give(VnetHeader::default(), &from_outside);
    let mut no_member = from_outside;
    no_member[15] = 30;
    outside.give(VnetHeader::default(), &no_member);
    rig.turn();
    assert_eq!(a.guest.got(), [frame(mac(200), mac(1), "in")]);
    assert!(other.guest.got().is_empty() && native.guest.got().is_empty());
    assert_eq!(rig.switch.details()["drops"]["vlan"], 1);
}

#[test]
fn frames_of_any_length_come_in_with_and_without_their_tag() {
    let (rig, outside) = rig(SwitchOptions::default(), Offloads::ALL);
    let access = rig.queue(&attachment(1, VlanMode::Access(10)), 0);
    let native = VlanMode::Trunk {
        vlans: vec![],
        native: Some(20),
    };
    let native = rig.queue(&attachment(2, native), 0);
    for len in [14, 60, 187, 188, 189, 191, 192, 193, 196, 197, 1500, 65_000] {
        let mut plain = frame(mac(200), ALL, "");
        plain.resize(len, 7);
        let mut tagged = plain.clone();
        tagged.splice(12..12, [0x81, 0, 0, 10]);
        // Both ways in which a back-end gives frames.
        for _ in 0..2 {
            outside.give(VnetHeader::default(), &tagged);
        }
        rig.turn();
        assert_eq!(access.guest.got(), vec![plain.clone(); 2], "{len} bytes");
        assert_eq!(native.guest.got(), vec![tagged; 2], "{len} bytes");
        // A priority tag gets the VLAN of its port.
        let mut priority = plain.clone();
        priority.splice(12..12, [0x81, 0, 0xe0, 0]);
        priority[6..12].copy_from_slice(&mac(2).0);
        assert_eq!(native.send_one(&priority), None);
        priority[14..16].copy_from_slice(&[0xe0, 20]);
        assert_eq!(outside.sent(), [priority]);
    }
}

#[test]
fn unknown_stations_can_be_the_uplinks_alone() {
    let options = SwitchOptions {
        unknown: Unknown::Uplink,
        ..SwitchOptions::default()
    };
    let (rig, outside) = rig(options, Offloads::ALL);
    let [a, b] = [1, 2].map(|station| rig.port(station));
    let unknown = frame(mac(1), mac(99), "");
    assert_eq!(a.send_one(&unknown), None);
    assert_eq!((outside.sent(), b.guest.got()), (vec![unknown], vec![]));
    outside.give(VnetHeader::default(), &frame(mac(200), mac(98), ""));
    rig.turn();
    assert!(a.guest.got().is_empty() && b.guest.got().is_empty());
    assert_eq!(rig.switch.details()["drops"]["filtered"], 1);
}

#[test]
fn an_uplink_that_fails_is_no_member_any_more() {
    let (rig, outside) = rig(SwitchOptions::default(), Offloads::ALL);
    let a = rig.port(1);
    outside.fails.set(true);
    outside.changed.notify_all();
    rig.turn();
    assert_eq!(rig.switch.details()["uplink-running"], false);
    assert!(outside.sink.borrow().is_none());
    assert_eq!(a.send_one(&frame(mac(1), ALL, "")), None);
    assert!(outside.sent().is_empty());
}

#[test]
fn an_uplink_ends_with_the_switch() {
    let (rig, outside) = rig(SwitchOptions::default(), Offloads::ALL);
    let a = rig.port(1);
    let Rig { switch, executor } = rig;
    drop(switch);
    executor.turn().unwrap();
    assert!(outside.sink.borrow().is_none());
    assert_eq!(Rc::strong_count(&outside), 1);
    assert_eq!(a.send_one(&frame(mac(1), ALL, "")), None);
    drop(a);
}

#[test]
fn an_uplink_that_gives_back_at_once_makes_no_circle() {
    let echo = crate::netdevs::echo::Echo;
    let options = SwitchOptions {
        uplink: Some("e0".into()),
        ..SwitchOptions::default()
    };
    let rig = Rig::with_uplink(options, Some(Rc::new(echo)));
    let [a, b] = [1, 2].map(|station| rig.port(station));
    assert_eq!(a.send_one(&frame(mac(1), ALL, "")), None);
    assert_eq!((a.guest.got().len(), b.guest.got().len()), (0, 1));
    assert_eq!(rig.switch.details()["drops"]["busy"], 1);
}

#[test]
fn a_switch_is_no_uplink_and_none_lives_elsewhere() {
    let executor = Executor::new(&Config::default()).unwrap();
    let inner = open(&SwitchOptions::default(), None, executor.handle()).unwrap();
    let inner: Rc<dyn Netdev> = Rc::new(inner);
    let options = SwitchOptions {
        uplink: Some("s1".into()),
        ..SwitchOptions::default()
    };
    let error = open(&options, Some(Rc::clone(&inner)), executor.handle())
        .err()
        .unwrap();
    assert_eq!(
        format!("{error:#}"),
        "cannot use 's1' as the uplink: it is a switch"
    );
    let other = Executor::new(&Config::default()).unwrap();
    let error = open(&options, Some(inner), other.handle()).err().unwrap();
    assert_eq!(
        format!("{error:#}"),
        "cannot use 's1' as the uplink: it lives on another thread"
    );
}
