//! A fixed disk: the disk as it is, and the footer behind it.

use block::format::{Extent, Fill, Format, Lookup, Mapping, WritePlan};
use block::{ByteRange, Edge, Errno, Limits, ZeroFlags};
use serde_json::{Map, Value, json};

/// An open image.
pub(super) struct Fixed {
    pub(super) file: Edge,
    pub(super) disk_bytes: u64,
}

fn extent(range: ByteRange) -> Extent {
    Extent {
        length: range.length,
        mapping: Mapping::Data(range.offset),
        in_place: true,
    }
}

impl Format for Fixed {
    type Token<'a> = ();

    fn name(&self) -> &'static str {
        "vpc"
    }
    fn virtual_size(&self) -> u64 {
        self.disk_bytes
    }
    fn limits(&self) -> Limits {
        Limits {
            zero_alignment: 1,
            ..Limits::default()
        }
    }
    fn file(&self) -> &Edge {
        &self.file
    }
    fn lookup(&self, range: ByteRange) -> Lookup {
        Lookup::Hit(extent(range))
    }
    fn changes(&self) -> Option<u64> {
        Some(0)
    }
    async fn resolve(&self, range: ByteRange) -> Result<Extent, Errno> {
        Ok(extent(range))
    }
    async fn prepare_write(&self, range: ByteRange) -> Result<WritePlan<()>, Errno> {
        Ok(WritePlan {
            range,
            host_offset: range.offset,
            head: Fill::Nothing,
            tail: Fill::Nothing,
            token: (),
        })
    }
    async fn commit(&self, _plan: WritePlan<()>) -> Result<(), Errno> {
        Ok(())
    }
    async fn abort(&self, _plan: WritePlan<()>) {}
    async fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<u64, Errno> {
        self.file.node().write_zeroes(range, flags).await?;
        Ok(range.length)
    }
    async fn flush(&self) -> Result<(), Errno> {
        self.file.node().flush().await
    }
    fn metadata_dirty(&self) -> bool {
        false
    }
    async fn close(&self) -> Result<(), Errno> {
        self.flush().await
    }
    async fn storage_is_sparse(&self) -> bool {
        true
    }
    fn describe(&self) -> Map<String, Value> {
        let mut members = Map::new();
        members.insert("dirty-flag".into(), json!(false));
        members
    }
}
