//! The rules of blkdebug: what an event does, and which requests fail because of it.

use block::debug::Event;
use block::{ByteRange, Errno};

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    BlockStatus,
}

impl Kind {
    const NAMES: [(&'static str, Kind); 6] = [
        ("read", Kind::Read),
        ("write", Kind::Write),
        ("write-zeroes", Kind::WriteZeroes),
        ("discard", Kind::Discard),
        ("flush", Kind::Flush),
        ("block-status", Kind::BlockStatus),
    ];

    /// The kind called `name`.
    pub(super) fn parse(name: &str) -> Option<Kind> {
        let mut named = Self::NAMES.iter();
        named
            .find(|(known, _)| *known == name)
            .map(|(_, kind)| *kind)
    }
}

/// An error that is armed by an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Injection {
    /// Only requests of this kind; otherwise all but questions about status.
    pub(super) kind: Option<Kind>,
    /// What they fail with.
    pub(super) errno: Errno,
    /// Only requests of this byte.
    pub(super) offset: Option<u64>,
    /// Only the first of them.
    pub(super) once: bool,
    /// Before the request would have begun, instead of when it could have ended.
    pub(super) immediately: bool,
}

impl Injection {
    fn hits(&self, kind: Kind, range: ByteRange) -> bool {
        let kind_fits = match self.kind {
            Some(wanted) => wanted == kind,
            None => kind != Kind::BlockStatus,
        };
        let place_fits = self.offset.is_none_or(|offset| {
            let end = range.offset.saturating_add(range.length);
            (range.offset..end).contains(&offset)
        });
        kind_fits && place_fits
    }
}

/// What a rule does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Inject(Injection),
    SetState(u64),
    Stop(String),
}

/// What happens at an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) event: Event,
    /// In which state only; any when `None`.
    pub(super) state: Option<u64>,
    pub(super) action: Action,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Pass,
    FailNow(Errno),
    FailLater(Errno),
}

/// All rules, the state, and which errors are armed.
pub(super) struct Rules {
    state: u64,
    next_id: u64,
    /// The newest first.
    rules: Vec<(u64, Rule)>,
    /// The rules whose errors are armed; the first that fits is taken.
    armed: Vec<u64>,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            state: 1,
            next_id: 0,
            rules: Vec::new(),
            armed: Vec::new(),
        }
    }
}

impl Rules {
    /// Adds a rule.
    pub(super) fn add(&mut self, rule: Rule) {
        self.rules.insert(0, (self.next_id, rule));
        self.next_id += 1;
    }

    /// Stops the next request that reaches `event`.
    pub(super) fn add_stop(&mut self, event: Event, tag: &str) {
        self.add(Rule {
            event,
            state: None,
            action: Action::Stop(tag.to_owned()),
        });
    }

    /// Removes the breakpoints of a tag; whether there was one.
    pub(super) fn remove_stops(&mut self, tag: &str) -> bool {
        let before = self.rules.len();
        let is_it = |rule: &Rule| matches!(&rule.action, Action::Stop(other) if other == tag);
        self.rules.retain(|(_, rule)| !is_it(rule));
        self.rules.len() != before
    }

    /// An event: arms errors, changes the state; gives the tags of breakpoints, which are used up.
    pub(super) fn happen(&mut self, event: Event) -> Vec<String> {
        let state = self.state;
        let (mut armed, mut stops, mut used) = (Vec::new(), Vec::new(), Vec::new());
        for (id, rule) in &self.rules {
            if rule.event != event || rule.state.is_some_and(|wanted| wanted != state) {
                continue;
            }
            match &rule.action {
                Action::Inject(_) => armed.insert(0, *id),
                Action::SetState(next) => self.state = *next,
                Action::Stop(tag) => {
                    stops.push(tag.clone());
                    used.push(*id);
                }
            }
        }
        if !armed.is_empty() {
            self.armed = armed;
        }
        self.rules.retain(|(id, _)| !used.contains(id));
        stops
    }

    /// What becomes of a request.
    pub(super) fn check(&mut self, kind: Kind, range: ByteRange) -> Verdict {
        let hit = self.armed.iter().find_map(|id| {
            let injection = self.injection(*id)?;
            injection.hits(kind, range).then_some((*id, injection))
        });
        let Some((id, injection)) = hit else {
            return Verdict::Pass;
        };
        if injection.once {
            self.armed.retain(|other| *other != id);
            self.rules.retain(|(other, _)| *other != id);
        }
        match injection.immediately {
            true => Verdict::FailNow(injection.errno),
            false => Verdict::FailLater(injection.errno),
        }
    }

    fn injection(&self, id: u64) -> Option<Injection> {
        let (_, rule) = self.rules.iter().find(|(other, _)| *other == id)?;
        match rule.action {
            Action::Inject(injection) => Some(injection),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: ByteRange = ByteRange::new(4096, 512);
    const FAILURE: Verdict = Verdict::FailLater(Errno::EIO);

    fn injection() -> Injection {
        Injection {
            kind: None,
            errno: Errno::EIO,
            offset: None,
            once: false,
            immediately: false,
        }
    }

    fn rules(list: &[(Event, Option<u64>, Action)]) -> Rules {
        let mut rules = Rules::default();
        for (event, state, action) in list {
            rules.add(Rule {
                event: *event,
                state: *state,
                action: action.clone(),
            });
        }
        rules
    }

    #[test]
    fn an_error_stays_armed_until_an_event_arms_others() {
        let other = Injection {
            errno: Errno::ENOSPC,
            ..injection()
        };
        let mut rules = rules(&[
            (Event::L2Load, None, Action::Inject(injection())),
            (Event::L1Update, None, Action::Inject(other)),
        ]);
        assert_eq!(rules.check(Kind::Read, RANGE), Verdict::Pass);
        rules.happen(Event::L2Load);
        rules.happen(Event::CowRead);
        assert_eq!(rules.check(Kind::Read, RANGE), FAILURE);
        assert_eq!(rules.check(Kind::Flush, ByteRange::new(0, 0)), FAILURE);
        rules.happen(Event::L1Update);
        let expected = Verdict::FailLater(Errno::ENOSPC);
        assert_eq!(rules.check(Kind::Write, RANGE), expected);
    }

    #[test]
    fn an_error_that_happens_once_is_gone_for_good() {
        let once = Injection {
            once: true,
            immediately: true,
            ..injection()
        };
        let mut rules = rules(&[(Event::L2Load, None, Action::Inject(once))]);
        rules.happen(Event::L2Load);
        let expected = Verdict::FailNow(Errno::EIO);
        assert_eq!(rules.check(Kind::Read, RANGE), expected);
        rules.happen(Event::L2Load);
        assert_eq!(rules.check(Kind::Read, RANGE), Verdict::Pass);
    }

    #[test]
    fn errors_have_a_place_and_a_kind() {
        let placed = Injection {
            kind: Some(Kind::Write),
            offset: Some(4607),
            ..injection()
        };
        let mut rules = rules(&[(Event::None, None, Action::Inject(placed))]);
        rules.happen(Event::None);
        assert_eq!(rules.check(Kind::Read, RANGE), Verdict::Pass);
        let behind = ByteRange::new(4608, 512);
        assert_eq!(rules.check(Kind::Write, behind), Verdict::Pass);
        assert_eq!(rules.check(Kind::Write, RANGE), FAILURE);
    }

    #[test]
    fn questions_about_status_fail_only_when_they_are_meant() {
        let mut rules = rules(&[(Event::None, None, Action::Inject(injection()))]);
        rules.happen(Event::None);
        assert_eq!(rules.check(Kind::BlockStatus, RANGE), Verdict::Pass);
    }

    #[test]
    fn a_state_holds_from_the_event_after_the_one_that_set_it() {
        let mut rules = rules(&[
            (Event::L2Load, Some(2), Action::Inject(injection())),
            (Event::L2Load, Some(1), Action::SetState(2)),
        ]);
        rules.happen(Event::L2Load);
        assert_eq!(rules.check(Kind::Read, RANGE), Verdict::Pass);
        rules.happen(Event::L2Load);
        assert_eq!(rules.check(Kind::Read, RANGE), FAILURE);
    }

    #[test]
    fn a_breakpoint_stops_one_request() {
        let mut rules = Rules::default();
        rules.add_stop(Event::Pwritev, "A");
        assert_eq!(rules.happen(Event::Pwritev), ["A"]);
        assert!(rules.happen(Event::Pwritev).is_empty());
        rules.add_stop(Event::Pwritev, "B");
        assert!(rules.remove_stops("B"));
        assert!(!rules.remove_stops("B"));
    }
}
