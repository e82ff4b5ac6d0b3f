//! The host's end of a guest's network: a tap device with an address, in a network that nobody else sees.
//!
//! ```text
//!   guest: eth0 ── VMM's rings ── outboard-netd ── tap ── this process's network namespace: servers
//! ```
//!
//! The tap is made before the daemon and outlives it, as an administrator's does: addresses and routes stay when the daemon dies.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getgid, getuid};

use super::program;
use crate::nested::{Owned, die_with_parent, lines_of};

/// Its name.
const TAP: &str = "tap0";

/// The host's end.
#[derive(Debug)]
pub struct Network {
    pairs: u32,
    mtu: u16,
}

impl Network {
    /// The host's address.
    pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
    /// The guest's.
    pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

    /// Takes this process into a network namespace of its own, and makes the device there. Call it while there is one thread.
    ///
    /// # Errors
    /// The kernel allows no namespaces or no tap devices, or `ip` is missing.
    pub fn create(pairs: u32, mtu: u16) -> Result<Self> {
        enter_own_namespace().context("a network namespace of one's own")?;
        ip("link set lo up")?;
        let several = if pairs > 1 { "multi_queue" } else { "" };
        ip(&format!("tuntap add dev {TAP} mode tap vnet_hdr {several}"))?;
        ip(&format!("link set {TAP} mtu {mtu} up"))?;
        ip(&format!("address add {}/24 dev {TAP}", Self::HOST))?;
        Ok(Self { pairs, mtu })
    }

    /// Name of the tap device.
    pub fn tap(&self) -> &'static str {
        TAP
    }

    /// Queue pairs.
    pub fn pairs(&self) -> u32 {
        self.pairs
    }

    /// Largest packet.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// Adds a VLAN on the tap, with an address.
    ///
    /// # Errors
    /// The kernel has no VLANs.
    pub fn add_vlan(&self, id: u16, host: Ipv4Addr) -> Result<()> {
        ip(&format!(
            "link add link {TAP} name {TAP}.{id} type vlan id {id}"
        ))?;
        ip(&format!("address add {host}/24 dev {TAP}.{id}"))?;
        ip(&format!("link set {TAP}.{id} up"))
    }

    /// An address of the host for a server.
    pub fn address(port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(Self::HOST), port)
    }

    /// Starts `iperf3 -s`, which is killed when the result is dropped.
    ///
    /// # Errors
    /// It is missing or does not listen.
    pub fn iperf_server(&self) -> Result<IperfServer> {
        let mut command = Command::new(program("iperf3"));
        command.args(["-s", "--forceflush"]).stdin(Stdio::null());
        command.stdout(Stdio::piped());
        die_with_parent(&mut command);
        let mut server = Owned(command.spawn().context("start iperf3")?);
        let output = server.0.stdout.take().context("the output is a pipe")?;
        for line in lines_of(output) {
            if line.starts_with("Server listening") {
                return Ok(IperfServer { _process: server });
            }
        }
        bail!("iperf3 -s ended at once")
    }
}

/// A running `iperf3 -s`.
#[derive(Debug)]
pub struct IperfServer {
    _process: Owned,
}

fn enter_own_namespace() -> Result<()> {
    let (user, group) = (getuid(), getgid());
    if user.is_root() {
        return Ok(unshare(CloneFlags::CLONE_NEWNET)?);
    }
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
    Ok(std::fs::write(
        "/proc/self/gid_map",
        format!("0 {group} 1"),
    )?)
}

fn ip(words: &str) -> Result<()> {
    let output = Command::new(program("ip"))
        .args(words.split_whitespace())
        .output()
        .context("run ip")?;
    ensure!(
        output.status.success(),
        "ip {words}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
