//! The crate `blkio`, a front-end that nobody here wrote, gets from the daemon what it asks for.

#![expect(
    unsafe_code,
    reason = "the crate hands completions out as memory that may be uninitialised"
)]

use std::fs::{File, OpenOptions};
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use harness::process::Program;
use harness::rig::{Disk, Format, Rig};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const REGION: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// A started device and its memory.
struct Device {
    _blkio: Blkio,
    queues: Vec<Blkioq>,
    region: MemoryRegion,
    memory: File,
}

impl Device {
    fn connect(path: &Path, queues: i32) -> Result<Self> {
        let (blkio, queues, region) =
            Self::start(path, queues).map_err(|error| anyhow!("blkio: {error}"))?;
        let memory = format!("/proc/self/fd/{}", region.fd);
        let memory = OpenOptions::new().read(true).write(true).open(memory)?;
        Ok(Self {
            _blkio: blkio,
            queues,
            region,
            memory,
        })
    }

    fn start(path: &Path, queues: i32) -> blkio::Result<(Blkio, Vec<Blkioq>, MemoryRegion)> {
        let mut blkio = Blkio::new("virtio-blk-vhost-user")?;
        blkio.set_str("path", &path.display().to_string())?;
        blkio.connect()?;
        blkio.set_i32("num-queues", queues)?;
        let started = blkio.start()?;
        let region = blkio.alloc_mem_region(REGION)?;
        blkio.map_mem_region(&region)?;
        Ok((blkio, started.queues, region))
    }

    fn address(&self, at: usize) -> *mut u8 {
        (self.region.addr + at) as *mut u8
    }

    /// Waits for one request of a queue.
    fn complete(&mut self, queue: usize) -> Result<()> {
        let mut done = [MaybeUninit::<Completion>::uninit()];
        let mut left = PATIENCE;
        let count = self.queues[queue]
            .do_io(&mut done, 1, Some(&mut left), None)
            .map_err(|error| anyhow!("{error}"))?;
        ensure!(count == 1, "{count} completions");
        let [done] = done;
        // SAFETY: the crate says that it has filled one in.
        let done = unsafe { done.assume_init() };
        ensure!(done.ret == 0, "request failed with {}", done.ret);
        Ok(())
    }
}

#[test]
fn it_reads_what_it_wrote_on_several_queues() -> Result<()> {
    let mut rig = Rig::start(Disk::new(Program::OutboardBlkd, Format::Raw).queues(2, 2))?;
    let mut device = Device::connect(&rig.paths.socket, 2)?;
    let mut rng = SmallRng::seed_from_u64(31);
    let none = ReqFlags::empty();
    let mut expected = vec![0; REGION / 2];
    for round in 0..50 {
        let queue = round % 2;
        let len = rng.random_range(1..=64) * 512;
        let start = rng.random_range(0..=(expected.len() - len) / 512) * 512;
        let data: Vec<u8> = (0..len).map(|_| rng.random()).collect();
        device
            .memory
            .write_all_at(&data, device.region.fd_offset as u64)?;
        let buffer = device.address(0);
        device.queues[queue].write(start as u64, buffer, len, round, none);
        device.complete(queue)?;
        expected[start..start + len].copy_from_slice(&data);
        let buffer = device.address(REGION / 2);
        device.queues[1 - queue].read(start as u64, buffer, len, round, none);
        device.complete(1 - queue)?;
        let mut seen = vec![0; len];
        let at = device.region.fd_offset as u64 + REGION as u64 / 2;
        device.memory.read_exact_at(&mut seen, at)?;
        ensure!(seen == data, "round {round}: {len} bytes at {start} differ");
    }
    device.queues[0].write_zeroes(4096, 8192, 0, none);
    device.complete(0)?;
    expected[4096..12288].fill(0);
    device.queues[0].discard(1 << 20, 1 << 20, 0, none);
    device.complete(0)?;
    device.queues[1].flush(0, none);
    device.complete(1)?;
    let mut image = vec![0; expected.len()];
    let file = File::open(&rig.paths.image).context("the image")?;
    file.read_exact_at(&mut image, 0)?;
    ensure!(image == expected, "the image holds something else");
    drop(device);
    ensure!(rig.daemon.stop()?.success(), "SIGTERM");
    Ok(())
}
