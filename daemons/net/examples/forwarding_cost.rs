//! What the switch costs per frame, rings left out: `cargo run --release -p netd --example forwarding_cost`.
//!
//! Ports send bursts of 32 frames to receivers that copy them into a small buffer. Each line is the median of several runs.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Instant;

use executor::{Config, Executor};
use netd::frame::{Frame, MacAddress, VnetHeader};
use netd::guard::{Guard, GuardOptions};
use netd::link::{BURST, Delivery, LocalFuture, NetQueue, Offloads, Sink};
use netd::netdev::{Attachment, Netdev, VlanMode};
use netd::netdevs::Context;
use netd::netdevs::switch::{Switch, SwitchOptions};
use netd::offload::{self, Scratch};

/// Runs of each case.
const RUNS: usize = 9;
/// Bursts of each run.
const BURSTS: usize = 20_000;

/// A receiver that copies what it is given, as a ring does.
#[derive(Default)]
struct Copying {
    buffer: RefCell<Vec<u8>>,
    frames: Cell<usize>,
}

impl Sink for Copying {
    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn ready(&self) -> bool {
        true
    }

    fn until_ready(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }

    fn deliver(&self, frame: &Frame<'_>) -> Delivery {
        let mut buffer = self.buffer.borrow_mut();
        buffer.clear();
        frame.append_to(&mut buffer, frame.len());
        self.frames.set(self.frames.get() + 1);
        Delivery::Taken
    }

    fn reserve(&self, _len: usize, _buffers: &mut Vec<libc::iovec>) -> usize {
        0
    }

    fn commit(&self, written: usize) -> Delivery {
        assert_eq!(written, 0, "nothing was reserved");
        Delivery::Taken
    }

    fn flush(&self) {}
}

fn mac(station: u32) -> MacAddress {
    let [a, b, c, d] = station.to_be_bytes();
    MacAddress([2, 0, a, b, c, d])
}

/// Nanoseconds per frame: the median of several runs of `burst`, which handles [`BURST`] frames.
fn measure(name: &str, mut burst: impl FnMut()) {
    let mut costs: Vec<f64> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            (0..BURSTS).for_each(|_| burst());
            start.elapsed().as_nanos() as f64 / (BURSTS * BURST) as f64
        })
        .collect();
    costs.sort_by(f64::total_cmp);
    println!("{name:<44} {:>7.1} ns per frame", costs[RUNS / 2]);
}

struct Case {
    switch: Switch,
    queues: Vec<Rc<dyn NetQueue>>,
    sinks: Vec<Rc<Copying>>,
}

impl Case {
    /// A switch on the current executor with a port of each mode.
    fn new(modes: &[VlanMode]) -> Case {
        let context = Context {
            id: "s0",
            descriptor: &|name| anyhow::bail!("no descriptor '{name}'"),
            thread: &|_| Ok(executor::Handle::current()),
            netdev: &|name| anyhow::bail!("no netdev '{name}'"),
            notice: Rc::new(|_| ()),
        };
        let options = SwitchOptions {
            port_limit: 4096,
            ..SwitchOptions::default()
        };
        let switch = Switch::open(&options, &context).expect("sound options");
        let mut case = Case {
            switch,
            queues: Vec::new(),
            sinks: Vec::new(),
        };
        for (station, vlan) in modes.iter().enumerate() {
            let attachment = Attachment {
                port: format!("p{station}"),
                mac: mac(station as u32),
                queues: 1,
                vlan: vlan.clone(),
                isolated: false,
            };
            let make = case.switch.attach(&attachment, 0).expect("a queue");
            let queue = make().expect("a queue");
            let sink = Rc::new(Copying::default());
            queue.connect(Rc::clone(&sink) as Rc<dyn Sink>);
            case.queues.push(queue);
            case.sinks.push(sink);
        }
        case
    }

    fn measure(&self, name: &str, frames: &[Vec<u8>]) {
        let frames: Vec<Frame<'_>> = frames
            .iter()
            .map(|bytes| Frame::new(VnetHeader::default(), bytes))
            .collect();
        let mut bursts = frames.chunks_exact(BURST).cycle();
        let got = || {
            self.sinks
                .iter()
                .map(|sink| sink.frames.get())
                .sum::<usize>()
        };
        let before = got();
        measure(name, || {
            let burst = bursts.next().expect("it never ends");
            self.queues[0].transmit(burst, &mut |reason| panic!("lost: {reason:?}"));
            self.queues[0].flush();
        });
        assert!(
            got() - before >= RUNS * BURSTS * BURST,
            "all of them arrived"
        );
    }
}

/// IPv4 and UDP, `len` bytes.
fn udp(from: MacAddress, to: MacAddress, len: usize) -> Vec<u8> {
    let mut bytes = [to.0, from.0].concat();
    bytes.extend([8, 0, 0x45, 0, 0, (len - 14) as u8, 0, 0, 0, 0, 64, 17, 0, 0]);
    bytes.extend([
        10,
        0,
        0,
        1,
        10,
        0,
        0,
        2,
        19,
        136,
        19,
        137,
        0,
        (len - 34) as u8,
        0,
        0,
    ]);
    bytes.resize(len, 0);
    bytes
}

fn main() {
    let executor = Executor::new(&Config::default()).expect("an executor");
    executor.block_on(async {
        let copy = Copying::default();
        let one = udp(mac(0), mac(1), 64);
        let frames = vec![one.clone(); BURST];
        measure("the copy alone, 64 bytes", || {
            for bytes in &frames {
                copy.deliver(&Frame::new(VnetHeader::default(), bytes));
            }
        });
        let plain = Case::new(&[VlanMode::Transparent, VlanMode::Transparent]);
        plain.measure("to one port", &frames);
        let many: Vec<_> = (0..1024)
            .map(|i| udp(mac(1000 + i * 7919 % 1024), mac(1), 64))
            .collect();
        plain.measure("to one port, from 1024 stations", &many);
        let flood = vec![udp(mac(0), MacAddress::BROADCAST, 64); BURST];
        plain.measure("to all, one other port", &flood);
        let tagged = Case::new(&[
            VlanMode::Access(10),
            VlanMode::Trunk {
                vlans: vec![],
                native: Some(5),
            },
        ]);
        tagged.measure("to all, tag put in", &flood);
        let wide = Case::new(&vec![VlanMode::Transparent; 32]);
        let spread: Vec<_> = (0..BURST as u32)
            .map(|i| udp(mac(0), mac(1 + i % 31), 64))
            .collect();
        wide.measure("to 31 ports, one frame each", &spread);
        guard(&one);
        segmentation();
    });
}

fn guard(bytes: &[u8]) {
    let options = GuardOptions {
        mac: Some(vec![mac(0)]),
        ipv4: Some(vec!["10.0.0.0/24".parse().expect("a network")]),
        ipv6: Some(vec![]),
        ..GuardOptions::default()
    };
    let guard = Guard::new(options).expect("sound rules");
    let frame = Frame::new(VnetHeader::default(), bytes);
    measure("guard, UDP over IPv4", || {
        for _ in 0..BURST {
            std::hint::black_box(guard.check(std::hint::black_box(&frame))).expect("allowed");
        }
    });
}

fn segmentation() {
    let mut bytes = udp(mac(0), mac(1), 64);
    bytes[23] = 6;
    bytes[46] = 0x50;
    bytes.resize(54 + 64_000, 7);
    let header = VnetHeader {
        flags: offload::NEEDS_CSUM,
        gso_type: offload::GSO_TCPV4,
        gso_size: 1460,
        csum_start: 34,
        csum_offset: 16,
        ..VnetHeader::default()
    };
    let frame = Frame::new(header, &bytes);
    let mut scratch = Scratch::default();
    let start = Instant::now();
    let mut segments = 0;
    for _ in 0..2000 {
        offload::finish(&frame, Offloads::NONE, &mut scratch, &mut |segment| {
            std::hint::black_box(segment.head());
            segments += 1;
        })
        .expect("it is what it says");
    }
    let seconds = start.elapsed().as_secs_f64();
    let gigabytes = 2000.0 * bytes.len() as f64 / 1e9;
    println!(
        "segmentation of 64 KB of TCP: {:.1} GB/s, {:.0} ns per segment",
        gigabytes / seconds,
        seconds * 1e9 / f64::from(segments)
    );
}
