//! Writers in threads, and what they measured.
//!
//! ```text
//! start -> (mark)* -> stop -> verify
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};

/// One writer and what it remembers of its own writes.
pub(crate) trait Worker: Send {
    /// Writes something and syncs it; the bytes that are now promised.
    fn step(&mut self) -> Result<u64>;

    /// Makes the next reads come from the disk; called once per load, on the first worker.
    fn forget_caches(&mut self) -> Result<()>;

    /// Reads back everything that was promised; its length in bytes.
    fn verify(&mut self) -> Result<u64>;
}

/// Bytes of a writer's content, different for every seed; the same seed gives the same bytes.
pub(crate) fn fill(seed: u64, buffer: &mut [u8]) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in buffer.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
}

#[derive(Default)]
struct Counters {
    stop: AtomicBool,
    syncs: AtomicU64,
    bytes: AtomicU64,
    longest_pause_us: AtomicU64,
}

/// A load that runs, or has run.
pub(crate) struct Load {
    counters: Arc<Counters>,
    threads: Vec<JoinHandle<Result<Box<dyn Worker>>>>,
    stopped: Vec<Box<dyn Worker>>,
}

impl Load {
    pub(crate) fn start(workers: Vec<Box<dyn Worker>>) -> Self {
        let counters = Arc::new(Counters::default());
        let threads = workers
            .into_iter()
            .enumerate()
            .map(|(index, worker)| {
                let counters = Arc::clone(&counters);
                thread::spawn(move || write_until_stopped(index, worker, &counters))
            })
            .collect();
        Self {
            counters,
            threads,
            stopped: Vec::new(),
        }
    }

    /// The counts so far, and the longest pause since the last call.
    pub(crate) fn mark(&self, event: &str) -> Value {
        let pause = self.counters.longest_pause_us.swap(0, Ordering::Relaxed);
        json!({
            "event": event,
            "syncs": self.counters.syncs.load(Ordering::Relaxed),
            "bytes": self.counters.bytes.load(Ordering::Relaxed),
            "longest_pause_ms": pause as f64 / 1000.0,
        })
    }

    pub(crate) fn stop(&mut self) -> Result<Value> {
        self.counters.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let worker = thread.join().map_err(|_| anyhow!("a writer panicked"))?;
            self.stopped.push(worker.context("a writer failed")?);
        }
        Ok(self.mark("stopped"))
    }

    pub(crate) fn verify(&mut self) -> Result<Value> {
        ensure!(self.threads.is_empty(), "stop the load before verifying it");
        self.stopped
            .first_mut()
            .context("no writer ran")?
            .forget_caches()?;
        let mut bytes = 0;
        for worker in &mut self.stopped {
            bytes += worker.verify()?;
        }
        Ok(json!({"event": "verified", "bytes": bytes}))
    }
}

fn write_until_stopped(
    index: usize,
    mut worker: Box<dyn Worker>,
    counters: &Counters,
) -> Result<Box<dyn Worker>> {
    pin_to_cpu(index)?;
    let mut last = Instant::now();
    while !counters.stop.load(Ordering::Relaxed) {
        let bytes = worker.step()?;
        let now = Instant::now();
        counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        counters.syncs.fetch_add(1, Ordering::Relaxed);
        let pause = now.saturating_duration_since(last);
        counters
            .longest_pause_us
            .fetch_max(microseconds(pause), Ordering::Relaxed);
        last = now;
    }
    Ok(worker)
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// The kernel gives each CPU its own queue of the disk: writers on different CPUs use different queues.
fn pin_to_cpu(index: usize) -> Result<()> {
    let count = thread::available_parallelism()?.get();
    let mut set = nix::sched::CpuSet::new();
    set.set(index % count)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).context("pin a writer")
}
