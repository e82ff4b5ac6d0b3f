//! Opening images: by name, by format, by `--image-opts`, or by looking at the content.

use crate::failure::{Failure, described, report};
use crate::output;
use block::edge::Permissions;
use block::graph::NamePolicy;
use block::{Graph, Node, Purpose, Root};
use engine::host;
use engine::objects::Objects;
use qmp::keyval;
use serde_json::{Map, Value, json};
use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

/// Drivers, separated by `,`, that names inside images may ask for (`nbd`, `https`).
const ALLOWED_DRIVERS: &str = "OUTBOARD_ALLOW_DRIVERS";

/// What all images of one run share.
pub struct Tool {
    graph: Graph,
    objects: Objects,
    opened: Cell<u32>,
}

/// An image as the command line names it.
#[derive(Clone, Debug)]
pub struct ImageSpec {
    /// A file name, or options when `notation` says so.
    pub name: String,
    /// `-f`
    pub format: Option<String>,
    /// How `name` is to be read.
    pub notation: Notation,
}

impl ImageSpec {
    /// Whether `--image-opts` can be read at all; its mistakes are not those of an image.
    pub fn check_notation(&self) -> Result<(), Failure> {
        if self.notation == Notation::Options {
            keyval::parse(&self.name, None).map_err(|error| Failure::message(error.desc))?;
        }
        Ok(())
    }
}

/// `--image-opts` or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Notation {
    /// A file name, or `json:{...}`.
    #[default]
    Filename,
    /// `key=value,...`
    Options,
}

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Its metadata is shown; no name in it is followed.
    Describe,
    /// It and what it names are opened, and its length is asked for.
    Inspect,
    /// Its content is read.
    Read,
    /// It is changed.
    Write,
    /// It is checked and not changed.
    Check,
    /// It is checked and repaired.
    Repair,
}

impl Access {
    /// Whether anything is written.
    fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Repair)
    }
}

/// Whether other processes may write to the image meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// They are kept out by locks.
    #[default]
    Locked,
    /// They may: `-U`.
    Forced,
}

/// `-t` and `-T`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cache {
    direct: bool,
    no_flush: bool,
    /// Each write is durable before the command goes on.
    pub write_through: bool,
}

impl Cache {
    /// The options of a node.
    pub fn options(self) -> Value {
        json!({"direct": self.direct, "no-flush": self.no_flush})
    }

    /// The mode called `name`.
    pub fn parse(name: &str) -> Result<Self, Failure> {
        Self::named(name).ok_or_else(|| Failure::message(format!("Invalid cache option: {name}")))
    }

    /// The mode called `name`, of what is read.
    pub fn parse_source(name: &str) -> Result<Self, Failure> {
        Self::named(name)
            .ok_or_else(|| Failure::message(format!("Invalid source cache option: {name}")))
    }

    /// Adds the mode to the options of a node that do not tell another.
    pub fn add_to(self, options: &mut Map<String, Value>) {
        if self.direct || self.no_flush {
            options.entry("cache").or_insert(self.options());
        }
    }

    fn named(name: &str) -> Option<Self> {
        let (direct, no_flush, write_through) = match name {
            "none" | "off" => (true, false, false),
            "writeback" => (false, false, false),
            "writethrough" => (false, false, true),
            "directsync" => (true, false, true),
            "unsafe" => (false, true, false),
            _ => return None,
        };
        Some(Self {
            direct,
            no_flush,
            write_through,
        })
    }
}

/// How an image is opened.
#[derive(Clone, Copy, Debug)]
pub struct Opening {
    /// What for.
    pub access: Access,
    /// Whether others may write.
    pub sharing: Sharing,
    /// How the host's page cache is used.
    pub cache: Cache,
}

impl Opening {
    /// With locks and the page cache.
    pub fn new(access: Access) -> Self {
        Self {
            access,
            sharing: Sharing::Locked,
            cache: Cache::default(),
        }
    }
}

/// An open image.
pub struct Image {
    /// Its node.
    pub node: Arc<Node>,
    /// The tool's own use of the node.
    pub root: Root,
}

impl Default for Tool {
    fn default() -> Self {
        Self::new()
    }
}

impl Tool {
    /// Without any image. The daemon's redo logs are used when there are some: an image whose
    /// daemon was killed is brought up to date before it is changed.
    pub fn new() -> Self {
        let graph = Graph::new(&engine::catalogue::drivers(), NamePolicy::default()).with_probing();
        let redo_dir = host::redo_dir();
        let graph = match std::fs::symlink_metadata(&redo_dir) {
            Ok(metadata) if metadata.is_dir() && is_own(&metadata) => graph.with_redo_dir(redo_dir),
            _ => graph,
        };
        let tool = Self {
            objects: Objects::default(),
            graph,
            opened: Cell::new(0),
        };
        for directory in host::allowed_dirs() {
            tool.allow_dir(&directory);
        }
        let drivers = std::env::var(ALLOWED_DRIVERS).unwrap_or_default();
        for driver in drivers.split(',').filter(|name| !name.is_empty()) {
            tool.graph.allow_driver(driver);
        }
        tool
    }

    /// The graph that the images are nodes of.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Lets names inside images open files below `directory`.
    pub fn allow_dir(&self, directory: &Path) {
        if let Ok(absolute) = std::path::absolute(directory) {
            self.graph.allow_dir(absolute);
        }
    }

    /// Takes the definition of an object, `--object`.
    pub fn add_object(&self, definition: &str) -> Result<(), Failure> {
        let failed = |error: qmp::Error| Failure::message(error.desc);
        let arguments = keyval::parse(definition, Some("qom-type")).map_err(failed)?;
        let added = self.objects.add(&self.graph, arguments);
        added.map_err(failed)
    }

    /// The options of the node for an image, a name included; without `driver` when the format has
    /// to be found out.
    pub fn prepare(&self, spec: &ImageSpec, how: Opening) -> Result<Map<String, Value>, Failure> {
        spec.check_notation()?;
        let options = self.node_options(spec, how);
        options.map_err(|error| could_not_open(spec, &error))
    }

    /// [`Tool::prepare`] for callers that say themselves what could not be opened.
    pub fn node_options(
        &self,
        spec: &ImageSpec,
        how: Opening,
    ) -> Result<Map<String, Value>, block::Error> {
        let options = self.definition(spec)?;
        Ok(self.complete(options, (spec, how)))
    }

    /// The same from the options that a specification stands for, or what was made of them.
    pub fn complete(
        &self,
        mut options: Map<String, Value>,
        (spec, how): (&ImageSpec, Opening),
    ) -> Map<String, Value> {
        if spec.notation == Notation::Filename || !options.contains_key("read-only") {
            options.insert("read-only".into(), json!(!how.access.writes()));
        }
        if how.sharing == Sharing::Forced {
            options.insert("force-share".into(), json!(true));
        }
        how.cache.add_to(&mut options);
        self.allow_own_directory(&options);
        let number = self.opened.replace(self.opened.get() + 1);
        let name = json!(format!("image{number}"));
        options.entry("node-name").or_insert(name);
        options
    }

    /// Opens an image.
    pub async fn open(&self, spec: &ImageSpec, how: Opening) -> Result<Image, Failure> {
        let options = self.prepare(spec, how)?;
        self.open_prepared(spec, how, options).await
    }

    /// Opens an image from what [`Tool::prepare`] answered, perhaps changed.
    pub async fn open_prepared(
        &self,
        spec: &ImageSpec,
        how: Opening,
        options: Map<String, Value>,
    ) -> Result<Image, Failure> {
        let failed = |error: block::Error| could_not_open(spec, &error);
        let has_format = options.contains_key("driver");
        let purpose = match how.access {
            Access::Describe => Purpose::Describe,
            Access::Inspect => Purpose::Inspect,
            Access::Read | Access::Write => Purpose::Serve,
            Access::Check | Access::Repair => Purpose::Check,
        };
        let node = self.graph.add_for(purpose, options).await.map_err(failed)?;
        if !has_format {
            warn_of_guess(&node);
        }
        let permissions = match how.access {
            Access::Write => Permissions {
                resize: true,
                ..Permissions::READ_WRITE
            },
            Access::Repair => Permissions::READ_WRITE,
            Access::Describe | Access::Inspect | Access::Read | Access::Check => Permissions::READ,
        };
        let root = Root::new("", &node, permissions, Permissions::ALL).map_err(failed)?;
        if how.cache.write_through {
            root.write_through();
        }
        Ok(Image { node, root })
    }

    /// The options of the node that a specification stands for; without `driver` when the format
    /// has to be found out.
    pub fn definition(&self, spec: &ImageSpec) -> Result<Map<String, Value>, block::Error> {
        let mut options = match spec.notation {
            Notation::Options => keyval::parse(&spec.name, None)
                .map_err(|error| invalid(error.desc))?
                .into_members(),
            Notation::Filename => self.graph.definition_of(&spec.name)?,
        };
        if let Some(format) = &spec.format {
            let Some(entry) = self.graph.entry(format) else {
                return Err(invalid(format!("Unknown driver '{format}'")));
            };
            // A protocol is nobody's format: the name is opened by it alone.
            if let (Some(Value::Object(file)), Some(_)) = (options.get("file"), &entry.protocol) {
                options = file.clone();
            }
            options.insert("driver".into(), json!(format));
        }
        Ok(options)
    }

    /// Names in an image may open what lies beside it, however they are spelled.
    fn allow_own_directory(&self, options: &Map<String, Value>) {
        if let Some(name) = options.get("filename").and_then(Value::as_str) {
            match Path::new(name).parent() {
                Some(parent) if parent != Path::new("") => self.allow_dir(parent),
                _ => self.allow_dir(Path::new(".")),
            }
        }
        for child in options.values().filter_map(Value::as_object) {
            self.allow_own_directory(child);
        }
    }

    /// Closes an image before the end of the run.
    pub async fn close_image(&self, image: Image) -> Result<(), Failure> {
        let Image { node, root } = image;
        drop(root);
        let name = node.name().to_owned();
        drop(node);
        let closed = self.graph.remove(&name).await;
        closed.map_err(|error| Failure::block("", &error))
    }

    /// Flushes and closes everything.
    pub async fn close(&self) -> Result<(), Failure> {
        let closed = self.graph.close_all().await;
        closed.map_err(|error| Failure::block("", &error))
    }
}

/// The failure of an image that could not be opened.
pub fn could_not_open(spec: &ImageSpec, error: &block::Error) -> Failure {
    Failure::message(described(&format!("Could not open '{}'", spec.name), error))
}

fn invalid(message: impl Into<String>) -> block::Error {
    block::Error::new(block::ErrorKind::Invalid, message)
}

fn is_own(metadata: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    metadata.uid() == nix::unistd::geteuid().as_raw() && metadata.mode() & 0o022 == 0
}

/// Says so when a writable image, whose format nobody gave, was taken for raw.
pub fn warn_of_guess(node: &Node) {
    if node.driver().driver_name() != "raw" || node.options().read_only {
        return;
    }
    let name = node.filename();
    eprintln!(
        "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
         Automatically detecting the format is dangerous for raw images, write operations on \
         block 0 will be restricted.\n         \
         Specify the 'raw' format explicitly to remove the restrictions."
    );
}

/// The options of every command that opens one image.
#[derive(Debug, Default)]
pub struct Common {
    /// `-f`
    pub format: Option<String>,
    /// `--image-opts`
    pub notation: Notation,
    /// `-U`
    pub sharing: Sharing,
    /// `-q`
    pub quiet: bool,
}

impl Common {
    /// Takes an option that is one of these, and says whether it was.
    pub fn take(&mut self, tool: &Tool, (name, value): (&str, &str)) -> Result<bool, Failure> {
        match name {
            "f" => self.format = Some(value.to_owned()),
            "image-opts" => self.notation = Notation::Options,
            "U" => self.sharing = Sharing::Forced,
            "q" => self.quiet = true,
            "object" => tool.add_object(value)?,
            "allow-dir" => tool.allow_dir(Path::new(value)),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The image called `name`.
    pub fn image(&self, name: String) -> Result<ImageSpec, Failure> {
        if self.notation == Notation::Options && self.format.is_some() {
            let message = "--image-opts and --format are mutually exclusive";
            report(message);
            return Err(Failure::Silent(1));
        }
        Ok(ImageSpec {
            name,
            format: self.format.clone(),
            notation: self.notation,
        })
    }

    /// Prints a line unless `-q` was given.
    pub fn say(&self, line: &str) {
        if !self.quiet {
            output::line(line);
        }
    }
}
