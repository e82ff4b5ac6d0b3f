//! A node as a virtio-blk disk over vhost-user (virtio 1.2 section 5.2).
//!
//! ```text
//!   control thread:  VhostUserBlk ── Server ── device::Disk ── Root
//!   queue thread i:  vhost_daemon::Queue ──Chain──> request::Handler ── RootHandle
//! ```
//!
//! Promises: requests are checked against the disk's size and block size before the node sees
//! them; a guest error is a status byte, never more; a resized node reaches the guest as a config
//! change.

mod config;
mod device;
mod request;

use std::rc::Rc;
use std::sync::Arc;

use block::accounting::Accounting;
use block::edge::Permissions;
use block::error::{Error, ErrorKind, Result};
use block::{Errno, Node, Root};
use executor::Handle;
use executor::sync::Mutex;
use vhost_daemon::{Address, Server};

use device::Disk;

/// Most queues of one export.
const MAX_QUEUES: u16 = 256;
/// Smallest logical block size in bytes.
const MIN_BLOCK_SIZE: u32 = 512;
/// Largest logical block size in bytes.
const MAX_BLOCK_SIZE: u32 = 2 << 20;
/// Longest serial in bytes (`VIRTIO_BLK_ID_BYTES`).
const MAX_SERIAL: usize = 20;

/// Options of a vhost-user-blk export (`BlockExportOptionsVhostUserBlk` and more).
pub struct VhostUserBlkOptions {
    /// The export's id, for log lines.
    pub id: String,
    /// `addr`
    pub address: Address,
    /// `writable`; false offers `VIRTIO_BLK_F_RO`.
    pub writable: bool,
    /// `logical-block-size` in bytes: a power of two from 512 to 2 MiB.
    pub logical_block_size: u32,
    /// `physical-block-size` in bytes: a power of two from the logical one, which is the default,
    /// to 2 MiB.
    pub physical_block_size: Option<u32>,
    /// `writethrough`: what completes is stable, whatever cache mode the guest chooses.
    pub writethrough: bool,
    /// `secure-erase`: offers `VIRTIO_BLK_F_SECURE_ERASE`, which overwrites in place.
    pub secure_erase: bool,
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
            physical_block_size: None,
            writethrough: false,
            secure_erase: false,
            num_queues: 1,
            queue_size_max: 1024,
            serial: "vhost_user_blk".to_owned(),
            iothreads: Vec::new(),
        }
    }

    fn physical_block_size(&self) -> u32 {
        self.physical_block_size.unwrap_or(self.logical_block_size)
    }

    fn check(&self) -> Result<()> {
        let invalid = |message: String| Err(Error::new(ErrorKind::Invalid, message));
        if self.num_queues == 0 {
            return invalid("num-queues must be greater than 0".to_owned());
        }
        if self.num_queues > MAX_QUEUES {
            return invalid(format!("num-queues must not be greater than {MAX_QUEUES}"));
        }
        check_block_size(&self.id, "logical-block-size", self.logical_block_size)?;
        let physical = self.physical_block_size();
        check_block_size(&self.id, "physical-block-size", physical)?;
        if physical < self.logical_block_size {
            return invalid("logical_block_size > physical_block_size not supported".to_owned());
        }
        if self.secure_erase && !self.writable {
            return invalid("secure-erase needs a writable export".to_owned());
        }
        let size = self.queue_size_max;
        if !size.is_power_of_two() || !(2..=32768).contains(&size) {
            return invalid(format!(
                "queue-size {size} is not a power of 2 between 2 and 32768"
            ));
        }
        if self.serial.len() > MAX_SERIAL {
            return invalid(format!("serial is longer than {MAX_SERIAL} bytes"));
        }
        Ok(())
    }
}

/// Checks a block size as QEMU's device properties do.
fn check_block_size(id: &str, name: &str, size: u32) -> Result<()> {
    let invalid = |message: String| Err(Error::new(ErrorKind::Invalid, message));
    if !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&size) {
        return invalid(format!(
            "Property {id}.{name} doesn't take value {size} \
             (minimum: {MIN_BLOCK_SIZE}, maximum: {MAX_BLOCK_SIZE})"
        ));
    }
    if !size.is_power_of_two() {
        return invalid(format!(
            "Property {id}.{name} doesn't take value '{size}', it's not a power of 2"
        ));
    }
    Ok(())
}

/// A running vhost-user-blk export. Lives on the control thread.
pub struct VhostUserBlk {
    accounting: Arc<Accounting>,
    /// Locked while queues move or the export stops; `None` once it has.
    served: Mutex<Option<Served>>,
}

/// What a running export holds.
struct Served {
    server: Server,
    disk: Rc<Disk>,
}

impl VhostUserBlk {
    /// Starts exporting `node` on the current executor as the control thread. A unix path is bound
    /// when this returns.
    ///
    /// # Errors
    /// `Invalid` for an option out of range, `Busy` when the node's users do not tolerate it, `Io`
    /// when the socket cannot be bound.
    pub fn start(node: &Arc<Node>, mut options: VhostUserBlkOptions) -> Result<Self> {
        options.check()?;
        let root = take_root(node, &options)?;
        if options.iothreads.is_empty() {
            options.iothreads.push(Handle::current());
        }
        let disk = Rc::new(Disk::new(root.clone(), &options));
        let place = match &options.address {
            Address::Listen(path) => format!("Failed to bind socket to {}", path.display()),
            _ => format!("export '{}': cannot use its socket", options.id),
        };
        let server = Server::start(disk.clone(), options.address).map_err(|error| {
            let errno = error.raw_os_error().unwrap_or(Errno::EIO as i32);
            Error::io(place, Errno::from_raw(errno))
        })?;
        let changed = server.config_changed();
        root.on_resize(Box::new(move |_length| changed.notify_all()));
        Ok(VhostUserBlk {
            accounting: Arc::clone(disk.accounting()),
            served: Mutex::new(Some(Served { server, disk })),
        })
    }

    /// Serves the queues on other threads from now on: queue `i` on number `i % len`, on the current
    /// executor when there is none. Each queue that moves finishes what it has in flight and goes
    /// on where it was; the others notice nothing.
    ///
    /// # Errors
    /// `Invalid` when a ring cannot start on its new thread; it is stopped then.
    pub async fn set_threads(&self, mut threads: Vec<Handle>) -> Result<()> {
        if threads.is_empty() {
            threads.push(Handle::current());
        }
        let served = self.served.lock().await;
        let Some(Served { disk, .. }) = &*served else {
            return Ok(());
        };
        let moved = disk.set_threads(threads).await;
        moved.map_err(|error| Error::new(ErrorKind::Invalid, error.to_string()))
    }

    /// The node that it shows; `None` while it stops or moves.
    pub fn node(&self) -> Option<Arc<Node>> {
        let served = self.served.try_lock()?;
        let served = served.as_ref()?;
        Some(Arc::clone(served.disk.root().node()))
    }

    /// What its requests came to.
    pub fn accounting(&self) -> &Arc<Accounting> {
        &self.accounting
    }

    /// Ends the front-end's session, completes every request in flight, releases the node.
    pub async fn stop(&self) {
        if let Some(Served { server, disk }) = self.served.lock().await.take() {
            // What limits hold back would keep it from ending.
            let _hurried = disk.root().hurry();
            server.stop().await;
            drop(disk);
        }
    }
}

/// A root with the permissions that an export needs. It tolerates everything from others, as an
/// export of qemu-storage-daemon does.
fn take_root(node: &Arc<Node>, options: &VhostUserBlkOptions) -> Result<Root> {
    let permissions = Permissions {
        consistent_read: true,
        write: options.writable,
        ..Permissions::default()
    };
    let shared = Permissions {
        consistent_read: true,
        write: true,
        write_unchanged: true,
        resize: true,
    };
    Root::new("", node, permissions, shared)
}

#[cfg(test)]
mod tests;
