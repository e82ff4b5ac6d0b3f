//! Big-endian integers and counted strings, in and out of byte strings.

use crate::error::ProtocolError;
use crate::limits::MAX_STRING;

/// Takes values off the front of a message, and remembers what the message is for its errors.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    pub(crate) fn take(&mut self, length: usize) -> Result<&'a [u8], ProtocolError> {
        let (head, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or(ProtocolError::Short { what: self.what })?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        let (head, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(ProtocolError::Short { what: self.what })?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, ProtocolError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, ProtocolError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, ProtocolError> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with its length before it, in 32 bits.
    pub(crate) fn counted_string(&mut self) -> Result<String, ProtocolError> {
        let length = self.u32()? as usize;
        if length > MAX_STRING {
            return Err(ProtocolError::LongString { what: self.what });
        }
        let bytes = self.take(length)?;
        self.text(bytes)
    }

    /// The rest of the message, as a string.
    pub(crate) fn rest_string(&mut self) -> Result<String, ProtocolError> {
        if self.rest.len() > MAX_STRING {
            return Err(ProtocolError::LongString { what: self.what });
        }
        let bytes = std::mem::take(&mut self.rest);
        self.text(bytes)
    }

    fn text(&self, bytes: &[u8]) -> Result<String, ProtocolError> {
        match std::str::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => Ok(text.to_string()),
            _ => Err(ProtocolError::BadString { what: self.what }),
        }
    }

    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// The message must be over.
    pub(crate) fn end(self) -> Result<(), ProtocolError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(ProtocolError::Long { what: self.what })
        }
    }

    /// A magic number must come next.
    pub(crate) fn magic(&mut self, expected: u64) -> Result<(), ProtocolError> {
        let found = self.u64()?;
        self.check_magic(found, expected)
    }

    pub(crate) fn check_magic(&self, found: u64, expected: u64) -> Result<(), ProtocolError> {
        if found == expected {
            Ok(())
        } else {
            Err(ProtocolError::BadMagic {
                what: self.what,
                found,
            })
        }
    }
}

/// Appends a string with its length before it.
pub(crate) fn put_counted_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Writes fields one after another into a fixed header.
pub(crate) struct Fields<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Fields<N> {
    pub(crate) fn new() -> Self {
        Self {
            bytes: [0; N],
            at: 0,
        }
    }

    pub(crate) fn put(mut self, field: &[u8]) -> Self {
        self.bytes[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
        self
    }

    pub(crate) fn u16(self, value: u16) -> Self {
        self.put(&value.to_be_bytes())
    }

    pub(crate) fn u32(self, value: u32) -> Self {
        self.put(&value.to_be_bytes())
    }

    pub(crate) fn u64(self, value: u64) -> Self {
        self.put(&value.to_be_bytes())
    }

    pub(crate) fn finish(self) -> [u8; N] {
        self.bytes
    }
}
