//! `map`: where each part of an image's content comes from.

use crate::info::Output;
use crate::{Command, Running};
use block::copy::status::above;
use block::error::reason;
use block::{BlockStatus, ByteRange, Node};
use tools::failure::{Failure, Outcome};
use tools::getopt::{self, Opt};
use tools::image::{Access, Common, Opening, Tool};
use tools::output;
use tools::size;

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "map",
    usage: "[--object objectdef] [--image-opts] [-f fmt] [--start-offset=offset] \
            [--max-length=len] [--output=ofmt] [-U] filename",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::value(&["f", "format"]),
    Opt::value(&["output"]),
    Opt::value(&["object"]),
    Opt::flag(&["image-opts"]),
    Opt::flag(&["U", "force-share"]),
    Opt::value(&["s", "start-offset"]),
    Opt::value(&["l", "max-length"]),
    Opt::value(&["allow-dir"]),
];

/// A run of bytes of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    start: u64,
    length: u64,
    depth: u32,
    status: BlockStatus,
    /// The file that `status.offset` is in.
    file: String,
}

impl Entry {
    fn end(&self) -> u64 {
        self.start + self.length
    }

    /// Whether `next` continues this run.
    fn joins(&self, next: &Entry) -> bool {
        let flags = |entry: &Entry| {
            let status = entry.status;
            (status.zero, status.data, status.allocated, entry.depth)
        };
        let continues = match (self.status.offset, next.status.offset) {
            (None, None) => true,
            (Some(here), Some(there)) => here.checked_add(self.length) == Some(there),
            _ => false,
        };
        flags(self) == flags(next) && continues && self.file == next.file
    }
}

async fn run(tool: &Tool, arguments: Vec<String>) -> Outcome {
    let parsed = getopt::parse(arguments, OPTIONS)?;
    let (mut common, mut output) = (Common::default(), Output::Human);
    let (mut start, mut length) = (0, None);
    for (name, value) in parsed.options {
        match name {
            "h" => return Ok(crate::help::of(&COMMAND)),
            "output" => output = Output::parse(&value)?,
            "s" => start = size::argument("start offset", &value)?,
            "l" => length = Some(size::argument("max length", &value)?),
            _ => {
                common.take(tool, (name, &value))?;
            }
        }
    }
    let name = getopt::one_image(parsed.operands)?;
    let opening = Opening {
        sharing: common.sharing,
        ..Opening::new(Access::Read)
    };
    let image = tool.open(&common.image(name)?, opening).await?;
    let whole = image.node.length();
    let end = length.map_or(whole, |length| start.saturating_add(length).min(whole));
    let mut printer = Printer::begin(output);
    let mut at = start;
    let mut pending: Option<Entry> = None;
    while at < end {
        let range = ByteRange::new(at, end - at);
        let entry = status_above(&image.node, range).await.map_err(|errno| {
            Failure::message(format!("Failed to read image metadata: {}", reason(errno)))
        })?;
        at = entry.end();
        match &mut pending {
            Some(run) if run.joins(&entry) => run.length += entry.length,
            _ => {
                if let Some(run) = pending.replace(entry) {
                    printer.print(&run, More::Follow)?;
                }
            }
        }
    }
    if let Some(run) = pending {
        printer.print(&run, More::None)?;
    }
    printer.end();
    Ok(0)
}

/// The status of the start of `range`, from the first image of the chain that decides it.
async fn status_above(node: &Node, range: ByteRange) -> Result<Entry, block::Errno> {
    let above = above(node, None, range).await?;
    Ok(Entry {
        start: range.offset,
        length: above.length,
        depth: above.depth,
        status: above.status,
        file: above.storage.map(Node::filename).unwrap_or_default(),
    })
}

/// Whether another entry follows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum More {
    Follow,
    None,
}

/// Writes entries.
struct Printer {
    output: Output,
}

impl Printer {
    fn begin(output: Output) -> Self {
        match output {
            Output::Human => output::line(&format!(
                "{:<16}{:<16}{:<16}File",
                "Offset", "Length", "Mapped to"
            )),
            Output::Json => output::print("["),
        }
        Self { output }
    }

    fn print(&mut self, entry: &Entry, more: More) -> Result<(), Failure> {
        let status = entry.status;
        match self.output {
            Output::Human => {
                if status.data && status.offset.is_none() {
                    let message = "File contains external, encrypted or compressed clusters.";
                    return Err(Failure::message(message));
                }
                if status.data && !status.zero {
                    let columns = [entry.start, entry.length, status.offset.unwrap_or(0)];
                    let columns: String = columns.map(column).concat();
                    output::line(&format!("{columns}{}", entry.file));
                }
            }
            Output::Json => {
                output::print(&format!(
                    "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \
                     \"zero\": {}, \"data\": {}",
                    entry.start,
                    entry.length,
                    entry.depth,
                    status.allocated,
                    status.zero,
                    status.data
                ));
                if let Some(offset) = status.offset {
                    output::print(&format!(", \"offset\": {offset}"));
                }
                output::print(&format!(
                    "}}{}",
                    if more == More::Follow { ",\n" } else { "" }
                ));
            }
        }
        Ok(())
    }

    fn end(self) {
        if self.output == Output::Json {
            output::line("]");
        }
    }
}

/// A hexadecimal number in 16 columns; zero has no prefix.
fn column(value: u64) -> String {
    let text = match value {
        0 => "0".to_owned(),
        value => format!("{value:#x}"),
    };
    format!("{text:<16}")
}
