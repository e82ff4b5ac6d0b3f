//! One step of a copy: read, told apart, written.

use super::chunk::{Chunk, Unread};
use super::{Act, Copy, CopyError, Kind, OnReadError, SECTOR, Step, Store, Unwritten};
use crate::driver::{ByteRange, WriteFlags, ZeroFlags};
use executor::{Buffer, Errno, HeapBuffer};

impl Copy<'_> {
    /// Copies `step`, whose writes wait for `turn`.
    pub(super) async fn carry_out(&self, step: Step, turn: u64) -> Result<(), CopyError> {
        let ByteRange { offset, length } = step.range;
        match (step.kind, self.options.sparse) {
            (Kind::Backing, _) => Ok(()),
            (Kind::Zero, Some(_)) if self.options.unwritten == Unwritten::Zeroes => Ok(()),
            (Kind::Zero, Some(_)) => {
                if !self.wait_for(turn).await {
                    return Ok(());
                }
                self.zero(step.range).await
            }
            (Kind::Zero, None) => {
                let mut zeroes = self.take_memory(length as usize);
                zeroes.fill(0);
                let chunk = Chunk {
                    runs: self.look().runs(offset, &zeroes),
                    memory: zeroes,
                    lost: Vec::new(),
                };
                self.write(step, chunk, turn).await
            }
            (Kind::Data, _) => {
                if self.offloads() && self.copy_offloaded(step, turn).await {
                    return Ok(());
                }
                let chunk = self.read(offset, self.take_memory(length as usize)).await?;
                self.write(step, chunk, turn).await
            }
        }
    }

    /// Has the kernel copy `step` when it is its turn; false when that is still to be done.
    async fn copy_offloaded(&self, step: Step, turn: u64) -> bool {
        if !self.wait_for(turn).await {
            // Nothing is to be done after a failure.
            return true;
        }
        let is_copied = self.offload(step.range).await;
        if is_copied {
            self.count(step);
            if let Some(rate) = &self.rate {
                rate.take(step.range.length).await;
            }
        }
        is_copied
    }

    async fn read(&self, offset: u64, memory: HeapBuffer) -> Result<Chunk, CopyError> {
        match self.fetch(offset, memory).await {
            Ok(chunk) => Ok(chunk),
            Err(Unread { errno, .. }) if self.options.on_read_error == OnReadError::Fail => {
                Err(CopyError {
                    act: Act::Read,
                    offset,
                    errno,
                })
            }
            Err(Unread { memory, .. }) => {
                let buffer = memory.into_buffer();
                let lost = self.salvage(offset, &buffer).await;
                let memory = buffer.into_heap();
                let runs = self.look().runs(offset, &memory);
                Ok(Chunk { memory, runs, lost })
            }
        }
    }

    /// Reads sector by sector; those that cannot be read are zeroes, and answered.
    async fn salvage(&self, offset: u64, buffer: &Buffer) -> Vec<(u64, Errno)> {
        let mut lost = Vec::new();
        for at in (0..buffer.len()).step_by(SECTOR as usize) {
            let sector = buffer.slice(at..buffer.len().min(at + SECTOR as usize));
            let offset = offset + at as u64;
            if let Err(errno) = self.sources.read(offset, sector.clone()).await {
                sector.fill(0);
                lost.push((offset, errno));
            }
        }
        lost
    }

    /// Writes a chunk when it is its turn, zeroes as zeroes.
    async fn write(&self, step: Step, chunk: Chunk, turn: u64) -> Result<(), CopyError> {
        if !self.wait_for(turn).await {
            return Ok(());
        }
        // In turn: portions end in the order in which they began.
        self.count(step);
        let offset = step.range.offset;
        let Chunk { memory, runs, lost } = chunk;
        for (offset, errno) in lost {
            self.observer.lost(offset, errno);
        }
        let buffer = memory.into_buffer();
        let mut at = 0;
        for run in runs {
            let start = offset + at as u64;
            let end = at + run.length;
            match run.zero {
                true if self.options.unwritten == Unwritten::Zeroes => {}
                true => self.zero(ByteRange::new(start, run.length as u64)).await?,
                false => self.store(start, buffer.slice(at..end)).await?,
            }
            at = end;
        }
        self.memory.borrow_mut().push(buffer.into_heap());
        Ok(())
    }

    async fn store(&self, offset: u64, data: Buffer) -> Result<(), CopyError> {
        if let Some(rate) = &self.rate {
            rate.take(data.len() as u64).await;
        }
        let flags = WriteFlags {
            compressed: self.options.store != Store::Plain,
            ..WriteFlags::default()
        };
        let written = self.target.write(offset, data, flags).await;
        written.map_err(|errno| at_target(offset, errno))
    }

    async fn zero(&self, range: ByteRange) -> Result<(), CopyError> {
        if let Some(rate) = &self.rate {
            rate.take(range.length).await;
        }
        let flags = ZeroFlags {
            may_unmap: self.options.may_unmap,
            ..ZeroFlags::default()
        };
        let written = self.target.write_zeroes(range, flags).await;
        written.map_err(|errno| at_target(range.offset, errno))
    }

    /// Memory for a chunk, of an earlier one when there is some.
    fn take_memory(&self, length: usize) -> HeapBuffer {
        let mut kept = self.memory.borrow_mut();
        let fitting = kept.iter().position(|memory| memory.len() == length);
        match fitting {
            Some(index) => kept.swap_remove(index),
            None => {
                kept.clear();
                HeapBuffer::zeroed(length)
            }
        }
    }
}

fn at_target(offset: u64, errno: Errno) -> CopyError {
    CopyError {
        act: Act::Write,
        offset,
        errno,
    }
}
