//! Another width of the refcounts: a whole new refcount structure beside the old one.
//!
//! ```text
//!   ... image ... | new refcount blocks | new refcount table |
//!   header: table offset, table clusters, width: one sector, written last
//! ```
//!
//! The new structure counts everything but the old one, which is free once the header has changed.
//! Until then the old one is in force and knows nothing of what lies behind the image; a power cut
//! leaves a file that is longer than it needs to be.

use super::document;
use super::header::{Header, field};
use super::tables::{
    Geometry, HostCluster, MAX_HOST_OFFSET, MAX_REFCOUNT_TABLE_BYTES, REFCOUNT_BLOCK_MASK,
};
use super::{read_bytes, refcount, write_to};
use block::{ByteRange, Edge, Errno, Error, ErrorKind};
use std::collections::BTreeSet;

/// How much of a long table is read at once, in bytes.
const READ_STEP: u64 = 1 << 20;

/// The change of one image.
struct Change<'f> {
    file: &'f Edge,
    old: Geometry,
    new: Geometry,
    /// Entries of the old refcount table.
    old_blocks: Vec<u64>,
    /// Clusters of the old structure.
    retired: BTreeSet<u64>,
    /// Where the new structure begins.
    first: u64,
}

/// Gives the image in `file`, which nothing has open, refcounts of `2^order` bits.
///
/// # Errors
/// `Invalid` when a refcount does not fit; `Corrupt`, `Io`.
pub(super) async fn change_refcount_width(
    file: &Edge,
    header: &Header,
    order: u32,
    mut progress: impl FnMut(u64, u64),
) -> Result<(), Error> {
    let change = Change::new(file, header, order).await?;
    let per_block = change.new.refcount_block_bits();
    let blocks = change.needed_blocks(&mut progress).await?;
    let (blocks, table_clusters) = change.place(blocks)?;
    let end = change.first + blocks.len() as u64 + table_clusters;
    let cluster_bits = change.new.cluster_bits;
    let mut table = vec![0; (table_clusters << cluster_bits) as usize];
    for (number, &block) in blocks.iter().enumerate() {
        let place = (change.first + number as u64) << cluster_bits;
        let mut bytes = change.block(block).await?;
        let covered = block << per_block..(block + 1) << per_block;
        for cluster in covered.start.max(change.first)..covered.end.min(end) {
            refcount::set_in_bytes(&mut bytes, order, cluster - covered.start, 1);
        }
        change.write(place, &bytes).await?;
        let at = block as usize * 8;
        table[at..at + 8].copy_from_slice(&place.to_be_bytes());
        progress(number as u64 + 1, blocks.len() as u64);
    }
    let table_place = (change.first + blocks.len() as u64) << cluster_bits;
    change.write(table_place, &table).await?;
    file.node().flush().await.map_err(failed)?;
    document::edit(file, cluster_bits, |header| {
        header.set_u64(field::REFCOUNT_TABLE_OFFSET, table_place);
        header.set_u32(field::REFCOUNT_TABLE_CLUSTERS, table_clusters as u32);
        header.set_u32(field::REFCOUNT_ORDER, order);
        Ok(())
    })
    .await?;
    change.discard_old().await;
    Ok(())
}

impl<'f> Change<'f> {
    async fn new(file: &'f Edge, header: &Header, order: u32) -> Result<Self, Error> {
        let old = header.geometry();
        let new = Geometry {
            refcount_order: order,
            ..old
        };
        let cluster_bits = header.cluster_bits;
        let table_bytes = header.refcount_table_clusters << cluster_bits;
        let mut old_blocks = Vec::with_capacity((table_bytes / 8) as usize);
        let mut done = 0;
        while done < table_bytes {
            let step = READ_STEP.min(table_bytes - done);
            let offset = header.refcount_table_offset.0 + done;
            let bytes = read_bytes(file, offset, step as usize)
                .await
                .map_err(failed)?;
            let words = bytes.chunks_exact(8).map(|word| {
                let word = word.try_into().expect("chunks of eight bytes");
                u64::from_be_bytes(word) & REFCOUNT_BLOCK_MASK
            });
            old_blocks.extend(words);
            done += step;
        }
        let mut retired: BTreeSet<u64> = (0..header.refcount_table_clusters)
            .map(|number| old.host_cluster(header.refcount_table_offset).0 + number)
            .collect();
        for &block in old_blocks.iter().filter(|block| **block != 0) {
            if !old.is_aligned(block) || block >= MAX_HOST_OFFSET {
                let message = format!("qcow2: invalid refcount block offset {block:#x}");
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
            retired.insert(block >> cluster_bits);
        }
        Ok(Self {
            first: file.node().length().div_ceil(old.cluster_size()),
            file,
            old,
            new,
            old_blocks,
            retired,
        })
    }

    /// Numbers of the new blocks that count something of the image. Refuses refcounts that do not
    /// fit; finds where the image ends, when clusters beyond the file are counted.
    async fn needed_blocks(
        &self,
        progress: &mut impl FnMut(u64, u64),
    ) -> Result<BTreeSet<u64>, Error> {
        let mut needed = BTreeSet::new();
        let total = self.old_blocks.len() as u64;
        for (index, &block) in (0..).zip(&self.old_blocks) {
            progress(index, total);
            if block == 0 {
                continue;
            }
            let bytes = self.read_old(block).await?;
            let base = index << self.old.refcount_block_bits();
            for position in 0..1 << self.old.refcount_block_bits() {
                let count = refcount::get_in_bytes(&bytes, self.old.refcount_order, position);
                let cluster = base + position;
                if count == 0 || self.retired.contains(&cluster) {
                    continue;
                }
                if count > self.new.refcount_max() {
                    let offset = self.old.host_offset(HostCluster(cluster)).0;
                    return Err(Error::new(
                        ErrorKind::Invalid,
                        format!(
                            "Cannot decrease refcount entry width to {} bits: Cluster at offset \
                             {offset:#x} has a refcount of {count}",
                            1 << self.new.refcount_order
                        ),
                    ));
                }
                if cluster >= self.first {
                    let message = "qcow2: clusters beyond the end of the file are counted; check \
                                   the image first";
                    return Err(Error::new(ErrorKind::Corrupt, message));
                }
                needed.insert(cluster >> self.new.refcount_block_bits());
            }
        }
        Ok(needed)
    }

    /// Adds the blocks that count the new structure itself; answers with all blocks and the
    /// clusters of the table.
    fn place(&self, mut blocks: BTreeSet<u64>) -> Result<(Vec<u64>, u64), Error> {
        let cluster_size = self.new.cluster_size();
        let per_block = self.new.refcount_block_bits();
        loop {
            let known = blocks.len();
            let last = blocks.last().copied().unwrap_or(0);
            let table_clusters = ((last + 1) * 8).div_ceil(cluster_size);
            let end = self.first + known as u64 + table_clusters;
            if table_clusters * cluster_size > MAX_REFCOUNT_TABLE_BYTES
                || end > MAX_HOST_OFFSET >> self.new.cluster_bits
            {
                let message = "The reference count structure would become too large";
                return Err(Error::new(ErrorKind::Invalid, message));
            }
            blocks.extend(self.first >> per_block..=(end - 1) >> per_block);
            if blocks.len() == known {
                return Ok((blocks.into_iter().collect(), table_clusters));
            }
        }
    }

    /// A new refcount block with what it counts of the image.
    async fn block(&self, number: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; self.new.cluster_size() as usize];
        let covered = number << self.new.refcount_block_bits()
            ..(number + 1) << self.new.refcount_block_bits();
        let mut cluster = covered.start;
        while cluster < covered.end {
            let index = cluster >> self.old.refcount_block_bits();
            let end = covered
                .end
                .min((index + 1) << self.old.refcount_block_bits());
            let block = self.old_blocks.get(index as usize).copied().unwrap_or(0);
            if block != 0 {
                let old = self.read_old(block).await?;
                let base = index << self.old.refcount_block_bits();
                for counted in cluster..end {
                    let count =
                        refcount::get_in_bytes(&old, self.old.refcount_order, counted - base);
                    if count != 0 && !self.retired.contains(&counted) {
                        let position = counted - covered.start;
                        refcount::set_in_bytes(
                            &mut bytes,
                            self.new.refcount_order,
                            position,
                            count,
                        );
                    }
                }
            }
            cluster = end;
        }
        Ok(bytes)
    }

    async fn read_old(&self, block: u64) -> Result<Vec<u8>, Error> {
        let length = self.old.cluster_size() as usize;
        read_bytes(self.file, block, length).await.map_err(failed)
    }

    async fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        write_to(self.file, offset, bytes).await.map_err(failed)
    }

    /// The storage of the old structure is of no use; that the host keeps it is no failure.
    async fn discard_old(&self) {
        for &cluster in &self.retired {
            let offset = self.old.host_offset(HostCluster(cluster)).0;
            let range = ByteRange::new(offset, self.old.cluster_size());
            if self.file.node().discard(range).await.is_err() {
                return;
            }
        }
    }
}

fn failed(errno: Errno) -> Error {
    Error::io("Could not change the refcount width", errno)
}
