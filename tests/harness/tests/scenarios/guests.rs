//! Scenarios with real guests: a Debian kernel, its VMM, and the daemons that serve its disk and its network.
//!
//! Where KVM runs guests they run on it; elsewhere the VMM and the daemons are put into a nested machine.

use std::time::Duration;

use harness::nested::{NestedVm, Outcome};
use harness::process::workspace_binary;
use harness::scene::{FrontEnd, Stage, trial_boot};
use serde_json::{Value, json};

/// Generous, because emulation is slow and test machines are shared; scenes end long before.
const TIME_LIMIT: Duration = Duration::from_secs(210);

/// Whether the emulator failed the nested machine: its kernel, which has nothing of ours, tells that its processors stopped, or
/// panics. A guest that panics in it ends the scene with a status of its own.
fn emulator_failed(outcome: &Outcome) -> bool {
    let says = |what: &str| outcome.console.contains(what);
    match outcome.exit {
        None => says("watchdog: BUG: soft lockup"),
        // The machine reset itself before the scene was over, which QEMU takes for a good end.
        Some(0) => outcome.event("checked").is_none() && says("Kernel panic - not syncing"),
        Some(_) => false,
    }
}

fn play(stage: &Stage) -> Outcome {
    let attempt = || {
        let outcome = stage.play(TIME_LIMIT, |line| println!("{line}"));
        outcome.expect("what a scene needs is installed and built")
    };
    let mut outcome = attempt();
    if emulator_failed(&outcome) {
        println!(
            "the emulator failed; once more. Console:\n{}",
            outcome.console
        );
        outcome = attempt();
    }
    assert_eq!(
        outcome.exit,
        Some(0),
        "see the story above; console:\n{}",
        outcome.console
    );
    outcome
}

/// A field of the first event of that name.
fn field<'a>(outcome: &'a Outcome, event: &str, name: &str) -> &'a Value {
    let event = outcome
        .event(event)
        .unwrap_or_else(|| panic!("no {event} in {outcome:#?}"));
    &event[name]
}

fn assert_survived(outcome: &Outcome, kills: usize) {
    assert_eq!(outcome.events_named("killed").count(), kills);
    assert_eq!(outcome.events_named("resumed").count(), kills);
    assert!(field(outcome, "guest_verified", "bytes").as_u64() > Some(0));
    assert_eq!(field(outcome, "guest_log", "complaints"), &json!([]));
    assert!(outcome.event("powered_off").is_some());
    assert_eq!(field(outcome, "checked", "report")["check-errors"], 0);
}

#[test]
fn the_nested_machine_offers_kvm_to_programs() {
    let script = r#"test -c /dev/kvm && echo '{"event": "kvm"}'; echo plain; exit 3"#;
    let outcome = NestedVm::new()
        .unwrap()
        .script(script)
        .run(TIME_LIMIT, |_| ())
        .unwrap();
    assert!(outcome.event("kvm").is_some(), "{outcome:#?}");
    assert_eq!(outcome.output, ["plain"]);
    assert_eq!(outcome.exit, Some(3));
}

#[test]
fn the_kernels_nbd_client_keeps_a_file_system_on_what_outboard_nbd_serves() {
    let machine = NestedVm::new().unwrap().modules(&["nbd"]).unwrap();
    let programs = ["outboard-nbd", "outboard-img"].map(|name| workspace_binary(name).unwrap());
    let machine = programs
        .into_iter()
        .fold(machine, |machine, path| machine.program(path).unwrap());
    let outcome = machine
        .script(include_str!("../../../guest/nbd-client"))
        .run(TIME_LIMIT, |line| println!("{line}"))
        .unwrap();
    assert_eq!(outcome.exit, Some(0), "console:\n{}", outcome.console);
    assert_eq!(field(&outcome, "connected", "bytes"), 64 << 20);
    assert_eq!(field(&outcome, "large", "bytes"), 3_u64 << 40);
    assert_eq!(outcome.events_named("verified").count(), 2);
    assert_eq!(outcome.events_named("disconnected").count(), 3);
    assert!(outcome.event("checked").is_some());
}

#[test]
fn the_trial_for_kvm_ends_well_where_guests_run() {
    trial_boot(FrontEnd::QemuTcg).unwrap();
}

#[test]
fn a_guest_of_qemu_survives_the_daemons_death() {
    let outcome = play(&Stage::new("survive-kills", FrontEnd::QemuTcg).option("kills", 2));
    assert_eq!(field(&outcome, "guest_ready", "packed"), false);
    assert_survived(&outcome, 2);
}

#[test]
fn a_guest_of_qemu_with_packed_rings_survives_the_daemons_death() {
    let stage = Stage::new("survive-kills", FrontEnd::QemuTcg).option("kills", 2);
    let outcome = play(&stage.option("rings", "packed"));
    assert_eq!(field(&outcome, "guest_ready", "packed"), true);
    assert_survived(&outcome, 2);
}

#[test]
fn a_guest_of_qemu_on_kvm_survives_the_daemons_death() {
    let outcome = play(&Stage::new("survive-kills", FrontEnd::QemuKvm).option("kills", 1));
    assert_survived(&outcome, 1);
}

#[test]
fn a_guest_of_outboard_survives_the_daemons_death() {
    let outcome = play(&Stage::new("survive-kills", FrontEnd::Outboard).option("kills", 3));
    assert_eq!(field(&outcome, "guest_ready", "packed"), true);
    assert_survived(&outcome, 3);
}

#[test]
fn a_guest_on_four_queues_sees_its_disk_grow() {
    let stage = Stage::new("resize", FrontEnd::Outboard)
        .option("cpus", 4)
        .option("queues", 4);
    let outcome = play(&stage);
    assert_eq!(field(&outcome, "guest_ready", "queues"), 4);
    assert_eq!(field(&outcome, "guest_size", "bytes"), 96 << 20);
}

#[test]
fn a_guest_of_outboard_has_a_network_that_survives_its_daemon() {
    let stage = Stage::new("network", FrontEnd::Outboard).with_network();
    assert_network(&play(&stage.option("kills", 2).option("blocks", 4)), 2);
}

/// What the scene does not insist on itself.
fn assert_network(outcome: &Outcome, kills: usize) {
    assert_eq!(outcome.events_named("network_resumed").count(), kills);
    assert_eq!(outcome.events_named("queue_works").count(), 4);
    assert_eq!(outcome.events_named("guest_iperf").count(), 2);
    for report in outcome.events_named("guest_iperf") {
        assert!(report["bytes"].as_u64() > Some(0), "{report}");
    }
    let links = outcome.events_named("guest_carrier");
    let links: Vec<_> = links.map(|event| event["up"] == true).collect();
    assert_eq!(links, [false, true]);
    assert!(field(outcome, "transfer_verified", "bytes").as_u64() > Some(0));
    assert_eq!(field(outcome, "guest_log", "complaints"), &json!([]));
    assert!(outcome.event("powered_off").is_some());
}

#[test]
fn a_guest_waits_for_its_daemon_and_obeys_reset_and_power_button() {
    let outcome = play(&Stage::new("late-back-end", FrontEnd::Outboard));
    assert_eq!(outcome.events_named("guest_ready").count(), 2);
    assert!(outcome.event("guest_pressed").is_some());
    assert!(outcome.event("powered_off").is_some());
}
