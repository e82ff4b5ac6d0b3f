//! One running capture: what queue threads record, and where the writer finds it.
//!
//! ```text
//!   queue thread ── Lane::record ──> batch (bounded) ── swapped by the writer ──> files
//!                        └─ no room, or the writer swaps just now for too long: lost, counted
//! ```
//!
//! Each handle has a lane of its own, so that threads do not meet; a lane's lock is held for the copy of one frame, or for
//! the writer's swap of a few words. Nobody waits for it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{SystemTime, UNIX_EPOCH};

use super::pcapng::Record;
use super::{Direction, Filter};
use crate::frame::Frame;

/// Times that a queue thread looks whether the writer is done with a lane.
const LOOKS: u32 = 200;
/// Bytes that a record itself counts for.
const RECORD_COST: usize = size_of::<Record>();

/// What was recorded and not yet written.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) records: Vec<Record>,
    /// The frames, one behind the other.
    pub(super) bytes: Vec<u8>,
}

impl Batch {
    fn clear(&mut self) {
        self.records.clear();
        self.bytes.clear();
    }
}

/// One handle's way into a session.
#[derive(Debug, Default)]
pub(super) struct Lane {
    batch: Mutex<Batch>,
    lost: AtomicU64,
    /// Frames lost that a record told of.
    told: AtomicU64,
}

/// A running capture.
#[derive(Debug)]
pub(super) struct Session {
    filter: Filter,
    snaplen: u32,
    /// Bytes that a lane holds at most.
    capacity: usize,
    lanes: Mutex<Vec<Arc<Lane>>>,
    writer: OnceLock<Thread>,
    stopping: AtomicBool,
    full: AtomicBool,
    /// No more frames are wanted: stopping, full or failed.
    closed: AtomicBool,
    error: OnceLock<String>,
    /// Frames in files.
    pub(super) written: AtomicU64,
    /// Frames that were recorded and not written.
    pub(super) unwritten: AtomicU64,
}

/// The time in nanoseconds since 1970.
pub(super) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    pub(super) fn new(filter: Filter, snaplen: u32, capacity: usize) -> Session {
        Session {
            filter,
            snaplen,
            capacity,
            lanes: Mutex::default(),
            writer: OnceLock::new(),
            stopping: AtomicBool::new(false),
            full: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            error: OnceLock::new(),
            written: AtomicU64::new(0),
            unwritten: AtomicU64::new(0),
        }
    }

    /// The thread to wake when there is something to write.
    pub(super) fn set_writer(&self, thread: Thread) {
        let _ = self.writer.set(thread);
    }

    fn wake_writer(&self) {
        if let Some(writer) = self.writer.get() {
            writer.unpark();
        }
    }

    pub(super) fn add_lane(&self) -> Arc<Lane> {
        let lane = Arc::new(Lane::default());
        lock(&self.lanes).push(Arc::clone(&lane));
        lane
    }

    /// Records a frame that passes the filter.
    pub(super) fn record(&self, lane: &Lane, direction: Direction, frame: &Frame<'_>) {
        if !self.filter.passes(direction, frame.len()) {
            return;
        }
        let batch = match self.closed.load(Ordering::Relaxed) {
            true => None,
            false => lane.reach(),
        };
        let kept = frame.len().min(self.snaplen as usize);
        let Some(mut batch) = batch.filter(|batch| {
            let used = batch.bytes.len() + batch.records.len() * RECORD_COST;
            used + kept + RECORD_COST <= self.capacity
        }) else {
            lane.lost.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let was_empty = batch.records.is_empty();
        frame.append_to(&mut batch.bytes, kept);
        let lost = lane.lost.load(Ordering::Relaxed);
        batch.records.push(Record {
            time_ns: now_ns(),
            direction,
            frame_len: frame.len() as u32,
            kept_len: kept as u32,
            lost: lost - lane.told.swap(lost, Ordering::Relaxed),
        });
        drop(batch);
        if was_empty {
            self.wake_writer();
        }
    }

    /// Takes what all lanes hold into `batches`; how many frames that is.
    pub(super) fn collect(&self, batches: &mut Vec<Batch>) -> usize {
        let lanes = lock(&self.lanes);
        batches.resize_with(lanes.len(), Batch::default);
        let mut found = 0;
        for (lane, batch) in lanes.iter().zip(batches) {
            batch.clear();
            std::mem::swap(&mut *lock(&lane.batch), batch);
            found += batch.records.len();
        }
        found
    }

    /// Counts what came after the writer's last look.
    pub(super) fn forget(&self) {
        let late = self.collect(&mut Vec::new()) as u64;
        self.unwritten.fetch_add(late, Ordering::Relaxed);
    }

    /// Frames that passed the filter and are in no file.
    pub(super) fn lost(&self) -> u64 {
        let lanes = lock(&self.lanes);
        let lost: u64 = lanes
            .iter()
            .map(|lane| lane.lost.load(Ordering::Relaxed))
            .sum();
        lost + self.unwritten.load(Ordering::Relaxed)
    }

    /// Lets the writer end once it has written what is there.
    pub(super) fn stop(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.stopping.store(true, Ordering::Release);
        self.wake_writer();
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// The one file is full.
    pub(super) fn set_full(&self) {
        self.full.store(true, Ordering::Relaxed);
        self.closed.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// The files cannot be written.
    pub(super) fn fail(&self, error: &io::Error) {
        let _ = self.error.set(error.to_string());
        self.closed.store(true, Ordering::Relaxed);
    }

    pub(super) fn error(&self) -> Option<&str> {
        self.error.get().map(String::as_str)
    }
}

impl Lane {
    /// The batch, unless somebody holds it for longer than a moment.
    fn reach(&self) -> Option<MutexGuard<'_, Batch>> {
        for _ in 0..LOOKS {
            if let Ok(batch) = self.batch.try_lock() {
                return Some(batch);
            }
            std::hint::spin_loop();
        }
        None
    }
}
