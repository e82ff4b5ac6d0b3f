//! Dirty logging of a session: when it is on, where it goes, and that it can hold what it must.
//!
//! ```text
//!   SET_LOG_BASE ──> log        SET_FEATURES(LOG_ALL) ──> on
//!   SET_VRING_ADDR(F_LOG) ──> the ring's own pages, too
//! ```
//! A ring that runs is told of each change between two batches and the message is answered after
//! that, so that the front-end may read an old log to its end once its successor is acknowledged.
//! While logging is on without a log, rings wait for it as they wait for memory.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{Answer, F_LOG_ALL, Protocol, Reply, Session, SessionError};
use crate::device::Device;
use crate::dirty_log::{DirtyLog, RingLog};
use crate::memory::MemoryTable;
use crate::queue::QueueChange;
use crate::ring::logged_len;
use crate::wire::LogSpec;

impl<D: Device> Session<D> {
    /// The log of ring `index`, while logging is on.
    pub(super) fn ring_log(&self, index: u16) -> Option<RingLog> {
        if self.features & F_LOG_ALL == 0 {
            return None;
        }
        let vring = self.vrings.get(usize::from(index))?;
        Some(RingLog {
            log: self.log.clone()?,
            used_at: vring.log_at,
        })
    }

    /// Whether logging is on and nowhere to go.
    pub(super) fn lacks_log(&self) -> bool {
        self.features & F_LOG_ALL != 0 && self.log.is_none()
    }

    /// Checks that with these features and this memory every write can be logged.
    pub(super) fn check_logging(
        &self,
        features: u64,
        memory: &MemoryTable,
    ) -> Result<(), SessionError> {
        if features & F_LOG_ALL == 0 {
            return Ok(());
        }
        match &self.log {
            Some(log) => self.check_log(log, memory),
            None if self.vrings.iter().any(|vring| vring.running) => Err(SessionError::NoLog),
            None => Ok(()),
        }
    }

    fn check_log(&self, log: &DirtyLog, memory: &MemoryTable) -> Result<(), SessionError> {
        if let Some(last) = memory.last_address() {
            log.check_covers(last)?;
        }
        for vring in &self.vrings {
            if let Some(address) = vring.log_at {
                let len = logged_len((vring.size, self.layout()));
                log.check_covers(address.saturating_add(len - 1))?;
            }
        }
        Ok(())
    }

    pub(super) async fn set_log_base(&mut self, spec: LogSpec, fd: OwnedFd) -> Reply {
        self.need(Protocol::LOG_SHMFD, "LOG_SHMFD")?;
        let log = Arc::new(DirtyLog::adopt(&spec, fd)?);
        if self.features & F_LOG_ALL != 0 {
            self.check_log(&log, &self.memory)?;
        }
        self.log = Some(log);
        self.tell_rings_about_log().await;
        for index in 0..self.vrings.len() as u16 {
            self.maybe_start(index).await?;
        }
        Ok(Answer::number(0))
    }

    /// Lets the rings that run log as it is now wanted.
    pub(super) async fn tell_rings_about_log(&self) {
        for (vring, index) in self.vrings.iter().zip(0..) {
            if vring.running {
                let change = QueueChange::Log(self.ring_log(index));
                self.device.change_queue(index, change).await;
            }
        }
    }
}
