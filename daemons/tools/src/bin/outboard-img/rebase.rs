//! `rebase`: another backing file, with the same content unless told otherwise.
//!
//! What the image does not hold itself is read from the old backing and from the new one; where they
//! differ, the old content is written to the image. The reference in the header changes last.

use crate::{Command, Running};
use block::copy::status::{above, backing_of};
use block::naming;
use block::{
    BackingReference, Buffer, ByteRange, Errno, Node, Permissions, Root, RootHandle, WriteFlags,
    ZeroFlags,
};
use serde_json::Value;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use tools::failure::{Failure, Outcome, described};
use tools::getopt::{self, Opt};
use tools::image::{Access, Cache, Common, Image, ImageSpec, Notation, Opening, Tool};
use tools::progress::{Progress, Show};

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "rebase",
    usage: "[--object objectdef] [--image-opts] [-U] [-q] [-f fmt] [-t cache] [-T src_cache] [-p] \
            [-u] [-c] -b backing_file [-F backing_fmt] filename",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::value(&["f", "format"]),
    Opt::value(&["F", "backing-format"]),
    Opt::value(&["b", "backing"]),
    Opt::flag(&["u", "backing-unsafe"]),
    Opt::flag(&["p", "progress"]),
    Opt::value(&["t", "cache"]),
    Opt::value(&["T", "src-cache"]),
    Opt::flag(&["q", "quiet"]),
    Opt::value(&["object"]),
    Opt::flag(&["image-opts"]),
    Opt::flag(&["U", "force-share"]),
    Opt::flag(&["c", "compress"]),
    Opt::value(&["allow-dir"]),
];

/// Bytes that are compared at a time, unless clusters are larger.
const CHUNK: u64 = 2 << 20;
/// Bytes that differ or do not differ as one.
const SECTOR: usize = 512;

/// What the command line asks for.
struct Request {
    common: Common,
    name: String,
    /// `-b`; nothing stands for no backing.
    backing: Option<String>,
    format: Option<String>,
    mode: Mode,
    cache: Cache,
    source_cache: Cache,
    compressed: bool,
    show: Show,
}

/// Whether the content stays.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// It reads as before.
    Safe,
    /// The header changes and nothing else: `-u`.
    Unsafe,
}

async fn run(tool: &Tool, arguments: Vec<String>) -> Outcome {
    let parsed = getopt::parse(arguments, OPTIONS)?;
    let mut request = Request {
        common: Common::default(),
        name: String::new(),
        backing: None,
        format: None,
        mode: Mode::Safe,
        cache: Cache::default(),
        source_cache: Cache::default(),
        compressed: false,
        show: Show::OnSignal,
    };
    for (name, value) in parsed.options {
        match name {
            "h" => return Ok(crate::help::of(&COMMAND)),
            "b" => request.backing = Some(value),
            "F" => request.format = Some(value),
            "u" => request.mode = Mode::Unsafe,
            "p" => request.show = Show::Always,
            "c" => request.compressed = true,
            "t" => request.cache = Cache::parse(&value)?,
            "T" => request.source_cache = Cache::parse_source(&value)?,
            _ => {
                request.common.take(tool, (name, &value))?;
            }
        }
    }
    let name = getopt::one_image(parsed.operands)?;
    if request.backing.is_none() && request.mode == Mode::Safe {
        return Err(Failure::usage(
            "Must specify backing file (-b) or use unsafe mode (-u)",
        ));
    }
    request.name = name;
    if request.common.quiet {
        request.show = Show::OnSignal;
    }
    request.carry_out(tool).await?;
    Ok(0)
}

impl Request {
    async fn carry_out(&self, tool: &Tool) -> Result<(), Failure> {
        let progress = Progress::begin(self.show);
        let image = self.open_image(tool).await?;
        if let Some(format) = &self.format
            && tool.graph().entry(format).is_none()
        {
            return Err(Failure::message(format!("Invalid format name: '{format}'")));
        }
        if self.mode == Mode::Safe {
            self.keep_content(tool, &image, &progress).await?;
        }
        let changed = image.node.refer_to_backing(self.reference()?).await;
        changed.map_err(|error| self.explained(&error))?;
        progress.at(1, 1);
        Ok(())
    }

    /// The new backing's name; `None` when there is to be none.
    fn new_backing(&self) -> Option<&str> {
        self.backing.as_deref().filter(|name| !name.is_empty())
    }

    fn reference(&self) -> Result<BackingReference, Failure> {
        let Some(name) = self.new_backing() else {
            return Ok(BackingReference::default());
        };
        if self.format.is_none() {
            return Err(Failure::message(format!(
                "Could not change the backing file to '{name}': backing format must be specified"
            )));
        }
        Ok(BackingReference {
            name: Some(name.to_owned()),
            format: self.format.clone(),
        })
    }

    fn explained(&self, error: &block::Error) -> Failure {
        let name = self.new_backing().unwrap_or_default();
        let reason = match error.errno {
            Some(Errno::ENOSPC) => "No space left in the file header".to_owned(),
            Some(errno) => block::error::reason(errno),
            None => described("", error),
        };
        Failure::message(format!(
            "Could not change the backing file to '{name}': {reason}"
        ))
    }

    /// Opens the image; without its backing when that does not matter.
    async fn open_image(&self, tool: &Tool) -> Result<Image, Failure> {
        let opening = Opening {
            cache: self.cache,
            ..Opening::new(Access::Write)
        };
        let spec = self.common.image(self.name.clone())?;
        let mut options = tool.prepare(&spec, opening)?;
        if self.mode == Mode::Unsafe {
            let driver = match options.get("driver").and_then(Value::as_str) {
                Some(driver) => driver.to_owned(),
                None => {
                    let image = tool.open(&spec, Opening::new(Access::Describe)).await?;
                    let driver = image.node.driver().driver_name();
                    tool.close_image(image).await?;
                    driver.to_owned()
                }
            };
            let entry = tool.graph().entry(&driver);
            let create = entry.and_then(|entry| entry.create.as_ref());
            let has_backing = create.is_some_and(|creator| {
                creator
                    .options
                    .iter()
                    .any(|option| option.name == "backing_file")
            });
            if has_backing {
                options.insert("backing".to_owned(), Value::Null);
            }
        }
        tool.open_prepared(&spec, opening, options).await
    }

    /// Writes to the image what the new backing does not have as the old one had it.
    async fn keep_content(
        &self,
        tool: &Tool,
        image: &Image,
        progress: &Progress,
    ) -> Result<(), Failure> {
        if self.compressed && !image.node.driver().compresses() {
            let message = "Compression not supported for this file format";
            return Err(Failure::message(message));
        }
        let new = match self.new_backing() {
            Some(name) => Some(self.open_new(tool, name).await?),
            None => None,
        };
        let old = backing_of(&image.node).and_then(|node| tool.graph().node(node.name()));
        let old_root = match &old {
            Some(node) => Some(reading(node)?),
            None => None,
        };
        let limits = image.node.driver().limits();
        let comparison = Comparison {
            image: image.root.attach(),
            old: old_root.as_ref().map(Root::attach),
            new: new.as_ref().map(|new| new.root.attach()),
            common: new
                .as_ref()
                .and_then(|new| in_chain(old.as_deref()?, &new.node)),
            unit: match self.compressed {
                true => u64::from(limits.optimal_transfer).max(SECTOR as u64),
                false => SECTOR as u64,
            },
            compressed: self.compressed,
        };
        comparison.run(progress).await
    }

    /// Opens the new backing, whose name is relative to the image.
    async fn open_new(&self, tool: &Tool, name: &str) -> Result<Image, Failure> {
        let path = naming::combine(&self.name, name);
        let spec = ImageSpec {
            name: path.clone(),
            format: self.format.clone(),
            notation: Notation::Filename,
        };
        let opening = Opening {
            sharing: self.common.sharing,
            cache: self.source_cache,
            ..Opening::new(Access::Read)
        };
        let failed = |error: block::Error| {
            Failure::message(described(
                &format!("Could not open new backing file '{path}'"),
                &error,
            ))
        };
        let options = tool.node_options(&spec, opening).map_err(failed)?;
        let node = tool.graph().add(options).await.map_err(failed)?;
        let root = reading(&node)?;
        Ok(Image { node, root })
    }
}

fn reading(node: &Arc<Node>) -> Result<Root, Failure> {
    let root = Root::new("", node, Permissions::READ, Permissions::ALL);
    root.map_err(|error| Failure::block("", &error))
}

/// The image of the chain from `old` on that is in the same file as `new`.
fn in_chain<'n>(old: &'n Node, new: &Node) -> Option<&'n Node> {
    let identity = |node: &Node| {
        let metadata = std::fs::metadata(node.filename()).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let wanted = identity(new)?;
    let mut current = Some(old);
    while let Some(node) = current {
        if identity(node) == Some(wanted) {
            return Some(node);
        }
        current = backing_of(node);
    }
    None
}

/// An image between its old and its new backing.
struct Comparison<'n> {
    image: RootHandle,
    old: Option<RootHandle>,
    new: Option<RootHandle>,
    /// The new backing is this image of the old chain: only what lies above it can differ.
    common: Option<&'n Node>,
    /// Bytes that are written or left alone as one.
    unit: u64,
    compressed: bool,
}

impl Comparison<'_> {
    async fn run(&self, progress: &Progress) -> Result<(), Failure> {
        let length = self.image.length();
        let chunk = CHUNK.max(self.unit) / self.unit * self.unit;
        let mut at = 0;
        while at < length {
            let asked = ByteRange::new(at, (length - at).min(chunk));
            let (range, may_differ) = self.look(asked).await?;
            if may_differ {
                self.settle(range).await?;
            }
            at += range.length;
            progress.at(at, length);
        }
        Ok(())
    }

    /// A part from the start of `range`, and whether it may have to be written.
    async fn look(&self, range: ByteRange) -> Result<(ByteRange, bool), Failure> {
        let failed = |what: &str, errno: Errno| {
            let reason = block::error::reason(errno);
            Failure::message(format!("error while reading {what}: {reason}"))
        };
        let visit = self.image.visit().await;
        let own = visit.node().block_status(range).await;
        let own = own.map_err(|errno| failed("image metadata", errno))?;
        // Units are written as a whole, also those that the image holds a part of.
        let held = match own.length >= range.length {
            true => range.length,
            false => own.length / self.unit * self.unit,
        };
        if own.status.allocated && held > 0 {
            return Ok((ByteRange::new(range.offset, held), false));
        }
        let grown = own.length.next_multiple_of(self.unit).min(range.length);
        let range = ByteRange::new(range.offset, grown);
        let (Some(common), Some(old), false) = (self.common, &self.old, own.status.allocated)
        else {
            return Ok((range, true));
        };
        let visit = old.visit().await;
        if std::ptr::eq(visit.node(), common) {
            return Ok((range, false));
        }
        let between = above(visit.node(), Some(common), range).await;
        let between = between.map_err(|errno| failed("base image metadata", errno))?;
        let length = between.length.next_multiple_of(self.unit);
        let range = ByteRange::new(range.offset, length.min(range.length));
        Ok((range, between.is_decided()))
    }

    /// Writes what differs in `range`.
    async fn settle(&self, range: ByteRange) -> Result<(), Failure> {
        // What the image does not hold, it shows from the old backing.
        let old = content(Some(&self.image), range).await;
        let old = old.map_err(|errno| backing_failed("old", errno))?;
        let new = content(self.new.as_ref(), range).await;
        let new = new.map_err(|errno| backing_failed("new", errno))?;
        let (old_bytes, new_bytes) = (old.to_heap(), new.to_heap());
        let unit = self.unit as usize;
        let mut at = 0;
        while at < old_bytes.len() {
            let differs = |at: usize| {
                let end = old_bytes.len().min(at + unit);
                old_bytes[at..end] != new_bytes[at..end]
            };
            let mut end = at;
            let this = differs(at);
            while end < old_bytes.len() && differs(end) == this {
                end = old_bytes.len().min(end + unit);
            }
            if this {
                let part = ByteRange::new(range.offset + at as u64, (end - at) as u64);
                let is_zero = old_bytes[at..end].iter().all(|byte| *byte == 0);
                let written = self.write(part, old.slice(at..end), is_zero).await;
                written.map_err(|errno| {
                    let reason = block::error::reason(errno);
                    Failure::message(format!("Error while writing to COW image: {reason}"))
                })?;
            }
            at = end;
        }
        Ok(())
    }

    async fn write(&self, range: ByteRange, data: Buffer, is_zero: bool) -> Result<(), Errno> {
        if is_zero {
            return self.image.write_zeroes(range, ZeroFlags::default()).await;
        }
        let flags = WriteFlags {
            compressed: self.compressed,
            ..WriteFlags::default()
        };
        self.image.write(range.offset, data, flags).await
    }
}

fn backing_failed(which: &str, errno: Errno) -> Failure {
    let reason = block::error::reason(errno);
    Failure::message(format!(
        "error while reading from {which} backing file: {reason}"
    ))
}

/// What a backing shows in `range`: zeroes where there is none.
async fn content(backing: Option<&RootHandle>, range: ByteRange) -> Result<Buffer, Errno> {
    let buffer = Buffer::zeroed(range.length as usize);
    let Some(backing) = backing else {
        return Ok(buffer);
    };
    let there = backing.length().saturating_sub(range.offset);
    let within = there.min(range.length) as usize;
    if within > 0 {
        backing.read(range.offset, buffer.slice(0..within)).await?;
    }
    Ok(buffer)
}
