//! `compress`: what is written is stored compressed.
//!
//! Option: `file`, a node whose driver compresses. The node's requests are whole clusters of the
//! child: [`block::Node`] reads what surrounds a smaller write, so that every write can be stored
//! compressed. A last cluster that ends with the disk is whole, too.

use block::error::Result;
use block::open::{ChildRole, DriverEntry};
use block::{
    BoxFuture, Buffer, ByteRange, Driver, Edge, Errno, Error, ErrorKind, ImageIdentity, IoFuture,
    Limits, Node, OpenRequest, Resize, StatusExtent, WriteFlags, ZeroFlags,
};
use serde_json::{Map, Value};

/// The table line of `compress`.
pub const ENTRY: DriverEntry = DriverEntry::new("compress", |request| Box::pin(open(request)));

/// The filter.
struct Compress {
    file: Edge,
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>> {
    let file = request.required_child("file", ChildRole::Filtered).await?;
    let driver = file.node().driver();
    if !driver.compresses() {
        let name = driver.driver_name();
        let message = format!("Compression is not supported for underlying format: {name}");
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    Ok(Box::new(Compress { file }))
}

impl Compress {
    fn child(&self) -> &Node {
        self.file.node()
    }

    /// Writes to the end of the disk are padded beyond it by the node above.
    fn within(&self, offset: u64, buffer: Buffer) -> Buffer {
        let left = self.length().saturating_sub(offset);
        match left < buffer.len() as u64 {
            true => buffer.slice(0..left as usize),
            false => buffer,
        }
    }
}

impl Driver for Compress {
    fn driver_name(&self) -> &'static str {
        "compress"
    }
    fn length(&self) -> u64 {
        self.child().length()
    }
    fn limits(&self) -> Limits {
        let child = self.child().driver().limits();
        Limits {
            request_alignment: child.optimal_transfer.max(1),
            optimal_transfer: child.optimal_transfer,
            zero_alignment: child.zero_alignment,
            ..Limits::default()
        }
    }
    fn grows(&self) -> bool {
        false
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        // What lies beyond the end reads as zeroes.
        self.child().read(offset, buffer)
    }
    fn compresses(&self) -> bool {
        true
    }
    fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        let compressed = WriteFlags {
            compressed: true,
            ..flags
        };
        self.child()
            .write(offset, self.within(offset, buffer), compressed)
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        let left = self.length().saturating_sub(range.offset);
        let range = ByteRange::new(range.offset, range.length.min(left));
        self.child().write_zeroes(range, flags)
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        self.child().discard(range)
    }
    fn flush(&self) -> IoFuture<'_> {
        self.child().flush()
    }
    fn block_status(
        &self,
        range: ByteRange,
    ) -> BoxFuture<'_, std::result::Result<StatusExtent, Errno>> {
        self.child().block_status(range)
    }
    fn resize(&self, resize: Resize) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.child().resize(resize))
    }
    fn close(&self) -> BoxFuture<'_, std::result::Result<(), Errno>> {
        Box::pin(async { Ok(()) })
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        vec![("file", &self.file)]
    }
    fn describe(&self) -> Map<String, Value> {
        Map::new()
    }
    fn filename(&self) -> String {
        self.child().filename()
    }
    fn identity(&self) -> Option<ImageIdentity> {
        self.child().identity()
    }
}
