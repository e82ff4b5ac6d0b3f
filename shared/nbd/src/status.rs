//! Metadata contexts and the extents that `BLOCK_STATUS` answers with.
//!
//! ```text
//!   compact:   context:32           (length:32  flags:32)*
//!   extended:  context:32  count:32 (length:64  flags:64)*
//! ```

use crate::bytes::Reader;
use crate::error::ProtocolError;

/// The context of the specification: holes and zeroes. Its flags are [`BaseAllocation`].
pub const BASE_ALLOCATION: &str = "base:allocation";

/// QEMU's context: how deep in the backing chain an extent is; 0 nowhere, 1 in the top image.
pub const QEMU_ALLOCATION_DEPTH: &str = "qemu:allocation-depth";

/// QEMU's contexts for dirty bitmaps: this and the bitmap's name. The flags are 1 where the bitmap is dirty, else 0.
pub const QEMU_DIRTY_BITMAP_PREFIX: &str = "qemu:dirty-bitmap:";

/// The flags of [`BASE_ALLOCATION`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BaseAllocation {
    /// No storage is allocated.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

impl BaseAllocation {
    /// The flags of a wire value; bits that are not defined are left out.
    pub fn from_wire(flags: u64) -> Self {
        Self {
            hole: flags & 1 != 0,
            zero: flags & 2 != 0,
        }
    }

    /// The wire value.
    pub fn to_wire(self) -> u64 {
        u64::from(self.hole) | u64::from(self.zero) << 1
    }
}

/// A run of bytes with the same flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    /// How many bytes.
    pub length: u64,
    /// What the context says of them.
    pub flags: u64,
}

/// The extents of one context, one behind the other from the request's offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockStatus {
    /// The context's number, from the handshake.
    pub context: u32,
    /// At least one.
    pub extents: Vec<StatusExtent>,
}

impl BlockStatus {
    /// 32-bit lengths and flags; the sender keeps within them.
    pub(crate) fn encode_compact(&self) -> Vec<u8> {
        let mut out = self.context.to_be_bytes().to_vec();
        for extent in &self.extents {
            out.extend_from_slice(&(extent.length as u32).to_be_bytes());
            out.extend_from_slice(&(extent.flags as u32).to_be_bytes());
        }
        out
    }

    pub(crate) fn encode_extended(&self) -> Vec<u8> {
        let mut out = self.context.to_be_bytes().to_vec();
        out.extend_from_slice(&(self.extents.len() as u32).to_be_bytes());
        for extent in &self.extents {
            out.extend_from_slice(&extent.length.to_be_bytes());
            out.extend_from_slice(&extent.flags.to_be_bytes());
        }
        out
    }

    pub(crate) fn decode_compact(reader: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let context = reader.u32()?;
        let mut extents = Vec::with_capacity(reader.remaining() / 8);
        while reader.remaining() > 0 {
            extents.push(StatusExtent {
                length: u64::from(reader.u32()?),
                flags: u64::from(reader.u32()?),
            });
        }
        Self::checked(context, extents)
    }

    pub(crate) fn decode_extended(reader: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let context = reader.u32()?;
        let count = reader.u32()? as usize;
        if reader.remaining() != count.saturating_mul(16) {
            return Err(ProtocolError::BadValue {
                what: "the number of extents",
                value: count as u64,
            });
        }
        let mut extents = Vec::with_capacity(count);
        for _ in 0..count {
            extents.push(StatusExtent {
                length: reader.u64()?,
                flags: reader.u64()?,
            });
        }
        Self::checked(context, extents)
    }

    fn checked(context: u32, extents: Vec<StatusExtent>) -> Result<Self, ProtocolError> {
        if extents.is_empty() || extents.iter().any(|extent| extent.length == 0) {
            return Err(ProtocolError::BadValue {
                what: "the length of an extent",
                value: 0,
            });
        }
        Ok(Self { context, extents })
    }
}
