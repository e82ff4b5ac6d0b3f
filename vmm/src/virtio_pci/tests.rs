//! The transport as a driver sees it, with a back-end that lives in the test.

use super::*;
use crate::pci::msix::tests::FakeController;
use crate::vhost_user::net::Card;
use crate::vhost_user::tests::{Character, Rig};
use std::sync::Mutex;
use vhost::vhost_user::message::FrontendReq;

const BAR: u32 = 0xc000_0000;

#[derive(Clone, Default)]
struct FakeDoorbells(Arc<Mutex<Vec<u64>>>);

impl Doorbells for FakeDoorbells {
    fn connect(&self, address: u64, _: &Notifier) -> anyhow::Result<()> {
        self.0.lock().unwrap().push(address);
        Ok(())
    }

    fn disconnect(&self, address: u64, _: &Notifier) -> anyhow::Result<()> {
        self.0.lock().unwrap().retain(|other| *other != address);
        Ok(())
    }
}

fn device(rig: &Rig) -> (VirtioPci, FakeDoorbells) {
    let doorbells = FakeDoorbells::default();
    let controller = Arc::new(FakeController::default());
    let bells = Box::new(doorbells.clone());
    (
        VirtioPci::new(rig.device.clone(), BAR, controller, bells),
        doorbells,
    )
}

fn read(device: &mut VirtioPci, at: u64, len: usize) -> u64 {
    let mut bytes = [0; 8];
    device.read_bar(at, &mut bytes[..len]).unwrap();
    u64::from_le_bytes(bytes)
}

fn write(device: &mut VirtioPci, at: u64, value: u64, len: usize) {
    device.write_bar(at, &value.to_le_bytes()[..len]).unwrap();
}

/// Does what a driver does up to and with FEATURES_OK; returns the status that it then reads.
fn negotiate(device: &mut VirtioPci, features: u64) -> u64 {
    write(device, 0x14, 3, 1);
    for half in 0..2 {
        write(device, 0x08, half, 4);
        write(device, 0x0c, features >> (32 * half), 4);
    }
    write(device, 0x14, 11, 1);
    read(device, 0x14, 1)
}

#[test]
fn features_are_not_ready_until_the_back_end_is_there_but_the_status_is() {
    let rig = Rig::new();
    let (mut device, _) = device(&rig);
    let mut word = [0; 4];
    assert_eq!(device.read_bar(4, &mut word), Err(NotReady));
    assert_eq!(device.read_bar(DEVICE, &mut word), Err(NotReady));
    assert_eq!(device.write_bar(DEVICE, &word), Err(NotReady));
    assert_eq!(read(&mut device, 0x14, 1), 0);
    let _back_end = rig.connect(Character::default());
    write(&mut device, 0, 1, 4);
    assert_eq!(read(&mut device, 4, 4), 5, "VERSION_1, RING_PACKED");
    assert_eq!(read(&mut device, DEVICE, 8), 1000);
    assert_eq!(read(&mut device, DEVICE + 58, 4), 0, "past the end");
}

#[test]
fn a_driver_that_wants_what_is_not_offered_does_not_get_features_ok() {
    let rig = Rig::new();
    let _back_end = rig.connect(Character::default());
    let (mut device, _) = device(&rig);
    assert_eq!(negotiate(&mut device, 1 << 32 | 1 << 40), 3);
    assert_eq!(negotiate(&mut device, 1 << 9), 3, "VERSION_1 is a must");
    assert_eq!(negotiate(&mut device, 1 << 32 | 1 << 9), 11);
}

#[test]
fn a_ready_driver_reaches_the_back_end_and_a_reset_takes_it_back() {
    let rig = Rig::new();
    let back_end = rig.connect(Character::default());
    let (mut device, _) = device(&rig);
    assert_eq!(negotiate(&mut device, 1 << 32), 11);
    write(&mut device, 0x16, 1, 2);
    write(&mut device, 0x18, 32, 2);
    write(&mut device, 0x1a, 1, 2);
    write(&mut device, 0x20, 0x4000, 8);
    write(&mut device, 0x28, 0x5000, 4);
    write(&mut device, 0x30, 0x6000, 8);
    write(&mut device, 0x1c, 1, 2);
    write(&mut device, 0x18, 64, 2);
    assert_eq!(
        read(&mut device, 0x18, 2),
        32,
        "an enabled queue does not change"
    );
    write(&mut device, 0x14, 15, 1);
    let number = back_end.expect(FrontendReq::SET_VRING_NUM);
    assert_eq!((number.word(0), number.word(1)), (1, 32));
    back_end.expect(FrontendReq::SET_VRING_ENABLE);
    write(&mut device, 0x14, 0, 1);
    back_end.expect(FrontendReq::RESET_DEVICE);
    while read(&mut device, 0x14, 1) != 0 {
        std::thread::yield_now();
    }
    write(&mut device, 0x16, 1, 2);
    assert_eq!(read(&mut device, 0x1a, 2), 0xffff);
    assert_eq!(read(&mut device, 0x1c, 2), 0);
}

#[test]
fn a_card_is_told_apart_from_a_disk_by_its_identity() {
    let options = "socket=unused,queues=64".parse().unwrap();
    let card = Card::describe(0, &options).unwrap().model;
    for (rig, id, class, queues) in [
        (Rig::new(), 0x1042_1af4, 0x0100_0001, 2),
        (Rig::with(card), 0x1041_1af4, 0x0200_0001, 129),
    ] {
        let (mut device, _) = device(&rig);
        let mut word = [0; 4];
        device.read_config(0, &mut word).unwrap();
        assert_eq!(u32::from_le_bytes(word), id);
        device.read_config(8, &mut word).unwrap();
        assert_eq!(u32::from_le_bytes(word), class);
        assert_eq!(read(&mut device, 0x12, 2), queues);
    }
}

#[test]
fn doorbells_follow_the_bar() {
    let rig = Rig::new();
    let (mut device, doorbells) = device(&rig);
    let connected = || doorbells.0.lock().unwrap().clone();
    assert!(connected().is_empty());
    device.write_config(4, &[2, 0]).unwrap();
    let first = u64::from(BAR) + NOTIFY;
    assert_eq!(connected(), [first, first + 4]);
    device.write_config(4, &[0, 0]).unwrap();
    assert!(connected().is_empty());
    device
        .write_config(0x10, &0xc100_0000_u32.to_le_bytes())
        .unwrap();
    device.write_config(4, &[2, 0]).unwrap();
    assert_eq!(connected(), [0xc100_3000, 0xc100_3004]);
}

#[test]
fn the_configuration_window_reaches_the_bar() {
    let rig = Rig::new();
    let (mut device, _) = device(&rig);
    let window = device.window_capability;
    device
        .write_config(window + 8, &0x12_u32.to_le_bytes())
        .unwrap();
    device
        .write_config(window + 12, &2_u32.to_le_bytes())
        .unwrap();
    let mut queues = [0; 2];
    device.read_config(window + 16, &mut queues).unwrap();
    assert_eq!(u16::from_le_bytes(queues), 2);
}

#[test]
fn registers_of_queues_that_do_not_exist_read_as_zero() {
    let rig = Rig::new();
    let (mut device, _) = device(&rig);
    write(&mut device, 0x16, 500, 2);
    assert_eq!(read(&mut device, 0x18, 2), 0);
    write(&mut device, 0x18, 64, 2);
    write(&mut device, 0x1a, 0, 2);
    assert_eq!(read(&mut device, 0x1a, 2), 0xffff);
    write(&mut device, NOTIFY + 0xffc, 0, 2);
}

#[test]
fn only_the_cache_mode_can_be_written_and_it_reaches_the_back_end() {
    let rig = Rig::new();
    let back_end = rig.connect(Character::default());
    let (mut device, _) = device(&rig);
    write(&mut device, DEVICE, 1, 8);
    write(&mut device, DEVICE + 32, 1, 1);
    assert_eq!(read(&mut device, DEVICE, 8), 1000);
    assert_eq!(read(&mut device, DEVICE + 32, 1), 1);
    let order = back_end.expect(FrontendReq::SET_CONFIG);
    assert_eq!(
        (order.word(0), order.word(1), order.payload[12]),
        (32, 1, 1)
    );
}
