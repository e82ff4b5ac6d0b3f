//! `raw`: the bytes of the child as they are, or a window on them.
//!
//! Options: `file`; `offset` and `size` (bytes) make a window. Without a window the node is
//! transparent: it passes permissions, growth and changes of length through, and hands on the
//! child's own futures. Content is never looked at, so a guest cannot make a raw disk anything
//! else.

use block::create::{CreateRequest, Creator, OptionKind, OptionSpec};
use block::error::Result;
use block::open::{ChildRole, DriverEntry};
use block::{
    BoxFuture, Buffer, ByteRange, Driver, Edge, Errno, Error, ErrorKind, Event, ImageIdentity,
    IoFuture, Layer, Limits, Measured, Node, OpenRequest, Resize, RootHandle, StatusExtent, Stored,
    StoredUse, WriteFlags, ZeroFlags,
};
use serde_json::{Map, Value};

const SECTOR: u64 = 512;

/// The table line of `raw`.
pub const ENTRY: DriverEntry = DriverEntry::new("raw", |request| Box::pin(open(request)))
    .with_strong_options(&["offset", "size"])
    // What nothing else recognises is raw.
    .with_probe(|_| 1)
    .with_create(Creator {
        options: &[OptionSpec::new(
            ("size", "size"),
            OptionKind::Size,
            "Virtual disk size",
        )],
        size_unit: SECTOR,
        create: |request| Box::pin(create(request)),
    })
    .with_measure(|request, source| Box::pin(async move { measure(request, source) }));

/// A raw image is its file.
async fn create(request: &mut CreateRequest<'_>) -> Result<()> {
    let names = ["size", "preallocation", "nocow", "extent-size-hint"];
    let members = names
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), request.take(name)?)))
        .collect();
    request.pass_through(members).await
}

/// All of it counts: files have the length of the disk.
fn measure(request: &mut CreateRequest<'_>, source: Option<&RootHandle>) -> Result<Measured> {
    let bytes = match source {
        Some(source) => source.length(),
        None => request.take_size("size")?.unwrap_or(0),
    };
    let bytes = bytes.checked_next_multiple_of(SECTOR).unwrap_or(bytes);
    Ok(Measured {
        required: bytes,
        fully_allocated: bytes,
        bitmaps: None,
    })
}

/// A window on a child.
pub struct Raw {
    file: Edge,
    offset: u64,
    /// Fixed length of the window; otherwise it reaches to the child's end.
    size: Option<u64>,
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>> {
    let offset = request.take_size("offset")?;
    let size = request.take_size("size")?;
    let role = match offset.is_some() || size.is_some() {
        true => ChildRole::Data,
        false => ChildRole::Filtered,
    };
    let file = request.required_child("file", role).await?;
    Ok(Box::new(Raw::new(file, offset.unwrap_or(0), size)?))
}

impl Raw {
    /// The window of `size` bytes at `offset` of a child; to its end without a `size`.
    pub fn new(file: Edge, offset: u64, size: Option<u64>) -> Result<Self> {
        let invalid = |message| Err(Error::new(ErrorKind::Invalid, message));
        let whole = file.node().length();
        if offset > whole {
            return invalid(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({whole})"
            ));
        }
        if let Some(size) = size {
            if size > whole - offset {
                return invalid(format!(
                    "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to \
                     the  actual size of the containing file ({whole})"
                ));
            }
            if size % SECTOR != 0 {
                return invalid(format!("Specified size is not multiple of {SECTOR}"));
            }
        }
        Ok(Self { file, offset, size })
    }

    fn child(&self) -> &Node {
        self.file.node()
    }

    /// The range as the child sees it; `None` past what offsets can express.
    fn shift(&self, range: ByteRange) -> Option<ByteRange> {
        let offset = range.offset.checked_add(self.offset)?;
        Some(ByteRange::new(offset, range.length))
    }

    fn forward<'a>(
        &'a self,
        range: ByteRange,
        request: impl FnOnce(&'a Node, ByteRange) -> IoFuture<'a>,
    ) -> IoFuture<'a> {
        match self.shift(range) {
            Some(range) => request(self.child(), range),
            None => IoFuture::error(Errno::EINVAL),
        }
    }

    async fn status(&self, range: ByteRange) -> std::result::Result<StatusExtent, Errno> {
        let shifted = self.shift(range).ok_or(Errno::EINVAL)?;
        let mut extent = self.child().block_status(shifted).await?;
        extent.length = extent.length.min(range.length);
        extent.status.offset = Some(shifted.offset);
        Ok(extent)
    }

    async fn set_length(&self, resize: Resize) -> Result<()> {
        if self.size.is_some() {
            let message = "Cannot resize fixed-size raw disks";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let Some(length) = resize.length.checked_add(self.offset) else {
            let message = "Disk size too large for the chosen offset";
            return Err(Error::new(ErrorKind::Invalid, message));
        };
        self.child().resize(Resize { length, ..resize }).await
    }
}

impl Driver for Raw {
    fn driver_name(&self) -> &'static str {
        "raw"
    }
    fn length(&self) -> u64 {
        match self.size {
            Some(size) => size,
            None => self.child().length().saturating_sub(self.offset),
        }
    }
    fn limits(&self) -> Limits {
        self.child().driver().limits().passed_on()
    }
    fn grows(&self) -> bool {
        self.size.is_none() && self.child().driver().grows()
    }
    #[inline]
    fn prefetch(&self, offset: u64) {
        if let Some(range) = self.shift(ByteRange::new(offset, 1)) {
            self.child().prefetch(range.offset);
        }
    }
    fn can_prefetch(&self) -> bool {
        self.child().driver().can_prefetch()
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.forward(range, |child, range| {
            child.after(Event::ReadAio, move || child.read(range.offset, buffer))
        })
    }
    fn reads_zero_when_new(&self) -> bool {
        self.child().driver().reads_zero_when_new()
    }
    fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.forward(range, |child, range| {
            child.after(Event::WriteAio, move || {
                child.write(range.offset, buffer, flags)
            })
        })
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        self.forward(range, |child, range| child.write_zeroes(range, flags))
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        self.forward(range, |child, range| child.discard(range))
    }
    fn flush(&self) -> IoFuture<'_> {
        self.child().flush()
    }
    fn block_status(
        &self,
        range: ByteRange,
    ) -> BoxFuture<'_, std::result::Result<StatusExtent, Errno>> {
        Box::pin(self.status(range))
    }
    fn stored(&self, range: ByteRange, purpose: StoredUse) -> Option<Stored<'_>> {
        self.child().stored(self.shift(range)?, purpose)
    }
    fn resize(&self, resize: Resize) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.set_length(resize))
    }
    fn close(&self) -> BoxFuture<'_, std::result::Result<(), Errno>> {
        Box::pin(async { Ok(()) })
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        vec![("file", &self.file)]
    }
    fn describe(&self) -> Map<String, Value> {
        let mut described = self.child().driver().describe();
        described.retain(|name, _| name == "actual-size");
        described
    }
    fn layer(&self) -> Layer {
        Layer::Format
    }

    fn identity(&self) -> Option<ImageIdentity> {
        self.child().identity()
    }
}
