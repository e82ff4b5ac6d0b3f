//! Requests through a real ring to a disk in memory, and what the device tells about itself.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use block::{
    BoxFuture, Buffer, ByteRange, Driver, Edge, IoFuture, Limits, Node, NodeOptions, Resize,
    StatusExtent, WriteFlags, ZeroFlags,
};
use executor::Executor;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::uio::{pread, pwrite};
use vhost_daemon::memory::MemoryTable;
use vhost_daemon::wire::{RegionSpec, RingAddresses};
use vhost_daemon::{Device, QueueSetup};

use super::request::{IOERR, OK, UNSUPP};
use super::*;

mod offers;

type Result<T, E = Errno> = std::result::Result<T, E>;

const DISK: usize = 1 << 20;
const MEMORY: u64 = 1 << 20;
const GUEST: u64 = 0x4000_0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x3000;
const SIZE: u16 = 64;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// A disk in memory that can be told to fail.
#[derive(Default)]
struct Ram {
    bytes: Mutex<Vec<u8>>,
    length: AtomicU64,
    flushes: AtomicU32,
    discards: Mutex<Vec<ByteRange>>,
    /// The errno of every request, 0 for none.
    fault: AtomicU32,
}

impl Ram {
    fn finish(&self) -> IoFuture<'static> {
        match self.fault.load(Ordering::Relaxed) {
            0 => IoFuture::done(),
            errno => IoFuture::error(Errno::from_raw(errno as i32)),
        }
    }
}

struct RamDriver(Arc<Ram>);

impl Driver for RamDriver {
    fn driver_name(&self) -> &'static str {
        "ram"
    }
    fn length(&self) -> u64 {
        self.0.length.load(Ordering::Relaxed)
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn grows(&self) -> bool {
        false
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        let at = offset as usize;
        buffer.copy_from_slice(&self.0.bytes.lock().unwrap()[at..at + buffer.len()]);
        self.0.finish()
    }
    fn write(&self, offset: u64, buffer: Buffer, _flags: WriteFlags) -> IoFuture<'_> {
        let at = offset as usize;
        buffer.copy_to_slice(&mut self.0.bytes.lock().unwrap()[at..at + buffer.len()]);
        self.0.finish()
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        let (at, len) = (range.offset as usize, range.length as usize);
        let fill = u8::from(flags.may_unmap);
        self.0.bytes.lock().unwrap()[at..at + len].fill(fill);
        self.0.finish()
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        self.0.discards.lock().unwrap().push(range);
        self.0.finish()
    }
    fn flush(&self) -> IoFuture<'_> {
        self.0.flushes.fetch_add(1, Ordering::Relaxed);
        // Not done at once, so that the request becomes a task.
        IoFuture::boxed(async move {
            executor::spawn(async {}).await;
            self.0.finish().await
        })
    }
    fn block_status(&self, _range: ByteRange) -> BoxFuture<'_, Result<StatusExtent>> {
        Box::pin(async { Err(Errno::EOPNOTSUPP) })
    }
    fn resize(&self, resize: Resize) -> BoxFuture<'_, block::error::Result<()>> {
        self.0.length.store(resize.length, Ordering::Relaxed);
        Box::pin(async { Ok(()) })
    }
    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        Vec::new()
    }
    fn describe(&self) -> serde_json::Map<String, serde_json::Value> {
        serde_json::Map::new()
    }
    fn filename(&self) -> String {
        String::new()
    }
    fn identity(&self) -> Option<block::ImageIdentity> {
        None
    }
}

fn eventfd() -> OwnedFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap().into()
}

/// One queue of a disk, driven by hand.
struct Fixture {
    executor: Executor,
    ram: Arc<Ram>,
    node: Arc<Node>,
    disk: Rc<Disk>,
    memory: OwnedFd,
    kick: Arc<OwnedFd>,
    call: Arc<OwnedFd>,
    avail: u16,
}

/// What came back: status byte, used length and the writable bytes before the status.
type Outcome = (u8, u32, Vec<u8>);

impl Fixture {
    fn new(change: impl FnOnce(&mut VhostUserBlkOptions)) -> Fixture {
        let executor = Executor::new(&executor::Config::default()).unwrap();
        let ram = Arc::new(Ram::default());
        *ram.bytes.lock().unwrap() = (0..DISK).map(|at| (at / 512) as u8).collect();
        ram.length.store(DISK as u64, Ordering::Relaxed);
        let node_options = NodeOptions {
            discard: block::node::Discard::Unmap,
            ..NodeOptions::default()
        };
        let node = Node::new(node_options, Box::new(RamDriver(ram.clone())));
        let mut options = VhostUserBlkOptions::new("disk", Address::Connect("none".into()));
        options.writable = true;
        options.serial = "serial-7".to_owned();
        options.iothreads.push(executor.handle());
        change(&mut options);
        options.check().unwrap();
        let root = take_root(&node, &options).unwrap();
        let disk = Rc::new(Disk::new(root, &options));
        disk.set_features(disk.features());
        let flags = nix::sys::memfd::MFdFlags::empty();
        let memory = nix::sys::memfd::memfd_create(c"guest", flags).unwrap();
        nix::unistd::ftruncate(&memory, MEMORY as i64).unwrap();
        let (kick, call) = (Arc::new(eventfd()), Arc::new(eventfd()));
        let mut fixture = Fixture {
            executor,
            ram,
            node,
            disk,
            memory,
            kick,
            call,
            avail: 0,
        };
        fixture.start();
        fixture
    }

    fn start(&mut self) {
        let spec = RegionSpec {
            guest_addr: GUEST,
            size: MEMORY,
            user_addr: GUEST,
            mmap_offset: 0,
        };
        let table = MemoryTable::default()
            .with(&spec, self.memory.try_clone().unwrap())
            .unwrap();
        let setup = QueueSetup {
            device: "disk".into(),
            index: 0,
            size: SIZE,
            base: 0,
            addresses: RingAddresses {
                descriptors: GUEST,
                available: GUEST + AVAILABLE,
                used: GUEST + USED,
            },
            features: 0,
            memory: Arc::new(table),
            kick: Some(self.kick.clone()),
            call: Some(self.call.clone()),
            err: None,
            inflight: None,
            log: None,
            failure: Arc::default(),
            state: vhost_daemon::RingState::Sound,
            enabled: true,
        };
        let started = self.executor.block_on(self.disk.start_queue(setup));
        started.unwrap();
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        assert_eq!(pwrite(&self.memory, bytes, at as i64).unwrap(), bytes.len());
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(pread(&self.memory, &mut bytes, at as i64).unwrap(), len);
        bytes
    }

    fn used_idx(&self) -> u16 {
        u16::from_le_bytes(self.read(USED + 2, 2).try_into().unwrap())
    }

    /// Puts `pieces` (length, writable) into descriptors from 0 on, back to back in memory.
    fn describe(&self, pieces: &[(u32, bool)]) {
        let mut addr = GUEST + BUFFERS;
        for (index, (len, writable)) in pieces.iter().enumerate() {
            let last = index + 1 == pieces.len();
            let flags = u16::from(!last) | u16::from(*writable) << 1;
            let mut descriptor = addr.to_le_bytes().to_vec();
            descriptor.extend(len.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend((index as u16 + 1).to_le_bytes());
            self.write(16 * index as u64, &descriptor);
            addr += u64::from(*len);
        }
    }

    /// Makes descriptor 0 available and waits until it is used; the used length.
    fn submit(&mut self) -> u32 {
        let slot = 4 + 2 * u64::from(self.avail % SIZE);
        self.write(AVAILABLE + slot, &[0, 0]);
        let element = USED + 8 + 8 * u64::from(self.avail % SIZE);
        self.avail += 1;
        self.write(AVAILABLE + 2, &self.avail.to_le_bytes());
        nix::unistd::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
        while self.used_idx() != self.avail {
            let called = executor::net::poll_fd(self.call.as_fd(), 1);
            self.executor.block_on(called).unwrap();
            let _ = nix::unistd::read(&self.call, &mut [0; 8]);
        }
        u32::from_le_bytes(self.read(element, 4).try_into().unwrap())
    }

    fn request(&mut self, kind: u32, sector: u64, out: &[u8], room: u32) -> Outcome {
        let mut header = u64::from(kind).to_le_bytes().to_vec();
        header.extend(sector.to_le_bytes());
        header.extend(out);
        self.write(BUFFERS, &header);
        let readable = header.len() as u32;
        let back = BUFFERS + u64::from(readable);
        self.write(back, &vec![0xee; room as usize + 1]);
        let mut pieces = vec![(16, false)];
        pieces.extend((!out.is_empty()).then_some((out.len() as u32, false)));
        pieces.extend((room > 0).then_some((room, true)));
        pieces.push((1, true));
        self.describe(&pieces);
        let written = self.submit();
        let mut data = self.read(back, room as usize + 1);
        let status = data.pop().unwrap();
        (status, written, data)
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> (u8, u32) {
        let mut out = Vec::new();
        for (sector, sectors, flags) in ranges {
            out.extend(sector.to_le_bytes());
            out.extend(sectors.to_le_bytes());
            out.extend(flags.to_le_bytes());
        }
        let (status, written, _) = self.request(kind, 0, &out, 0);
        (status, written)
    }

    fn flushes(&self) -> u32 {
        self.ram.flushes.load(Ordering::Relaxed)
    }

    fn stop(self) -> u32 {
        self.executor.block_on(self.disk.stop_queue(0))
    }
}

#[test]
fn reads_and_writes_move_data_and_report_exact_lengths() {
    let mut fixture = Fixture::new(|_| {});
    let (status, written, data) = fixture.request(IN, 3, &[], 1024);
    assert_eq!((status, written), (OK, 1025));
    assert_eq!(data, [[3; 512], [4; 512]].concat());
    assert_eq!(fixture.request(OUT, 3, &[9; 512], 0), (OK, 1, vec![]));
    assert_eq!(fixture.request(IN, 3, &[], 512), (OK, 513, vec![9; 512]));
    assert_eq!(fixture.request(FLUSH, 0, &[], 0), (OK, 1, vec![]));
    assert_eq!(fixture.flushes(), 1);
    assert_eq!(fixture.stop(), 4);
}

#[test]
fn any_framing_of_header_data_and_status_is_understood() {
    let mut fixture = Fixture::new(|_| {});
    // The header in two pieces, the data in three, the status with the last of them.
    let framing = [
        (5, false),
        (11, false),
        (100, true),
        (400, true),
        (13, true),
    ];
    fixture.describe(&framing);
    fixture.write(BUFFERS, &[0; 16]);
    fixture.write(BUFFERS + 8, &7u64.to_le_bytes());
    fixture.write(BUFFERS + 16 + 512, &[0xee]);
    assert_eq!(fixture.submit(), 513);
    assert_eq!(fixture.read(BUFFERS + 16, 512), [7; 512]);
    assert_eq!(fixture.read(BUFFERS + 16 + 512, 1), [OK]);
    fixture.stop();
}

#[test]
fn requests_off_the_disk_or_off_its_blocks_are_errors() {
    let mut fixture = Fixture::new(|options| options.logical_block_size = 4096);
    let last = DISK as u64 / 512;
    for (sector, len) in [
        (last, 4096),
        (last - 4, 4096),
        (u64::MAX, 4096),
        (1 << 55, 4096),
    ] {
        assert_eq!(fixture.request(IN, sector, &[], len).0, IOERR, "{sector}");
        let data = vec![1; len as usize];
        assert_eq!(fixture.request(OUT, sector, &data, 0).0, IOERR, "{sector}");
    }
    for (sector, len) in [(0, 512), (1, 4096), (0, 4095), (8, 1)] {
        let (status, written, data) = fixture.request(IN, sector, &[], len);
        assert_eq!((status, written), (IOERR, 1), "{sector} {len}");
        assert_eq!(data, vec![0xee; len as usize], "nothing is written");
    }
    assert_eq!(fixture.request(IN, last - 8, &[], 4096).0, OK);
    fixture.stop();
}

#[test]
fn unknown_requests_are_unsupported_and_short_ones_errors() {
    let mut fixture = Fixture::new(|_| {});
    for kind in [2, 5, 9, 14, 77, u32::MAX] {
        assert_eq!(fixture.request(kind, 0, &[], 0).0, UNSUPP, "{kind}");
    }
    fixture.describe(&[(8, false), (1, true)]);
    fixture.write(BUFFERS, &[0xee; 9]);
    assert_eq!(fixture.submit(), 1);
    assert_eq!(fixture.read(BUFFERS + 8, 1), [IOERR]);
    fixture.stop();
}

#[test]
fn the_serial_is_padded_with_zeroes() {
    let mut fixture = Fixture::new(|_| {});
    let (status, written, data) = fixture.request(GET_ID, 0, &[], 20);
    assert_eq!((status, written), (OK, 21));
    assert_eq!(data, b"serial-7\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(
        fixture.request(GET_ID, 0, &[], 4),
        (OK, 5, b"seri".to_vec())
    );
    fixture.stop();
}

#[test]
fn read_only_disks_refuse_changes_and_say_so() {
    let mut fixture = Fixture::new(|options| options.writable = false);
    assert_ne!(fixture.disk.features() & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    assert_eq!(fixture.request(OUT, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(fixture.ranges(DISCARD, &[(0, 1, 0)]).0, IOERR);
    assert_eq!(fixture.ranges(WRITE_ZEROES, &[(0, 1, 0)]).0, IOERR);
    assert_eq!(fixture.request(IN, 0, &[], 512).0, OK);
    assert_eq!(fixture.request(FLUSH, 0, &[], 0).0, OK);
    fixture.stop();
}

#[test]
fn ranges_are_discarded_and_zeroed_with_their_flags_checked() {
    let mut fixture = Fixture::new(|_| {});
    assert_eq!(fixture.ranges(DISCARD, &[(2, 3, 0), (8, 1, 0)]), (OK, 1));
    let discards = fixture.ram.discards.lock().unwrap().clone();
    assert_eq!(
        discards,
        [ByteRange::new(1024, 1536), ByteRange::new(4096, 512)]
    );
    assert_eq!(fixture.ranges(DISCARD, &[(2, 3, 1)]).0, UNSUPP);
    assert_eq!(fixture.ranges(WRITE_ZEROES, &[(4, 1, 0), (5, 1, 1)]).0, OK);
    assert_eq!(fixture.request(IN, 4, &[], 512).2, [0; 512]);
    assert_eq!(fixture.request(IN, 5, &[], 512).2, [1; 512], "may unmap");
    assert_eq!(fixture.ranges(WRITE_ZEROES, &[(4, 1, 2)]).0, UNSUPP);
    assert_eq!(fixture.ranges(WRITE_ZEROES, &[(4, u32::MAX, 0)]).0, IOERR);
    assert_eq!(fixture.ranges(WRITE_ZEROES, &[(2047, 2, 0)]).0, IOERR);
    assert_eq!(fixture.ranges(WRITE_ZEROES, &[(0, 1, 0); 33]).0, UNSUPP);
    assert_eq!(fixture.request(DISCARD, 0, &[0; 15], 0).0, IOERR);
    assert_eq!(fixture.request(DISCARD, 0, &[], 0).0, IOERR);
    fixture.stop();
}

#[test]
fn errors_of_the_node_become_status_bytes() {
    let mut fixture = Fixture::new(|_| {});
    for (errno, status) in [
        (Errno::EIO, IOERR),
        (Errno::ENOSPC, IOERR),
        (Errno::EOPNOTSUPP, UNSUPP),
    ] {
        fixture.ram.fault.store(errno as u32, Ordering::Relaxed);
        let (found, written, _) = fixture.request(IN, 0, &[], 512);
        assert_eq!((found, written), (status, 1), "{errno}");
        assert_eq!(fixture.request(OUT, 0, &[1; 512], 0).0, status, "{errno}");
    }
    let eio = Errno::EIO as u32;
    fixture.ram.fault.store(eio, Ordering::Relaxed);
    assert_eq!(fixture.request(FLUSH, 0, &[], 0).0, IOERR);
    fixture.stop();
}

#[test]
fn writes_are_stable_at_once_with_the_write_cache_off() {
    let mut fixture = Fixture::new(|_| {});
    fixture.request(OUT, 0, &[1; 512], 0);
    assert_eq!(fixture.flushes(), 0);
    fixture.disk.write_config(32, &[0]).unwrap();
    assert_eq!(fixture.disk.config()[32], 0);
    fixture.request(OUT, 0, &[1; 512], 0);
    fixture.ranges(WRITE_ZEROES, &[(4, 1, 0)]);
    assert_eq!(fixture.flushes(), 2);
    fixture.disk.write_config(32, &[1]).unwrap();
    fixture.request(OUT, 0, &[1; 512], 0);
    assert_eq!(fixture.flushes(), 2);
    // A driver that can neither flush nor switch the cache gets stable writes.
    fixture.disk.set_features(1 << 32);
    fixture.request(OUT, 0, &[1; 512], 0);
    assert_eq!(fixture.flushes(), 3);
    fixture.stop();
}

#[test]
fn only_the_write_cache_can_be_configured() {
    let fixture = Fixture::new(|_| {});
    let disk = &fixture.disk;
    for (offset, data) in [
        (0, &[1u8][..]),
        (32, &[2]),
        (32, &[1, 0]),
        (31, &[0]),
        (u32::MAX, &[0]),
    ] {
        assert!(
            disk.write_config(offset, data).is_err(),
            "{offset} {data:?}"
        );
    }
    fixture.stop();
}

#[test]
fn the_configuration_follows_the_node() {
    let fixture = Fixture::new(|options| {
        options.num_queues = 4;
        options.logical_block_size = 4096;
    });
    let config = fixture.disk.config();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config[..8], (DISK as u64 / 512).to_le_bytes());
    assert_eq!((word(12), word(20)), (126, 4096));
    assert_eq!((config[32], config[34]), (1, 4));
    assert_ne!(fixture.disk.features() & 1 << 12, 0, "VIRTIO_BLK_F_MQ");
    // SeaBIOS counts the blocks of the largest request in 16 bits.
    assert!(u64::from(word(8)) * u64::from(word(12)) / 512 < 65536);
    let resize = Resize {
        length: 2 * DISK as u64 + 100,
        preallocation: block::Preallocation::Off,
    };
    fixture
        .executor
        .block_on(fixture.node.resize(resize))
        .unwrap();
    let config = fixture.disk.config();
    assert_eq!(config[..8], (2 * DISK as u64 / 512).to_le_bytes());
    fixture.stop();
}

#[test]
fn a_request_without_room_for_a_status_breaks_the_queue_only() {
    let mut fixture = Fixture::new(|_| {});
    fixture.describe(&[(16, false)]);
    assert_eq!(fixture.submit(), 0);
    assert_eq!(fixture.stop(), 1);
}

#[test]
fn options_out_of_range_are_refused() {
    let refused = |change: fn(&mut VhostUserBlkOptions)| {
        let mut options = VhostUserBlkOptions::new("disk", Address::Connect("none".into()));
        change(&mut options);
        options.check().is_err()
    };
    assert!(!refused(|_| {}));
    assert!(refused(|options| options.num_queues = 0));
    assert!(refused(|options| options.num_queues = 257));
    assert!(refused(|options| options.logical_block_size = 256));
    assert!(refused(|options| options.logical_block_size = 3000));
    assert!(refused(|options| options.logical_block_size = 4 << 20));
    assert!(refused(|options| options.queue_size_max = 100));
    assert!(refused(|options| options.serial = "x".repeat(21)));
}
