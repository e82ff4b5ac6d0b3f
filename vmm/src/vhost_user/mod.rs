//! A device behind a vhost-user socket as the rest of the VMM sees it: a handle to the thread that talks to the back-end.
//!
//! ```text
//! virtio_pci --commands--> worker thread <--UNIX socket--> back-end
//!      ^                        |
//!      +---- Shared: features, configuration, "resetting", "broken"
//! ```
//!
//! [`wire`] moves messages, [`session`] holds the conversation (negotiation, starting and stopping rings), [`reconnect`] says when
//! to try again, [`worker`] is the thread's loop. What kind of device it is, only its [`model`] knows: [`blk`] or [`net`]. The
//! handle and its notifiers live as long as the process: a machine reset makes a new virtio-pci transport around the same handle.

pub(crate) mod blk;
pub(crate) mod model;
pub(crate) mod net;
mod reconnect;
mod session;
mod wire;
mod worker;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cpu::vcpu::Gate;
use crate::events::Notifier;
use crate::memory::Memory;
use crate::seccomp::{Sandbox, ThreadKind};

use self::model::{Kind, Model};

/// Longest time that a back-end may take to finish what it has in flight.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// One virtqueue as the guest's driver set it up; addresses are guest-physical.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RingSetup {
    /// Number of descriptors.
    pub(crate) size: u16,
    /// Descriptor table, or a packed ring's descriptors.
    pub(crate) descriptors: u64,
    /// Available ring, or a packed ring's events of the driver ("driver area").
    pub(crate) available: u64,
    /// Used ring, or a packed ring's events of the device ("device area").
    pub(crate) used: u64,
}

/// What the guest's driver agreed to when it set DRIVER_OK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Activation {
    /// Negotiated virtio features.
    pub(crate) features: u64,
    /// The enabled queues by index; `None` for one that the driver left alone.
    pub(crate) rings: Vec<Option<RingSetup>>,
}

/// Orders for the worker thread.
enum Command {
    Activate(Activation),
    Reset(SyncSender<()>),
    WriteSwitch,
    Pause(SyncSender<()>),
    Resume,
    Quit,
}

/// The notifiers that the guest, KVM and the back-end share.
pub(crate) struct Notifiers {
    /// Raised by the guest (ioeventfd), one per queue.
    pub(crate) kicks: Vec<Arc<Notifier>>,
    /// Raised by the back-end (irqfd), one per queue.
    pub(crate) calls: Vec<Arc<Notifier>>,
    /// Raised by the worker when the configuration has changed.
    pub(crate) config: Arc<Notifier>,
}

/// What the worker publishes for the transport.
struct Shared {
    state: Mutex<SharedState>,
    notifiers: Notifiers,
    gate: Arc<Gate>,
}

struct SharedState {
    /// Features on offer; `None` until the first connection.
    features: Option<u64>,
    config: Vec<u8>,
    generation: u8,
    /// An order to write the driver's switch waits.
    write_switch: bool,
    resetting: bool,
    broken: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, SharedState> {
        self.state
            .lock()
            .expect("no thread panics while it holds a device's state")
    }
}

/// A device to make.
pub(crate) struct Description {
    /// Name in messages and answers.
    pub(crate) name: String,
    /// Where the back-end listens.
    pub(crate) socket: PathBuf,
    /// Largest number of descriptors of one queue.
    pub(crate) queue_size: u16,
    /// What it is.
    pub(crate) model: Arc<dyn Model>,
}

/// Handle to a device.
pub(crate) struct Device {
    name: String,
    queue_size: u16,
    model: Arc<dyn Model>,
    shared: Arc<Shared>,
    commands: Sender<Command>,
    wake: Arc<Notifier>,
}

impl Device {
    /// Starts the thread that connects to the back-end; the back-end need not be there.
    ///
    /// # Errors
    /// The socket's path is too long, its directory cannot be watched, or no thread can be made.
    pub(crate) fn start(description: Description, environment: &Environment) -> Result<Self> {
        let Description {
            name,
            socket,
            queue_size,
            model,
        } = description;
        let queue_events = || (0..model.num_queues()).map(|_| Notifier::new().map(Arc::new));
        let notifiers = Notifiers {
            kicks: queue_events().collect::<Result<_>>()?,
            calls: queue_events().collect::<Result<_>>()?,
            config: Arc::new(Notifier::new()?),
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(SharedState {
                features: None,
                config: vec![0; model.kind().config_size],
                generation: 0,
                write_switch: false,
                resetting: false,
                broken: false,
            }),
            notifiers,
            gate: environment.gate.clone(),
        });
        let (commands, queue) = channel();
        let device = Self {
            name,
            queue_size,
            model,
            shared,
            commands,
            wake: Arc::new(Notifier::new()?),
        };
        let option = device.model.kind().option;
        device
            .spawn(&socket, environment, queue)
            .with_context(|| format!("{option} {} ({})", device.name, socket.display()))?;
        Ok(device)
    }

    fn spawn(
        &self,
        socket: &Path,
        environment: &Environment,
        commands: Receiver<Command>,
    ) -> Result<()> {
        let dialer = reconnect::Dialer::new(socket, self.wake.clone())?;
        let setup = session::Setup {
            model: self.model.clone(),
            queue_size: self.queue_size,
            memory: environment.memory.clone(),
            shared: self.shared.clone(),
        };
        let worker = worker::Worker::new(self.name.clone(), dialer, setup, commands);
        let sandbox = environment.sandbox;
        std::thread::Builder::new()
            .name(self.name.clone())
            .spawn(move || {
                sandbox.enter(ThreadKind::Device);
                worker.run();
            })
            .context("thread")?;
        Ok(())
    }

    /// Name in messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What kind of device it is.
    pub(crate) fn kind(&self) -> &'static Kind {
        self.model.kind()
    }

    /// Queues that the guest sees.
    pub(crate) fn num_queues(&self) -> u16 {
        self.model.num_queues()
    }

    /// Largest queue size.
    pub(crate) fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// Notifiers to wire up.
    pub(crate) fn notifiers(&self) -> &Notifiers {
        &self.shared.notifiers
    }

    /// Features on offer; `None` while there has been no connection yet.
    pub(crate) fn features(&self) -> Option<u64> {
        self.shared.lock().features
    }

    /// The configuration as last read from the back-end, and its generation; `None` as for [`Device::features`].
    pub(crate) fn config(&self) -> Option<(Vec<u8>, u8)> {
        let state = self.shared.lock();
        state
            .features
            .map(|_| (state.config.clone(), state.generation))
    }

    /// Which of its states the configuration is in.
    pub(crate) fn generation(&self) -> u8 {
        self.shared.lock().generation
    }

    /// Changes the one field that a driver may write: at once in the copy, soon in the back-end. However often the guest
    /// writes, at most one order waits.
    pub(crate) fn write_config(&self, offset: usize, bytes: &[u8]) {
        let &[value @ (0 | 1)] = bytes else {
            return;
        };
        if self.model.switch() != Some(offset) {
            return;
        }
        let mut state = self.shared.lock();
        state.config[offset] = value;
        let already_ordered = std::mem::replace(&mut state.write_switch, true);
        drop(state);
        if !already_ordered {
            self.send(Command::WriteSwitch);
        }
    }

    /// The driver is ready: start the rings, now or when the back-end is there.
    pub(crate) fn activate(&self, activation: Activation) {
        self.send(Command::Activate(activation));
    }

    /// Begins to stop the rings and forget the driver; done when [`Device::is_resetting`] says no.
    pub(crate) fn reset(&self) {
        let _ = self.begin_reset();
    }

    fn begin_reset(&self) -> Receiver<()> {
        let (reply, answer) = sync_channel(1);
        let mut state = self.shared.lock();
        (state.resetting, state.broken) = (true, false);
        drop(state);
        self.send(Command::Reset(reply));
        answer
    }

    /// Whether a reset is under way.
    pub(crate) fn is_resetting(&self) -> bool {
        self.shared.lock().resetting
    }

    /// Whether the driver's rings were unusable, so that it must reset the device.
    pub(crate) fn is_broken(&self) -> bool {
        self.shared.lock().broken
    }

    /// Resets and waits until the back-end touches no guest memory any more.
    ///
    /// # Errors
    /// The back-end is connected but does not answer.
    pub(crate) fn reset_and_wait(&self) -> Result<()> {
        self.wait(&self.begin_reset())
    }

    /// Drains the rings.
    ///
    /// # Errors
    /// The back-end is connected but does not answer.
    pub(crate) fn pause(&self) -> Result<()> {
        let (reply, answer) = sync_channel(1);
        self.send(Command::Pause(reply));
        self.wait(&answer)
    }

    /// Starts drained rings again.
    pub(crate) fn resume(&self) {
        self.send(Command::Resume);
    }

    fn wait(&self, answer: &Receiver<()>) -> Result<()> {
        answer.recv_timeout(ANSWER_TIMEOUT).with_context(|| {
            format!(
                "{}: no answer from the back-end in {ANSWER_TIMEOUT:?}",
                self.name
            )
        })
    }

    fn send(&self, command: Command) {
        // The worker ends only after Quit, and nothing that follows needs an answer.
        let _ = self.commands.send(command);
        self.wake.raise();
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.send(Command::Quit);
    }
}

/// What devices need from the machine.
pub(crate) struct Environment {
    /// Guest memory to share with back-ends.
    pub(crate) memory: Memory,
    /// Where CPUs wait for a first connection.
    pub(crate) gate: Arc<Gate>,
    /// Which filter threads install.
    pub(crate) sandbox: Sandbox,
}

#[cfg(test)]
pub(crate) mod tests;
