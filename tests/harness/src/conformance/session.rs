//! One run of a subject in a world: open, work, close.

use super::Subject;
use super::history::{Content, History, Moment, SECTOR};
use block::graph::{Graph, NamePolicy};
use block::{Buffer, ByteRange, Permissions, Root, RootHandle, WriteFlags, ZeroFlags};
use executor::Executor;
use executor::sim::World;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::ops::Range;
use std::rc::Rc;

/// Writers at work at the same time.
const WRITERS: usize = 4;

/// Sectors in a row that belong to one writer: fewer than a cluster, so that writers meet there.
const STRIPE: usize = 5;

/// Most stripes of one request.
const MAX_SECTORS: usize = 96;

/// How the work is done.
#[derive(Clone, Copy)]
pub(super) struct Work {
    pub(super) seed: u64,
    /// Requests of each writer.
    pub(super) requests: usize,
    /// I/O may fail.
    pub(super) faults: bool,
}

/// Opens the subject in a world of files; `None` when it cannot be opened, with the reason.
pub(super) fn with_subject<T>(
    subject: &Subject,
    world: &World,
    work: impl AsyncFnOnce(&Graph, Root) -> T,
) -> Result<T, String> {
    with_subject_as((subject, false), world, work)
}

/// The same, opened for reading only if so asked.
pub(super) fn with_subject_as<T>(
    (subject, read_only): (&Subject, bool),
    world: &World,
    work: impl AsyncFnOnce(&Graph, Root) -> T,
) -> Result<T, String> {
    let mut definition = subject.definition.clone();
    if read_only {
        definition.insert("read-only".to_owned(), true.into());
    }
    Executor::simulated(world).block_on(async {
        let graph = Graph::new(&subject.tables, NamePolicy::default());
        (subject.prepare)(&graph);
        let node = graph.add(definition).await.map_err(|error| error.message)?;
        let permissions = match node.options().read_only {
            true => Permissions::READ,
            false => Permissions::READ_WRITE,
        };
        let root =
            Root::new("", &node, permissions, Permissions::ALL).map_err(|error| error.message)?;
        drop(node);
        Ok(work(&graph, root).await)
    })
}

/// Everything the subject holds.
pub(super) async fn read_all(root: &RootHandle) -> Result<Vec<u8>, String> {
    let length = usize::try_from(root.length()).map_err(|error| error.to_string())?;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        let piece = (length - bytes.len()).min(1 << 20);
        let buffer = Buffer::zeroed(piece);
        root.read(bytes.len() as u64, buffer.clone())
            .await
            .map_err(|errno| format!("read at {}: {errno}", bytes.len()))?;
        bytes.extend_from_slice(&buffer.to_heap());
    }
    Ok(bytes)
}

/// Runs the writers, which note in `history` what they do.
pub(super) async fn run_writers(root: &Root, world: &World, history: &Rc<History>, work: Work) {
    let writers: Vec<_> = (0..WRITERS)
        .map(|number| {
            let writer = Writer {
                root: root.attach(),
                world: world.clone(),
                history: Rc::clone(history),
                random: SmallRng::seed_from_u64(work.seed ^ (number as u64) << 32),
                number,
                next_tag: 0,
                faults: work.faults,
            };
            executor::spawn(writer.run(work.requests))
        })
        .collect();
    for writer in writers {
        writer.await;
    }
}

struct Writer {
    root: RootHandle,
    world: World,
    history: Rc<History>,
    random: SmallRng,
    number: usize,
    next_tag: u64,
    faults: bool,
}

impl Writer {
    async fn run(mut self, requests: usize) {
        for _ in 0..requests {
            match self.random.random_range(0..20) {
                0..10 => self.write().await,
                10..12 => self.zero().await,
                12..14 => self.discard().await,
                14..18 => self.read().await,
                _ => self.flush().await,
            }
        }
    }

    /// Sectors of this writer: within one of its stripes, or all of one.
    fn pick(&mut self) -> Range<usize> {
        let stripes = self.history.sectors() / STRIPE / WRITERS;
        let stripe = self.random.random_range(0..stripes) * WRITERS + self.number;
        let start = self.random.random_range(0..STRIPE);
        let end = self.random.random_range(start + 1..=STRIPE);
        stripe * STRIPE + start..stripe * STRIPE + end
    }

    /// A longer range: writer 0 also owns the rest of the disk beyond its middle.
    fn pick_any(&mut self) -> Range<usize> {
        let sectors = self.history.sectors();
        if self.number != 0 || self.random.random_bool(0.5) {
            return self.pick_low();
        }
        let start = self
            .random
            .random_range(sectors / 2 + STRIPE * WRITERS..sectors);
        let length = self.random.random_range(1..=MAX_SECTORS);
        start..(start + length).min(sectors)
    }

    fn pick_low(&mut self) -> Range<usize> {
        loop {
            let range = self.pick();
            if range.end <= self.history.sectors() / 2 {
                return range;
            }
        }
    }

    fn bytes(range: &Range<usize>) -> ByteRange {
        ByteRange::new((range.start * SECTOR) as u64, (range.len() * SECTOR) as u64)
    }

    fn end(&self, range: Range<usize>, result: Result<(), block::Errno>) {
        if let (Err(errno), false) = (result, self.faults) {
            panic!("a request failed without a fault: {errno}");
        }
        self.history.end(range, result.is_ok());
    }

    async fn write(&mut self) {
        let range = self.pick_any();
        self.next_tag += 1;
        let tag = (self.number as u64 + 1) << 56 | self.next_tag;
        let buffer = Buffer::zeroed(range.len() * SECTOR);
        buffer.copy_from_slice(&tag.to_le_bytes().repeat(range.len() * SECTOR / 8));
        let log_len = self.world.log_len();
        self.history
            .begin(range.clone(), Content::Tag(tag), log_len);
        let fua = self.random.random_bool(0.1);
        let offset = Self::bytes(&range).offset;
        let flags = WriteFlags {
            fua,
            ..WriteFlags::default()
        };
        let result = self.root.write(offset, buffer, flags).await;
        self.end(range, result);
    }

    async fn zero(&mut self) {
        let range = self.pick_any();
        let log_len = self.world.log_len();
        self.history.begin(range.clone(), Content::Zeroes, log_len);
        let flags = ZeroFlags {
            may_unmap: self.random.random(),
            ..ZeroFlags::default()
        };
        let result = self.root.write_zeroes(Self::bytes(&range), flags).await;
        self.end(range, result);
    }

    async fn discard(&mut self) {
        let range = self.pick_any();
        let log_len = self.world.log_len();
        self.history
            .begin(range.clone(), Content::Anything, log_len);
        let result = self.root.discard(Self::bytes(&range)).await;
        self.end(range, result);
    }

    async fn read(&mut self) {
        let range = self.pick_any();
        let buffer = Buffer::zeroed(range.len() * SECTOR);
        let offset = Self::bytes(&range).offset;
        match self.root.read(offset, buffer.clone()).await {
            Ok(()) => {
                let bytes = buffer.to_heap();
                let judged = self.history.judge(range.start, &bytes, Moment::Now);
                judged.unwrap_or_else(|violation| panic!("{violation}"));
            }
            Err(errno) => assert!(self.faults, "a read failed without a fault: {errno}"),
        }
    }

    async fn flush(&mut self) {
        let floors = self.history.floors();
        match self.root.flush().await {
            Ok(()) => self.history.flushed(floors, self.world.log_len()),
            Err(errno) => assert!(self.faults, "a flush failed without a fault: {errno}"),
        }
    }
}
