//! Writers that create files on the disk's file system and fsync each of them, as a mail server or a database log would.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use harness::transfer::fill;

use crate::load::Worker;
use crate::system::{DISK, run};

const MOUNT_POINT: &str = "/mnt";

/// Bounds the disk space that a long run needs: a name is used again after this many files of one writer.
const FILES_PER_WRITER: u64 = 256;

const SMALLEST_BYTES: u64 = 1000;
const LARGEST_BYTES: u64 = 128 << 10;

/// Mounts the disk and prepares that many writers, each with a directory of its own.
pub(crate) fn workers(count: u64) -> Result<Vec<Box<dyn Worker>>> {
    run("mount", &["-t", "ext4", DISK, MOUNT_POINT])?;
    (0..count)
        .map(|index| {
            let directory = Path::new(MOUNT_POINT).join(format!("writer-{index}"));
            fs::create_dir_all(&directory).context("create a writer's directory")?;
            let worker = Files {
                directory,
                next: 0,
                first_seed: index << 32,
            };
            Ok(Box::new(worker) as Box<dyn Worker>)
        })
        .collect()
}

struct Files {
    directory: PathBuf,
    /// Number of the next file; all below are written and synced.
    next: u64,
    first_seed: u64,
}

impl Files {
    fn path(&self, number: u64) -> PathBuf {
        self.directory.join((number % FILES_PER_WRITER).to_string())
    }

    /// What file `number` holds.
    fn content(&self, number: u64) -> Vec<u8> {
        let seed = self.first_seed + number;
        let spread = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let length = SMALLEST_BYTES + spread % (LARGEST_BYTES - SMALLEST_BYTES);
        let mut content = vec![0; length as usize];
        fill(seed, &mut content);
        content
    }
}

impl Worker for Files {
    fn step(&mut self) -> Result<u64> {
        let path = self.path(self.next);
        let content = self.content(self.next);
        let mut file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        file.write_all(&content)
            .with_context(|| format!("write {}", path.display()))?;
        file.sync_all()
            .with_context(|| format!("fsync {}", path.display()))?;
        self.next += 1;
        Ok(content.len() as u64)
    }

    fn forget_caches(&mut self) -> Result<()> {
        run("umount", &[MOUNT_POINT])?;
        fs::write("/proc/sys/vm/drop_caches", "3").context("drop caches")?;
        run("mount", &["-t", "ext4", "-o", "ro", DISK, MOUNT_POINT])
    }

    fn verify(&mut self) -> Result<u64> {
        let mut bytes = 0;
        for number in self.next.saturating_sub(FILES_PER_WRITER)..self.next {
            let path = self.path(number);
            let mut found = Vec::new();
            File::open(&path)
                .and_then(|mut file| file.read_to_end(&mut found))
                .with_context(|| format!("read {}", path.display()))?;
            ensure!(
                found == self.content(number),
                "{} is not as written",
                path.display()
            );
            bytes += found.len() as u64;
        }
        Ok(bytes)
    }
}
