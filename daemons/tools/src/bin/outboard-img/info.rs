//! `info`: what an image says about itself.

use crate::{Command, Running, text};
use block::open::MAX_CHAIN;
use block::{Limits, Node};
use serde_json::{Map, Value, json as value};
use std::sync::Arc;
use tools::failure::{Failure, Outcome};
use tools::getopt::{self, Opt};
use tools::image::{Access, Cache, Common, Opening, Tool};
use tools::json;
use tools::output;

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "info",
    usage: "[--object objectdef] [--image-opts] [-f fmt] [-t cache] [--output=ofmt] \
            [--backing-chain] [--limits] [-U] filename",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::value(&["f", "format"]),
    Opt::value(&["output"]),
    Opt::flag(&["backing-chain"]),
    Opt::value(&["t", "cache"]),
    Opt::flag(&["limits"]),
    Opt::value(&["object"]),
    Opt::flag(&["image-opts"]),
    Opt::flag(&["U", "force-share"]),
    Opt::value(&["allow-dir"]),
];

/// `--output`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Output {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

impl Output {
    /// The value of `--output`.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            _ => Err(Failure::message(
                "--output must be used with human or json as argument.",
            )),
        }
    }
}

/// How much of the chain is shown.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Depth {
    One,
    Chain,
}

/// What is told of each image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Detail {
    Usual,
    /// `--limits`: what requests have to look like, too.
    Limits,
}

async fn run(tool: &Tool, arguments: Vec<String>) -> Outcome {
    let parsed = getopt::parse(arguments, OPTIONS)?;
    let (mut common, mut output, mut depth) = (Common::default(), Output::Human, Depth::One);
    let (mut cache, mut detail) = (Cache::default(), Detail::Usual);
    for (name, value) in parsed.options {
        match name {
            "h" => return Ok(crate::help::of(&COMMAND)),
            "output" => output = Output::parse(&value)?,
            "backing-chain" => depth = Depth::Chain,
            "t" => cache = Cache::parse(&value)?,
            "limits" => detail = Detail::Limits,
            _ => {
                common.take(tool, (name, &value))?;
            }
        }
    }
    let name = getopt::one_image(parsed.operands)?;
    let opening = Opening {
        sharing: common.sharing,
        cache,
        ..Opening::new(Access::Describe)
    };
    let image = tool.open(&common.image(name)?, opening).await?;
    let mut infos = vec![describe(&image.node, detail)];
    if depth == Depth::Chain {
        follow((tool, detail), &image.node, &mut infos).await?;
    }
    match (output, depth) {
        (Output::Human, _) => {
            let texts: Vec<String> = infos
                .iter()
                .map(|info| text::image(&ordered(info)))
                .collect();
            output::print(&texts.join("\n"));
        }
        (Output::Json, Depth::Chain) => output::print(&json::text(&infos.into())),
        (Output::Json, Depth::One) => output::print(&json::text(&infos.remove(0))),
    }
    Ok(0)
}

fn ordered(info: &Value) -> Map<String, Value> {
    match json::ordered(info) {
        Value::Object(members) => members,
        _ => Map::new(),
    }
}

/// Adds the backing images, as far as the names in the images may be followed.
async fn follow(
    (tool, detail): (&Tool, Detail),
    top: &Arc<Node>,
    infos: &mut Vec<Value>,
) -> Result<(), Failure> {
    let mut current = Arc::clone(top);
    let mut seen = vec![current.filename()];
    loop {
        let info = infos.last().expect("the top image is there");
        let Some(name) = info.get("backing-filename").and_then(Value::as_str) else {
            return Ok(());
        };
        let format = info.get("backing-filename-format").and_then(Value::as_str);
        let full = info
            .get("full-backing-filename")
            .and_then(Value::as_str)
            .unwrap_or(name)
            .to_owned();
        if seen.contains(&full) || seen.len() > MAX_CHAIN {
            let message = format!("Backing file '{full}' creates an infinite loop.");
            return Err(Failure::message(message));
        }
        let opened = tool.graph().describe_backing(&current, name, format).await;
        current =
            opened.map_err(|error| Failure::block(&format!("Could not open '{full}'"), &error))?;
        seen.push(full);
        infos.push(describe(&current, detail));
    }
}

/// QMP's `ImageInfo` of a node, without its backing image.
fn describe(node: &Node, detail: Detail) -> Value {
    let driver = node.driver();
    let filename = node.filename();
    let mut info = value!({
        "virtual-size": node.length(),
        "filename": filename,
        "format": driver.driver_name(),
        "dirty-flag": false,
    });
    let mut disk_size = None;
    for (role, edge) in driver.edges() {
        let described = edge.node().driver().describe();
        if let (Some(size), true) = (
            described.get("actual-size").and_then(Value::as_u64),
            role != "backing",
        ) {
            disk_size = Some(disk_size.unwrap_or(0_u64).saturating_add(size));
        }
    }
    if let Some(size) = disk_size {
        info["actual-size"] = value!(size);
    }
    for (key, member) in driver.describe() {
        info[key] = member;
    }
    if let Some(name) = info.get("backing-filename").and_then(Value::as_str) {
        // Where there are no directories, a relative name leads nowhere.
        if let Ok(full) = node.absolute_name(name) {
            info["full-backing-filename"] = value!(full);
        }
    }
    if detail == Detail::Limits {
        info["limits"] = limits(&node.driver().limits());
    }
    info
}

/// QMP's `BlockLimitsInfo`; a limit that there is not is absent.
fn limits(limits: &Limits) -> Value {
    let mut info = Map::new();
    let mut add = |name: &str, value: u64| info.insert(name.to_owned(), value.into());
    add("request-alignment", limits.request_alignment.into());
    let some = [
        ("discard-alignment", limits.zero_alignment),
        ("write-zeroes-alignment", limits.zero_alignment),
        ("opt-transfer", limits.optimal_transfer),
        ("max-transfer", limits.max_transfer),
    ];
    for (name, value) in some.into_iter().filter(|(_, value)| *value != 0) {
        add(name, value.into());
    }
    add("max-iov", libc::UIO_MAXIOV as u64);
    add("min-mem-alignment", limits.memory_alignment.into());
    add("opt-mem-alignment", executor::HEAP_ALIGN as u64);
    Value::Object(info)
}
