//! Request epochs: when has every request begun before a point in time ended, on every thread?
//!
//! A request pins the current epoch when it enters at a root. Clusters freed in epoch `e` may be
//! reused once no request pinned in `e` or before is left. Counting is per thread: no shared
//! counter is written on the request path.
//!
//! ```text
//!   each thread: pins[even], pins[odd]       written by itself only
//!   clock g → g+1  when pins[parity of g-1] is zero on every thread
//!   passed(e)      when the clock is at e+3 or later
//! ```
//!
//! Why three steps: a thread may read the clock and be stopped before its pin is seen, and may
//! then pin under an old parity. Before the clock reads its counters it makes every thread pass a
//! memory barrier (`membarrier`), so such a late pin is either counted, or its request began after
//! what was freed had become unreachable. Of the steps `e → e+1 → e+2 → e+3` the last two begin
//! after the free and look at both parities, so whatever parity a request holds, it is waited
//! for. `clock.rs` has the steps.
//!
//! A simulated process has a clock of its own: it has one thread, and what other threads of the host's
//! process do, in other worlds or in none, neither holds its epochs nor changes the order of its events.
//!
//! Must not know: what is freed. Needs the `membarrier` system call to stay allowed in a sandbox;
//! where it is missing each pin pays for a full fence instead.

#![expect(
    unsafe_code,
    reason = "membarrier has no safe wrapper; it takes no pointers"
)]

mod clock;
#[cfg(all(test, loom))]
mod models;

/// The atomics of the clock; models have loom's.
mod atomics {
    pub(super) use std::sync::atomic::{AtomicU64, AtomicUsize, fence};
}

use atomics::{AtomicU64, AtomicUsize, fence};
use clock::{Clock, Pins};
use executor::sync::Notify;
use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};

/// A point in time that [`passed`] can be asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(pub u64);

/// A process, as requests see it: the host's, or a simulated one.
struct Process {
    clock: Clock,
    /// Counters of all threads that ever pinned and still live.
    threads: Mutex<Vec<Arc<Pins>>>,
    /// Requests ended that somebody waits for.
    ended: Notify,
}

static HOST: LazyLock<Arc<Process>> = LazyLock::new(Process::new);

thread_local! {
    static IN_HOST: Registration = Registration::new(&HOST);
    static IN_SIMULATION: Registration = Registration::new(&Process::new());
}

impl Process {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            clock: Clock {
                epoch: AtomicU64::new(1),
                waiting: AtomicUsize::new(0),
            },
            threads: Mutex::default(),
            ended: Notify::new(),
        })
    }

    /// The one that the current executor runs in.
    fn current() -> Arc<Self> {
        Registration::with_current(|registration| Arc::clone(&registration.process))
    }

    fn threads(&self) -> MutexGuard<'_, Vec<Arc<Pins>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`passed`].
    fn passed(&self, epoch: Epoch) -> bool {
        self.clock.is_past(epoch.0) || {
            // The lock is held: nobody else moves the clock.
            let threads = self.threads();
            let pins = threads.iter().map(|pins| &**pins);
            self.clock.advance(pins, epoch.0, barrier_everywhere)
        }
    }
}

/// The current epoch; a free that happened before this call belongs to it.
pub fn current() -> Epoch {
    Registration::with_current(|registration| Epoch(registration.process.clock.now()))
}

/// Whether every request that began up to and including `epoch` has ended. Tries to advance the
/// epoch, so that asking again and again makes progress.
pub fn passed(epoch: Epoch) -> bool {
    Registration::with_current(|registration| registration.process.passed(epoch))
}

/// Waits until [`passed`].
pub async fn wait(epoch: Epoch) {
    let process = Process::current();
    let _waiting = Waiting::new(&process);
    loop {
        let ended = process.ended.notified();
        if process.passed(epoch) {
            return;
        }
        ended.await;
    }
}

struct Waiting<'p>(&'p Process);

impl<'p> Waiting<'p> {
    fn new(process: &'p Process) -> Self {
        // Seen by every thread after the barrier that `passed` begins with; a request that ended
        // before is seen by the look at the counters that follows it.
        process.clock.wait();
        Self(process)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.clock.waited();
    }
}

/// Pins the current epoch on this thread until dropped (what a root does for each request).
pub fn pin() -> Pin {
    ThreadEpoch::current().pin()
}

/// A pinned epoch.
#[must_use = "the epoch is pinned only while this lives"]
pub struct Pin {
    thread: ThreadEpoch,
    parity: usize,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.thread.unpin(self.parity);
    }
}

/// This thread's counters, for whoever pins often.
#[derive(Clone)]
pub(crate) struct ThreadEpoch {
    pins: Arc<Pins>,
    process: Arc<Process>,
    fenced: bool,
    /// The counters are written by their own thread only.
    _not_send: PhantomData<*const ()>,
}

impl ThreadEpoch {
    /// The current thread's counters.
    pub(crate) fn current() -> ThreadEpoch {
        Registration::with_current(|registration| ThreadEpoch {
            pins: Arc::clone(&registration.pins),
            process: Arc::clone(&registration.process),
            fenced: !has_membarrier(),
            _not_send: PhantomData,
        })
    }

    fn pin(self) -> Pin {
        let parity = self.enter();
        Pin {
            thread: self,
            parity,
        }
    }

    /// Pins; returns what [`ThreadEpoch::unpin`] needs.
    #[inline]
    pub(crate) fn enter(&self) -> usize {
        self.pins.enter(&self.process.clock, || self.barrier())
    }

    /// Orders a store to the counters before later loads.
    #[inline]
    fn barrier(&self) {
        if self.fenced {
            fence(Ordering::SeqCst);
        } else {
            // The barrier of the clock's side stands in for the processor's; the compiler must
            // not move later loads before the store either.
            std::sync::atomic::compiler_fence(Ordering::SeqCst);
        }
    }

    #[inline]
    pub(crate) fn unpin(&self, parity: usize) {
        let process = &*self.process;
        if self.pins.leave(parity, &process.clock, || self.barrier()) {
            process.ended.notify_all();
        }
    }
}

/// Keeps a thread's counters in the list of its process while the thread lives.
struct Registration {
    process: Arc<Process>,
    pins: Arc<Pins>,
    _not_sync: PhantomData<Cell<()>>,
}

impl Registration {
    fn new(process: &Arc<Process>) -> Self {
        let pins = Arc::new(Pins::default());
        process.threads().push(Arc::clone(&pins));
        Self {
            process: Arc::clone(process),
            pins,
            _not_sync: PhantomData,
        }
    }

    /// Calls `f` with this thread's, in the process that its executor runs in.
    fn with_current<R>(f: impl FnOnce(&Self) -> R) -> R {
        match executor::sim::is_current() {
            true => IN_SIMULATION.with(f),
            false => IN_HOST.with(f),
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // Pins cannot leave the thread, so those still counted were leaked with their request and
        // hold nothing any more.
        let mut threads = self.process.threads();
        threads.retain(|pins| !Arc::ptr_eq(pins, &self.pins));
        drop(threads);
        self.process.ended.notify_all();
    }
}

const REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;
const PRIVATE_EXPEDITED: libc::c_int = 1 << 3;

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: `membarrier` takes integers only and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

fn has_membarrier() -> bool {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    *REGISTERED.get_or_init(|| membarrier(REGISTER_PRIVATE_EXPEDITED))
}

/// Makes every running thread of the process pass a memory barrier. False when the system call is
/// refused although it was there at first: then nothing may be concluded and nothing is reused.
fn barrier_everywhere() -> bool {
    fence(Ordering::SeqCst);
    !has_membarrier() || membarrier(PRIVATE_EXPEDITED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use executor::Executor;
    use executor::sim::{Config, World};
    use std::rc::Rc;
    use std::time::Duration;

    /// The clock is the process's: tests that move it take turns.
    static TURN: Mutex<()> = Mutex::new(());

    fn turn() -> MutexGuard<'static, ()> {
        TURN.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn passes_now(epoch: Epoch) -> bool {
        (0..8).any(|_| passed(epoch))
    }

    /// Other tests of the process pin epochs as well, for a while.
    fn wait_until_passed(epoch: Epoch) {
        while !passed(epoch) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn an_epoch_passes_only_after_its_pins() {
        let _turn = turn();
        let pin = pin();
        let freed = current();
        assert!(!passes_now(freed));
        drop(pin);
        wait_until_passed(freed);
    }

    #[test]
    fn a_later_pin_does_not_hold_an_epoch_forever() {
        let _turn = turn();
        let first = pin();
        let freed = current();
        assert!(!passes_now(freed));
        let later = pin();
        drop(first);
        // The later pin may hold the clock for a step, never the freed epoch for good, once pins
        // are renewed.
        let mut held = later;
        while !passed(freed) {
            let renewed = pin();
            drop(held);
            held = renewed;
            std::thread::yield_now();
        }
        drop(held);
    }

    #[test]
    fn a_simulated_process_waits_for_its_own_requests_only() {
        let _turn = turn();
        let of_the_host = pin();
        let freed_on_the_host = current();
        let world = World::new(Config::default());
        Executor::simulated(&world).block_on(async {
            wait(current()).await;
            let own = pin();
            let freed = current();
            assert!(!passes_now(freed));
            let ended = Rc::new(Cell::new(false));
            let ending = Rc::clone(&ended);
            drop(executor::spawn(async move {
                executor::time::sleep(Duration::from_millis(1)).await;
                ending.set(true);
                drop(own);
            }));
            wait(freed).await;
            assert!(ended.get(), "a request of the world was under way");
        });
        assert!(!passes_now(freed_on_the_host));
        drop(of_the_host);
        wait_until_passed(freed_on_the_host);
    }

    #[test]
    fn pins_of_other_threads_count() {
        let _turn = turn();
        let (pinned_tx, pinned_rx) = std::sync::mpsc::channel();
        let (end_tx, end_rx) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let _pin = pin();
            pinned_tx.send(()).unwrap();
            end_rx.recv().unwrap();
        });
        pinned_rx.recv().unwrap();
        let freed = current();
        assert!(!passes_now(freed));
        end_tx.send(()).unwrap();
        thread.join().unwrap();
        wait_until_passed(freed);
    }
}
