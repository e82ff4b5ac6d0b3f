//! The seam between the vhost-user session and a device.
//!
//! A [`Device`] lives on the control thread. It says what it offers and where its queues run; how
//! rings are served is hidden behind [`Device::start_queue`] and [`Device::stop_queue`], which
//! most devices implement with [`crate::queue::QueueRemote`].

use std::future::Future;

use crate::queue::{QueueChange, QueueError, QueueSetup};

/// Why a device refuses a value that the front-end set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The range is outside of the configuration space or not writable.
    #[error("config bytes {offset}..{end} cannot be written")]
    ReadOnlyConfig {
        /// First byte.
        offset: u64,
        /// One past the last byte.
        end: u64,
    },
    /// The device has no such thing.
    #[error("the device has no {0}")]
    Unsupported(&'static str),
    /// The value makes no sense.
    #[error("invalid value for {0}")]
    InvalidValue(&'static str),
}

/// A virtio device behind a vhost-user socket. Every call comes from the control thread.
pub trait Device: 'static {
    /// Short name for log lines: the export's or device's id.
    fn name(&self) -> &str;
    /// Virtio feature bits offered, those of the ring included, bit 30 not.
    fn features(&self) -> u64;
    /// Protocol feature bits offered, a subset of [`crate::session::PROTOCOL_FEATURES`] and
    /// [`crate::session::NET_PROTOCOL_FEATURES`].
    fn protocol_features(&self) -> u64;
    /// The front-end acknowledged these of them. No queue runs.
    fn set_features(&self, acked: u64);
    /// Number of queues, at most 256.
    fn queue_count(&self) -> u16;
    /// Largest ring size in descriptors, a power of two.
    fn max_queue_size(&self) -> u16;
    /// The whole configuration space as it is now.
    fn config(&self) -> Vec<u8>;
    /// Writes part of the configuration space.
    ///
    /// # Errors
    /// [`DeviceError`] when the bytes are not writable or the value is invalid.
    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), DeviceError>;
    /// The front-end tells the MTU that the guest is to use, in bytes (NET_SET_MTU).
    ///
    /// # Errors
    /// [`DeviceError`] when the device has none or the value is out of range.
    fn set_mtu(&self, _mtu: u16) -> Result<(), DeviceError> {
        Err(DeviceError::Unsupported("MTU"))
    }
    /// The guest of this address has come here from another host: the network has to learn that (SEND_RARP).
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] when the device is on no network.
    fn send_rarp(&self, _address: [u8; 6]) -> Result<(), DeviceError> {
        Err(DeviceError::Unsupported("network"))
    }
    /// Whether ring `index` runs on while the front-end has it disabled, as the text wants where that has no effect outside: the
    /// device is told by [`QueueSetup::enabled`] and [`QueueChange`]. Other rings are stopped until they are enabled.
    fn serves_disabled(&self, _index: u16) -> bool {
        false
    }
    /// Starts serving a ring. It is not running.
    fn start_queue(&self, setup: QueueSetup) -> impl Future<Output = Result<(), QueueError>>;
    /// Changes something of a running queue at a point where no descriptor is half parsed.
    fn change_queue(&self, index: u16, change: QueueChange) -> impl Future<Output = ()>;
    /// Stops a running queue once every request in flight is completed and published. Gives
    /// where a successor goes on, as GET_VRING_BASE tells it.
    fn stop_queue(&self, index: u16) -> impl Future<Output = u32>;
    /// Back to the state before any front-end was there. No queue runs.
    fn reset(&self);
}
