//! `outboard-netd`: the network daemon.
//!
//! Its life is that of every daemon ([`service`]); what its options are is in [`netd::control`].

use std::process::ExitCode;

use netd::control::{Netd, STEPS, StepKind};
use netd::netdevs::passt;
use netd::options::help;
use service::Program;

const PROGRAM: Program<StepKind> = Program {
    name: "outboard-netd",
    version: env!("CARGO_PKG_VERSION"),
    help: help::HELP,
    object_help: help::of_objects,
    trace_targets: &["executor", "netd", "qmp", "service", "vhost_daemon"],
    steps: STEPS,
    settings: &["state-dir"],
};

fn main() -> ExitCode {
    if let Some(code) = passt::run_as_keeper() {
        return code;
    }
    service::run::<Netd>(&PROGRAM)
}
