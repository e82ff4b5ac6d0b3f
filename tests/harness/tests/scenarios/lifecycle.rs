//! Front-ends and daemons that stop, go and come back in order.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use anyhow::{Result, ensure};
use harness::driver::{Operation, Options, Queue, Request, SectorRange};
use harness::load::{self, Plan, Stop};
use harness::oracle::{Loss, Oracle, Ticket};
use harness::process::Program;
use harness::rig::{Disk, Format, Leaks, Meeting, Rig};
use harness::supervisor::{self, Ordeal, Strike};

/// Front-ends connect one after the other; each finds what the ones before it wrote.
pub(crate) fn front_ends_come_and_go(program: Program) -> Result<()> {
    let rig = Rig::start(Disk::new(program, Format::Qcow2).queues(2, 1))?;
    for seed in 1..=4 {
        let (mut front_end, mut queues) = rig.connect(Options::default())?;
        load::verify_all(&mut queues[0], &rig.oracle)?;
        let plan = Plan {
            seed,
            ..Plan::default()
        };
        load::run_on_all(&mut queues, &rig.oracle, &plan, Stop::After(500))?;
        if seed % 2 == 0 {
            front_end.stop_ring(0)?;
            front_end.stop_ring(1)?;
        }
    }
    let (front_end, queues) = rig.connect(Options::default())?;
    rig.finish(front_end, queues)
}

#[test]
fn front_ends_connect_one_after_the_other() -> Result<()> {
    front_ends_come_and_go(Program::OutboardBlkd)
}

#[test]
fn hundreds_of_connections_leave_nothing_behind() -> Result<()> {
    let rig = Rig::start(Disk::new(Program::OutboardBlkd, Format::Qcow2).queues(2, 2))?;
    let connect = |times: usize| -> Result<(usize, u64)> {
        for _ in 0..times {
            let (_front_end, mut queues) = rig.connect(Options::default())?;
            queues[1].run(
                Request::contiguous(Operation::Read, SectorRange::new(0, 8)),
                &[],
            )?;
        }
        // Counted while connected: being served shows that the connection before is gone.
        let (_front_end, _queues) = rig.connect(Options::default())?;
        Ok((rig.daemon.open_files()?, rig.daemon.resident_kib()?))
    };
    let (files, resident) = connect(50)?;
    let (files_later, resident_later) = connect(400)?;
    ensure!(
        files_later <= files,
        "{files} open files became {files_later}"
    );
    ensure!(
        resident_later < resident + 4096,
        "{resident} KiB became {resident_later} KiB"
    );
    Ok(())
}

#[test]
fn an_idle_daemon_uses_no_cpu() -> Result<()> {
    let rig = Rig::start(Disk::new(Program::OutboardBlkd, Format::Raw).queues(2, 2))?;
    let (front_end, mut queues) = rig.connect(Options::default())?;
    load::run_on_all(&mut queues, &rig.oracle, &Plan::default(), Stop::After(500))?;
    let window = Duration::from_secs(1);
    let settling = Duration::from_millis(50);
    let used = rig.daemon.cpu_time_within(settling, window)?;
    ensure!(used < window / 200, "{used:?} of CPU in {window:?}");
    rig.finish(front_end, queues)
}

fn submit_writes(
    queue: &mut Queue,
    oracle: &Oracle,
    (count, generation): (u64, u64),
) -> Result<Vec<Ticket>> {
    (0..count)
        .map(|index| {
            let range = SectorRange::new(index * 128 + generation, 100);
            let name = (1, generation << 32 | (index + 1));
            let (ticket, data) = oracle
                .begin_write(range, name)
                .expect("ranges are disjoint");
            queue.submit(Request::contiguous(Operation::Write, range), &data, index)?;
            Ok(ticket)
        })
        .collect()
}

fn complete_all(queue: &mut Queue, oracle: &Oracle, tickets: &[Ticket]) -> Result<()> {
    for _ in 0..queue.outstanding() {
        let done = queue.completion()?;
        let ticket = &tickets[done.token as usize];
        oracle.complete(ticket, &done.ok()?)?;
    }
    Ok(())
}

#[test]
fn get_vring_base_answers_when_nothing_is_in_flight() -> Result<()> {
    for format in [Format::Raw, Format::Qcow2] {
        let rig = Rig::start(Disk::new(Program::OutboardBlkd, format))?;
        let (mut front_end, mut queues) = rig.connect(Options::default())?;
        for generation in 1..=20 {
            let tickets = submit_writes(&mut queues[0], &rig.oracle, (32, generation))?;
            queues[0].kick()?;
            let base = front_end.stop_ring(0)?;
            let used = u32::from(front_end.used_idx(0));
            ensure!(base == used, "base {base} with {used} requests returned");
            front_end.start_ring(0)?;
            complete_all(&mut queues[0], &rig.oracle, &tickets)?;
        }
        rig.finish(front_end, queues)?;
    }
    Ok(())
}

#[test]
fn a_front_end_that_reconnects_under_load_loses_nothing() -> Result<()> {
    for format in [Format::Raw, Format::Qcow2] {
        let mut rig = Rig::start(Disk::new(Program::OutboardBlkd, format).queues(2, 2))?;
        let (mut front_end, mut queues) = rig.connect(Options::default())?;
        let ordeal = Ordeal {
            strike: Strike::Disconnect,
            times: 30,
            seed: 11,
        };
        let plan = Plan {
            seed: 11,
            ..Plan::default()
        };
        let report = supervisor::run(&mut rig, (&mut front_end, &mut queues), &plan, ordeal)?;
        println!("{report}");
        rig.finish(front_end, queues)?;
    }
    Ok(())
}

#[test]
fn sigterm_drains_flushes_and_exits_with_status_zero() -> Result<()> {
    for format in [Format::Raw, Format::Qcow2] {
        let mut rig = Rig::start(Disk::new(Program::OutboardBlkd, format))?;
        let (front_end, mut queues) = rig.connect(Options::default())?;
        let plan = Plan {
            seed: 12,
            ..Plan::default()
        };
        load::run_on_all(&mut queues, &rig.oracle, &plan, Stop::After(500))?;
        let tickets = submit_writes(&mut queues[0], &rig.oracle, (32, 77))?;
        queues[0].kick()?;
        // Still connected, with requests in flight: the daemon must not wait for the front-end.
        let status = rig.daemon.stop()?;
        ensure!(
            status.code() == Some(0),
            "{status}, signal {:?}",
            status.signal()
        );
        while let Some(done) = queues[0].try_completion()? {
            rig.oracle
                .complete(&tickets[done.token as usize], &done.ok()?)?;
        }
        drop(front_end);
        rig.restart()?;
        let (front_end, mut queues) = rig.connect(Options::default())?;
        read_back_after_loss(&mut queues[0], &rig.oracle)?;
        rig.finish(front_end, queues)?;
    }
    Ok(())
}

/// Reads everything after requests in flight were lost with their front-end.
fn read_back_after_loss(queue: &mut Queue, oracle: &Oracle) -> Result<()> {
    let mut at = 0;
    while at < oracle.sectors() {
        let range = SectorRange::new(at, (oracle.sectors() - at).min(256));
        let data = queue
            .run(Request::contiguous(Operation::Read, range), &[])?
            .ok()?;
        oracle.judge_after(Loss::Killed, range, &data)?;
        at = range.end();
    }
    Ok(())
}

fn serve_and_survive(meeting: Meeting) -> Result<()> {
    let disk = Disk {
        meeting,
        ..Disk::new(Program::OutboardBlkd, Format::Qcow2).queues(2, 1)
    };
    let mut rig = Rig::start(disk)?;
    let (mut front_end, mut queues) = rig.connect(Options::default())?;
    let plan = Plan {
        seed: 13,
        ..Plan::default()
    };
    for strike in [Strike::Disconnect, Strike::Kill] {
        let ordeal = Ordeal {
            strike,
            times: 5,
            seed: 13,
        };
        let report = supervisor::run(&mut rig, (&mut front_end, &mut queues), &plan, ordeal)?;
        println!("{meeting:?} {strike:?}: {report}");
    }
    load::verify_all(&mut queues[0], &rig.oracle)?;
    drop(front_end);
    rig.finish_offline(Leaks::Allowed)
}

#[test]
fn a_daemon_activated_by_systemd_serves_the_inherited_socket() -> Result<()> {
    serve_and_survive(Meeting::Activated)
}

#[test]
fn a_daemon_that_connects_reconnects_by_itself() -> Result<()> {
    serve_and_survive(Meeting::DaemonConnects)
}
