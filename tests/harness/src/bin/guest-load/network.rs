//! The guest's network card: transfers that are checked, other people's tools, and what the kernel says about the link.

use std::fs;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use harness::transfer::Client;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use serde_json::{Value, json};

use crate::load::Worker;

/// Whether the card has its link: `0` or `1`.
const CARRIER: &str = "/sys/class/net/eth0/carrier";

/// Longest output of a program that is passed on, in bytes.
const OUTPUT_BYTES: usize = 2000;

/// Opens that many connections to the host's [`harness::transfer::Server`].
pub(crate) fn workers(count: u64, address: SocketAddr) -> Result<Vec<Box<dyn Worker>>> {
    (0..count)
        .map(|seed| {
            let client = Client::connect(address, seed)?;
            Ok(Box::new(Transfer(client)) as Box<dyn Worker>)
        })
        .collect()
}

struct Transfer(Client);

impl Worker for Transfer {
    fn step(&mut self) -> Result<u64> {
        self.0.exchange()
    }

    fn forget_caches(&mut self) -> Result<()> {
        Ok(())
    }

    fn verify(&mut self) -> Result<u64> {
        Ok(self.0.finish()?.bytes)
    }
}

/// Runs a program to its end.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<Value> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("run {program}"))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(OUTPUT_BYTES)..]);
    Ok(json!({
        "event": "ran",
        "program": program,
        "status": output.status.code(),
        "output": text.trim_end(),
    }))
}

/// Measures for some seconds to the host (`up`) or from it (`down`).
pub(crate) fn iperf(address: &str, seconds: &str, direction: &str) -> Result<Value> {
    let mut command = Command::new("iperf3");
    command.args(["-c", address, "-t", seconds, "-P", "2", "-J"]);
    match direction {
        "up" => {}
        "down" => drop(command.arg("-R")),
        other => bail!("'{other}' is neither up nor down"),
    }
    let output = command.output().context("run iperf3")?;
    let report: Value = serde_json::from_slice(&output.stdout).context("iperf3's report")?;
    ensure!(
        report["error"].is_null() && output.status.success(),
        "iperf3: {}",
        report["error"]
    );
    let received = &report["end"]["sum_received"];
    Ok(json!({
        "event": "iperf",
        "direction": direction,
        "bytes": received["bytes"],
        "bits_per_second": received["bits_per_second"],
        "retransmits": report["end"]["sum_sent"]["retransmits"],
    }))
}

/// Waits until the card has its link, or has not; the kernel announces each change of it.
pub(crate) fn wait_for_carrier(wanted: bool) -> Result<Value> {
    const LINK_CHANGES: u32 = 1;
    let kernel = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )
    .context("open the kernel's routing socket")?;
    bind(kernel.as_raw_fd(), &NetlinkAddr::new(0, LINK_CHANGES)).context("listen to the kernel")?;
    let mut message = [0; 8192];
    let digit = if wanted { "1" } else { "0" };
    while fs::read_to_string(CARRIER)
        .context("read the carrier")?
        .trim()
        != digit
    {
        recv(kernel.as_raw_fd(), &mut message, MsgFlags::empty()).context("wait for the kernel")?;
    }
    Ok(json!({"event": "carrier", "up": wanted}))
}
