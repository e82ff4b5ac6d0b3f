//! `amend`: changes what an image was created with.

use crate::{Command, Running};
use block::AmendRequest;
use block::amend::{Force, unsupported};
use block::create::OptionSpec;
use tools::failure::{Failure, Outcome};
use tools::getopt::{self, Opt};
use tools::image::{Access, Cache, Common, Opening, Tool, could_not_open};
use tools::options::{Given, asks_for_help, help, list};
use tools::output;
use tools::progress::{Progress, Show};

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "amend",
    usage: "[--object objectdef] [--image-opts] [-p] [-q] [-f fmt] [-t cache] [--force] \
            -o options filename",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::value(&["o", "options"]),
    Opt::value(&["f", "format"]),
    Opt::value(&["t", "cache"]),
    Opt::flag(&["p", "progress"]),
    Opt::flag(&["q", "quiet"]),
    Opt::value(&["object"]),
    Opt::flag(&["image-opts"]),
    Opt::flag(&["force"]),
    Opt::value(&["allow-dir"]),
];

async fn run(tool: &Tool, arguments: Vec<String>) -> Outcome {
    let parsed = getopt::parse(arguments, OPTIONS)?;
    let (mut common, mut cache) = (Common::default(), Cache::default());
    let (mut texts, mut show, mut force) = (Vec::new(), Show::OnSignal, Force::Refuse);
    for (name, value) in parsed.options {
        match name {
            "h" => return Ok(crate::help::of(&COMMAND)),
            "o" => texts.push(list(value)?),
            "t" => cache = Cache::parse(&value)?,
            "p" => show = Show::Always,
            "force" => force = Force::Allow,
            _ => {
                common.take(tool, (name, &value))?;
            }
        }
    }
    if texts.is_empty() {
        return Err(Failure::usage("Must specify options (-o)"));
    }
    if let (Some(format), true) = (&common.format, texts.iter().any(|text| asks_for_help(text))) {
        return show_options(tool, format);
    }
    let [name] = <[String; 1]>::try_from(parsed.operands)
        .map_err(|_| Failure::message("Expecting one image file name"))?;
    let opening = Opening {
        cache,
        ..Opening::new(Access::Write)
    };
    let spec = common.image(name)?;
    let mut options = tool.prepare(&spec, opening)?;
    let format = match options.get("driver").and_then(|driver| driver.as_str()) {
        Some(format) => format.to_owned(),
        None => {
            let image = tool.open(&spec, Opening::new(Access::Describe)).await?;
            let format = image.node.driver().driver_name();
            tool.close_image(image).await?;
            options.insert("driver".into(), format.into());
            format.to_owned()
        }
    };
    if texts.iter().any(|text| asks_for_help(text)) {
        return show_options(tool, &format);
    }
    let (known, created) = known(tool, &format)?;
    let mut given = Given::default();
    for text in &texts {
        given.parse(text, &known).map_err(|message| {
            let is_create_option = created
                .iter()
                .any(|spec| message == format!("Invalid parameter '{}'", spec.name));
            Failure::message(match is_create_option {
                true => format!("{message}\nThis option is only supported for image creation"),
                false => message,
            })
        })?;
    }
    let amended = {
        let progress = (!common.quiet || show == Show::OnSignal).then(|| Progress::begin(show));
        let mut tell = |done, total| {
            if let Some(progress) = &progress {
                progress.at(done, total);
            }
        };
        let mut request = AmendRequest::new(given.members(&known), force, &mut tell)
            .with_secrets(tool.graph().secrets());
        let amended = tool.graph().amend(options, &mut request).await;
        amended.map_err(|error| match request.is_open() {
            true => Failure::block("", &error),
            false => could_not_open(&spec, &error),
        })
    };
    amended?;
    Ok(0)
}

/// The options that `amend` knows, and those that only `create` does.
type Known = (Vec<&'static OptionSpec>, &'static [OptionSpec]);

fn known(tool: &Tool, format: &str) -> Result<Known, Failure> {
    let entry = tool.graph().entry(format);
    let amender = entry.and_then(|entry| entry.amend.as_ref());
    let amender = amender.ok_or_else(|| Failure::block("", &unsupported(format)))?;
    let create = entry.and_then(|entry| entry.create.as_ref());
    let created = create.map_or(&[][..], |creator| creator.options);
    Ok((amender.options.iter().collect(), created))
}

fn show_options(tool: &Tool, format: &str) -> Outcome {
    if tool.graph().entry(format).is_none() {
        let message = format!("Unknown file format '{format}'");
        return Err(Failure::message(message));
    }
    let (known, _) = known(tool, format)?;
    output::print(&format!("Amend options for '{format}':\n{}", help(&known)));
    Ok(0)
}
