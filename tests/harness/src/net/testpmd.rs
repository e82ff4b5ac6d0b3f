//! DPDK's `dpdk-testpmd` as a peer: its virtio-user driver is a front-end, its net_vhost driver a back-end.
//!
//! It runs without huge pages and without telling the world, polls on the processors that it is given, and takes commands on
//! standard input, which stays open for as long as it lives.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::namespace::Namespace;
use crate::process::{PATIENCE, installed};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// What to start.
#[derive(Clone, Debug)]
pub struct Setup {
    /// `--vdev` arguments.
    pub devices: Vec<String>,
    /// `--forward-mode`: `io`, `rxonly`, `txonly`, `mac`, ...
    pub mode: String,
    /// Queue pairs per port.
    pub queues: u16,
    /// More arguments of the application.
    pub arguments: Vec<String>,
}

impl Setup {
    /// A back-end with two ports that hands each the other's frames, listening on both sockets.
    pub fn wire(sockets: [&Path; 2]) -> Self {
        let device = |(number, socket): (usize, &Path)| {
            format!("net_vhost{number},iface={},queues=1", socket.display())
        };
        Self {
            devices: sockets.into_iter().enumerate().map(device).collect(),
            mode: "io".to_owned(),
            queues: 1,
            arguments: Vec::new(),
        }
    }

    /// A front-end that connects to `socket`; `arguments` are virtio-user's, such as `packed_vq=1`.
    pub fn front_end(socket: &Path, mode: &str, queues: u16, arguments: &str) -> Self {
        let comma = if arguments.is_empty() { "" } else { "," };
        let device = format!(
            "net_virtio_user0,path={},queues={queues}{comma}{arguments}",
            socket.display()
        );
        Self {
            devices: vec![device],
            mode: mode.to_owned(),
            queues,
            arguments: Vec::new(),
        }
    }
}

/// Frames and bytes of a port since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames received.
    pub rx_frames: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames sent.
    pub tx_frames: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
}

/// A running testpmd; killed when dropped.
#[derive(Debug)]
pub struct Testpmd {
    child: Child,
    stdin: ChildStdin,
    output: Arc<Output>,
    reader: Option<JoinHandle<()>>,
}

/// What it has written so far.
#[derive(Debug, Default)]
struct Output {
    text: Mutex<(String, bool)>,
    grown: Condvar,
}

impl Testpmd {
    /// Starts it and waits for its prompt. Forwarding is not started yet.
    ///
    /// # Errors
    /// When it is not installed or does not come up.
    pub fn start(setup: &Setup, namespace: Option<&Namespace>) -> Result<Self> {
        let program = installed("dpdk-testpmd", "dpdk-dev")?;
        let mut command = match namespace {
            None => Command::new("stdbuf"),
            Some(namespace) => namespace.command("stdbuf"),
        };
        // Unique among all that run on this machine: it names a lock file.
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("ob{}-{number}", std::process::id());
        command.arg("-oL").arg(program);
        command.args(["--lcores", "0@0,1@1", "--no-huge", "-m", "512", "--no-pci"]);
        command.args(["--no-telemetry", "--file-prefix", &prefix]);
        for device in &setup.devices {
            command.args(["--vdev", device]);
        }
        command.args(["--", "-i", "--no-mlockall", "--total-num-mbufs=16384"]);
        command.arg(format!("--forward-mode={}", setup.mode));
        command.arg(format!("--rxq={}", setup.queues));
        command.arg(format!("--txq={}", setup.queues));
        command.args(&setup.arguments);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().context("starting dpdk-testpmd")?;
        let stdin = child.stdin.take().context("stdin is piped")?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        let output = Arc::new(Output::default());
        let sink = output.clone();
        let reader = std::thread::spawn(move || sink.collect(BufReader::new(stdout)));
        let testpmd = Self {
            child,
            stdin,
            output,
            reader: Some(reader),
        };
        testpmd.output.wait_for(0, "testpmd> ", PATIENCE)?;
        Ok(testpmd)
    }

    /// Runs a command and returns what it answers, up to the next prompt.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub fn command(&mut self, line: &str) -> Result<String> {
        let from = self.output.length();
        writeln!(self.stdin, "{line}").context("command to dpdk-testpmd")?;
        self.output
            .wait_for(from, "testpmd> ", PATIENCE)
            .with_context(|| format!("dpdk-testpmd: {line}"))
    }

    /// Starts forwarding.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn forward(&mut self) -> Result<()> {
        self.command("start").map(drop)
    }

    /// Starts forwarding with that many bursts of 32 frames sent first.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn forward_bursts(&mut self, bursts: u32) -> Result<()> {
        self.command(&format!("start tx_first {bursts}")).map(drop)
    }

    /// Counters of a port.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn counters(&mut self, port: u16) -> Result<Counters> {
        let text = self.command(&format!("show port stats {port}"))?;
        let value = |name: &str| -> Result<u64> {
            let (_, rest) = text
                .split_once(name)
                .with_context(|| format!("no {name} in {text}"))?;
            let digits: String = rest
                .trim_start()
                .chars()
                .take_while(char::is_ascii_digit)
                .collect();
            digits.parse().with_context(|| format!("{name} in {text}"))
        };
        Ok(Counters {
            rx_frames: value("RX-packets:")?,
            rx_bytes: value("RX-bytes:")?,
            tx_frames: value("TX-packets:")?,
            tx_bytes: value("TX-bytes:")?,
        })
    }

    /// Waits until the counters of port 0 satisfy `enough`; gives them.
    ///
    /// # Errors
    /// When they do not within [`PATIENCE`].
    pub fn wait_for(&mut self, enough: impl Fn(&Counters) -> bool) -> Result<Counters> {
        let start = Instant::now();
        loop {
            let counters = self.counters(0)?;
            if enough(&counters) {
                return Ok(counters);
            }
            ensure!(start.elapsed() < PATIENCE, "no more than {counters:?}");
            // testpmd tells counters only when asked.
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    /// Stops forwarding; what testpmd says of it.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn stop(&mut self) -> Result<String> {
        self.command("stop")
    }

    /// Everything that it has written.
    pub fn text(&self) -> String {
        self.output.lock().0.clone()
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        if std::thread::panicking() {
            let text = self.text();
            let tail: Vec<&str> = text.lines().rev().take(30).collect();
            eprintln!("--- end of dpdk-testpmd's output ---");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

impl Output {
    fn lock(&self) -> std::sync::MutexGuard<'_, (String, bool)> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn length(&self) -> usize {
        self.lock().0.len()
    }

    /// Byte by byte as it comes: a prompt ends with no line feed.
    fn collect(&self, mut from: impl BufRead) {
        while let Ok(bytes) = from.fill_buf() {
            if bytes.is_empty() {
                break;
            }
            let count = bytes.len();
            self.lock().0.push_str(&String::from_utf8_lossy(bytes));
            from.consume(count);
            self.grown.notify_all();
        }
        self.lock().1 = true;
        self.grown.notify_all();
    }

    /// What came after byte `from` up to `mark`.
    fn wait_for(&self, from: usize, mark: &str, limit: Duration) -> Result<String> {
        let start = Instant::now();
        let mut text = self.lock();
        loop {
            if let Some(end) = text.0[from..].find(mark) {
                return Ok(text.0[from..from + end].to_owned());
            }
            let left = limit.saturating_sub(start.elapsed());
            if text.1 || left.is_zero() {
                let what = if text.1 { "ended" } else { "is silent" };
                bail!("dpdk-testpmd {what}:\n{}", text.0);
            }
            text = self
                .grown
                .wait_timeout(text, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}
