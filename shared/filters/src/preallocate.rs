//! `preallocate`: the child is made longer ahead of writes that extend it.
//!
//! Options: `file`; `prealloc-size`, how far beyond a write (128 MiB); `prealloc-align`, to a
//! multiple of what (1 MiB).
//!
//! ```text
//!   child:  ├── data ──┤ zeroes, allocated │
//!                      data_end            reserved        node's length = data_end
//!   write below data_end ─► child        beyond reserved ─► zeroes to align(end + size), then the write
//! ```
//!
//! Owns: where data ends. Promises: the node is as long as if nobody preallocated; what is left over is cut
//! off when the node is closed; zeroes written just beyond the data are there already. After a kill the
//! child stays long. Must not know: what the child is.

use crate::filter::{Filter, FilterNode};
use block::error::Result;
use block::open::{ChildRole, DriverEntry};
use block::{
    BoxFuture, Buffer, ByteRange, Driver, Edge, Errno, Error, ErrorKind, IoFuture, OpenRequest,
    Preallocation, Resize, WriteFlags, ZeroFlags,
};
use executor::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// The table line of `preallocate`.
pub const ENTRY: DriverEntry = DriverEntry::new("preallocate", |request| Box::pin(open(request)));

const SECTOR: u64 = 512;
const DEFAULT_ALIGN: u64 = 1 << 20;
const DEFAULT_SIZE: u64 = 128 << 20;

/// The filter.
struct Preallocate {
    file: Edge,
    align: u64,
    size: u64,
    /// Length of the node. Counts a write when it is submitted.
    data_end: AtomicU64,
    /// Held while the child is made longer.
    reserved: Mutex<Reserved>,
}

struct Reserved {
    /// Where the child ends; zeroes from the data's end on.
    end: u64,
    /// The child cannot write zeroes cheaply: it is not asked again.
    refused: bool,
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>> {
    let align = request
        .take_size("prealloc-align")?
        .unwrap_or(DEFAULT_ALIGN);
    let size = request.take_size("prealloc-size")?.unwrap_or(DEFAULT_SIZE);
    if !align.is_multiple_of(SECTOR) {
        let message =
            format!("prealloc-align parameter of preallocate filter is not aligned to {SECTOR}");
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    let file = request
        .required_child("file", ChildRole::Preallocated)
        .await?;
    let end = file.node().length();
    Ok(Box::new(FilterNode(Preallocate {
        file,
        align: align.max(SECTOR),
        size,
        data_end: AtomicU64::new(end),
        reserved: Mutex::new(Reserved {
            end,
            refused: false,
        }),
    })))
}

/// What a request beyond the end does there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    Bytes,
    Zeroes,
}

impl Preallocate {
    fn data_end(&self) -> u64 {
        self.data_end.load(Ordering::Relaxed)
    }

    /// Runs a request that ends beyond the data, which ended at `before` when it came.
    fn extend<'a>(
        &'a self,
        (range, content): (ByteRange, Content),
        request: impl FnOnce() -> IoFuture<'a> + 'a,
    ) -> IoFuture<'a> {
        let Some(end) = range.checked_end() else {
            return IoFuture::error(Errno::EINVAL);
        };
        if end <= self.data_end() {
            return request();
        }
        let before = self.data_end.fetch_max(end, Ordering::Relaxed);
        IoFuture::boxed(async move {
            let mut reserved = self.reserved.lock().await;
            if end > reserved.end {
                self.reserve(&mut reserved, end).await;
            }
            if content == Content::Zeroes && range.offset >= before && end <= reserved.end {
                return Ok(());
            }
            let running = request();
            // Submitted: what is reserved later begins beyond it.
            reserved.end = reserved.end.max(end);
            drop(reserved);
            running.await
        })
    }

    /// Makes the child longer, if it can: a request does not depend on it.
    async fn reserve(&self, reserved: &mut Reserved, end: u64) {
        let target = end
            .checked_add(self.size)
            .and_then(|end| end.checked_next_multiple_of(self.align));
        let Some(target) = target.filter(|target| *target > reserved.end && !reserved.refused)
        else {
            return;
        };
        let range = ByteRange::new(reserved.end, target - reserved.end);
        let flags = ZeroFlags {
            no_fallback: true,
            ..ZeroFlags::default()
        };
        match self.child().write_zeroes(range, flags).await {
            Ok(()) => reserved.end = target,
            Err(Errno::EOPNOTSUPP) => reserved.refused = true,
            Err(errno) => tracing::debug!(%errno, "preallocation failed"),
        }
    }

    /// Cuts off what is reserved beyond the data.
    async fn trim(&self, reserved: &mut Reserved) -> Result<()> {
        let length = self.data_end();
        if self.child().length() > length {
            let trimmed = Resize::to(length);
            self.child().resize(trimmed).await?;
        }
        reserved.end = length;
        Ok(())
    }

    async fn set_length(&self, resize: Resize) -> Result<()> {
        let mut reserved = self.reserved.lock().await;
        if resize.length > self.data_end() {
            let allocated = resize.preallocation == Preallocation::Falloc;
            if allocated && resize.length <= reserved.end {
                self.data_end.store(resize.length, Ordering::Relaxed);
                return Ok(());
            }
            self.trim(&mut reserved).await?;
        }
        self.child().resize(resize).await?;
        self.data_end.store(resize.length, Ordering::Relaxed);
        reserved.end = resize.length;
        Ok(())
    }

    async fn finish(&self) -> std::result::Result<(), Errno> {
        let mut reserved = self.reserved.lock().await;
        if reserved.end <= self.data_end() {
            return Ok(());
        }
        let trimmed = self.trim(&mut reserved).await;
        trimmed.map_err(|error| error.errno.unwrap_or(Errno::EIO))
    }
}

impl Filter for Preallocate {
    fn name(&self) -> &'static str {
        "preallocate"
    }
    fn edge(&self) -> &Edge {
        &self.file
    }
    fn length(&self) -> u64 {
        self.data_end()
    }
    fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.extend((range, Content::Bytes), move || {
            self.child().write(offset, buffer, flags)
        })
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        // What may be deallocated is not to be taken from what is reserved.
        let content = match flags.may_unmap {
            true => Content::Bytes,
            false => Content::Zeroes,
        };
        self.extend((range, content), move || {
            self.child().write_zeroes(range, flags)
        })
    }
    fn resize(&self, resize: Resize) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.set_length(resize))
    }
    fn close(&self) -> BoxFuture<'_, std::result::Result<(), Errno>> {
        Box::pin(self.finish())
    }
}
