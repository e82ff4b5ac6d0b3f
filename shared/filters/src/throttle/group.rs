//! A group: nodes that share limits, and the requests that wait.
//!
//! ```text
//!   request ─► limited at all? ─no─► goes ahead (one load)
//!                 │yes
//!                 ▼
//!   nobody waits and the buckets are not full? ─yes─► counted, goes ahead
//!                 │no
//!                 ▼
//!   queue of its member ─► first of the member whose turn it is: sleeps as the buckets say ─► counted
//!                                     next member's turn ◄─ goes ahead ◄──────────────────────┘
//! ```
//!
//! Owns: buckets and queues, one queue per direction and member. Promises: members take turns, request by
//! request, whatever thread they are on; only the request whose turn it is has a timer; a request
//! that is dropped gives its turn away; new limits are obeyed at once. Must not know: nodes.

use super::buckets::Buckets;
use super::limits::{Direction, ThrottleLimits};
use executor::time;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// A throttle group.
pub struct ThrottleGroup {
    /// Whether requests of a direction have limits.
    limited: [AtomicBool; 2],
    state: Mutex<State>,
}

struct State {
    buckets: Buckets,
    /// By direction.
    queues: [Queue; 2],
    tickets: u64,
}

/// The requests of one direction that wait: members in turn, the next one first.
#[derive(Default)]
struct Queue {
    turns: VecDeque<Turn>,
}

/// One member's requests.
struct Turn {
    member: u64,
    waiting: VecDeque<Entry>,
}

struct Entry {
    ticket: u64,
    /// What it was waiting for may have happened.
    poked: bool,
    waker: Option<Waker>,
}

impl Entry {
    fn poke(&mut self) {
        self.poked = true;
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    fn push(&mut self, member: u64, ticket: u64) {
        let entry = Entry {
            ticket,
            poked: false,
            waker: None,
        };
        match self.turns.iter_mut().find(|turn| turn.member == member) {
            Some(turn) => turn.waiting.push_back(entry),
            None => self.turns.push_back(Turn {
                member,
                waiting: VecDeque::from([entry]),
            }),
        }
    }

    /// The request whose turn it is.
    fn first(&mut self) -> Option<&mut Entry> {
        self.turns.front_mut()?.waiting.front_mut()
    }

    fn is_first(&mut self, ticket: u64) -> bool {
        self.first().is_some_and(|entry| entry.ticket == ticket)
    }

    /// Takes the request whose turn it is out: the next member's turn comes.
    fn pass_turn(&mut self) {
        let Some(mut turn) = self.turns.pop_front() else {
            return;
        };
        turn.waiting.pop_front();
        if !turn.waiting.is_empty() {
            self.turns.push_back(turn);
        }
    }

    /// Takes a request out that does not go ahead.
    fn remove(&mut self, ticket: u64) {
        for turn in &mut self.turns {
            turn.waiting.retain(|entry| entry.ticket != ticket);
        }
        self.turns.retain(|turn| !turn.waiting.is_empty());
    }

    fn entry(&mut self, ticket: u64) -> Option<&mut Entry> {
        let mut entries = self.turns.iter_mut().flat_map(|turn| &mut turn.waiting);
        entries.find(|entry| entry.ticket == ticket)
    }

    fn poke_first(&mut self) {
        if let Some(entry) = self.first() {
            entry.poke();
        }
    }
}

impl ThrottleGroup {
    /// A group without members. The limits have been checked.
    pub fn new(limits: ThrottleLimits) -> Self {
        let group = Self {
            limited: [AtomicBool::new(false), AtomicBool::new(false)],
            state: Mutex::new(State {
                buckets: Buckets::new(limits),
                queues: Default::default(),
                tickets: 0,
            }),
        };
        group.note_limited(&limits);
        group
    }

    /// The limits.
    pub fn limits(&self) -> ThrottleLimits {
        *self.state().buckets.limits()
    }

    /// Replaces the limits by others that have been checked; the buckets become empty.
    pub fn set_limits(&self, limits: ThrottleLimits) {
        let mut state = self.state();
        state.buckets = Buckets::new(limits);
        self.note_limited(&limits);
        state.queues.iter_mut().for_each(Queue::poke_first);
    }

    fn note_limited(&self, limits: &ThrottleLimits) {
        for direction in [Direction::Read, Direction::Write] {
            let limited = limits.limit(direction);
            self.limited[direction as usize].store(limited, Ordering::Release);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One node's place in a group.
pub(super) struct Member {
    group: Arc<ThrottleGroup>,
    id: u64,
    /// Drains that are on: nothing waits.
    hurries: AtomicU32,
}

/// What a request that waits is to do.
enum Step {
    Go,
    /// It is its turn, in this time.
    Sleep(Duration),
    /// Others come first.
    Behind,
}

impl Member {
    pub(super) fn new(group: Arc<ThrottleGroup>) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        Self {
            group,
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            hurries: AtomicU32::new(0),
        }
    }

    /// Counts a request that may go ahead at once; false when it has to wait.
    pub(super) fn try_admit(&self, direction: Direction, bytes: u64) -> bool {
        if !self.group.limited[direction as usize].load(Ordering::Acquire) {
            return true;
        }
        let mut state = self.group.state();
        let hurried = self.hurries.load(Ordering::Acquire) != 0;
        let free = state.queues[direction as usize].is_empty()
            && state.buckets.wait(direction, time::now()).is_zero();
        if hurried || free {
            state.buckets.account(direction, bytes);
        }
        hurried || free
    }

    /// Waits until a request may go ahead, and counts it.
    pub(super) async fn admit(&self, direction: Direction, bytes: u64) {
        let ticket = self.enqueue(direction);
        loop {
            match self.step(&ticket, bytes) {
                Step::Go => return,
                Step::Sleep(duration) => {
                    time::timeout(duration, ticket.poked()).await;
                }
                Step::Behind => ticket.poked().await,
            }
        }
    }

    fn enqueue(&self, direction: Direction) -> Ticket<'_> {
        let mut state = self.group.state();
        state.tickets += 1;
        let number = state.tickets;
        state.queues[direction as usize].push(self.id, number);
        Ticket {
            group: &self.group,
            direction,
            number,
        }
    }

    fn step(&self, ticket: &Ticket<'_>, bytes: u64) -> Step {
        let mut state = self.group.state();
        let State {
            buckets, queues, ..
        } = &mut *state;
        let queue = &mut queues[ticket.direction as usize];
        let first = queue.is_first(ticket.number);
        if self.hurries.load(Ordering::Acquire) != 0 {
            buckets.account(ticket.direction, bytes);
            queue.remove(ticket.number);
            queue.poke_first();
            return Step::Go;
        }
        if !first {
            return Step::Behind;
        }
        let wait = buckets.wait(ticket.direction, time::now());
        if !wait.is_zero() {
            return Step::Sleep(wait);
        }
        buckets.account(ticket.direction, bytes);
        queue.pass_turn();
        queue.poke_first();
        Step::Go
    }

    /// Lets everything that waits, and whatever comes, go ahead until as many [`Member::relax`]
    /// follow.
    pub(super) fn hurry(&self) {
        self.hurries.fetch_add(1, Ordering::AcqRel);
        let mut state = self.group.state();
        let turns = state.queues.iter_mut().flat_map(|queue| &mut queue.turns);
        let own = turns.filter(|turn| turn.member == self.id);
        own.flat_map(|turn| &mut turn.waiting).for_each(Entry::poke);
    }

    /// Ends a [`Member::hurry`].
    pub(super) fn relax(&self) {
        self.hurries.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A request's place in a queue, which it leaves when dropped.
struct Ticket<'a> {
    group: &'a ThrottleGroup,
    direction: Direction,
    number: u64,
}

impl Ticket<'_> {
    async fn poked(&self) {
        poll_fn(|context| self.poll_poked(context)).await;
    }

    fn poll_poked(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.group.state();
        let Some(entry) = state.queues[self.direction as usize].entry(self.number) else {
            return Poll::Ready(());
        };
        if std::mem::take(&mut entry.poked) {
            return Poll::Ready(());
        }
        entry.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut state = self.group.state();
        let queue = &mut state.queues[self.direction as usize];
        let first = queue.is_first(self.number);
        queue.remove(self.number);
        if first {
            queue.poke_first();
        }
    }
}
