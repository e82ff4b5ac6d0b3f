//! Parts of an image that never change and are kept in memory: tables, and chunks that were decompressed.
//!
//! ```text
//!   get(key) ── kept? ──yes──► chunk
//!     └─no─► nobody else makes it? ─► read, decode (on a worker when it takes long) ─► kept
//! ```
//!
//! What a key stands for does not change, or all are forgotten. Each key has one place, which others share:
//! a chunk stays until one of those is made. Promises: whoever looks waits for no I/O and no
//! computing; about [`KEPT_BYTES`] of chunks, or one, are kept, and as many bytes as
//! [`MAKING_BYTES`], or one chunk, are being made at a time, whatever an image says.

use block::{Buffer, ByteRange, Edge, Errno, HeapBuffer};
use executor::sync::{RangeLock, Semaphore};
use executor::workers::offload;
use std::future::Future;
use std::sync::{Arc, PoisonError, RwLock};

/// Memory for the chunks of one image, in bytes.
const KEPT_BYTES: usize = 4 << 20;
/// Most chunks kept.
const MAX_PLACES: usize = 1024;
/// Memory for chunks that are being made, in bytes.
const MAKING_BYTES: usize = 32 << 20;
/// Most chunks made at a time.
const MAX_MAKING: usize = 8;
/// Longest chunk that is decoded between two requests rather than on another thread: what takes
/// about 50 microseconds.
const DECODED_INLINE: usize = 32 << 10;

/// A chunk and its key.
type Place = RwLock<Option<(u64, Arc<HeapBuffer>)>>;

/// See the module.
pub(crate) struct Chunks {
    places: Box<[Place]>,
    /// Keys whose chunks are being made: others who want them wait.
    busy: RangeLock,
    making: Semaphore,
}

/// A stream that does not hold what it has to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadStream;

/// Fills all of the second from the first, which may hold more behind its stream.
pub(crate) type Decoder = fn(&[u8], &mut [u8]) -> Result<(), BadStream>;

impl Chunks {
    /// For chunks of at most `largest` bytes.
    pub(crate) fn new(largest: usize) -> Self {
        let places = (KEPT_BYTES / largest.max(1)).clamp(1, MAX_PLACES);
        let making = (MAKING_BYTES / largest.max(1)).clamp(1, MAX_MAKING);
        Self {
            places: (0..places).map(|_| Place::default()).collect(),
            busy: RangeLock::new(),
            making: Semaphore::new(making),
        }
    }

    fn place(&self, key: u64) -> &Place {
        &self.places[(key % self.places.len() as u64) as usize]
    }

    /// The chunk, if it is kept.
    pub(crate) fn peek(&self, key: u64) -> Option<Arc<HeapBuffer>> {
        let place = self.place(key).read();
        match &*place.unwrap_or_else(PoisonError::into_inner) {
            Some((kept, chunk)) if *kept == key => Some(Arc::clone(chunk)),
            _ => None,
        }
    }

    /// Forgets every chunk; none is being made.
    pub(crate) fn forget_all(&self) {
        for place in &self.places {
            let place = place.write();
            *place.unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    /// The chunk, made if it is not kept.
    pub(crate) async fn get<F>(
        &self,
        key: u64,
        make: impl FnOnce() -> F,
    ) -> Result<Arc<HeapBuffer>, Errno>
    where
        F: Future<Output = Result<HeapBuffer, Errno>>,
    {
        if let Some(chunk) = self.peek(key) {
            return Ok(chunk);
        }
        let _busy = self.busy.lock(key..key.saturating_add(1)).await;
        // Whoever was here before has made it.
        if let Some(chunk) = self.peek(key) {
            return Ok(chunk);
        }
        let _making = self.making.acquire().await;
        let chunk = Arc::new(make().await?);
        let mut place = self.place(key).write();
        let place = place.as_mut().unwrap_or_else(|poisoned| poisoned.get_mut());
        **place = Some((key, Arc::clone(&chunk)));
        Ok(chunk)
    }
}

/// Copies the part of a chunk that begins at `start`.
pub(crate) fn copy_part(chunk: &HeapBuffer, start: usize, buffer: &Buffer) -> Result<(), Errno> {
    let part = start
        .checked_add(buffer.len())
        .and_then(|end| chunk.get(start..end));
    buffer.copy_from_slice(part.ok_or(Errno::EIO)?);
    Ok(())
}

/// The `length` bytes that are stored encoded in `packed` of a file. `EIO` when they are not, with a
/// warning that names the file and the place.
pub(crate) async fn decode(
    file: &Edge,
    (packed, decoder): (ByteRange, Decoder),
    length: usize,
) -> Result<HeapBuffer, Errno> {
    let node = file.node();
    let fault = |what: &str| {
        let ByteRange { offset, length } = packed;
        tracing::warn!(file = node.name(), offset, length, "{what}");
        Errno::EIO
    };
    if packed.checked_end().is_none_or(|end| end > node.length()) {
        return Err(fault("a compressed chunk lies beyond the end of the file"));
    }
    let read = Buffer::zeroed(packed.length as usize);
    node.read(packed.offset, read.clone()).await?;
    let bytes = read.into_heap();
    let work = move || {
        let mut plain = HeapBuffer::zeroed(length);
        decoder(&bytes, &mut plain).map(|()| plain)
    };
    let decoded = match length <= DECODED_INLINE {
        true => work(),
        false => offload(work).await,
    };
    decoded.map_err(|BadStream| fault("a chunk cannot be decompressed"))
}

/// Zlib's format (RFC 1950).
pub(crate) fn inflate(packed: &[u8], plain: &mut [u8]) -> Result<(), BadStream> {
    use flate2::{Decompress, FlushDecompress};
    let mut inflate = Decompress::new(true);
    let result = inflate.decompress(packed, plain, FlushDecompress::Finish);
    match result {
        Ok(_) if inflate.total_out() == plain.len() as u64 => Ok(()),
        _ => Err(BadStream),
    }
}
