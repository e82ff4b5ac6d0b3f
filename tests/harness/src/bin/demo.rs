//! The demo: plays a scene and tells it to people.
//!
//! ```text
//! demo            a guest writes while its disk's daemon is killed three times, then transfers while its network's is
//! demo --shell    a shell in a guest
//! ```

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use harness::nested::Outcome;
use harness::scene::{FrontEnd, Stage};
use serde_json::Value;

const TIME_LIMIT: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let told = match arguments
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .as_slice()
    {
        [] => tell(),
        ["--shell"] => shell(),
        other => Err(anyhow::anyhow!("unknown arguments {other:?}")),
    };
    match told {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn tell() -> Result<()> {
    let stage = Stage::new("survive-kills", FrontEnd::Outboard).with_network();
    let stage = stage.option("syncs", 100).option("blocks", 10);
    println!(
        "A guest writes to its disk, and the daemon that serves the disk is killed; then it transfers over its"
    );
    println!("network, and the daemon that serves the network is killed.\n");
    say_where(&stage);
    let mut narrator = Narrator::default();
    let outcome = stage.play(TIME_LIMIT, |line| narrator.hear(line))?;
    if outcome.exit != Some(0) {
        bail!("the scene failed; console:\n{}", outcome.console);
    }
    narrator.conclude(&outcome)
}

fn shell() -> Result<()> {
    let stage = Stage::new("shell", FrontEnd::Outboard).with_network();
    say_where(&stage);
    println!("The guest's disk is /dev/vda: ext4 on a qcow2 overlay, served by outboard-blkd.");
    println!(
        "Its network card is eth0, served by outboard-netd; 10.77.0.1 is the host's end of the tap device."
    );
    println!("\"exit\" ends the guest and throws the disk away. Starting ...\n");
    stage.play_interactively()
}

fn say_where(stage: &Stage) {
    if stage.is_nested() {
        println!("KVM does not run guests on this machine, so everything happens inside a nested");
        println!(
            "machine that has KVM in software: true in every part, but 10 to 20 times slower.\n"
        );
    } else {
        println!("KVM works here: the guest runs on it.\n");
    }
}

/// Turns events into sentences, and keeps what the last one needs.
#[derive(Debug, Default)]
struct Narrator {
    disk: Pauses,
    network: Pauses,
}

/// What the guest noticed of a daemon's deaths.
#[derive(Debug, Default)]
struct Pauses {
    longest_ms: f64,
    /// The longest one that is not explained by the daemon's start.
    longest_rest_ms: f64,
}

impl Pauses {
    fn resumed(&mut self, event: &Value) -> String {
        let (pause, restart) = (number(event, "pause_ms"), number(event, "restart_ms"));
        self.longest_ms = self.longest_ms.max(pause);
        self.longest_rest_ms = self.longest_rest_ms.max(pause - restart);
        format!(
            "... started again in {restart:.0} ms; the guest goes on after a pause of {pause:.0} ms"
        )
    }
}

impl Narrator {
    fn hear(&mut self, line: &str) {
        let Ok(event) = serde_json::from_str::<Value>(line) else {
            return;
        };
        let seconds = number(&event, "ms") / 1000.0;
        if let Some(sentence) = self.sentence(&event) {
            println!("{seconds:7.1} s  {sentence}");
        }
    }

    fn sentence(&mut self, event: &Value) -> Option<String> {
        let sentence = match event["event"].as_str()? {
            "prepared" => format!(
                "base.raw holds an ext4 file system of {}; overlay.qcow2 lies on top of it",
                mebibytes(event, "base_bytes")
            ),
            "daemon_ready" => format!(
                "outboard-blkd serves overlay.qcow2 (ready after {})",
                milliseconds(event, "took_ms")
            ),
            "guest_ready" => format!(
                "the guest is up under outboard-vmm: {} CPUs, a disk of {} with {} queues",
                event["cpus"],
                mebibytes(event, "bytes"),
                event["queues"]
            ),
            "guest_started" => {
                format!(
                    "the guest mounts the disk; {} writers fsync every file",
                    event["writers"]
                )
            }
            "killed" => format!(
                "kill -9 outboard-blkd, number {} (before, the longest pause between two fsyncs: {})",
                event["number"],
                milliseconds(event, "pause_before_ms")
            ),
            "resumed" => self.disk.resumed(event),
            "guest_stopped" => format!(
                "the writers end: {} files, {} written and synced",
                event["syncs"],
                mebibytes(event, "bytes")
            ),
            "guest_verified" => format!(
                "the guest drops its caches and reads {} of files back: every byte as written",
                mebibytes(event, "bytes")
            ),
            "network_ready" => format!(
                "outboard-netd serves a port on a tap device (ready after {})",
                milliseconds(event, "took_ms")
            ),
            "guest_pinged" => format!(
                "the guest pings {}: {}",
                text(event, "host"),
                text(event, "round_trip")
            ),
            "transfer_started" => format!(
                "{} TCP connections send blocks to the host and get others back; both ends check each byte",
                event["connections"]
            ),
            "transfer_progress" => format!("    {} went to and fro", mebibytes(event, "bytes")),
            "network_killed" => format!(
                "kill -9 outboard-netd, number {} (before, the longest wait for a block: {})",
                event["number"],
                milliseconds(event, "pause_before_ms")
            ),
            "network_resumed" => self.network.resumed(event),
            "transfer_verified" => format!(
                "the transfer ends: {}, and the host has what the guest sent, checksums {}",
                mebibytes(event, "bytes"),
                event["checksums"]
            ),
            "guest_log" => "the guest's kernel log: no I/O error, no other complaint".to_owned(),
            "powered_off" => "the guest has powered off".to_owned(),
            "checked" => format!(
                "qemu-img check overlay.qcow2: no errors, {} leaked clusters, {} on disk",
                event["report"]["leaks"].as_u64().unwrap_or(0),
                mebibytes(event, "overlay_bytes")
            ),
            "failed" => format!("FAILED: {}", event["message"].as_str()?),
            _ => return None,
        };
        Some(sentence)
    }

    fn conclude(&self, outcome: &Outcome) -> Result<()> {
        println!();
        for (daemon, event, pauses) in [
            ("outboard-blkd", "resumed", &self.disk),
            ("outboard-netd", "network_resumed", &self.network),
        ] {
            let kills = outcome.events_named(event).count();
            ensure!(kills > 0, "{daemon} was never killed");
            println!(
                "{daemon} was killed {kills} times; the guest lost nothing and saw no error. Its longest pause was {:.0} ms,\n\
                 at most {:.0} ms of it beyond the daemon's own start.",
                pauses.longest_ms, pauses.longest_rest_ms
            );
        }
        Ok(())
    }
}

fn text<'a>(event: &'a Value, name: &str) -> &'a str {
    event[name].as_str().unwrap_or_default()
}

fn number(event: &Value, name: &str) -> f64 {
    event[name].as_f64().unwrap_or_default()
}

fn milliseconds(event: &Value, name: &str) -> String {
    format!("{:.0} ms", number(event, name))
}

fn mebibytes(event: &Value, name: &str) -> String {
    format!("{:.1} MiB", number(event, name) / f64::from(1 << 20))
}
