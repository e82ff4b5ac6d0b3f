//! `snapshot`: lists, takes, applies and deletes internal snapshots.

use crate::{Command, Running};
use block::{Error, NewSnapshot, Node, Snapshots};
use chrono::{Local, TimeZone};
use serde_json::Value;
use std::fmt::Write;
use tools::failure::{Failure, Outcome};
use tools::getopt::{self, Opt};
use tools::image::{Access, Common, Opening, Tool};
use tools::output;
use tools::size::human;

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "snapshot",
    usage: "[--object objectdef] [--image-opts] [-U] [-q] [-l | -a snapshot | -c snapshot | -d \
            snapshot] filename",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::value(&["f", "format"]),
    Opt::flag(&["l", "list"]),
    Opt::value(&["a", "apply"]),
    Opt::value(&["c", "create"]),
    Opt::value(&["d", "delete"]),
    Opt::flag(&["q", "quiet"]),
    Opt::value(&["object"]),
    Opt::flag(&["image-opts"]),
    Opt::flag(&["U", "force-share"]),
    Opt::value(&["allow-dir"]),
];

/// Longest name in bytes.
const MAX_NAME: usize = 255;

/// What a format without snapshots answers.
const NOT_SUPPORTED: &str = "-95 (Operation not supported)";

/// What is done.
enum Action {
    List,
    Apply(String),
    Create(String),
    Delete(String),
}

async fn run(tool: &Tool, arguments: Vec<String>) -> Outcome {
    let parsed = getopt::parse(arguments, OPTIONS)?;
    let (mut common, mut action) = (Common::default(), None);
    for (name, value) in parsed.options {
        let next = match name {
            "h" => return Ok(crate::help::of(&COMMAND)),
            "l" => Action::List,
            "a" => Action::Apply(value),
            "c" => Action::Create(value),
            "d" => Action::Delete(value),
            _ => {
                common.take(tool, (name, &value))?;
                continue;
            }
        };
        if action.replace(next).is_some() {
            return Err(Failure::usage("Cannot mix '-l', '-a', '-c', '-d'"));
        }
    }
    let name = getopt::one_image(parsed.operands)?;
    let access = match action {
        Some(Action::List) => Access::Describe,
        _ => Access::Write,
    };
    let opening = Opening {
        sharing: common.sharing,
        ..Opening::new(access)
    };
    let image = tool.open(&common.image(name)?, opening).await?;
    let node = &*image.node;
    match action {
        None => {}
        Some(Action::List) => output::print(&listing(node)),
        Some(Action::Create(name)) => create(node, &name).await?,
        Some(Action::Apply(name)) => apply(node, &name).await?,
        Some(Action::Delete(name)) => delete(node, &name).await?,
    }
    Ok(0)
}

fn listing(node: &Node) -> String {
    let described = node.driver().describe();
    let snapshots = described.get("snapshots").and_then(Value::as_array);
    snapshots.map_or(String::new(), |snapshots| table(snapshots))
}

/// `-ERRNO (reason)`
fn numbered(error: &Error) -> String {
    match error.errno {
        Some(errno) => format!("-{} ({})", errno as i32, block::error::reason(errno)),
        None => error.message.clone(),
    }
}

async fn create(node: &Node, name: &str) -> Result<(), Failure> {
    let failed =
        |reason: String| Failure::message(format!("Could not create snapshot '{name}': {reason}"));
    let Some(snapshots) = supported(node) else {
        return Err(failed(NOT_SUPPORTED.to_owned()));
    };
    let most = name.len().min(MAX_NAME);
    let kept = (0..=most).rev().find(|at| name.is_char_boundary(*at));
    let kept = kept.unwrap_or_default();
    let new = NewSnapshot {
        icount: Some(0),
        ..NewSnapshot::now(&name[..kept])
    };
    let created = snapshots.create(new).await;
    created.map(drop).map_err(|error| failed(numbered(&error)))
}

fn supported(node: &Node) -> Option<&dyn Snapshots> {
    let snapshots = node.driver().snapshots()?;
    snapshots.check().is_ok().then_some(snapshots)
}

async fn apply(node: &Node, name: &str) -> Result<(), Failure> {
    let failed =
        |reason: String| Failure::message(format!("Could not apply snapshot '{name}': {reason}"));
    let Some(snapshots) = supported(node) else {
        return Err(failed("Block driver does not support snapshots".into()));
    };
    let list = snapshots.list();
    let by_id = list.iter().find(|snapshot| snapshot.id == name);
    let found = by_id.or_else(|| list.iter().find(|snapshot| snapshot.name == name));
    let Some(found) = found else {
        let reason = "Failed to load snapshot: No such file or directory";
        return Err(failed(reason.into()));
    };
    let applied = node.apply_snapshot(&found.id).await;
    applied.map_err(|error| failed(error.message))
}

async fn delete(node: &Node, name: &str) -> Result<(), Failure> {
    let failed =
        |reason: String| Failure::message(format!("Could not delete snapshot '{name}': {reason}"));
    let found = supported(node).and_then(|snapshots| {
        let list = snapshots.list();
        let found = list.into_iter().find(|snapshot| snapshot.name == name)?;
        Some((snapshots, found.id))
    });
    let Some((snapshots, id)) = found else {
        return Err(failed("snapshot not found".into()));
    };
    let deleted = snapshots.delete(&id).await;
    deleted.map_err(|error| failed(error.message))
}

/// The table of QMP's `SnapshotInfo`s.
pub(crate) fn table(snapshots: &[Value]) -> String {
    let mut out = String::from("Snapshot list:\n");
    let mut row = |cells: [&str; 6]| {
        let [id, tag, size, date, clock, icount] = cells;
        let line = writeln!(
            out,
            "{id:<9} {tag:<16} {size:>8}{date:>20}{clock:>13}{icount:>11}"
        );
        line.expect("a string takes any text");
    };
    row(["ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"]);
    for snapshot in snapshots {
        let text = |key: &str| {
            snapshot
                .get(key)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let number = |key: &str| snapshot.get(key).and_then(Value::as_u64);
        let seconds = number("vm-clock-sec").unwrap_or_default();
        let clock = format!(
            "{:02}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            number("vm-clock-nsec").unwrap_or_default() / 1_000_000
        );
        let size = human(number("vm-state-size").unwrap_or_default());
        let date = date(number("date-sec").unwrap_or_default());
        let icount = number("icount").map_or(String::new(), |count| count.to_string());
        row([text("id"), text("name"), &size, &date, &clock, &icount]);
    }
    out
}

/// Seconds since 1970 in the local time zone.
fn date(seconds: u64) -> String {
    let time = Local.timestamp_opt(seconds as i64, 0).single();
    time.map_or(String::new(), |time| {
        time.format("%Y-%m-%d %H:%M:%S").to_string()
    })
}
