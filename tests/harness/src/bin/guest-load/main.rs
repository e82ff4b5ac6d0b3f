//! The program that runs inside a guest under test.
//!
//! It takes one command per line on its standard input (the guest's console) and answers each with one line: `@` and a JSON
//! object, so that kernel messages on the same console cannot be mistaken for an answer.
//!
//! | command | answer | what it does |
//! |---|---|---|
//! | (start) | `ready` | says how many CPUs, queues and bytes the guest sees |
//! | `files N` | `started` | mounts the disk; N writers create files and fsync each of them |
//! | `device N` | `started` | N writers overwrite random blocks of the bare disk, each with `fdatasync`, and read others back |
//! | `transfer N ADDRESS` | `started` | N connections send blocks to the host and receive others ([`harness::transfer`]) |
//! | `mark` | `mark` | counts so far; the longest time between two completed syncs of one writer since the last mark |
//! | `progress N` | `mark` | waits for N more syncs first |
//! | `stop` | `stopped` | ends the writers, waits for them |
//! | `verify` | `verified` | drops every cache and reads back all that was synced, byte by byte; of a transfer: the host confirms all that was sent |
//! | `size BYTES` | `size` | waits until the kernel says that the disk has this size |
//! | `power-button` | `waiting`, `pressed` | waits for the power button |
//! | `run WORDS` | `ran` | runs a program; its status and what it said |
//! | `iperf ADDRESS SECONDS up/down` | `iperf` | measures with iperf3 |
//! | `carrier 0/1` | `carrier` | waits until the kernel says that the network card has its link, or has not |
//! | `log` | `log` | the kernel's complaints about I/O, time-outs, file systems and network cards |
//! | `exit` | | ends the program |
//!
//! Any failure is an `error` line; the host decides what it means.

mod device;
mod files;
mod load;
mod network;
mod system;

use std::io::{self, Write as _};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use load::{Load, Worker};

fn main() {
    answer(&system::ready());
    let mut load = None;
    for line in io::stdin().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [] => {}
            ["exit"] => break,
            words => {
                let reply = execute(&mut load, words).unwrap_or_else(
                    |error| json!({"event": "error", "message": format!("{error:#}")}),
                );
                answer(&reply);
            }
        }
    }
}

fn answer(event: &Value) {
    let mut out = io::stdout().lock();
    // A console that is gone leaves nobody to tell.
    let _ = writeln!(out, "@{event}").and_then(|()| out.flush());
}

fn execute(load: &mut Option<Load>, words: &[&str]) -> Result<Value> {
    let running = || "no load is running";
    match words {
        ["files", writers] => start(load, files::workers(writers.parse()?)?),
        ["device", writers] => start(load, device::workers(writers.parse()?)?),
        ["transfer", connections, address] => start(
            load,
            network::workers(connections.parse()?, address.parse()?)?,
        ),
        ["mark"] => Ok(load.as_ref().with_context(running)?.mark("mark")),
        ["progress", syncs] => load
            .as_mut()
            .with_context(running)?
            .wait_for(syncs.parse()?),
        ["stop"] => load.as_mut().with_context(running)?.stop(),
        ["verify"] => load.as_mut().with_context(running)?.verify(),
        ["size", bytes] => system::wait_for_size(bytes.parse()?),
        ["power-button"] => {
            let button = system::PowerButton::open()?;
            // A press before this moment would not be seen.
            answer(&json!({"event": "waiting"}));
            button.wait()
        }
        ["run", program, arguments @ ..] => network::run(program, arguments),
        ["iperf", address, seconds, direction] => network::iperf(address, seconds, direction),
        ["carrier", wanted] => network::wait_for_carrier(*wanted == "1"),
        ["log"] => system::kernel_complaints(),
        other => bail!("unknown command {other:?}"),
    }
}

fn start(load: &mut Option<Load>, workers: Vec<Box<dyn Worker>>) -> Result<Value> {
    let count = workers.len();
    *load = Some(Load::start(workers));
    Ok(json!({"event": "started", "writers": count}))
}
