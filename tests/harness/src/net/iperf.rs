//! iperf3: a server in a namespace, and what a client's report says.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

use super::namespace::Namespace;
use crate::process::installed;

/// An iperf3 server that listens; killed when dropped.
#[derive(Debug)]
pub struct IperfServer {
    child: Child,
}

impl IperfServer {
    /// A server in `namespace`, listening when this returns.
    ///
    /// # Errors
    /// When iperf3 is not installed or does not start.
    pub fn start(namespace: &Namespace) -> Result<Self> {
        installed("iperf3", "iperf3")?;
        let mut child = namespace
            .command("iperf3")
            .args(["-s", "--forceflush"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting iperf3")?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        let server = Self { child };
        let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
        lines
            .find(|line| line.contains("listening"))
            .context("iperf3 does not listen")?;
        // Read on, or the server blocks on a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(server)
    }
}

impl Drop for IperfServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Received bits per second from the report of `iperf3 -J`.
///
/// # Errors
/// When it reports an error, or is no report.
pub fn received_bits_per_second(report: &str) -> Result<f64> {
    let value: Value = serde_json::from_str(report).context("iperf3's report")?;
    if let Some(error) = value["error"].as_str() {
        anyhow::bail!("iperf3: {error}");
    }
    value["end"]["sum_received"]["bits_per_second"]
        .as_f64()
        .context("no sum in iperf3's report")
}
