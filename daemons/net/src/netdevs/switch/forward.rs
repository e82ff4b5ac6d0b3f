//! What happens to a burst of frames.
//!
//! ```text
//!   burst from a member ── each frame: VLAN, learn the source, look the destination up ──> routes
//!                          each route: rewrite the tag, finish what the receiver cannot, deliver
//!                          uplinks:    their frames of the burst together
//! ```

use std::rc::Rc;
use std::time::Instant;

use crate::frame::{Frame, MacAddress};
use crate::link::{BURST, DropReason};
use crate::offload::{self, Scratch};
use crate::packet::ETHERNET_LEN;

use super::Unknown;
use super::member::{Kind, Member};
use super::outlet::Outlet;
use super::plane::Settings;
use super::stats::Stats;
use super::table::{Key, Learned, MemberId, Place, Table};
use super::vlan::{self, Class, Egress, Head};

/// The addresses that bridges never forward (IEEE 802.1Q section 8.6.3): 01:80:c2:00:00:00 to 0f.
const RESERVED_GROUP: [u8; 5] = [0x01, 0x80, 0xc2, 0, 0];

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    Nowhere(DropReason),
    Member(MemberId),
    All,
    /// The uplinks alone.
    Uplinks,
}

#[derive(Clone, Copy)]
struct Route {
    to: To,
    class: Class,
}

/// The members of a switch and what they know.
pub(super) struct State {
    pub(super) members: Vec<Option<Member>>,
    pub(super) uplinks: Vec<MemberId>,
    pub(super) table: Table,
    pub(super) touched: Vec<Rc<Outlet>>,
    scratch: Scratch,
    heads: Box<[Head; BURST]>,
    unknown: Unknown,
}

#[derive(Clone, Copy)]
pub(super) struct Clock {
    pub(super) now: Instant,
    pub(super) seconds: u32,
}

/// Frames of one member, at most [`BURST`].
pub(super) struct Burst<'a, 'f> {
    pub(super) from: MemberId,
    pub(super) frames: &'a [Frame<'f>],
    pub(super) clock: Clock,
    pub(super) stats: &'a Stats,
}

impl State {
    pub(super) fn new(settings: &Settings) -> State {
        State {
            members: Vec::new(),
            uplinks: Vec::new(),
            table: Table::new(settings.table),
            touched: Vec::new(),
            scratch: Scratch::default(),
            heads: Box::new([Head::default(); BURST]),
            unknown: settings.unknown,
        }
    }

    /// An outlet of the member takes no frames any more.
    pub(super) fn close(&mut self, id: MemberId, outlet: &Rc<Outlet>, now: u32) {
        if let Some(member) = self
            .members
            .get_mut(usize::from(id))
            .and_then(Option::as_mut)
        {
            member.outlets.retain(|other| !Rc::ptr_eq(other, outlet));
            // Who was here is looked for here for a while, but may turn up elsewhere.
            if let (true, Some(key)) = (member.outlets.is_empty(), member.fixed) {
                self.table.unfix(key, id, now);
            }
        }
    }

    /// One queue of the member less; the last one takes the member along.
    pub(super) fn detach(&mut self, id: MemberId) {
        let Some(slot) = self.members.get_mut(usize::from(id)) else {
            return;
        };
        if let Some(member) = slot {
            member.attached = member.attached.saturating_sub(1);
            if member.attached > 0 {
                return;
            }
        }
        *slot = None;
        self.uplinks.retain(|uplink| *uplink != id);
        self.table.forget(id);
        for member in self.members.iter_mut().flatten() {
            member.last = None;
        }
    }

    /// Sends a burst on its way.
    pub(super) fn forward(&mut self, burst: &Burst<'_, '_>, dropped: &mut dyn FnMut(DropReason)) {
        let nowhere = Route {
            to: To::Nowhere(DropReason::LinkDown),
            class: Class::default(),
        };
        let mut routes = [nowhere; BURST];
        let (mut forwarded, mut flooded, mut to_uplinks) = (0, 0, false);
        for (frame, route) in burst.frames.iter().zip(&mut routes) {
            *route = self.route(burst, frame);
            match route.to {
                To::Nowhere(_) => {}
                To::Member(id) => {
                    forwarded += 1;
                    to_uplinks |= self.uplinks.contains(&id);
                }
                To::All | To::Uplinks => {
                    flooded += 1;
                    to_uplinks = true;
                }
            }
        }
        for (frame, route) in burst.frames.iter().zip(&routes) {
            match route.to {
                To::Nowhere(reason) => {
                    dropped(reason);
                }
                To::Member(id) => self.deliver(id, frame, route.class, dropped),
                To::All => self.flood(burst, frame, route.class),
                To::Uplinks => {}
            }
        }
        if to_uplinks {
            self.send_up(burst, &routes, dropped);
        }
        burst.stats.forwarded.add(forwarded);
        if flooded > 0 {
            burst.stats.flooded.add(flooded);
        }
    }

    /// Decides on a frame, and learns where it came from.
    #[inline]
    fn route(&mut self, burst: &Burst<'_, '_>, frame: &Frame<'_>) -> Route {
        let class = Class::default();
        match self.decide(burst, frame) {
            Ok(route) => route,
            Err(reason) => Route {
                to: To::Nowhere(reason),
                class,
            },
        }
    }

    #[inline]
    fn decide(&mut self, burst: &Burst<'_, '_>, frame: &Frame<'_>) -> Result<Route, DropReason> {
        let Clock { now, seconds } = burst.clock;
        let State { members, table, .. } = self;
        let member = members
            .get_mut(usize::from(burst.from))
            .and_then(Option::as_mut);
        let member = member.ok_or(DropReason::LinkDown)?;
        let head = frame.head();
        if head.len() < ETHERNET_LEN {
            return Err(DropReason::TooShort);
        }
        let class = member.vlan.classify(head)?;
        let (source, destination) = (frame.source(), frame.destination());
        let is_reserved = destination.0[..5] == RESERVED_GROUP && destination.0[5] < 0x10;
        if source.is_multicast() || is_reserved {
            return Err(DropReason::Filtered);
        }
        let key = Key::new(class.vlan, source);
        if member.last != Some((key, seconds)) {
            let place = Place {
                seen: seconds,
                member: burst.from,
                is_fixed: false,
            };
            let learned = table.learn(key, place, member.entries, || member.may_move(now));
            member.last = matches!(learned, Learned::Known | Learned::New | Learned::Moved)
                .then_some((key, seconds));
            note(burst, table, learned);
            if learned == Learned::Moved {
                forget_last(members, burst.from, key);
            }
        }
        let to = self.destination(burst, class, destination)?;
        Ok(Route { to, class })
    }

    #[inline]
    fn destination(
        &self,
        burst: &Burst<'_, '_>,
        class: Class,
        destination: MacAddress,
    ) -> Result<To, DropReason> {
        let from = self.members[usize::from(burst.from)].as_ref();
        let from = from.ok_or(DropReason::LinkDown)?;
        if !destination.is_multicast() {
            let key = Key::new(class.vlan, destination);
            if let Some(id) = self.table.find(key, burst.clock.seconds) {
                let member = self.members.get(usize::from(id)).and_then(Option::as_ref);
                return match member {
                    _ if id == burst.from => Err(DropReason::SamePort),
                    Some(member) if !member.hears(from) => Err(DropReason::Isolated),
                    Some(_) => Ok(To::Member(id)),
                    None => Err(DropReason::LinkDown),
                };
            }
            match self.unknown {
                Unknown::Flood => {}
                Unknown::Uplink if from.kind == Kind::Uplink => return Err(DropReason::Filtered),
                Unknown::Uplink => return Ok(To::Uplinks),
                Unknown::Drop => return Err(DropReason::Filtered),
            }
        }
        match from.may_flood(burst.clock.now) {
            true => Ok(To::All),
            false => Err(DropReason::FloodLimit),
        }
    }

    /// Gives a frame to one port.
    #[inline]
    fn deliver(
        &mut self,
        id: MemberId,
        frame: &Frame<'_>,
        class: Class,
        dropped: &mut dyn FnMut(DropReason),
    ) {
        let State {
            members,
            touched,
            scratch,
            heads,
            ..
        } = self;
        let Some(member) = members.get(usize::from(id)).and_then(Option::as_ref) else {
            return dropped(DropReason::LinkDown);
        };
        if member.kind == Kind::Uplink {
            return;
        }
        if let Err(reason) = give(
            member,
            frame,
            class,
            Room {
                touched,
                scratch,
                head: &mut heads[0],
            },
        ) {
            dropped(reason);
        }
    }

    /// Gives a frame to all ports of its VLAN but the one that it came from.
    fn flood(&mut self, burst: &Burst<'_, '_>, frame: &Frame<'_>, class: Class) {
        let State {
            members,
            touched,
            scratch,
            heads,
            ..
        } = self;
        let from = members
            .get(usize::from(burst.from))
            .and_then(Option::as_ref);
        for (at, member) in members.iter().enumerate() {
            let Some(member) = member else {
                continue;
            };
            let is_meant = at != usize::from(burst.from)
                && member.kind == Kind::Port
                && !member.outlets.is_empty()
                && from.is_some_and(|from| member.hears(from))
                && member.vlan.egress(class) != Egress::Refuse;
            if !is_meant {
                continue;
            }
            let room = Room {
                touched,
                scratch,
                head: &mut heads[0],
            };
            if let Err(reason) = give(member, frame, class, room) {
                burst.stats.dropped(reason);
            }
        }
    }

    /// Gives each uplink its frames of a burst together.
    fn send_up(
        &mut self,
        burst: &Burst<'_, '_>,
        routes: &[Route; BURST],
        dropped: &mut dyn FnMut(DropReason),
    ) {
        let State {
            members,
            uplinks,
            touched,
            scratch,
            heads,
            ..
        } = self;
        let from = members
            .get(usize::from(burst.from))
            .and_then(Option::as_ref);
        for uplink in uplinks.iter().filter(|uplink| **uplink != burst.from) {
            let Some(member) = members.get(usize::from(*uplink)).and_then(Option::as_ref) else {
                continue;
            };
            if from.is_none_or(|from| !member.hears(from)) {
                continue;
            }
            let Some(outlet) = member.outlets.first() else {
                let lost = routes
                    .iter()
                    .filter(|route| route.to == To::Member(*uplink));
                lost.for_each(|_| dropped(DropReason::LinkDown));
                continue;
            };
            let mut batch: [Frame<'_>; BURST] = [Frame::new(Default::default(), &[]); BURST];
            let mut len = 0;
            let offloads = outlet.offloads();
            for ((frame, route), head) in burst.frames.iter().zip(routes).zip(heads.iter_mut()) {
                let is_only = route.to == To::Member(*uplink);
                if !is_only && !matches!(route.to, To::All | To::Uplinks) {
                    continue;
                }
                let egress = member.vlan.egress(route.class);
                if egress == Egress::Refuse && !is_only {
                    continue;
                }
                let frame = match vlan::rewrite(frame, egress, head) {
                    Ok(frame) => frame,
                    Err(reason) => {
                        dropped(reason);
                        continue;
                    }
                };
                if !offload::needs_work(frame.header, offloads) {
                    batch[len] = frame;
                    len += 1;
                    continue;
                }
                outlet.send_all(&batch[..std::mem::take(&mut len)], dropped);
                let finished = offload::finish(&frame, offloads, scratch, &mut |frame| {
                    outlet.send_all(std::slice::from_ref(frame), dropped);
                });
                finished.unwrap_or_else(&mut *dropped);
            }
            outlet.send_all(&batch[..len], dropped);
            if outlet.touch() {
                touched.push(Rc::clone(outlet));
            }
        }
    }
}

/// What giving a frame needs.
struct Room<'a> {
    touched: &'a mut Vec<Rc<Outlet>>,
    scratch: &'a mut Scratch,
    head: &'a mut Head,
}

/// Gives a frame to a port, as the port wants it.
///
/// Frames that stay as they are are not moved on the way: a copy of one would have to wait for the stores into guest memory that
/// came before it.
#[inline]
fn give(
    member: &Member,
    frame: &Frame<'_>,
    class: Class,
    room: Room<'_>,
) -> Result<(), DropReason> {
    let Room {
        touched,
        scratch,
        head,
    } = room;
    let outlet = member.outlet(frame).ok_or(DropReason::LinkDown)?;
    if outlet.touch() {
        touched.push(Rc::clone(outlet));
    }
    match member.vlan.egress(class) {
        Egress::Same => finish(outlet, frame, scratch),
        egress => finish(outlet, &vlan::rewrite(frame, egress, head)?, scratch),
    }
}

/// Gives a frame to an outlet, finished if it has to be.
#[inline]
fn finish(outlet: &Rc<Outlet>, frame: &Frame<'_>, scratch: &mut Scratch) -> Result<(), DropReason> {
    if !offload::has_work(frame.header) {
        return outlet.send(frame);
    }
    let mut sent = Ok(());
    offload::finish(frame, outlet.offloads(), scratch, &mut |frame| {
        sent = sent.and(outlet.send(frame));
    })?;
    sent
}

/// Counts what came of a source address.
#[inline]
fn note(burst: &Burst<'_, '_>, table: &Table, learned: Learned) {
    match learned {
        Learned::Known => return,
        Learned::New => {}
        Learned::Moved => burst.stats.moves.add(1),
        Learned::Stays => burst.stats.moves_refused.add(1),
        Learned::Full => burst.stats.not_learned.add(1),
    }
    burst.stats.entries.set(table.len() as u64);
}

/// A station is behind another member now: the others have to learn it anew when they hear it.
#[cold]
fn forget_last(members: &mut [Option<Member>], except: MemberId, key: Key) {
    for (id, member) in members.iter_mut().enumerate() {
        if let Some(member) = member
            && id != usize::from(except)
            && member.last.is_some_and(|(last, _)| last == key)
        {
            member.last = None;
        }
    }
}
