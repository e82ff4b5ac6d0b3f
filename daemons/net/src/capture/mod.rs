//! Records a port's frames in pcapng files, which tcpdump and Wireshark read.
//!
//! ```text
//!   queue threads: Capture::frame ──> lane (bounded) ──> writer thread ──> file, or ring of files
//!   control thread: Capture::start, stop, state
//! ```
//!
//! Promises: a queue thread never waits; while nothing is recorded a frame costs one relaxed load; memory is bounded by a
//! small multiple of `buffer` for each handle that records; a frame that passes the filter is in a file or counted as lost, in the file too
//! (`epb_dropcount`, `isb_ifdrop`). The writer owns the format, no crate does: those that write pcapng have had no release
//! in years, and four blocks are all that is needed.
//!
//! Frames are recorded as they pass: a checksum that another is to fill in is not filled in, and a frame that is to be
//! segmented is one frame.

mod pcapng;
mod session;
#[cfg(test)]
mod tests;
mod writer;

use std::cell::RefCell;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use serde::Deserialize;

use self::session::{Lane, Session};
use self::writer::Files;
use crate::frame::{Frame, MAX_FRAME};
use crate::live::{Live, LiveReader};

/// Smallest limit of a file, in bytes: more than any one frame takes.
const SMALLEST_FILE: u64 = 128 << 10;
/// Most files of a ring.
const MOST_FILES: u32 = 256;
/// Bytes that a handle keeps for the writer unless told otherwise.
const DEFAULT_BUFFER: u64 = 4 << 20;
/// Smallest and largest such buffer.
const BUFFERS: std::ops::RangeInclusive<u64> = 128 << 10..=1 << 30;

/// Where a frame goes, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the guest.
    Rx,
    /// From the guest.
    Tx,
}

/// Which directions are recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Directions {
    /// All frames.
    #[default]
    Both,
    /// Those to the guest.
    Rx,
    /// Those from the guest.
    Tx,
}

/// What `capture-start` can say of a capture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct CaptureOptions {
    /// The file; of a ring, `name.pcapng` becomes `name.0.pcapng` and so on. What is in them goes.
    pub file: PathBuf,
    /// Bytes of a frame to keep; absent: all.
    pub snaplen: Option<u32>,
    /// Most bytes of one file; absent: no limit.
    pub size: Option<u64>,
    /// Files to fill in turn, the oldest anew; absent: 1, which ends when it is full.
    pub files: Option<u32>,
    /// Which directions to record.
    pub direction: Directions,
    /// Shortest frame to record, in bytes.
    pub min_size: Option<u32>,
    /// Longest frame to record, in bytes.
    pub max_size: Option<u32>,
    /// Bytes that each queue pair may keep for the writer; absent: 4 MiB.
    pub buffer: Option<u64>,
}

/// Which frames are recorded.
#[derive(Clone, Copy, Debug)]
struct Filter {
    directions: Directions,
    min_len: usize,
    max_len: usize,
}

impl Filter {
    fn passes(&self, direction: Direction, len: usize) -> bool {
        let wanted = matches!(
            (self.directions, direction),
            (Directions::Both, _)
                | (Directions::Rx, Direction::Rx)
                | (Directions::Tx, Direction::Tx)
        );
        wanted && (self.min_len..=self.max_len).contains(&len)
    }
}

/// How a capture stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptureState {
    /// Its file, or the pattern of its ring's.
    pub file: PathBuf,
    /// Frames in files; in a ring, those that were overwritten too.
    pub written: u64,
    /// Frames that passed the filter and are in no file.
    pub lost: u64,
    /// Whether its one file is full.
    pub full: bool,
    /// Why it ended early.
    pub error: Option<String>,
}

/// A port's capture, running or not. Clones are the same capture; each thread has a clone of its own.
#[derive(Debug)]
pub struct Capture {
    slot: Arc<Slot>,
    session: LiveReader<Option<Arc<Session>>>,
    /// This handle's lane, and of which session it is.
    lane: RefCell<Option<(Arc<Session>, Arc<Lane>)>>,
}

#[derive(Debug, Default)]
struct Slot {
    session: Arc<Live<Option<Arc<Session>>>>,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    file: PathBuf,
    session: Arc<Session>,
    writer: JoinHandle<()>,
}

impl Default for Capture {
    fn default() -> Capture {
        Capture::on(Arc::default())
    }
}

impl Clone for Capture {
    fn clone(&self) -> Capture {
        Capture::on(Arc::clone(&self.slot))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Slot {
    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) -> Option<CaptureState> {
        let running = self.running().take()?;
        self.session.set(None);
        running.session.stop();
        if running.writer.join().is_err() {
            tracing::error!("the writer of a capture has panicked");
        }
        running.session.forget();
        Some(state(&running.file, &running.session))
    }
}

fn state(file: &std::path::Path, session: &Session) -> CaptureState {
    CaptureState {
        file: file.to_owned(),
        written: session.written.load(Ordering::Relaxed),
        lost: session.lost(),
        full: session.is_full(),
        error: session.error().map(str::to_owned),
    }
}

fn invalid<T>(what: String) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidInput, what))
}

impl Capture {
    fn on(slot: Arc<Slot>) -> Capture {
        Capture {
            session: LiveReader::new(Arc::clone(&slot.session)),
            slot,
            lane: RefCell::default(),
        }
    }

    /// Whether frames are recorded: one relaxed load while none are.
    #[inline]
    pub fn is_active(&self) -> bool {
        self.session.get().is_some()
    }

    /// Records a frame, if frames are recorded and this one passes the filter. Never waits.
    #[inline]
    pub fn frame(&self, direction: Direction, frame: &Frame<'_>) {
        if let Some(session) = &*self.session.get() {
            self.record(session, direction, frame);
        } else if self.lane.borrow().is_some() {
            self.lane.replace(None);
        }
    }

    #[cold]
    fn record(&self, session: &Arc<Session>, direction: Direction, frame: &Frame<'_>) {
        let mut lane = self.lane.borrow_mut();
        let lane = match &mut *lane {
            Some((of, lane)) if Arc::ptr_eq(of, session) => lane,
            other => &other.insert((Arc::clone(session), session.add_lane())).1,
        };
        session.record(lane, direction, frame);
    }

    /// Starts to record; `interface` names the port in the files.
    ///
    /// # Errors
    /// Options out of range, a capture that runs, a file that cannot be made.
    pub fn start(&self, options: &CaptureOptions, interface: &str) -> io::Result<()> {
        let files = options.files.unwrap_or(1);
        let size = options.size.unwrap_or(u64::MAX);
        let buffer = options.buffer.unwrap_or(DEFAULT_BUFFER);
        let snaplen = options.snaplen.unwrap_or(MAX_FRAME as u32);
        let filter = Filter {
            directions: options.direction,
            min_len: options.min_size.unwrap_or(0) as usize,
            max_len: options.max_size.map_or(usize::MAX, |len| len as usize),
        };
        if options.file.file_name().is_none() {
            return invalid("'file' has to name a file".to_owned());
        }
        if !(1..=MOST_FILES).contains(&files) {
            return invalid(format!("'files' has to be 1 to {MOST_FILES}, not {files}"));
        }
        if files > 1 && options.size.is_none() {
            return invalid("'files' needs 'size'".to_owned());
        }
        if size < SMALLEST_FILE {
            return invalid(format!(
                "'size' has to be at least {SMALLEST_FILE}, not {size}"
            ));
        }
        if !(1..=MAX_FRAME as u32).contains(&snaplen) {
            return invalid(format!(
                "'snaplen' has to be 1 to {MAX_FRAME}, not {snaplen}"
            ));
        }
        if !BUFFERS.contains(&buffer) {
            let (least, most) = (BUFFERS.start(), BUFFERS.end());
            return invalid(format!(
                "'buffer' has to be {least} to {most}, not {buffer}"
            ));
        }
        if filter.min_len > filter.max_len {
            return invalid("'min-size' is larger than 'max-size'".to_owned());
        }
        let mut running = self.slot.running();
        if running.is_some() {
            let what = "a capture is running already";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
        }
        let files = Files::open(&options.file, files as usize, size, interface, snaplen)?;
        let session = Arc::new(Session::new(filter, snaplen, buffer as usize));
        let writing = Arc::clone(&session);
        let writer = thread::Builder::new()
            .name("capture".to_owned())
            .spawn(move || writer::write_all(&writing, files))?;
        session.set_writer(writer.thread().clone());
        *running = Some(Running {
            file: options.file.clone(),
            session: Arc::clone(&session),
            writer,
        });
        self.slot.session.set(Some(session));
        Ok(())
    }

    /// Ends the capture and waits until its files are complete. How it stood; `None` when none was running.
    pub fn stop(&self) -> Option<CaptureState> {
        self.slot.stop()
    }

    /// How the capture stands; `None` when none is running.
    pub fn state(&self) -> Option<CaptureState> {
        let running = self.slot.running();
        let running = running.as_ref()?;
        Some(state(&running.file, &running.session))
    }
}
