//! The kernel's client: `-c` and `-d`, by the ioctls of `/dev/nbdX` (`include/uapi/linux/nbd.h`).
//!
//! ```text
//!   own thread:  connect to our server ─► handshake ─► sizes, flags, socket ─► NBD_DO_IT … until disconnected
//!   another:     the device has its size ─► partitions are looked for ─► connected
//! ```
//!
//! NBD_DO_IT sets the size and says nothing, so the device is asked for it now and then until it has one.
#![expect(unsafe_code, reason = "ioctls of the kernel's block device")]

use crate::address::{Address, failure};
use crate::client::{Client, Export, Greeted};
use executor::{Config, Executor};
use nix::errno::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tools::failure::{Failure, Outcome};
use transport::Connection;

mod ioctls {
    nix::ioctl_write_int_bad!(set_sock, 0xab00);
    nix::ioctl_write_int_bad!(set_blksize, 0xab01);
    nix::ioctl_none_bad!(do_it, 0xab03);
    nix::ioctl_none_bad!(clear_sock, 0xab04);
    nix::ioctl_none_bad!(clear_que, 0xab05);
    nix::ioctl_none_bad!(disconnect, 0xab08);
    nix::ioctl_write_int_bad!(set_flags, 0xab0a);
    // BLKGETSIZE64
    nix::ioctl_read!(size, 0x12, 114, u64);
}

const SECTOR: u64 = 512;

/// `NBD_SET_SIZE_BLOCKS`, whose argument is an unsigned long: an int holds the sectors of 1 TiB only.
const SET_SIZE_BLOCKS: libc::Ioctl = 0xab07;

/// Time between two looks at the size of a device.
const SIZE_PAUSE: Duration = Duration::from_millis(1);

/// Disconnects a device.
pub(crate) fn disconnect(device: &str) -> Outcome {
    let opened = File::options().read(true).write(true).open(device);
    let file = opened.map_err(|error| failure(&format!("Cannot open {device}"), &error))?;
    let fd = file.as_raw_fd();
    // SAFETY: these requests take no pointer.
    let done = unsafe {
        ioctls::clear_que(fd)
            .and_then(|_| ioctls::disconnect(fd))
            .and_then(|_| ioctls::clear_sock(fd))
    };
    match done {
        Ok(_) => {
            println!("{device} disconnected");
            Ok(0)
        }
        Err(errno) => Err(Failure::message(format!(
            "Failed to disconnect {device}: {}",
            block::error::reason(errno)
        ))),
    }
}

/// Opens a device, so that a mistake shows before anything is served.
pub(crate) fn open(device: &str) -> Result<File, Failure> {
    let opened = File::options().read(true).write(true).open(device);
    opened.map_err(|error| failure(&format!("Failed to open {device}"), &error))
}

/// What becomes of a device.
pub(crate) enum Progress {
    /// It shows the export.
    Connected,
    /// It was disconnected, or never connected.
    Ended(Result<(), Failure>),
}

/// A device and what it is to show.
pub(crate) struct Attachment {
    /// The device, open.
    pub(crate) device: File,
    /// Its path.
    pub(crate) path: String,
    /// Where the server is.
    pub(crate) address: Address,
    /// What the export is called.
    pub(crate) export_name: String,
}

/// Connects a device to a server, on a thread of its own, which ends when the device is disconnected; `hear` is told of both.
pub(crate) fn connect(
    attachment: Attachment,
    hear: impl Fn(Progress) + Send + Sync + 'static,
) -> std::io::Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name("nbd-client".to_owned());
    thread.spawn(move || {
        let ended = attach(&attachment, &hear);
        hear(Progress::Ended(ended));
    })
}

fn attach(attachment: &Attachment, hear: &(impl Fn(Progress) + Sync)) -> Result<(), Failure> {
    let executor = Executor::new(&Config::default())
        .map_err(|error| failure("Cannot start the client", &error))?;
    let negotiated = negotiate(&attachment.address, &attachment.export_name);
    let (connection, export) = executor.block_on(negotiated)?;
    let fd = attachment.device.as_raw_fd();
    let blocks: libc::c_ulong = export.size / SECTOR;
    let failed =
        |what: &str, errno| Failure::message(format!("{what}: {}", block::error::reason(errno)));
    // SAFETY: these requests take no pointer; the socket stays open until `do_it` has returned.
    unsafe {
        ioctls::set_sock(fd, connection.as_raw_fd())
            .map_err(|errno| failed("Failed to set NBD socket", errno))?;
        ioctls::set_blksize(fd, SECTOR as i32)
            .and_then(|_| Errno::result(libc::ioctl(fd, SET_SIZE_BLOCKS, blocks)))
            .map_err(|errno| failed("Failed setting size", errno))?;
        ioctls::set_flags(fd, i32::from(export.flags.bits()))
            .map_err(|errno| failed("Failed setting flags", errno))?;
    }
    let over = AtomicBool::new(false);
    let ended = std::thread::scope(|scope| {
        scope.spawn(|| {
            if has_size(attachment, export.size, &over) {
                hear(Progress::Connected);
            }
        });
        // SAFETY: as above.
        let ended = unsafe { ioctls::do_it(fd) };
        over.store(true, Ordering::Relaxed);
        ended
    });
    // SAFETY: as above.
    let _ = unsafe { ioctls::clear_que(fd).and_then(|_| ioctls::clear_sock(fd)) };
    match ended {
        // The device was disconnected.
        Ok(_) | Err(Errno::EPIPE) => Ok(()),
        Err(errno) => Err(failed("The kernel's client failed", errno)),
    }
}

/// Waits until the device has its size, and has its partitions looked for; false when it is over before.
fn has_size(attachment: &Attachment, size: u64, over: &AtomicBool) -> bool {
    let fd = attachment.device.as_raw_fd();
    while !over.load(Ordering::Relaxed) {
        let mut shown = 0;
        // SAFETY: the pointer is to a u64 that is there.
        let asked = unsafe { ioctls::size(fd, &raw mut shown) };
        if asked.is_ok() && shown == size {
            // Whoever opens it first has the kernel look for them.
            drop(File::open(&attachment.path));
            return true;
        }
        std::thread::sleep(SIZE_PAUSE);
    }
    false
}

async fn negotiate(address: &Address, export_name: &str) -> Result<(Connection, Export), Failure> {
    let connection = Connection::plain(address.connect().await?);
    match Client::greet(connection).await? {
        Greeted::Options(mut client) => {
            let export = client.go(export_name).await?;
            Ok((client.into_connection(), export))
        }
        Greeted::Oldstyle(_) => Err(Failure::message("Unexpected server")),
    }
}
