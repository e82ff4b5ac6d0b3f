//! A node as a virtio-blk disk over vhost-user (virtio 1.2 section 5.2).

use std::sync::Arc;

use block::Node;
use executor::Handle;
use vhost_daemon::Address;

/// Options of a vhost-user-blk export (`BlockExportOptionsVhostUserBlk` and more).
pub struct VhostUserBlkOptions {
    /// The export's id, for log lines.
    pub id: String,
    /// `addr`
    pub address: Address,
    /// `writable`; false offers `VIRTIO_BLK_F_RO`.
    pub writable: bool,
    /// `logical-block-size` in bytes: a power of two from 512 to 65536.
    pub logical_block_size: u32,
    /// `num-queues`, 1 to 256.
    pub num_queues: u16,
    /// Largest ring size: a power of two from 2 to 32768.
    pub queue_size_max: u16,
    /// What GET_ID answers, at most 20 bytes.
    pub serial: String,
    /// Threads of the queues: queue `i` runs on number `i % len`; empty = the current executor.
    pub iothreads: Vec<Handle>,
}

impl VhostUserBlkOptions {
    /// The defaults of qemu-storage-daemon for `id` on `address`.
    pub fn new(id: &str, address: Address) -> Self {
        Self {
            id: id.to_owned(),
            address,
            writable: false,
            logical_block_size: 512,
            num_queues: 1,
            queue_size_max: 1024,
            serial: String::new(),
            iothreads: Vec::new(),
        }
    }
}

/// A running vhost-user-blk export. Lives on the control thread.
pub struct VhostUserBlk {}

impl VhostUserBlk {
    /// Starts exporting `node` on the current executor as the control thread. A unix path is bound
    /// when this returns.
    ///
    /// # Errors
    /// `Invalid` for an option out of range (in QEMU's words), `Busy` when the node's users do not
    /// tolerate it, `Io` when the socket cannot be bound.
    pub fn start(node: &Arc<Node>, options: VhostUserBlkOptions) -> block::error::Result<Self> {
        todo!()
    }

    /// Ends the front-end's session, completes every request in flight, releases the node.
    pub async fn stop(self) {
        todo!()
    }
}
