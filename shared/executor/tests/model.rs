//! Random file operations give the same bytes on every kind of file as on a byte vector.
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(
    unsafe_code,
    reason = "scattered buffers name their memory by pointers"
)]

use executor::buffer::IoVecs;
use executor::file::Fallocate;
use executor::sim::{self, World};
use executor::{Buffer, Config, Errno, Executor, File, OpenOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::rc::Rc;

const FILE_MAX: usize = 300_000;

/// A file and what must be in it. Offsets and lengths are multiples of `unit` bytes.
struct Subject {
    file: File,
    model: Vec<u8>,
    unit: usize,
    random: SmallRng,
}

impl Subject {
    fn range(&mut self) -> (usize, usize) {
        let units = FILE_MAX / self.unit;
        let start = self.random.random_range(0..units);
        let len = self
            .random
            .random_range(0..=(units - start).min(100_000 / self.unit));
        (start * self.unit, len * self.unit)
    }

    /// A buffer of `len` bytes: one piece, a slice of one, or scattered.
    fn buffer(&mut self, len: usize) -> Buffer {
        let unit = self.unit;
        match self.random.random_range(0..3) {
            0 => Buffer::zeroed(len),
            1 => Buffer::zeroed(len + 2 * unit).slice(unit..unit + len),
            _ => {
                let memory = Buffer::zeroed(2 * len + unit);
                let mut iovecs = IoVecs::new();
                let mut left = len;
                let mut at = 0;
                while left > 0 {
                    let piece = (self.random.random_range(1..=32) * unit).min(left);
                    // SAFETY: `at + piece` is at most twice `len`; `memory` is the owner.
                    memory.for_each_piece(|base, _| unsafe { iovecs.push(base.add(at), piece) });
                    at += 2 * piece;
                    left -= piece;
                }
                iovecs.set_owner(Rc::new(memory));
                Buffer::from_iovecs(Rc::new(iovecs))
            }
        }
    }

    async fn write(&mut self) {
        let (start, len) = self.range();
        let buffer = self.buffer(len);
        let byte = self.random.random();
        buffer.fill(byte);
        self.file.write_at(buffer, start as u64).await.unwrap();
        if len > 0 {
            self.model.resize(self.model.len().max(start + len), 0);
            self.model[start..start + len].fill(byte);
        }
    }

    async fn read(&mut self) {
        let (start, len) = self.range();
        let buffer = self.buffer(len);
        buffer.fill(0xee);
        self.file
            .read_at(buffer.clone(), start as u64)
            .await
            .unwrap();
        let mut expected = vec![0; len];
        let from = &self.model[start.min(self.model.len())..];
        let present = from.len().min(len);
        expected[..present].copy_from_slice(&from[..present]);
        assert!(*buffer.to_heap() == expected[..]);
    }

    async fn allocate(&mut self) {
        let (start, len) = self.range();
        let modes = [
            Fallocate::Allocate,
            Fallocate::PunchHole,
            Fallocate::ZeroRange,
        ];
        let mode = modes[self.random.random_range(0..3)];
        match self.file.fallocate(mode, start as u64, len as u64).await {
            Err(Errno::EOPNOTSUPP) => {}
            Err(errno) => panic!("{mode:?} failed: {errno}"),
            Ok(()) if len == 0 => {}
            Ok(()) if mode == Fallocate::Allocate => {
                self.model.resize(self.model.len().max(start + len), 0);
            }
            Ok(()) => {
                let end = self.model.len().min(start + len);
                if start < end {
                    self.model[start..end].fill(0);
                }
            }
        }
    }

    async fn run(mut self, steps: usize) {
        for _ in 0..steps {
            match self.random.random_range(0..10) {
                0..4 => self.write().await,
                4..7 => self.read().await,
                7 => self.allocate().await,
                8 => self.file.sync_data().await.unwrap(),
                _ => {
                    let (len, _) = self.range();
                    self.file.set_len(len as u64).await.unwrap();
                    self.model.resize(len, 0);
                }
            }
            assert_eq!(self.file.len().unwrap(), self.model.len() as u64);
            self.holes_are_zero();
        }
    }

    /// What `next_data` skips must be zeroes.
    fn holes_are_zero(&self) {
        let mut at = 0;
        while let Some((start, end)) = self.file.next_data(at).unwrap() {
            let skipped = &self.model[at as usize..start as usize];
            assert!(end > start && skipped.iter().all(|&byte| byte == 0));
            at = end;
        }
        assert!(self.model[at as usize..].iter().all(|&byte| byte == 0));
    }
}

fn check(executor: &Executor, path: &Path, direct: bool) {
    let random = SmallRng::from_os_rng().random();
    eprintln!("seed {random} for {} (direct: {direct})", path.display());
    let options = OpenOptions {
        write: true,
        create: true,
        direct,
        ..OpenOptions::default()
    };
    let file = match File::open(path, &options) {
        Ok(file) => file,
        Err(error) if direct => return eprintln!("skipped: no O_DIRECT here, {error}"),
        Err(error) => panic!("{error}"),
    };
    let alignment = file.alignment();
    let subject = Subject {
        file,
        model: Vec::new(),
        unit: alignment.offset.max(alignment.memory),
        random: SmallRng::seed_from_u64(random),
    };
    executor.block_on(subject.run(300));
}

#[test]
fn files_in_memory_match_the_model() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let executor = Executor::new(&Config::default()).unwrap();
    check(&executor, &directory.path().join("file"), false);
}

#[test]
fn files_on_disk_match_the_model() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let executor = Executor::new(&Config::default()).unwrap();
    check(&executor, &directory.path().join("buffered"), false);
    check(&executor, &directory.path().join("direct"), true);
}

#[test]
fn simulated_files_match_the_model() {
    for short_transfers in [false, true] {
        let world = World::new(sim::Config {
            seed: SmallRng::from_os_rng().random(),
            short_transfers,
            ..sim::Config::default()
        });
        check(&Executor::simulated(&world), Path::new("file"), false);
    }
}
