//! Preallocation: clusters mapped before anything is written to them.
//!
//! What is mapped reads as zeroes, or as the backing, at every moment. Extended entries, as QEMU's,
//! only reserve their host clusters: they show what they did before. So do those of encrypted images,
//! as zero clusters, because zero bytes on disk are no zeroes there. Other storage is shown, so what
//! something else may have used is zeroed before the mapping can reach the disk (a flush makes data
//! durable before mappings).
//!
//! | mode     | storage |
//! |----------|---------|
//! | metadata | holes; the file is as long as if they were written |
//! | falloc   | allocated, unwritten |
//! | full     | written |

use super::tables::{MAX_HOST_OFFSET, REFCOUNT_BLOCK_MASK};
use super::{Qcow2, read_bytes, refcount};
use block::{
    Buffer, ByteRange, Errno, Error, Format, Preallocation, Resize, SectorCipher, Tweak,
    WriteFlags, ZeroFlags,
};
use std::ops::Range;
use std::sync::atomic::Ordering::Acquire;

/// Zero bytes written at a time.
const FILL_BYTES: u64 = 1 << 20;

/// What becomes of the clusters that are mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// Data, all zeroes.
    Zeroes,
    /// Storage for later.
    Reserve,
}

/// Storage that is about to be mapped.
pub(super) struct Storage {
    /// Where its content is on the disk.
    pub(super) guest: u64,
    pub(super) host: ByteRange,
}

impl Qcow2 {
    /// Maps the guest bytes `range`, which may lie beyond the present end of the disk. Its mapping
    /// is durable when it resolves.
    pub(super) async fn preallocate(
        &self,
        range: Range<u64>,
        mode: Preallocation,
    ) -> Result<(), Error> {
        let failed = |errno| Error::io("Could not preallocate metadata", errno);
        let is_reserved = match self.cipher() {
            Some(_) => self.geometry.zero_clusters,
            None => self.geometry.extended_l2 && !self.is_raw_data_file(),
        };
        let shown = match is_reserved {
            true => Use::Reserve,
            false => Use::Zeroes,
        };
        self.map_as(range, mode, shown).await.map_err(failed)?;
        self.flush_metadata().await.map_err(failed)?;
        self.reach_host_end().await
    }

    /// Maps the guest bytes `range` as data that is all zeroes.
    pub(super) async fn map_zeroed(
        &self,
        range: Range<u64>,
        mode: Preallocation,
    ) -> Result<(), Errno> {
        self.map_as(range, mode, Use::Zeroes).await
    }

    async fn map_as(
        &self,
        range: Range<u64>,
        mode: Preallocation,
        shown: Use,
    ) -> Result<(), Errno> {
        // What lies beyond the end of the file reads as zeroes already.
        let fresh_from = self.file.node().length();
        let end = range.end.next_multiple_of(self.geometry.cluster_size());
        let mut offset = range.start;
        while offset < end {
            let wanted = ByteRange::new(offset, end - offset);
            let mut plan = self.prepare(wanted).await?;
            let next = plan.range.offset + plan.range.length;
            let storage = Storage {
                guest: plan.range.offset,
                host: ByteRange::new(plan.host_offset, plan.range.length),
            };
            if shown == Use::Reserve {
                plan.token.reserve_only();
            }
            let filled = match (&self.data_file, self.cipher(), shown) {
                // An external data file has been given its length, and storage, as a whole.
                (Some(_), ..) => Ok(()),
                (None, Some(cipher), Use::Zeroes) => self.fill_encrypted(&storage, cipher).await,
                _ => self.fill(storage.host, mode, fresh_from).await,
            };
            if let Err(errno) = filled {
                self.abort_write(plan);
                return Err(errno);
            }
            self.commit_write(plan).await?;
            offset = next;
        }
        Ok(())
    }

    /// Whether clearly more clusters are counted than the host has storage for.
    pub(super) async fn find_sparse_storage(&self) -> Result<bool, Errno> {
        let cluster_size = self.geometry.cluster_size();
        let node = self.file.node();
        let described = node.driver().describe();
        let stored = described.get("actual-size").and_then(|size| size.as_u64());
        let Some(stored) = stored.filter(|_| self.data_file.is_none()) else {
            return Ok(false);
        };
        let stored = stored / cluster_size;
        let threshold = (stored * 10 / 9).max(stored + 2);
        let clusters = node.length().div_ceil(cluster_size);
        let table = self.state().refcount_table.offset;
        let per_block = 1 << self.geometry.refcount_block_bits();
        let mut counted = 0;
        for (index, first) in (0..clusters).step_by(per_block).enumerate() {
            let entry = read_bytes(&self.file, table.0 + index as u64 * 8, 8).await?;
            let entry: [u8; 8] = entry.try_into().map_err(|_| Errno::EIO)?;
            let block = u64::from_be_bytes(entry) & REFCOUNT_BLOCK_MASK;
            if block == 0 || block >= MAX_HOST_OFFSET {
                continue;
            }
            let bytes = read_bytes(&self.file, block, cluster_size as usize).await?;
            let order = self.geometry.refcount_order;
            let covered = 0..(per_block as u64).min(clusters - first);
            counted += covered
                .filter(|position| refcount::get_in_bytes(&bytes, order, *position) != 0)
                .count() as u64;
            if counted >= threshold {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Gives an external data file the length of the disk. What it holds beyond `from` goes first.
    pub(super) async fn resize_data_file(&self, from: u64, resize: Resize) -> Result<(), Error> {
        let Some(data) = &self.data_file else {
            return Ok(());
        };
        let node = data.node();
        if node.length() > from && resize.length > from {
            let cut = Resize::to(from);
            node.resize(cut).await?;
        }
        let preallocation = match resize.preallocation {
            Preallocation::Metadata => Preallocation::Off,
            other => other,
        };
        node.resize(Resize {
            preallocation,
            ..resize
        })
        .await
    }

    /// Makes storage that is about to be mapped read as zeroes.
    async fn fill(
        &self,
        storage: ByteRange,
        mode: Preallocation,
        fresh_from: u64,
    ) -> Result<(), Errno> {
        let node = self.file.node();
        let zeroes = |may_unmap| ZeroFlags {
            may_unmap,
            ..ZeroFlags::default()
        };
        match mode {
            Preallocation::Off | Preallocation::Metadata if storage.offset >= fresh_from => Ok(()),
            Preallocation::Off | Preallocation::Metadata => {
                node.write_zeroes(storage, zeroes(true)).await
            }
            Preallocation::Falloc => node.write_zeroes(storage, zeroes(false)).await,
            Preallocation::Full => {
                let bytes = Buffer::zeroed(FILL_BYTES.min(storage.length) as usize);
                let mut done = 0;
                while done < storage.length {
                    let step = FILL_BYTES.min(storage.length - done);
                    let piece = bytes.slice(0..step as usize);
                    let flags = WriteFlags::default();
                    node.write(storage.offset + done, piece, flags).await?;
                    done += step;
                }
                Ok(())
            }
        }
    }

    /// Makes storage read as zeroes through the cipher.
    pub(super) async fn fill_encrypted(
        &self,
        storage: &Storage,
        cipher: &dyn SectorCipher,
    ) -> Result<(), Errno> {
        let mut done = 0;
        while done < storage.host.length {
            let step = FILL_BYTES.min(storage.host.length - done);
            let host = storage.host.offset + done;
            let tied_to = match cipher.tweak() {
                Tweak::HostOffset => host,
                Tweak::GuestOffset => storage.guest + done,
            };
            let mut bytes = vec![0; step as usize];
            cipher.encrypt(tied_to, &mut bytes);
            self.write_bytes(host, &bytes).await?;
            done += step;
        }
        Ok(())
    }

    /// Makes the file as long as the clusters in it, so that reading them is no reading past its
    /// end.
    pub(super) async fn reach_host_end(&self) -> Result<(), Error> {
        let length = self.host_end.load(Acquire);
        if self.file.node().length() >= length {
            return Ok(());
        }
        let resize = Resize::to(length);
        self.file.node().resize(resize).await
    }
}
