use super::*;

fn record(value: u64) -> Record {
    Record {
        kind: 1,
        table: 2,
        index: 3,
        value,
    }
}

fn identity(modified_ns: u64) -> ImageIdentity {
    ImageIdentity {
        device: 1,
        inode: 2,
        born_ns: 4,
        modified_ns,
    }
}

#[test]
fn recovers_what_was_appended_since_the_mark() {
    let log = RedoLog::in_memory(4);
    assert!(log.append(&[record(1), record(2)]));
    let mark = log.mark();
    assert!(log.append(&[record(3)]));
    log.reset(mark);
    assert_eq!(log.share().recover().unwrap(), [record(3)]);
}

#[test]
fn refuses_a_unit_that_does_not_fit_and_keeps_the_rest() {
    let log = RedoLog::in_memory(2);
    assert!(log.append(&[record(1)]));
    assert!(!log.append(&[record(2), record(3)]));
    assert_eq!(log.recover().unwrap(), [record(1)]);
    log.reset(log.mark());
    assert!(
        log.append(&[record(2), record(3)]),
        "room again after the reset"
    );
}

#[test]
fn a_full_log_grows_and_keeps_its_records_wherever_they_lie() {
    for emptied in 0..9 {
        let log = RedoLog::in_memory_growing(4, 16);
        for value in 0..emptied {
            assert!(log.append(&[record(value)]));
            log.reset(log.mark());
        }
        let held: Vec<Record> = (100..116).map(record).collect();
        for unit in held.chunks(3) {
            assert!(log.append(unit));
        }
        assert_eq!(log.recover().unwrap(), held, "begun at {emptied}");
        assert!(log.is_half_full());
        assert!(!log.append(&[record(1)]), "it grows to 16 records");
    }
}

#[test]
fn a_log_that_had_grown_is_recovered() {
    let dir = tempfile::tempdir().unwrap();
    let log = RedoLog::open(dir.path(), &identity(0)).unwrap();
    let held: Vec<Record> = (0..DEFAULT_CAPACITY as u64 + 5).map(record).collect();
    for unit in held.chunks(1000) {
        assert!(log.append(unit));
    }
    drop(log);
    let again = RedoLog::open(dir.path(), &identity(0)).unwrap();
    assert_eq!(again.recover().unwrap(), held);
}

#[test]
fn a_log_of_this_boot_is_kept_and_one_of_another_is_emptied() {
    let dir = tempfile::tempdir().unwrap();
    let log = RedoLog::open(dir.path(), &identity(0)).unwrap();
    assert!(log.append(&[record(9)]));
    drop(log);
    let again = RedoLog::open(dir.path(), &identity(0)).unwrap();
    assert_eq!(again.recover().unwrap(), [record(9)]);
    again.inner.as_ref().unwrap().memory[word::BOOT_ID].store(1, Relaxed);
    let rebooted = RedoLog::open(dir.path(), &identity(0)).unwrap();
    assert!(rebooted.is_empty());
}

#[test]
fn the_log_of_a_deleted_image_is_not_replayed_into_its_inodes_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let log = RedoLog::open(dir.path(), &identity(0)).unwrap();
    assert!(log.append(&[record(9)]));
    drop(log);
    let next = ImageIdentity {
        born_ns: 5,
        ..identity(0)
    };
    assert!(RedoLog::open(dir.path(), &next).unwrap().is_empty());
    assert!(RedoLog::open(dir.path(), &next).unwrap().is_empty());
}

#[test]
fn an_image_modified_after_the_death_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let log = RedoLog::open(dir.path(), &identity(0)).unwrap();
    assert!(log.append(&[record(9)]));
    drop(log);
    let later = wall_clock_ns() + 2 * GRACE_NS;
    let error = RedoLog::open(dir.path(), &identity(later))
        .map(|_| ())
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::Corrupt);
    assert!(
        error.message.contains("changed by another program"),
        "{error}"
    );
}

#[test]
fn the_heartbeat_ends_with_the_last_handle() {
    let log = RedoLog::in_memory(4);
    let world = executor::sim::World::new(executor::sim::Config::default());
    executor::Executor::simulated(&world).block_on(async {
        let beating = executor::spawn(log.share().heartbeat());
        time::sleep(HEARTBEAT).await;
        assert!(log.append(&[record(1)]));
        time::sleep(HEARTBEAT * 3).await;
        let stamp = log.inner.as_ref().unwrap().memory[word::ALIVE].load(Relaxed);
        assert_ne!(stamp, 0);
        drop(log);
        beating.await;
    });
}

#[test]
fn what_was_left_behind_is_told_without_making_a_log() {
    let dir = tempfile::tempdir().unwrap();
    let left = || RedoLog::left_behind(dir.path(), &identity(0)).unwrap();
    assert_eq!(left(), []);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let log = RedoLog::open(dir.path(), &identity(0)).unwrap();
    assert_eq!(left(), []);
    assert!(log.append(&[record(1), record(2)]));
    assert_eq!(left(), [record(1), record(2)]);
}

#[test]
fn an_emptied_log_removes_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let log = RedoLog::open(dir.path(), &identity(0)).unwrap();
    assert!(log.append(&[record(1)]));
    log.remove();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    log.reset(log.mark());
    log.remove();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn every_unit_says_that_the_daemon_lives() {
    let log = RedoLog::in_memory(8);
    for _ in 0..2 {
        let stamp = &log.inner.as_ref().unwrap().memory[word::ALIVE];
        stamp.store(0, Relaxed);
        assert!(log.append(&[record(4)]));
        assert_ne!(stamp.load(Relaxed), 0);
    }
}
