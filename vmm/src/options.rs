//! The command line: parsing and validation, no side effects.
//!
//! Promises that a value that leaves this module is in range; it must not open or create anything.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Parser, ValueEnum};

use crate::vhost_user::net::{MAX_PAIRS, MacAddress};

/// Boots a Linux guest on KVM with vhost-user disks and network cards.
///
/// The guest's memory and the events of each virtqueue are handed to the back-ends (outboard-blkd, outboard-netd or any
/// other vhost-user-blk or vhost-user-net server); outboard-vmm is not in the data path. A back-end may come late, die
/// and come back: the guest waits and goes on.
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

    /// A network card: socket=PATH[,mac=ADDRESS][,mtu=N][,queues=N][,queue-size=N][,ctrl_vq=on|off][,id=NAME]; may be
    /// given several times.
    ///
    /// socket: where the vhost-user-net back-end listens (it need not be there yet). mac, mtu: default the back-end's.
    /// queues: pairs, 1 to 64, default 1. queue-size: a power of two, 32 to 1024, default 256. ctrl_vq: off for a
    /// back-end that offers the control queue and does not serve it, as DPDK does (default on). id: name in messages and
    /// query-pci, default net0, net1, ...
    #[arg(long = "vhost-user-net", value_name = "KEY=VALUE,...")]
    pub(crate) nets: Vec<NetOptions>,

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
      --cpus 2 --memory 1G --vhost-user-blk socket=/run/disk0.sock,num-queues=2 \\
      --vhost-user-net socket=/run/net0.sock,mac=52:54:00:12:34:56,queues=2 --qmp /run/vm0.qmp

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
        check_device(&disk.socket, disk.queue_size)?;
        Ok(disk)
    }
}

/// One `--vhost-user-net`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetOptions {
    /// Where the back-end listens.
    pub(crate) socket: PathBuf,
    /// The guest's address; `None` for the back-end's.
    pub(crate) mac: Option<MacAddress>,
    /// The guest's MTU; `None` for the back-end's.
    pub(crate) mtu: Option<u16>,
    /// Queue pairs that the guest sees.
    pub(crate) queues: u16,
    /// Largest number of descriptors of one queue.
    pub(crate) queue_size: u16,
    /// Whether the back-end gets the control queue, if it offers one.
    pub(crate) ctrl_vq: bool,
    /// Name in messages and answers; `None` for a numbered one.
    pub(crate) id: Option<String>,
}

impl FromStr for NetOptions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        /// Smallest MTU of a device (virtio 1.2, 5.1.4.1).
        const MTU_MIN: u16 = 68;
        /// Linux needs room for the fragments of a large packet.
        const QUEUE_SIZE_MIN: u16 = 32;
        let mut net = Self {
            socket: PathBuf::new(),
            mac: None,
            mtu: None,
            queues: 1,
            queue_size: 256,
            ctrl_vq: true,
            id: None,
        };
        for (key, value) in key_values(text)? {
            match key.as_str() {
                "socket" => net.socket = value.into(),
                "mac" => net.mac = Some(value.parse()?),
                "mtu" => net.mtu = Some(parse_in_range(&key, &value, MTU_MIN, u16::MAX)?),
                "queues" => net.queues = parse_in_range(&key, &value, 1, MAX_PAIRS)?,
                "queue-size" => {
                    net.queue_size = parse_in_range(&key, &value, QUEUE_SIZE_MIN, 1024)?;
                }
                "ctrl_vq" => {
                    let switch = Switch::from_str(&value, false);
                    net.ctrl_vq = switch
                        .map_err(|_| format!("ctrl_vq '{value}' is not on or off"))?
                        == Switch::On;
                }
                "id" => net.id = Some(value),
                _ => return Err(format!("unknown key '{key}'")),
            }
        }
        check_device(&net.socket, net.queue_size)?;
        if net.queues > 1 && !net.ctrl_vq {
            return Err("more than one of queues needs ctrl_vq=on".into());
        }
        Ok(net)
    }
}

/// What holds for every device.
fn check_device(socket: &Path, queue_size: u16) -> Result<(), String> {
    if socket.as_os_str().is_empty() {
        return Err("'socket' is missing".into());
    }
    if !queue_size.is_power_of_two() {
        return Err(format!("queue-size {queue_size} is not a power of two"));
    }
    Ok(())
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
    fn network_options_have_defaults_and_take_all_keys() {
        let net: NetOptions = "socket=/run/a.sock".parse().unwrap();
        assert_eq!((net.mac, net.mtu, net.id), (None, None, None));
        assert_eq!((net.queues, net.queue_size, net.ctrl_vq), (1, 256, true));
        let text = "socket=a,mac=52:54:00:00:00:01,mtu=9000,queues=4,queue-size=1024,id=lan";
        let net: NetOptions = text.parse().unwrap();
        assert_eq!(net.mac, Some("52:54:00:00:00:01".parse().unwrap()));
        assert_eq!((net.mtu, net.queues, net.queue_size), (Some(9000), 4, 1024));
        assert_eq!(net.id.as_deref(), Some("lan"));
        let net: NetOptions = "socket=a,ctrl_vq=off".parse().unwrap();
        assert!(!net.ctrl_vq);
    }

    #[test]
    fn bad_network_options_are_refused_with_the_reason() {
        for (text, reason) in [
            ("queues=1", "'socket' is missing"),
            (
                "socket=a,mtu=67",
                "mtu '67' is not a number from 68 to 65535",
            ),
            (
                "socket=a,queues=65",
                "queues '65' is not a number from 1 to 64",
            ),
            (
                "socket=a,queue-size=16",
                "queue-size '16' is not a number from 32 to 1024",
            ),
            (
                "socket=a,queue-size=48",
                "queue-size 48 is not a power of two",
            ),
            ("socket=a,ctrl_vq=yes", "ctrl_vq 'yes' is not on or off"),
            (
                "socket=a,ctrl_vq=off,queues=2",
                "more than one of queues needs ctrl_vq=on",
            ),
            ("socket=a,num-queues=2", "unknown key 'num-queues'"),
        ] {
            assert_eq!(text.parse::<NetOptions>().unwrap_err(), reason);
        }
        assert!(
            "socket=a,mac=33:33:00:00:00:01"
                .parse::<NetOptions>()
                .is_err()
        );
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
