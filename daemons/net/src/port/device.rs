//! The port as the vhost-user session sees it.

use std::rc::Rc;

use executor::sync::Mutex;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vhost_daemon::queue::{Begun, QueueChange, RequestQueue};
use vhost_daemon::ring::RingLayout;
use vhost_daemon::session::{NET_PROTOCOL_FEATURES, PROTOCOL_FEATURES};
use vhost_daemon::wire::RingAddresses;
use vhost_daemon::{
    Device, DeviceError, QueueError, QueueRemote, QueueSetup, RingOrigin, RunningQueue,
};

use super::control::Control;
use super::core::{Core, RunningRing, ring_count};
use super::kept::Driver;
use super::options::MIN_MTU;
use crate::frame::MacAddress;

/// The device behind a port.
pub(super) struct NetDevice {
    core: Rc<Core>,
    /// Locked while a queue starts, changes or stops, so that these never mix.
    queues: Vec<Mutex<Option<QueueRemote>>>,
}

impl NetDevice {
    pub(super) fn new(core: Rc<Core>) -> NetDevice {
        let rings = ring_count(&core.options);
        NetDevice {
            queues: (0..rings).map(|_| Mutex::new(None)).collect(),
            core,
        }
    }

    /// Starts the control queue here.
    async fn start_control(&self, setup: &QueueSetup) -> Result<QueueRemote, QueueError> {
        let handler = Control::new(self.core.clone());
        let running = RequestQueue::start(handler, setup, RingOrigin::Used)?;
        self.core.begin_control(
            driver_of(self.core.features(), setup, running.begun()),
            running.begun().was_used,
        );
        self.core.refresh_pairs().await;
        Ok(QueueRemote::here(running as Rc<dyn RunningQueue>))
    }
}

/// The driver with these features whose control queue that of `setup` is.
fn driver_of(features: u64, setup: &QueueSetup, begun: Begun) -> Driver {
    let RingAddresses {
        descriptors,
        available,
        used,
    } = setup.addresses;
    let file = setup.memory.file_of_user(used);
    Driver {
        features,
        ring: [descriptors, available, used, u64::from(setup.size)],
        memory: file.expect("a ring that runs lies in shared memory"),
        returned: match RingLayout::of(setup.features) {
            RingLayout::Split => Some(begun.base as u16),
            RingLayout::Packed => None,
        },
    }
}

impl Device for NetDevice {
    fn name(&self) -> &str {
        &self.core.options.id
    }

    fn features(&self) -> u64 {
        self.core.offered()
    }

    /// Not the inflight region: frames are returned in order, so the used index says where to go on.
    fn protocol_features(&self) -> u64 {
        (PROTOCOL_FEATURES | NET_PROTOCOL_FEATURES) & !Protocol::INFLIGHT_SHMFD.bits()
    }

    fn set_features(&self, acked: u64) {
        self.core.begin(acked);
    }

    fn queue_count(&self) -> u16 {
        ring_count(&self.core.options)
    }

    fn max_queue_size(&self) -> u16 {
        self.core.options.queue_size_max
    }

    fn config(&self) -> Vec<u8> {
        self.core.config()
    }

    /// The front-end may give the guest an address; nothing else is its to decide.
    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        let (0, Ok(bytes)) = (offset, <[u8; 6]>::try_from(data)) else {
            return Err(DeviceError::ReadOnlyConfig {
                offset: u64::from(offset),
                end: u64::from(offset) + data.len() as u64,
            });
        };
        let mac = MacAddress(bytes);
        if mac.is_multicast() || mac == MacAddress::default() {
            return Err(DeviceError::InvalidValue("the address"));
        }
        self.core.set_mac(mac);
        Ok(())
    }

    fn set_mtu(&self, mtu: u16) -> Result<(), DeviceError> {
        if mtu < MIN_MTU {
            return Err(DeviceError::InvalidValue("the MTU"));
        }
        self.core.set_mtu(mtu);
        Ok(())
    }

    fn send_rarp(&self, address: [u8; 6]) -> Result<(), DeviceError> {
        self.core.send_rarp(MacAddress(address));
        Ok(())
    }

    /// Frames of a disabled ring are dropped, and none are given to it; commands wait.
    fn serves_disabled(&self, index: u16) -> bool {
        !self.core.is_control(index)
    }

    async fn start_queue(&self, setup: QueueSetup) -> Result<(), QueueError> {
        let index = setup.index;
        let ring = RunningRing {
            size: setup.size,
            enabled: setup.enabled,
        };
        let mut queue = self.queues[usize::from(index)].lock().await;
        let remote = match self.core.pairs.get(usize::from(index / 2)) {
            Some(pair) if !self.core.is_control(index) => pair.start_ring(setup).await?,
            _ => self.start_control(&setup).await?,
        };
        *queue = Some(remote);
        self.core.note_ring(index, Some(ring));
        Ok(())
    }

    async fn change_queue(&self, index: u16, change: QueueChange) {
        match change {
            QueueChange::Enabled => self.core.note_enabled(index, true),
            QueueChange::Disabled => self.core.note_enabled(index, false),
            _ => {}
        }
        if let Some(queue) = &*self.queues[usize::from(index)].lock().await {
            queue.change(change).await;
        }
    }

    async fn stop_queue(&self, index: u16) -> u32 {
        let queue = self.queues[usize::from(index)].lock().await.take();
        self.core.note_ring(index, None);
        match queue {
            Some(queue) => queue.stop().await.map_or(0, |stopped| stopped.base),
            None => 0,
        }
    }

    fn reset(&self) {
        self.core.reset();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use virtio_bindings::virtio_net as net;

    use super::super::shared::Shared;
    use super::*;
    use crate::link::Offloads;
    use crate::port::PortOptions;

    const PORTS: MacAddress = MacAddress([2; 6]);

    /// A device of that many pairs without their threads.
    fn device(queues: u16) -> NetDevice {
        let options = PortOptions {
            queues,
            ..PortOptions::new("p0", PORTS)
        };
        let shared = Arc::new(Shared::new(options.mac, ring_count(&options)));
        let offloads = (Offloads::NONE, Offloads::NONE);
        let core = Core::new(options, shared, Vec::new(), offloads, Arc::default());
        NetDevice::new(Rc::new(core))
    }

    #[test]
    fn a_front_end_may_give_the_guest_an_address_and_nothing_else() {
        let device = device(1);
        device.write_config(0, &[4; 6]).unwrap();
        assert_eq!(device.config()[..6], [4; 6]);
        device.set_features(0);
        assert_eq!(device.core.state(true).mac, MacAddress([4; 6]));
        for wrong in [[0; 6], [1; 6]] {
            assert!(device.write_config(0, &wrong).is_err(), "{wrong:?}");
        }
        assert!(device.write_config(1, &[4; 6]).is_err());
        assert!(device.write_config(0, &[4; 7]).is_err());
        device.reset();
        assert_eq!(device.config()[..6], [2; 6]);
        assert_eq!(device.core.state(true).mac, PORTS);
    }

    #[test]
    fn the_control_queue_follows_the_last_pair_that_there_could_be() {
        let [control, multiqueue] =
            [net::VIRTIO_NET_F_CTRL_VQ, net::VIRTIO_NET_F_MQ].map(|bit| 1_u64 << bit);
        let device = device(4);
        let controls = |features| {
            device.set_features(features);
            let rings = 0..device.queue_count();
            rings
                .filter(|ring| device.core.is_control(*ring))
                .collect::<Vec<_>>()
        };
        assert_eq!(controls(control), [2]);
        assert_eq!(controls(control | multiqueue), [8]);
        assert!(controls(multiqueue).is_empty());
    }
}
