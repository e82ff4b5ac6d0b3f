//! The conversation with one back-end: what is negotiated, in which order rings are started, how they are drained.
//!
//! ```text
//! open:   SET_OWNER  GET_FEATURES  GET/SET_PROTOCOL_FEATURES  GET_QUEUE_NUM  SET_BACKEND_REQ_FD  GET_CONFIG
//! start:  SET_CONFIG  SET_STATUS  SET_FEATURES  NET_SET_MTU  SET_MEM_TABLE  GET/SET_INFLIGHT_FD
//!         per ring: NUM ADDR BASE KICK CALL, then ENABLE          SET_STATUS
//! drain:  per ring: GET_VRING_BASE
//! reset:  drain  SET_STATUS(0)  RESET_DEVICE
//! ```
//!
//! A split ring's base after a reconnect is the used index that the guest sees; requests beyond it are found by the back-end
//! in the inflight region, which outlives connections here. Where a packed ring was is nowhere in the guest's memory, only in
//! that region, so packed rings are offered only with it. Must not know when to connect.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::FrontendReq;

use super::model::{Model, Offer, RING_FEATURES, RING_PACKED, VERSION_1};
use super::wire::{Link, LinkError};
use super::{Activation, Notifiers, RingSetup, Shared};
use crate::memory::Memory;

type Result<T> = std::result::Result<T, LinkError>;

/// Feature bit that says that protocol features exist.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Base of a packed ring at its start: both positions 0, both wrap counters 1.
pub(super) const PACKED_START: u32 = 0x8000_8000;

const STATUS_ACKNOWLEDGE_DRIVER: u64 = 1 | 2;
const STATUS_DRIVER_OK: u64 = 4;
const STATUS_FEATURES_OK: u64 = 8;

/// What stays the same over all connections of a device.
pub(super) struct Setup {
    pub(super) model: Arc<dyn Model>,
    pub(super) queue_size: u16,
    pub(super) memory: Memory,
    pub(super) shared: Arc<Shared>,
}

/// The region in which a back-end notes the requests that it works on.
pub(super) struct Inflight {
    fd: OwnedFd,
    /// The message that describes it: size, offset, number of queues, queue size.
    description: Vec<u8>,
}

/// An open conversation.
pub(super) struct Session {
    pub(super) link: Link,
    offer: Offer,
    /// The back-end's own configuration, if it has one.
    told: Option<Vec<u8>>,
}

impl Session {
    /// Negotiates and reads features and configuration.
    pub(super) fn open(mut link: Link, setup: &Setup) -> Result<Self> {
        link.order(FrontendReq::SET_OWNER, &[], &[])?;
        let features = link.call(FrontendReq::GET_FEATURES, &[])?.as_u64()?;
        require(
            features & PROTOCOL_FEATURES != 0,
            "the back-end has no protocol features",
        )?;
        require(
            features & VERSION_1 != 0,
            "the back-end does not offer VIRTIO_F_VERSION_1",
        )?;
        let protocol = negotiate_protocol(&mut link, setup.model.protocol())?;
        let queues = match protocol.contains(Protocol::MQ) {
            true => Some(link.call(FrontendReq::GET_QUEUE_NUM, &[])?.as_u64()?),
            false => None,
        };
        let offer = Offer {
            features,
            protocol,
            queues,
        };
        setup.model.check(&offer).map_err(LinkError::Refused)?;
        if protocol.contains(Protocol::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair()?;
            link.order(FrontendReq::SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()])?;
            link.set_channel(ours);
        }
        link.commit();
        Ok(Self {
            link,
            offer,
            told: None,
        })
    }

    /// Features that the guest may be offered.
    pub(super) fn features(&self, setup: &Setup) -> u64 {
        let offered = setup.model.features(&self.offer) | self.offer.features & RING_FEATURES;
        if self.tracks_inflight() {
            offered
        } else {
            offered & !RING_PACKED
        }
    }

    /// Whether requests survive the death of the back-end.
    pub(super) fn tracks_inflight(&self) -> bool {
        self.link.protocol().contains(Protocol::INFLIGHT_SHMFD)
    }

    /// Reads the configuration, as the guest is to see it.
    pub(super) fn read_config(&mut self, setup: &Setup) -> Result<Vec<u8>> {
        if self.offer.protocol.contains(Protocol::CONFIG) {
            self.told = Some(self.get_config(setup.model.kind().config_size)?);
        }
        let config = setup.model.config(&self.offer, self.told.as_deref());
        config.map_err(LinkError::Refused)
    }

    fn get_config(&mut self, size: usize) -> Result<Vec<u8>> {
        const HEADER: usize = 12;
        let mut payload = words(&[0, size as u32, 0]);
        payload.resize(HEADER + size, 0);
        let reply = self.link.call(FrontendReq::GET_CONFIG, &payload)?;
        let told = reply.payload.get(HEADER..);
        let told = told.filter(|bytes| bytes.len() == size);
        let told = told.ok_or_else(|| refused("the back-end did not tell its configuration"))?;
        Ok(told.to_vec())
    }

    /// Tells the back-end what the command line decides about the configuration; returns whether it agrees.
    pub(super) fn announce_config(&mut self, setup: &Setup) -> Result<bool> {
        match setup.model.announced_config() {
            Some((at, bytes)) if self.offer.protocol.contains(Protocol::CONFIG) => {
                self.write_config(at, &bytes)
            }
            _ => Ok(true),
        }
    }

    /// Changes bytes of the configuration; returns whether the back-end agrees.
    pub(super) fn write_config(&mut self, at: usize, bytes: &[u8]) -> Result<bool> {
        let mut payload = words(&[at as u32, bytes.len() as u32, 0]);
        payload.extend_from_slice(bytes);
        match self.link.order(FrontendReq::SET_CONFIG, &payload, &[]) {
            Ok(()) => Ok(true),
            Err(LinkError::Rejected(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Starts all rings of `activation`. `bases` has what [`Session::drain`] returned, if rings were drained.
    pub(super) fn start(
        &mut self,
        setup: &Setup,
        activation: &Activation,
        progress: &mut Progress,
    ) -> Result<()> {
        let missing = activation.features & !(self.offer.features | setup.model.own_features());
        require(
            missing == 0,
            &format!("the back-end lacks features that the guest uses: {missing:#x}"),
        )?;
        self.set_status(STATUS_ACKNOWLEDGE_DRIVER)?;
        let features = activation.features & self.offer.features | PROTOCOL_FEATURES;
        self.link
            .order(FrontendReq::SET_FEATURES, &features.to_ne_bytes(), &[])?;
        if let Some((request, value)) = setup.model.order_at_start(&self.offer, activation.features)
        {
            self.link.order(request, &value.to_ne_bytes(), &[])?;
        }
        self.set_status(STATUS_ACKNOWLEDGE_DRIVER | STATUS_FEATURES_OK)?;
        self.set_memory(&setup.memory)?;
        self.set_inflight(setup, &mut progress.inflight)?;
        for (index, ring) in active_rings(activation) {
            let base = progress.bases.get(index).copied().flatten();
            let mut places = RingPlaces::find(&setup.memory, ring, activation.features)
                .ok_or_else(|| refused("a ring is outside the guest's memory"))?;
            places.base = base.unwrap_or(places.base);
            let number = self.ring_number(setup, activation, index);
            self.set_ring(number, ring.size, &places)?;
            self.set_events(number, &setup.shared.notifiers, index)?;
        }
        for (index, _) in active_rings(activation) {
            let number = self.ring_number(setup, activation, index);
            self.link
                .order(FrontendReq::SET_VRING_ENABLE, &words(&[number, 1]), &[])?;
        }
        self.set_status(STATUS_ACKNOWLEDGE_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK)?;
        // What was kicked while nobody listened, or taken and lost by a back-end that died, is found by one more kick.
        for (index, _) in active_rings(activation) {
            setup.shared.notifiers.kicks[index].raise();
        }
        Ok(())
    }

    /// The back-end's number for a queue of the guest.
    fn ring_number(&self, setup: &Setup, activation: &Activation, index: usize) -> u32 {
        let told = self.told.as_deref();
        let features = activation.features & self.offer.features;
        setup
            .model
            .ring_at_back_end(index as u16, features, told)
            .into()
    }

    fn set_ring(&mut self, number: u32, size: u16, places: &RingPlaces) -> Result<()> {
        let size = u32::from(size);
        self.link
            .order(FrontendReq::SET_VRING_NUM, &words(&[number, size]), &[])?;
        let base = words(&[number, places.base]);
        self.link.order(FrontendReq::SET_VRING_BASE, &base, &[])?;
        let mut address = words(&[number, 0]);
        for place in [places.descriptors, places.used, places.available, 0] {
            address.extend_from_slice(&place.to_ne_bytes());
        }
        self.link.order(FrontendReq::SET_VRING_ADDR, &address, &[])
    }

    fn set_events(&mut self, number: u32, notifiers: &Notifiers, index: usize) -> Result<()> {
        let number = u64::from(number).to_ne_bytes();
        let kick = notifiers.kicks[index].event_fd().as_raw_fd();
        self.link
            .order(FrontendReq::SET_VRING_KICK, &number, &[kick])?;
        let call = notifiers.calls[index].event_fd().as_raw_fd();
        self.link
            .order(FrontendReq::SET_VRING_CALL, &number, &[call])
    }

    fn set_memory(&mut self, memory: &Memory) -> Result<()> {
        let regions = memory.regions();
        let mut payload = words(&[regions.len() as u32, 0]);
        for region in &regions {
            let fields = [
                region.guest_start,
                region.size,
                region.host_start,
                region.file_offset,
            ];
            payload.extend(fields.into_iter().flat_map(u64::to_ne_bytes));
        }
        let fds = vec![memory.file().as_raw_fd(); regions.len()];
        self.link.order(FrontendReq::SET_MEM_TABLE, &payload, &fds)
    }

    fn set_inflight(&mut self, setup: &Setup, inflight: &mut Option<Inflight>) -> Result<()> {
        if !self.tracks_inflight() {
            return require(
                inflight.is_none(),
                "the back-end has no INFLIGHT_SHMFD, but its predecessor left requests in flight",
            );
        }
        if inflight.is_none() {
            *inflight = Some(self.get_inflight(setup)?);
        }
        let Some(inflight) = inflight else {
            return Ok(());
        };
        let fd = inflight.fd.as_raw_fd();
        self.link
            .order(FrontendReq::SET_INFLIGHT_FD, &inflight.description, &[fd])
    }

    fn get_inflight(&mut self, setup: &Setup) -> Result<Inflight> {
        const DESCRIPTION_SIZE: usize = 24;
        let mut payload = vec![0; 16];
        payload.extend_from_slice(&setup.model.num_queues().to_ne_bytes());
        payload.extend_from_slice(&setup.queue_size.to_ne_bytes());
        payload.resize(DESCRIPTION_SIZE, 0);
        let reply = self.link.call(FrontendReq::GET_INFLIGHT_FD, &payload)?;
        let fd = reply.fds.into_iter().next();
        let fd = fd.ok_or_else(|| refused("the back-end gave no inflight region"))?;
        require(
            reply.payload.len() >= 20,
            "the reply to GET_INFLIGHT_FD is too short",
        )?;
        Ok(Inflight {
            fd,
            description: reply.payload,
        })
    }

    fn set_status(&mut self, status: u64) -> Result<()> {
        if !self.link.protocol().contains(Protocol::STATUS) {
            return Ok(());
        }
        self.link
            .order(FrontendReq::SET_STATUS, &status.to_ne_bytes(), &[])
    }

    /// Stops all rings; returns when nothing is in flight. The result is where each ring goes on.
    pub(super) fn drain(
        &mut self,
        setup: &Setup,
        activation: &Activation,
    ) -> Result<Vec<Option<u32>>> {
        let mut bases = vec![None; activation.rings.len()];
        for (index, _) in active_rings(activation) {
            let number = self.ring_number(setup, activation, index);
            let reply = self
                .link
                .call(FrontendReq::GET_VRING_BASE, &words(&[number, 0]))?;
            bases[index] = Some(reply.as_u64().map(|reply| (reply >> 32) as u32)?);
        }
        Ok(bases)
    }

    /// Stops all rings and takes the device back to where it was before a driver came.
    pub(super) fn reset(&mut self, setup: &Setup, activation: &Activation) -> Result<()> {
        self.drain(setup, activation)?;
        self.set_status(0)?;
        if self.link.protocol().contains(Protocol::RESET_DEVICE) {
            self.link.order(FrontendReq::RESET_DEVICE, &[], &[])?;
        }
        Ok(())
    }
}

/// What has to survive from one connection to the next.
#[derive(Default)]
pub(super) struct Progress {
    /// Requests that a back-end had taken.
    pub(super) inflight: Option<Inflight>,
    /// Where each drained ring goes on; empty after an undrained end.
    pub(super) bases: Vec<Option<u32>>,
}

/// A ring's three parts as addresses in this process.
struct RingPlaces {
    descriptors: u64,
    available: u64,
    used: u64,
    /// Where a back-end goes on that nobody told more.
    base: u32,
}

impl RingPlaces {
    fn find(memory: &Memory, ring: &RingSetup, features: u64) -> Option<Self> {
        const EVENT_SUPPRESSION: usize = 4;
        let size = usize::from(ring.size);
        let descriptors = memory.host_address(ring.descriptors, 16 * size)?;
        if features & RING_PACKED != 0 {
            return Some(Self {
                descriptors,
                available: memory.host_address(ring.available, EVENT_SUPPRESSION)?,
                used: memory.host_address(ring.used, EVENT_SUPPRESSION)?,
                base: PACKED_START,
            });
        }
        Some(Self {
            descriptors,
            available: memory.host_address(ring.available, 6 + 2 * size)?,
            used: memory.host_address(ring.used, 6 + 8 * size)?,
            base: u32::from(memory.read_u16(ring.used.checked_add(2)?)?),
        })
    }
}

/// Whether each enabled ring is inside the guest's memory.
pub(super) fn rings_are_valid(memory: &Memory, activation: &Activation) -> bool {
    active_rings(activation)
        .all(|(_, ring)| RingPlaces::find(memory, ring, activation.features).is_some())
}

fn active_rings(activation: &Activation) -> impl Iterator<Item = (usize, &RingSetup)> {
    activation
        .rings
        .iter()
        .enumerate()
        .filter_map(|(index, ring)| Some((index, ring.as_ref()?)))
}

fn negotiate_protocol(link: &mut Link, particular: Protocol) -> Result<Protocol> {
    let wanted = particular
        | Protocol::MQ
        | Protocol::REPLY_ACK
        | Protocol::BACKEND_REQ
        | Protocol::CONFIG
        | Protocol::INFLIGHT_SHMFD
        | Protocol::RESET_DEVICE
        | Protocol::STATUS;
    let offered = link
        .call(FrontendReq::GET_PROTOCOL_FEATURES, &[])?
        .as_u64()?;
    let protocol = Protocol::from_bits_truncate(offered) & wanted;
    link.order(
        FrontendReq::SET_PROTOCOL_FEATURES,
        &protocol.bits().to_ne_bytes(),
        &[],
    )?;
    link.set_protocol(protocol);
    Ok(protocol)
}

fn require(condition: bool, otherwise: &str) -> Result<()> {
    if condition {
        Ok(())
    } else {
        Err(refused(otherwise))
    }
}

fn refused(text: &str) -> LinkError {
    LinkError::Refused(text.to_owned())
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
