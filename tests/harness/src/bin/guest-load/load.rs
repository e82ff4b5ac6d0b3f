//! Writers in threads, and what they measured.
//!
//! ```text
//! start -> (mark)* -> stop -> verify
//! ```

use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};

/// One writer and what it remembers of its own writes. A connection's counterpart at the other end counts as a disk does.
pub(crate) trait Worker: Send {
    /// Writes something and syncs it; the bytes that are now promised.
    fn step(&mut self) -> Result<u64>;

    /// Makes the next reads come from the disk; called once per load, on the first worker.
    fn forget_caches(&mut self) -> Result<()>;

    /// Reads back everything that was promised, or has it confirmed; its length in bytes.
    fn verify(&mut self) -> Result<u64>;
}

#[derive(Default)]
struct Counts {
    stop: bool,
    syncs: u64,
    bytes: u64,
    longest_pause: Duration,
    /// Writers that ended; before `stop` each of them has failed.
    ended: usize,
}

#[derive(Default)]
struct Shared {
    counts: Mutex<Counts>,
    changed: Condvar,
}

impl Shared {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A load that runs, or has run.
pub(crate) struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<Box<dyn Worker>>>>,
    stopped: Vec<Box<dyn Worker>>,
}

impl Load {
    pub(crate) fn start(workers: Vec<Box<dyn Worker>>) -> Self {
        let shared = Arc::new(Shared::default());
        let threads = workers
            .into_iter()
            .enumerate()
            .map(|(index, worker)| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    let end = write_until_stopped(index, worker, &shared);
                    shared.counts().ended += 1;
                    shared.changed.notify_all();
                    end
                })
            })
            .collect();
        Self {
            shared,
            threads,
            stopped: Vec::new(),
        }
    }

    /// The counts so far, and the longest pause since the last call.
    pub(crate) fn mark(&self, event: &str) -> Value {
        let mut counts = self.shared.counts();
        let pause = mem::take(&mut counts.longest_pause);
        json!({
            "event": event,
            "syncs": counts.syncs,
            "bytes": counts.bytes,
            "longest_pause_ms": (pause.as_secs_f64() * 10_000.0).round() / 10.0,
        })
    }

    /// Waits for that many more syncs, then as [`Load::mark`].
    pub(crate) fn wait_for(&mut self, syncs: u64) -> Result<Value> {
        let counts = self.shared.counts();
        let goal = counts.syncs + syncs;
        let waiting = |counts: &mut Counts| counts.syncs < goal && counts.ended == 0;
        let counts = self.shared.changed.wait_while(counts, waiting);
        let failed = counts.unwrap_or_else(PoisonError::into_inner).ended > 0;
        if failed {
            self.stop()
        } else {
            Ok(self.mark("mark"))
        }
    }

    pub(crate) fn stop(&mut self) -> Result<Value> {
        self.shared.counts().stop = true;
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
    shared: &Shared,
) -> Result<Box<dyn Worker>> {
    pin_to_cpu(index)?;
    let mut last = Instant::now();
    loop {
        let bytes = worker.step()?;
        let now = Instant::now();
        let mut counts = shared.counts();
        counts.bytes += bytes;
        counts.syncs += 1;
        counts.longest_pause = counts
            .longest_pause
            .max(now.saturating_duration_since(last));
        last = now;
        if counts.stop {
            return Ok(worker);
        }
        drop(counts);
        shared.changed.notify_all();
    }
}

/// The kernel gives each CPU its own queue of the disk: writers on different CPUs use different queues.
fn pin_to_cpu(index: usize) -> Result<()> {
    let count = thread::available_parallelism()?.get();
    let mut set = nix::sched::CpuSet::new();
    set.set(index % count)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).context("pin a writer")
}
