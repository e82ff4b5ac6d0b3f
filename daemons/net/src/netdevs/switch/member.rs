//! A member of a switch: a port with its queue pairs, or an uplink.

use std::rc::Rc;
use std::time::Instant;

use crate::frame::{Frame, MacAddress};
use crate::limit::{Limits, RateOptions};
use crate::netdev::VlanMode;

use super::flow;
use super::outlet::Outlet;
use super::table::Key;
use super::vlan::Membership;

/// Whether a member is a guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Port,
    Uplink,
}

/// What a member is to be.
#[derive(Clone, Debug)]
pub(super) struct Description {
    pub(super) name: String,
    pub(super) kind: Kind,
    /// The guest's address, which is nowhere else as long as the guest is there.
    pub(super) mac: Option<MacAddress>,
    pub(super) vlan: VlanMode,
    pub(super) is_isolated: bool,
}

/// Limits of a member.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Addresses behind it.
    pub(super) entries: u32,
    /// Stations that may move to it in a second.
    pub(super) moves: u64,
    /// Frames to all that it may send in a second; 0: any number.
    pub(super) floods: u64,
}

pub(super) struct Member {
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) vlan: Membership,
    pub(super) is_isolated: bool,
    /// Where the guest's address is fixed while the guest is there.
    pub(super) fixed: Option<Key>,
    /// Queue pairs that run.
    pub(super) outlets: Vec<Rc<Outlet>>,
    /// Queues that are attached.
    pub(super) attached: usize,
    pub(super) entries: u32,
    /// The source that was learnt last, and when: it need not be learnt again.
    pub(super) last: Option<(Key, u32)>,
    moves: Limits,
    floods: Option<Limits>,
}

impl Member {
    pub(super) fn new(description: &Description, bounds: Bounds) -> Member {
        let vlan = Membership::new(&description.vlan);
        let place = description.mac.zip(vlan.untagged());
        let rate = |packets, burst| {
            Limits::new(&RateOptions {
                packets: Some(packets),
                packets_burst: burst,
                ..RateOptions::default()
            })
        };
        Member {
            name: description.name.clone(),
            kind: description.kind,
            is_isolated: description.is_isolated,
            fixed: place.map(|(mac, vlan)| Key::new(vlan, mac)),
            vlan,
            outlets: Vec::new(),
            attached: 0,
            entries: bounds.entries,
            last: None,
            moves: rate(bounds.moves, Some(bounds.moves.max(1))),
            floods: (bounds.floods > 0).then(|| rate(bounds.floods, None)),
        }
    }

    /// Whether a station may move here now.
    pub(super) fn may_move(&self, now: Instant) -> bool {
        self.moves.take(1, 0, now).is_ok()
    }

    /// Whether it may send a frame to all now.
    #[inline]
    pub(super) fn may_flood(&self, now: Instant) -> bool {
        let limits = self.floods.as_ref();
        limits.is_none_or(|limits| limits.take(1, 0, now).is_ok())
    }

    /// The queue pair that a frame goes to; all frames of a connection go to the same.
    #[inline]
    pub(super) fn outlet(&self, frame: &Frame<'_>) -> Option<&Rc<Outlet>> {
        match &*self.outlets {
            [] => None,
            [outlet] => Some(outlet),
            several => several.get(flow::hash(frame.head()) as usize % several.len()),
        }
    }

    /// Whether frames of the other one may come here.
    #[inline]
    pub(super) fn hears(&self, other: &Member) -> bool {
        !(self.is_isolated && other.is_isolated)
    }
}
