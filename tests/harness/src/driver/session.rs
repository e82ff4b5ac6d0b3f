//! One vhost-user connection as the front-end uses it, whatever the device: requests with their replies, and the messages that
//! announce memory and rings.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::memory::Region;
use super::setup::Vring;
use crate::wire::{self, flag, protocol_feature, read_u32, request};

const STATUS_DRIVER: u8 = 1 | 2;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_DRIVER_OK: u8 = 4;
const RANGES_PER_TABLE: usize = 8;
/// Flag of `SET_VRING_ADDR`: writes to the used ring are logged.
const RING_IS_LOGGED: u32 = 1;

/// A connection and what was agreed on it.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) socket: UnixStream,
    /// Protocol features in use.
    pub(crate) protocol: u64,
}

impl Session {
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            protocol: 0,
        }
    }

    /// Whether a protocol feature is in use.
    pub(crate) fn has(&self, protocol_feature: u64) -> bool {
        self.protocol & protocol_feature != 0
    }

    /// A request that nobody acknowledges.
    pub(crate) fn send(&self, number: u32, body: &[u8]) -> Result<()> {
        wire::send(&self.socket, (number, 0), body, &[])
            .with_context(|| format!("sending {number}"))
    }

    /// A request without arguments and its `u64` answer.
    pub(crate) fn get(&self, number: u32) -> Result<u64> {
        self.send(number, &[])?;
        let body = self.reply_to(number)?;
        ensure!(
            body.len() == 8,
            "request {number} answered with {} bytes",
            body.len()
        );
        Ok(wire::read_u64(&body, 0))
    }

    /// A request that is acknowledged if that was agreed.
    pub(crate) fn set(&self, number: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let acknowledged = self.has(protocol_feature::REPLY_ACK);
        let flags = if acknowledged { flag::NEED_REPLY } else { 0 };
        wire::send(&self.socket, (number, flags), body, fds)
            .with_context(|| format!("sending request {number}"))?;
        if acknowledged {
            let reply = self.reply_to(number)?;
            ensure!(
                reply.len() == 8,
                "request {number} acknowledged with {} bytes",
                reply.len()
            );
            let code = wire::read_u64(&reply, 0);
            ensure!(code == 0, "request {number} refused with {code}");
        }
        Ok(())
    }

    /// Body of the reply to request `number`.
    pub(crate) fn reply_to(&self, number: u32) -> Result<Vec<u8>> {
        let reply = wire::receive(&self.socket).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => {
                io::Error::new(io::ErrorKind::TimedOut, "no reply in time")
            }
            _ => error,
        });
        let reply = reply.with_context(|| format!("reply to request {number}"))?;
        ensure!(
            reply.request == number,
            "reply to {} instead of {number}",
            reply.request
        );
        ensure!(
            reply.flags & flag::REPLY != 0,
            "request {number}: flags {:#x}",
            reply.flags
        );
        Ok(reply.body)
    }

    /// The first `bytes` bytes of the configuration space.
    pub(crate) fn config(&self, bytes: usize) -> Result<Vec<u8>> {
        let mut body = [0, bytes as u32, 0].map(u32::to_le_bytes).concat();
        body.resize(12 + bytes, 0);
        self.send(request::GET_CONFIG, &body)?;
        let reply = self.reply_to(request::GET_CONFIG)?;
        ensure!(
            reply.len() == 12 + bytes,
            "GET_CONFIG of {bytes} bytes answered with {} bytes",
            reply.len()
        );
        Ok(reply[12..].to_vec())
    }

    /// Acknowledges `features`, with the steps of the device status up to FEATURES_OK where there is one.
    pub(crate) fn accept_features(&self, features: u64) -> Result<()> {
        let status = self.has(protocol_feature::STATUS);
        if status {
            self.set_status(STATUS_DRIVER)?;
        }
        self.set(request::SET_FEATURES, &features.to_le_bytes(), &[])?;
        if status {
            self.set_status(STATUS_DRIVER | STATUS_FEATURES_OK)?;
            let status = self.get(request::GET_STATUS)?;
            ensure!(
                status & u64::from(STATUS_FEATURES_OK) != 0,
                "features refused: {status:#x}"
            );
        }
        Ok(())
    }

    /// The driver is ready, where there is a device status.
    pub(crate) fn driver_ok(&self) -> Result<()> {
        if self.has(protocol_feature::STATUS) {
            self.set_status(STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK)?;
        }
        Ok(())
    }

    pub(crate) fn set_status(&self, status: u8) -> Result<()> {
        self.set(request::SET_STATUS, &u64::from(status).to_le_bytes(), &[])
    }

    /// Announces regions: one `SET_MEM_TABLE`, or one `ADD_MEM_REG` each with memory slots.
    pub(crate) fn send_memory(&self, regions: &[Arc<Region>]) -> Result<()> {
        if self.has(protocol_feature::CONFIGURE_MEM_SLOTS) {
            regions
                .iter()
                .try_for_each(|region| self.add_region(region))
        } else {
            self.send_table(regions)
        }
    }

    pub(crate) fn send_table(&self, regions: &[Arc<Region>]) -> Result<()> {
        ensure!(
            regions.len() <= RANGES_PER_TABLE,
            "{} regions",
            regions.len()
        );
        let mut body = [(regions.len() as u32).to_le_bytes(), [0; 4]].concat();
        let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
        for region in regions {
            body.extend_from_slice(&region.table_entry());
            fds.push(region.fd());
        }
        self.set(request::SET_MEM_TABLE, &body, &fds)
    }

    pub(crate) fn add_region(&self, region: &Region) -> Result<()> {
        self.set(request::ADD_MEM_REG, &region_body(region), &[region.fd()])
    }

    pub(crate) fn remove_region(&self, region: &Region) -> Result<()> {
        self.set(request::REM_MEM_REG, &region_body(region), &[])
    }

    /// Sends ring `index`, to go on at `base`. It is enabled after that.
    pub(crate) fn send_ring(&self, index: usize, vring: &Vring, base: u32) -> Result<()> {
        self.set(
            request::SET_VRING_NUM,
            &ring_state(index, u32::from(vring.entries)),
            &[],
        )?;
        self.set(request::SET_VRING_BASE, &ring_state(index, base), &[])?;
        self.set_ring_address(index, vring, None)?;
        let index_word = (index as u64).to_le_bytes();
        self.set(request::SET_VRING_KICK, &index_word, &[vring.kick.as_fd()])?;
        self.set(request::SET_VRING_CALL, &index_word, &[vring.call.as_fd()])
    }

    pub(crate) fn enable_ring(&self, index: usize, enabled: bool) -> Result<()> {
        let body = ring_state(index, u32::from(enabled));
        self.set(request::SET_VRING_ENABLE, &body, &[])
    }

    /// Sends where ring `index` lies, and the guest address under which writes to its used part are logged, if they are.
    pub(crate) fn set_ring_address(
        &self,
        index: usize,
        vring: &Vring,
        logged_as: Option<u64>,
    ) -> Result<()> {
        let flags = if logged_as.is_some() {
            RING_IS_LOGGED
        } else {
            0
        };
        let mut addresses = ring_state(index, flags);
        for area in [
            &vring.parts.descriptors,
            &vring.parts.used,
            &vring.parts.available,
        ] {
            addresses.extend_from_slice(&area.user_addr(0).to_le_bytes());
        }
        addresses.extend_from_slice(&logged_as.unwrap_or(0).to_le_bytes());
        self.set(request::SET_VRING_ADDR, &addresses, &[])
    }

    /// Stops ring `index` and gives where its successor goes on.
    pub(crate) fn stop_ring(&self, index: usize) -> Result<u32> {
        self.send(request::GET_VRING_BASE, &ring_state(index, 0))?;
        let reply = self.reply_to(request::GET_VRING_BASE)?;
        ensure!(
            reply.len() == 8,
            "GET_VRING_BASE answered with {} bytes",
            reply.len()
        );
        ensure!(
            read_u32(&reply, 0) == index as u32,
            "GET_VRING_BASE answered for another ring"
        );
        Ok(read_u32(&reply, 4))
    }
}

fn ring_state(index: usize, value: u32) -> Vec<u8> {
    [(index as u32).to_le_bytes(), value.to_le_bytes()].concat()
}

fn region_body(region: &Region) -> Vec<u8> {
    [&[0; 8], region.table_entry().as_slice()].concat()
}
