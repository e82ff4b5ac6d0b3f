//! `check`: is an image consistent, and its repair.
//!
//! Exit codes: 0 nothing is wrong (any more), 1 the check itself failed, 2 errors, 3 leaks only,
//! 63 the format has no check. After a repair that did something the image is checked once more,
//! and that is what is told and decides the exit code.

use crate::info::Output;
use crate::{Command, Running};
use block::error::reason;
use block::{CheckOptions, CheckResult, CheckSink, ErrorKind, Repair};
use serde_json::{Map, Value, json as value};
use tools::failure::{Failure, Outcome, report};
use tools::getopt::{self, Opt};
use tools::image::{Access, Cache, Common, Image, ImageSpec, Opening, Tool};
use tools::json;
use tools::output;

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "check",
    usage: "[--object objectdef] [--image-opts] [-q] [-f fmt] [--output=ofmt] \
            [-r [leaks | all]] [-T src_cache] [-U] filename",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::value(&["f", "format"]),
    Opt::value(&["r", "repair"]),
    Opt::value(&["output"]),
    Opt::value(&["T", "cache"]),
    Opt::flag(&["q", "quiet"]),
    Opt::value(&["object"]),
    Opt::flag(&["image-opts"]),
    Opt::flag(&["U", "force-share"]),
    Opt::value(&["allow-dir"]),
];

/// Exit code when the format has no check.
const NO_CHECK: u8 = 63;

/// Findings go to stderr, each on a line.
struct Findings;

impl CheckSink for Findings {
    fn message(&mut self, text: &str) {
        eprintln!("{text}");
    }
    fn error(&mut self, text: &str) {
        report(text);
    }
}

async fn run(tool: &Tool, arguments: Vec<String>) -> Outcome {
    let parsed = getopt::parse(arguments, OPTIONS)?;
    let (mut common, mut output, mut repair) = (Common::default(), Output::Human, Repair::None);
    let mut cache = Cache::default();
    for (name, value) in parsed.options {
        match name {
            "h" => return Ok(crate::help::of(&COMMAND)),
            "output" => output = Output::parse(&value).map_err(without_hint)?,
            "r" => repair = parse_repair(&value)?,
            "T" => {
                let invalid = || Failure::message(format!("Invalid source cache option: {value}"));
                cache = Cache::parse(&value).map_err(|_| invalid())?;
            }
            _ => {
                common.take(tool, (name, &value))?;
            }
        }
    }
    let name = getopt::one_image(parsed.operands)?;
    let access = match repair {
        Repair::None => Access::Check,
        Repair::Leaks | Repair::All => Access::Repair,
    };
    let opening = Opening {
        sharing: common.sharing,
        cache,
        ..Opening::new(access)
    };
    let spec = common.image(name)?;
    let image = tool.open(&spec, opening).await?;
    let result = check(&image, repair, (&common, output)).await?;
    match output {
        Output::Human => output::print(&human(&result, &common)),
        Output::Json if common.quiet => {}
        Output::Json => output::print(&json::text(&in_json(&spec, &image, &result))),
    }
    match result {
        CheckResult {
            check_errors: 1.., ..
        } => Err(Failure::message("Check failed")),
        CheckResult {
            corruptions: 1.., ..
        } => Ok(2),
        CheckResult { leaks: 1.., .. } => Ok(3),
        _ => Ok(0),
    }
}

/// Here a wrong `--output` is answered without advice.
fn without_hint(failure: Failure) -> Failure {
    match failure {
        Failure::Usage(message) => Failure::message(message),
        other => other,
    }
}

fn parse_repair(text: &str) -> Result<Repair, Failure> {
    match text {
        "leaks" => Ok(Repair::Leaks),
        "all" => Ok(Repair::All),
        _ => Err(Failure::usage(format!(
            "Unknown option value for -r (expecting 'leaks' or 'all'): {text}"
        ))),
    }
}

/// Checks the image, and once more after a repair.
async fn check(
    image: &Image,
    repair: Repair,
    (common, output): (&Common, Output),
) -> Result<CheckResult, Failure> {
    let first = check_once(image, repair).await?;
    if first.leaks_fixed == 0 && first.corruptions_fixed == 0 {
        return Ok(first);
    }
    if output == Output::Human {
        common.say(&format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    \
             {} corruptions\n\nDouble checking the fixed image now...",
            first.leaks_fixed, first.corruptions_fixed
        ));
    }
    let second = check_once(image, Repair::None).await?;
    Ok(CheckResult {
        leaks_fixed: first.leaks_fixed,
        corruptions_fixed: first.corruptions_fixed,
        ..second
    })
}

async fn check_once(image: &Image, repair: Repair) -> Result<CheckResult, Failure> {
    let driver = image.node.driver();
    let mut findings = Findings;
    let checked = driver.check(CheckOptions::repairing(repair), &mut findings);
    checked
        .await
        .map_err(|error| match (error.kind, error.errno) {
            (ErrorKind::Unsupported, None) => Failure::message(error.message).with_code(NO_CHECK),
            (_, Some(errno)) => Failure::message(format!("Check failed: {}", reason(errno))),
            (_, None) => Failure::message(format!("Check failed: {}", error.message)),
        })
}

fn human(result: &CheckResult, common: &Common) -> String {
    let mut text = String::new();
    let mut add = |line: String| text.push_str(&line);
    if result.corruptions == 0 && result.leaks == 0 && result.check_errors == 0 {
        add("No errors were found on the image.\n".to_owned());
    }
    if result.corruptions != 0 {
        add(format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the \
             image may corrupt it.\n",
            result.corruptions
        ));
    }
    if result.leaks != 0 {
        add(format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no \
             harm to data.\n",
            result.leaks
        ));
    }
    if result.check_errors != 0 {
        add(format!(
            "\n{} internal errors have occurred during the check.\n",
            result.check_errors
        ));
    }
    let allocated = result.allocated_clusters;
    if result.total_clusters != 0 && allocated != 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        add(format!(
            "{allocated}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            result.total_clusters,
            percent(allocated, result.total_clusters),
            percent(result.fragmented_clusters, allocated),
            percent(result.compressed_clusters, allocated)
        ));
    }
    if let Some(end @ 1..) = result.image_end_offset {
        add(format!("Image end offset: {end}\n"));
    }
    match common.quiet {
        true => String::new(),
        false => text,
    }
}

/// QMP's `ImageCheck`: counts that are zero are left out.
fn in_json(spec: &ImageSpec, image: &Image, result: &CheckResult) -> Value {
    let mut members = Map::new();
    members.insert("filename".into(), value!(spec.name));
    members.insert("format".into(), value!(image.node.driver().driver_name()));
    members.insert("check-errors".into(), value!(result.check_errors));
    let counts = [
        ("image-end-offset", result.image_end_offset.unwrap_or(0)),
        ("corruptions", result.corruptions),
        ("leaks", result.leaks),
        ("corruptions-fixed", result.corruptions_fixed),
        ("leaks-fixed", result.leaks_fixed),
        ("total-clusters", result.total_clusters),
        ("allocated-clusters", result.allocated_clusters),
        ("fragmented-clusters", result.fragmented_clusters),
        ("compressed-clusters", result.compressed_clusters),
    ];
    for (name, count) in counts.into_iter().filter(|(_, count)| *count != 0) {
        members.insert(name.into(), value!(count));
    }
    Value::Object(members)
}
