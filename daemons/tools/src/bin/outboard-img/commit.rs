//! `commit`: what an image holds goes into its backing file, or into one further down the chain.
//!
//! ```text
//!   top ─► ... ─► lowest above ─► base, opened for writing ─► ...
//!    └──── what these hold ────────►┘
//! ```
//!
//! The chain is opened once to find the base, closed, and opened again with the base for writing.

use crate::{Command, Running};
use block::copy::status::backing_of;
use block::copy::{Backed, Copy, CopyOptions, Observer, Sources};
use block::naming;
use block::{Errno, Node, Permissions, Resize, Root};
use serde_json::{Value, json};
use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use tools::failure::{Failure, Outcome};
use tools::getopt::{self, Opt};
use tools::image::{Access, Cache, Common, Image, ImageSpec, Opening, Tool};
use tools::progress::{Progress, Show};
use tools::size;

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "commit",
    usage: "[--object objectdef] [--image-opts] [-q] [-f fmt] [-t cache] [-b base] \
            [-r rate_limit] [-d] [-p] filename",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::value(&["f", "format"]),
    Opt::value(&["t", "cache"]),
    Opt::value(&["b", "base"]),
    Opt::flag(&["d", "drop"]),
    Opt::flag(&["p", "progress"]),
    Opt::flag(&["q", "quiet"]),
    Opt::value(&["r", "rate-limit"]),
    Opt::value(&["object"]),
    Opt::flag(&["image-opts"]),
    Opt::value(&["allow-dir"]),
];

/// What becomes of the image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Afterwards {
    /// It holds nothing any more.
    Empty,
    /// It stays as it is: `-d`, and with `-b`, where what lies between would not show the same.
    Left,
}

/// What the command line asks for.
struct Request {
    common: Common,
    name: String,
    base: Option<String>,
    afterwards: Afterwards,
    cache: Cache,
    rate: Option<u64>,
    show: Show,
}

async fn run(tool: &Tool, arguments: Vec<String>) -> Outcome {
    let parsed = getopt::parse(arguments, OPTIONS)?;
    let mut request = Request {
        common: Common::default(),
        name: String::new(),
        base: None,
        afterwards: Afterwards::Empty,
        cache: Cache::default(),
        rate: None,
        show: Show::OnSignal,
    };
    for (name, value) in parsed.options {
        match name {
            "h" => return Ok(crate::help::of(&COMMAND)),
            "b" => {
                request.base = Some(value);
                request.afterwards = Afterwards::Left;
            }
            "d" => request.afterwards = Afterwards::Left,
            "p" => request.show = Show::Always,
            "r" => request.rate = Some(size::argument("rate limit", &value)?).filter(|it| *it > 0),
            "t" => request.cache = Cache::parse(&value)?,
            _ => {
                request.common.take(tool, (name, &value))?;
            }
        }
    }
    let name = getopt::one_image(parsed.operands)?;
    request.name = name;
    if request.common.quiet {
        request.show = Show::OnSignal;
    }
    request.carry_out(tool).await?;
    request.common.say("Image committed.");
    Ok(0)
}

impl Request {
    async fn carry_out(&self, tool: &Tool) -> Result<(), Failure> {
        let spec = self.common.image(self.name.clone())?;
        let progress = Progress::begin(self.show);
        let depth = self.find_base(tool, &spec).await?;
        let (base, top) = self.open_chain(tool, (&spec, depth)).await?;
        let target = open_root(&base)?;
        if self.cache.write_through {
            target.write_through();
        }
        grow(&base, top.node.length()).await?;
        let sources = Sources::above(&top.root, &base).ok_or_else(|| failed(Errno::EFBIG))?;
        let options = CopyOptions {
            backed: Backed::Alike { length: None },
            rate: self.rate,
            may_unmap: true,
            ..CopyOptions::default()
        };
        let told = Told {
            progress: &progress,
            done: Cell::new(0),
            total: sources.length(),
        };
        let handle = target.attach();
        let copied = Copy::new((&sources, &handle), &options, &told).run().await;
        copied.map_err(|error| failed(error.errno))?;
        handle.flush().await.map_err(failed)?;
        if self.afterwards == Afterwards::Empty {
            empty(&top.node).await?;
        }
        progress.at(1, 1);
        Ok(())
    }

    /// How many images below the image the base is.
    async fn find_base(&self, tool: &Tool, spec: &ImageSpec) -> Result<usize, Failure> {
        let image = tool.open(spec, Opening::new(Access::Read)).await?;
        let depth = self.depth_of_base(&image.node);
        tool.close_image(image).await?;
        depth.ok_or_else(|| {
            Failure::message(match &self.base {
                None => "Image does not have a backing file".to_owned(),
                Some(base) => format!(
                    "Did not find '{base}' in the backing chain of '{}'",
                    self.name
                ),
            })
        })
    }

    fn depth_of_base(&self, top: &Node) -> Option<usize> {
        let Some(base) = &self.base else {
            return backing_of(top).map(|_| 1);
        };
        let mut above = top;
        for depth in 1.. {
            let below = backing_of(above)?;
            let described = above.driver().describe();
            let name = described.get("backing-filename").and_then(Value::as_str);
            // A relative name is one as the images use it.
            let given = Path::new(&naming::combine(&above.filename(), base)).canonicalize();
            let own = Path::new(&below.filename()).canonicalize();
            let is_same = matches!((given, own), (Ok(given), Ok(own)) if given == own);
            if is_same || name == Some(base) {
                return Some(depth);
            }
            above = below;
        }
        None
    }

    /// Opens the image over its chain, with the base for writing.
    async fn open_chain(
        &self,
        tool: &Tool,
        (spec, depth): (&ImageSpec, usize),
    ) -> Result<(Arc<Node>, Image), Failure> {
        let opening = Opening::new(Access::Write);
        let mut options = tool.prepare(spec, opening)?;
        let mut below = &mut options;
        for _ in 0..depth {
            let backing = below.entry("backing").or_insert_with(|| json!({}));
            let Some(members) = backing.as_object_mut() else {
                let message = "The backing file to commit to must be given by its options";
                return Err(Failure::message(message));
            };
            below = members;
        }
        below.insert("read-only".to_owned(), json!(false));
        // What is zeroes above takes no space in the base.
        below.entry("discard").or_insert(json!("unmap"));
        self.cache.add_to(below);
        let top = tool.open_prepared(spec, opening, options).await?;
        let base = (0..depth).try_fold(&*top.node, |node, _| backing_of(node));
        let base = base.and_then(|base| tool.graph().node(base.name()));
        let base = base.ok_or_else(|| Failure::message("Image does not have a backing file"))?;
        Ok((base, top))
    }
}

fn open_root(base: &Arc<Node>) -> Result<Root, Failure> {
    let permissions = Permissions {
        resize: true,
        ..Permissions::READ_WRITE
    };
    let root = Root::new("", base, permissions, Permissions::ALL);
    root.map_err(|error| Failure::block("", &error))
}

/// Makes room in the base for all of the image.
async fn grow(base: &Node, length: u64) -> Result<(), Failure> {
    if base.length() >= length {
        return Ok(());
    }
    let resize = Resize::to(length);
    let grown = base.resize(resize).await;
    grown.map_err(|error| match error.errno {
        Some(errno) => failed(errno),
        None => Failure::block("", &error),
    })
}

/// Drops what the image holds, if its format can.
async fn empty(top: &Node) -> Result<(), Failure> {
    match top.make_empty().await {
        Ok(()) => Ok(()),
        Err(error) if error.errno == Some(Errno::EOPNOTSUPP) => Ok(()),
        Err(error) => {
            let reason = error.errno.map_or(error.message, block::error::reason);
            let message = format!("Failed to empty {}: {reason}", top.filename());
            Err(Failure::message(message))
        }
    }
}

fn failed(errno: Errno) -> Failure {
    let reason = block::error::reason(errno);
    Failure::message(format!("Block job failed: {reason}"))
}

/// Shows how far the copy is.
struct Told<'p> {
    progress: &'p Progress,
    done: Cell<u64>,
    total: u64,
}

impl Observer for Told<'_> {
    fn copied(&self, bytes: u64) {
        self.done.set(self.done.get() + bytes);
        self.progress.at(self.done.get(), self.total.max(1));
    }
    fn lost(&self, _offset: u64, _errno: Errno) {}
    fn status_unknown(&self, _offset: u64, _errno: Errno) {}
}
