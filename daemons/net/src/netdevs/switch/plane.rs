//! The switch's data path: all of it lives on one thread.
//!
//! ```text
//!   queue of a member ── forward: State decides and delivers ──> outlets of others
//!                     ── flush ────────────────────────────────> each that got something, once
//! ```
//!
//! Frames go from the sender's memory to the receiver's in one copy, that of [`crate::link::Sink::deliver`]. Those from one
//! member to another keep their order: routes are gone through in the order of the frames, and what waits in an outlet is
//! overtaken by nothing.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use crate::frame::Frame;
use crate::link::{BURST, DropReason};

use super::Unknown;
use super::forward::{Burst, Clock, State};
use super::member::{self, Description, Kind, Member};
use super::outlet::{Outlet, Target};
use super::stats::Stats;
use super::table::{self, MemberId, Place};

/// How a switch is set up.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) table: table::Bounds,
    pub(super) port: member::Bounds,
    pub(super) uplink: member::Bounds,
    /// Bytes that may wait for each receiver.
    pub(super) backlog: usize,
    pub(super) unknown: Unknown,
}

/// What was asked for while frames were on their way.
enum Change {
    Close(MemberId, Rc<Outlet>),
    Detach(MemberId),
}

/// The data path.
pub(super) struct Plane {
    settings: Settings,
    stats: Arc<Stats>,
    started: Instant,
    state: RefCell<State>,
    changes: RefCell<Vec<Change>>,
    has_changes: Cell<bool>,
    /// What runs for its uplinks.
    tasks: RefCell<Vec<executor::JoinHandle<()>>>,
}

impl Plane {
    pub(super) fn new(settings: &Settings, stats: Arc<Stats>) -> Rc<Plane> {
        Rc::new(Plane {
            settings: settings.clone(),
            stats,
            started: Instant::now(),
            state: RefCell::new(State::new(settings)),
            changes: RefCell::default(),
            has_changes: Cell::new(false),
            tasks: RefCell::default(),
        })
    }

    /// Keeps a task until [`Plane::end`].
    pub(super) fn keep(&self, task: executor::JoinHandle<()>) {
        self.tasks.borrow_mut().push(task);
    }

    /// The switch is gone; its ports' queues may go later.
    pub(super) fn end(&self) {
        for task in self.tasks.take() {
            task.cancel();
        }
    }

    fn seconds(&self, now: Instant) -> u32 {
        let passed = now.saturating_duration_since(self.started).as_secs();
        u32::try_from(passed).unwrap_or(u32::MAX)
    }

    /// Adds a queue to the member of this name, which is made when it is the first.
    ///
    /// # Errors
    /// There are as many members as can be.
    pub(super) fn attach(&self, description: &Description) -> std::io::Result<MemberId> {
        let mut state = self.state.borrow_mut();
        let of_name = |member: &Option<Member>| {
            member.as_ref().is_some_and(|member| {
                member.name == description.name && member.kind == description.kind
            })
        };
        let known = state.members.iter().position(of_name);
        let at = known.or_else(|| state.members.iter().position(Option::is_none));
        let at = at.unwrap_or(state.members.len());
        let id = MemberId::try_from(at).map_err(std::io::Error::other)?;
        if at == state.members.len() {
            state.members.push(None);
        }
        let bounds = match description.kind {
            Kind::Port => self.settings.port,
            Kind::Uplink => self.settings.uplink,
        };
        let member = state.members[at].get_or_insert_with(|| Member::new(description, bounds));
        member.attached += 1;
        if description.kind == Kind::Uplink && known.is_none() {
            state.uplinks.push(id);
        }
        Ok(id)
    }

    /// A queue of the member takes frames from now on.
    pub(super) fn open(&self, id: MemberId, target: Target) -> Rc<Outlet> {
        let outlet = Outlet::new(target, self.settings.backlog);
        let now = self.seconds(Instant::now());
        let mut state = self.state.borrow_mut();
        let State { members, table, .. } = &mut *state;
        if let Some(member) = members.get_mut(usize::from(id)).and_then(Option::as_mut) {
            member.outlets.push(Rc::clone(&outlet));
            let place = Place {
                seen: now,
                member: id,
                is_fixed: true,
            };
            if let (1, Some(key)) = (member.outlets.len(), member.fixed)
                && !table.fix(key, place)
            {
                tracing::warn!(port = member.name, mac = %key.mac(), "another port of the switch has this address");
            }
            self.stats.entries.set(table.len() as u64);
        }
        outlet
    }

    /// The queue takes no frames any more.
    pub(super) fn close(&self, id: MemberId, outlet: &Rc<Outlet>) {
        outlet.close();
        self.change(Change::Close(id, Rc::clone(outlet)));
    }

    /// A queue of the member is gone.
    pub(super) fn detach(&self, id: MemberId) {
        self.change(Change::Detach(id));
    }

    fn change(&self, change: Change) {
        self.changes.borrow_mut().push(change);
        self.has_changes.set(true);
        self.settle();
    }

    /// Makes the changes that were asked for, unless frames are on their way.
    fn settle(&self) {
        let Ok(mut state) = self.state.try_borrow_mut() else {
            return;
        };
        self.has_changes.set(false);
        let now = self.seconds(Instant::now());
        for change in self.changes.take() {
            match change {
                Change::Close(id, outlet) => state.close(id, &outlet, now),
                Change::Detach(id) => state.detach(id),
            }
        }
        self.stats.entries.set(state.table.len() as u64);
    }

    /// Sends frames of a member on their way; tells of each that goes nowhere.
    pub(super) fn forward(
        &self,
        from: MemberId,
        frames: &[Frame<'_>],
        dropped: &mut dyn FnMut(DropReason),
    ) {
        // An uplink that gives a frame back within `transmit` would go round in circles.
        let Ok(mut state) = self.state.try_borrow_mut() else {
            frames.iter().for_each(|_| dropped(DropReason::Busy));
            return;
        };
        let now = Instant::now();
        let clock = Clock {
            now,
            seconds: self.seconds(now),
        };
        for burst in frames.chunks(BURST) {
            state.forward(
                &Burst {
                    from,
                    frames: burst,
                    clock,
                    stats: &self.stats,
                },
                dropped,
            );
        }
        drop(state);
        if self.has_changes.get() {
            self.settle();
        }
    }

    /// Shows every receiver what it was given.
    pub(super) fn flush(&self) {
        let Ok(mut state) = self.state.try_borrow_mut() else {
            return;
        };
        for outlet in state.touched.drain(..) {
            outlet.flush();
        }
        drop(state);
        if self.has_changes.get() {
            self.settle();
        }
    }

    /// The stations that are known: VLAN and address, seconds since they were heard of, whether they are fixed, the member's name.
    pub(super) fn stations(&self) -> Vec<super::Station> {
        let now = self.seconds(Instant::now());
        let state = self.state.borrow();
        let name = |id: MemberId| {
            let member = state.members.get(usize::from(id)).and_then(Option::as_ref);
            member.map_or_else(String::new, |member| member.name.clone())
        };
        let mut stations: Vec<super::Station> = state
            .table
            .entries(now)
            .map(|(key, place)| super::Station {
                vlan: key.vlan(),
                mac: key.mac(),
                member: name(place.member),
                fixed: place.is_fixed,
                age: if place.is_fixed {
                    0
                } else {
                    now.saturating_sub(place.seen)
                },
            })
            .collect();
        stations.sort_by_key(|station| (station.vlan, station.mac));
        stations
    }
}
