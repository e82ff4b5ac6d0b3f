//! The thread that writes a capture: collects what the queue threads recorded, and fills the files in turn.
//!
//! All files are opened at the start: a sandboxed daemon may have no way to open them later.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::pcapng::{self, Record, Statistics};
use super::session::{Batch, Session, now_ns};

/// Bytes that are collected before they are written.
const WRITE_LEN: usize = 256 << 10;
/// Room for the block of statistics at the end of a file, in bytes.
const STATISTICS_ROOM: u64 = 128;

/// Files that are filled in turn.
pub(super) struct Files {
    files: Vec<File>,
    current: usize,
    /// Bytes of the current file, those in `pending` included.
    written: u64,
    /// Most bytes of one file.
    limit: u64,
    pending: Vec<u8>,
    interface: String,
    snaplen: u32,
}

/// Where file `index` of `count` is: `name.pcapng`, or `name.INDEX.pcapng`.
pub(super) fn path_of(path: &Path, index: usize, count: usize) -> PathBuf {
    if count == 1 {
        return path.to_owned();
    }
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!(".{index}"));
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

impl Files {
    /// Makes the files; what is in them goes.
    pub(super) fn open(
        path: &Path,
        count: usize,
        limit: u64,
        interface: &str,
        snaplen: u32,
    ) -> io::Result<Files> {
        let open = |index| {
            let path = path_of(path, index, count);
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600);
            options.open(&path).map_err(|error| {
                let what = format!("cannot create '{}': {error}", path.display());
                io::Error::new(error.kind(), what)
            })
        };
        let files: io::Result<Vec<File>> = (0..count).map(open).collect();
        let mut files = Files {
            files: files?,
            current: 0,
            written: 0,
            limit,
            pending: Vec::with_capacity(WRITE_LEN),
            interface: interface.to_owned(),
            snaplen,
        };
        files.begin();
        files.flush()?;
        Ok(files)
    }

    /// One file of others' making, without a beginning.
    #[cfg(test)]
    pub(super) fn on(file: File) -> Files {
        Files {
            files: vec![file],
            current: 0,
            written: 0,
            limit: u64::MAX,
            pending: Vec::new(),
            interface: String::new(),
            snaplen: 0,
        }
    }

    fn begin(&mut self) {
        pcapng::begin(&mut self.pending, &self.interface, self.snaplen);
        self.written = self.pending.len() as u64;
    }

    fn flush(&mut self) -> io::Result<()> {
        self.files[self.current].write_all(&self.pending)?;
        self.pending.clear();
        Ok(())
    }

    /// Records a frame. Whether there was room for it: one file that is full stays as it is, several are filled in turn.
    fn packet(
        &mut self,
        record: &Record,
        bytes: &[u8],
        statistics: impl Fn() -> Statistics,
    ) -> io::Result<bool> {
        let before = self.pending.len();
        pcapng::packet(&mut self.pending, record, bytes);
        let len = (self.pending.len() - before) as u64;
        if self.written + len + STATISTICS_ROOM > self.limit {
            self.pending.truncate(before);
            if self.files.len() == 1 {
                return Ok(false);
            }
            self.end(&statistics())?;
            self.current = (self.current + 1) % self.files.len();
            let file = &mut self.files[self.current];
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
            self.begin();
            pcapng::packet(&mut self.pending, record, bytes);
        }
        self.written += len;
        if self.pending.len() >= WRITE_LEN {
            self.flush()?;
        }
        Ok(true)
    }

    fn end(&mut self, statistics: &Statistics) -> io::Result<()> {
        pcapng::statistics(&mut self.pending, statistics);
        self.flush()
    }
}

/// Writes until the session is stopped, full or fails.
pub(super) fn write_all(session: &Arc<Session>, mut files: Files) {
    if let Err(error) = write_until_stopped(session, &mut files) {
        session.fail(&error);
        tracing::warn!(port = files.interface, %error, "a capture cannot be written");
    }
}

fn write_until_stopped(session: &Session, files: &mut Files) -> io::Result<()> {
    let start_ns = now_ns();
    let mut batches = Vec::new();
    let mut order = Vec::new();
    loop {
        // Before the last look: what was recorded before the stop is written.
        let stopping = session.is_stopping();
        let found = session.collect(&mut batches);
        write_batches(session, files, start_ns, &batches, &mut order)?;
        if found > 0 {
            continue;
        }
        if stopping {
            return files.end(&totals(session, start_ns));
        }
        files.flush()?;
        std::thread::park();
    }
}

fn totals(session: &Session, start_ns: u64) -> Statistics {
    let lost = session.lost();
    Statistics {
        start_ns,
        end_ns: now_ns(),
        seen: session.written.load(Ordering::Relaxed) + lost,
        lost,
    }
}

/// Writes what several threads recorded, in the order of time.
fn write_batches(
    session: &Session,
    files: &mut Files,
    start_ns: u64,
    batches: &[Batch],
    order: &mut Vec<(u64, usize, usize, usize)>,
) -> io::Result<()> {
    order.clear();
    for (lane, batch) in batches.iter().enumerate() {
        let mut start = 0;
        for (index, record) in batch.records.iter().enumerate() {
            order.push((record.time_ns, lane, index, start));
            start += record.kept_len as usize;
        }
    }
    order.sort_unstable();
    let statistics = || totals(session, start_ns);
    for (_, lane, index, start) in order.iter() {
        let batch = &batches[*lane];
        let record = &batch.records[*index];
        let bytes = &batch.bytes[*start..*start + record.kept_len as usize];
        if session.is_full() || !files.packet(record, bytes, statistics)? {
            session.set_full();
            session.unwritten.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        session.written.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}
