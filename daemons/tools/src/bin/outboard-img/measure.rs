//! `measure`: how large the file of a new image becomes.

use crate::convert::source::{Selection, Source};
use crate::create::{find, known};
use crate::info::Output;
use crate::{Command, Running};
use block::Measured;
use serde_json::{Map, Value, json as value};
use tools::failure::{Failure, Outcome, described, report};
use tools::getopt::{self, Opt};
use tools::image::{Access, Common, Notation, Opening, Tool};
use tools::options::{self, Given};
use tools::output;
use tools::{json, size};

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "measure",
    usage: "[--output=ofmt] [-O output_fmt] [-o options] [--size N | [--object objectdef] \
            [--image-opts] [-f fmt] [-l snapshot_param] filename]",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::value(&["f", "format", "source-format"]),
    Opt::value(&["l", "snapshot"]),
    Opt::value(&["o", "options", "target-format-options"]),
    Opt::value(&["O", "target-format"]),
    Opt::flag(&["U", "force-share"]),
    Opt::value(&["object"]),
    Opt::flag(&["image-opts", "source-image-opts"]),
    Opt::value(&["output"]),
    Opt::value(&["size", "s"]),
    Opt::value(&["allow-dir"]),
];

/// What is to be measured.
struct Request {
    common: Common,
    format: String,
    options: Vec<String>,
    snapshot: Option<Selection>,
    output: Output,
    size: Option<u64>,
    name: Option<String>,
}

async fn run(tool: &Tool, arguments: Vec<String>) -> Outcome {
    let parsed = getopt::parse(arguments, OPTIONS)?;
    let mut request = Request {
        common: Common::default(),
        format: "raw".to_owned(),
        options: Vec::new(),
        snapshot: None,
        output: Output::Human,
        size: None,
        name: None,
    };
    for (name, value) in parsed.options {
        match name {
            "h" => return Ok(crate::help::of(&COMMAND)),
            "l" => request.snapshot = Some(Selection::parse(&value)?),
            "o" => request.options.push(options::list(value)?),
            "O" => request.format = value,
            "output" => request.output = Output::parse(&value)?,
            "size" => request.size = Some(size::argument("image size", &value)?),
            _ => {
                request.common.take(tool, (name, &value))?;
            }
        }
    }
    let mut operands = parsed.operands.into_iter();
    request.name = operands.next();
    if operands.next().is_some() {
        return Err(Failure::message(
            "At most one filename argument is allowed.",
        ));
    }
    request.check()?;
    let measured = request.measure(tool).await?;
    match request.output {
        Output::Human => output::print(&human(measured)),
        Output::Json => output::print(&json::text(&in_json(measured))),
    }
    Ok(0)
}

impl Request {
    fn check(&self) -> Result<(), Failure> {
        let about_image = self.common.notation == Notation::Options
            || self.common.format.is_some()
            || self.snapshot.is_some();
        let message = match (&self.name, self.size) {
            (None, _) if about_image => "--image-opts, -f, and -l require a filename argument.",
            (None, None) => "Either --size N or one filename must be specified.",
            (Some(_), Some(_)) => "--size N cannot be used together with a filename.",
            _ => return Ok(()),
        };
        Err(Failure::message(message))
    }

    async fn measure(&self, tool: &Tool) -> Result<Measured, Failure> {
        let opening = Opening {
            sharing: self.common.sharing,
            ..Opening::new(Access::Read)
        };
        let mut images = Vec::new();
        if let Some(name) = &self.name {
            let spec = self.common.image(name.clone())?;
            images.push(tool.open(&spec, opening).await?);
        }
        let source = Source::select(&images, self.snapshot.as_ref(), self.common.sharing).await?;
        let entry = find(tool, &self.format).map_err(Failure::message)?;
        let known = known(tool, entry);
        let mut given = Given::default();
        for text in &self.options {
            if let Err(message) = given.parse(text, &known) {
                report(&message);
                let message = format!("Invalid options for file format '{}'", self.format);
                return Err(Failure::message(message));
            }
        }
        if let Some(size) = self.size {
            given
                .set(&known, "size", &size.to_string())
                .map_err(Failure::message)?;
        }
        let handle = source.roots().first().map(block::Root::attach);
        let members = given.members(&known);
        let measured = tool
            .graph()
            .measure(entry.name, members, handle.as_ref())
            .await;
        let measured = measured.map_err(|error| {
            let is_large = error.errno == Some(block::Errno::EFBIG);
            Failure::message(match is_large {
                true => "The image size is too large (try using a larger cluster size)".to_owned(),
                false => described("", &error),
            })
        })?;
        drop(handle);
        source.close(tool, images).await?;
        Ok(measured)
    }
}

fn human(measured: Measured) -> String {
    let mut text = format!(
        "required size: {}\nfully allocated size: {}\n",
        measured.required, measured.fully_allocated
    );
    if let Some(bytes) = measured.bitmaps {
        text.push_str(&format!("bitmaps size: {bytes}\n"));
    }
    text
}

fn in_json(measured: Measured) -> Value {
    let mut members = Map::new();
    members.insert("required".into(), value!(measured.required));
    members.insert("fully-allocated".into(), value!(measured.fully_allocated));
    if let Some(bytes) = measured.bitmaps {
        members.insert("bitmaps".into(), value!(bytes));
    }
    Value::Object(members)
}
