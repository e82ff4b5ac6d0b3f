//! virtio-blk (virtio 1.2, 5.2): everything but the number of queues is the back-end's.

use std::sync::Arc;

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

use super::Description;
use super::model::{Kind, Model, Offer};
use crate::options::DiskOptions;

/// The kind; its configuration is `struct virtio_blk_config` up to the write-zeroes fields (5.2.4).
const KIND: Kind = Kind {
    option: "--vhost-user-blk",
    virtio_id: 2,
    class: 0x01_0000,
    class_name: "SCSI controller",
    config_size: 60,
    needs_inflight: true,
};

/// SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES. The rest needs more
/// configuration space.
const FEATURES: u64 = 1 << 1
    | 1 << 2
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 9
    | 1 << 10
    | 1 << 11
    | 1 << 12
    | 1 << 13
    | 1 << 14;

/// Offset of `writeback`, the cache mode.
pub(super) const CONFIG_WRITEBACK: usize = 32;
/// Offset of `num_queues`.
const CONFIG_NUM_QUEUES: usize = 34;

/// A disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Disk {
    /// Request queues.
    pub(crate) num_queues: u16,
}

impl Disk {
    /// The device that option number `index` asks for.
    pub(crate) fn describe(index: usize, options: &DiskOptions) -> Description {
        Description {
            name: options.id.clone().unwrap_or_else(|| format!("disk{index}")),
            socket: options.socket.clone(),
            queue_size: options.queue_size,
            model: Arc::new(Self {
                num_queues: options.num_queues,
            }),
        }
    }
}

impl Model for Disk {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn num_queues(&self) -> u16 {
        self.num_queues
    }

    fn switch(&self) -> Option<usize> {
        Some(CONFIG_WRITEBACK)
    }

    fn protocol(&self) -> Protocol {
        Protocol::empty()
    }

    fn check(&self, offer: &Offer) -> Result<(), String> {
        if !offer.protocol.contains(Protocol::CONFIG) {
            return Err("the back-end has no CONFIG protocol feature".into());
        }
        let (wanted, available) = (self.num_queues, offer.queues.unwrap_or(1));
        if available < u64::from(wanted) {
            return Err(format!(
                "num-queues is {wanted}, but the back-end has only {available}"
            ));
        }
        Ok(())
    }

    fn features(&self, offer: &Offer) -> u64 {
        offer.features & FEATURES
    }

    fn config(&self, _: &Offer, told: Option<&[u8]>) -> Result<Vec<u8>, String> {
        let mut config = told.unwrap_or(&[0; KIND.config_size]).to_vec();
        config[CONFIG_NUM_QUEUES..CONFIG_NUM_QUEUES + 2]
            .copy_from_slice(&self.num_queues.to_le_bytes());
        Ok(config)
    }
}
