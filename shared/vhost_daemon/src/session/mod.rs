//! One front-end's session: its messages in order, and the state they build up.
//!
//! ```text
//!   per ring:  stopped ──kick set──> started, disabled ──enabled──> running
//!                 ▲                          ▲    disable (drains)──┘ │
//!                 └──────────────── GET_VRING_BASE (drains) ──────────┘
//! ```
//! Where the device says so (`Device::serves_disabled`) a ring that was disabled runs on, and has no effect outside.
//!
//! A ring runs once it has a size, addresses that shared memory holds, a kick (or none to come)
//! and is enabled, in whatever order these arrive. Without `VHOST_USER_F_PROTOCOL_FEATURES` it is
//! enabled by its kick.
//!
//! Promises: messages are handled one at a time; a request that cannot be fulfilled is refused
//! with a non-zero acknowledgement where the front-end asked for one and ends the session
//! otherwise; when a session ends, every queue has drained.

mod log;
mod vring;

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use executor::net::Stream;
use executor::sync::Notify;
use executor::{Errno, JoinHandle};
use vhost::vhost_user::message::{
    BackendReq, VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures,
};

use crate::device::{Device, DeviceError};
use crate::dirty_log::{DirtyLog, DirtyLogError};
use crate::inflight::{InflightError, InflightRegion};
use crate::memory::{MAX_REGIONS, MemoryError, MemoryTable};
use crate::queue::{Failure, QueueChange, QueueError};
use crate::ring::RingLayout;
use crate::wire::{
    self, ConfigRange, HEADER_LEN, Header, InflightSpec, MAX_FDS, Message, WireError,
};

use vring::Vring;

/// Protocol features that the session itself knows how to serve.
pub const PROTOCOL_FEATURES: u64 = Protocol::MQ.bits()
    | Protocol::LOG_SHMFD.bits()
    | Protocol::REPLY_ACK.bits()
    | Protocol::BACKEND_REQ.bits()
    | Protocol::CONFIG.bits()
    | Protocol::INFLIGHT_SHMFD.bits()
    | Protocol::RESET_DEVICE.bits()
    | Protocol::CONFIGURE_MEM_SLOTS.bits()
    | Protocol::STATUS.bits();

/// Protocol features that only network devices have.
pub const NET_PROTOCOL_FEATURES: u64 = Protocol::RARP.bits() | Protocol::MTU.bits();

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const F_PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// `VHOST_F_LOG_ALL`: writes to guest memory are logged.
const F_LOG_ALL: u64 = 1 << 26;
/// Feature bits that belong to the session and not to the device.
const SESSION_FEATURES: u64 = F_PROTOCOL_FEATURES | F_LOG_ALL;
/// `DEVICE_NEEDS_RESET` of the device status field (virtio 1.2 section 2.1).
const STATUS_NEEDS_RESET: u8 = 0x40;

/// Why a message is refused, or a session ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("socket: {0}")]
    Socket(Errno),
    #[error("the connection ended inside of a message")]
    Truncated,
    #[error("{0} was not negotiated")]
    NotNegotiated(&'static str),
    #[error("features {wanted:#x} are not all offered ({offered:#x})")]
    Features { wanted: u64, offered: u64 },
    #[error("queue {0} does not exist")]
    NoQueue(u16),
    #[error("queue {index}: {what} cannot change while it runs")]
    Running { index: u16, what: &'static str },
    #[error("queue {index}: ring size {size} is not a power of two up to {max}")]
    RingSize { index: u16, size: u32, max: u16 },
    #[error("logging is on, but there is no dirty log")]
    NoLog,
    #[error(transparent)]
    Log(#[from] DirtyLogError),
    #[error("queue {index}: {source}")]
    Queue { index: u16, source: QueueError },
    #[error("inflight region of {num_queues} queues, {queue_size} descriptors each")]
    InflightRequest { num_queues: u16, queue_size: u16 },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("descriptor: {0}")]
    Descriptor(Errno),
    #[error("device status {0:#x}")]
    Status(u64),
}

/// What goes back for a message.
enum Answer {
    /// Nothing but an acknowledgement, if wanted.
    Done,
    Payload(Vec<u8>),
    PayloadFd(Vec<u8>, OwnedFd),
}

impl Answer {
    fn number(value: u64) -> Answer {
        Answer::Payload(value.to_ne_bytes().to_vec())
    }
}

type Reply = Result<Answer, SessionError>;

/// The channel for the back-end's own requests, shared with the task that sends them.
type BackendChannel = Rc<RefCell<Option<Rc<Stream>>>>;

/// A front-end's session.
pub(crate) struct Session<D> {
    device: Rc<D>,
    stream: Rc<Stream>,
    name: Arc<str>,
    features: u64,
    protocol: u64,
    memory: Arc<MemoryTable>,
    vrings: Vec<Vring>,
    inflight: Option<Arc<InflightRegion>>,
    log: Option<Arc<DirtyLog>>,
    channel: BackendChannel,
    status: u8,
    failure: Arc<Failure>,
    changed: Arc<Notify>,
    notifier: Option<JoinHandle<()>>,
    messages: u64,
}

impl<D: Device> Session<D> {
    /// A session with the front-end at the other end of `stream`. `changed` is notified when the
    /// configuration space changes.
    pub(crate) fn new(device: Rc<D>, stream: Rc<Stream>, changed: Arc<Notify>) -> Session<D> {
        let vrings = (0..device.queue_count()).map(|_| Vring::default());
        let channel = BackendChannel::default();
        let notifier = executor::spawn(announce_changes(changed.clone(), channel.clone()));
        Session {
            name: device.name().into(),
            vrings: vrings.collect(),
            device,
            stream,
            features: 0,
            protocol: 0,
            memory: Arc::default(),
            inflight: None,
            log: None,
            channel,
            status: 0,
            failure: Arc::new(Failure::new(changed.clone())),
            changed,
            notifier: Some(notifier),
            messages: 0,
        }
    }

    /// Messages handled.
    pub(crate) fn messages(&self) -> u64 {
        self.messages
    }

    /// Handles messages until the front-end leaves.
    ///
    /// # Errors
    /// What made the session impossible to continue.
    pub(crate) async fn run(&mut self) -> Result<(), SessionError> {
        while let Some((header, payload, fds)) = self.receive().await? {
            let result = match Message::parse(header.request, &payload, fds) {
                Ok(message) => {
                    tracing::trace!(device = %self.name, ?message, "message");
                    self.handle(message).await
                }
                Err(error) => Err(error.into()),
            };
            self.answer(&header, result).await?;
            self.messages += 1;
        }
        Ok(())
    }

    /// Stops everything; afterwards the device is as if no front-end had been there.
    pub(crate) async fn close(&mut self) {
        self.stop_all().await;
        self.device.reset();
        if let Some(notifier) = self.notifier.take() {
            notifier.cancel();
        }
    }

    /// The next message's parts; `None` when the front-end has left.
    async fn receive(&self) -> Result<Option<(Header, Vec<u8>, Vec<OwnedFd>)>, SessionError> {
        let mut fds = Vec::new();
        let Some(head) = self.receive_exactly(HEADER_LEN, &mut fds).await? else {
            return Ok(None);
        };
        let head: [u8; HEADER_LEN] = head.try_into().map_err(|_| SessionError::Truncated)?;
        let header = Header::parse(&head)?;
        let payload = match header.size {
            0 => Vec::new(),
            size => self
                .receive_exactly(size, &mut fds)
                .await?
                .ok_or(SessionError::Truncated)?,
        };
        Ok(Some((header, payload, fds)))
    }

    async fn receive_exactly(
        &self,
        len: usize,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Option<Vec<u8>>, SessionError> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let room = MAX_FDS - fds.len();
            let received = self.stream.recv_with_fds(len - bytes.len(), room).await;
            let (part, more) = received.map_err(SessionError::Socket)?;
            if part.is_empty() {
                return if bytes.is_empty() {
                    Ok(None)
                } else {
                    Err(SessionError::Truncated)
                };
            }
            bytes.extend_from_slice(&part);
            fds.extend(more);
        }
        Ok(Some(bytes))
    }

    async fn answer(&self, header: &Header, result: Reply) -> Result<(), SessionError> {
        let request = header.request;
        let wants_ack = header.need_reply && self.negotiated(Protocol::REPLY_ACK);
        let (payload, fd) = match result {
            Ok(Answer::Payload(payload)) => (payload, None),
            Ok(Answer::PayloadFd(payload, fd)) => (payload, Some(fd)),
            Ok(Answer::Done) if wants_ack => (0u64.to_ne_bytes().to_vec(), None),
            Ok(Answer::Done) => return Ok(()),
            Err(error) if wants_ack => {
                tracing::warn!(device = %self.name, request, "refused: {error}");
                (1u64.to_ne_bytes().to_vec(), None)
            }
            Err(error) => return Err(error),
        };
        let bytes = wire::reply(request, &payload);
        let sent = match fd {
            Some(fd) => self.stream.send_with_fds(bytes, &[fd.as_fd()]).await,
            None => self.stream.send_all(bytes).await,
        };
        sent.map_err(SessionError::Socket)
    }

    fn negotiated(&self, feature: Protocol) -> bool {
        self.protocol & feature.bits() != 0
    }

    fn need(&self, feature: Protocol, name: &'static str) -> Result<(), SessionError> {
        if self.negotiated(feature) {
            Ok(())
        } else {
            Err(SessionError::NotNegotiated(name))
        }
    }

    async fn handle(&mut self, message: Message) -> Reply {
        match message {
            Message::GetFeatures => Ok(Answer::number(self.offered_features())),
            Message::SetFeatures(wanted) => self.set_features(wanted).await,
            Message::GetProtocolFeatures => Ok(Answer::number(self.offered_protocol())),
            Message::SetProtocolFeatures(wanted) => self.set_protocol_features(wanted),
            Message::GetQueueNum => Ok(Answer::number(u64::from(self.device.queue_count()))),
            Message::SetOwner => Ok(Answer::Done),
            Message::ResetOwner => self.stop_rings().await,
            Message::ResetDevice => {
                self.need(Protocol::RESET_DEVICE, "RESET_DEVICE")?;
                self.reset_device().await
            }
            Message::GetStatus => self.get_status(),
            Message::SetStatus(status) => self.set_status(status).await,
            Message::GetConfig(range) => self.get_config(range),
            Message::SetConfig(range, data) => {
                self.need(Protocol::CONFIG, "CONFIG")?;
                self.device.write_config(range.offset, &data)?;
                Ok(Answer::Done)
            }
            Message::SendRarp(address) => {
                self.need(Protocol::RARP, "RARP")?;
                self.device.send_rarp(address)?;
                Ok(Answer::Done)
            }
            Message::NetSetMtu(mtu) => {
                self.need(Protocol::MTU, "NET_MTU")?;
                let mtu = u16::try_from(mtu).map_err(|_| DeviceError::InvalidValue("the MTU"))?;
                self.device.set_mtu(mtu)?;
                Ok(Answer::Done)
            }
            Message::SetBackendReqFd(fd) => self.set_channel(fd),
            Message::GetInflightFd(spec) => self.get_inflight(spec),
            Message::SetInflightFd(spec, fd) => self.set_inflight(spec, fd).await,
            Message::SetLogBase(spec, fd) => self.set_log_base(spec, fd).await,
            Message::GetMaxMemSlots => Ok(Answer::number(MAX_REGIONS as u64)),
            memory @ (Message::SetMemTable(_) | Message::AddMemReg(..) | Message::RemMemReg(_)) => {
                self.change_memory(memory).await
            }
            vring => self.handle_vring(vring).await,
        }
    }

    fn offered_protocol(&self) -> u64 {
        self.device.protocol_features() & (PROTOCOL_FEATURES | NET_PROTOCOL_FEATURES)
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | SESSION_FEATURES
    }

    /// How the rings lie in memory.
    fn layout(&self) -> RingLayout {
        RingLayout::of(self.features)
    }

    async fn set_features(&mut self, wanted: u64) -> Reply {
        let offered = self.offered_features();
        if wanted & !offered != 0 {
            return Err(SessionError::Features { wanted, offered });
        }
        let changed = wanted ^ self.features;
        if changed & !F_LOG_ALL != 0 {
            self.expect_stopped("features")?;
        }
        self.check_logging(wanted, &self.memory)?;
        self.features = wanted;
        if changed & !F_LOG_ALL != 0 || self.expect_stopped("features").is_ok() {
            self.device.set_features(wanted & !SESSION_FEATURES);
        }
        if changed & F_LOG_ALL != 0 {
            self.tell_rings_about_log().await;
        }
        Ok(Answer::Done)
    }

    fn set_protocol_features(&mut self, wanted: u64) -> Reply {
        let offered = self.offered_protocol();
        if wanted & !offered != 0 {
            return Err(SessionError::Features { wanted, offered });
        }
        self.protocol = wanted;
        Ok(Answer::Done)
    }

    fn expect_stopped(&self, what: &'static str) -> Result<(), SessionError> {
        match self.vrings.iter().position(|vring| vring.running) {
            Some(index) => Err(SessionError::Running {
                index: index as u16,
                what,
            }),
            None => Ok(()),
        }
    }

    fn get_status(&self) -> Reply {
        self.need(Protocol::STATUS, "STATUS")?;
        let broken = if self.failure.failed() {
            STATUS_NEEDS_RESET
        } else {
            0
        };
        Ok(Answer::number(u64::from(self.status | broken)))
    }

    async fn set_status(&mut self, status: u64) -> Reply {
        self.need(Protocol::STATUS, "STATUS")?;
        let status = u8::try_from(status).map_err(|_| SessionError::Status(status))?;
        if status == 0 {
            return self.reset_device().await;
        }
        self.status = status & !STATUS_NEEDS_RESET;
        Ok(Answer::Done)
    }

    async fn reset_device(&mut self) -> Reply {
        self.stop_rings().await?;
        self.device.reset();
        self.device.set_features(self.features & !SESSION_FEATURES);
        if let Some(inflight) = &self.inflight {
            inflight.forget(self.layout());
        }
        self.status = 0;
        self.failure = Arc::new(Failure::new(self.changed.clone()));
        Ok(Answer::Done)
    }

    fn get_config(&self, range: ConfigRange) -> Reply {
        self.need(Protocol::CONFIG, "CONFIG")?;
        let config = self.device.config();
        // Front-ends newer than the device ask for more than it has; the rest reads as zeroes.
        let mut data = vec![0; range.size as usize];
        let start = (range.offset as usize).min(config.len());
        let len = data.len().min(config.len() - start);
        data[..len].copy_from_slice(&config[start..start + len]);
        Ok(Answer::Payload(wire::config_payload(&range, &data)))
    }

    fn set_channel(&mut self, fd: OwnedFd) -> Reply {
        self.need(Protocol::BACKEND_REQ, "BACKEND_REQ")?;
        let stream = Stream::from_fd(fd).map_err(|error| {
            SessionError::Descriptor(Errno::from_raw(error.raw_os_error().unwrap_or(0)))
        })?;
        self.channel.replace(Some(Rc::new(stream)));
        Ok(Answer::Done)
    }

    fn get_inflight(&self, spec: InflightSpec) -> Reply {
        self.need(Protocol::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
        let (num_queues, queue_size) = (spec.num_queues, spec.queue_size);
        if num_queues > self.device.queue_count() || queue_size > self.device.max_queue_size() {
            return Err(SessionError::InflightRequest {
                num_queues,
                queue_size,
            });
        }
        let (spec, fd) = InflightRegion::create(num_queues, queue_size)?;
        Ok(Answer::PayloadFd(wire::inflight_payload(&spec), fd))
    }

    async fn set_inflight(&mut self, spec: InflightSpec, fd: OwnedFd) -> Reply {
        self.need(Protocol::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
        self.expect_stopped("the inflight region")?;
        // A front-end may hand over the region that is in use here.
        self.inflight = None;
        let region = InflightRegion::take_over(&self.name, &spec, fd).await?;
        self.inflight = Some(Arc::new(region));
        Ok(Answer::Done)
    }

    async fn change_memory(&mut self, message: Message) -> Reply {
        let slots =
            |session: &Self| session.need(Protocol::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS");
        let table = match message {
            Message::SetMemTable(regions) => self.memory.replaced(regions)?,
            Message::AddMemReg(spec, fd) => {
                slots(self)?;
                self.memory.with(&spec, fd)?
            }
            Message::RemMemReg(spec) => {
                slots(self)?;
                self.memory.without(&spec)?
            }
            _ => return Ok(Answer::Done),
        };
        self.check_logging(self.features, &table)?;
        self.memory = Arc::new(table);
        for index in 0..self.vrings.len() as u16 {
            if self.vrings[usize::from(index)].running {
                let change = QueueChange::Memory(self.memory.clone());
                self.device.change_queue(index, change).await;
            }
            self.maybe_start(index).await?;
        }
        Ok(Answer::Done)
    }
}

/// Tells the front-end about every change of the configuration space (and of the device status,
/// which drivers look at then).
async fn announce_changes(changed: Arc<Notify>, channel: BackendChannel) {
    let mut next = changed.notified();
    loop {
        next.await;
        next = changed.notified();
        let Some(stream) = channel.borrow().clone() else {
            continue;
        };
        let message = wire::backend_request(BackendReq::CONFIG_CHANGE_MSG);
        if let Err(errno) = stream.send_all(message).await {
            tracing::debug!("back-end channel: {errno}");
            channel.replace(None);
        }
    }
}
