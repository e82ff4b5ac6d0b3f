//! One step of a copy: read, told apart, written.

use super::runs::{Run, RunRules, Runs, is_zero};
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
                self.write(step, zeroes, turn).await
            }
            (Kind::Data, _) => {
                let data = self.read(offset, self.take_memory(length as usize)).await?;
                self.write(step, data, turn).await
            }
        }
    }

    async fn read(&self, offset: u64, memory: HeapBuffer) -> Result<HeapBuffer, CopyError> {
        let buffer = memory.into_buffer();
        match self.sources.read(offset, buffer.clone()).await {
            Ok(()) => {}
            Err(errno) if self.options.on_read_error == OnReadError::Fail => {
                return Err(CopyError {
                    act: Act::Read,
                    offset,
                    errno,
                });
            }
            Err(_) => self.salvage(offset, &buffer).await,
        }
        Ok(owned(buffer))
    }

    /// Reads sector by sector; those that cannot be read are zeroes.
    async fn salvage(&self, offset: u64, buffer: &Buffer) {
        for at in (0..buffer.len()).step_by(SECTOR as usize) {
            let sector = buffer.slice(at..buffer.len().min(at + SECTOR as usize));
            let offset = offset + at as u64;
            if let Err(errno) = self.sources.read(offset, sector.clone()).await {
                sector.fill(0);
                self.observer.lost(offset, errno);
            }
        }
    }

    /// Writes a chunk when it is its turn, zeroes as zeroes.
    async fn write(&self, step: Step, data: HeapBuffer, turn: u64) -> Result<(), CopyError> {
        if !self.wait_for(turn).await {
            return Ok(());
        }
        // In turn: portions end in the order in which they began.
        self.count(step);
        let offset = step.range.offset;
        let runs = self.runs(offset, &data);
        let buffer = data.into_buffer();
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
        self.memory.borrow_mut().push(owned(buffer));
        Ok(())
    }

    /// How a chunk is written.
    fn runs(&self, offset: u64, data: &[u8]) -> Vec<Run> {
        let whole = Run {
            length: data.len(),
            zero: false,
        };
        match (self.options.sparse, self.options.store) {
            (None, _) => vec![whole],
            (Some(sparse), Store::Plain) => {
                let alignment = u64::from(self.target_alignment());
                Runs::new(data, offset, RunRules::new(sparse, alignment)).collect()
            }
            (Some(_), Store::Compressed { cluster: unit }) => {
                let mut runs: Vec<Run> = Vec::new();
                for cluster in data.chunks(unit.max(1) as usize) {
                    let zero = is_zero(cluster);
                    let length = cluster.len();
                    match runs.last_mut().filter(|last| last.zero == zero) {
                        Some(last) => last.length += length,
                        None => runs.push(Run { length, zero }),
                    }
                }
                runs
            }
        }
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
        let written = self.target.write_zeroes(range, ZeroFlags::default()).await;
        written.map_err(|errno| at_target(range.offset, errno))
    }

    fn target_alignment(&self) -> u32 {
        self.target.limits().request_alignment
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

/// The memory of a buffer that no operation uses any more.
fn owned(buffer: Buffer) -> HeapBuffer {
    buffer
        .try_into_heap()
        .unwrap_or_else(|buffer| buffer.to_heap())
}
