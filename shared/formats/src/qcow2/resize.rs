//! Changing the virtual size: growing (with a larger L1 table when needed) and shrinking.
//!
//! Every step is durable before the next, under `structure`, so the redo log has no records of
//! its own for it.

use super::alloc::Reserved;
use super::overlap::Fixed;
use super::tables::{ClusterRun, GuestCluster, HostCluster, MAX_HOST_OFFSET, MAX_L1_BYTES};
use super::{Qcow2, cache, header};
use block::{Error, ErrorKind, Preallocation, Resize};
use executor::Errno;
use std::sync::atomic::Ordering::{Acquire, Release};

impl Qcow2 {
    /// Bytes of the virtual disk.
    pub(super) fn disk_size(&self) -> u64 {
        self.virtual_size.load(Acquire)
    }

    pub(super) async fn resize_disk(&self, resize: Resize) -> Result<(), Error> {
        let failed = |errno| Error::io("Could not resize the image", errno);
        self.check_writable().map_err(failed)?;
        if !resize.length.is_multiple_of(512) {
            let message = "The new size must be a multiple of 512";
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let old = self.disk_size();
        if resize.length > old && resize.preallocation != Preallocation::Off {
            let message = "qcow2: resizing with preallocation is not supported";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let has_snapshots = !self.state().snapshots.entries.is_empty();
        if has_snapshots && self.header.version < 3 {
            let message = "Can't resize a v2 image which has snapshots";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if has_snapshots && resize.length < old {
            let message = "Can't shrink an image which has snapshots";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        self.flush_metadata().await.map_err(failed)?;
        if resize.length > old {
            self.grow_l1(resize.length).await?;
            self.set_size(resize.length).await.map_err(failed)
        } else {
            self.shrink(resize.length).await.map_err(failed)
        }
    }

    async fn set_size(&self, length: u64) -> Result<(), Errno> {
        let field = header::field::SIZE as u64;
        self.write_bytes(field, &length.to_be_bytes()).await?;
        self.file.node().flush().await?;
        self.virtual_size.store(length, Release);
        Ok(())
    }

    /// The size goes down first, so that no request finds what is then unmapped.
    async fn shrink(&self, length: u64) -> Result<(), Errno> {
        let cluster_size = self.geometry.cluster_size();
        let first = GuestCluster(length.div_ceil(cluster_size));
        let end = GuestCluster(self.disk_size().div_ceil(cluster_size));
        self.set_size(length).await?;
        self.unmap(first..end).await?;
        self.flush_metadata().await
    }

    /// Makes the L1 table large enough for `length` bytes.
    async fn grow_l1(&self, length: u64) -> Result<(), Error> {
        let geometry = &self.geometry;
        let needed = geometry.l1_entries_for(length);
        let slices_per_table = 1 << (geometry.cluster_bits - geometry.l2_slice_bits);
        if needed * 8 > MAX_L1_BYTES || needed * slices_per_table > cache::MAX_SLICES {
            return Err(Error::new(
                ErrorKind::Invalid,
                "The image size is too large",
            ));
        }
        if needed <= self.l1.len() {
            return Ok(());
        }
        let moved = self.move_l1(needed).await;
        moved.map_err(|errno| Error::io("Failed to grow the L1 table", errno))
    }

    async fn move_l1(&self, entries: u64) -> Result<(), Errno> {
        let geometry = &self.geometry;
        let structure = self.structure.lock().await;
        let clusters = (entries * 8).div_ceil(geometry.cluster_size());
        let run = self.allocate_contiguous(&structure, clusters).await?;
        let reserved = Reserved::new(self, run);
        self.flush_metadata().await?;
        let mut bytes: Vec<u8> = self.l1.iter().flat_map(u64::to_be_bytes).collect();
        bytes.resize((clusters << geometry.cluster_bits) as usize, 0);
        let offset = geometry.host_offset(run.first);
        self.write_bytes(offset.0, &bytes).await?;
        self.file.node().flush().await?;
        let mut field = (entries as u32).to_be_bytes().to_vec();
        field.extend_from_slice(&offset.0.to_be_bytes());
        let at = header::field::L1_SIZE as u64;
        self.write_bytes(at, &field).await?;
        self.file.node().flush().await?;
        let mut state = self.state();
        let old = ClusterRun {
            first: geometry.host_cluster(state.l1_offset),
            count: (self.l1.len() * 8).div_ceil(geometry.cluster_size()),
        };
        state.l1_offset = offset;
        state.metadata.move_fixed(Fixed::L1Table, run);
        reserved.keep();
        self.l1.grow(entries);
        if old.count != 0 {
            state.free(old);
        }
        Ok(())
    }

    /// Exactly `count` contiguous clusters, all or nothing.
    pub(super) async fn allocate_contiguous(
        &self,
        structure: &super::alloc::Structure<'_>,
        count: u64,
    ) -> Result<ClusterRun, Errno> {
        let most = MAX_HOST_OFFSET >> self.geometry.cluster_bits;
        let mut held: Option<ClusterRun> = None;
        loop {
            let want = count - held.map_or(0, |run| run.count);
            let (run, _) = self.allocate_in(structure, want).await?;
            if run.end() > most {
                return Err(Errno::EFBIG);
            }
            held = match held {
                Some(previous) if previous.end() == run.first.0 => Some(ClusterRun {
                    first: previous.first,
                    count: previous.count + run.count,
                }),
                previous => {
                    if let Some(previous) = previous {
                        self.state().give_back(previous);
                    }
                    Some(run)
                }
            };
            if let Some(run) = held
                && run.count == count
            {
                return Ok(run);
            }
        }
    }

    /// The run of clusters that `bytes` from a cluster boundary take.
    pub(super) fn clusters_of(&self, offset: super::HostOffset, bytes: u64) -> ClusterRun {
        let first = self.geometry.host_cluster(offset);
        ClusterRun {
            first: HostCluster(first.0),
            count: bytes.div_ceil(self.geometry.cluster_size()),
        }
    }
}
