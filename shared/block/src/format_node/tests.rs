//! A format in memory whose answers come from a table of 4 KiB clusters: every mapping, cached or
//! not, against a model.

use super::*;
use crate::cipher::{SECTOR, SectorCipher, Tweak};
use crate::edge::{EdgeSpec, Permissions};
use crate::format::{EncodedBytes, Fill, WritePlan};
use crate::memory::{Call, Memory as Disk};
use crate::node::{Discard, NodeOptions};
use crate::open::ChildRole;
use crate::root::Root;
use executor::sim::{Config, World};
use executor::sync::{RangeGuard, RangeLock};
use executor::{Executor, HeapBuffer};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

const CLUSTER: u64 = 4096;
const CLUSTERS: u64 = 32;
const SIZE: u64 = CLUSTER * CLUSTERS - 512;

/// What an encoded cluster reads as.
fn decoded(descriptor: u64, offset: u64) -> u8 {
    (descriptor + offset % 251) as u8
}

struct Toy {
    file: Edge,
    backing: Option<Edge>,
    table: Mutex<Vec<Mapping>>,
    next_host: AtomicUsize,
    clusters: RangeLock,
    aborts: AtomicUsize,
    /// Lookups miss.
    cold: AtomicBool,
    lookups: AtomicUsize,
    changes: AtomicU64,
    cipher: Option<Mask>,
    /// Relies on new storage to read as zeroes.
    leaves_fresh: AtomicBool,
}

/// A cipher that is easily seen through: each sector is xored with a byte of its offset.
struct Mask(Tweak);

impl Mask {
    fn apply(&self, offset: u64, sectors: &mut [u8]) {
        assert!(offset.is_multiple_of(SECTOR as u64) && sectors.len().is_multiple_of(SECTOR));
        for (number, sector) in (offset / SECTOR as u64..).zip(sectors.chunks_mut(SECTOR)) {
            sector.iter_mut().for_each(|byte| *byte ^= number as u8 | 1);
        }
    }
}

impl SectorCipher for Mask {
    fn tweak(&self) -> Tweak {
        self.0
    }
    fn encrypt(&self, offset: u64, sectors: &mut [u8]) {
        self.apply(offset, sectors);
    }
    fn decrypt(&self, offset: u64, sectors: &mut [u8]) {
        self.apply(offset, sectors);
    }
}

struct Token<'a> {
    host: u64,
    changes: bool,
    _cluster: RangeGuard<'a>,
}

impl Toy {
    fn map(&self, range: ByteRange) -> Extent {
        let index = range.offset / CLUSTER;
        let within = range.offset % CLUSTER;
        let mapping = match self.table.lock().unwrap()[index as usize] {
            Mapping::Data(host) => Mapping::Data(host + within),
            other => other,
        };
        Extent {
            length: range.length.min(CLUSTER - within),
            mapping,
            in_place: matches!(mapping, Mapping::Data(_)),
        }
    }
    fn set(&self, offset: u64, mapping: Mapping) {
        self.table.lock().unwrap()[(offset / CLUSTER) as usize] = mapping;
        self.changes.fetch_add(1, Ordering::Release);
    }
}

impl Format for Toy {
    type Token<'a> = Token<'a>;
    fn name(&self) -> &'static str {
        "toy"
    }
    fn virtual_size(&self) -> u64 {
        SIZE
    }
    fn limits(&self) -> Limits {
        Limits {
            optimal_transfer: CLUSTER as u32,
            zero_alignment: CLUSTER as u32,
            ..Limits::default()
        }
    }
    fn file(&self) -> &Edge {
        &self.file
    }
    fn data(&self) -> &Edge {
        &self.file
    }
    fn backing(&self) -> Option<&Edge> {
        self.backing.as_ref()
    }
    fn lookup(&self, range: ByteRange) -> Lookup {
        self.lookups.fetch_add(1, Ordering::Relaxed);
        match self.cold.load(Ordering::Relaxed) {
            true => Lookup::Miss,
            false => Lookup::Hit(self.map(range)),
        }
    }
    fn changes(&self) -> Option<u64> {
        Some(self.changes.load(Ordering::Acquire))
    }
    async fn resolve(&self, range: ByteRange) -> std::result::Result<Extent, Errno> {
        executor::time::yield_now().await;
        Ok(self.map(range))
    }
    async fn prepare_write(
        &self,
        range: ByteRange,
    ) -> std::result::Result<WritePlan<Token<'_>>, Errno> {
        let within = range.offset % CLUSTER;
        let start = range.offset - within;
        let cluster = self.clusters.lock(start..start + CLUSTER).await;
        let length = range.length.min(CLUSTER - within);
        let old = self.map(ByteRange::new(start, CLUSTER)).mapping;
        let (host, changes) = match old {
            Mapping::Data(host) => (host, false),
            _ => {
                let next = self.next_host.fetch_add(1, Ordering::Relaxed) as u64;
                (next * CLUSTER, true)
            }
        };
        let fill = |length| match old {
            _ if length == 0 => Fill::Nothing,
            Mapping::Data(_) => Fill::Nothing,
            // The toy's storage is new and reads as zeroes beyond what was written.
            Mapping::Zero(_)
                if self.cipher.is_none() && self.leaves_fresh.load(Ordering::Relaxed) =>
            {
                Fill::Nothing
            }
            Mapping::Zero(_) => Fill::Zeroes(length),
            _ => Fill::Copy(length),
        };
        Ok(WritePlan {
            range: ByteRange::new(range.offset, length),
            host_offset: host + within,
            head: fill(within),
            tail: fill(CLUSTER - within - length),
            token: Token {
                host,
                changes,
                _cluster: cluster,
            },
        })
    }
    async fn commit<'a>(&'a self, plan: WritePlan<Token<'a>>) -> std::result::Result<(), Errno> {
        if plan.token.changes {
            self.set(plan.range.offset, Mapping::Data(plan.token.host));
        }
        Ok(())
    }
    async fn abort<'a>(&'a self, _plan: WritePlan<Token<'a>>) {
        self.aborts.fetch_add(1, Ordering::Relaxed);
    }
    async fn write_zeroes(
        &self,
        range: ByteRange,
        _flags: ZeroFlags,
    ) -> std::result::Result<u64, Errno> {
        if !range.offset.is_multiple_of(CLUSTER) || range.length < CLUSTER {
            return Err(Errno::EOPNOTSUPP);
        }
        let _cluster = self
            .clusters
            .lock(range.offset..range.offset + CLUSTER)
            .await;
        self.set(range.offset, Mapping::Zero(None));
        Ok(CLUSTER)
    }
    async fn discard(&self, _range: ByteRange) -> std::result::Result<(), Errno> {
        Ok(())
    }
    async fn read_encoded(
        &self,
        offset: u64,
        descriptor: u64,
        buffer: Buffer,
    ) -> std::result::Result<(), Errno> {
        let bytes: Vec<u8> = (offset..offset + buffer.len() as u64)
            .map(|at| decoded(descriptor, at))
            .collect();
        buffer.copy_from_slice(&bytes);
        Ok(())
    }
    fn can_encode(&self) -> bool {
        self.cipher.is_none()
    }
    /// Knows how to store what [`decoded`] makes.
    async fn encode(
        &self,
        range: ByteRange,
        buffer: Buffer,
    ) -> std::result::Result<Option<EncodedBytes>, Errno> {
        let bytes = buffer.to_heap();
        let fits = |descriptor: &u64| {
            let pairs = (range.offset..).zip(bytes.iter());
            pairs
                .into_iter()
                .all(|(at, byte)| decoded(*descriptor, at) == *byte)
        };
        let found = (0..CLUSTERS).find(fits);
        Ok(found.map(|descriptor| EncodedBytes {
            memory: HeapBuffer::from(&descriptor.to_le_bytes()[..]),
            length: 8,
        }))
    }
    async fn store_encoded(
        &self,
        range: ByteRange,
        bytes: EncodedBytes,
    ) -> std::result::Result<(), Errno> {
        let end = range.offset + CLUSTER;
        let _cluster = self.clusters.lock(range.offset..end).await;
        let descriptor = u64::from_le_bytes(bytes.memory[..bytes.length].try_into().unwrap());
        self.set(range.offset, Mapping::Encoded(descriptor));
        Ok(())
    }
    fn cipher(&self) -> Option<&dyn SectorCipher> {
        self.cipher.as_ref().map(|mask| mask as &dyn SectorCipher)
    }
    async fn flush(&self) -> std::result::Result<(), Errno> {
        self.file.node().flush().await
    }
    fn metadata_dirty(&self) -> bool {
        false
    }
    async fn resize(&self, _resize: Resize) -> Result<()> {
        Ok(())
    }
    async fn close(&self) -> std::result::Result<(), Errno> {
        Ok(())
    }
    fn describe(&self) -> Map<String, Value> {
        Map::new()
    }
}

struct Rig {
    disk: Disk,
    toy: FormatNode<Toy>,
    model: Vec<u8>,
}

fn edge(disk: &Disk, name: &'static str, role: ChildRole) -> Edge {
    let options = NodeOptions {
        node_name: name.to_owned(),
        discard: Discard::Unmap,
        ..NodeOptions::default()
    };
    let node = Node::new(options, Box::new(disk.clone()));
    let spec = EdgeSpec {
        parent: "toy".to_owned(),
        name,
        role,
        read_only: false,
    };
    Edge::attach(&node, spec).unwrap()
}

/// A disk whose clusters are mapped at random, over a backing that ends before it.
fn rig(random: &mut SmallRng) -> Rig {
    encrypted_rig(random, None)
}

fn encrypted_rig(random: &mut SmallRng, cipher: Option<Mask>) -> Rig {
    let mut base = vec![0; (SIZE / 2 + 700) as usize];
    random.fill_bytes(&mut base);
    let mut disk = Disk::new(Vec::new());
    disk.grows = true;
    disk.delay = std::time::Duration::from_micros(random.random_range(0..2));
    let mut model = base.clone();
    model.resize(SIZE as usize, 0);
    let mut table = Vec::new();
    for index in 0..CLUSTERS {
        let span = (index * CLUSTER) as usize..((index + 1) * CLUSTER).min(SIZE) as usize;
        table.push(match random.random_range(0..4) {
            0 => Mapping::Unallocated,
            1 => {
                model[span].fill(0);
                Mapping::Zero(None)
            }
            _ => {
                for at in span {
                    model[at] = decoded(index, at as u64);
                }
                Mapping::Encoded(index)
            }
        });
    }
    let toy = FormatNode::new(Toy {
        file: edge(&disk, "file", ChildRole::Image),
        backing: Some(edge(&Disk::new(base), "backing", ChildRole::Backing)),
        table: Mutex::new(table),
        next_host: AtomicUsize::new(0),
        clusters: RangeLock::new(),
        aborts: AtomicUsize::new(0),
        cold: AtomicBool::new(random.random()),
        lookups: AtomicUsize::new(0),
        changes: AtomicU64::new(0),
        cipher,
        leaves_fresh: AtomicBool::new(random.random()),
    });
    Rig { disk, toy, model }
}

fn run<F: Future>(future: F) -> F::Output {
    Executor::simulated(&World::new(Config::default())).block_on(future)
}

async fn step(rig: &mut Rig, random: &mut SmallRng) {
    let grain = match rig.toy.format().cipher() {
        Some(_) => SECTOR as u64,
        None => 1,
    };
    let length = (random.random_range(1..5 * CLUSTER / grain) * grain).min(SIZE) as usize;
    let offset = random.random_range(0..=(SIZE - length as u64) / grain) * grain;
    let span = offset as usize..offset as usize + length;
    let buffer = Buffer::zeroed(length);
    if random.random() {
        rig.toy.prefetch(offset);
    }
    match random.random_range(0..4) {
        0 | 1 => {
            random.fill_bytes(&mut rig.model[span.clone()]);
            buffer.copy_from_slice(&rig.model[span]);
            let write = rig.toy.write(offset, buffer, WriteFlags::default());
            write.await.unwrap();
        }
        2 => {
            rig.model[span].fill(0);
            let range = ByteRange::new(offset, length as u64);
            let zero = rig.toy.write_zeroes(range, ZeroFlags::default());
            zero.await.unwrap();
        }
        _ => {
            buffer.fill(0xaa);
            rig.toy.read(offset, buffer.clone()).await.unwrap();
            assert!(buffer.to_heap()[..] == rig.model[span]);
        }
    }
}

#[test]
fn every_mapping_reads_and_writes_like_the_model() {
    for seed in 0..60 {
        println!("seed {seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        let mut rig = rig(&mut random);
        run(async {
            for _ in 0..40 {
                step(&mut rig, &mut random).await;
            }
            let whole = Buffer::zeroed(SIZE as usize);
            rig.toy.read(0, whole.clone()).await.unwrap();
            assert!(whole.to_heap()[..] == rig.model);
        });
    }
}

#[test]
fn neighbours_in_a_cluster_are_written_at_once_and_both_stay() {
    for seed in 0..20 {
        println!("seed {seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        let rig = rig(&mut random);
        let options = NodeOptions::default();
        let node = Node::new(options, Box::new(rig.toy));
        let root = Root::new("", &node, Permissions::READ_WRITE, Permissions::ALL).unwrap();
        run(async {
            let tasks: Vec<_> = (0..SIZE / 512)
                .map(|sector| {
                    let root = root.attach();
                    executor::spawn(async move {
                        let data = Buffer::zeroed(512);
                        data.fill(sector as u8);
                        let write = root.write(sector * 512, data, WriteFlags::default());
                        write.await.unwrap();
                    })
                })
                .collect();
            for task in tasks {
                task.await;
            }
            let whole = Buffer::zeroed(SIZE as usize);
            root.attach().read(0, whole.clone()).await.unwrap();
            let bytes = whole.to_heap();
            for (sector, bytes) in bytes.chunks(512).enumerate() {
                assert!(bytes.iter().all(|byte| *byte == sector as u8), "{sector}");
            }
        });
    }
}

#[test]
fn a_failed_write_is_aborted_and_changes_nothing() {
    let mut random = SmallRng::seed_from_u64(7);
    let rig = rig(&mut random);
    run(async {
        rig.toy.format().set(0, Mapping::Encoded(3));
        rig.disk.arrange(Err(Errno::ENOSPC));
        let data = Buffer::zeroed(512);
        let write = rig.toy.write(512, data, WriteFlags::default());
        assert_eq!(write.await, Err(Errno::ENOSPC));
        assert_eq!(rig.toy.format().aborts.load(Ordering::Relaxed), 1);
        let buffer = Buffer::zeroed(1);
        rig.toy.read(512, buffer.clone()).await.unwrap();
        assert_eq!(buffer.to_heap()[0], decoded(3, 512));
    });
}

#[test]
fn a_plain_extent_is_one_request_to_the_child() {
    let mut random = SmallRng::seed_from_u64(8);
    let rig = rig(&mut random);
    run(async {
        rig.toy.format().cold.store(false, Ordering::Relaxed);
        rig.toy.format().set(CLUSTER, Mapping::Data(0));
        let flags = WriteFlags::default();
        let data = Buffer::zeroed(1024);
        rig.toy.write(CLUSTER + 512, data, flags).await.unwrap();
        let data = Buffer::zeroed(1024);
        rig.toy.read(CLUSTER + 512, data).await.unwrap();
        let calls = rig.disk.calls();
        assert_eq!(calls, [Call::Write(512, 1024), Call::Read(512, 1024)]);
        // A partial write of a new cluster is one write, too: the zeroes come along ...
        rig.toy
            .format()
            .leaves_fresh
            .store(false, Ordering::Relaxed);
        rig.toy.format().set(2 * CLUSTER, Mapping::Zero(None));
        let data = Buffer::zeroed(512);
        rig.toy.write(2 * CLUSTER + 512, data, flags).await.unwrap();
        assert_eq!(rig.disk.calls(), [Call::Write(0, CLUSTER)]);
        // ... unless the storage holds them already.
        rig.toy.format().leaves_fresh.store(true, Ordering::Relaxed);
        rig.toy.format().set(3 * CLUSTER, Mapping::Zero(None));
        let data = Buffer::zeroed(512);
        rig.toy.write(3 * CLUSTER + 512, data, flags).await.unwrap();
        assert_eq!(rig.disk.calls(), [Call::Write(CLUSTER + 512, 512)]);
    });
}

#[test]
fn an_encrypted_disk_reads_like_the_model_and_stores_cipher_text() {
    for (seed, tweak) in (0..40).zip([Tweak::GuestOffset, Tweak::HostOffset].into_iter().cycle()) {
        println!("seed {seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        let mut rig = encrypted_rig(&mut random, Some(Mask(tweak)));
        run(async {
            for _ in 0..40 {
                step(&mut rig, &mut random).await;
            }
            let whole = Buffer::zeroed(SIZE as usize);
            rig.toy.read(0, whole.clone()).await.unwrap();
            assert!(whole.to_heap()[..] == rig.model);
            let table = rig.toy.format().table.lock().unwrap().clone();
            for (guest, mapping) in (0..SIZE).step_by(CLUSTER as usize).zip(table) {
                let Mapping::Data(host) = mapping else {
                    continue;
                };
                let stored = Buffer::zeroed(SECTOR);
                rig.disk.read(host, stored.clone()).await.unwrap();
                let mut plain = rig.model[guest as usize..][..SECTOR].to_vec();
                Mask(tweak).apply(
                    match tweak {
                        Tweak::GuestOffset => guest,
                        Tweak::HostOffset => host,
                    },
                    &mut plain,
                );
                assert!(stored.to_heap()[..] == plain, "guest offset {guest:#x}");
            }
        });
    }
}

#[test]
fn an_encrypted_write_leaves_the_buffer_as_it_was() {
    let mut random = SmallRng::seed_from_u64(9);
    let rig = encrypted_rig(&mut random, Some(Mask(Tweak::HostOffset)));
    run(async {
        rig.toy.format().set(0, Mapping::Data(0));
        let data = Buffer::zeroed(300 << 10);
        let longer = data.slice(0..3 * SECTOR);
        longer.fill(0x5a);
        let write = rig.toy.write(512, longer.clone(), WriteFlags::default());
        write.await.unwrap();
        assert!(longer.to_heap().iter().all(|byte| *byte == 0x5a));
    });
}

#[test]
fn a_compressed_write_stores_what_gets_smaller_and_writes_the_rest() {
    let mut random = SmallRng::seed_from_u64(10);
    let mut rig = rig(&mut random);
    let compressed = WriteFlags {
        compressed: true,
        ..WriteFlags::default()
    };
    run(async {
        // Two clusters that can be encoded, one that cannot, and the disk's short last one.
        for (index, descriptor) in [(4, Some(7)), (5, Some(8)), (6, None), (31, Some(2))] {
            for at in index * CLUSTER..((index + 1) * CLUSTER).min(SIZE) {
                rig.model[at as usize] = match descriptor {
                    Some(descriptor) => decoded(descriptor, at),
                    None => (at / 100) as u8,
                };
            }
        }
        for span in [4 * CLUSTER..7 * CLUSTER, 31 * CLUSTER..SIZE] {
            let bytes = &rig.model[span.start as usize..span.end as usize];
            let write = rig.toy.write(span.start, bytes.into(), compressed);
            write.await.unwrap();
        }
        let table = rig.toy.format().table.lock().unwrap().clone();
        let (four, five) = (Mapping::Encoded(7), Mapping::Encoded(8));
        assert_eq!(
            (table[4], table[5], table[31]),
            (four, five, Mapping::Encoded(2))
        );
        assert!(matches!(table[6], Mapping::Data(_)));
        let whole = Buffer::zeroed(SIZE as usize);
        rig.toy.read(0, whole.clone()).await.unwrap();
        assert!(whole.to_heap()[..] == rig.model);
        for (offset, length) in [(512, CLUSTER), (0, 512), (CLUSTER, CLUSTER + 512)] {
            let data = Buffer::zeroed(length as usize);
            let write = rig.toy.write(offset, data, compressed);
            assert_eq!(write.await, Err(Errno::EINVAL), "{offset} {length}");
        }
    });
}

#[test]
fn a_node_that_does_not_compress_says_so() {
    let mut random = SmallRng::seed_from_u64(11);
    let rig = encrypted_rig(&mut random, Some(Mask(Tweak::GuestOffset)));
    let node = Node::new(NodeOptions::default(), Box::new(rig.toy));
    run(async {
        let compressed = WriteFlags {
            compressed: true,
            ..WriteFlags::default()
        };
        let data = Buffer::zeroed(CLUSTER as usize);
        assert_eq!(
            node.write(0, data, compressed).await,
            Err(Errno::EOPNOTSUPP)
        );
    });
}

#[test]
fn an_announced_request_is_looked_up_once_until_the_mapping_changes() {
    run(async {
        let rig = rig(&mut SmallRng::seed_from_u64(1));
        let (toy, flags) = (&rig.toy, WriteFlags::default());
        toy.format().cold.store(false, Ordering::Relaxed);
        let data = Buffer::zeroed(3 * CLUSTER as usize);
        data.fill(7);
        toy.write(CLUSTER, data, flags).await.unwrap();
        let lookups = || toy.format().lookups.load(Ordering::Relaxed);
        let buffer = Buffer::zeroed(CLUSTER as usize);
        let read = async |offset: u64, expected: u8| {
            let before = lookups();
            toy.read(offset, buffer.clone()).await.unwrap();
            let content = buffer.slice(0..CLUSTER as usize).to_heap();
            assert!(content.iter().all(|byte| *byte == expected));
            lookups() - before
        };
        toy.prefetch(CLUSTER);
        toy.prefetch(2 * CLUSTER);
        assert_eq!(read(CLUSTER, 7).await, 0);
        assert_eq!(read(2 * CLUSTER, 7).await, 0);
        assert_eq!(read(3 * CLUSTER, 7).await, 1, "not announced");

        let before = lookups();
        let one = Buffer::zeroed(512);
        one.fill(7);
        toy.write(2 * CLUSTER, one, flags).await.unwrap();
        assert_eq!(lookups(), before, "an announced write in place");

        let zeroes = ByteRange::new(2 * CLUSTER, CLUSTER);
        toy.write_zeroes(zeroes, ZeroFlags::default())
            .await
            .unwrap();
        assert_eq!(read(2 * CLUSTER, 0).await, 1, "the mapping has changed");
        assert_eq!(read(CLUSTER, 7).await, 1);

        let other = self::rig(&mut SmallRng::seed_from_u64(2)).toy;
        toy.prefetch(CLUSTER);
        let before = other.format().lookups.load(Ordering::Relaxed);
        other.read(CLUSTER, buffer.clone()).await.unwrap();
        assert_ne!(
            before,
            other.format().lookups.load(Ordering::Relaxed),
            "another node"
        );
    });
}
