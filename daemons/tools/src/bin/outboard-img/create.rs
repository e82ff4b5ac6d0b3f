//! `create`: a new image.

use crate::{Command, Running};
use block::create::{OptionSpec, Target};
use block::naming;
use block::{DriverEntry, Error, ErrorKind};
use serde_json::{Value, json};
use tools::failure::{Failure, Outcome};
use tools::getopt::{self, Opt};
use tools::image::{Access, Common, ImageSpec, Notation, Opening, Tool};
use tools::options::{Given, asks_for_help, help, list, of_image};
use tools::output;
use tools::size;

/// What makes the files that images are in.
const PROTOCOL: &str = "file";

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "create",
    usage: "[--object objectdef] [-q] [-f fmt] [-b backing_file [-F backing_fmt]] [-u] \
            [-o options] filename [size]",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::value(&["F", "backing-format"]),
    Opt::value(&["b", "backing"]),
    Opt::value(&["f", "format"]),
    Opt::value(&["o", "options"]),
    Opt::flag(&["q", "quiet"]),
    Opt::flag(&["u", "backing-unsafe"]),
    Opt::value(&["object"]),
    Opt::value(&["allow-dir"]),
];

/// What the command line asks for.
struct Request {
    common: Common,
    format: String,
    name: String,
    backing: Option<String>,
    backing_format: Option<String>,
    /// `-u`: the backing file is not looked at.
    unsafe_backing: bool,
    options: Vec<String>,
    size: Option<u64>,
}

async fn run(tool: &Tool, arguments: Vec<String>) -> Outcome {
    let parsed = getopt::parse(arguments, OPTIONS)?;
    let mut common = Common::default();
    let (mut backing, mut backing_format) = (None, None);
    let (mut options, mut unsafe_backing) = (Vec::new(), false);
    for (name, value) in parsed.options {
        match name {
            "h" => return Ok(crate::help::of(&COMMAND)),
            "F" => backing_format = Some(value),
            "b" => backing = Some(value),
            "u" => unsafe_backing = true,
            "o" => options.push(list(value)?),
            _ => {
                common.take(tool, (name, &value))?;
            }
        }
    }
    let format = common.format.clone().unwrap_or_else(|| "raw".to_owned());
    let mut operands = parsed.operands.into_iter();
    let name = operands.next();
    if options.iter().any(|text| asks_for_help(text)) {
        return show_options(tool, &format, name.is_some());
    }
    let name = name.ok_or_else(|| Failure::usage("Expecting image file name"))?;
    let size = operands.next();
    let size = size
        .map(|text| size::argument("image size", &text))
        .transpose()?;
    if let Some(extra) = operands.next() {
        return Err(Failure::usage(format!("Unexpected argument: {extra}")));
    }
    let request = Request {
        common,
        format,
        name,
        backing,
        backing_format,
        unsafe_backing,
        options,
        size,
    };
    request.make(tool).await?;
    Ok(0)
}

/// The options of a format, then those of the protocol that it has not got itself.
pub(crate) fn known(tool: &Tool, entry: &DriverEntry) -> Vec<&'static OptionSpec> {
    let own = entry
        .create
        .as_ref()
        .map_or(&[][..], |creator| creator.options);
    let protocol = tool
        .graph()
        .entry(PROTOCOL)
        .and_then(|entry| entry.create.as_ref())
        .map_or(&[][..], |creator| creator.options);
    let mut known: Vec<&OptionSpec> = own.iter().collect();
    for spec in protocol {
        if !known.iter().any(|known| known.name == spec.name) {
            known.push(spec);
        }
    }
    known
}

pub(crate) fn find(tool: &Tool, format: &str) -> Result<&'static DriverEntry, String> {
    let entry = tool.graph().entry(format);
    let entry = entry.ok_or_else(|| format!("Unknown file format '{format}'"))?;
    match entry.create {
        Some(_) => Ok(entry),
        None => Err(format!(
            "Format driver '{format}' does not support image creation"
        )),
    }
}

pub(crate) fn show_options(tool: &Tool, format: &str, with_protocol: bool) -> Outcome {
    let entry = find(tool, format).map_err(Failure::message)?;
    if with_protocol {
        output::print(&format!(
            "Supported options:\n{}",
            help(&known(tool, entry))
        ));
    } else {
        let own = entry
            .create
            .as_ref()
            .map_or(&[][..], |creator| creator.options);
        let own: Vec<_> = own.iter().collect();
        output::print(&format!("Supported {format} options:\n{}", help(&own)));
        output::line(
            "\nThe protocol level may support further options.\n\
             Specify the target filename to include those options.",
        );
    }
    Ok(0)
}

/// Makes the file `name` into an image of the driver `entry`.
pub(crate) async fn make_file(
    tool: &Tool,
    (name, entry): (&str, &DriverEntry),
    (known, given): (&[&OptionSpec], &Given),
) -> Result<(), Error> {
    let mut members = given.members(known);
    if let Some(size) = members.get_mut("size") {
        let bytes = size.as_u64().unwrap_or_default();
        let unit = entry.create.as_ref().map_or(1, |creator| creator.size_unit);
        *size = json!(bytes.checked_next_multiple_of(unit).unwrap_or(bytes));
    }
    // The old switch stands for the old cipher.
    if members.remove("encryption") == Some(Value::Bool(true)) {
        let encrypt = members.entry("encrypt").or_insert_with(|| json!({}));
        if encrypt.get("format").is_some() {
            let message =
                "'encrypt.format' and its alias 'encryption' can't be used at the same time";
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        encrypt["format"] = json!("aes");
    }
    let target = Target::Name(name.to_owned());
    let created = tool.graph().create(entry.name, target, members).await;
    created.map_err(|error| explained(entry.name, given, error))
}

/// Too large an image is told apart from other failures, with what may help.
fn explained(format: &str, given: &Given, error: Error) -> Error {
    if error.errno != Some(block::Errno::EFBIG) {
        return error;
    }
    let advice = match given.number("cluster_size").is_some() || format == "qcow2" {
        true => " (try using a larger cluster size)",
        false => "",
    };
    let message = format!("The image size is too large for file format '{format}'{advice}");
    Error::new(ErrorKind::Invalid, message)
}

impl Request {
    async fn make(&self, tool: &Tool) -> Result<(), Failure> {
        let failed = |message: String| of_image(&self.name, &message);
        let entry = find(tool, &self.format).map_err(failed)?;
        if self.name.starts_with("json:") {
            return Err(failed("Unknown protocol 'json'".to_owned()));
        }
        let names = tool.graph().names();
        names
            .options(&self.name)
            .map_err(|error| failed(error.message))?;
        let known = known(tool, entry);
        let mut given = self.given(&known).map_err(failed)?;
        self.settle_backing(tool, (&known, &mut given)).await?;
        if given.number("size").is_none() {
            return Err(failed("Image creation needs a size parameter".to_owned()));
        }
        self.common.say(&format!(
            "Formatting '{}', fmt={}{}",
            self.name,
            self.format,
            given.shown(&known)
        ));
        // It stands before whatever goes wrong.
        output::flush();
        let made = make_file(tool, (&self.name, entry), (&known, &given)).await;
        made.map_err(|error| Failure::block(&self.name, &error))
    }

    fn given(&self, known: &[&OptionSpec]) -> Result<Given, String> {
        let mut given = Given::default();
        let format = &self.format;
        for text in &self.options {
            given.parse(text, known)?;
        }
        if let Some(size) = self.size {
            if given.number("size").is_some() {
                return Err("The image size must be specified only once".to_owned());
            }
            given.set(known, "size", &size.to_string())?;
        }
        if let Some(backing) = &self.backing {
            given
                .set(known, "backing_file", backing)
                .map_err(|_| format!("Backing file not supported for file format '{format}'"))?;
        }
        if let Some(backing) = &self.backing_format {
            given
                .set(known, "backing_fmt", backing)
                .map_err(|_| format!("Backing format not supported for file format '{format}'"))?;
        }
        Ok(given)
    }

    /// Looks at the backing file: it must open, and gives the size when there is none.
    async fn settle_backing(
        &self,
        tool: &Tool,
        (known, given): (&[&OptionSpec], &mut Given),
    ) -> Result<(), Failure> {
        let failed = |message: &str| of_image(&self.name, message);
        let Some(backing) = given.text("backing_file").map(str::to_owned) else {
            return Ok(());
        };
        if backing.is_empty() {
            return Err(failed("Expected backing file name, got empty string"));
        }
        if backing == self.name {
            return Err(failed(
                "Error: Trying to create an image with the same filename as the backing file",
            ));
        }
        if self.unsafe_backing {
            return Ok(());
        }
        let format = given.text("backing_fmt").map(str::to_owned);
        let spec = ImageSpec {
            name: naming::combine(&self.name, &backing),
            format: format.clone(),
            notation: Notation::Filename,
        };
        let without_image = |failure| match failure {
            Failure::Message(message, code) => {
                let message = nested(&message, &spec.name);
                let message = format!("{}: {message}\nCould not open backing image.", self.name);
                Failure::Message(message, code)
            }
            other => other,
        };
        let opened = tool.open(&spec, Opening::new(Access::Inspect)).await;
        let image = opened.map_err(without_image)?;
        if format.is_none() {
            let detected = image.node.driver().driver_name();
            let message = format!(
                "Backing file specified without backing format\nDetected format of {detected}."
            );
            return Err(failed(&message));
        }
        if given.number("size").is_none() {
            let length = image.node.length().to_string();
            given
                .set(known, "size", &length)
                .map_err(|message| failed(&message))?;
        }
        tool.close_image(image).await
    }
}

/// The message without what [`Tool::open`] puts before those of the graph.
fn nested(message: &str, name: &str) -> String {
    let context = format!("Could not open '{name}': ");
    message.strip_prefix(&context).unwrap_or(message).to_owned()
}
