//! Compressed grains: a marker, and a stream in zlib's format (RFC 1950); the next begins at a sector.
//!
//! ```text
//!   first sector on the extent, u64 │ bytes of the stream, u32 │ stream │ zeroes up to a sector
//! ```

use super::SECTOR;
use crate::bytes::read_bytes;
use crate::chunks::{decode, inflate};
use block::format::EncodedBytes;
use block::{Buffer, ByteRange, Edge, Errno, HeapBuffer};
use executor::workers::offload;
use flate2::{Compress, Compression, FlushCompress, Status};

/// Bytes of a marker before the stream.
const MARKER_BYTES: usize = 12;
/// What the zlib command line calls the default.
const LEVEL: u32 = 6;

/// The `length` bytes of the grain that is stored at `at`, behind a marker or not.
pub(super) async fn read_grain(
    file: &Edge,
    (at, has_marker): (u64, bool),
    length: usize,
) -> Result<HeapBuffer, Errno> {
    // A stream that is longer than twice what it holds is none.
    let most = 2 * length as u64 + SECTOR;
    let packed = match has_marker {
        true => {
            let marker = read_bytes(file, at, MARKER_BYTES).await?;
            let size = marker[8..]
                .first_chunk()
                .map_or(0, |it| u32::from_le_bytes(*it));
            ByteRange::new(at.saturating_add(MARKER_BYTES as u64), size.into())
        }
        false => {
            let rest = file.node().length().saturating_sub(at);
            ByteRange::new(at, rest.min(most))
        }
    };
    if packed.length == 0 || packed.length > most {
        let bytes = packed.length;
        tracing::warn!(
            file = file.node().name(),
            at,
            bytes,
            "impossible length of a grain"
        );
        return Err(Errno::EIO);
    }
    decode(file, (packed, inflate), length).await
}

/// A grain, or what the extent has of its last one, as it is stored.
pub(super) async fn encode_grain(first_sector: u64, plain: Buffer) -> Result<EncodedBytes, Errno> {
    let plain = plain.into_heap();
    offload(move || encode(first_sector, &plain)).await
}

fn encode(first_sector: u64, plain: &[u8]) -> Result<EncodedBytes, Errno> {
    // Deflate stores what it cannot compress in blocks with headers of some bytes.
    let most = MARKER_BYTES + plain.len() + plain.len() / 1024 + 64;
    let mut memory = HeapBuffer::zeroed(most.next_multiple_of(SECTOR as usize));
    let mut deflate = Compress::new(Compression::new(LEVEL), true);
    let end = most;
    let status = deflate.compress(plain, &mut memory[MARKER_BYTES..end], FlushCompress::Finish);
    if !matches!(status, Ok(Status::StreamEnd)) {
        return Err(Errno::EIO);
    }
    let size = deflate.total_out();
    memory[..8].copy_from_slice(&first_sector.to_le_bytes());
    memory[8..MARKER_BYTES].copy_from_slice(&(size as u32).to_le_bytes());
    let length = (MARKER_BYTES as u64 + size).next_multiple_of(SECTOR) as usize;
    Ok(EncodedBytes { memory, length })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{RngCore, SeedableRng};

    #[test]
    fn what_does_not_compress_is_stored_all_the_same() {
        let mut plain = vec![0; 65536];
        SmallRng::seed_from_u64(1).fill_bytes(&mut plain);
        for length in [512, 65536] {
            let encoded = encode(128, &plain[..length]).unwrap();
            assert!(encoded.length.is_multiple_of(512) && encoded.length > length);
            let size = u32::from_le_bytes(encoded.memory[8..12].try_into().unwrap());
            let mut decoded = vec![0; length];
            let packed = &encoded.memory[MARKER_BYTES..][..size as usize];
            assert_eq!(inflate(packed, &mut decoded), Ok(()));
            assert!(decoded == plain[..length] && encoded.memory[0] == 128);
        }
    }
}
