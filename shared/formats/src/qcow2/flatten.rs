//! Turning zero clusters into what version 2 has: data, or no mapping where nothing would show.

use super::Qcow2;
use super::preallocate::Storage;
use super::tables::{
    COPIED, ClusterRun, GuestCluster, HostOffset, L2Entry, L2Kind, OFFSET_MASK, ZERO,
};
use super::{read_bytes, write_to};
use block::{ByteRange, Errno, Error, Format, Mapping, Preallocation, ZeroFlags};
use std::collections::BTreeMap;

impl Qcow2 {
    /// Whether a snapshot has what only version 3 can tell, for a disk of `size` bytes.
    pub(super) fn has_snapshot_beyond_version_2(&self, size: u64) -> bool {
        let state = self.state();
        let mut snapshots = state.snapshots.entries.iter().map(|entry| entry.info(size));
        snapshots.any(|info| info.vm_state_size != 0 || info.disk_size != size)
    }
}

/// Replaces every zero cluster of the disk and of its snapshots; durable when it resolves. Progress is
/// told in entries of L1 tables.
pub(super) async fn zero_clusters(
    image: &Qcow2,
    progress: &mut impl FnMut(u64, u64),
) -> Result<(), Error> {
    let snapshots = snapshot_tables(image).await?;
    let disk = image.l1.len();
    let total = disk + snapshots.len() as u64;
    for index in 0..disk {
        flatten_entry(image, index).await?;
        progress(index + 1, total);
    }
    image.reach_host_end().await?;
    image.flush_metadata().await.map_err(failed)?;
    let mut references = BTreeMap::new();
    for table in &snapshots {
        *references.entry(table.offset).or_insert(0) += 1;
    }
    // Those that the disk uses too have no zero clusters any more: they were copied to change them.
    references.remove(&0);
    for entry in image.l1.iter() {
        references.remove(&(entry & OFFSET_MASK));
    }
    for (done, table) in (disk + 1..).zip(snapshots) {
        if let Some(references) = references.remove(&table.offset) {
            let flattened = flatten_table(image, table, references).await;
            flattened.map_err(failed)?;
        }
        progress(done, total);
    }
    image.file.node().flush().await.map_err(failed)
}

/// Replaces the zero clusters of the disk that one entry of the L1 table covers.
async fn flatten_entry(image: &Qcow2, l1_index: u64) -> Result<(), Error> {
    let geometry = &image.geometry;
    let size = image.disk_size();
    let first = |index: u64| geometry.guest_offset(GuestCluster(index << geometry.l2_bits()));
    let mut at = first(l1_index);
    let covered = first(l1_index + 1).min(size);
    while at < covered {
        let range = ByteRange::new(at, covered - at);
        let extent = image.resolve(range).await.map_err(failed)?;
        let end = (at + extent.length).next_multiple_of(geometry.cluster_size());
        if let Mapping::Zero(storage) = extent.mapping {
            if storage.is_some() || image.backing.is_some() {
                let mapped = image.map_zeroed(at..end.min(size), Preallocation::Metadata);
                mapped.await.map_err(failed)?;
            } else {
                let clusters = geometry.guest_cluster(at)..geometry.guest_cluster(end);
                image.unmap(clusters).await.map_err(failed)?;
            }
        }
        at = end;
    }
    Ok(())
}

/// An L2 table of a snapshot.
#[derive(Clone, Copy)]
struct Table {
    /// In the file; 0 where there is none.
    offset: u64,
    /// The first guest cluster that it maps.
    first: GuestCluster,
}

/// The L2 tables of the snapshots' L1 tables, one for each entry.
async fn snapshot_tables(image: &Qcow2) -> Result<Vec<Table>, Error> {
    let l1_tables: Vec<_> = {
        let state = image.state();
        let entries = state.snapshots.entries.iter();
        entries
            .map(|entry| (entry.l1_offset, u64::from(entry.l1_entries)))
            .collect()
    };
    let file_length = image.host_end.load(std::sync::atomic::Ordering::Acquire);
    let mut tables = Vec::new();
    for (offset, entries) in l1_tables {
        let bytes = read_bytes(&image.file, offset.0, entries as usize * 8)
            .await
            .map_err(failed)?;
        tables.extend((0..).zip(words(&bytes)).map(|(index, word)| {
            let table = word & OFFSET_MASK;
            let end = table + image.geometry.cluster_size();
            let is_there = image.geometry.is_aligned(table) && end <= file_length;
            Table {
                offset: if is_there { table } else { 0 },
                first: GuestCluster(index << image.geometry.l2_bits()),
            }
        }));
    }
    Ok(tables)
}

/// Replaces the zero clusters of one table where it is. The entries of a sector become what they
/// are to be together or not at all, and read as the same in any case.
async fn flatten_table(image: &Qcow2, table: Table, references: u64) -> Result<(), Errno> {
    let cluster_size = image.geometry.cluster_size();
    let mut bytes = read_bytes(&image.file, table.offset, cluster_size as usize).await?;
    let mut changed = false;
    for (cluster, word) in (table.first.0..).zip(bytes.chunks_exact_mut(8)) {
        let cluster = GuestCluster(cluster);
        let entry = L2Entry(u64::from_be_bytes(
            (&*word).try_into().expect("eight bytes"),
        ));
        let new = match entry.kind(&image.geometry) {
            L2Kind::ZeroPlain if image.backing.is_none() => 0,
            L2Kind::ZeroPlain => zeroed_cluster(image, cluster, references).await?,
            L2Kind::ZeroAllocated(host) => {
                zero_storage(image, cluster, host).await?;
                entry.0 & !ZERO
            }
            _ => continue,
        };
        word.copy_from_slice(&new.to_be_bytes());
        changed = true;
    }
    if changed {
        // Refcounts and zeroes are durable before the entries that refer to them.
        image.flush_metadata().await?;
        image.file.node().flush().await?;
        write_to(&image.file, table.offset, &bytes).await?;
    }
    Ok(())
}

/// A new cluster of zeroes that counts `references`; the L2 entry for it.
async fn zeroed_cluster(
    image: &Qcow2,
    cluster: GuestCluster,
    references: u64,
) -> Result<u64, Errno> {
    let (run, _) = image.allocate(1).await?;
    let host = image.geometry.host_offset(run.first);
    zero_storage(image, cluster, host).await?;
    if references == 1 {
        return Ok(host.0 | COPIED);
    }
    count(image, run, references).await?;
    Ok(host.0)
}

async fn count(image: &Qcow2, run: ClusterRun, references: u64) -> Result<(), Errno> {
    let structure = image.structure.lock().await;
    let mut pins = super::alloc::Pins::default();
    loop {
        let attempt = image.set_refcounts(run, references);
        let Err(need) = attempt else { return Ok(()) };
        image.provide(&structure, need, &mut pins).await?;
    }
}

/// Makes the storage of `cluster` read as zeroes.
async fn zero_storage(image: &Qcow2, cluster: GuestCluster, host: HostOffset) -> Result<(), Errno> {
    let storage = Storage {
        guest: image.geometry.guest_offset(cluster),
        host: ByteRange::new(host.0, image.geometry.cluster_size()),
    };
    match image.cipher() {
        Some(cipher) => image.fill_encrypted(&storage, cipher).await,
        None => {
            let flags = ZeroFlags::default();
            image.file.node().write_zeroes(storage.host, flags).await
        }
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes
        .chunks_exact(8)
        .map(|word| u64::from_be_bytes(word.try_into().expect("chunks of eight bytes")))
}

fn failed(errno: Errno) -> Error {
    Error::io("Failed to turn zero into data clusters", errno)
}
