//! `dd`: a range of one image in a new one.

use crate::create::{find, known, make_file};
use crate::{Command, Running};
use block::ByteRange;
use block::copy::{Act, Copy, CopyOptions, Sources, Unobserved};
use block::error::reason;
use tools::failure::{Failure, Outcome, described, report};
use tools::getopt::{self, Opt};
use tools::image::{Access, Common, ImageSpec, Notation, Opening, Tool};
use tools::options::Given;
use tools::size::{self, SizeError};

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "dd",
    usage: "[--image-opts] [-U] [-f fmt] [-O output_fmt] [bs=block_size] [count=blocks] \
            [skip=blocks] if=input of=output",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::value(&["f", "format"]),
    Opt::value(&["O", "output-format"]),
    Opt::value(&["object"]),
    Opt::flag(&["image-opts"]),
    Opt::flag(&["U", "force-share"]),
    Opt::value(&["allow-dir"]),
];

/// The block size, unless told otherwise, in bytes.
const BLOCK_BYTES: u64 = 512;

/// `name=value` operands.
struct Operands {
    input: Option<String>,
    output: Option<String>,
    block: u64,
    /// Blocks from the start, the skipped ones included.
    count: Option<u64>,
    skip: u64,
}

impl Operands {
    fn parse(texts: Vec<String>) -> Result<Self, Failure> {
        let mut operands = Self {
            input: None,
            output: None,
            block: BLOCK_BYTES,
            count: None,
            skip: 0,
        };
        for text in texts {
            let (name, value) = text.split_once('=').unwrap_or((&text, ""));
            let is_pair = text.contains('=');
            match name {
                "if" if is_pair => operands.input = Some(value.to_owned()),
                "of" if is_pair => operands.output = Some(value.to_owned()),
                "bs" if is_pair => operands.block = block_size(value)?,
                "count" if is_pair => operands.count = Some(size::argument("count", value)?),
                "skip" if is_pair => operands.skip = size::argument("skip", value)?,
                _ => return Err(Failure::message(format!("unrecognized operand {name}"))),
            }
        }
        Ok(operands)
    }

    /// What is copied of `length` bytes; `None` when nothing is left behind what is skipped.
    fn range(&self, length: u64) -> Option<ByteRange> {
        let limit = self.count.and_then(|count| count.checked_mul(self.block));
        let end = limit.map_or(length, |limit| limit.min(length));
        let start = self.skip.checked_mul(self.block)?;
        let left = end.checked_sub(start)?;
        Some(ByteRange::new(start, left))
    }
}

fn block_size(text: &str) -> Result<u64, Failure> {
    match size::parse(text) {
        Ok(bytes) if (1..=i32::MAX as u64).contains(&bytes) => Ok(bytes),
        Ok(_) | Err(SizeError::OutOfRange) => Err(Failure::message(format!(
            "Invalid bs specified. Must be between 1 and {}.",
            i32::MAX
        ))),
        Err(SizeError::Malformed) => Err(size::argument("bs", text)
            .err()
            .unwrap_or_else(|| Failure::message("Invalid bs specified."))),
    }
}

async fn run(tool: &Tool, arguments: Vec<String>) -> Outcome {
    let parsed = getopt::parse(arguments, OPTIONS)?;
    let (mut common, mut format) = (Common::default(), "raw".to_owned());
    for (name, value) in parsed.options {
        match name {
            "h" => return Ok(crate::help::of(&COMMAND)),
            "O" => format = value,
            _ => {
                common.take(tool, (name, &value))?;
            }
        }
    }
    let mut operands = Operands::parse(parsed.operands)?;
    let (Some(input), Some(output)) = (operands.input.take(), operands.output.take()) else {
        return Err(Failure::message("Must specify both input and output files"));
    };
    let opening = Opening {
        sharing: common.sharing,
        ..Opening::new(Access::Read)
    };
    let source = tool.open(&common.image(input.clone())?, opening).await?;
    let entry = match tool.graph().entry(&format) {
        None => return Err(Failure::message("Unknown file format")),
        Some(_) => find(tool, &format).map_err(Failure::message)?,
    };
    let range = operands.range(source.node.length());
    let length = range.map_or(0, |range| range.length);
    let known = known(tool, entry);
    let mut given = Given::default();
    given
        .set(&known, "size", &length.to_string())
        .map_err(Failure::message)?;
    let made = make_file(tool, (&output, entry), (&known, &given)).await;
    made.map_err(|error| {
        let context = format!("{output}: error while creating output image");
        Failure::message(described(&context, &error))
    })?;
    let spec = ImageSpec {
        name: output,
        format: Some(format),
        notation: Notation::Filename,
    };
    let target = tool.open(&spec, Opening::new(Access::Write)).await?;
    match range {
        None => report(&format!("{input}: cannot skip to specified offset")),
        Some(range) => {
            let sources = Sources::of_range(&source.root, range);
            let sources = sources.ok_or_else(|| Failure::message("The input is too long"))?;
            let options = CopyOptions {
                sparse: None,
                ..CopyOptions::default()
            };
            let handle = target.root.attach();
            let copy = Copy::new((&sources, &handle), &options, &Unobserved);
            copy.run().await.map_err(|error| {
                let what = match error.act {
                    Act::Status | Act::Read => "reading from input",
                    Act::Write => "writing to output",
                };
                let reason = reason(error.errno);
                Failure::message(format!("error while {what} image file: {reason}"))
            })?;
        }
    }
    tool.close_image(target).await?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(texts: &[&str]) -> Option<(u64, u64)> {
        let texts = texts.iter().map(|text| (*text).to_owned()).collect();
        let range = Operands::parse(texts).unwrap().range(10_000);
        range.map(|range| (range.offset, range.length))
    }

    #[test]
    fn skipped_blocks_are_among_those_counted() {
        assert_eq!(range(&[]), Some((0, 10_000)));
        assert_eq!(range(&["bs=1k", "count=3", "skip=1"]), Some((1024, 2048)));
        assert_eq!(range(&["bs=1000", "skip=9"]), Some((9000, 1000)));
        assert_eq!(range(&["skip=20"]), None);
        assert_eq!(range(&["bs=1G", "count=7E"]), Some((0, 10_000)));
        assert_eq!(range(&["bs=1G", "skip=7E"]), None);
    }
}
