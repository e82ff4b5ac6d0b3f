//! The disk as the vhost-user session sees it: features, configuration, queues.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::Root;
use block::accounting::Accounting;
use executor::Handle;
use executor::sync::Mutex;
use vhost_daemon::queue::QueueChange;
use vhost_daemon::session::PROTOCOL_FEATURES;
use vhost_daemon::{Device, DeviceError, QueueError, QueueRemote, QueueSetup};
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::config::{Geometry, WRITEBACK_OFFSET};
use super::request::BlkHandler;
use super::{MAX_SERIAL, VhostUserBlkOptions};

/// What the queue threads of a disk share.
pub(super) struct Traits {
    /// Whether writes are allowed.
    pub(super) writable: bool,
    /// Logical block size in bytes; requests are multiples of it.
    pub(super) block_size: u32,
    /// What GET_ID answers, padded with zeroes.
    pub(super) serial: [u8; MAX_SERIAL],
    /// Whether completed writes may still be volatile until a flush.
    pub(super) writeback: AtomicBool,
    /// Whether they may not, whatever the guest says.
    pub(super) writethrough: bool,
    /// Whether SECURE_ERASE is offered.
    pub(super) secure_erase: bool,
}

impl Traits {
    /// Whether what completes has to be stable.
    #[inline]
    pub(super) fn completes_stable(&self) -> bool {
        self.writethrough || !self.writeback.load(Ordering::Relaxed)
    }
}

/// A queue that runs.
struct Running {
    remote: QueueRemote,
    thread: Handle,
    /// What it would start with elsewhere, but for the base.
    setup: QueueSetup,
}

/// The device behind an export.
pub(super) struct Disk {
    id: String,
    root: Root,
    accounting: Arc<Accounting>,
    traits: Arc<Traits>,
    num_queues: u16,
    queue_size_max: u16,
    physical_block_size: u32,
    threads: RefCell<Vec<Handle>>,
    /// Locked while a queue starts, changes, moves or stops, so that these never mix.
    queues: Vec<Mutex<Option<Running>>>,
    acked: Cell<u64>,
}

const fn bit(number: u32) -> u64 {
    1 << number
}

impl Disk {
    /// The disk's root.
    pub(super) fn root(&self) -> &Root {
        &self.root
    }
    /// What its requests came to.
    pub(super) fn accounting(&self) -> &Arc<Accounting> {
        &self.accounting
    }
    /// A disk over `root`. The options were checked and name at least one thread.
    pub(super) fn new(root: Root, options: &VhostUserBlkOptions) -> Disk {
        let mut serial = [0; MAX_SERIAL];
        serial[..options.serial.len()].copy_from_slice(options.serial.as_bytes());
        let traits = Traits {
            writable: options.writable,
            block_size: options.logical_block_size,
            serial,
            writeback: AtomicBool::new(!options.writethrough),
            writethrough: options.writethrough,
            secure_erase: options.secure_erase,
        };
        Disk {
            id: options.id.clone(),
            root,
            accounting: Accounting::new(),
            traits: Arc::new(traits),
            num_queues: options.num_queues,
            queue_size_max: options.queue_size_max,
            physical_block_size: options.physical_block_size(),
            threads: RefCell::new(options.iothreads.clone()),
            queues: (0..options.num_queues).map(|_| Mutex::new(None)).collect(),
            acked: Cell::new(0),
        }
    }

    /// The thread of queue `index`.
    fn thread(&self, index: usize) -> Handle {
        let threads = self.threads.borrow();
        threads[index % threads.len()].clone()
    }

    /// The thread of each queue.
    #[cfg(test)]
    pub(super) fn threads(&self) -> Vec<Handle> {
        (0..self.queues.len())
            .map(|index| self.thread(index))
            .collect()
    }

    /// Serves the queues on these threads, at least one, from now on.
    pub(super) async fn set_threads(&self, threads: Vec<Handle>) -> Result<(), QueueError> {
        self.threads.replace(threads);
        for (index, queue) in self.queues.iter().enumerate() {
            let mut queue = queue.lock().await;
            let thread = self.thread(index);
            if queue.as_ref().is_some_and(|q| !q.thread.is_same(&thread))
                && let Some(Running {
                    remote, mut setup, ..
                }) = queue.take()
            {
                let stopped = remote.stop().await.ok_or(QueueError::ThreadEnded)?;
                (setup.base, setup.state) = (stopped.base, stopped.state);
                *queue = Some(self.run(setup, thread).await?);
            }
        }
        Ok(())
    }

    /// Starts a queue on `thread`.
    async fn run(&self, setup: QueueSetup, thread: Handle) -> Result<Running, QueueError> {
        let (root, traits) = (self.root.clone(), self.traits.clone());
        let accounting = Arc::clone(&self.accounting);
        let make = move || BlkHandler::new(root.attach(), traits, accounting.attach());
        let remote = QueueRemote::start(&thread, setup.clone(), make).await?;
        Ok(Running {
            remote,
            thread,
            setup,
        })
    }

    fn has(&self, feature: u32) -> bool {
        self.acked.get() & bit(feature) != 0
    }
}

impl Device for Disk {
    fn name(&self) -> &str {
        &self.id
    }

    fn features(&self) -> u64 {
        let mut features = bit(VIRTIO_F_VERSION_1)
            | bit(VIRTIO_F_RING_PACKED)
            | bit(VIRTIO_RING_F_INDIRECT_DESC)
            | bit(VIRTIO_RING_F_EVENT_IDX)
            | bit(blk::VIRTIO_BLK_F_SIZE_MAX)
            | bit(blk::VIRTIO_BLK_F_SEG_MAX)
            | bit(blk::VIRTIO_BLK_F_BLK_SIZE)
            | bit(blk::VIRTIO_BLK_F_TOPOLOGY)
            | bit(blk::VIRTIO_BLK_F_FLUSH)
            | bit(blk::VIRTIO_BLK_F_CONFIG_WCE);
        if self.num_queues > 1 {
            features |= bit(blk::VIRTIO_BLK_F_MQ);
        }
        if self.traits.writable {
            features |= bit(blk::VIRTIO_BLK_F_DISCARD) | bit(blk::VIRTIO_BLK_F_WRITE_ZEROES);
        } else {
            features |= bit(blk::VIRTIO_BLK_F_RO);
        }
        if self.traits.secure_erase {
            features |= bit(blk::VIRTIO_BLK_F_SECURE_ERASE);
        }
        features
    }

    fn protocol_features(&self) -> u64 {
        PROTOCOL_FEATURES
    }

    fn set_features(&self, acked: u64) {
        self.acked.set(acked);
        // A driver that can neither flush nor turn the cache off relies on every completed write
        // being stable (virtio 1.2 section 5.2.6.2).
        if !self.has(blk::VIRTIO_BLK_F_CONFIG_WCE) {
            let writeback = self.has(blk::VIRTIO_BLK_F_FLUSH);
            self.traits.writeback.store(writeback, Ordering::Relaxed);
        }
    }

    fn queue_count(&self) -> u16 {
        self.num_queues
    }

    fn max_queue_size(&self) -> u16 {
        self.queue_size_max
    }

    fn config(&self) -> Vec<u8> {
        let node = self.root.node();
        let geometry = Geometry {
            length: node.length(),
            block_size: self.traits.block_size,
            physical_block_size: self.physical_block_size,
            writable: self.traits.writable,
            secure_erase: self.traits.secure_erase,
            num_queues: self.num_queues,
            writeback: self.traits.writeback.load(Ordering::Relaxed),
            limits: node.driver().limits(),
        };
        geometry.encode()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        match data {
            [value @ 0..=1] if offset as usize == WRITEBACK_OFFSET => {
                self.traits.writeback.store(*value == 1, Ordering::Relaxed);
                Ok(())
            }
            [_] if offset as usize == WRITEBACK_OFFSET => {
                Err(DeviceError::InvalidValue("writeback"))
            }
            _ => Err(DeviceError::ReadOnlyConfig {
                offset: u64::from(offset),
                end: u64::from(offset) + data.len() as u64,
            }),
        }
    }

    async fn start_queue(&self, setup: QueueSetup) -> Result<(), QueueError> {
        let index = usize::from(setup.index);
        let mut queue = self.queues[index].lock().await;
        *queue = Some(self.run(setup, self.thread(index)).await?);
        Ok(())
    }

    async fn change_queue(&self, index: u16, change: QueueChange) {
        let mut queue = self.queues[usize::from(index)].lock().await;
        if let Some(running) = &mut *queue {
            running.setup.apply(change.clone());
            running.remote.change(change).await;
        }
    }

    async fn stop_queue(&self, index: u16) -> u32 {
        let mut queue = self.queues[usize::from(index)].lock().await;
        match queue.take() {
            Some(running) => running
                .remote
                .stop()
                .await
                .map_or(0, |stopped| stopped.base),
            None => 0,
        }
    }

    fn reset(&self) {
        self.acked.set(0);
        let writeback = !self.traits.writethrough;
        self.traits.writeback.store(writeback, Ordering::Relaxed);
    }
}
