//! The seam between the conversation with a back-end, which is the same for all devices, and what kind of device it is.
//!
//! A [`Model`] says what the guest sees (identity, queues, configuration, features) and what a back-end has to bring. It sends
//! nothing itself and keeps no state: all that it decides follows from the command line and from what the back-end offers.

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::FrontendReq;

/// VIRTIO_F_INDIRECT_DESC.
const INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
pub(crate) const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_PACKED.
pub(crate) const RING_PACKED: u64 = 1 << 34;
/// VIRTIO_F_IN_ORDER.
const IN_ORDER: u64 = 1 << 35;
/// VIRTIO_F_ORDER_PLATFORM.
const ORDER_PLATFORM: u64 = 1 << 36;
/// Features of the rings that a guest may be offered, whatever the device. The others need help of the transport (ring reset,
/// notification data).
pub(crate) const RING_FEATURES: u64 =
    INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_PACKED | IN_ORDER | ORDER_PLATFORM;

/// What is known of a kind of device before there is one.
#[derive(Debug)]
pub(crate) struct Kind {
    /// The option that makes one.
    pub(crate) option: &'static str,
    /// Virtio device id (virtio 1.2, chapter 5).
    pub(crate) virtio_id: u16,
    /// PCI class, subclass and programming interface.
    pub(crate) class: u32,
    /// The class in words.
    pub(crate) class_name: &'static str,
    /// Bytes of the configuration space that the guest sees.
    pub(crate) config_size: usize,
    /// Whether requests that were in flight when a back-end died are lost or repeated unless INFLIGHT_SHMFD keeps them.
    pub(crate) needs_inflight: bool,
}

/// What a back-end said that it has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer {
    /// Virtio features.
    pub(crate) features: u64,
    /// Negotiated protocol features.
    pub(crate) protocol: Protocol,
    /// The answer to GET_QUEUE_NUM; `None` without MQ.
    pub(crate) queues: Option<u64>,
}

/// A device with what the command line says about it.
pub(crate) trait Model: Send + Sync {
    /// What kind of device it is.
    fn kind(&self) -> &'static Kind;

    /// Queues that the guest sees.
    fn num_queues(&self) -> u16;

    /// Offset of the one byte of the configuration that a driver may write, with 0 or 1.
    fn switch(&self) -> Option<usize>;

    /// Protocol features to negotiate, beyond those that every device can use.
    fn protocol(&self) -> Protocol;

    /// Whether a back-end can serve the device; the reason if it cannot.
    fn check(&self, offer: &Offer) -> Result<(), String>;

    /// Features of the device itself that the guest is offered. Those of the rings are none of the model's business.
    fn features(&self, offer: &Offer) -> u64;

    /// Features that need nothing of a back-end, so that it may lack them.
    fn own_features(&self) -> u64 {
        0
    }

    /// A part of the configuration that the command line decides, with its offset: a back-end is told before rings are started, and
    /// may keep its own.
    fn announced_config(&self) -> Option<(usize, Vec<u8>)> {
        None
    }

    /// The configuration that the guest sees, as long as [`Kind::config_size`], from the back-end's if that has one; or why the
    /// back-end's does not fit.
    fn config(&self, offer: &Offer, told: Option<&[u8]>) -> Result<Vec<u8>, String>;

    /// A request with a number that a back-end has to agree to before rings are started with these features.
    fn order_at_start(&self, _offer: &Offer, _features: u64) -> Option<(FrontendReq, u64)> {
        None
    }

    /// Where the guest's `queue` is at a back-end with that configuration.
    fn ring_at_back_end(&self, queue: u16, _features: u64, _told: Option<&[u8]>) -> u16 {
        queue
    }
}
