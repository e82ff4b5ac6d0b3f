//! Mapped files against other users of the same file.

use super::*;
use crate::file::{Fallocate, File, OpenOptions};
use crate::{Config, Executor};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

/// A file on tmpfs with `len` bytes of data, opened twice.
struct Rig {
    path: PathBuf,
    _directory: tempfile::TempDir,
    other: std::fs::File,
    file: File,
    executor: Executor,
}

const LEN: usize = 4 * GRANULE;

fn rig() -> Rig {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, vec![0x11; LEN]).unwrap();
    let options = OpenOptions {
        write: true,
        ..OpenOptions::default()
    };
    let executor = Executor::new(&Config::default()).unwrap();
    Rig {
        file: File::open(&path, &options).unwrap(),
        other: std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap(),
        path,
        _directory: directory,
        executor,
    }
}

impl Rig {
    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let buffer = Buffer::zeroed(len);
        buffer.fill(0xee);
        let read = self.file.read_at(buffer.clone(), offset);
        self.executor.block_on(read).unwrap();
        buffer.to_heap().to_vec()
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.executor
            .block_on(self.file.write_at(Buffer::from(bytes), offset))
    }

    /// Uses a granule until it is admitted.
    fn warm(&self, offset: u64) {
        self.read(offset, 1);
        assert!(self.mapped(offset), "granule at {offset} is not admitted");
    }

    fn mapped(&self, offset: u64) -> bool {
        let mappings = self.file.mappings().unwrap();
        mappings.transfer(&Buffer::zeroed(1), offset, Direction::Read)
    }

    fn blocks(&self) -> u64 {
        std::fs::metadata(&self.path).unwrap().blocks()
    }
}

#[test]
fn mapped_transfers_and_those_of_others_see_each_other() {
    let rig = rig();
    for granule in 0..4 {
        rig.warm(granule * GRANULE as u64);
    }
    rig.write(GRANULE as u64 - 3, b"abcdef").unwrap();
    let mut seen = [0; 6];
    rig.other
        .read_exact_at(&mut seen, GRANULE as u64 - 3)
        .unwrap();
    assert_eq!(&seen, b"abcdef");
    rig.other
        .write_all_at(b"xyz", 2 * GRANULE as u64 - 1)
        .unwrap();
    assert_eq!(rig.read(2 * GRANULE as u64 - 2, 5), b"\x11xyz\x11");
}

#[test]
fn long_writes_are_seen_by_others_with_what_is_beside_them() {
    let rig = rig();
    for granule in 0..4 {
        rig.warm(granule * GRANULE as u64);
    }
    let bytes: Vec<u8> = (0..STREAMED_BYTES + 11)
        .map(|at| (at % 251) as u8)
        .collect();
    let mappings = rig.file.mappings().unwrap();
    assert!(mappings.transfer(&Buffer::from(&bytes[..]), 4095, Direction::Write));
    let mut seen = vec![0; bytes.len() + 2];
    rig.other.read_exact_at(&mut seen, 4094).unwrap();
    assert_eq!(seen, [&[0x11], &bytes[..], &[0x11]].concat());
}

#[test]
fn what_is_written_as_a_whole_is_mapped_at_once_unless_it_shrank_meanwhile() {
    let rig = rig();
    rig.write(2 * GRANULE as u64 - 1, &[3; GRANULE + 1])
        .unwrap();
    assert!(rig.mapped(2 * GRANULE as u64) && !rig.mapped(GRANULE as u64));
    let mappings = rig.file.mappings().unwrap();
    let before = mappings.shrinks();
    rig.executor
        .block_on(rig.file.set_len(GRANULE as u64))
        .unwrap();
    let fd = rig.file.as_fd().unwrap();
    let done = Done {
        offset: 2 * GRANULE as u64,
        len: GRANULE,
        direction: Direction::Write,
        shrinks: before,
    };
    mappings.consider(fd, &done);
    assert!(!rig.mapped(2 * GRANULE as u64));
}

#[test]
fn granules_at_the_ends_of_long_writes_are_mapped_once_they_are_there() {
    let rig = rig();
    let long = vec![5; 2 * GRANULE];
    for _ in 0..WRITES_BEFORE_LOOK {
        assert!(!rig.mapped(512) && !rig.mapped(2 * GRANULE as u64));
        rig.write(512, &long).unwrap();
    }
    assert!(rig.mapped(512) && rig.mapped(2 * GRANULE as u64));
}

#[test]
fn a_granule_that_is_written_in_parts_is_mapped_after_some_writes() {
    let rig = rig();
    for number in 0..u64::from(WRITES_BEFORE_LOOK) {
        let mappings = rig.file.mappings().unwrap();
        let mapped = mappings.transfer(&Buffer::zeroed(1), 4096, Direction::Read);
        assert!(!mapped, "after {number} writes");
        rig.write(4096 + 10 * number, &[7; 10]).unwrap();
    }
    assert!(rig.mapped(4096));
}

#[test]
fn a_prefetch_of_any_offset_changes_nothing() {
    let rig = rig();
    rig.warm(0);
    rig.other.set_len(GRANULE as u64).unwrap();
    let before = rig.blocks();
    for offset in [0, GRANULE as u64, LEN as u64, 1 << 40, u64::MAX] {
        rig.file.prefetch(offset);
    }
    assert_eq!(rig.blocks(), before);
    assert!(rig.mapped(0));
}

#[test]
fn reading_a_hole_allocates_nothing() {
    let rig = rig();
    rig.other.set_len(0).unwrap();
    rig.other.set_len(LEN as u64).unwrap();
    rig.other.write_all_at(&[1; GRANULE], 0).unwrap();
    let before = rig.blocks();
    for _ in 0..300 {
        assert_eq!(rig.read(GRANULE as u64, 8), [0; 8]);
    }
    assert_eq!(rig.blocks(), before);
    assert!(!rig.mapped(GRANULE as u64));
}

#[test]
fn own_holes_are_not_filled_by_the_mapping() {
    let rig = rig();
    rig.warm(0);
    rig.warm(GRANULE as u64);
    let punched = rig.file.fallocate(Fallocate::PunchHole, 0, GRANULE as u64);
    rig.executor.block_on(punched).unwrap();
    let before = rig.blocks();
    assert!(!rig.mapped(0) && rig.mapped(GRANULE as u64));
    assert_eq!(rig.read(0, 4), [0; 4]);
    assert_eq!(rig.blocks(), before);
}

#[test]
fn a_file_that_ends_within_a_granule_grows_by_writes() {
    let rig = rig();
    rig.other.set_len(100).unwrap();
    for _ in 0..300 {
        rig.read(0, 8);
    }
    assert!(!rig.mapped(0));
    rig.write(200, b"end").unwrap();
    assert_eq!(rig.file.len().unwrap(), 203);
    assert_eq!(rig.read(198, 6), b"\0\0end\0");
}

#[test]
fn truncation_by_others_is_survived() {
    let rig = rig();
    rig.warm(2 * GRANULE as u64);
    rig.other.set_len(GRANULE as u64).unwrap();
    // Past the end there are zeroes, and a write makes the file longer: as without a mapping.
    assert_eq!(rig.read(2 * GRANULE as u64, 5), [0; 5]);
    rig.write(2 * GRANULE as u64, b"new").unwrap();
    let mut seen = [0; 3];
    rig.other
        .read_exact_at(&mut seen, 2 * GRANULE as u64)
        .unwrap();
    assert_eq!(&seen, b"new");
    assert!(!rig.mapped(0));
}

#[test]
fn own_truncation_keeps_the_mapping() {
    let rig = rig();
    rig.warm(0);
    rig.warm(3 * GRANULE as u64);
    rig.executor
        .block_on(rig.file.set_len(2 * GRANULE as u64))
        .unwrap();
    assert_eq!(rig.read(3 * GRANULE as u64, 2), [0; 2]);
    rig.executor.block_on(rig.file.set_len(LEN as u64)).unwrap();
    rig.write(3 * GRANULE as u64, &[7; GRANULE]).unwrap();
    rig.warm(3 * GRANULE as u64);
    assert_eq!(rig.read(3 * GRANULE as u64, 2), [7; 2]);
    assert!(rig.mapped(0));
}

#[test]
fn a_flush_sets_the_time_of_modification() {
    let rig = rig();
    rig.warm(0);
    let old = TimeSpec::new(1000, 0);
    nix::sys::stat::futimens(&rig.other, &old, &old).unwrap();
    rig.write(5, b"x").unwrap();
    rig.executor.block_on(rig.file.sync_data()).unwrap();
    let metadata = rig.other.metadata().unwrap();
    assert!(metadata.mtime() > 1000);
    assert_eq!(metadata.atime(), 1000);
}

#[test]
fn a_file_that_is_open_for_reading_only_is_not_written_through_the_mapping() {
    let rig = rig();
    let file = File::open(&rig.path, &OpenOptions::default()).unwrap();
    for _ in 0..3 {
        let read = file.read_at(Buffer::zeroed(8), 0);
        rig.executor.block_on(read).unwrap();
    }
    let write = file.write_at(Buffer::from(&b"x"[..]), 0);
    assert_eq!(rig.executor.block_on(write), Err(Errno::EBADF));
}

#[test]
fn far_parts_of_a_sparse_file_have_their_own_windows() {
    let rig = rig();
    let far = 1_u64 << 40;
    let collides = far + (WINDOWS << WINDOW_SHIFT);
    for offset in [far, collides] {
        rig.other.write_all_at(&[9; GRANULE], offset).unwrap();
        for _ in 0..3 {
            assert_eq!(rig.read(offset + 5, 3), [9; 3]);
        }
    }
    assert!(rig.mapped(far) && !rig.mapped(collides));
}
