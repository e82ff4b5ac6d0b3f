//! The VMM's side of a vhost-user connection.
//!
//! ```text
//! connect: negotiate -> start (memory table, inflight region, rings, status)
//! back-end died or closed: hung_up -> reconnect = negotiate with the features acked before, start
//! ```
//!
//! The inflight region and the kick and call eventfds live as long as the front-end and are handed
//! to every successor. Split rings restart from what `GET_VRING_BASE` answered, or from the used index
//! in guest memory when the back-end died without being asked; where a packed ring was is only in the
//! inflight region then.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::backend_channel::BackendChannel;
use super::either_ring::{base_after_death, first_base};
use super::features::{BlockConfig, CONFIG_BYTES, bits};
use super::memory::Region;
use super::negotiation::negotiate;
use super::ring::device_used_idx;
use super::session::Session;
use super::setup::{Guest, build_guest};
use super::{DataPool, Endpoint, Options, Queue, RingParts};
use crate::wire::{self, protocol_feature, request};

/// Whether [`FrontEnd::connect_with`] starts the rings at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Rings are set up and enabled.
    Now,
    /// Only negotiation; the caller starts rings later.
    Later,
}

#[derive(Debug)]
struct Inflight {
    file: File,
    mmap_size: u64,
    mmap_offset: u64,
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
    config: BlockConfig,
    guest: Guest,
    bases: Vec<u32>,
    inflight: Option<Inflight>,
    channel: Option<BackendChannel>,
    /// The back-end of this connection has the regions; a device reset leaves them alone.
    memory_sent: bool,
}

impl FrontEnd {
    /// Connects, negotiates and starts every ring.
    ///
    /// # Errors
    /// When the back-end is not there in time, breaks the protocol, or lacks a needed feature.
    pub fn connect(endpoint: Endpoint, options: Options) -> Result<(Self, Vec<Queue>)> {
        Self::connect_with(endpoint, options, Start::Now)
    }

    /// As [`FrontEnd::connect`], with a choice of when rings start.
    ///
    /// # Errors
    /// As [`FrontEnd::connect`].
    pub fn connect_with(
        endpoint: Endpoint,
        options: Options,
        start: Start,
    ) -> Result<(Self, Vec<Queue>)> {
        let greeting = negotiate(&endpoint, options.timeout, options.protocol)?;
        let config = read_config(&greeting.session)?;
        let features = greeting.offered & options.features;
        ensure!(
            features & bits::VERSION_1 != 0,
            "the back-end does not offer VERSION_1"
        );
        ensure!(
            greeting.max_queues >= options.queues as u64,
            "the back-end offers {} queues, {} are wanted",
            greeting.max_queues,
            options.queues
        );
        let (guest, queues) = build_guest(&options, features)?;
        let bases = vec![first_base(features); options.queues];
        let mut front_end = Self {
            endpoint,
            options,
            session: greeting.session,
            offered: greeting.offered,
            features,
            max_queues: greeting.max_queues,
            config,
            guest,
            bases,
            inflight: None,
            channel: None,
            memory_sent: false,
        };
        if start == Start::Now {
            front_end.start()?;
        }
        Ok((front_end, queues))
    }

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
    pub fn config(&self) -> &BlockConfig {
        &self.config
    }

    /// The data regions.
    pub fn pool(&self) -> &Arc<DataPool> {
        &self.guest.pool
    }

    /// The connection, for tests that send messages of their own.
    pub fn socket(&self) -> &UnixStream {
        &self.session.socket
    }

    /// Most data segments a request may have: the device's limit, the ring's and the options'.
    pub fn max_segments(&self) -> usize {
        let device = if self.features & bits::SEG_MAX != 0 {
            self.config.seg_max as usize
        } else {
            usize::MAX
        };
        let ring = usize::from(self.options.queue_size) - 2;
        device.min(ring).min(self.options.max_segments).max(1)
    }

    /// Sends features, inflight region, memory and rings, then enables the rings.
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
        self.send_inflight()?;
        if !self.memory_sent {
            self.session.send_memory(&self.regions())?;
            self.memory_sent = true;
        }
        for index in 0..self.guest.vrings.len() {
            self.start_ring(index)?;
        }
        self.session.driver_ok()
    }

    /// Sends one ring, to go on at the index known for it, and enables it.
    ///
    /// # Errors
    /// When the back-end refuses it.
    pub fn start_ring(&self, index: usize) -> Result<()> {
        let vring = &self.guest.vrings[index];
        self.session.send_ring(index, vring, self.bases[index])?;
        self.session.enable_ring(index, true)
    }

    /// Stops a ring and returns where its successor goes on: the index of the first request that the
    /// back-end did not take, or the two positions of a packed ring.
    ///
    /// # Errors
    /// When the reply is missing or malformed.
    pub fn stop_ring(&mut self, index: usize) -> Result<u32> {
        let base = self.session.stop_ring(index)?;
        let packed = self.features & bits::RING_PACKED != 0;
        ensure!(packed || base <= 0xffff, "base {base:#x} of a split ring");
        self.bases[index] = base;
        Ok(base)
    }

    /// The used index that the back-end has written into split ring `index`.
    pub fn used_idx(&self, index: usize) -> u16 {
        device_used_idx(&self.guest.vrings[index].parts)
    }

    /// Memory and size of ring `index`, for tests that write it themselves.
    pub fn ring(&self, index: usize) -> (RingParts, u16) {
        let vring = &self.guest.vrings[index];
        (vring.parts.clone(), vring.entries)
    }

    /// Kick and call eventfd of ring `index`.
    pub fn eventfds(&self, index: usize) -> (Arc<EventFd>, Arc<EventFd>) {
        let vring = &self.guest.vrings[index];
        (vring.kick.clone(), vring.call.clone())
    }

    /// Kicks ring `index`.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    pub fn kick(&self, index: usize) -> Result<()> {
        self.guest.vrings[index]
            .kick
            .write(1)
            .context("kick")
            .map(drop)
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

    /// Connects to the back-end's successor and hands it the device as it stands: same features,
    /// same inflight region, rings from their used index.
    ///
    /// # Errors
    /// When the successor is not there in time, or no longer offers what is in use.
    pub fn reconnect(&mut self) -> Result<()> {
        self.disconnect();
        let greeting = negotiate(&self.endpoint, self.options.timeout, self.options.protocol)?;
        ensure!(
            greeting.offered & self.features == self.features,
            "features {:#x} are no longer offered",
            self.features & !greeting.offered
        );
        self.session = greeting.session;
        self.config = read_config(&self.session)?;
        self.memory_sent = false;
        for (base, vring) in self.bases.iter_mut().zip(&self.guest.vrings) {
            *base = base_after_death(&vring.parts, self.features);
        }
        self.start()
    }

    /// Resets the device; the caller resets the queues and calls [`FrontEnd::start`].
    ///
    /// # Errors
    /// When the back-end refuses, or offers no way to do it.
    pub fn reset_device(&mut self) -> Result<()> {
        if self.session.has(protocol_feature::RESET_DEVICE) {
            self.session.set(request::RESET_DEVICE, &[], &[])?;
        } else {
            ensure!(
                self.session.has(protocol_feature::STATUS),
                "no RESET_DEVICE and no STATUS"
            );
            self.session.set_status(0)?;
        }
        self.bases.fill(first_base(self.features));
        Ok(())
    }

    /// Device status, when the STATUS protocol feature is in use.
    ///
    /// # Errors
    /// When the reply is missing.
    pub fn status(&self) -> Result<u64> {
        self.session.get(request::GET_STATUS)
    }

    /// Reads the configuration space again.
    ///
    /// # Errors
    /// When the back-end does not answer with a whole one.
    pub fn refresh_config(&mut self) -> Result<&BlockConfig> {
        self.config = read_config(&self.session)?;
        Ok(&self.config)
    }

    /// Writes the configuration space.
    ///
    /// # Errors
    /// When the back-end refuses.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<()> {
        let mut body = [offset, bytes.len() as u32, 0]
            .map(u32::to_le_bytes)
            .concat();
        body.extend_from_slice(bytes);
        self.session.set(request::SET_CONFIG, &body, &[])
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

    /// Announces all regions with one `SET_MEM_TABLE`.
    ///
    /// # Errors
    /// When the back-end refuses, or there are more regions than the message holds.
    pub fn set_memory_table(&self) -> Result<()> {
        self.session.send_table(&self.regions())
    }

    /// Replaces the data region at `place` by a new one at the same guest address while the others
    /// stay in use: with memory slots one message removes and one adds, without them two tables.
    ///
    /// # Errors
    /// When the back-end refuses, or requests keep the old region in use for too long.
    pub fn replace_region(&self, place: usize) -> Result<()> {
        let slots = self.session.has(protocol_feature::CONFIGURE_MEM_SLOTS);
        let old = self.guest.pool.withdraw(place, self.options.timeout)?;
        if slots {
            self.session.remove_region(&old)?;
        } else {
            self.set_memory_table()?;
        }
        let new = Arc::new(self.options.data_region(place)?);
        if slots {
            self.session.add_region(&new)?;
            self.guest.pool.offer(place, new);
        } else {
            let mut regions = self.regions();
            regions.push(new.clone());
            self.session.send_table(&regions)?;
            self.guest.pool.offer(place, new);
        }
        Ok(())
    }

    fn regions(&self) -> Vec<Arc<Region>> {
        let mut regions = vec![self.guest.control.clone()];
        regions.extend(self.guest.pool.regions());
        regions
    }

    fn send_inflight(&mut self) -> Result<()> {
        if !self.session.has(protocol_feature::INFLIGHT_SHMFD) {
            return Ok(());
        }
        let shape = [
            (self.options.queues as u16).to_le_bytes(),
            self.options.queue_size.to_le_bytes(),
        ];
        if self.inflight.is_none() {
            let body = inflight_body((0, 0), shape.concat());
            wire::send(
                &self.session.socket,
                (request::GET_INFLIGHT_FD, 0),
                &body,
                &[],
            )?;
            let reply = wire::receive(&self.session.socket).context("GET_INFLIGHT_FD")?;
            ensure!(
                reply.request == request::GET_INFLIGHT_FD,
                "reply to {}",
                reply.request
            );
            ensure!(
                reply.body.len() >= 20,
                "inflight reply of {} bytes",
                reply.body.len()
            );
            self.inflight = Some(Inflight {
                mmap_size: wire::read_u64(&reply.body, 0),
                mmap_offset: wire::read_u64(&reply.body, 8),
                file: reply
                    .file
                    .context("GET_INFLIGHT_FD answered without a descriptor")?,
            });
        }
        let region = self
            .inflight
            .as_ref()
            .context("the region was just fetched")?;
        let body = inflight_body((region.mmap_size, region.mmap_offset), shape.concat());
        self.session
            .set(request::SET_INFLIGHT_FD, &body, &[region.file.as_fd()])
    }
}

/// The configuration space, which a block device has to have.
fn read_config(session: &Session) -> Result<BlockConfig> {
    ensure!(
        session.has(protocol_feature::CONFIG),
        "the back-end has no CONFIG"
    );
    BlockConfig::decode(&session.config(CONFIG_BYTES)?)
}

fn inflight_body((size, offset): (u64, u64), shape: Vec<u8>) -> Vec<u8> {
    let mut body = [size.to_le_bytes(), offset.to_le_bytes()].concat();
    body.extend_from_slice(&shape);
    body.resize(24, 0);
    body
}
