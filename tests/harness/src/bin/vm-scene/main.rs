//! Plays one scene with a real guest and prints what happens, one JSON object a line: `event`, `ms` since the start, and what
//! belongs to the event.
//!
//! ```text
//! vm-scene SCENE --front-end outboard|qemu-kvm|qemu-tcg --kernel BZIMAGE --initramfs CPIO
//!                [--cpus N] [--queues N] [--network true|false] [--rings split|packed] [--kills N] [--syncs N] [--blocks N]
//! ```
//!
//! Ends with status 0 if everything was as the scene demands.

mod network;
mod scenes;
mod story;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use harness::scene::{Boot, FrontEnd, Rings};

use story::Story;

/// What the command line says.
#[derive(Debug)]
struct Options {
    scene: String,
    front_end: FrontEnd,
    kernel: PathBuf,
    initramfs: PathBuf,
    cpus: u32,
    queues: u32,
    /// Whether the guest has a network card beside its disk.
    network: bool,
    /// How the rings may lie in memory.
    rings: Rings,
    /// How often the daemon dies.
    kills: u32,
    /// Syncs that the guest finishes before the daemon dies, and again after it is back.
    syncs: u64,
    /// The same for blocks of a transfer.
    blocks: u64,
}

impl Options {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let mut options = Self {
            scene: words.next().context("which scene?")?,
            front_end: FrontEnd::Outboard,
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            cpus: 2,
            queues: 2,
            network: false,
            rings: Rings::Split,
            kills: 3,
            syncs: 20,
            blocks: 20,
        };
        while let Some(name) = words.next() {
            let value = words
                .next()
                .with_context(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--front-end" => options.front_end = value.parse()?,
                "--kernel" => options.kernel = value.into(),
                "--initramfs" => options.initramfs = value.into(),
                "--cpus" => options.cpus = value.parse().context("--cpus")?,
                "--queues" => options.queues = value.parse().context("--queues")?,
                "--network" => options.network = value.parse().context("--network")?,
                "--rings" => options.rings = value.parse()?,
                "--kills" => options.kills = value.parse().context("--kills")?,
                "--blocks" => options.blocks = value.parse().context("--blocks")?,
                "--syncs" => options.syncs = value.parse().context("--syncs")?,
                _ => bail!("unknown option {name}"),
            }
        }
        Ok(options)
    }

    /// A boot of the scene's guest with its disk on `socket`.
    fn boot(&self, socket: Option<PathBuf>) -> Boot {
        Boot {
            front_end: self.front_end,
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            cpus: self.cpus,
            disk: socket.map(|socket| (socket, self.queues)),
            card: None,
            rings: self.rings,
            run: "guest-load".into(),
        }
    }
}

fn main() -> ExitCode {
    let mut story = Story::begin();
    let played = Options::parse(std::env::args().skip(1))
        .and_then(|options| scenes::play(&options, &mut story));
    match played {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            story.tell("failed", &[("message", format!("{error:#}").into())]);
            ExitCode::FAILURE
        }
    }
}
