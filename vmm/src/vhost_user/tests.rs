//! A device against a back-end that lives in the test: what is negotiated, what a restarted back-end is told, what is refused.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender};

use nix::sys::memfd::{MFdFlags, memfd_create};
use tempfile::TempDir;
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::{BackendReq, FrontendReq};

use super::blk::{CONFIG_WRITEBACK, Disk};
use super::model::{RING_PACKED, VERSION_1};
use super::session::PACKED_START;
use super::wire::{Message, NEED_REPLY, REPLY, encode, receive};
use super::*;
use crate::memory::Backing;

const PROTOCOL_FEATURES: u64 = 1 << 30;
const FLUSH: u64 = 1 << 9;
const EVENT_IDX: u64 = 1 << 29;
const RING_RESET: u64 = 1 << 40;

/// What the back-end in the test is.
#[derive(Clone, Copy)]
pub(crate) struct Character {
    features: u64,
    protocol: Protocol,
    /// The answer to GET_QUEUE_NUM.
    queues: u64,
    /// The start of the configuration; the rest is zero.
    config: [u8; 16],
    vring_base: u32,
    /// Acknowledges this request with an error.
    rejects: Option<FrontendReq>,
}

impl Default for Character {
    fn default() -> Self {
        Self {
            features: PROTOCOL_FEATURES | VERSION_1 | FLUSH | EVENT_IDX | RING_PACKED | RING_RESET,
            protocol: Protocol::all(),
            queues: 4,
            config: capacity(1000),
            vring_base: 7,
            rejects: None,
        }
    }
}

/// The configuration of a disk of that many sectors.
fn capacity(sectors: u64) -> [u8; 16] {
    u128::from(sectors).to_le_bytes()
}

/// A request as the back-end saw it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    request: FrontendReq,
    pub(crate) payload: Vec<u8>,
    fds: usize,
}

impl Seen {
    /// 32-bit word of the payload.
    pub(crate) fn word(&self, index: usize) -> u32 {
        u32::from_ne_bytes(self.payload[index * 4..index * 4 + 4].try_into().unwrap())
    }
}

/// A back-end with one connection.
pub(crate) struct BackEnd {
    connection: UnixStream,
    seen: Receiver<Seen>,
    channels: Receiver<UnixStream>,
}

impl BackEnd {
    /// Listens on `path`, as a daemon does at start, and takes one connection.
    fn listen(path: &Path, character: Character) -> Self {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        let (connection, _) = listener.accept().unwrap();
        let (tell, seen) = channel();
        let (give, channels) = channel();
        let stream = connection.try_clone().unwrap();
        std::thread::spawn(move || serve(stream, character, &tell, &give));
        Self {
            connection,
            seen,
            channels,
        }
    }

    /// Waits for `request`; drops what came before it.
    pub(crate) fn expect(&self, request: FrontendReq) -> Seen {
        let timeout = Duration::from_secs(10);
        loop {
            let seen = self.seen.recv_timeout(timeout);
            let seen = seen.unwrap_or_else(|_| panic!("{request:?} did not come"));
            if seen.request == request {
                return seen;
            }
        }
    }

    /// Dies without a word.
    fn kill(self) {
        self.connection.shutdown(std::net::Shutdown::Both).unwrap();
    }
}

fn serve(
    mut stream: UnixStream,
    character: Character,
    tell: &Sender<Seen>,
    give: &Sender<UnixStream>,
) {
    let mut acknowledge = false;
    while let Ok(message) = receive(&stream) {
        let request = FrontendReq::try_from(message.request).unwrap();
        if request == FrontendReq::SET_PROTOCOL_FEATURES {
            acknowledge = true;
        }
        let seen = Seen {
            request,
            payload: message.payload.clone(),
            fds: message.fds.len(),
        };
        let answer = answer(request, &message, character);
        if request == FrontendReq::SET_BACKEND_REQ_FD {
            let fd = message.fds.into_iter().next().unwrap();
            let _ = give.send(UnixStream::from(fd));
        }
        let reply = match answer {
            Some(payload) => payload,
            None if acknowledge && message.flags & NEED_REPLY != 0 => {
                u64::from(character.rejects == Some(request))
                    .to_ne_bytes()
                    .to_vec()
            }
            None => {
                let _ = tell.send(seen);
                continue;
            }
        };
        let bytes = encode(message.request, REPLY, &reply);
        let sent = if request == FrontendReq::GET_INFLIGHT_FD {
            send_with_memory(&stream, &bytes)
        } else {
            stream.write_all(&bytes).is_ok()
        };
        if !sent || tell.send(seen).is_err() {
            return;
        }
    }
}

fn answer(request: FrontendReq, message: &Message, character: Character) -> Option<Vec<u8>> {
    let number = |value: u64| Some(value.to_ne_bytes().to_vec());
    match request {
        FrontendReq::GET_FEATURES => number(character.features),
        FrontendReq::GET_PROTOCOL_FEATURES => number(character.protocol.bits()),
        FrontendReq::GET_QUEUE_NUM => number(character.queues),
        FrontendReq::GET_VRING_BASE => {
            let mut reply = message.payload.clone();
            reply[4..8].copy_from_slice(&character.vring_base.to_ne_bytes());
            Some(reply)
        }
        FrontendReq::GET_CONFIG => {
            let mut reply = message.payload.clone();
            for (byte, value) in reply[12..].iter_mut().zip(character.config) {
                *byte = value;
            }
            Some(reply)
        }
        FrontendReq::GET_INFLIGHT_FD => {
            let mut reply = message.payload.clone();
            reply[..8].copy_from_slice(&4096_u64.to_ne_bytes());
            Some(reply)
        }
        _ => None,
    }
}

fn send_with_memory(stream: &UnixStream, bytes: &[u8]) -> bool {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let memory = memfd_create(c"inflight", MFdFlags::MFD_CLOEXEC).unwrap();
    let fds = [memory.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    let parts = [std::io::IoSlice::new(bytes)];
    sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).is_ok()
}

/// A device and the things around it.
pub(crate) struct Rig {
    directory: TempDir,
    memory: Memory,
    gate: Arc<Gate>,
    pub(crate) device: Arc<Device>,
}

const RING: RingSetup = RingSetup {
    size: 64,
    descriptors: 0x1000,
    available: 0x2000,
    used: 0x3000,
};

impl Rig {
    /// A disk with two queues.
    pub(crate) fn new() -> Self {
        Self::with(Arc::new(Disk { num_queues: 2 }))
    }

    /// A device of that model.
    pub(crate) fn with(model: Arc<dyn Model>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let description = Description {
            name: "device0".into(),
            socket: directory.path().join("device.sock"),
            queue_size: 256,
            model,
        };
        let environment = Environment {
            memory: Memory::new(16 << 20, Backing::Pages).unwrap(),
            gate: Arc::default(),
            sandbox: Sandbox::Off,
        };
        let device = Device::start(description, &environment).unwrap();
        let device = Arc::new(device);
        Self {
            directory,
            memory: environment.memory,
            gate: environment.gate,
            device,
        }
    }

    fn back_end(&self, character: Character) -> BackEnd {
        BackEnd::listen(&self.directory.path().join("device.sock"), character)
    }

    /// Starts a back-end and waits until the guest would see it.
    pub(crate) fn connect(&self, character: Character) -> BackEnd {
        let seen = self.gate.device_changes();
        let back_end = self.back_end(character);
        self.gate.wait_for_change(seen);
        back_end
    }

    fn activate(&self) {
        self.activate_with(VERSION_1 | FLUSH);
    }

    fn activate_with(&self, features: u64) {
        self.device.activate(Activation {
            features,
            rings: vec![Some(RING), None],
        });
    }
}

mod net;

#[test]
fn a_disk_waits_for_its_back_end_and_then_shows_what_that_offers() {
    let rig = Rig::new();
    assert_eq!(rig.device.features(), None);
    assert_eq!(rig.device.config(), None);
    let _back_end = rig.connect(Character::default());
    assert_eq!(
        rig.device.features(),
        Some(VERSION_1 | FLUSH | EVENT_IDX | RING_PACKED),
        "ring reset and the like are held back"
    );
    let (config, _) = rig.device.config().unwrap();
    assert_eq!(config[..8], 1000_u64.to_le_bytes());
    assert_eq!(
        config[34..36],
        2_u16.to_le_bytes(),
        "the VMM's number of queues"
    );
}

#[test]
fn an_activated_ring_is_described_completely_before_it_is_enabled() {
    let rig = Rig::new();
    let back_end = rig.connect(Character::default());
    rig.activate();
    let features = back_end.expect(FrontendReq::SET_FEATURES);
    assert_eq!(
        features.payload,
        (VERSION_1 | FLUSH | PROTOCOL_FEATURES).to_ne_bytes()
    );
    assert_eq!(back_end.expect(FrontendReq::SET_MEM_TABLE).fds, 1);
    assert_eq!(back_end.expect(FrontendReq::SET_INFLIGHT_FD).fds, 1);
    assert_eq!(back_end.expect(FrontendReq::SET_VRING_NUM).word(1), 64);
    assert_eq!(back_end.expect(FrontendReq::SET_VRING_BASE).word(1), 0);
    let address = back_end.expect(FrontendReq::SET_VRING_ADDR);
    let start = rig.memory.regions()[0].host_start;
    assert_eq!(address.payload[8..16], (start + 0x1000).to_ne_bytes());
    assert_eq!(address.payload[16..24], (start + 0x3000).to_ne_bytes());
    assert_eq!(address.payload[24..32], (start + 0x2000).to_ne_bytes());
    assert_eq!(back_end.expect(FrontendReq::SET_VRING_KICK).fds, 1);
    assert_eq!(back_end.expect(FrontendReq::SET_VRING_CALL).fds, 1);
    let enable = back_end.expect(FrontendReq::SET_VRING_ENABLE);
    assert_eq!((enable.word(0), enable.word(1)), (0, 1));
    let status = back_end.expect(FrontendReq::SET_STATUS);
    assert_eq!(status.payload, 15_u64.to_ne_bytes());
}

#[test]
fn a_restarted_back_end_gets_the_same_inflight_region_and_goes_on_at_the_used_index() {
    let rig = Rig::new();
    let first = rig.connect(Character::default());
    rig.activate();
    let before = first.expect(FrontendReq::SET_INFLIGHT_FD);
    first.expect(FrontendReq::SET_VRING_ENABLE);
    rig.memory
        .write(RING.used + 2, &41_u16.to_le_bytes())
        .unwrap();
    first.kill();
    let second = rig.back_end(Character::default());
    let mut requests = Vec::new();
    let after = loop {
        let seen = second.seen.recv_timeout(Duration::from_secs(10)).unwrap();
        requests.push(seen.request);
        if seen.request == FrontendReq::SET_INFLIGHT_FD {
            break seen;
        }
    };
    assert!(
        !requests.contains(&FrontendReq::GET_INFLIGHT_FD),
        "a new region would forget"
    );
    assert_eq!(after.payload, before.payload);
    assert_eq!(second.expect(FrontendReq::SET_VRING_BASE).word(1), 41);
    second.expect(FrontendReq::SET_VRING_ENABLE);
    second.expect(FrontendReq::SET_STATUS);
    let third = {
        second.kill();
        rig.back_end(Character::default())
    };
    third.expect(FrontendReq::SET_VRING_ENABLE);
    assert!(
        rig.device.notifiers().kicks[0].is_raised(),
        "requests of the dead are looked for"
    );
}

#[test]
fn packed_rings_are_offered_with_inflight_tracking_only() {
    let rig = Rig::new();
    let _back_end = rig.connect(Character {
        protocol: Protocol::all() & !Protocol::INFLIGHT_SHMFD,
        ..Character::default()
    });
    assert_eq!(rig.device.features(), Some(VERSION_1 | FLUSH | EVENT_IDX));
}

#[test]
fn a_packed_ring_starts_at_its_beginning_and_goes_on_where_it_was_drained() {
    let rig = Rig::new();
    let first = rig.connect(Character {
        vring_base: 0x8007_0005,
        ..Character::default()
    });
    rig.activate_with(VERSION_1 | RING_PACKED);
    let start = PACKED_START;
    assert_eq!(first.expect(FrontendReq::SET_VRING_BASE).word(1), start);
    first.expect(FrontendReq::SET_VRING_ENABLE);
    rig.device.pause().unwrap();
    rig.device.resume();
    let base = first.expect(FrontendReq::SET_VRING_BASE).word(1);
    assert_eq!(base, 0x8007_0005);
    first.expect(FrontendReq::SET_VRING_ENABLE);
    first.kill();
    // Nobody but the inflight region knows now.
    let second = rig.back_end(Character::default());
    assert_eq!(second.expect(FrontendReq::SET_INFLIGHT_FD).fds, 1);
    assert_eq!(second.expect(FrontendReq::SET_VRING_BASE).word(1), start);
}

#[test]
fn a_successor_that_lacks_a_feature_in_use_is_refused_until_a_better_one_comes() {
    let rig = Rig::new();
    let first = rig.connect(Character::default());
    rig.activate();
    first.expect(FrontendReq::SET_VRING_ENABLE);
    first.kill();
    let poor = Character {
        features: PROTOCOL_FEATURES | VERSION_1,
        ..Character::default()
    };
    let second = rig.back_end(poor);
    second.expect(FrontendReq::GET_CONFIG);
    while let Ok(seen) = second.seen.recv() {
        assert_ne!(seen.request, FrontendReq::SET_FEATURES);
    }
    let third = rig.back_end(Character::default());
    third.expect(FrontendReq::SET_VRING_ENABLE);
}

#[test]
fn a_successor_that_cannot_take_over_requests_in_flight_is_refused() {
    let rig = Rig::new();
    let first = rig.connect(Character::default());
    rig.activate();
    first.expect(FrontendReq::SET_VRING_ENABLE);
    first.kill();
    let forgetful = Character {
        protocol: Protocol::all() - Protocol::INFLIGHT_SHMFD,
        ..Character::default()
    };
    let second = rig.back_end(forgetful);
    while let Ok(seen) = second.seen.recv() {
        assert_ne!(seen.request, FrontendReq::SET_VRING_NUM);
    }
}

#[test]
fn a_configuration_change_interrupts_a_guest_that_is_running() {
    let rig = Rig::new();
    let back_end = rig.connect(Character::default());
    let mut channel = back_end.channels.recv().unwrap();
    rig.activate();
    back_end.expect(FrontendReq::SET_STATUS);
    let (_, before) = rig.device.config().unwrap();
    back_end.kill();
    let seen = rig.gate.device_changes();
    let bigger = Character {
        config: capacity(2000),
        ..Character::default()
    };
    let back_end = rig.back_end(bigger);
    rig.gate.wait_for_change(seen);
    let (config, after) = rig.device.config().unwrap();
    assert_eq!(config[..8], 2000_u64.to_le_bytes());
    assert_ne!(after, before);
    assert!(rig.device.notifiers().config.clear(), "grown while away");
    assert!(channel.write_all(b"x").is_err() || back_end.channels.recv().is_ok());
}

#[test]
fn the_back_end_can_say_that_its_configuration_has_changed() {
    let rig = Rig::new();
    let back_end = rig.connect(Character::default());
    let mut channel = back_end.channels.recv().unwrap();
    back_end.expect(FrontendReq::GET_CONFIG);
    channel
        .write_all(&encode(
            BackendReq::CONFIG_CHANGE_MSG.into(),
            NEED_REPLY,
            &[],
        ))
        .unwrap();
    let acknowledgement = receive(&channel).unwrap();
    assert_eq!(acknowledgement.payload, 0_u64.to_ne_bytes());
    back_end.expect(FrontendReq::GET_CONFIG);
}

#[test]
fn a_pause_drains_and_a_resume_goes_on_where_the_drain_ended() {
    let rig = Rig::new();
    let back_end = rig.connect(Character::default());
    rig.activate();
    back_end.expect(FrontendReq::SET_VRING_ENABLE);
    rig.device.pause().unwrap();
    assert_eq!(back_end.expect(FrontendReq::GET_VRING_BASE).word(0), 0);
    rig.device.resume();
    let base = back_end.expect(FrontendReq::SET_VRING_BASE);
    assert_eq!((base.word(0), base.word(1)), (0, 7));
    back_end.expect(FrontendReq::SET_VRING_ENABLE);
}

#[test]
fn a_reset_leaves_the_back_end_without_a_driver() {
    let rig = Rig::new();
    let back_end = rig.connect(Character::default());
    rig.activate();
    back_end.expect(FrontendReq::SET_VRING_ENABLE);
    rig.device.reset_and_wait().unwrap();
    assert!(!rig.device.is_resetting());
    back_end.expect(FrontendReq::GET_VRING_BASE);
    assert_eq!(
        back_end.expect(FrontendReq::SET_STATUS).payload,
        0_u64.to_ne_bytes()
    );
    back_end.expect(FrontendReq::RESET_DEVICE);
    rig.activate();
    back_end.expect(FrontendReq::GET_INFLIGHT_FD);
    assert_eq!(back_end.expect(FrontendReq::SET_VRING_BASE).word(1), 0);
}

#[test]
fn a_disk_without_a_back_end_can_be_reset_and_paused() {
    let rig = Rig::new();
    rig.activate();
    rig.device.pause().unwrap();
    rig.device.reset_and_wait().unwrap();
    rig.device.resume();
}

#[test]
fn a_ring_outside_the_memory_breaks_the_device_until_it_is_reset() {
    let rig = Rig::new();
    let back_end = rig.connect(Character::default());
    let ring = RingSetup {
        used: u64::MAX - 100,
        ..RING
    };
    rig.device.activate(Activation {
        features: VERSION_1,
        rings: vec![Some(ring)],
    });
    rig.device.pause().unwrap();
    assert!(rig.device.is_broken());
    assert!(rig.device.notifiers().config.is_raised());
    rig.device.reset_and_wait().unwrap();
    assert!(!rig.device.is_broken());
    assert!(
        back_end
            .seen
            .try_iter()
            .all(|seen| seen.request != FrontendReq::SET_VRING_NUM)
    );
}

#[test]
fn a_restarted_back_end_is_told_the_cache_mode_until_the_driver_is_reset() {
    let rig = Rig::new();
    let first = rig.connect(Character::default());
    rig.device.write_config(CONFIG_WRITEBACK, &[1]);
    first.expect(FrontendReq::SET_CONFIG);
    first.kill();
    let second = rig.connect(Character::default());
    assert_eq!(second.expect(FrontendReq::SET_CONFIG).payload[12], 1);
    assert_eq!(rig.device.config().unwrap().0[CONFIG_WRITEBACK], 1);
    rig.device.reset_and_wait().unwrap();
    assert_eq!(
        rig.device.config().unwrap().0[CONFIG_WRITEBACK],
        0,
        "the back-end's own"
    );
}

#[test]
fn a_back_end_may_refuse_a_cache_mode_and_stays_connected() {
    let rig = Rig::new();
    let back_end = rig.connect(Character {
        rejects: Some(FrontendReq::SET_CONFIG),
        ..Character::default()
    });
    let seen = rig.gate.device_changes();
    rig.device.write_config(CONFIG_WRITEBACK, &[1]);
    rig.gate.wait_for_change(seen);
    assert_eq!(rig.device.config().unwrap().0[CONFIG_WRITEBACK], 0);
    rig.activate();
    back_end.expect(FrontendReq::SET_VRING_ENABLE);
}
