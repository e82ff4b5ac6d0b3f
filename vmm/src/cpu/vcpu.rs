//! vCPU threads: run the guest, hand its accesses to the bus, and stop when asked to.
//!
//! ```text
//!           pause()                 resume()
//! running ----------> parked -------------------> running
//!    |                   |
//!    +------ stop() -----+----> ended
//! ```
//!
//! [`Gate`] holds what is wanted of all CPUs. To change it, the controller sets `immediate_exit` in each CPU's shared
//! page and sends a signal: a CPU inside KVM_RUN leaves it, one just before it returns at once, so no request is missed.
//! A CPU may also wait here for a device whose back-end has not come up yet; then it counts as parked when a pause comes.

#![expect(
    unsafe_code,
    reason = "immediate_exit lives in memory shared with KVM; a signal handler is installed"
)]

use std::os::unix::thread::JoinHandleExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::sys::pthread::pthread_kill;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::bus::Bus;
use crate::events::{Event, EventSender};
use crate::pci::NotReady;
use crate::seccomp::{Sandbox, ThreadKind};

/// Signal that makes a CPU leave KVM_RUN.
const KICK: Signal = Signal::SIGUSR1;

/// What all CPUs are to do, and how many have come to rest.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    wanted: Wanted,
    resting: usize,
    device_changes: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Wanted {
    #[default]
    Park,
    Run,
    End,
}

/// What a CPU is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Run,
    End,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state
            .lock()
            .expect("no thread panics while it holds the gate")
    }

    /// Tells CPUs that wait for a device to look again.
    pub(crate) fn device_changed(&self) {
        self.lock().device_changes += 1;
        self.changed.notify_all();
    }

    /// Waits while CPUs are to be parked. `before_run` runs under the lock, so a later pause is not overwritten.
    fn checkpoint(&self, before_run: impl FnOnce()) -> Next {
        let state = self.rest_while(self.lock(), |state| state.wanted == Wanted::Park);
        if state.wanted == Wanted::End {
            return Next::End;
        }
        before_run();
        Next::Run
    }

    /// Waits, as one that rests, until something else than running is wanted.
    fn wait_for_order(&self) {
        drop(self.rest_while(self.lock(), |state| state.wanted == Wanted::Run));
    }

    /// How often a device has changed.
    pub(crate) fn device_changes(&self) -> u64 {
        self.lock().device_changes
    }

    /// Waits until a device has changed since `seen` was read.
    #[cfg(test)]
    pub(crate) fn wait_for_change(&self, seen: u64) {
        let changed = |state: &mut GateState| state.device_changes == seen;
        drop(self.changed.wait_while(self.lock(), changed).unwrap());
    }

    /// Waits until a device has changed since `seen` was read, parked or not.
    fn wait_for_device(&self, seen: u64) -> Next {
        let state = self.rest_while(self.lock(), |state| match state.wanted {
            Wanted::Park => true,
            Wanted::Run => state.device_changes == seen,
            Wanted::End => false,
        });
        if state.wanted == Wanted::End {
            Next::End
        } else {
            Next::Run
        }
    }

    fn rest_while<'a>(
        &'a self,
        mut state: MutexGuard<'a, GateState>,
        condition: impl Fn(&GateState) -> bool,
    ) -> MutexGuard<'a, GateState> {
        state.resting += 1;
        self.changed.notify_all();
        while condition(&state) {
            state = self
                .changed
                .wait(state)
                .expect("no thread panics while it holds the gate");
        }
        state.resting -= 1;
        state
    }
}

/// The byte in a CPU's shared page that makes KVM_RUN return at once.
struct ImmediateExit(NonNull<u8>);

// SAFETY: the byte is only accessed as an atomic, and the kernel reads it with a single load.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn request(&self) {
        // SAFETY: the mapping lives as long as the VcpuFd, which its thread owns until it is joined; `Cpus` only calls
        // this for threads that it has not joined and that keep their VcpuFd until then.
        let byte = unsafe { AtomicU8::from_ptr(self.0.as_ptr()) };
        byte.store(1, Ordering::SeqCst);
    }
}

/// What every CPU thread is given.
#[derive(Clone)]
pub(crate) struct CpuContext {
    /// Where orders come from.
    pub(crate) gate: Arc<Gate>,
    /// Where accesses go to.
    pub(crate) bus: Arc<Bus>,
    /// Where shutdowns and failures are reported.
    pub(crate) events: EventSender,
    /// Which filter the thread installs.
    pub(crate) sandbox: Sandbox,
}

struct CpuThread {
    handle: JoinHandle<VcpuFd>,
    id: i32,
    immediate_exit: ImmediateExit,
}

/// The CPU threads of one machine, from power-on to the next reset.
pub(crate) struct Cpus {
    gate: Arc<Gate>,
    threads: Vec<CpuThread>,
}

impl Cpus {
    /// Starts one thread per CPU; all are parked until [`Cpus::resume`].
    ///
    /// # Errors
    /// The signal handler or a thread cannot be made.
    pub(crate) fn start(vcpus: Vec<VcpuFd>, context: &CpuContext) -> Result<Self> {
        install_signal_handler()?;
        context.gate.lock().wanted = Wanted::Park;
        let mut cpus = Self {
            gate: context.gate.clone(),
            threads: Vec::new(),
        };
        for (index, mut vcpu) in vcpus.into_iter().enumerate() {
            let immediate_exit =
                ImmediateExit(NonNull::from(&mut vcpu.get_kvm_run().immediate_exit));
            let context = context.clone();
            let (tell_id, id) = sync_channel(1);
            let handle = std::thread::Builder::new()
                .name(format!("cpu{index}"))
                .spawn(move || {
                    // The receiver waits for it.
                    let _ = tell_id.send(nix::unistd::gettid().as_raw());
                    context.sandbox.enter(ThreadKind::Cpu);
                    run(&mut vcpu, index, &context);
                    vcpu
                })
                .with_context(|| format!("thread of CPU {index}"))?;
            let id = id
                .recv()
                .with_context(|| format!("thread of CPU {index}"))?;
            cpus.threads.push(CpuThread {
                handle,
                id,
                immediate_exit,
            });
        }
        Ok(cpus)
    }

    /// Kernel thread ids, by CPU.
    pub(crate) fn thread_ids(&self) -> Vec<i32> {
        self.threads.iter().map(|thread| thread.id).collect()
    }

    /// Stops all CPUs and returns when none runs.
    pub(crate) fn pause(&self) {
        self.order(Wanted::Park);
        let mut state = self.gate.lock();
        while state.resting < self.threads.len() {
            state = self
                .gate
                .changed
                .wait(state)
                .expect("the gate is never poisoned");
        }
    }

    /// Lets all CPUs run.
    pub(crate) fn resume(&self) {
        self.gate.lock().wanted = Wanted::Run;
        self.gate.changed.notify_all();
    }

    fn order(&self, wanted: Wanted) {
        let mut state = self.gate.lock();
        state.wanted = wanted;
        for thread in &self.threads {
            thread.immediate_exit.request();
        }
        drop(state);
        self.gate.changed.notify_all();
        for thread in &self.threads {
            // The thread exists until it is joined, and a thread that is about to end needs no signal.
            let _ = pthread_kill(thread.handle.as_pthread_t(), KICK);
        }
    }
}

impl Drop for Cpus {
    fn drop(&mut self) {
        self.order(Wanted::End);
        for thread in self.threads.drain(..) {
            if thread.handle.join().is_err() {
                tracing::error!("a CPU thread panicked");
            }
        }
    }
}

fn install_signal_handler() -> Result<()> {
    extern "C" fn ignore(_: libc::c_int) {}
    let action = SigAction::new(
        SigHandler::Handler(ignore),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler does nothing, which is async-signal-safe.
    unsafe { sigaction(KICK, &action) }.context("signal handler")?;
    Ok(())
}

fn run(vcpu: &mut VcpuFd, index: usize, context: &CpuContext) {
    let gate = &context.gate;
    if gate.checkpoint(|| vcpu.set_kvm_immediate_exit(0)) == Next::End {
        return;
    }
    loop {
        let next = match run_once(vcpu, context) {
            Exit::Handled => Next::Run,
            Exit::Ended => Next::End,
            Exit::Interrupted => checkpoint_after_pause(vcpu, gate),
            Exit::Reset => {
                context.events.send(Event::GuestReset);
                gate.wait_for_order();
                checkpoint_after_pause(vcpu, gate)
            }
            Exit::Failed(reason) => {
                context
                    .events
                    .send(Event::Failed(format!("CPU {index}: {reason}")));
                gate.wait_for_order();
                // A CPU that KVM cannot run must not be run again: it rests until the machine goes away.
                while gate.checkpoint(|| {}) == Next::Run {
                    gate.wait_for_order();
                }
                Next::End
            }
        };
        if next == Next::End {
            return;
        }
    }
}

fn checkpoint_after_pause(vcpu: &mut VcpuFd, gate: &Gate) -> Next {
    let next = gate.checkpoint(|| vcpu.set_kvm_immediate_exit(0));
    // Tells the guest's watchdog that time was stolen. Fails when the guest uses no kvm-clock, and then need not be told.
    let _ = vcpu.kvmclock_ctrl();
    next
}

/// Why a CPU left KVM_RUN, once its access has been served.
enum Exit {
    Handled,
    Interrupted,
    Ended,
    Reset,
    Failed(String),
}

fn run_once(vcpu: &mut VcpuFd, context: &CpuContext) -> Exit {
    const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
    const SYSTEM_EVENT_RESET: u32 = 2;
    let (bus, gate) = (&context.bus, &context.gate);
    match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => access(gate, || bus.port_read(port, data)),
        Ok(VcpuExit::IoOut(port, data)) => access(gate, || bus.port_write(port, data)),
        Ok(VcpuExit::MmioRead(address, data)) => access(gate, || bus.mmio_read(address, data)),
        Ok(VcpuExit::MmioWrite(address, data)) => access(gate, || bus.mmio_write(address, data)),
        Ok(VcpuExit::Intr) => Exit::Interrupted,
        Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(SYSTEM_EVENT_RESET, _)) => Exit::Reset,
        Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_SHUTDOWN, _)) => {
            context.events.send(Event::GuestPowerOff);
            Exit::Handled
        }
        Ok(exit) => Exit::Failed(format!("unexpected exit {exit:?}")),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
        Err(error) => Exit::Failed(format!("KVM_RUN: {error}")),
    }
}

/// Tries an access until the device is ready for it.
fn access(gate: &Gate, mut attempt: impl FnMut() -> Result<(), NotReady>) -> Exit {
    loop {
        let seen = gate.device_changes();
        if attempt().is_ok() {
            return Exit::Handled;
        }
        if gate.wait_for_device(seen) == Next::End {
            return Exit::Ended;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_that_waits_for_a_device_counts_as_parked_and_goes_on_when_it_comes() {
        let gate = Arc::new(Gate::default());
        gate.lock().wanted = Wanted::Run;
        let waiter = std::thread::spawn({
            let gate = gate.clone();
            move || gate.wait_for_device(0)
        });
        let mut state = gate.lock();
        while state.resting < 1 {
            state = gate.changed.wait(state).unwrap();
        }
        state.wanted = Wanted::Park;
        drop(state);
        gate.device_changed();
        gate.lock().wanted = Wanted::Run;
        gate.changed.notify_all();
        assert_eq!(waiter.join().unwrap(), Next::Run);
        assert_eq!(gate.lock().resting, 0);
    }

    #[test]
    fn an_end_order_reaches_a_cpu_that_waits_for_a_device() {
        let gate = Arc::new(Gate::default());
        gate.lock().wanted = Wanted::End;
        assert_eq!(gate.wait_for_device(0), Next::End);
        assert_eq!(gate.checkpoint(|| panic!("must not run")), Next::End);
    }
}
