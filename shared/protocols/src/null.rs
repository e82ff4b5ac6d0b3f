//! `null-co` and `null-aio`: disks of zero cost, for measuring everything above them. The two names mean
//! the same here: QEMU's differ in how they wait.
//!
//! Options: `size` (bytes, 1 GiB when absent), `latency-ns` (each request takes this long),
//! `read-zeroes` (reads fill the buffer with zeroes; otherwise they leave it as it is). Writes
//! are forgotten.

use block::open::DriverEntry;
use block::{
    BlockStatus, BoxFuture, Buffer, ByteRange, Driver, Edge, Errno, Error, ErrorKind,
    ImageIdentity, IoFuture, Limits, OpenRequest, Protocol, Reach, Resize, StatusExtent,
    WriteFlags, ZeroFlags,
};
use serde_json::{Map, Value};
use std::time::Duration;

const DEFAULT_SIZE: u64 = 1 << 30;

/// The table line of `null-co`.
pub const ENTRY: DriverEntry = DriverEntry::new(COROUTINE, |request| {
    Box::pin(async move { open(request, COROUTINE) })
})
.with_protocol(Protocol {
    prefixes: &[COROUTINE],
    parse: |_, name| parse(COROUTINE, name),
    reach: Reach::Nothing,
})
.with_strong_options(STRONG_OPTIONS);

/// The table line of `null-aio`.
pub const AIO_ENTRY: DriverEntry = DriverEntry::new(CALLBACK, |request| {
    Box::pin(async move { open(request, CALLBACK) })
})
.with_protocol(Protocol {
    prefixes: &[CALLBACK],
    parse: |_, name| parse(CALLBACK, name),
    reach: Reach::Nothing,
})
.with_strong_options(STRONG_OPTIONS);

const COROUTINE: &str = "null-co";

const CALLBACK: &str = "null-aio";

const STRONG_OPTIONS: &[&str] = &["size", "read-zeroes"];

/// A name says nothing but the protocol.
fn parse(driver: &str, name: &str) -> block::error::Result<Map<String, Value>> {
    match name.strip_prefix(driver) {
        Some("://") => Ok(Map::new()),
        _ => Err(Error::new(
            ErrorKind::Invalid,
            format!("The only allowed filename for this driver is '{driver}://'"),
        )),
    }
}

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
    /// Whether `size` and `read-zeroes` are what they are by default.
    pub is_default: bool,
}

impl Default for Null {
    fn default() -> Self {
        Self {
            driver: COROUTINE,
            size: DEFAULT_SIZE,
            latency: Duration::ZERO,
            read_zeroes: false,
            is_default: true,
        }
    }
}

fn open(
    request: &mut OpenRequest<'_>,
    driver: &'static str,
) -> block::error::Result<Box<dyn Driver>> {
    let size = request.take_size("size")?;
    let latency_ns = request.take_int("latency-ns")?.unwrap_or(0);
    let latency_ns = u64::try_from(latency_ns)
        .map_err(|_| Error::new(ErrorKind::Invalid, "latency-ns is invalid"))?;
    let read_zeroes = request.take_bool("read-zeroes")?;
    let is_default = size.is_none() && read_zeroes.is_none();
    let size = size.unwrap_or(DEFAULT_SIZE);
    if i64::try_from(size).is_err() {
        return Err(Error::new(ErrorKind::Invalid, "size is too large"));
    }
    Ok(Box::new(Null {
        driver,
        size,
        latency: Duration::from_nanos(latency_ns),
        read_zeroes: read_zeroes.unwrap_or(false),
        is_default,
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
        Box::pin(async { Err(Error::resize_unsupported()) })
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
        match self.is_default {
            true => format!("{}://", self.driver),
            false => String::new(),
        }
    }

    fn identity(&self) -> Option<ImageIdentity> {
        None
    }
}
