//! A qcow2 node that can be checked and nothing else: what [`block::Purpose::Check`] opens.
//!
//! Needs the image's file alone: neither the backing nor the external data file, nor a key.

use super::{check, read_layout};
use block::open::ChildRole;
use block::{
    BoxFuture, Buffer, ByteRange, CheckOptions, CheckResult, CheckSink, Driver, Edge, Errno, Error,
    ImageIdentity, IoFuture, Layer, Limits, OpenRequest, Resize, StatusExtent, WriteFlags,
    ZeroFlags,
};
use serde_json::{Map, Value};

/// Options of a qcow2 node that have no effect on a check.
const IGNORED: &[&str] = &["backing", "data-file", "encrypt"];

struct CheckedImage {
    file: Edge,
    size: u64,
}

/// Opens a node for checking; `request` has the options that are not those of the driver itself.
pub(in super::super) async fn open_node(
    request: &mut OpenRequest<'_>,
) -> Result<Box<dyn Driver>, Error> {
    for option in IGNORED {
        request.take(option);
    }
    let file = request.required_child("file", ChildRole::Image).await?;
    if !request.node().read_only {
        request.refuse_left_behind(&file)?;
    }
    let layout = read_layout(&file).await?;
    Ok(Box::new(CheckedImage {
        file,
        size: layout.size,
    }))
}

impl Driver for CheckedImage {
    fn driver_name(&self) -> &'static str {
        "qcow2"
    }
    fn length(&self) -> u64 {
        self.size
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn grows(&self) -> bool {
        false
    }
    fn read(&self, _offset: u64, _buffer: Buffer) -> IoFuture<'_> {
        IoFuture::error(Errno::EPERM)
    }
    fn write(&self, _offset: u64, _buffer: Buffer, _flags: WriteFlags) -> IoFuture<'_> {
        IoFuture::error(Errno::EPERM)
    }
    fn write_zeroes(&self, _range: ByteRange, _flags: ZeroFlags) -> IoFuture<'_> {
        IoFuture::error(Errno::EPERM)
    }
    fn discard(&self, _range: ByteRange) -> IoFuture<'_> {
        IoFuture::error(Errno::EPERM)
    }
    fn flush(&self) -> IoFuture<'_> {
        self.file.node().flush()
    }
    fn block_status(&self, _range: ByteRange) -> BoxFuture<'_, Result<StatusExtent, Errno>> {
        Box::pin(async { Err(Errno::EPERM) })
    }
    fn resize(&self, _resize: Resize) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async { Err(Error::io("The image is open for a check", Errno::EPERM)) })
    }
    fn close(&self) -> BoxFuture<'_, Result<(), Errno>> {
        Box::pin(async { Ok(()) })
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        vec![(self.file.name(), &self.file)]
    }
    fn check<'a>(
        &'a self,
        options: CheckOptions,
        sink: &'a mut dyn CheckSink,
    ) -> BoxFuture<'a, Result<CheckResult, Error>> {
        Box::pin(check(&self.file, options, sink))
    }
    fn describe(&self) -> Map<String, Value> {
        Map::new()
    }
    fn layer(&self) -> Layer {
        Layer::Format
    }
    fn identity(&self) -> Option<ImageIdentity> {
        None
    }
}
