//! `vublk-bench`: a load generator for vhost-user-blk back-ends, without a VM.
//!
//! Busy-polls by default, so that it measures the back-end and not the wake-up of its own threads.
//! It checks status bytes only; data is verified by the harness's scenarios.

mod accounting;
mod clock;
mod histogram;
mod load;
mod queue;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use harness::driver::features::bits;
use harness::driver::{Endpoint, FrontEnd, Options, Start};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::json;

use crate::accounting::Usage;
use crate::histogram::Histogram;
use crate::load::{Control, Extent, Job, Lane, Pattern, Wait, drive};
use crate::queue::{FastQueue, Shape};

/// How often the main thread looks whether the others are done.
const WATCH: Duration = Duration::from_millis(5);

/// Load generator for vhost-user-blk back-ends, without a VM.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Socket of the back-end
    #[arg(long)]
    socket: PathBuf,
    /// randread, randwrite, read, write, randrw, flush-mix, flush, [rand-]write-zeroes, [rand-]discard
    #[arg(long, default_value = "randread")]
    rw: Pattern,
    /// Request size (suffixes k, M, G, T)
    #[arg(long, default_value = "4k", value_parser = parse_size)]
    bs: u64,
    /// Requests in flight per queue
    #[arg(long, default_value_t = 1)]
    iodepth: usize,
    /// Virtqueues
    #[arg(long, default_value_t = 1)]
    queues: usize,
    /// Front-end threads; 0 = one per queue
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Time measured, in seconds
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Time before that which is not measured, in seconds
    #[arg(long, default_value_t = 0.3)]
    ramp: f64,
    /// Stop after that many requests per queue instead
    #[arg(long, default_value_t = 0)]
    ops: u64,
    /// First byte used
    #[arg(long, default_value = "0", value_parser = parse_size)]
    offset: u64,
    /// Bytes used; 0 = all
    #[arg(long, default_value = "0", value_parser = parse_size)]
    size_limit: u64,
    /// With --stride-len: use only the beginning of every stride
    #[arg(long, default_value = "0", value_parser = parse_size)]
    stride: u64,
    /// Bytes used of every stride
    #[arg(long, default_value = "64k", value_parser = parse_size)]
    stride_len: u64,
    /// Reads in randrw, in per cent
    #[arg(long, default_value_t = 70)]
    rwmix: u32,
    /// Writes between two flushes in flush-mix
    #[arg(long, default_value_t = 32)]
    flush_every: u64,
    /// How completions are awaited
    #[arg(long, value_enum, default_value = "poll")]
    wait: Wait,
    /// CPUs of the threads, comma separated
    #[arg(long, value_delimiter = ',')]
    pin: Vec<usize>,
    /// Resubmit only when that many slots are free
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Do without VIRTIO_F_EVENT_IDX
    #[arg(long)]
    no_event_idx: bool,
    /// Use indirect descriptors
    #[arg(long)]
    indirect: bool,
    /// Use packed rings; fails when the back-end has none
    #[arg(long)]
    packed: bool,
    /// Bytes per data descriptor; 0 = one descriptor
    #[arg(long, default_value = "0", value_parser = parse_size)]
    seg_size: u64,
    /// Entries per ring; 0 = as many as needed
    #[arg(long, default_value_t = 0)]
    queue_size: u16,
    /// Process whose CPU time is reported
    #[arg(long)]
    backend_pid: Option<u32>,
    /// How long to wait for the socket, in milliseconds
    #[arg(long, default_value_t = 3000)]
    connect_ms: u64,
    /// Seed of the random places
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Print features and configuration, and leave
    #[arg(long)]
    probe: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("vublk-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The number of failed requests.
fn run(arguments: &Arguments) -> Result<u64> {
    ensure!(
        arguments.bs > 0 && arguments.bs.is_multiple_of(512),
        "--bs must be full sectors"
    );
    ensure!(
        arguments.iodepth > 0 && arguments.queues > 0,
        "--iodepth and --queues must not be 0"
    );
    let shape = shape_of(arguments);
    let endpoint = Endpoint::Connect(arguments.socket.clone());
    let start = if arguments.probe {
        Start::Later
    } else {
        Start::Now
    };
    let (front_end, _) = FrontEnd::connect_with(endpoint, options_of(arguments, shape), start)?;
    if arguments.probe {
        println!(
            "features {:#x} protocol {:#x}",
            front_end.offered(),
            front_end.protocol()
        );
        println!("queues {} {:?}", front_end.max_queues(), front_end.config());
        return Ok(0);
    }
    ensure!(
        !arguments.packed || front_end.features() & bits::RING_PACKED != 0,
        "the back-end has no packed rings"
    );
    let job = job_of(arguments, front_end.config().capacity * 512)?;
    let lanes = (0..arguments.queues)
        .map(|index| {
            let queue = FastQueue::new(&front_end, index, shape)?;
            Ok(Lane::new(
                queue,
                &job,
                (index as u64, arguments.queues as u64),
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    let outcome = measure(arguments, &job, lanes)?;
    report(arguments, &job, &outcome);
    Ok(outcome.lanes.iter().map(|lane| lane.errors).sum())
}

fn shape_of(arguments: &Arguments) -> Shape {
    let block_bytes = arguments.bs as usize;
    let segment_bytes = match arguments.seg_size as usize {
        0 => block_bytes,
        bytes => bytes.min(block_bytes),
    };
    Shape {
        depth: arguments.iodepth,
        block_bytes,
        segment_bytes,
    }
}

fn options_of(arguments: &Arguments, shape: Shape) -> Options {
    let mut options = Options {
        queues: arguments.queues,
        depth: shape.depth,
        max_request_bytes: shape.block_bytes + 4096,
        max_segments: shape.segments() + 8,
        data_regions: 1,
        timeout: Duration::from_millis(arguments.connect_ms.max(1)),
        ..Options::default()
    };
    if arguments.no_event_idx {
        options = options.without_features(bits::RING_EVENT_IDX);
    }
    if !arguments.indirect {
        options = options.without_features(bits::RING_INDIRECT_DESC);
    }
    if arguments.packed {
        options = options.packed();
    }
    let heads = if arguments.indirect {
        shape.depth
    } else {
        shape.depth * shape.chain()
    };
    options.queue_size = match arguments.queue_size {
        0 => heads.next_power_of_two().clamp(128, 32768) as u16,
        entries => entries,
    };
    options
}

fn job_of(arguments: &Arguments, capacity: u64) -> Result<Job> {
    let rest = capacity.saturating_sub(arguments.offset);
    let bytes = if arguments.size_limit == 0 {
        rest
    } else {
        arguments.size_limit.min(rest)
    };
    let blocks = match bytes.checked_div(arguments.stride) {
        Some(strides) => strides * (arguments.stride_len / arguments.bs),
        None => bytes / arguments.bs,
    };
    ensure!(blocks >= arguments.queues as u64, "the disk is too small");
    Ok(Job {
        pattern: arguments.rw,
        extent: Extent {
            offset: arguments.offset,
            blocks,
            block_bytes: arguments.bs,
            stride: arguments.stride,
            stride_len: arguments.stride_len,
        },
        wait: arguments.wait,
        ops: arguments.ops,
        batch: arguments.batch,
        depth: arguments.iodepth,
        read_percent: arguments.rwmix,
        flush_every: arguments.flush_every,
        seed: arguments.seed,
        ticks_per_ns: clock::ticks_per_ns(),
    })
}

struct Outcome {
    lanes: Vec<Lane>,
    elapsed: Duration,
    before: Usage,
    after: Usage,
}

fn measure(arguments: &Arguments, job: &Job, lanes: Vec<Lane>) -> Result<Outcome> {
    let threads = match arguments.threads {
        0 => lanes.len(),
        count => count.min(lanes.len()),
    };
    let mut groups: Vec<Vec<Lane>> = (0..threads).map(|_| Vec::new()).collect();
    for (index, lane) in lanes.into_iter().enumerate() {
        groups[index % threads].push(lane);
    }
    let control = Control::default();
    let usage = || arguments.backend_pid.map(Usage::of).unwrap_or_default();
    std::thread::scope(|scope| {
        let control = &control;
        let workers: Vec<ScopedJoinHandle<'_, Result<Vec<Lane>>>> = groups
            .into_iter()
            .enumerate()
            .map(|(index, mut group)| {
                scope.spawn(move || {
                    if !arguments.pin.is_empty() {
                        pin(arguments.pin[index % arguments.pin.len()])?;
                    }
                    drive(job, &mut group, control);
                    Ok(group)
                })
            })
            .collect();
        let timed = job.ops == 0;
        let pass = |seconds: f64| {
            let end = Instant::now() + Duration::from_secs_f64(seconds);
            while Instant::now() < end && control.finished.load(Ordering::Relaxed) < threads {
                std::thread::park_timeout(WATCH.min(end - Instant::now()));
            }
        };
        if timed {
            pass(arguments.ramp);
        }
        let (before, start) = (usage(), Instant::now());
        control.counting.store(true, Ordering::Relaxed);
        pass(if timed {
            arguments.seconds
        } else {
            f64::from(u32::MAX)
        });
        let (elapsed, after) = (start.elapsed(), usage());
        control.counting.store(false, Ordering::Relaxed);
        control.stop.store(true, Ordering::Relaxed);
        let mut lanes = Vec::new();
        for worker in workers {
            lanes.extend(worker.join().expect("a worker returns its errors")?);
        }
        Ok(Outcome {
            lanes,
            elapsed,
            before,
            after,
        })
    })
}

fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("pinning to CPU {cpu}"))
}

fn report(arguments: &Arguments, job: &Job, outcome: &Outcome) {
    let mut latencies = Histogram::default();
    outcome
        .lanes
        .iter()
        .for_each(|lane| latencies.merge(&lane.latencies));
    let sum = |value: fn(&Lane) -> u64| outcome.lanes.iter().map(value).sum::<u64>();
    let (completed, errors, issued) = (
        sum(|lane| lane.completed),
        sum(|lane| lane.errors),
        sum(Lane::issued),
    );
    let (kicks, interrupts) = (
        sum(|lane| lane.notifications().0),
        sum(|lane| lane.notifications().1),
    );
    let seconds = outcome.elapsed.as_secs_f64();
    let iops = completed as f64 / seconds;
    let mib_s = iops * arguments.bs as f64 / f64::from(1 << 20);
    let us = |ticks: u64| ticks as f64 / job.ticks_per_ns / 1000.0;
    let [p50, p99, p999] = [50.0, 99.0, 99.9].map(|percent| us(latencies.percentile(percent)));
    let cpu_ns = outcome.after.cpu_ns.saturating_sub(outcome.before.cpu_ns);
    let cpu_per_request = cpu_ns as f64 / completed.max(1) as f64;
    if arguments.json {
        let result = json!({
            "iops": iops, "mibs": mib_s, "seconds": seconds, "ios": completed, "issued": issued,
            "lat_p50_us": p50, "lat_p99_us": p99, "lat_p999_us": p999,
            "lat_max_us": us(latencies.max()), "errors": errors,
            "kicks": kicks, "interrupts": interrupts,
            "be_ns_per_io": cpu_per_request, "be_cpu_s": cpu_ns as f64 / 1e9,
            "be_sleeps": outcome.after.sleeps.saturating_sub(outcome.before.sleeps),
            "be_rss_kib": outcome.after.resident_kib,
            "be_anon_kib": outcome.after.anonymous_kib, "be_threads": outcome.after.threads,
        });
        println!("{result}");
    } else {
        println!(
            "{iops:.0} IOPS {mib_s:.1} MiB/s, latency us p50 {p50:.2} p99 {p99:.2} p99.9 {p999:.2}, \
             back-end {cpu_per_request:.0} ns/request, kicks/request {:.3}, interrupts/request \
             {:.3}, errors {errors}",
            kicks as f64 / issued.max(1) as f64,
            interrupts as f64 / issued.max(1) as f64
        );
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last().map(|last| last.to_ascii_lowercase()) {
        Some('k') => (&text[..text.len() - 1], 10),
        Some('m') => (&text[..text.len() - 1], 20),
        Some('g') => (&text[..text.len() - 1], 30),
        Some('t') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|error| format!("size {text:?}: {error}"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("size {text:?} is too large"))
}
