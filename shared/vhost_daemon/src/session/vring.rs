//! The rings of a session: the messages that set them up, start and stop them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use executor::Errno;

use super::{Answer, F_PROTOCOL_FEATURES, Reply, Session, SessionError};
use crate::device::Device;
use crate::queue::{QueueChange, QueueSetup, RingState};
use crate::ring::{RingError, RingLayout, is_mapped};
use crate::wire::{self, Message, RingAddresses};

/// How the guest says that it made something available.
#[derive(Clone, Default)]
enum Kick {
    /// The ring is stopped.
    #[default]
    Unset,
    /// It does not say: poll.
    Poll,
    Fd(Arc<OwnedFd>),
}

/// What the front-end said of a ring's use (SET_VRING_ENABLE).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Enable {
    /// Nothing yet: it waits, for a front-end that connects again says so a moment after the kick.
    #[default]
    Unsaid,
    Enabled,
    Disabled,
}

/// A ring as the front-end has set it up so far.
#[derive(Default)]
pub(super) struct Vring {
    pub(super) size: u16,
    addresses: Option<RingAddresses>,
    /// As the messages carry it: two positions of a packed ring.
    base: u32,
    /// Where writes of the ring itself are logged.
    pub(super) log_at: Option<u64>,
    kick: Kick,
    call: Option<Arc<OwnedFd>>,
    err: Option<Arc<OwnedFd>>,
    enable: Enable,
    pub(super) running: bool,
}

impl<D: Device> Session<D> {
    fn vring(&mut self, index: u16) -> Result<&mut Vring, SessionError> {
        self.vrings
            .get_mut(usize::from(index))
            .ok_or(SessionError::NoQueue(index))
    }

    fn stopped_vring(
        &mut self,
        index: u16,
        what: &'static str,
    ) -> Result<&mut Vring, SessionError> {
        let vring = self.vring(index)?;
        if vring.running {
            return Err(SessionError::Running { index, what });
        }
        Ok(vring)
    }

    pub(super) async fn handle_vring(&mut self, message: Message) -> Reply {
        match message {
            Message::SetVringNum { index, size } => self.set_size(index, size),
            Message::SetVringBase { index, base } => {
                if self.layout() == RingLayout::Split && base > u32::from(u16::MAX) {
                    let source = RingError::Base(base).into();
                    return Err(SessionError::Queue { index, source });
                }
                self.stopped_vring(index, "the base")?.base = base;
                Ok(Answer::Done)
            }
            Message::SetVringAddr {
                index,
                addresses,
                log,
            } => {
                if self.vring(index)?.addresses != Some(addresses) {
                    self.stopped_vring(index, "the address")?.addresses = Some(addresses);
                }
                self.set_ring_log(index, log).await?;
                self.maybe_start(index).await
            }
            Message::SetVringKick { index, fd } => self.set_kick(index, fd).await,
            Message::SetVringCall { index, fd } => {
                let fd = fd.map(eventfd).transpose()?;
                self.vring(index)?.call = fd.clone();
                self.change_queue(index, QueueChange::Call(fd)).await
            }
            Message::SetVringErr { index, fd } => {
                let fd = fd.map(eventfd).transpose()?;
                self.vring(index)?.err = fd.clone();
                self.change_queue(index, QueueChange::Err(fd)).await
            }
            Message::SetVringEnable { index, enable } => {
                let enable = match enable {
                    true => Enable::Enabled,
                    false => Enable::Disabled,
                };
                self.set_enable(index, enable).await
            }
            Message::GetVringBase { index } => self.get_base(index).await,
            _ => Ok(Answer::Done),
        }
    }

    fn set_size(&mut self, index: u16, size: u32) -> Reply {
        let max = self.device.max_queue_size();
        let inflight = self.inflight.clone();
        let layout = self.layout();
        let vring = self.stopped_vring(index, "the size")?;
        let narrow = u16::try_from(size).ok();
        let size = narrow
            .filter(|size| size.is_power_of_two() && *size <= max)
            .ok_or(SessionError::RingSize { index, size, max })?;
        if let Some(region) = inflight {
            region.check_queue(index, size, layout)?;
        }
        vring.size = size;
        Ok(Answer::Done)
    }

    /// Logs the ring's own pages at `log_at`, or no more.
    async fn set_ring_log(&mut self, index: u16, log_at: Option<u64>) -> Reply {
        let old = std::mem::replace(&mut self.vring(index)?.log_at, log_at);
        if let Err(error) = self.check_logging(self.features, &self.memory) {
            self.vring(index)?.log_at = old;
            return Err(error);
        }
        let log = self.ring_log(index);
        self.change_queue(index, QueueChange::Log(log)).await
    }

    async fn set_kick(&mut self, index: u16, fd: Option<OwnedFd>) -> Reply {
        let fd = fd.map(eventfd).transpose()?;
        let vring = self.vring(index)?;
        vring.kick = match &fd {
            Some(fd) => Kick::Fd(fd.clone()),
            None => Kick::Poll,
        };
        if vring.running {
            return self.change_queue(index, QueueChange::Kick(fd)).await;
        }
        self.maybe_start(index).await
    }

    /// A device that goes on with a disabled ring is told, any other one's ring is stopped.
    async fn set_enable(&mut self, index: u16, enable: Enable) -> Reply {
        let vring = self.vring(index)?;
        vring.enable = enable;
        if !vring.running {
            return self.maybe_start(index).await;
        }
        match enable {
            Enable::Disabled if !self.device.serves_disabled(index) => {
                self.pause(index).await;
                Ok(Answer::Done)
            }
            Enable::Disabled => self.change_queue(index, QueueChange::Disabled).await,
            _ => self.change_queue(index, QueueChange::Enabled).await,
        }
    }

    async fn get_base(&mut self, index: u16) -> Reply {
        self.vring(index)?;
        self.pause(index).await;
        let vring = self.vring(index)?;
        vring.kick = Kick::Unset;
        let base = vring.base;
        Ok(Answer::Payload(wire::vring_state_payload(index, base)))
    }

    async fn change_queue(&mut self, index: u16, change: QueueChange) -> Reply {
        if self.vring(index)?.running {
            self.device.change_queue(index, change).await;
        }
        Ok(Answer::Done)
    }

    /// Starts the ring when everything it needs is there.
    pub(super) async fn maybe_start(&mut self, index: u16) -> Reply {
        let Some(setup) = self.setup(index)? else {
            return Ok(Answer::Done);
        };
        let err = setup.err.clone();
        match self.device.start_queue(setup).await {
            Ok(()) => {
                self.vring(index)?.running = true;
                tracing::debug!(device = %self.name, queue = index, "queue started");
                Ok(Answer::Done)
            }
            Err(source) => {
                if let Some(err) = err {
                    crate::queue::signal(&err);
                }
                Err(SessionError::Queue { index, source })
            }
        }
    }

    /// What the ring starts with; `None` while something is missing.
    fn setup(&self, index: u16) -> Result<Option<QueueSetup>, SessionError> {
        let vring = self
            .vrings
            .get(usize::from(index))
            .ok_or(SessionError::NoQueue(index))?;
        let kick = match &vring.kick {
            Kick::Unset => return Ok(None),
            Kick::Poll => None,
            Kick::Fd(fd) => Some(fd.clone()),
        };
        let Some(addresses) = vring.addresses else {
            return Ok(None);
        };
        let enabled = vring.enable == Enable::Enabled || self.features & F_PROTOCOL_FEATURES == 0;
        let served =
            enabled || vring.enable == Enable::Disabled && self.device.serves_disabled(index);
        let ready = !vring.running && vring.size > 0 && served;
        let shape = (vring.size, self.layout());
        if !ready || self.lacks_log() || !is_mapped(&self.memory, &addresses, shape) {
            return Ok(None);
        }
        Ok(Some(QueueSetup {
            device: self.name.clone(),
            index,
            size: vring.size,
            base: vring.base,
            addresses,
            features: self.features,
            memory: self.memory.clone(),
            kick,
            call: vring.call.clone(),
            err: vring.err.clone(),
            inflight: self.inflight.clone(),
            log: self.ring_log(index),
            failure: self.failure.clone(),
            state: RingState::Sound,
            enabled,
        }))
    }

    /// Stops a running ring and remembers where it is to go on.
    async fn pause(&mut self, index: u16) {
        let vring = &mut self.vrings[usize::from(index)];
        if vring.running {
            vring.running = false;
            vring.base = self.device.stop_queue(index).await;
            tracing::debug!(device = %self.name, queue = index, base = vring.base, "queue stopped");
        }
    }

    pub(super) async fn stop_all(&mut self) {
        for index in 0..self.vrings.len() as u16 {
            self.pause(index).await;
        }
    }

    /// Stops and disables every ring.
    pub(super) async fn stop_rings(&mut self) -> Reply {
        self.stop_all().await;
        for vring in &mut self.vrings {
            vring.kick = Kick::Unset;
            vring.enable = Enable::Unsaid;
        }
        Ok(Answer::Done)
    }
}

/// Takes an event descriptor of the front-end's, after making sure that using it cannot block a
/// queue thread: eventfds are anonymous inodes, which files, pipes and sockets are not.
fn eventfd(fd: OwnedFd) -> Result<Arc<OwnedFd>, SessionError> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let failed = SessionError::Descriptor;
    let stat = nix::sys::stat::fstat(&fd).map_err(failed)?;
    if stat.st_mode & libc::S_IFMT != 0 {
        return Err(failed(Errno::EINVAL));
    }
    let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(failed)?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(&fd, FcntlArg::F_SETFL(flags)).map_err(failed)?;
    Ok(Arc::new(fd))
}
