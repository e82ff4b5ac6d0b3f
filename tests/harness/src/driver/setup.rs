//! What a driver is asked to be, and the guest memory that follows from it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::either_ring::Ring;
use super::features::bits;
use super::memory::{Area, Region};
use super::pool::DataPool;
use super::queue::{QueueParts, SLOT_BYTES, SlotMemory};
use super::request::{LANES, MAX_GAP_BYTES};
use super::{Queue, Wait, features};
use crate::wire::protocol_feature;

/// How the driver is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of virtqueues.
    pub queues: usize,
    /// Entries of each ring, a power of two.
    pub queue_size: u16,
    /// Most requests outstanding per queue.
    pub depth: usize,
    /// Largest request in bytes.
    pub max_request_bytes: usize,
    /// Most data segments in a request.
    pub max_segments: usize,
    /// Number of data regions, at least 1.
    pub data_regions: usize,
    /// How completions are awaited.
    pub wait: Wait,
    /// Device features to take when offered.
    pub features: u64,
    /// Protocol features to take when offered.
    pub protocol: u64,
    /// Longest wait for a reply, a connection, or any completion while requests are outstanding.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            depth: 32,
            max_request_bytes: 256 << 10,
            max_segments: 64,
            data_regions: 2,
            wait: Wait::Interrupt,
            features: features::ALL_BLOCK
                | bits::VERSION_1
                | bits::PROTOCOL_FEATURES
                | bits::RING_INDIRECT_DESC
                | bits::RING_EVENT_IDX,
            protocol: protocol_feature::MQ
                | protocol_feature::REPLY_ACK
                | protocol_feature::BACKEND_REQ
                | protocol_feature::CONFIG
                | protocol_feature::INFLIGHT_SHMFD
                | protocol_feature::RESET_DEVICE
                | protocol_feature::CONFIGURE_MEM_SLOTS
                | protocol_feature::STATUS,
            timeout: Duration::from_secs(20),
        }
    }
}

impl Options {
    /// Without these device features.
    #[must_use]
    pub fn without_features(mut self, features: u64) -> Self {
        self.features &= !features;
        self
    }

    /// With packed rings, when offered.
    #[must_use]
    pub fn packed(mut self) -> Self {
        self.features |= bits::RING_PACKED;
        self
    }

    /// Without these protocol features.
    #[must_use]
    pub fn without_protocol(mut self, features: u64) -> Self {
        self.protocol &= !features;
        self
    }

    fn lane_bytes(&self) -> usize {
        let gaps = self.max_segments * MAX_GAP_BYTES + MAX_GAP_BYTES;
        (self.max_request_bytes + gaps).next_multiple_of(4096)
    }

    fn table_bytes(&self) -> usize {
        (self.max_segments + 2) * 16
    }

    fn slot_stride(&self) -> usize {
        (SLOT_BYTES + self.table_bytes()).next_multiple_of(64)
    }

    /// A new data region for place `index`.
    pub(crate) fn data_region(&self, index: usize) -> Result<Region> {
        Region::data(index, self.queues * self.depth * LANES * self.lane_bytes())
    }
}

/// What the front-end tells the back-end about one ring.
#[derive(Debug)]
pub(crate) struct Vring {
    pub(crate) parts: super::RingParts,
    pub(crate) entries: u16,
    pub(crate) kick: Arc<EventFd>,
    pub(crate) call: Arc<EventFd>,
}

/// Guest memory with the rings laid out in it.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) control: Arc<Region>,
    pub(crate) pool: Arc<DataPool>,
    pub(crate) vrings: Vec<Vring>,
}

/// Makes memory, rings and queues for the negotiated `features`.
pub(crate) fn build_guest(options: &Options, features: u64) -> Result<(Guest, Vec<Queue>)> {
    ensure!(
        options.queue_size.is_power_of_two(),
        "queue size {}",
        options.queue_size
    );
    ensure!(options.data_regions >= 1, "a driver needs a data region");
    let indirect = features & bits::RING_INDIRECT_DESC != 0;
    let per_queue = Ring::bytes(options.queue_size) + options.depth * options.slot_stride();
    let control = Arc::new(Region::control(options.queues * (per_queue + 4096))?);
    let regions = (0..options.data_regions)
        .map(|i| options.data_region(i))
        .collect::<Result<_>>()?;
    let pool = DataPool::new(regions);
    let mut free = Area::from(control.clone());
    let mut vrings = Vec::new();
    let mut queues = Vec::new();
    for index in 0..options.queues {
        let area = free.carve(Ring::bytes(options.queue_size), 4096);
        let ring = Ring::new(area, options.queue_size, features);
        let slots = (0..options.depth)
            .map(|_| {
                let mut slot = free.carve(options.slot_stride(), 64);
                let table = slot.carve(options.table_bytes(), 16);
                SlotMemory {
                    control: slot.carve(SLOT_BYTES, 16),
                    table,
                }
            })
            .collect();
        let (kick, call) = (eventfd()?, eventfd()?);
        vrings.push(Vring {
            parts: ring.parts().clone(),
            entries: options.queue_size,
            kick: kick.clone(),
            call: call.clone(),
        });
        queues.push(Queue::new(QueueParts {
            index,
            ring,
            kick,
            call,
            slots,
            pool: pool.clone(),
            lane_bytes: options.lane_bytes(),
            indirect,
            wait: options.wait,
            timeout: options.timeout,
        }));
    }
    Ok((
        Guest {
            control,
            pool,
            vrings,
        },
        queues,
    ))
}

pub(crate) fn eventfd() -> Result<Arc<EventFd>> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    Ok(Arc::new(
        EventFd::from_value_and_flags(0, flags).context("eventfd")?,
    ))
}
