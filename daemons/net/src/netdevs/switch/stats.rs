//! What a switch has done, readable from any thread.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value};

use crate::link::DropReason;

/// A number that one thread changes.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    #[inline]
    pub(super) fn add(&self, more: u64) {
        self.set(self.get() + more);
    }

    #[inline]
    pub(super) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The switch's counters.
#[derive(Debug, Default)]
pub(super) struct Stats {
    /// Frames to one member.
    pub(super) forwarded: Count,
    /// Frames to all members of a VLAN.
    pub(super) flooded: Count,
    /// Entries of the table.
    pub(super) entries: Count,
    /// Stations that moved to another member.
    pub(super) moves: Count,
    /// Source addresses that were not learnt where they came in: fixed elsewhere, or too many moves.
    pub(super) moves_refused: Count,
    /// Source addresses that found no room.
    pub(super) not_learned: Count,
    /// Frames that came from an uplink and went nowhere, and copies of flooded frames that did not reach one of their receivers.
    drops: [Count; DropReason::ALL.len()],
}

impl Stats {
    #[inline]
    pub(super) fn dropped(&self, reason: DropReason) {
        self.drops[reason as usize].add(1);
    }

    /// All of them by name.
    pub(super) fn report(&self) -> Map<String, Value> {
        let mut report = Map::new();
        for (name, count) in [
            ("forwarded", &self.forwarded),
            ("flooded", &self.flooded),
            ("entries", &self.entries),
            ("moves", &self.moves),
            ("moves-refused", &self.moves_refused),
            ("not-learned", &self.not_learned),
        ] {
            report.insert(name.to_owned(), count.get().into());
        }
        let drops = DropReason::ALL.iter().zip(&self.drops);
        let drops = drops.filter(|(_, count)| count.get() > 0);
        let drops: Map<String, Value> = drops
            .map(|(reason, count)| (reason.name().to_owned(), count.get().into()))
            .collect();
        report.insert("drops".to_owned(), drops.into());
        report
    }
}
