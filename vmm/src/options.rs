//! The command line: parsing and validation, no side effects.
//!
//! Promises that a value that leaves this module is in range; it must not open or create anything.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use clap::{Parser, ValueEnum};

use crate::vhost_user::Description;
use crate::vhost_user::blk::Disk;

/// Boots a Linux guest on KVM with vhost-user disks.
///
/// The guest's memory and the events of each virtqueue are handed to the back-ends (outboard-blkd or any other
/// vhost-user-blk server); outboard-vmm is not in the data path. A back-end may come late, die and come back:
/// the guest waits and goes on.
#[derive(Debug, Parser)]
#[command(name = "outboard-vmm", version, max_term_width = 100, after_help = EXAMPLES)]
pub(crate) struct Options {
    /// Kernel: a bzImage (64-bit entry) or an ELF vmlinux with a PVH note
    #[arg(long, value_name = "PATH")]
    pub(crate) kernel: PathBuf,

    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub(crate) initrd: Option<PathBuf>,

    /// Kernel command line
    #[arg(long, value_name = "STRING", default_value = "console=ttyS0")]
    pub(crate) cmdline: String,

    /// Number of virtual CPUs (one socket, one thread per core)
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=254))]
    pub(crate) cpus: u8,

    /// Guest memory: MiB, or with a suffix K, M, G, T
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_memory_size)]
    pub(crate) memory: u64,

    /// Back the guest memory with huge pages of the host's default size
    #[arg(long)]
    pub(crate) hugepages: bool,

    /// A disk: socket=PATH[,num-queues=N][,queue-size=N][,id=NAME]; may be given several times.
    ///
    /// socket: where the vhost-user-blk back-end listens (it need not be there yet). num-queues: 1 to 128, default 1.
    /// queue-size: a power of two, 16 to 1024, default 256. id: name in messages and query-pci, default disk0, disk1, ...
    #[arg(long = "vhost-user-blk", value_name = "KEY=VALUE,...")]
    pub(crate) disks: Vec<DiskOptions>,

    /// First serial port: stdio, file:PATH, socket:PATH (a listening UNIX socket) or none
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    pub(crate) serial: SerialOptions,

    /// Listen for QMP clients on this UNIX socket
    #[arg(long, value_name = "PATH")]
    pub(crate) qmp: Option<PathBuf>,

    /// Confine each thread to the system calls that it needs (off: for debugging)
    #[arg(long, value_name = "on|off", default_value = "on")]
    pub(crate) sandbox: Switch,
}

const EXAMPLES: &str = "\
Example:
  outboard-vmm --kernel /boot/vmlinuz --initrd initrd.img --cmdline 'console=ttyS0 root=/dev/vda' \\
      --cpus 2 --memory 1G --vhost-user-blk socket=/run/disk0.sock,num-queues=2 --qmp /run/vm0.qmp

Exit status: 0 after the guest powered off or `quit`, 1 on an error. RUST_LOG=debug shows more on stderr.";

/// `on` or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// Enabled.
    On,
    /// Disabled.
    Off,
}

/// One `--vhost-user-blk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskOptions {
    /// Where the back-end listens.
    pub(crate) socket: PathBuf,
    /// Request queues that the guest sees.
    pub(crate) num_queues: u16,
    /// Largest number of descriptors of one queue.
    pub(crate) queue_size: u16,
    /// Name in messages and answers; `None` for a numbered one.
    pub(crate) id: Option<String>,
}

impl FromStr for DiskOptions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut disk = Self {
            socket: PathBuf::new(),
            num_queues: 1,
            queue_size: 256,
            id: None,
        };
        for (key, value) in key_values(text)? {
            match key.as_str() {
                "socket" => disk.socket = value.into(),
                "num-queues" => disk.num_queues = parse_in_range(&key, &value, 1, 128)?,
                "queue-size" => disk.queue_size = parse_in_range(&key, &value, 16, 1024)?,
                "id" => disk.id = Some(value),
                _ => return Err(format!("unknown key '{key}'")),
            }
        }
        if disk.socket.as_os_str().is_empty() {
            return Err("'socket' is missing".into());
        }
        if !disk.queue_size.is_power_of_two() {
            return Err(format!(
                "queue-size {} is not a power of two",
                disk.queue_size
            ));
        }
        Ok(disk)
    }
}

impl DiskOptions {
    /// The device that the option at place `index` asks for.
    pub(crate) fn describe(&self, index: usize) -> Description {
        Description {
            name: self.id.clone().unwrap_or_else(|| format!("disk{index}")),
            socket: self.socket.clone(),
            queue_size: self.queue_size,
            model: Arc::new(Disk {
                num_queues: self.num_queues,
            }),
        }
    }
}

/// Splits `key=value,key=value`; a doubled comma stands for one inside a value, as in QEMU.
fn key_values(text: &str) -> Result<Vec<(String, String)>, String> {
    const COMMA: &str = "\u{0}";
    text.replace(",,", COMMA)
        .split(',')
        .map(|pair| {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| format!("'{pair}' is not key=value"))?;
            Ok((key.to_owned(), value.replace(COMMA, ",")))
        })
        .collect()
}

fn parse_in_range(key: &str, value: &str, min: u16, max: u16) -> Result<u16, String> {
    value
        .parse()
        .ok()
        .filter(|number| (min..=max).contains(number))
        .ok_or_else(|| format!("{key} '{value}' is not a number from {min} to {max}"))
}

/// Where the serial port goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SerialOptions {
    /// Standard input and output.
    Stdio,
    /// Output appended to a file, no input.
    File(PathBuf),
    /// A listening UNIX socket, one client at a time.
    Socket(PathBuf),
    /// Output thrown away.
    None,
}

impl FromStr for SerialOptions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err("expected stdio, file:PATH, socket:PATH or none".into()),
        }
    }
}

const MIB: u64 = 1 << 20;
/// Largest guest memory: what 40 physical address bits leave, with room for the hole.
const MEMORY_MAX: u64 = 512 << 30;
/// Smallest guest memory in which a kernel could be placed.
const MEMORY_MIN: u64 = 16 * MIB;

fn parse_memory_size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1 << 10),
        Some((at, 'm' | 'M')) => (&text[..at], MIB),
        Some((at, 'g' | 'G')) => (&text[..at], 1 << 30),
        Some((at, 't' | 'T')) => (&text[..at], 1 << 40),
        _ => (text, MIB),
    };
    let bytes = digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(unit))
        .ok_or_else(|| format!("'{text}' is not a size"))?;
    if !(MEMORY_MIN..=MEMORY_MAX).contains(&bytes) {
        return Err("must be from 16M to 512G".into());
    }
    if bytes % (2 * MIB) != 0 {
        return Err("must be a multiple of 2M".into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_options_have_defaults_and_take_all_keys() {
        let disk: DiskOptions = "socket=/run/a.sock".parse().unwrap();
        assert_eq!((disk.num_queues, disk.queue_size, disk.id), (1, 256, None));
        let disk: DiskOptions = "socket=/run/a,,b,num-queues=4,queue-size=64,id=root"
            .parse()
            .unwrap();
        assert_eq!(disk.socket, PathBuf::from("/run/a,b"));
        assert_eq!((disk.num_queues, disk.queue_size), (4, 64));
        assert_eq!(disk.id.as_deref(), Some("root"));
    }

    #[test]
    fn bad_disk_options_are_refused_with_the_reason() {
        for (text, reason) in [
            ("num-queues=1", "'socket' is missing"),
            (
                "socket=a,num-queues=0",
                "num-queues '0' is not a number from 1 to 128",
            ),
            (
                "socket=a,num-queues=129",
                "num-queues '129' is not a number from 1 to 128",
            ),
            (
                "socket=a,queue-size=100",
                "queue-size 100 is not a power of two",
            ),
            ("socket=a,queues=1", "unknown key 'queues'"),
            ("socket", "'socket' is not key=value"),
        ] {
            assert_eq!(text.parse::<DiskOptions>().unwrap_err(), reason);
        }
    }

    #[test]
    fn memory_sizes_take_suffixes_and_are_bounded() {
        assert_eq!(parse_memory_size("512"), Ok(512 * MIB));
        assert_eq!(parse_memory_size("2G"), Ok(2048 * MIB));
        assert_eq!(parse_memory_size("32768K"), Ok(32 * MIB));
        for bad in [
            "",
            "G",
            "1M",
            "17M",
            "99999999999999999999",
            "99999999T",
            "1x",
        ] {
            assert!(parse_memory_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn serial_destinations_are_parsed() {
        assert_eq!("stdio".parse(), Ok(SerialOptions::Stdio));
        assert_eq!("none".parse(), Ok(SerialOptions::None));
        assert_eq!("file:/a:b".parse(), Ok(SerialOptions::File("/a:b".into())));
        assert_eq!("socket:/s".parse(), Ok(SerialOptions::Socket("/s".into())));
        assert!("tty".parse::<SerialOptions>().is_err());
        assert!("file:".parse::<SerialOptions>().is_err());
    }

    #[test]
    fn the_command_line_definition_is_consistent() {
        use clap::CommandFactory;
        Options::command().debug_assert();
    }
}
