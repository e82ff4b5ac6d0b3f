//! The general paths of a node: everything that does not pass to the driver as it is.
//!
//! Bounded: a request holds at most one bounce buffer of [`BOUNCE_BYTES`] plus the padding of its
//! two ends.

use super::{DetectZeroes, Discard, Node};
use crate::debug::Event;
use crate::driver::{ByteRange, WriteFlags, ZeroFlags};
use executor::{Buffer, Errno, HeapBuffer};
use std::ops::Range;

/// Largest private buffer of one request, in bytes.
const BOUNCE_BYTES: u64 = 256 << 10;

/// One driver call's worth of a request.
struct Chunk {
    /// What the caller asked for.
    wanted: Range<u64>,
    /// What the driver is asked for: `wanted` out to the alignment.
    padded: Range<u64>,
    /// The driver can use the caller's own memory.
    direct: bool,
}

impl Chunk {
    fn is_padded(&self) -> bool {
        self.wanted != self.padded
    }
    fn length(&self) -> usize {
        (self.padded.end - self.padded.start) as usize
    }
    /// Where the wanted bytes lie in a buffer of the padded ones.
    fn inner(&self) -> Range<usize> {
        let start = (self.wanted.start - self.padded.start) as usize;
        start..start + (self.wanted.end - self.wanted.start) as usize
    }
}

impl Node {
    fn alignment(&self) -> u64 {
        u64::from(self.limits.request_alignment)
    }

    fn align_down(&self, offset: u64) -> u64 {
        offset & !(self.alignment() - 1)
    }

    fn align_up(&self, offset: u64) -> Option<u64> {
        Some(self.align_down(offset.checked_add(self.alignment() - 1)?))
    }

    /// The next piece of `rest` that one driver call can do on `buffer`, which covers `rest`.
    fn next_chunk(&self, rest: Range<u64>, buffer: &Buffer) -> Result<Chunk, Errno> {
        let aligned = rest.start == self.align_down(rest.start)
            && buffer.is_aligned(self.limits.memory_alignment as usize);
        let max = match u64::from(self.limits.max_transfer) {
            0 => u64::MAX,
            max => self.align_down(max).max(self.alignment()),
        };
        if aligned {
            let whole = self.align_down(rest.end - rest.start).min(max);
            if whole > 0 {
                let range = rest.start..rest.start + whole;
                return Ok(Chunk {
                    wanted: range.clone(),
                    padded: range,
                    direct: true,
                });
            }
        }
        let start = self.align_down(rest.start);
        let longest = start.saturating_add(max.min(BOUNCE_BYTES).max(self.alignment()));
        let wanted = rest.start..rest.end.min(longest);
        let end = self.align_up(wanted.end).ok_or(Errno::EINVAL)?;
        Ok(Chunk {
            wanted,
            padded: start..end,
            direct: false,
        })
    }

    pub(super) async fn read_general(&self, offset: u64, buffer: Buffer) -> Result<(), Errno> {
        let end = offset
            .checked_add(buffer.len() as u64)
            .ok_or(Errno::EINVAL)?;
        let known_end = match self.grows {
            true => end,
            false => end.min(self.length()).max(offset),
        };
        let known = (known_end - offset) as usize;
        if known < buffer.len() {
            buffer.slice(known..buffer.len()).fill(0);
        }
        let mut at = offset;
        while at < known_end {
            let rest = buffer.slice((at - offset) as usize..known);
            let chunk = self.next_chunk(at..known_end, &rest)?;
            let wanted = (chunk.wanted.end - at) as usize;
            if chunk.direct {
                self.driver.read(at, rest.slice(0..wanted)).await?;
            } else {
                let bounce = Buffer::zeroed(chunk.length());
                self.driver.read(chunk.padded.start, bounce.clone()).await?;
                rest.slice(0..wanted)
                    .copy_from(&bounce.slice(chunk.inner()));
            }
            at = chunk.wanted.end;
        }
        Ok(())
    }

    pub(super) async fn write_general(
        &self,
        offset: u64,
        buffer: Buffer,
        flags: WriteFlags,
    ) -> Result<(), Errno> {
        let detect = self.options.detect_zeroes;
        if detect != DetectZeroes::Off && !buffer.is_empty() && buffer.is_zero() {
            let range = ByteRange::new(offset, buffer.len() as u64);
            let zero_flags = ZeroFlags {
                may_unmap: detect == DetectZeroes::Unmap,
                ..ZeroFlags::default()
            };
            self.zero_range(range, zero_flags).await?;
        } else {
            let flags = WriteFlags {
                fua: false,
                ..flags
            };
            self.write_bytes(offset, buffer, flags).await?;
        }
        if flags.fua {
            self.flush().await
        } else {
            Ok(())
        }
    }

    async fn write_bytes(
        &self,
        offset: u64,
        buffer: Buffer,
        flags: WriteFlags,
    ) -> Result<(), Errno> {
        let end = offset + buffer.len() as u64;
        let mut at = offset;
        while at < end {
            let rest = buffer.slice((at - offset) as usize..buffer.len());
            let chunk = self.next_chunk(at..end, &rest)?;
            let data = rest.slice(0..(chunk.wanted.end - at) as usize);
            at = chunk.wanted.end;
            if chunk.is_padded() {
                self.write_padded(&chunk, &data, flags).await?;
                continue;
            }
            let _guard = match &self.tracker {
                Some(tracker) => Some(tracker.begin(chunk.padded.clone()).await),
                None => None,
            };
            let data = match chunk.direct {
                true => data,
                false => data.to_heap().into_buffer(),
            };
            self.write_chunk(chunk.padded.start, data, flags).await?;
        }
        Ok(())
    }

    async fn write_chunk(&self, offset: u64, data: Buffer, flags: WriteFlags) -> Result<(), Errno> {
        if !flags.compressed {
            self.event(Event::Pwritev).await;
        }
        let result = self.driver.write(offset, data, flags).await;
        self.event(Event::PwritevDone).await;
        result
    }

    /// Reads the blocks at the ends of a chunk, merges `data` and writes the whole.
    async fn write_padded(
        &self,
        chunk: &Chunk,
        data: &Buffer,
        flags: WriteFlags,
    ) -> Result<(), Errno> {
        let tracker = self
            .tracker
            .as_ref()
            .expect("padding happens only where the driver needs an alignment");
        let _guard = tracker.serialise(chunk.padded.clone()).await;
        let bounce = Buffer::zeroed(chunk.length());
        let block = self.alignment() as usize;
        let head = chunk.wanted.start > chunk.padded.start;
        let tail = chunk.wanted.end < chunk.padded.end;
        // One block is read once, for both ends.
        let shared = head && tail && chunk.length() == block;
        if head {
            self.event(Event::PwritevRmwHead).await;
            if shared {
                self.event(Event::PwritevRmwTail).await;
            }
            self.driver
                .read(chunk.padded.start, bounce.slice(0..block))
                .await?;
            self.event(Event::PwritevRmwAfterHead).await;
            if shared {
                self.event(Event::PwritevRmwAfterTail).await;
            }
        }
        if tail && !shared {
            let last = chunk.length() - block;
            self.event(Event::PwritevRmwTail).await;
            self.driver
                .read(
                    chunk.padded.start + last as u64,
                    bounce.slice(last..chunk.length()),
                )
                .await?;
            self.event(Event::PwritevRmwAfterTail).await;
        }
        bounce.slice(chunk.inner()).copy_from(data);
        self.write_chunk(chunk.padded.start, bounce, flags).await
    }

    pub(super) async fn zero_general(
        &self,
        range: ByteRange,
        flags: ZeroFlags,
    ) -> Result<(), Errno> {
        let fua = flags.fua;
        let flags = ZeroFlags {
            fua: false,
            ..flags
        };
        self.zero_range(range, flags).await?;
        if fua { self.flush().await } else { Ok(()) }
    }

    async fn zero_range(&self, range: ByteRange, flags: ZeroFlags) -> Result<(), Errno> {
        let end = range.checked_end().ok_or(Errno::EINVAL)?;
        let flags = ZeroFlags {
            may_unmap: flags.may_unmap && self.options.discard == Discard::Unmap,
            ..flags
        };
        let body_start = self.align_up(range.offset).ok_or(Errno::EINVAL)?.min(end);
        let body_end = self.align_down(end).max(body_start);
        self.write_zero_bytes(range.offset..body_start).await?;
        if body_start < body_end {
            self.zero_body(body_start..body_end, flags).await?;
        }
        self.write_zero_bytes(body_end..end).await
    }

    async fn zero_body(&self, body: Range<u64>, flags: ZeroFlags) -> Result<(), Errno> {
        let range = ByteRange::new(body.start, body.end - body.start);
        let result = {
            let _guard = match &self.tracker {
                Some(tracker) => Some(tracker.begin(body.clone()).await),
                None => None,
            };
            self.event(Event::PwritevZero).await;
            let result = self.driver.write_zeroes(range, flags).await;
            self.event(Event::PwritevDone).await;
            result
        };
        match result {
            Err(Errno::EOPNOTSUPP) if !flags.no_fallback => self.write_zero_bytes(body).await,
            result => result,
        }
    }

    async fn write_zero_bytes(&self, range: Range<u64>) -> Result<(), Errno> {
        let length = range.end - range.start;
        if length == 0 {
            return Ok(());
        }
        let zeroes = HeapBuffer::zeroed(length.min(BOUNCE_BYTES) as usize).into_buffer();
        let mut at = range.start;
        while at < range.end {
            let piece = (range.end - at).min(BOUNCE_BYTES);
            let zeroes = zeroes.slice(0..piece as usize);
            self.write_bytes(at, zeroes, WriteFlags::default()).await?;
            at += piece;
        }
        Ok(())
    }

    pub(super) async fn discard_general(&self, range: ByteRange) -> Result<(), Errno> {
        let end = range.checked_end().ok_or(Errno::EINVAL)?.min(self.length());
        let start = self.align_up(range.offset).ok_or(Errno::EINVAL)?;
        let end = self.align_down(end);
        if start >= end {
            return Ok(());
        }
        let _guard = match &self.tracker {
            Some(tracker) => Some(tracker.begin(start..end).await),
            None => None,
        };
        match self
            .driver
            .discard(ByteRange::new(start, end - start))
            .await
        {
            Err(Errno::EOPNOTSUPP) => Ok(()),
            result => result,
        }
    }
}
