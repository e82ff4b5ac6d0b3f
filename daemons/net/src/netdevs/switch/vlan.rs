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

use crate::frame::{Frame, HEAD_LEN, MAX_FRAME};
use crate::link::DropReason;
use crate::netdev::VlanMode;
use crate::offload;
use crate::packet::{self, ETHERTYPE_AT, TAG_LEN};

/// Bits of a tag that name the VLAN; the others are its priority.
const VLAN_BITS: u16 = 0xfff;
/// Not to be used (IEEE 802.1Q table 9-2).
const RESERVED: u16 = 0xfff;

/// Room for a frame's head and one more tag.
pub(super) type Head = [u8; HEAD_LEN + TAG_LEN];

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
    let head = frame.head();
    let (addresses, rest) = head
        .split_at_checked(ETHERTYPE_AT)
        .ok_or(DropReason::TooShort)?;
    room[..ETHERTYPE_AT].copy_from_slice(addresses);
    let mut header = frame.header;
    let is_open = header.flags & offload::NEEDS_CSUM != 0;
    let len = match egress {
        Egress::Insert(vlan) => {
            if frame.len() + TAG_LEN > MAX_FRAME || head.len() > HEAD_LEN {
                return Err(DropReason::TooLong);
            }
            let tag = [packet::ETHERTYPE_VLAN.to_be_bytes(), vlan.to_be_bytes()];
            room[ETHERTYPE_AT..ETHERTYPE_AT + TAG_LEN].copy_from_slice(tag.as_flattened());
            let len = head.len() + TAG_LEN;
            room[ETHERTYPE_AT + TAG_LEN..len].copy_from_slice(rest);
            if is_open {
                let tag = TAG_LEN as u16;
                let start = header.csum_start.checked_add(tag);
                header.csum_start = start.ok_or(DropReason::BadHeader)?;
                header.hdr_len = header.hdr_len.saturating_add(tag);
            }
            len
        }
        Egress::Remove => {
            let rest = rest.get(TAG_LEN..).ok_or(DropReason::TooShort)?;
            if packet::word(rest, 0).is_none_or(packet::is_tag) {
                return Err(DropReason::Vlan);
            }
            let len = ETHERTYPE_AT + rest.len();
            room[ETHERTYPE_AT..len].copy_from_slice(rest);
            if is_open {
                let tag = TAG_LEN as u16;
                // A checksum over the addresses or the tag is no one's.
                if usize::from(header.csum_start) < ETHERTYPE_AT + TAG_LEN {
                    return Err(DropReason::BadHeader);
                }
                header.csum_start -= tag;
                header.hdr_len = header.hdr_len.saturating_sub(tag);
            }
            len
        }
        Egress::Retag(vlan) => {
            let control = packet::word(rest, 2).ok_or(DropReason::TooShort)?;
            let len = head.len().min(room.len());
            room[ETHERTYPE_AT..len].copy_from_slice(&rest[..len - ETHERTYPE_AT]);
            let control = control & !VLAN_BITS | vlan;
            room[ETHERTYPE_AT + 2..ETHERTYPE_AT + 4].copy_from_slice(&control.to_be_bytes());
            len
        }
        Egress::Same | Egress::Refuse => return Err(DropReason::Vlan),
    };
    Ok(frame.with_head(header, &room[..len]))
}
