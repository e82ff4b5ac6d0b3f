//! What an export offers beyond the ordinary, by its options; and queues that move.

use super::*;

const SECURE_ERASE: u32 = 14;

fn offered(change: impl FnOnce(&mut VhostUserBlkOptions)) -> (u64, Vec<u8>) {
    let fixture = Fixture::new(change);
    let answer = (fixture.disk.features(), fixture.disk.config());
    fixture.stop();
    answer
}

#[test]
fn read_only_disks_offer_nothing_that_changes_them() {
    let changing = 1 << 13 | 1 << 14 | 1 << 16;
    let (features, config) = offered(|options| options.writable = false);
    assert_eq!(features & changing, 0);
    assert_eq!(config[36..], [0; 24]);
    let (features, _) = offered(|_| {});
    assert_eq!(features & changing, 1 << 13 | 1 << 14);
}

#[test]
fn block_sizes_are_told() {
    let exponent = |logical, physical| {
        let (_, config) = offered(|options| {
            (options.logical_block_size, options.physical_block_size) = (logical, physical);
        });
        config[24]
    };
    assert_eq!(exponent(512, Some(4096)), 3);
    assert_eq!(exponent(4096, None), 0);
    let mut options = VhostUserBlkOptions::new("disk", Address::Connect("none".into()));
    options.logical_block_size = 4096;
    options.physical_block_size = Some(512);
    let error = options.check().unwrap_err().to_string();
    assert!(
        error.contains("logical_block_size > physical_block_size"),
        "{error}"
    );
}

#[test]
fn writethrough_holds_whatever_the_guest_says() {
    let mut fixture = Fixture::new(|options| options.writethrough = true);
    assert_eq!(fixture.disk.config()[32], 0);
    fixture.request(OUT, 0, &[1; 512], 0);
    assert_eq!(fixture.flushes(), 1);
    fixture.disk.write_config(32, &[1]).unwrap();
    fixture.request(OUT, 0, &[1; 512], 0);
    assert_eq!(fixture.flushes(), 2);
    fixture.stop();
}

#[test]
fn secure_erase_overwrites_and_flushes_when_it_is_offered() {
    let mut fixture = Fixture::new(|options| options.secure_erase = true);
    assert_ne!(fixture.disk.features() & 1 << 16, 0);
    let config = fixture.disk.config();
    assert_eq!(config[60..], [0xff, 0xff, 0x3f, 0, 32, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(
        fixture.ranges(SECURE_ERASE, &[(2, 1, 0), (4, 2, 0)]),
        (OK, 1)
    );
    assert_eq!(fixture.flushes(), 1);
    for (sector, byte) in [(1, 1), (2, 0xff), (3, 3), (4, 0xff), (5, 0xff), (6, 6)] {
        assert_eq!(
            fixture.request(IN, sector, &[], 512).2,
            [byte; 512],
            "{sector}"
        );
    }
    assert!(fixture.ram.discards.lock().unwrap().is_empty());
    assert_eq!(fixture.ranges(SECURE_ERASE, &[(2047, 2, 0)]).0, IOERR);
    assert_eq!(fixture.ranges(SECURE_ERASE, &[(0, 1, 1)]).0, UNSUPP);
    fixture.stop();
}

#[test]
fn secure_erase_is_refused_and_touches_nothing_unless_asked_for() {
    const OFFER: u64 = 1 << 16;
    for writable in [true, false] {
        let mut fixture = Fixture::new(|options| options.writable = writable);
        assert_eq!(fixture.disk.features() & OFFER, 0);
        let config = fixture.disk.config();
        assert!(config.len() <= 60, "fields of what is not offered");
        // A guest that takes what was not offered has no more of it.
        fixture.disk.set_features(fixture.disk.features() | OFFER);
        let before = fixture.ram.bytes.lock().unwrap().clone();
        for ranges in [&[(2, 1, 0)][..], &[(2, 1, 0), (4, 2, 0)], &[(2047, 2, 0)]] {
            assert_eq!(fixture.ranges(SECURE_ERASE, ranges), (UNSUPP, 1));
        }
        assert!(*fixture.ram.bytes.lock().unwrap() == before);
        assert!(fixture.ram.discards.lock().unwrap().is_empty());
        assert_eq!(fixture.flushes(), 0);
        fixture.stop();
    }
    let mut options = VhostUserBlkOptions::new("disk", Address::Connect("none".into()));
    options.secure_erase = true;
    let error = options.check().unwrap_err().to_string();
    assert!(error.contains("writable"), "{error}");
}

/// Another thread with an executor, until it is stopped.
struct Elsewhere {
    handle: Handle,
    thread: std::thread::JoinHandle<()>,
}

impl Elsewhere {
    fn start() -> Elsewhere {
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let executor = Executor::new(&executor::Config::default()).unwrap();
            sender.send(executor.handle()).unwrap();
            executor.run();
        });
        Elsewhere {
            handle: receiver.recv().unwrap(),
            thread,
        }
    }

    fn stop(self) {
        self.handle.stop();
        self.thread.join().unwrap();
    }
}

fn move_to(fixture: &Fixture, thread: &Handle) {
    let moved = fixture.disk.set_threads(vec![thread.clone()]);
    fixture.executor.block_on(moved).unwrap();
    assert!(fixture.disk.threads()[0].is_same(thread));
}

#[test]
fn a_queue_goes_on_where_it_was_on_another_thread() {
    let mut fixture = Fixture::new(|_| {});
    let elsewhere = Elsewhere::start();
    let home = fixture.executor.handle();
    for round in 0..6u8 {
        let even = round % 2 == 0;
        move_to(&fixture, if even { &elsewhere.handle } else { &home });
        assert_eq!(fixture.request(OUT, 3, &[round; 512], 0).0, OK);
        let expected = (OK, 513, vec![round; 512]);
        assert_eq!(fixture.request(IN, 3, &[], 512), expected);
    }
    assert_eq!(fixture.stop(), 12);
    elsewhere.stop();
}

#[test]
fn a_broken_queue_stays_broken_when_it_moves() {
    let mut fixture = Fixture::new(|_| {});
    fixture.describe(&[(16, false)]);
    assert_eq!(fixture.submit(), 0);
    // The next request would be a good one.
    fixture.describe(&[(16, false), (1, true)]);
    fixture.write(AVAILABLE + 2, &2u16.to_le_bytes());
    let elsewhere = Elsewhere::start();
    move_to(&fixture, &elsewhere.handle);
    move_to(&fixture, &fixture.executor.handle());
    assert_eq!(fixture.stop(), 1);
    elsewhere.stop();
}
