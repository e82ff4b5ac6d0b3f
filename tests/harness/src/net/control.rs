//! The control queue (virtio 1.2, section 5.1.6.5).

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::queue::SlotRing;
use crate::driver::Buffer;

/// Class and command numbers.
pub mod command {
    #![expect(missing_docs, reason = "the names are the specification's own")]
    pub const RX_PROMISC: (u8, u8) = (0, 0);
    pub const RX_ALLMULTI: (u8, u8) = (0, 1);
    pub const RX_ALLUNI: (u8, u8) = (0, 2);
    pub const RX_NOMULTI: (u8, u8) = (0, 3);
    pub const RX_NOUNI: (u8, u8) = (0, 4);
    pub const RX_NOBCAST: (u8, u8) = (0, 5);
    pub const MAC_TABLE_SET: (u8, u8) = (1, 0);
    pub const MAC_ADDR_SET: (u8, u8) = (1, 1);
    pub const VLAN_ADD: (u8, u8) = (2, 0);
    pub const VLAN_DEL: (u8, u8) = (2, 1);
    pub const ANNOUNCE_ACK: (u8, u8) = (3, 0);
    pub const MQ_VQ_PAIRS_SET: (u8, u8) = (4, 0);
    pub const GUEST_OFFLOADS_SET: (u8, u8) = (5, 0);
}

const OK: u8 = 0;
const ERROR: u8 = 1;
/// What the answer's byte holds before the device writes it.
const PRESET: u8 = 0xee;

/// The control queue of a driver.
#[derive(Debug)]
pub struct ControlQueue {
    pub(super) inner: SlotRing,
    pub(super) timeout: Duration,
}

impl ControlQueue {
    /// Runs a command; whether the device accepted it.
    ///
    /// # Errors
    /// When it does not answer in time, or with neither of the two answers.
    pub fn run(&mut self, command: (u8, u8), data: &[u8]) -> Result<bool> {
        let body = [&[command.0, command.1], data].concat();
        // Class and command in a buffer of their own, as Linux has them.
        self.run_raw(&body, &[2])
    }

    /// Runs a command that the device has to accept.
    ///
    /// # Errors
    /// As [`ControlQueue::run`].
    pub fn set(&mut self, command: (u8, u8), data: &[u8]) -> Result<()> {
        ensure!(
            self.run(command, data)?,
            "control command {command:?} was refused"
        );
        Ok(())
    }

    /// Sends any bytes, cut where `cuts` says, with one byte for the answer.
    ///
    /// # Errors
    /// As [`ControlQueue::run`].
    pub fn run_raw(&mut self, body: &[u8], cuts: &[usize]) -> Result<bool> {
        let slot = self.inner.free.pop_front().context("the queue is full")?;
        let memory = self.inner.slots[slot].clone();
        ensure!(
            body.len() < memory.buffer.bytes,
            "a command of {} bytes",
            body.len()
        );
        memory.buffer.write(0, body);
        let answer_at = memory.buffer.bytes - 1;
        memory.buffer.write(answer_at, &[PRESET]);
        let mut buffers = Vec::new();
        let mut at = 0;
        for length in cuts.iter().copied().chain([usize::MAX]) {
            let length = length.min(body.len() - at);
            if length > 0 {
                buffers.push(Buffer {
                    gpa: memory.buffer.gpa(at),
                    bytes: length as u32,
                    writable: false,
                });
            }
            at += length;
        }
        buffers.push(Buffer {
            gpa: memory.buffer.gpa(answer_at),
            bytes: 1,
            writable: true,
        });
        let table = (self.inner.indirect && buffers.len() > 1).then_some(&memory.table);
        self.inner.ring.push(&buffers, table)?;
        self.inner.publish()?;
        let start = Instant::now();
        let written = loop {
            if let Some((_, written)) = self.inner.ring.pop().context("control queue")? {
                break written;
            }
            let left = self.timeout.saturating_sub(start.elapsed());
            ensure!(!left.is_zero(), "no answer on the control queue");
            self.inner.wait(left)?;
        };
        self.inner.free.push_back(slot);
        ensure!(written == 1, "an answer of {written} bytes");
        let mut answer = [0];
        memory.buffer.read(answer_at, &mut answer);
        ensure!(
            matches!(answer[0], OK | ERROR),
            "answer {:#x} on the control queue",
            answer[0]
        );
        Ok(answer[0] == OK)
    }
}

/// Body of `MAC_TABLE_SET`: unicast, then multicast addresses.
pub fn mac_table(unicast: &[[u8; 6]], multicast: &[[u8; 6]]) -> Vec<u8> {
    let mut body = Vec::new();
    for list in [unicast, multicast] {
        body.extend_from_slice(&(list.len() as u32).to_le_bytes());
        body.extend_from_slice(list.as_flattened());
    }
    body
}
