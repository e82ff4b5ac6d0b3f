//! The kernel's client: `-c` and `-d`, by the ioctls of `/dev/nbdX` (`include/uapi/linux/nbd.h`).
//!
//! ```text
//!   own thread:  connect to our server ─► handshake ─► sizes, flags, socket ─► NBD_DO_IT … until disconnected
//! ```
#![expect(unsafe_code, reason = "ioctls of the kernel's block device")]

use crate::address::{Address, failure};
use crate::client::{Client, Export, Greeted};
use executor::{Config, Executor};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;
use tools::failure::{Failure, Outcome};
use transport::Connection;

mod ioctls {
    nix::ioctl_write_int_bad!(set_sock, 0xab00);
    nix::ioctl_write_int_bad!(set_blksize, 0xab01);
    nix::ioctl_none_bad!(do_it, 0xab03);
    nix::ioctl_none_bad!(clear_sock, 0xab04);
    nix::ioctl_none_bad!(clear_que, 0xab05);
    nix::ioctl_write_int_bad!(set_size_blocks, 0xab07);
    nix::ioctl_none_bad!(disconnect, 0xab08);
    nix::ioctl_write_int_bad!(set_flags, 0xab0a);
}

const SECTOR: u64 = 512;

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

/// Connects the device to the server at `address`, on a thread of its own, which ends when the device is disconnected; then `ended` is
/// called.
pub(crate) fn connect(
    device: File,
    address: Address,
    export_name: String,
    ended: impl FnOnce(Result<(), Failure>) + Send + 'static,
) -> std::io::Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name("nbd-client".to_owned());
    thread.spawn(move || ended(attach(&device, &address, &export_name)))
}

fn attach(device: &File, address: &Address, export_name: &str) -> Result<(), Failure> {
    let executor = Executor::new(&Config::default())
        .map_err(|error| failure("Cannot start the client", &error))?;
    let (connection, export) = executor.block_on(negotiate(address, export_name))?;
    let fd = device.as_raw_fd();
    let blocks = i32::try_from(export.size / SECTOR)
        .map_err(|_| Failure::message("Export too large for the kernel's client"))?;
    let failed =
        |what: &str, errno| Failure::message(format!("{what}: {}", block::error::reason(errno)));
    // SAFETY: these requests take no pointer; the socket stays open until `do_it` has returned.
    unsafe {
        ioctls::set_sock(fd, connection.as_raw_fd())
            .map_err(|errno| failed("Failed to set NBD socket", errno))?;
        ioctls::set_blksize(fd, SECTOR as i32)
            .and_then(|_| ioctls::set_size_blocks(fd, blocks))
            .map_err(|errno| failed("Failed setting size", errno))?;
        ioctls::set_flags(fd, i32::from(export.flags.bits()))
            .map_err(|errno| failed("Failed setting flags", errno))?;
        let ended = ioctls::do_it(fd);
        let _ = ioctls::clear_que(fd).and_then(|_| ioctls::clear_sock(fd));
        match ended {
            // The device was disconnected.
            Ok(_) | Err(nix::errno::Errno::EPIPE) => Ok(()),
            Err(errno) => Err(failed("The kernel's client failed", errno)),
        }
    }
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
