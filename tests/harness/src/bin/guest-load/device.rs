//! Writers that overwrite random blocks of the bare disk with direct I/O and check what they wrote before.
//!
//! The disk is split between the writers, so each of them knows alone what its part holds.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use anyhow::{Context as _, Result, ensure};
use harness::transfer::fill;

use crate::load::Worker;
use crate::system::{DISK, disk_bytes};

const BLOCK_BYTES: u64 = 4096;

/// Largest write, in blocks.
const LONGEST_RUN: u64 = 16;

/// Bounds the memory for the blocks' generations, and makes writers come back to blocks that they know.
const BLOCKS_PER_WRITER: u64 = 4096;

/// Splits the disk between that many writers.
pub(crate) fn workers(count: u64) -> Result<Vec<Box<dyn Worker>>> {
    ensure!(count > 0, "a load needs a writer");
    let share = disk_bytes()? / BLOCK_BYTES / count;
    let blocks = share.min(BLOCKS_PER_WRITER);
    ensure!(
        blocks > LONGEST_RUN,
        "the disk is too small for {count} writers"
    );
    (0..count)
        .map(|index| {
            let disk = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_DIRECT)
                .open(DISK)
                .context("open the disk")?;
            let worker = Device {
                disk,
                first_block: index * share,
                generations: vec![0; blocks as usize],
                generation: 0,
                random: index + 1,
                buffer: AlignedBuffer::default(),
            };
            Ok(Box::new(worker) as Box<dyn Worker>)
        })
        .collect()
}

struct Device {
    disk: File,
    first_block: u64,
    /// Per block the generation that it holds; zero where nothing was written yet.
    generations: Vec<u64>,
    generation: u64,
    random: u64,
    buffer: AlignedBuffer,
}

impl Device {
    /// A number below `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % limit
    }

    fn seed(&self, block: u64, generation: u64) -> u64 {
        ((self.first_block + block) << 24) ^ generation
    }

    /// Reads one block and compares it with what was written there.
    fn check(&mut self, block: u64) -> Result<()> {
        let generation = self.generations[block as usize];
        let offset = (self.first_block + block) * BLOCK_BYTES;
        let buffer = self.buffer.bytes(BLOCK_BYTES);
        self.disk
            .read_exact_at(buffer, offset)
            .with_context(|| format!("read at {offset}"))?;
        let mut expected = [0; BLOCK_BYTES as usize];
        if generation > 0 {
            fill(self.seed(block, generation), &mut expected);
            let found = self.buffer.bytes(BLOCK_BYTES);
            ensure!(
                found == expected,
                "block at {offset} does not hold generation {generation}"
            );
        }
        Ok(())
    }
}

impl Worker for Device {
    fn step(&mut self) -> Result<u64> {
        let run = 1 + self.below(LONGEST_RUN);
        let first = self.below(self.generations.len() as u64 - run);
        self.generation += 1;
        let bytes = run * BLOCK_BYTES;
        for index in 0..run {
            let seed = self.seed(first + index, self.generation);
            let start = (index * BLOCK_BYTES) as usize;
            let block = &mut self.buffer.bytes(bytes)[start..start + BLOCK_BYTES as usize];
            fill(seed, block);
        }
        let offset = (self.first_block + first) * BLOCK_BYTES;
        let buffer = self.buffer.bytes(bytes);
        self.disk
            .write_all_at(buffer, offset)
            .with_context(|| format!("write at {offset}"))?;
        self.disk.sync_data().context("sync the disk")?;
        let written = first as usize..(first + run) as usize;
        self.generations[written].fill(self.generation);
        let other = self.below(self.generations.len() as u64);
        self.check(other)?;
        Ok(bytes)
    }

    fn forget_caches(&mut self) -> Result<()> {
        // Direct I/O leaves nothing in the page cache; dropping it keeps that true if another reader filled it.
        fs::write("/proc/sys/vm/drop_caches", "3").context("drop caches")
    }

    fn verify(&mut self) -> Result<u64> {
        let mut bytes = 0;
        for block in 0..self.generations.len() as u64 {
            if self.generations[block as usize] > 0 {
                self.check(block)?;
                bytes += BLOCK_BYTES;
            }
        }
        Ok(bytes)
    }
}

/// Memory for direct I/O, which must start on a block boundary.
struct AlignedBuffer {
    memory: Vec<u8>,
}

impl Default for AlignedBuffer {
    fn default() -> Self {
        Self {
            memory: vec![0; ((LONGEST_RUN + 1) * BLOCK_BYTES) as usize],
        }
    }
}

impl AlignedBuffer {
    fn bytes(&mut self, length: u64) -> &mut [u8] {
        let start = self.memory.as_ptr().align_offset(BLOCK_BYTES as usize);
        &mut self.memory[start..start + length as usize]
    }
}
