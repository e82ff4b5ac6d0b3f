//! Events that may come as often as requests do: at most one a second of each kind and node.
//!
//! ```text
//!   report ─► waits? replaced by the newer one
//!   due(now): first of its key, or a second since the last ─► out
//! ```
//!
//! Bounded: one event for each key, and keys are nodes of the graph times kinds.

use std::time::Duration;

/// Time between two events with the same key.
const PACE: Duration = Duration::from_secs(1);

/// Events with the key of each; in order of first appearance.
pub(super) struct Paced<K, E> {
    slots: Vec<Slot<K, E>>,
}

struct Slot<K, E> {
    key: K,
    waiting: Option<E>,
    /// When the next may go out.
    free_at: Duration,
}

impl<K, E> Default for Paced<K, E> {
    fn default() -> Self {
        Self { slots: Vec::new() }
    }
}

impl<K: PartialEq, E> Paced<K, E> {
    /// Takes in an event; one with the same key that has not gone out is forgotten.
    pub(super) fn report(&mut self, key: K, event: E) {
        match self.slots.iter_mut().find(|slot| slot.key == key) {
            Some(slot) => slot.waiting = Some(event),
            None => self.slots.push(Slot {
                key,
                waiting: Some(event),
                free_at: Duration::ZERO,
            }),
        }
    }

    /// The events that go out at the time `now`.
    pub(super) fn due(&mut self, now: Duration) -> Vec<E> {
        self.slots
            .retain(|slot| slot.waiting.is_some() || slot.free_at > now);
        let free = self.slots.iter_mut().filter(|slot| slot.free_at <= now);
        let due = free.filter_map(|slot| {
            let event = slot.waiting.take()?;
            slot.free_at = now + PACE;
            Some(event)
        });
        due.collect()
    }

    /// When the next event goes out that waits.
    pub(super) fn next_due(&self) -> Option<Duration> {
        let waiting = self.slots.iter().filter(|slot| slot.waiting.is_some());
        waiting.map(|slot| slot.free_at).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_event_goes_out_at_once_and_the_last_of_a_second_after_it() {
        let mut paced = Paced::default();
        let at = |ms| Duration::from_millis(ms);
        paced.report("a", 1);
        assert_eq!(paced.due(at(5000)), [1]);
        paced.report("a", 2);
        paced.report("b", 9);
        paced.report("a", 3);
        assert_eq!(paced.due(at(5100)), [9]);
        assert_eq!(paced.next_due(), Some(at(6000)));
        assert_eq!(paced.due(at(6000)), [3]);
        assert_eq!(paced.next_due(), None);
        assert!(paced.due(at(9000)).is_empty());
        assert!(paced.slots.is_empty());
    }
}
