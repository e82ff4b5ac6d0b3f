//! `bitmap`: adds, removes and changes persistent dirty bitmaps.

use crate::{Command, Running};
use block::bitmap::{NewBitmap, ops};
use block::{Error, Node};
use serde_json::Value;
use tools::failure::{Failure, Outcome};
use tools::getopt::{self, Opt};
use tools::image::{Access, Common, Image, ImageSpec, Notation, Opening, Tool};
use tools::size;

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "bitmap",
    usage: "(--merge SOURCE | --add | --remove | --clear | --enable | --disable)... \
            [-b source_file [-F source_fmt]] [-g granularity] [--object objectdef] \
            [--image-opts | -f fmt] filename bitmap",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::value(&["b", "source-file"]),
    Opt::value(&["F", "source-format"]),
    Opt::value(&["f", "format"]),
    Opt::value(&["g", "granularity"]),
    Opt::value(&["object"]),
    Opt::flag(&["image-opts"]),
    Opt::flag(&["add"]),
    Opt::flag(&["remove"]),
    Opt::flag(&["clear"]),
    Opt::flag(&["enable"]),
    Opt::flag(&["disable"]),
    Opt::value(&["merge"]),
    Opt::value(&["allow-dir"]),
];

/// What is done, in the order of the command line.
enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(String),
}

impl Action {
    fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

/// The options that are this command's own.
#[derive(Default)]
struct Request {
    actions: Vec<Action>,
    source_file: Option<String>,
    source_format: Option<String>,
    granularity: Option<u64>,
    disabled: bool,
}

impl Request {
    fn take(&mut self, name: &str, value: String) -> Result<(), Failure> {
        match name {
            "b" => self.source_file = Some(value),
            "F" => self.source_format = Some(value),
            "g" => self.granularity = Some(size::argument("granularity", &value)?),
            "add" => self.actions.push(Action::Add),
            "remove" => self.actions.push(Action::Remove),
            "clear" => self.actions.push(Action::Clear),
            "enable" => self.actions.push(Action::Enable),
            "disable" => self.actions.push(Action::Disable),
            _ => self.actions.push(Action::Merge(value)),
        }
        Ok(())
    }

    fn has(&self, is_meant: impl Fn(&Action) -> bool) -> bool {
        self.actions.iter().any(is_meant)
    }

    /// Checks that the options go together; a new bitmap that is to be disabled is so from the start.
    fn check(&mut self) -> Result<(), Failure> {
        let message = if self.actions.is_empty() {
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"
        } else if self.granularity.is_some() && !self.has(|action| matches!(action, Action::Add)) {
            "granularity only supported with --add"
        } else if self.source_format.is_some() && self.source_file.is_none() {
            "-F only supported with -b"
        } else if self.source_file.is_some()
            && !self.has(|action| matches!(action, Action::Merge(_)))
        {
            "Merge bitmap source file only supported with --merge"
        } else {
            let is_disable = |action: &Action| matches!(action, Action::Disable);
            if self.has(|action| matches!(action, Action::Add)) && self.has(is_disable) {
                self.disabled = true;
                self.actions.retain(|action| !is_disable(action));
            }
            return Ok(());
        };
        Err(Failure::message(message))
    }
}

async fn run(tool: &Tool, arguments: Vec<String>) -> Outcome {
    let parsed = getopt::parse(arguments, OPTIONS)?;
    let (mut common, mut request) = (Common::default(), Request::default());
    for (name, value) in parsed.options {
        if name == "h" {
            return Ok(crate::help::of(&COMMAND));
        }
        if !common.take(tool, (name, &value))? {
            request.take(name, value)?;
        }
    }
    let Ok([file, bitmap]) = <[String; 2]>::try_from(parsed.operands) else {
        return Err(Failure::message("Expecting filename and bitmap name"));
    };
    request.check()?;
    let opening = Opening::new(Access::Write);
    let image = open_alone(tool, (&common.image(file)?, opening)).await?;
    let source = source(tool, &request).await?;
    let source = source.as_ref().map_or(&*image.node, |source| &*source.node);
    for action in &request.actions {
        let done = act(&image.node, source, &request, (action, &bitmap)).await;
        done.map_err(|error| {
            let what = format!("Operation {} on bitmap {bitmap} failed", action.name());
            Failure::block(&what, &error)
        })?;
    }
    Ok(0)
}

/// The image that `-b` names.
async fn source(tool: &Tool, request: &Request) -> Result<Option<Image>, Failure> {
    let Some(name) = &request.source_file else {
        return Ok(None);
    };
    let spec = ImageSpec {
        name: name.clone(),
        format: request.source_format.clone(),
        notation: Notation::Filename,
    };
    let opening = Opening::new(Access::Read);
    open_alone(tool, (&spec, opening)).await.map(Some)
}

/// Opens an image without its backing, which bitmaps say nothing of, and which may be the other image.
async fn open_alone(tool: &Tool, (spec, opening): (&ImageSpec, Opening)) -> Result<Image, Failure> {
    let mut options = tool.prepare(spec, opening)?;
    let has_backing = options.get("driver").is_none_or(|format| format == "qcow2");
    if has_backing && !options.contains_key("backing") {
        options.insert("backing".to_owned(), Value::Null);
    }
    tool.open_prepared(spec, opening, options).await
}

async fn act(
    node: &Node,
    source: &Node,
    request: &Request,
    (action, name): (&Action, &str),
) -> Result<(), Error> {
    match action {
        Action::Add => {
            let new = NewBitmap {
                name: name.to_owned(),
                // What does not fit is no power of two below the largest one.
                granularity: request
                    .granularity
                    .map(|bytes| u32::try_from(bytes).unwrap_or(0)),
                persistent: true,
                disabled: request.disabled,
            };
            ops::add(node, new).map(drop)
        }
        Action::Remove => ops::remove(node, name).await,
        Action::Clear => ops::clear(node, name),
        Action::Enable => ops::enable(node, name),
        Action::Disable => ops::disable(node, name),
        Action::Merge(from) => {
            let target = ops::find(node, name)?;
            ops::merge(&target, &[ops::find(source, from)?])
        }
    }
}
