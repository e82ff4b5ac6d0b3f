//! What the guest's kernel says about its disk, its power button and its troubles.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use serde_json::{Value, json};

/// The disk under test.
pub(crate) const DISK: &str = "/dev/vda";

const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Words in the kernel's log that no healthy device causes.
const COMPLAINTS: [&str; 9] = [
    "I/O error",
    "EXT4-fs error",
    "EXT4-fs warning",
    "JBD2: Error",
    "Remounting filesystem read-only",
    "blocked for more than",
    "rcu_sched self-detected",
    "NETDEV WATCHDOG",
    "virtio_net virtio",
];

/// The first answer: what the guest has.
pub(crate) fn ready() -> Value {
    let attribute = |name: &str| {
        let text = fs::read_to_string(Path::new("/sys/block/vda").join(name));
        text.unwrap_or_default().trim().to_owned()
    };
    json!({
        "event": "ready",
        "cpus": thread::available_parallelism().map_or(0, |count| count.get()),
        "queues": fs::read_dir("/sys/block/vda/mq").map_or(0, Iterator::count),
        "bytes": disk_bytes().unwrap_or(0),
        "serial": attribute("serial"),
        "packed": is_packed(),
        "write_cache": attribute("queue/write_cache"),
    })
}

/// Whether the disk's rings are packed: feature 34 of its virtio device, which are listed as digits.
fn is_packed() -> bool {
    const RING_PACKED: usize = 34;
    let features = fs::read("/sys/block/vda/device/features").unwrap_or_default();
    features.get(RING_PACKED) == Some(&b'1')
}

/// Size of the disk in bytes, as the kernel sees it now.
pub(crate) fn disk_bytes() -> Result<u64> {
    let sectors = fs::read_to_string("/sys/block/vda/size").context("read the disk's size")?;
    Ok(sectors
        .trim()
        .parse::<u64>()
        .context("parse the disk's size")?
        * 512)
}

/// Waits until the disk has this size; the kernel announces each change of it.
pub(crate) fn wait_for_size(bytes: u64) -> Result<Value> {
    const KERNEL_EVENTS: u32 = 1;
    let kernel = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkKObjectUEvent,
    )
    .context("open the kernel's event socket")?;
    bind(kernel.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS))
        .context("listen to the kernel")?;
    let mut message = [0; 4096];
    while disk_bytes()? != bytes {
        recv(kernel.as_raw_fd(), &mut message, MsgFlags::empty()).context("wait for the kernel")?;
    }
    Ok(json!({"event": "size", "bytes": bytes}))
}

/// The key that ACPI's power button sends; presses count from its opening.
pub(crate) struct PowerButton(File);

impl PowerButton {
    pub(crate) fn open() -> Result<Self> {
        for entry in fs::read_dir("/sys/class/input").context("list the input devices")? {
            let entry = entry.context("list the input devices")?;
            // Only those that evdev serves have a node of that name.
            let node = Path::new("/dev/input").join(entry.file_name());
            let name = fs::read_to_string(entry.path().join("device/name")).unwrap_or_default();
            if node.exists() && name.trim() == "Power Button" {
                return Ok(Self(File::open(node).context("open the power button")?));
            }
        }
        bail!("the guest has no power button")
    }

    /// Waits for a press.
    pub(crate) fn wait(mut self) -> Result<Value> {
        // struct input_event: 16 bytes of time, then type and code (16 bits each) and the value (32 bits).
        let mut event = [0; 24];
        loop {
            self.0
                .read_exact(&mut event)
                .context("read the power button")?;
            let kind = u16::from_le_bytes([event[16], event[17]]);
            let code = u16::from_le_bytes([event[18], event[19]]);
            if (kind, code) == (EV_KEY, KEY_POWER) {
                return Ok(json!({"event": "pressed"}));
            }
        }
    }
}

/// The lines of the kernel's log that tell of trouble.
pub(crate) fn kernel_complaints() -> Result<Value> {
    let mut log = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .context("open the kernel's log")?;
    let mut lines = Vec::new();
    let mut record = [0; 8192];
    loop {
        match log.read(&mut record) {
            Ok(length) => {
                let text = String::from_utf8_lossy(&record[..length])
                    .trim_end()
                    .to_owned();
                if COMPLAINTS.iter().any(|words| text.contains(words)) {
                    lines.push(text);
                }
            }
            // The oldest record was overwritten while it was being read.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => bail!("read the kernel's log: {error}"),
        }
    }
    Ok(json!({"event": "log", "complaints": lines}))
}

/// Runs a program of the guest.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("run {program}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        errors.trim()
    );
    Ok(())
}
