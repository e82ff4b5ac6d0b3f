//! [`Format`] for qcow2: which part of the driver does what.

use super::Qcow2;
use super::header::{AUTOCLEAR_DATA_FILE_RAW, COMPATIBLE_LAZY_REFCOUNTS, incompatible};
use super::lazy::Scope;
use super::reclaim::{RECLAIM_PER_FLUSH, Requests};
use super::write::Token;
use block::cipher::SECTOR;
use block::{
    AmendRequest, BackingReference, Buffer, ByteRange, CheckOptions, CheckResult, CheckSink, Edge,
    EncodedBytes, Errno, Error, ErrorKind, Extent, Format, Limits, Lookup, Repair, Resize,
    SectorCipher, WritePlan, ZeroFlags,
};
use serde_json::{Map, Value, json};
use std::sync::atomic::Ordering::Acquire;

impl Format for Qcow2 {
    type Token<'a> = Token<'a>;

    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn virtual_size(&self) -> u64 {
        self.disk_size()
    }

    fn limits(&self) -> Limits {
        let cluster_size = self.geometry.cluster_size() as u32;
        Limits {
            request_alignment: match self.crypto {
                Some(_) => SECTOR as u32,
                None => 1,
            },
            optimal_transfer: cluster_size,
            zero_alignment: self.geometry.subcluster_size() as u32,
            ..Limits::default()
        }
    }

    fn file(&self) -> &Edge {
        &self.file
    }

    fn data(&self) -> &Edge {
        self.data_file.as_ref().unwrap_or(&self.file)
    }

    fn takes_backing(&self) -> bool {
        true
    }

    fn backing(&self) -> Option<&Edge> {
        self.backing.as_ref()
    }

    fn lookup(&self, range: ByteRange) -> Lookup {
        self.lookup_cached(range)
    }

    fn changes(&self) -> Option<u64> {
        Some(self.changes.load(Acquire))
    }

    async fn resolve(&self, range: ByteRange) -> Result<Extent, Errno> {
        self.resolve_mapping(range).await
    }

    async fn prepare_write(&self, range: ByteRange) -> Result<WritePlan<Token<'_>>, Errno> {
        self.prepare(range).await
    }

    async fn commit<'a>(&'a self, plan: WritePlan<Token<'a>>) -> Result<(), Errno> {
        self.commit_write(plan).await
    }

    async fn abort<'a>(&'a self, plan: WritePlan<Token<'a>>) {
        self.abort_write(plan);
    }

    async fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<u64, Errno> {
        self.zero(range, flags).await
    }

    async fn discard(&self, range: ByteRange) -> Result<(), Errno> {
        self.discard_range(range).await
    }

    async fn read_encoded(
        &self,
        offset: u64,
        descriptor: u64,
        buffer: Buffer,
    ) -> Result<(), Errno> {
        self.read_compressed(offset, descriptor, buffer).await
    }

    fn can_encode(&self) -> bool {
        self.writable && !self.geometry.external_data && self.crypto.is_none()
    }

    fn cipher(&self) -> Option<&dyn SectorCipher> {
        self.crypto.as_ref()?.cipher()
    }

    async fn encode(
        &self,
        _range: ByteRange,
        buffer: Buffer,
    ) -> Result<Option<EncodedBytes>, Errno> {
        self.check_writable()?;
        Ok(self.deflate(&buffer).await)
    }

    async fn store_encoded(&self, range: ByteRange, bytes: EncodedBytes) -> Result<(), Errno> {
        self.store_packed(range, bytes).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        if !self.writable {
            return self.file.node().flush().await;
        }
        self.flush_scope(Scope::Mapping).await?;
        self.reclaim(Requests::MayRun, RECLAIM_PER_FLUSH).await;
        Ok(())
    }

    async fn upkeep(&self) -> Result<(), Errno> {
        self.flush_early().await
    }

    fn metadata_dirty(&self) -> bool {
        // What waits to be given back does so in the course of flushes.
        self.writable
            && (self.is_metadata_dirty(Scope::Mapping) || !self.state().reclaimable.is_empty())
    }

    async fn resize(&self, resize: Resize) -> Result<(), Error> {
        self.resize_disk(resize).await
    }

    async fn refer_to_backing(&self, to: BackingReference) -> Result<(), Error> {
        self.set_backing_reference(to).await
    }

    async fn make_empty(&self) -> Result<(), Error> {
        self.drop_content().await
    }

    async fn close(&self) -> Result<(), Errno> {
        if !self.writable {
            return Ok(());
        }
        self.flush_metadata().await?;
        {
            let mut state = self.state();
            for run in std::mem::take(&mut state.abandoned) {
                state.give_back(run);
            }
        }
        let stored = match self.check_writable() {
            Ok(()) => self.store_bitmaps().await,
            // They stay marked as in use.
            Err(_) => Ok(()),
        };
        if stored.is_ok() {
            self.flush_metadata().await?;
        }
        self.reclaim(Requests::Ended, usize::MAX).await;
        if self.is_metadata_dirty(Scope::Everything) {
            self.flush_metadata().await?;
        }
        if self.shrunk.load(Acquire) {
            self.trim_file().await?;
        }
        if stored.is_ok() {
            self.complete_last_cluster().await?;
        }
        self.unmark_dirty().await?;
        self.log.remove();
        stored
    }

    fn bitmap_store(&self) -> Option<&dyn block::BitmapStore> {
        Some(self)
    }

    fn snapshots(&self) -> Option<&dyn block::Snapshots> {
        Some(self)
    }

    async fn check(
        &self,
        options: CheckOptions,
        sink: &mut dyn CheckSink,
    ) -> Result<CheckResult, Error> {
        if options.repair != Repair::None {
            let message = "an image in use cannot be repaired; it must be opened for a check";
            return Err(Error::new(ErrorKind::Busy, message));
        }
        let failed = |errno| Error::io("Could not flush the image before the check", errno);
        self.flush_metadata().await.map_err(failed)?;
        self.reclaim(Requests::MayRun, RECLAIM_PER_FLUSH).await;
        let _structure = self.structure.lock().await;
        super::check::check(&self.file, options, sink).await
    }

    async fn storage_is_sparse(&self) -> bool {
        let known = self.sparse.get().copied();
        match known {
            Some(sparse) => sparse,
            None => {
                // Where it cannot be found out, the mapping alone is believed.
                let sparse = self.find_sparse_storage().await.unwrap_or(false);
                *self.sparse.get_or_init(|| sparse)
            }
        }
    }

    async fn amend(&self, changes: &mut AmendRequest<'_>) -> Result<(), Error> {
        self.amend_serving(changes).await
    }
    fn machine_state(&self) -> Option<u64> {
        // An external data file holds the disk alone.
        (!self.geometry.external_data).then(|| self.machine_state_start())
    }

    async fn reserve_machine_state(&self, end: u64) -> Result<(), Errno> {
        self.reserve_state(end).await
    }

    fn describe(&self) -> Map<String, Value> {
        let header = &self.header;
        let corrupt =
            self.health.corrupt.load(Acquire) || header.incompatible & incompatible::CORRUPT != 0;
        let mut data = Map::new();
        if header.version >= 3 {
            data.insert("compat".into(), json!("1.1"));
            let lazy = header.compatible & COMPATIBLE_LAZY_REFCOUNTS != 0;
            data.insert("lazy-refcounts".into(), json!(lazy));
            if let Some(bitmaps) = self.describe_bitmaps() {
                data.insert("bitmaps".into(), bitmaps);
            }
            data.insert("corrupt".into(), json!(corrupt));
            data.insert("extended-l2".into(), json!(self.geometry.extended_l2));
            if self.geometry.external_data {
                if let Some(name) = &header.data_file {
                    data.insert("data-file".into(), json!(name));
                }
                let raw = header.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0;
                data.insert("data-file-raw".into(), json!(raw));
            }
        } else {
            data.insert("compat".into(), json!("0.10"));
        }
        data.insert("refcount-bits".into(), json!(1 << header.refcount_order));
        data.insert("compression-type".into(), json!(header.codec.name()));
        let mut members = Map::new();
        if let Some(crypto) = &self.crypto {
            data.insert("encrypt".into(), crypto.describe());
            members.insert("encrypted".into(), json!(true));
        }
        members.insert("cluster-size".into(), json!(self.geometry.cluster_size()));
        if let Some(snapshots) = self.state().snapshots.describe(self.disk_size()) {
            members.insert("snapshots".into(), snapshots);
        }
        let backing = self.backing_reference();
        if let Some(name) = backing.name {
            members.insert("backing-filename".into(), json!(name));
        }
        if let Some(format) = backing.format {
            members.insert("backing-filename-format".into(), json!(format));
        }
        let dirty = self.lazy.is_marked();
        members.insert("dirty-flag".into(), json!(dirty));
        let specific = json!({"type": "qcow2", "data": data});
        members.insert("format-specific".into(), specific);
        members
    }
}
