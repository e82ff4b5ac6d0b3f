//! Deflate and Zstandard over whole buffers.
//!
//! One cluster goes in or comes out; nothing a stream says makes either take more memory than
//! that, because output ends where the buffer does and no window beyond it is kept. The states
//! of the libraries are made once for each thread.

use crate::chunks::BadStream;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use std::cell::RefCell;
use zstd_safe::{CCtx, DCtx};

/// How an image's compressed clusters are encoded (the header's compression type).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Codec {
    /// Raw deflate.
    #[default]
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// log2 of the window of deflate streams: readers allocate no more.
const WINDOW_BITS: u8 = 12;
/// What the zlib command line calls the default.
const ZLIB_LEVEL: u32 = 6;
/// What the zstd command line calls the default.
const ZSTD_LEVEL: i32 = 3;

thread_local! {
    static DEFLATE: RefCell<Option<Compress>> = const { RefCell::new(None) };
    static INFLATE: RefCell<Option<Decompress>> = const { RefCell::new(None) };
    static ZSTD_ENCODE: RefCell<Option<CCtx<'static>>> = const { RefCell::new(None) };
    static ZSTD_DECODE: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
}

impl Codec {
    /// The codec of a header's compression type.
    pub(crate) const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Zlib),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }

    /// Its name in options and descriptions.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }

    /// Longest output that is decoded between two requests rather than on another thread: what
    /// takes about 50 microseconds.
    pub(crate) const fn decoded_inline(self) -> usize {
        match self {
            Self::Zlib => 32 << 10,
            Self::Zstd => 64 << 10,
        }
    }

    /// Longest input that is encoded between two requests.
    pub(crate) const fn encoded_inline(self) -> usize {
        match self {
            Self::Zlib => 4 << 10,
            Self::Zstd => 16 << 10,
        }
    }

    /// Encodes `plain` into `packed`; `None` when it does not fit. Answers with its length.
    pub(crate) fn encode(self, plain: &[u8], packed: &mut [u8]) -> Option<usize> {
        match self {
            Self::Zlib => DEFLATE.with_borrow_mut(|state| {
                let level = Compression::new(ZLIB_LEVEL);
                let deflate = state.get_or_insert_with(|| {
                    Compress::new_with_window_bits(level, false, WINDOW_BITS)
                });
                deflate.reset();
                match deflate.compress(plain, packed, FlushCompress::Finish) {
                    Ok(flate2::Status::StreamEnd) => Some(deflate.total_out() as usize),
                    _ => {
                        // A reset does not empty the output that found no room: after some
                        // thousand of them the library would run into the end of its buffer.
                        *state = None;
                        None
                    }
                }
            }),
            Self::Zstd => ZSTD_ENCODE.with_borrow_mut(|state| {
                let context = state.get_or_insert_with(CCtx::create);
                context.compress(packed, plain, ZSTD_LEVEL).ok()
            }),
        }
    }

    /// Fills `plain` from `packed`, which may hold more behind the stream.
    pub(crate) fn decode(self, packed: &[u8], plain: &mut [u8]) -> Result<(), BadStream> {
        match self {
            Self::Zlib => INFLATE.with_borrow_mut(|state| {
                let inflate = state.get_or_insert_with(|| Decompress::new(false));
                inflate.reset(false);
                // Not every writer ends its stream; what counts is that the cluster is full.
                let result = inflate.decompress(packed, plain, FlushDecompress::Finish);
                match result {
                    Ok(_) if inflate.total_out() == plain.len() as u64 => Ok(()),
                    _ => Err(BadStream),
                }
            }),
            Self::Zstd => ZSTD_DECODE.with_borrow_mut(|state| {
                let context = state.get_or_insert_with(DCtx::create);
                decode_frames(context, packed, plain)
            }),
        }
    }
}

/// Decodes frame after frame until `plain` is full.
fn decode_frames(
    context: &mut DCtx<'_>,
    mut packed: &[u8],
    mut plain: &mut [u8],
) -> Result<(), BadStream> {
    while !plain.is_empty() {
        let length = zstd_safe::find_frame_compressed_size(packed).map_err(|_| BadStream)?;
        let frame = packed.get(..length).filter(|frame| !frame.is_empty());
        let decoded = context.decompress(plain, frame.ok_or(BadStream)?);
        let decoded = decoded.map_err(|_| BadStream)?;
        packed = &packed[length..];
        plain = plain.get_mut(decoded..).ok_or(BadStream)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at / 7 % 200) as u8).collect()
    }

    #[test]
    fn what_was_encoded_is_decoded_whatever_follows_it() {
        for codec in [Codec::Zlib, Codec::Zstd] {
            for length in [512, 65536, 2 << 20] {
                let plain = sample(length);
                let mut packed = vec![0xee; length];
                let size = codec.encode(&plain, &mut packed[..length - 1]).unwrap();
                let mut decoded = vec![0; length];
                for end in [size, size + 1, length] {
                    decoded.fill(0);
                    codec.decode(&packed[..end], &mut decoded).unwrap();
                    assert!(decoded == plain, "{codec:?} {length} {end}");
                }
                let cut = codec.decode(&packed[..size / 2], &mut decoded);
                assert_eq!(cut, Err(BadStream), "{codec:?} {length}");
            }
        }
    }

    #[test]
    fn a_stream_that_is_too_short_or_too_long_is_no_cluster() {
        let plain = sample(4096);
        let mut packed = vec![0; 4096];
        let size = Codec::Zstd.encode(&plain, &mut packed).unwrap();
        let mut longer = vec![0; 4097];
        let bad = Codec::Zstd.decode(&packed[..size], &mut longer);
        assert_eq!(bad, Err(BadStream));
        let bad = Codec::Zstd.decode(&packed[..size], &mut longer[..4095]);
        assert_eq!(bad, Err(BadStream));
        let size = Codec::Zlib.encode(&plain, &mut packed).unwrap();
        let bad = Codec::Zlib.decode(&packed[..size], &mut longer);
        assert_eq!(bad, Err(BadStream));
    }

    #[test]
    fn noise_neither_decodes_nor_panics() {
        use rand::{RngCore, SeedableRng};
        for seed in 0..200 {
            let mut random = rand::rngs::SmallRng::seed_from_u64(seed);
            let mut noise = vec![0; 2000];
            random.fill_bytes(&mut noise);
            if seed % 2 == 0 {
                noise[..4].copy_from_slice(&0xfd2f_b528_u32.to_le_bytes());
            }
            let mut plain = vec![0; 65536];
            for codec in [Codec::Zlib, Codec::Zstd] {
                assert_eq!(codec.decode(&noise, &mut plain), Err(BadStream), "{seed}");
            }
        }
    }

    #[test]
    fn what_does_not_get_smaller_is_not_encoded() {
        use rand::{RngCore, SeedableRng};
        let mut noise = vec![0; 4096];
        rand::rngs::SmallRng::seed_from_u64(1).fill_bytes(&mut noise);
        for codec in [Codec::Zlib, Codec::Zstd] {
            for length in [4096, 512] {
                for _ in 0..2000 {
                    let mut packed = vec![0; length - 1];
                    assert_eq!(codec.encode(&noise[..length], &mut packed), None);
                }
            }
        }
    }
}
