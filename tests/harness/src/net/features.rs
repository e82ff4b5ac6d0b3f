//! Feature bits, configuration space and frame header of a virtio-net device (virtio 1.2, sections 5.1.3, 5.1.4, 5.1.6).

use anyhow::{Result, ensure};

pub use crate::driver::features::bits as ring_bits;

#[expect(missing_docs, reason = "the names are the specification's own")]
pub mod bits {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const CTRL_RX: u64 = 1 << 18;
    pub const CTRL_VLAN: u64 = 1 << 19;
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    pub const MQ: u64 = 1 << 22;
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    pub const GUEST_USO4: u64 = 1 << 54;
    pub const GUEST_USO6: u64 = 1 << 55;
    pub const HOST_USO: u64 = 1 << 56;
}

/// Frames may be left unfinished, in either direction.
pub const OFFLOADS: u64 = bits::CSUM
    | bits::GUEST_CSUM
    | bits::GUEST_TSO4
    | bits::GUEST_TSO6
    | bits::GUEST_ECN
    | bits::HOST_TSO4
    | bits::HOST_TSO6
    | bits::HOST_ECN
    | bits::GUEST_USO4
    | bits::GUEST_USO6
    | bits::HOST_USO;

/// What the control queue is for.
pub const CONTROL: u64 = bits::CTRL_VQ
    | bits::CTRL_RX
    | bits::CTRL_RX_EXTRA
    | bits::CTRL_VLAN
    | bits::CTRL_MAC_ADDR
    | bits::CTRL_GUEST_OFFLOADS
    | bits::GUEST_ANNOUNCE;

/// Bytes of the configuration space up to and including `mtu`.
pub const CONFIG_BYTES: usize = 12;

/// The link is up.
pub const STATUS_LINK_UP: u16 = 1;
/// The guest should announce itself.
pub const STATUS_ANNOUNCE: u16 = 2;

/// The configuration space, decoded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetConfig {
    /// Address, when `MAC` is offered.
    pub mac: [u8; 6],
    /// `STATUS_*` bits, when `STATUS` is offered.
    pub status: u16,
    /// Most queue pairs, when `MQ` is offered.
    pub max_pairs: u16,
    /// Largest packet in bytes, when `MTU` is offered.
    pub mtu: u16,
}

impl NetConfig {
    /// Decodes what `GET_CONFIG` returned.
    ///
    /// # Errors
    /// When there are fewer than [`CONFIG_BYTES`] bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        ensure!(
            bytes.len() >= CONFIG_BYTES,
            "configuration space of {} bytes",
            bytes.len()
        );
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut mac = [0; 6];
        mac.copy_from_slice(&bytes[..6]);
        Ok(Self {
            mac,
            status: word(6),
            max_pairs: word(8),
            mtu: word(10),
        })
    }
}

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 12;
/// `flags`: the checksum is not filled in.
pub const NEEDS_CSUM: u8 = 1;
/// `flags`: the checksum is known to be right.
pub const DATA_VALID: u8 = 2;
/// `gso_type`: a whole frame.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `gso_type`: UDP, both versions.
pub const GSO_UDP_L4: u8 = 5;

/// The header in front of each frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the specification's own")]
pub struct Header {
    pub flags: u8,
    pub gso_type: u8,
    pub hdr_len: u16,
    pub gso_size: u16,
    pub csum_start: u16,
    pub csum_offset: u16,
    pub num_buffers: u16,
}

impl Header {
    /// As it is in memory.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        bytes[2..4].copy_from_slice(&self.hdr_len.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.gso_size.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.csum_start.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.csum_offset.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.num_buffers.to_le_bytes());
        bytes
    }

    /// From memory; `bytes` has [`HEADER_BYTES`].
    pub fn decode(bytes: &[u8]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }
}
