//! Ethernet frames on their way through the daemon.
//!
//! A guest can change a frame's bytes at any time. So its first [`HEAD_LEN`] bytes are copied once, every decision is made on
//! that copy, and the copy is what goes on: a filter can not be shown one source address and the network another.
//!
//! ```text
//!   virtio-net header (12 bytes) │ head: private copy, ≤ HEAD_LEN │ tail: pieces of memory that may be a guest's
//! ```

#![expect(
    unsafe_code,
    reason = "the tail of a frame is reached through raw pointers"
)]

use std::marker::PhantomData;

use serde::{Deserialize, Serialize};

/// Bytes of a frame that are copied before anything looks at them: more than Ethernet with two tags, IP with options and TCP
/// with options take, and than a neighbour solicitation does.
pub const HEAD_LEN: usize = 192;

/// Longest frame in bytes, without the virtio-net header: an IP packet of 64 KiB to be segmented, with tags.
pub const MAX_FRAME: usize = 65_535 + 14 + 8;

/// An IEEE 802 address.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// All stations.
    pub const BROADCAST: MacAddress = MacAddress([0xff; 6]);

    /// The address as the low 48 bits of a word, its last byte lowest.
    pub fn to_word(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }

    /// The address that is in a word; `None` for one of more than 48 bits.
    pub fn from_word(word: u64) -> Option<MacAddress> {
        let [0, 0, address @ ..] = word.to_be_bytes() else {
            return None;
        };
        Some(MacAddress(address))
    }

    /// Whether it names a group of stations, all of them included.
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl std::fmt::Display for MacAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Why a text is no MAC address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a MAC address (six hexadecimal bytes with colons)")]
pub struct MacAddressError(String);

impl std::str::FromStr for MacAddress {
    type Err = MacAddressError;

    /// Six pairs of hexadecimal digits with colons or hyphens between them.
    fn from_str(text: &str) -> Result<Self, MacAddressError> {
        let wrong = || MacAddressError(text.to_owned());
        let mut parts = text.split([':', '-']);
        let mut bytes = [0; 6];
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(wrong)?;
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        match parts.next() {
            None => Ok(MacAddress(bytes)),
            Some(_) => Err(wrong()),
        }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacAddressError;

    fn try_from(text: String) -> Result<Self, MacAddressError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(address: MacAddress) -> String {
        address.to_string()
    }
}

/// `struct virtio_net_hdr_v1` (virtio 1.2 section 5.1.6): what is left to do for a frame. Fields in host order here,
/// little-endian in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// `VIRTIO_NET_HDR_F_*`
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`
    pub gso_type: u8,
    /// Bytes of all headers, a hint.
    pub hdr_len: u16,
    /// Payload bytes of one segment.
    pub gso_size: u16,
    /// Where the checksum begins to cover the frame, from its first byte.
    pub csum_start: u16,
    /// Where the checksum goes, from `csum_start`.
    pub csum_offset: u16,
    /// Buffers that a received frame takes; only towards a guest.
    pub num_buffers: u16,
}

impl VnetHeader {
    /// Its length in memory in bytes.
    pub const LEN: usize = 12;

    /// Reads it from memory order.
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        VnetHeader {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }

    /// Writes it in memory order.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
            self.num_buffers,
        ];
        for (target, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            target.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// A frame that something handles right now.
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    /// What is left to do for it.
    pub header: VnetHeader,
    head: &'a [u8],
    tail: &'a [libc::iovec],
    len: usize,
    memory: PhantomData<&'a [u8]>,
}

impl<'a> Frame<'a> {
    /// A frame in private memory.
    pub fn new(header: VnetHeader, bytes: &'a [u8]) -> Frame<'a> {
        Frame {
            header,
            head: bytes,
            tail: &[],
            len: bytes.len(),
            memory: PhantomData,
        }
    }

    /// A frame whose first bytes, [`HEAD_LEN`] or all, are copied in `head`, and whose others lie in the pieces of `tail`.
    ///
    /// # Safety
    /// Every piece of `tail` is readable memory for as long as `'a`. Others may change its bytes meanwhile.
    pub unsafe fn with_tail(
        header: VnetHeader,
        head: &'a [u8],
        tail: &'a [libc::iovec],
    ) -> Frame<'a> {
        let rest: usize = tail.iter().map(|piece| piece.iov_len).sum();
        Frame {
            header,
            head,
            tail,
            len: head.len() + rest,
            memory: PhantomData,
        }
    }

    /// A frame in private memory of two parts: its first bytes, and the `rest`, which `piece` is made to name.
    pub fn of_parts(
        header: VnetHeader,
        head: &'a [u8],
        rest: &'a [u8],
        piece: &'a mut libc::iovec,
    ) -> Frame<'a> {
        *piece = libc::iovec {
            iov_base: rest.as_ptr().cast_mut().cast(),
            iov_len: rest.len(),
        };
        Frame {
            header,
            head,
            tail: std::slice::from_ref(piece),
            len: head.len() + rest.len(),
            memory: PhantomData,
        }
    }

    /// The same bytes with another header.
    pub fn with_header(self, header: VnetHeader) -> Frame<'a> {
        Frame { header, ..self }
    }

    /// The same frame with another head, which may be longer or shorter.
    pub fn with_head(self, header: VnetHeader, head: &'a [u8]) -> Frame<'a> {
        Frame {
            header,
            head,
            len: self.len - self.head.len() + head.len(),
            ..self
        }
    }

    /// Its length in bytes, from the destination address on, without a frame check sequence.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no byte.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its first bytes: at least [`HEAD_LEN`] of them, less a tag that was taken off, or all. They do not change.
    #[inline]
    pub fn head(&self) -> &'a [u8] {
        self.head
    }

    /// What follows [`Frame::head`], for the kernel to read.
    #[inline]
    pub fn tail(&self) -> &'a [libc::iovec] {
        self.tail
    }

    /// The station that it is for; all zeroes when it is too short.
    #[inline]
    pub fn destination(&self) -> MacAddress {
        self.address(0)
    }

    /// The station that it claims to be from; all zeroes when it is too short.
    #[inline]
    pub fn source(&self) -> MacAddress {
        self.address(6)
    }

    #[inline]
    fn address(&self, at: usize) -> MacAddress {
        match self
            .head
            .get(at..at + 6)
            .and_then(|bytes| bytes.try_into().ok())
        {
            Some(bytes) => MacAddress(bytes),
            None => MacAddress::default(),
        }
    }

    /// Appends at most `limit` bytes of it to `target`.
    pub fn append_to(&self, target: &mut Vec<u8>, limit: usize) {
        let mut left = limit.min(self.len);
        target.reserve(left);
        let head = &self.head[..left.min(self.head.len())];
        target.extend_from_slice(head);
        left -= head.len();
        for piece in self.tail {
            let part = left.min(piece.iov_len);
            let at = target.len();
            // SAFETY: `part` bytes of a piece that is readable memory, into reserved room of a vector of our own, which the
            // piece does not overlap; they are initialised when the length says so.
            unsafe {
                let room = target.as_mut_ptr().add(at);
                std::ptr::copy_nonoverlapping(piece.iov_base.cast::<u8>(), room, part);
                target.set_len(at + part);
            }
            left -= part;
        }
    }
}

impl std::fmt::Debug for Frame<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (from, to) = (self.source(), self.destination());
        write!(
            f,
            "Frame({from} > {to}, {} bytes, {:?})",
            self.len, self.header
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_keeps_its_fields_in_memory_order() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        let header = VnetHeader::from_bytes(&bytes);
        assert_eq!(header.hdr_len, 0x0403);
        assert_eq!(header.num_buffers, 0x0c0b);
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn a_frame_of_pieces_is_put_together_up_to_the_limit() {
        let pieces = [b"cd".as_slice(), b"", b"efg"];
        let tail = pieces.map(|piece| libc::iovec {
            iov_base: piece.as_ptr().cast_mut().cast(),
            iov_len: piece.len(),
        });
        // SAFETY: the pieces are constants.
        let frame = unsafe { Frame::with_tail(VnetHeader::default(), b"ab", &tail) };
        for limit in 0..10 {
            let mut target = b"<".to_vec();
            frame.append_to(&mut target, limit);
            let text = b"abcdefg";
            assert_eq!(target[1..], text[..limit.min(text.len())]);
        }
        assert_eq!(frame.len(), 7);
    }

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let address: MacAddress = "52:54:00:12:34:fE".parse().unwrap();
        assert_eq!(address.to_string(), "52:54:00:12:34:fe");
        for wrong in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "5:54:00:12:34:56",
            "+2:54:00:12:34:56",
        ] {
            assert!(wrong.parse::<MacAddress>().is_err(), "{wrong}");
        }
        let frame = Frame::new(VnetHeader::default(), &[1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(frame.destination(), MacAddress([1, 2, 3, 4, 5, 6]));
        assert_eq!(frame.source(), MacAddress::default());
        assert!(frame.destination().is_multicast());
    }
}
