//! The log of dirty pages that a migrating front-end shares with the back-end.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Bytes of guest memory per bit.
pub(super) const PAGE_BYTES: u64 = 4096;

/// One bit per page of guest memory, from guest-physical address 0 on.
#[derive(Debug)]
pub struct DirtyLog {
    file: File,
    bytes: u64,
}

impl DirtyLog {
    /// A clean log for guest memory that ends at `end`.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new(end: u64) -> Result<Self> {
        let bytes = end.div_ceil(PAGE_BYTES * 8).next_multiple_of(4096);
        let fd = memfd_create("dirty-log", MFdFlags::MFD_CLOEXEC).context("memfd_create")?;
        let file = File::from(fd);
        file.set_len(bytes).context("size of the log")?;
        Ok(Self { file, bytes })
    }

    /// Body of `SET_LOG_BASE`: size and offset.
    pub(super) fn body(&self) -> Vec<u8> {
        [self.bytes.to_le_bytes(), [0; 8]].concat()
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Numbers of the pages that were written.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn pages(&self) -> Result<BTreeSet<u64>> {
        let mut bits = vec![0; self.bytes as usize];
        self.file.read_exact_at(&mut bits, 0).context("log")?;
        let pages = bits.iter().zip(0u64..).flat_map(|(&byte, at)| {
            (0..8).filter_map(move |bit| (byte >> bit & 1 != 0).then_some(at * 8 + bit))
        });
        Ok(pages.collect())
    }

    /// Cleans it.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn clear(&self) -> Result<()> {
        let zeroes = vec![0; self.bytes as usize];
        self.file.write_all_at(&zeroes, 0).context("log")
    }
}
