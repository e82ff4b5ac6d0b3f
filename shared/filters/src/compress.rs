//! `compress`: what is written is stored compressed.
//!
//! Option: `file`, a node whose driver compresses. The node's requests are whole clusters of the
//! child: [`block::Node`] reads what surrounds a smaller write, so that every write can be stored
//! compressed. A last cluster that ends with the disk is whole, too.

use crate::filter::{Filter, FilterNode};
use block::error::Result;
use block::open::{ChildRole, DriverEntry};
use block::{
    Buffer, ByteRange, Driver, Edge, Error, ErrorKind, IoFuture, Limits, OpenRequest, WriteFlags,
    ZeroFlags,
};

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
    Ok(Box::new(FilterNode(Compress { file })))
}

impl Compress {
    /// Writes to the end of the disk are padded beyond it by the node above.
    fn within(&self, offset: u64, buffer: Buffer) -> Buffer {
        let left = self.length().saturating_sub(offset);
        match left < buffer.len() as u64 {
            true => buffer.slice(0..left as usize),
            false => buffer,
        }
    }
}

impl Filter for Compress {
    fn name(&self) -> &'static str {
        "compress"
    }
    fn edge(&self) -> &Edge {
        &self.file
    }
    fn limits(&self) -> Limits {
        let child = self.child().driver().limits();
        Limits {
            request_alignment: child.optimal_transfer.max(1),
            ..child.passed_on()
        }
    }
    fn grows(&self) -> bool {
        false
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
}
