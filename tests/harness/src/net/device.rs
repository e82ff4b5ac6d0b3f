//! The VMM's side of a virtio-net device: connection, memory, rings, configuration.
//!
//! ```text
//! connect: negotiate -> guest memory and rings -> start
//! back-end died or closed: reconnect = negotiate with the features acked before, rings from what was returned
//! ```

use std::collections::{BTreeSet, HashMap};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::control::ControlQueue;
use super::dirty_log::DirtyLog;
use super::features::{self, CONFIG_BYTES, HEADER_BYTES, NetConfig, bits, ring_bits};
use super::queue::{Pair, ReceiveQueue, Slot, SlotRing, TABLE_BYTES, TransmitQueue};
use crate::driver::backend_channel::BackendChannel;
use crate::driver::either_ring::first_base;
use crate::driver::memory::{Area, Region};
use crate::driver::negotiation::negotiate;
use crate::driver::session::Session;
use crate::driver::setup::{Vring, eventfd};
use crate::driver::{Endpoint, Ring, RingParts};
use crate::wire::{self, protocol_feature, request};

/// Longest frame that a transmit slot holds, in bytes: an IP packet of 64 KiB with tags, and more than that by some, so that
/// too long ones can be sent.
const SLOT_FRAME_BYTES: usize = 68 << 10;

/// Entries of the control queue.
const CONTROL_ENTRIES: u16 = 64;
const CONTROL_SLOT_BYTES: usize = 8192;

/// How the driver is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Queue pairs.
    pub pairs: u16,
    /// Entries of each ring, a power of two.
    pub queue_size: u16,
    /// Device features to take when offered.
    pub features: u64,
    /// Protocol features to take when offered.
    pub protocol: u64,
    /// Bytes of a receive buffer, the header included.
    pub rx_buffer_bytes: usize,
    /// Lengths of the pieces of each receive buffer but the last one.
    pub rx_cuts: Vec<usize>,
    /// Longest wait for a reply, a connection, or a frame.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            pairs: 1,
            queue_size: 256,
            features: bits::MAC
                | bits::STATUS
                | bits::MTU
                | bits::MRG_RXBUF
                | bits::MQ
                | features::CONTROL
                | ring_bits::VERSION_1
                | ring_bits::PROTOCOL_FEATURES
                | ring_bits::RING_INDIRECT_DESC
                | ring_bits::RING_EVENT_IDX
                | ring_bits::IN_ORDER,
            protocol: protocol_feature::MQ
                | protocol_feature::LOG_SHMFD
                | protocol_feature::RARP
                | protocol_feature::REPLY_ACK
                | protocol_feature::NET_MTU
                | protocol_feature::BACKEND_REQ
                | protocol_feature::CONFIG
                | protocol_feature::RESET_DEVICE
                | protocol_feature::CONFIGURE_MEM_SLOTS
                | protocol_feature::STATUS,
            rx_buffer_bytes: 2048,
            rx_cuts: Vec::new(),
            timeout: Duration::from_secs(20),
        }
    }
}

impl Options {
    /// With these device features besides.
    #[must_use]
    pub fn with(mut self, features: u64) -> Self {
        self.features |= features;
        self
    }

    /// Without these device features. Without `MRG_RXBUF`, receive buffers hold the longest frame.
    #[must_use]
    pub fn without(mut self, features: u64) -> Self {
        self.features &= !features;
        if features & bits::MRG_RXBUF != 0 {
            self.rx_buffer_bytes = HEADER_BYTES + 65_535 + 22;
        }
        self
    }

    /// With packed rings, when offered.
    #[must_use]
    pub fn packed(self) -> Self {
        self.with(ring_bits::RING_PACKED)
    }

    /// With that many queue pairs.
    #[must_use]
    pub fn pairs(mut self, pairs: u16) -> Self {
        self.pairs = pairs;
        self
    }

    /// Without these protocol features.
    #[must_use]
    pub fn without_protocol(mut self, features: u64) -> Self {
        self.protocol &= !features;
        self
    }
}

/// A connected device, whole.
#[derive(Debug)]
pub struct NetDevice {
    /// Control side.
    pub front_end: FrontEnd,
    /// Data queues.
    pub pairs: Vec<Pair>,
    /// The control queue, when it was negotiated.
    pub control: Option<ControlQueue>,
}

impl NetDevice {
    /// Connects, negotiates and starts every ring; receive buffers are offered.
    ///
    /// # Errors
    /// When the back-end is not there in time, breaks the protocol, or lacks a needed feature.
    pub fn connect(endpoint: Endpoint, options: Options) -> Result<Self> {
        let mut device = Self::negotiate(endpoint, options)?;
        for pair in &mut device.pairs {
            pair.rx.fill()?;
        }
        device.front_end.start()?;
        Ok(device)
    }

    /// Connects and negotiates; nothing is started, no buffer is offered.
    ///
    /// # Errors
    /// As [`NetDevice::connect`].
    pub fn negotiate(endpoint: Endpoint, options: Options) -> Result<Self> {
        let greeting = negotiate(&endpoint, options.timeout, options.protocol)?;
        let mut features = greeting.offered & options.features;
        if !greeting.session.has(protocol_feature::CONFIG) {
            // A control queue that the back-end leaves to the front-end.
            features &= !features::CONTROL;
        }
        ensure!(
            features & ring_bits::VERSION_1 != 0,
            "the back-end does not offer VERSION_1"
        );
        let has_control = features & bits::CTRL_VQ != 0;
        let config = read_config(&greeting.session)?;
        let needed = u64::from(options.pairs) * 2;
        ensure!(
            options.pairs == 1 || greeting.max_queues >= needed,
            "the back-end offers {} queues, {needed} are wanted",
            greeting.max_queues,
        );
        let mut build = Builder::new(&options, features)?;
        let pairs = (0..options.pairs)
            .map(|_| build.pair())
            .collect::<Result<Vec<_>>>()?;
        let control = if has_control {
            // The control queue follows all pairs that the device has, used or not.
            let pairs = if features & bits::MQ != 0 {
                config.max_pairs
            } else {
                1
            };
            Some(build.control(2 * usize::from(pairs))?)
        } else {
            None
        };
        let front_end = FrontEnd {
            bases: vec![first_base(features); build.vrings.len()],
            vrings: build.vrings,
            regions: build.regions,
            endpoint,
            options,
            session: greeting.session,
            offered: greeting.offered,
            features,
            max_queues: greeting.max_queues,
            config,
            channel: None,
        };
        Ok(Self {
            front_end,
            pairs,
            control,
        })
    }

    /// Connects to the back-end's successor and hands it the device as it stands: same features, rings from what was returned.
    ///
    /// # Errors
    /// When the successor is not there in time, or no longer offers what is in use.
    pub fn reconnect(&mut self) -> Result<()> {
        let mut bases = Vec::new();
        for pair in &mut self.pairs {
            pair.rx.change_hands();
            bases.push(pair.rx.inner.ring.device_base());
            bases.push(pair.tx.inner.ring.device_base());
        }
        if let Some(control) = &self.control {
            bases.push(control.inner.ring.device_base());
        }
        self.front_end.reconnect(bases)
    }

    /// Resets the device and every ring and starts again, buffers offered.
    ///
    /// # Errors
    /// When the back-end refuses.
    pub fn reset(&mut self) -> Result<()> {
        let session = &self.front_end.session;
        if session.has(protocol_feature::RESET_DEVICE) {
            session.set(request::RESET_DEVICE, &[], &[])?;
        } else {
            session.set_status(0)?;
        }
        let features = self.front_end.features;
        self.front_end.bases.fill(first_base(features));
        for pair in &mut self.pairs {
            pair.rx.inner.reset();
            pair.tx.inner.reset();
            pair.rx.fill()?;
        }
        if let Some(control) = &mut self.control {
            control.inner.reset();
        }
        self.front_end.start_rings()
    }
}

/// A connection to a back-end, which it may outlive.
#[derive(Debug)]
pub struct FrontEnd {
    endpoint: Endpoint,
    options: Options,
    session: Session,
    offered: u64,
    features: u64,
    max_queues: u64,
    config: NetConfig,
    /// Number of the ring at the back-end, and the ring.
    vrings: Vec<(usize, Vring)>,
    regions: Vec<Arc<Region>>,
    bases: Vec<u32>,
    channel: Option<BackendChannel>,
}

impl FrontEnd {
    /// Features that the back-end offered.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Features in use.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Protocol features in use.
    pub fn protocol(&self) -> u64 {
        self.session.protocol
    }

    /// Answer to `GET_QUEUE_NUM`.
    pub fn max_queues(&self) -> u64 {
        self.max_queues
    }

    /// Configuration space as of the last [`FrontEnd::refresh_config`].
    pub fn config(&self) -> &NetConfig {
        &self.config
    }

    /// Reads the configuration space again.
    ///
    /// # Errors
    /// When the back-end does not answer with a whole one.
    pub fn refresh_config(&mut self) -> Result<&NetConfig> {
        self.config = read_config(&self.session)?;
        Ok(&self.config)
    }

    /// Waits for a config-change message on the back-end channel.
    ///
    /// # Errors
    /// When none arrives within `limit`, or the back-end has no such channel.
    pub fn config_change(&self, limit: Duration) -> Result<()> {
        self.channel
            .as_ref()
            .context("no back-end channel")?
            .config_change(limit)
    }

    /// Tells the back-end the network's MTU (`NET_SET_MTU`).
    ///
    /// # Errors
    /// When it refuses.
    pub fn set_mtu(&self, mtu: u64) -> Result<()> {
        let body = mtu.to_le_bytes();
        self.session.set(request::NET_SET_MTU, &body, &[])
    }

    /// Asks the back-end to announce the guest (`SEND_RARP`).
    ///
    /// # Errors
    /// When it refuses.
    pub fn send_rarp(&self, mac: [u8; 6]) -> Result<()> {
        let body = [&mac[..], &[0; 2]].concat();
        self.session.set(request::SEND_RARP, &body, &[])
    }

    /// Sends features, memory and rings, then enables the rings.
    ///
    /// # Errors
    /// When the back-end refuses one of them.
    pub fn start(&mut self) -> Result<()> {
        if self.session.has(protocol_feature::BACKEND_REQ) {
            let (channel, theirs) = BackendChannel::open()?;
            self.session
                .set(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
            self.channel = Some(channel);
        }
        self.session.accept_features(self.features)?;
        self.session.send_memory(&self.regions)?;
        self.send_rings()
    }

    /// As [`FrontEnd::start`], with features that may not have been offered.
    ///
    /// # Errors
    /// When the back-end refuses.
    pub fn start_with(&mut self, features: u64) -> Result<()> {
        self.features = features;
        self.start()
    }

    /// As [`FrontEnd::start`] on a connection that has the memory already.
    fn start_rings(&self) -> Result<()> {
        self.session.accept_features(self.features)?;
        self.send_rings()
    }

    /// All rings, then all enabled: DPDK's back-end sends nothing into a ring that was enabled before it knew the others.
    fn send_rings(&self) -> Result<()> {
        for ((index, vring), base) in self.vrings.iter().zip(&self.bases) {
            self.session.send_ring(*index, vring, *base)?;
        }
        for (index, _) in &self.vrings {
            self.session.enable_ring(*index, true)?;
        }
        self.session.driver_ok()
    }

    /// Sends ring number `at` (receive, transmit, receive, ...), to go on where it stands, and enables it.
    ///
    /// # Errors
    /// When the back-end refuses it.
    pub fn start_ring(&self, at: usize) -> Result<()> {
        let (index, vring) = &self.vrings[at];
        self.session.send_ring(*index, vring, self.bases[at])?;
        self.session.enable_ring(*index, true)
    }

    /// Stops ring number `at` and returns where its successor goes on.
    ///
    /// # Errors
    /// When the reply is missing or malformed.
    pub fn stop_ring(&mut self, at: usize) -> Result<u32> {
        let base = self.session.stop_ring(self.vrings[at].0)?;
        self.bases[at] = base;
        Ok(base)
    }

    /// Enables or disables ring number `at`.
    ///
    /// # Errors
    /// When the back-end refuses.
    pub fn enable_ring(&self, at: usize, enabled: bool) -> Result<()> {
        self.session.enable_ring(self.vrings[at].0, enabled)
    }

    /// Memory and size of ring number `at`, for tests that write it themselves.
    pub fn ring(&self, at: usize) -> (RingParts, u16) {
        let vring = &self.vrings[at].1;
        (vring.parts.clone(), vring.entries)
    }

    /// Kicks ring number `at`.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    pub fn kick(&self, at: usize) -> Result<()> {
        self.vrings[at].1.kick.write(1).context("kick").map(drop)
    }

    /// Guest memory: rings and tables, then buffers.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Starts logging of every page that the back-end writes.
    ///
    /// # Errors
    /// When the back-end refuses, or has no `LOG_SHMFD`.
    pub fn start_log(&self) -> Result<DirtyLog> {
        ensure!(
            self.session.has(protocol_feature::LOG_SHMFD),
            "the back-end has no LOG_SHMFD"
        );
        let end = self.regions.iter().map(|r| r.gpa + r.bytes() as u64).max();
        let log = DirtyLog::new(end.unwrap_or(0))?;
        wire::send(
            &self.session.socket,
            (request::SET_LOG_BASE, 0),
            &log.body(),
            &[log.fd()],
        )?;
        // Answered always when the log is shared memory.
        self.session.reply_to(request::SET_LOG_BASE)?;
        let features = self.features | ring_bits::LOG_ALL;
        self.session
            .set(request::SET_FEATURES, &features.to_le_bytes(), &[])?;
        for (index, vring) in &self.vrings {
            let used = vring.parts.used.gpa(0);
            self.session.set_ring_address(*index, vring, Some(used))?;
        }
        Ok(log)
    }

    /// Ends logging.
    ///
    /// # Errors
    /// When the back-end refuses.
    pub fn stop_log(&self) -> Result<()> {
        for (index, vring) in &self.vrings {
            self.session.set_ring_address(*index, vring, None)?;
        }
        self.session
            .set(request::SET_FEATURES, &self.features.to_le_bytes(), &[])
    }

    /// Waits until the back-end has closed the connection.
    ///
    /// # Errors
    /// When it is still open after `limit`.
    pub fn hung_up(&self, limit: Duration) -> Result<()> {
        let mut fds = [PollFd::new(self.session.socket.as_fd(), PollFlags::POLLHUP)];
        let ready = poll(&mut fds, PollTimeout::try_from(limit)?)?;
        ensure!(
            ready > 0,
            "the back-end keeps the connection open after {limit:?}"
        );
        Ok(())
    }

    /// Closes the connection without stopping rings, as a VMM that crashed and came back.
    pub fn disconnect(&mut self) {
        self.channel = None;
        // An error means that the back-end closed first, which serves as well.
        let _ = self.session.socket.shutdown(std::net::Shutdown::Both);
    }

    fn reconnect(&mut self, bases: Vec<u32>) -> Result<()> {
        self.disconnect();
        let greeting = negotiate(&self.endpoint, self.options.timeout, self.options.protocol)?;
        ensure!(
            greeting.offered & self.features == self.features,
            "features {:#x} are no longer offered",
            self.features & !greeting.offered
        );
        self.session = greeting.session;
        self.config = read_config(&self.session)?;
        self.bases = bases;
        self.start()
    }
}

/// The configuration space; zeroes when the back-end has none.
fn read_config(session: &Session) -> Result<NetConfig> {
    if session.has(protocol_feature::CONFIG) {
        NetConfig::decode(&session.config(CONFIG_BYTES)?)
    } else {
        Ok(NetConfig::default())
    }
}

/// Lays guest memory out: rings and indirect tables in one region, buffers in the other.
struct Builder<'a> {
    options: &'a Options,
    features: u64,
    regions: Vec<Arc<Region>>,
    control: Area,
    data: Area,
    vrings: Vec<(usize, Vring)>,
}

impl<'a> Builder<'a> {
    fn new(options: &'a Options, features: u64) -> Result<Self> {
        ensure!(
            options.queue_size.is_power_of_two(),
            "queue size {}",
            options.queue_size
        );
        let entries = usize::from(options.queue_size);
        let rings = 2 * usize::from(options.pairs) + 1;
        let ring_bytes = Ring::bytes(options.queue_size.max(CONTROL_ENTRIES));
        let tables = entries.max(CONTROL_ENTRIES.into()) * TABLE_BYTES;
        let control_bytes = rings * (ring_bytes + tables + 8192);
        let rx_slot = options.rx_buffer_bytes.next_multiple_of(64);
        let per_pair = entries * (rx_slot + SLOT_FRAME_BYTES);
        let commands = usize::from(CONTROL_ENTRIES) * CONTROL_SLOT_BYTES;
        let data_bytes = usize::from(options.pairs) * per_pair + commands;
        let control = Arc::new(Region::control(control_bytes)?);
        let data = Arc::new(Region::data(0, data_bytes)?);
        Ok(Self {
            options,
            features,
            control: control.clone().into(),
            data: data.clone().into(),
            regions: vec![control, data],
            vrings: Vec::new(),
        })
    }

    /// The ring that the back-end knows as number `index`.
    fn ring(&mut self, index: usize, entries: u16, slot_bytes: usize) -> Result<SlotRing> {
        let area = self.control.carve(Ring::bytes(entries), 4096);
        let ring = Ring::new(area, entries, self.features);
        let slots: Vec<Slot> = (0..entries)
            .map(|_| Slot {
                buffer: self.data.carve(slot_bytes, 64),
                table: self.control.carve(TABLE_BYTES, 16),
            })
            .collect();
        let (kick, call) = (eventfd()?, eventfd()?);
        let vring = Vring {
            parts: ring.parts().clone(),
            entries,
            kick: kick.clone(),
            call: call.clone(),
        };
        self.vrings.push((index, vring));
        Ok(SlotRing {
            ring,
            kick,
            call,
            free: (0..slots.len()).collect(),
            slots,
            by_name: HashMap::new(),
            indirect: self.features & ring_bits::RING_INDIRECT_DESC != 0,
        })
    }

    fn pair(&mut self) -> Result<Pair> {
        let (entries, bytes) = (self.options.queue_size, self.options.rx_buffer_bytes);
        let first = self.vrings.len();
        let rx = self.ring(first, entries, bytes.next_multiple_of(64))?;
        let tx = self.ring(first + 1, entries, SLOT_FRAME_BYTES)?;
        let timeout = self.options.timeout;
        Ok(Pair {
            rx: ReceiveQueue {
                inner: rx,
                timeout,
                buffer_bytes: bytes,
                cuts: self.options.rx_cuts.clone(),
                mergeable: self.features & bits::MRG_RXBUF != 0,
                written: BTreeSet::new(),
                begun: BTreeSet::new(),
            },
            tx: TransmitQueue { inner: tx, timeout },
        })
    }

    fn control(&mut self, index: usize) -> Result<ControlQueue> {
        Ok(ControlQueue {
            inner: self.ring(index, CONTROL_ENTRIES, CONTROL_SLOT_BYTES)?,
            timeout: self.options.timeout,
        })
    }
}
