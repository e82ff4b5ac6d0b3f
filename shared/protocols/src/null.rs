//! `null-co` and `null-aio`: disks of zero cost, for measuring everything above them. The two names mean
//! the same here: QEMU's differ in how they wait.
//!
//! Options: `size` (bytes, 1 GiB when absent), `latency-ns` (each request takes this long),
//! `read-zeroes` (reads fill the buffer with zeroes; otherwise they leave it as it is). Writes
//! are forgotten.

use block::open::DriverEntry;
use block::{
    BlockStatus, BoxFuture, Buffer, ByteRange, Driver, Edge, Errno, Error, ErrorKind,
    ImageIdentity, IoFuture, Limits, OpenRequest, Resize, StatusExtent, WriteFlags, ZeroFlags,
};
use serde_json::{Map, Value};
use std::time::Duration;

const DEFAULT_SIZE: u64 = 1 << 30;

/// The table line of `null-co`.
pub const ENTRY: DriverEntry = DriverEntry::new(COROUTINE, |request| {
    Box::pin(async move { open(request, COROUTINE) })
});

/// The table line of `null-aio`.
pub const AIO_ENTRY: DriverEntry = DriverEntry::new(CALLBACK, |request| {
    Box::pin(async move { open(request, CALLBACK) })
});

const COROUTINE: &str = "null-co";

const CALLBACK: &str = "null-aio";

/// A disk that holds nothing.
#[derive(Clone, Copy, Debug)]
pub struct Null {
    /// What the driver is called.
    pub driver: &'static str,
    /// Length in bytes.
    pub size: u64,
    /// What each request takes.
    pub latency: Duration,
    /// Whether reads fill the buffer.
    pub read_zeroes: bool,
}

impl Default for Null {
    fn default() -> Self {
        Self {
            driver: COROUTINE,
            size: DEFAULT_SIZE,
            latency: Duration::ZERO,
            read_zeroes: false,
        }
    }
}

fn open(
    request: &mut OpenRequest<'_>,
    driver: &'static str,
) -> block::error::Result<Box<dyn Driver>> {
    let size = request.take_size("size")?.unwrap_or(DEFAULT_SIZE);
    let latency_ns = request.take_size("latency-ns")?.unwrap_or(0);
    if i64::try_from(latency_ns).is_err() {
        return Err(Error::new(ErrorKind::Invalid, "latency-ns is invalid"));
    }
    if i64::try_from(size).is_err() {
        return Err(Error::new(ErrorKind::Invalid, "size is too large"));
    }
    Ok(Box::new(Null {
        driver,
        size,
        latency: Duration::from_nanos(latency_ns),
        read_zeroes: request.take_bool("read-zeroes")?.unwrap_or(false),
    }))
}

impl Null {
    #[inline]
    fn finish(&self) -> IoFuture<'static> {
        if self.latency.is_zero() {
            return IoFuture::done();
        }
        let latency = self.latency;
        IoFuture::boxed(async move {
            executor::time::sleep(latency).await;
            Ok(())
        })
    }
}

impl Driver for Null {
    fn driver_name(&self) -> &'static str {
        self.driver
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
    fn read(&self, _offset: u64, buffer: Buffer) -> IoFuture<'_> {
        if self.read_zeroes {
            buffer.fill(0);
        }
        self.finish()
    }
    fn write(&self, _offset: u64, _buffer: Buffer, _flags: WriteFlags) -> IoFuture<'_> {
        self.finish()
    }
    fn write_zeroes(&self, _range: ByteRange, _flags: ZeroFlags) -> IoFuture<'_> {
        self.finish()
    }
    fn discard(&self, _range: ByteRange) -> IoFuture<'_> {
        self.finish()
    }
    fn flush(&self) -> IoFuture<'_> {
        self.finish()
    }
    fn block_status(&self, range: ByteRange) -> BoxFuture<'_, Result<StatusExtent, Errno>> {
        let status = BlockStatus {
            data: !self.read_zeroes,
            zero: self.read_zeroes,
            allocated: true,
            offset: Some(range.offset),
            compressed: false,
            sparse: false,
        };
        let extent = StatusExtent {
            length: range.length,
            status,
        };
        Box::pin(async move { Ok(extent) })
    }
    fn resize(&self, _resize: Resize) -> BoxFuture<'_, Result<(), Error>> {
        let message = "Image format driver does not support resize";
        Box::pin(async move { Err(Error::new(ErrorKind::Unsupported, message)) })
    }
    fn close(&self) -> BoxFuture<'_, Result<(), Errno>> {
        Box::pin(async { Ok(()) })
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        Vec::new()
    }
    fn describe(&self) -> Map<String, Value> {
        Map::from_iter([("actual-size".to_owned(), Value::from(0))])
    }
    fn filename(&self) -> String {
        format!("{}://", self.driver)
    }

    fn identity(&self) -> Option<ImageIdentity> {
        None
    }
}
