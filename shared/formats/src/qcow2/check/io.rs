//! Reads and writes of a check: bytes past the end of the file are zeroes, neighbouring small
//! tables are read at once, and the sum of what is read is bounded by the length of the file, so
//! that tables which overlap each other a million times end a check instead of keeping it busy.

use super::super::tables::HostOffset;
use super::layout::Extent;
use block::{Buffer, Edge, Errno, Resize, WriteFlags};

/// Least that is read at once, in bytes.
const WINDOW: u64 = 64 << 10;
/// What may be read however short the file is, in bytes.
const FREE_BYTES: u64 = 16 << 20;
/// How often the file may be read in a pass.
const PASSES: u64 = 3;

/// The image's file.
pub(super) struct Io<'a> {
    file: &'a Edge,
    length: u64,
    window: Vec<u8>,
    window_start: u64,
    read: u64,
}

impl<'a> Io<'a> {
    pub(super) fn new(file: &'a Edge) -> Self {
        Self {
            file,
            length: file.node().length(),
            window: Vec::new(),
            window_start: 0,
            read: 0,
        }
    }

    /// Bytes of the file.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Starts a new pass over the metadata.
    pub(super) fn begin_pass(&mut self) {
        self.read = 0;
        self.window.clear();
    }

    /// `bytes` at `offset`; neighbours may be read along and kept for the next call.
    ///
    /// # Errors
    /// `EFBIG` when the pass reads more than its share, or what the file answers.
    pub(super) async fn read(&mut self, offset: u64, bytes: u64) -> Result<Vec<u8>, Errno> {
        if offset.saturating_add(bytes) > i64::MAX as u64 {
            return Err(Errno::EIO);
        }
        let mut result = vec![0; bytes as usize];
        let end = offset.saturating_add(bytes).min(self.length);
        let wanted = end.saturating_sub(offset);
        if wanted == 0 {
            return Ok(result);
        }
        let held = self.window_start..self.window_start + self.window.len() as u64;
        if offset < held.start || end > held.end {
            self.fill_window(offset, wanted.max(WINDOW)).await?;
        }
        let start = (offset - self.window_start) as usize;
        let source = &self.window[start..start + wanted as usize];
        result[..wanted as usize].copy_from_slice(source);
        Ok(result)
    }

    async fn fill_window(&mut self, offset: u64, bytes: u64) -> Result<(), Errno> {
        let bytes = bytes.min(self.length - offset);
        self.read += bytes;
        if self.read > FREE_BYTES + PASSES.saturating_mul(self.length) {
            return Err(Errno::EFBIG);
        }
        self.window.clear();
        let buffer = Buffer::zeroed(bytes as usize);
        self.file.node().read(offset, buffer.clone()).await?;
        self.window = buffer.to_heap().to_vec();
        self.window_start = offset;
        Ok(())
    }

    /// Writes, without making it durable.
    pub(super) async fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.window.clear();
        let buffer = Buffer::zeroed(bytes.len());
        buffer.copy_from_slice(bytes);
        let node = self.file.node();
        node.write(offset, buffer, WriteFlags::default()).await?;
        self.length = node.length();
        Ok(())
    }

    /// Makes what was written durable.
    pub(super) async fn flush(&self) -> Result<(), Errno> {
        self.file.node().flush().await
    }

    /// Makes the file longer; the new part is zeroes.
    pub(super) async fn grow(&mut self, length: u64) -> Result<(), Errno> {
        let resize = Resize::to(length);
        let node = self.file.node();
        let resized = node.resize(resize).await;
        resized.map_err(|error| error.errno.unwrap_or(Errno::EIO))?;
        self.length = node.length();
        Ok(())
    }

    /// The big-endian words of a table, up to the end of the file: what is beyond would be zero.
    pub(super) async fn words(&mut self, place: Extent) -> Result<Vec<u64>, Errno> {
        let HostOffset(mut at) = place.offset;
        // Nowhere, and not just beyond the end: what the table refers to is unknown, not unused.
        if at.saturating_add(place.bytes) > i64::MAX as u64 {
            return Err(Errno::EIO);
        }
        let end = at.saturating_add(place.bytes).min(self.length);
        let mut words = Vec::with_capacity((end.saturating_sub(at) / 8) as usize);
        while at < end {
            let bytes = self.read(at, (end - at).min(1 << 20)).await?;
            words.extend(bytes.chunks_exact(8).map(be_word));
            at += bytes.len() as u64;
        }
        Ok(words)
    }
}

/// A big-endian word.
pub(super) fn be_word(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().expect("chunks of eight bytes"))
}
