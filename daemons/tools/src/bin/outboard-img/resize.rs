//! `resize`: a larger or smaller virtual disk.

use crate::{Command, Running};
use block::{Preallocation, Resize};
use tools::failure::{Failure, Outcome, described, report, warn};
use tools::getopt::{self, Opt};
use tools::image::{Access, Common, Opening, Tool};
use tools::size::{self, SizeError};

/// Sizes are multiples of this many bytes.
const SECTOR: u64 = 512;

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "resize",
    usage: "[--object objectdef] [--image-opts] [-f fmt] [--preallocation=prealloc] [-q] \
            [--shrink] filename [+ | -]size",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::value(&["f", "format"]),
    Opt::flag(&["q", "quiet"]),
    Opt::value(&["object"]),
    Opt::flag(&["image-opts"]),
    Opt::value(&["preallocation"]),
    Opt::flag(&["shrink"]),
    Opt::value(&["allow-dir"]),
];

/// The new size as the command line gives it.
#[derive(Clone, Copy)]
enum NewSize {
    Absolute(u64),
    Grow(u64),
    Shrink(u64),
}

impl NewSize {
    fn parse(text: &str) -> Result<Self, Failure> {
        let (kind, number): (fn(u64) -> Self, &str) =
            match (text.strip_prefix('+'), text.strip_prefix('-')) {
                (Some(number), _) => (Self::Grow, number),
                (_, Some(number)) => (Self::Shrink, number),
                _ => (Self::Absolute, text),
            };
        let bytes = size::parse(number)
            .map_err(|error| Failure::message(size::option_error("size", number, error)))?;
        match i64::try_from(bytes) {
            Ok(_) => Ok(kind(bytes)),
            Err(_) => {
                let error = SizeError::OutOfRange;
                Err(Failure::message(size::option_error("size", number, error)))
            }
        }
    }

    fn of(self, current: u64) -> Option<u64> {
        match self {
            Self::Absolute(bytes) => Some(bytes),
            Self::Grow(bytes) => current.checked_add(bytes),
            Self::Shrink(bytes) => current.checked_sub(bytes),
        }
    }
}

async fn run(tool: &Tool, mut arguments: Vec<String>) -> Outcome {
    // The size may begin with a dash, so it is taken before options are looked for.
    if arguments.len() < 2 {
        if arguments
            .iter()
            .any(|argument| argument == "-h" || argument == "--help")
        {
            return Ok(crate::help::of(&COMMAND));
        }
        return Err(Failure::usage("Not enough arguments"));
    }
    let size = arguments.pop().unwrap_or_default();
    let parsed = getopt::parse(arguments, OPTIONS)?;
    let (mut common, mut preallocation, mut may_shrink) =
        (Common::default(), Preallocation::Off, false);
    for (name, value) in parsed.options {
        match name {
            "h" => return Ok(crate::help::of(&COMMAND)),
            "preallocation" => preallocation = preallocation_mode(&value)?,
            "shrink" => may_shrink = true,
            _ => {
                common.take(tool, (name, &value))?;
            }
        }
    }
    let Ok([name]) = <[String; 1]>::try_from(parsed.operands) else {
        return Err(Failure::usage("Expecting image file name and size"));
    };
    let size = NewSize::parse(&size)?;
    let image = tool
        .open(&common.image(name)?, Opening::new(Access::Write))
        .await?;
    let current = image.node.length();
    let length = size.of(current).filter(|length| *length > 0);
    let Some(length) = length.and_then(|length| length.checked_next_multiple_of(SECTOR)) else {
        return Err(Failure::message("New image size must be positive"));
    };
    if length <= current && preallocation != Preallocation::Off {
        let message = "Preallocation can only be used for growing images";
        return Err(Failure::message(message));
    }
    if length < current && !may_shrink {
        report("Use the --shrink option to perform a shrink operation.");
        warn(
            "Shrinking an image will delete all data beyond the shrunken image's end. Before \
             performing such an operation, make sure there is no important data there.",
        );
        return Err(Failure::Silent(1));
    }
    let resized = image
        .node
        .resize(Resize {
            length,
            preallocation,
        })
        .await;
    resized.map_err(|error| Failure::message(described("", &error)))?;
    common.say("Image resized.");
    Ok(0)
}

fn preallocation_mode(text: &str) -> Result<Preallocation, Failure> {
    match text {
        "off" => Ok(Preallocation::Off),
        "metadata" => Ok(Preallocation::Metadata),
        "falloc" => Ok(Preallocation::Falloc),
        "full" => Ok(Preallocation::Full),
        _ => Err(Failure::message(format!(
            "Invalid preallocation mode '{text}'"
        ))),
    }
}
