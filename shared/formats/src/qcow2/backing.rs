//! The image and its backing file: the reference in the header, and giving way to it altogether.
//!
//! The reference is a part of the header cluster, which is replaced as a whole; what was opened as
//! backing stays open until the image is opened anew. Dropping all content is what shrinking to nothing
//! and growing again would do: mappings, then the L2 tables, in the order that a power cut may interrupt
//! anywhere.

use super::header::extension;
use super::tables::GuestCluster;
use super::{Qcow2, document};
use block::{BackingReference, Error, ErrorKind};
use executor::Errno;
use std::sync::PoisonError;
use std::sync::atomic::Ordering::{Relaxed, Release};

impl Qcow2 {
    /// What the image says about its backing file.
    pub(super) fn backing_reference(&self) -> BackingReference {
        let reference = self.backing_reference.lock();
        reference.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// See [`block::Format::refer_to_backing`].
    pub(super) async fn set_backing_reference(&self, to: BackingReference) -> Result<(), Error> {
        let failed = |errno| Error::io("Could not update qcow2 header", errno);
        self.check_writable().map_err(failed)?;
        if to.name.is_some() && self.is_raw_data_file() {
            let message = "Backing file and data-file-raw cannot be used at the same time";
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        // What was written because the new backing differs must be there when the header tells of it.
        self.flush_metadata().await.map_err(failed)?;
        let _structure = self.structure.lock().await;
        // The header is written as it is read here: no flush sets the dirty bit in between.
        let _no_flush = self.flushing.lock().await;
        document::edit(&self.file, self.header.cluster_bits, |header| {
            let format = to.format.as_ref().map(|format| format.as_bytes().to_vec());
            header.set_extension(extension::BACKING_FORMAT, format);
            header.set_backing_name(to.name.as_deref())
        })
        .await?;
        let reference = self.backing_reference.lock();
        *reference.unwrap_or_else(PoisonError::into_inner) = to;
        Ok(())
    }

    /// See [`block::Format::make_empty`].
    pub(super) async fn drop_content(&self) -> Result<(), Error> {
        let dropped = self.drop_mappings().await;
        dropped.map_err(|errno| Error::io("Could not empty the image", errno))
    }

    async fn drop_mappings(&self) -> Result<(), Errno> {
        self.check_writable()?;
        let _alone = self.snapshotting.lock().await;
        self.flush_metadata().await?;
        let size = self.disk_size();
        let end = GuestCluster(size.div_ceil(self.geometry.cluster_size()));
        // Nothing is mapped again before all is done.
        self.mappable.store(0, Release);
        let dropped = self.unmap_all(end).await;
        self.mappable.store(size, Release);
        self.shrunk.store(true, Relaxed);
        dropped
    }

    async fn unmap_all(&self, end: GuestCluster) -> Result<(), Errno> {
        self.unmap(GuestCluster(0)..end).await?;
        self.flush_metadata().await?;
        self.drop_l2_tables(0).await?;
        self.flush_metadata().await
    }
}
