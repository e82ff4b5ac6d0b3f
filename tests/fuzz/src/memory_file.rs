//! A file in memory as a leaf of the graph: sparse, growing to a limit, never waiting.

use block::edge::Edge;
use block::{
    BlockStatus, BoxFuture, Buffer, ByteRange, Driver, Errno, Error, ImageIdentity, IoFuture,
    Limits, Resize, StatusExtent, WriteFlags, ZeroFlags,
};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const PAGE: u64 = 4096;
/// Most pages that are not zero: beyond it the disk is full.
const MAX_PAGES: usize = 4096;
/// Longest file in bytes, as on ext4.
const MAX_LENGTH: u64 = 16 << 40;

#[derive(Clone, Default)]
struct Content {
    length: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

/// A file in memory; clones share it.
#[derive(Clone, Default)]
pub struct MemoryFile {
    content: Arc<Mutex<Content>>,
}

impl MemoryFile {
    /// A file that holds `bytes`.
    pub fn new(bytes: &[u8]) -> Self {
        Self::of_pages((0..).zip(bytes.chunks(PAGE as usize)))
    }

    /// A file that ends with the last of these pages, each with its number and all but the last one whole; zeroes are
    /// between them.
    pub(crate) fn of_pages<'a>(pages: impl Iterator<Item = (u64, &'a [u8])>) -> Self {
        let file = Self::default();
        for (number, page) in pages {
            let written = file.content().write(number * PAGE, page);
            written.expect("an input is shorter than a disk");
        }
        file
    }

    /// Another file with the same content.
    pub fn duplicate(&self) -> Self {
        let content = self.content().clone();
        Self {
            content: Arc::new(Mutex::new(content)),
        }
    }

    /// The file's bytes; only for files known to be small.
    pub fn to_vec(&self) -> Vec<u8> {
        let content = self.content();
        let mut bytes = vec![0; content.length as usize];
        content.read(0, &mut bytes);
        bytes
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Content {
    /// The pieces of a range: page number, offset in the page, offset in the range, length.
    fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == length {
                return None;
            }
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let piece = (length - done).min(PAGE as usize - within);
            done += piece;
            Some((at / PAGE, within, done - piece, piece))
        })
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        for (page, within, at, length) in Self::pieces(offset, bytes.len()) {
            if let Some(page) = self.pages.get(&page) {
                bytes[at..at + length].copy_from_slice(&page[within..within + length]);
            }
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let end = offset
            .checked_add(bytes.len() as u64)
            .filter(|end| *end <= MAX_LENGTH)
            .ok_or(Errno::EFBIG)?;
        for (page, within, at, length) in Self::pieces(offset, bytes.len()) {
            if !self.pages.contains_key(&page) && self.pages.len() >= MAX_PAGES {
                return Err(Errno::ENOSPC);
            }
            let page = self
                .pages
                .entry(page)
                .or_insert_with(|| vec![0; PAGE as usize].into());
            page[within..within + length].copy_from_slice(&bytes[at..at + length]);
        }
        self.length = self.length.max(end);
        Ok(())
    }

    /// Zeroes what pages exist in the range.
    fn clear(&mut self, range: ByteRange) {
        let end = range.checked_end().unwrap_or(u64::MAX);
        let last = end.div_ceil(PAGE);
        let touched = self.pages.range_mut(range.offset / PAGE..last);
        for (number, page) in touched {
            let start = number * PAGE;
            let from = range.offset.max(start) - start;
            let to = end.min(start + PAGE) - start;
            page[from as usize..to as usize].fill(0);
        }
        self.pages.retain(|number, page| {
            !(range.offset / PAGE..last).contains(number) || page.iter().any(|byte| *byte != 0)
        });
    }
}

impl Driver for MemoryFile {
    fn driver_name(&self) -> &'static str {
        "memory"
    }
    fn length(&self) -> u64 {
        self.content().length
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn grows(&self) -> bool {
        true
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        let mut bytes = vec![0; buffer.len()];
        self.content().read(offset, &mut bytes);
        buffer.copy_from_slice(&bytes);
        IoFuture::done()
    }
    fn write(&self, offset: u64, buffer: Buffer, _flags: WriteFlags) -> IoFuture<'_> {
        let bytes = buffer.to_heap();
        IoFuture::Ready(self.content().write(offset, &bytes))
    }
    fn write_zeroes(&self, range: ByteRange, _flags: ZeroFlags) -> IoFuture<'_> {
        let Some(end) = range.checked_end().filter(|end| *end <= MAX_LENGTH) else {
            return IoFuture::error(Errno::EFBIG);
        };
        let mut content = self.content();
        content.clear(range);
        content.length = content.length.max(end);
        IoFuture::done()
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        self.content().clear(range);
        IoFuture::done()
    }
    fn flush(&self) -> IoFuture<'_> {
        IoFuture::done()
    }
    fn block_status(&self, range: ByteRange) -> BoxFuture<'_, Result<StatusExtent, Errno>> {
        let status = BlockStatus {
            data: true,
            allocated: true,
            offset: Some(range.offset),
            ..BlockStatus::default()
        };
        let length = range.length;
        Box::pin(async move { Ok(StatusExtent { length, status }) })
    }
    fn resize(&self, resize: Resize) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            if resize.length > MAX_LENGTH {
                return Err(Error::io("Could not resize file", Errno::EFBIG));
            }
            let mut content = self.content();
            let beyond = ByteRange::new(resize.length, u64::MAX - resize.length);
            content.clear(beyond);
            content.length = resize.length;
            Ok(())
        })
    }
    fn close(&self) -> BoxFuture<'_, Result<(), Errno>> {
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
    fn identity(&self) -> Option<ImageIdentity> {
        None
    }
}
