use super::*;

#[test]
fn what_a_receiver_does_not_take_now_waits_in_order() {
    let rig = Rig::new(SwitchOptions::default());
    let [a, b, c] = [1, 2, 3].map(|station| rig.port(station));
    let frames: Vec<_> = (0..100)
        .map(|i| frame(mac(1), mac(2), &format!("{i:03}")))
        .collect();
    b.guest.give_room(3);
    assert_eq!(a.send(&frames[..20]), []);
    assert_eq!(b.guest.got(), frames[..3]);
    // A slow receiver holds no one else up.
    assert_eq!(a.send_one(&frame(mac(1), mac(3), "c")), None);
    assert_eq!(c.guest.got().len(), 1);
    rig.turn();
    b.guest.give_room(5);
    rig.turn();
    assert_eq!(b.guest.got(), frames[3..8]);
    // What comes now comes after what waits.
    b.guest.give_room(usize::MAX);
    assert_eq!(a.send(&frames[20..]), []);
    rig.turn();
    assert_eq!(b.guest.got(), frames[8..]);
    assert_eq!(a.send_one(&frames[0]), None);
    assert_eq!(b.guest.got(), frames[..1]);
}

#[test]
fn what_waits_is_bounded() {
    let rig = Rig::new(SwitchOptions {
        backlog: 10_000,
        ..SwitchOptions::default()
    });
    let [a, b] = [1, 2].map(|station| rig.port(station));
    b.guest.give_room(0);
    let large = frame(mac(1), mac(2), &"x".repeat(1000));
    let lost = a.send(&vec![large.clone(); 50]);
    assert!(
        lost.iter()
            .all(|reason| matches!(reason, DropReason::NoBuffers | DropReason::Busy))
    );
    assert!((41..50).contains(&lost.len()), "{}", lost.len());
    rig.turn();
    b.guest.give_room(usize::MAX);
    rig.turn();
    assert_eq!(b.guest.got().len() + lost.len(), 50);
    assert_eq!(a.send_one(&large), None);
    assert_eq!(b.guest.got(), std::slice::from_ref(&large));
    // What waits for a guest that goes is gone.
    b.guest.give_room(0);
    assert_eq!(a.send_one(&large), None);
    b.queue.disconnect();
    b.guest.give_room(usize::MAX);
    rig.turn();
    assert!(b.guest.got().is_empty());
    let none = Rig::new(SwitchOptions {
        backlog: 0,
        ..SwitchOptions::default()
    });
    let [a, b] = [1, 2].map(|station| none.port(station));
    b.guest.give_room(0);
    assert_eq!(a.send_one(&large), Some(DropReason::NoBuffers));
}

#[test]
fn frames_to_all_are_limited_per_port() {
    let rig = Rig::new(SwitchOptions {
        flood_rate: 1,
        ..SwitchOptions::default()
    });
    let [a, b] = [1, 2].map(|station| rig.port(station));
    let storm = vec![frame(mac(1), ALL, "storm"); 500];
    let lost = a.send(&storm);
    let passed = b.guest.got().len();
    assert!((1..100).contains(&passed), "{passed}");
    assert_eq!(lost, vec![DropReason::FloodLimit; 500 - passed]);
    assert_eq!(
        a.send_one(&frame(mac(1), mac(99), "unknown")),
        Some(DropReason::FloodLimit)
    );
    assert_eq!(a.send_one(&frame(mac(1), mac(2), "to one")), None);
    assert_eq!(b.send_one(&frame(mac(2), ALL, "another port")), None);
    assert_eq!((a.guest.got().len(), b.guest.got().len()), (1, 1));
}

#[test]
fn a_storm_of_sources_is_bounded_and_takes_no_ones_place() {
    let options = SwitchOptions {
        table_size: 256,
        port_limit: 100,
        ..SwitchOptions::default()
    };
    let rig = Rig::new(options);
    let [a, b, c] = [1, 2, 3].map(|station| rig.port(station));
    let nested = MacAddress([2, 9, 9, 9, 9, 9]);
    assert_eq!(b.send_one(&frame(nested, mac(1), "hi")), None);
    let storm = |port: &TestPort, id: u8| {
        let source = |i: u32| {
            let [_, x, y, z] = i.to_be_bytes();
            MacAddress([2, id, 0, x, y, z])
        };
        for first in (0..50_000).step_by(32) {
            let frames: Vec<_> = (first..first + 32)
                .map(|i| frame(source(i), mac(1), ""))
                .collect();
            assert_eq!(port.send(&frames), []);
            a.guest.got();
        }
    };
    storm(&c, 3);
    storm(&b, 2);
    assert!(rig.count("entries") <= 256 && rig.stations().len() <= 256);
    assert!(rig.count("not-learned") > 90_000);
    let of = |name: &str| {
        rig.stations()
            .iter()
            .filter(|station| station.member == name)
            .count()
    };
    assert!(of("p2") <= 101 && of("p3") <= 101);
    assert_eq!(a.send_one(&frame(mac(1), nested, "there?")), None);
    assert_eq!((b.guest.got().len(), c.guest.got().len()), (1, 0));
}

#[test]
fn stations_move_but_not_in_storms() {
    let rig = Rig::new(SwitchOptions {
        move_rate: 4,
        ..SwitchOptions::default()
    });
    let [a, b, c] = [1, 2, 3].map(|station| rig.port(station));
    let nested = mac(88);
    assert_eq!(b.send_one(&frame(nested, mac(1), "")), None);
    assert_eq!(c.send_one(&frame(nested, mac(1), "")), None);
    assert_eq!(a.send_one(&frame(mac(1), nested, "moved")), None);
    assert_eq!((b.guest.got().len(), c.guest.got().len()), (0, 1));
    for _ in 0..1000 {
        for port in [&b, &c] {
            assert_eq!(port.send_one(&frame(nested, mac(1), "")), None);
        }
    }
    assert!(rig.count("moves") < 100, "{}", rig.count("moves"));
    assert!(rig.count("moves-refused") > 900);
}

#[test]
fn unknown_stations_can_be_kept_from_the_guests() {
    let rig = Rig::new(SwitchOptions {
        unknown: Unknown::Drop,
        ..SwitchOptions::default()
    });
    let [a, b] = [1, 2].map(|station| rig.port(station));
    assert_eq!(
        a.send_one(&frame(mac(1), mac(99), "")),
        Some(DropReason::Filtered)
    );
    assert_eq!(a.send_one(&frame(mac(1), ALL, "")), None);
    assert_eq!(b.guest.got().len(), 1);
}

#[test]
fn options_out_of_range_are_refused() {
    let executor = Executor::new(&Config::default()).unwrap();
    let refused = |options: SwitchOptions| {
        let result = open(&options, None, executor.handle());
        result
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    };
    let sound = SwitchOptions::default();
    assert_eq!(refused(sound.clone()), "");
    for (options, what) in [
        (
            SwitchOptions {
                table_size: 15,
                ..sound.clone()
            },
            "table-size=15",
        ),
        (
            SwitchOptions {
                table_size: (1 << 20) + 1,
                ..sound.clone()
            },
            "table-size=1048577",
        ),
        (
            SwitchOptions {
                ageing: 0,
                ..sound.clone()
            },
            "ageing=0",
        ),
        (
            SwitchOptions {
                port_limit: 0,
                ..sound.clone()
            },
            "port-limit=0",
        ),
        (
            SwitchOptions {
                move_rate: 0,
                ..sound.clone()
            },
            "move-rate=0",
        ),
        (
            SwitchOptions {
                backlog: 1 << 31,
                ..sound.clone()
            },
            "backlog=2147483648",
        ),
        (
            SwitchOptions {
                uplink: Some("n9".into()),
                ..sound.clone()
            },
            "no netdev 'n9'",
        ),
        (
            SwitchOptions {
                trunk: Some("all".into()),
                ..sound.clone()
            },
            "there is none",
        ),
        (
            SwitchOptions {
                vlan: Some(5000),
                ..sound
            },
            "'5000' is not a VLAN",
        ),
    ] {
        assert!(refused(options).contains(what), "{what}");
    }
}
