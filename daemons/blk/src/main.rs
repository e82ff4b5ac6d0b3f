//! `outboard-blkd`: the storage daemon.
//!
//! Its life is that of every daemon ([`service`]); here is what its options are.

mod daemon;
mod help;

use std::process::ExitCode;

use service::{Program, StepOption};

use crate::daemon::{Blkd, StepKind};

const PROGRAM: Program<StepKind> = Program {
    name: "outboard-blkd",
    version: env!("CARGO_PKG_VERSION"),
    help: help::HELP,
    object_help: engine::objects::help,
    trace_targets: &[
        "block",
        "engine",
        "executor",
        "exports",
        "filters",
        "formats",
        "protocols",
        "qmp",
        "service",
        "vhost_daemon",
    ],
    steps: &[
        StepOption {
            name: "blockdev",
            implied_key: "driver",
            kind: StepKind::Blockdev,
        },
        StepOption {
            name: "export",
            implied_key: "type",
            kind: StepKind::Export,
        },
        StepOption {
            name: "nbd-server",
            implied_key: "",
            kind: StepKind::NbdServer,
        },
        StepOption {
            name: "object",
            implied_key: "qom-type",
            kind: StepKind::Object,
        },
    ],
    settings: &[daemon::REDO_DIR, daemon::ALLOW_DRIVERS],
};

fn main() -> ExitCode {
    service::run::<Blkd>(&PROGRAM)
}
