//! Which VLAN a frame belongs to, and how it looks at the port where it leaves.
//!
//! ```text
//!   port          takes                                  gives
//!   transparent   anything; VLAN of the tag, else 0      as it came; tagged when it came without
//!   access V      untagged, or tagged with VLAN 0        untagged
//!   trunk         tagged with a member; untagged is the  tagged, untagged for the native VLAN
//!                 native VLAN, or dropped
//! ```
//!
//! VLAN 0 is where untagged frames of transparent ports are; access ports and trunks are no members of it. Tags are IEEE 802.1Q
//! ones (0x8100). Others are payload to transparent ports; access ports and trunks take none that begins with one, and a tag is
//! not taken off when another one is behind it: a frame that left its VLAN with the inner tag would be somewhere else.

use crate::frame::{Frame, HEAD_LEN, MAX_FRAME, VnetHeader};
use crate::link::DropReason;
use crate::netdev::VlanMode;
use crate::offload;
use crate::packet::{self, ETHERTYPE_AT, TAG_LEN};

/// Bits of a tag that name the VLAN; the others are its priority.
const VLAN_BITS: u16 = 0xfff;
/// Not to be used (IEEE 802.1Q table 9-2).
const RESERVED: u16 = 0xfff;

/// Room for what changes of a frame: its head and one more tag.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    bytes: [u8; HEAD_LEN + TAG_LEN],
    /// What follows when the frame's head was longer.
    rest: libc::iovec,
}

impl Default for Head {
    fn default() -> Self {
        Head {
            bytes: [0; HEAD_LEN + TAG_LEN],
            rest: libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            },
        }
    }
}

/// The tag that a frame came with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Tag {
    #[default]
    None,
    /// VLAN 0: only a priority.
    Priority,
    Vlan,
}

/// A frame's VLAN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Class {
    pub(super) vlan: u16,
    tag: Tag,
}

/// How a frame has to be changed for a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Egress {
    Same,
    Insert(u16),
    Remove,
    /// The tag gets another VLAN and keeps its priority.
    Retag(u16),
    /// The port is no member.
    Refuse,
}

/// What VLANs a port is a member of, ready to be looked up.
#[derive(Clone, Debug)]
pub(super) enum Membership {
    Transparent,
    Access(u16),
    Trunk {
        /// A bit per VLAN.
        members: Box<[u64; 64]>,
        /// 0: none.
        native: u16,
    },
}

impl Membership {
    pub(super) fn new(mode: &VlanMode) -> Membership {
        match mode {
            VlanMode::Transparent => Membership::Transparent,
            VlanMode::Access(vlan) => Membership::Access(*vlan),
            VlanMode::Trunk { vlans, native } => {
                let mut members = Box::new([if vlans.is_empty() { u64::MAX } else { 0 }; 64]);
                for vlan in vlans.iter().chain(native) {
                    members[usize::from(vlan / 64) % 64] |= 1 << (vlan % 64);
                }
                Membership::Trunk {
                    members,
                    native: native.unwrap_or(0),
                }
            }
        }
    }

    /// VLAN of untagged frames, if they are taken.
    pub(super) fn untagged(&self) -> Option<u16> {
        match self {
            Membership::Transparent => Some(0),
            Membership::Access(vlan) => Some(*vlan),
            Membership::Trunk { native, .. } => Some(*native).filter(|native| *native != 0),
        }
    }

    /// The VLAN of a frame that comes in here.
    ///
    /// # Errors
    /// Why it may not.
    #[inline]
    pub(super) fn classify(&self, head: &[u8]) -> Result<Class, DropReason> {
        let ethertype = packet::word(head, ETHERTYPE_AT).ok_or(DropReason::TooShort)?;
        if !packet::is_tag(ethertype) {
            let vlan = self.untagged().ok_or(DropReason::Vlan)?;
            return Ok(Class {
                vlan,
                tag: Tag::None,
            });
        }
        self.classify_tagged(head, ethertype)
    }

    fn classify_tagged(&self, head: &[u8], ethertype: u16) -> Result<Class, DropReason> {
        if ethertype != packet::ETHERTYPE_VLAN {
            return match self {
                Membership::Transparent => Ok(Class {
                    vlan: 0,
                    tag: Tag::None,
                }),
                _ => Err(DropReason::Vlan),
            };
        }
        let control = packet::word(head, ETHERTYPE_AT + 2).ok_or(DropReason::TooShort)?;
        // The ethertype behind the tag has to be there too.
        packet::word(head, ETHERTYPE_AT + TAG_LEN).ok_or(DropReason::TooShort)?;
        match (control & VLAN_BITS, self) {
            (RESERVED, _) => Err(DropReason::Vlan),
            (0, _) => {
                let vlan = self.untagged().ok_or(DropReason::Vlan)?;
                Ok(Class {
                    vlan,
                    tag: Tag::Priority,
                })
            }
            (_, Membership::Access(_)) => Err(DropReason::Vlan),
            (vlan, Membership::Trunk { members, .. }) if !contains(members, vlan) => {
                Err(DropReason::Vlan)
            }
            (vlan, _) => Ok(Class {
                vlan,
                tag: Tag::Vlan,
            }),
        }
    }

    /// How a frame leaves here.
    #[inline]
    pub(super) fn egress(&self, class: Class) -> Egress {
        let tagged = match class.tag {
            Tag::Vlan => Egress::Same,
            Tag::None => Egress::Insert(class.vlan),
            Tag::Priority => Egress::Retag(class.vlan),
        };
        let untagged = match class.tag {
            Tag::None => Egress::Same,
            _ => Egress::Remove,
        };
        match self {
            Membership::Transparent if class.vlan == 0 => Egress::Same,
            Membership::Transparent => tagged,
            _ if class.vlan == 0 => Egress::Refuse,
            Membership::Access(vlan) if *vlan == class.vlan => untagged,
            Membership::Trunk { native, .. } if *native == class.vlan => untagged,
            Membership::Trunk { members, .. } if contains(members, class.vlan) => tagged,
            _ => Egress::Refuse,
        }
    }
}

#[inline]
fn contains(members: &[u64; 64], vlan: u16) -> bool {
    members[usize::from(vlan / 64) % 64] >> (vlan % 64) & 1 != 0
}

/// The frame as `egress` wants it, with its head in `room` if it has to change.
///
/// # Errors
/// Why it cannot leave so.
pub(super) fn rewrite<'a>(
    frame: &Frame<'a>,
    egress: Egress,
    room: &'a mut Head,
) -> Result<Frame<'a>, DropReason> {
    match egress {
        Egress::Same => Ok(*frame),
        Egress::Refuse => Err(DropReason::Vlan),
        _ => change(frame, egress, room),
    }
}

fn change<'a>(
    frame: &Frame<'a>,
    egress: Egress,
    room: &'a mut Head,
) -> Result<Frame<'a>, DropReason> {
    // Frames in private memory may be all head.
    let (head, rest) = frame.head().split_at(frame.head().len().min(HEAD_LEN));
    let (addresses, tagged) = head
        .split_at_checked(ETHERTYPE_AT)
        .ok_or(DropReason::TooShort)?;
    let Head { bytes, rest: piece } = room;
    bytes[..ETHERTYPE_AT].copy_from_slice(addresses);
    let (header, len) = match egress {
        Egress::Insert(vlan) => {
            if frame.len() + TAG_LEN > MAX_FRAME {
                return Err(DropReason::TooLong);
            }
            let tag = [packet::ETHERTYPE_VLAN.to_be_bytes(), vlan.to_be_bytes()];
            let at = ETHERTYPE_AT + TAG_LEN;
            bytes[ETHERTYPE_AT..at].copy_from_slice(tag.as_flattened());
            bytes[at..at + tagged.len()].copy_from_slice(tagged);
            (shifted(frame.header, TAG_LEN as i16)?, head.len() + TAG_LEN)
        }
        Egress::Remove => {
            let plain = tagged.get(TAG_LEN..).ok_or(DropReason::TooShort)?;
            if packet::word(plain, 0).is_none_or(packet::is_tag) {
                return Err(DropReason::Vlan);
            }
            bytes[ETHERTYPE_AT..ETHERTYPE_AT + plain.len()].copy_from_slice(plain);
            let header = shifted(frame.header, -(TAG_LEN as i16))?;
            (header, head.len() - TAG_LEN)
        }
        Egress::Retag(vlan) => {
            let control = packet::word(tagged, 2).ok_or(DropReason::TooShort)?;
            bytes[ETHERTYPE_AT..head.len()].copy_from_slice(tagged);
            let control = control & !VLAN_BITS | vlan;
            bytes[ETHERTYPE_AT + 2..ETHERTYPE_AT + 4].copy_from_slice(&control.to_be_bytes());
            (frame.header, head.len())
        }
        Egress::Same | Egress::Refuse => return Err(DropReason::Vlan),
    };
    match (rest.is_empty(), frame.tail().is_empty()) {
        (true, _) => Ok(frame.with_head(header, &bytes[..len])),
        (false, true) => Ok(Frame::of_parts(header, &bytes[..len], rest, piece)),
        // No one makes a frame whose long head has a tail.
        (false, false) => Err(DropReason::TooLong),
    }
}

/// The header of a frame that has `by` bytes more behind its addresses.
fn shifted(header: VnetHeader, by: i16) -> Result<VnetHeader, DropReason> {
    if !offload::has_work(header) {
        return Ok(header);
    }
    let start = header.csum_start.checked_add_signed(by);
    // A checksum over the addresses, or over the tag that goes, is no one's.
    let start = start.filter(|start| usize::from(*start) >= ETHERTYPE_AT);
    Ok(VnetHeader {
        csum_start: start.ok_or(DropReason::BadHeader)?,
        hdr_len: header.hdr_len.saturating_add_signed(by),
        ..header
    })
}
