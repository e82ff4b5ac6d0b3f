//! The command line of `convert`.

use super::bitmaps::Broken;
use super::source::Selection;
use crate::create;
use block::copy::{OnReadError, Order, SPARSE_BYTES};
use std::path::Path;
use tools::failure::{Failure, report};
use tools::getopt::{self, Opt};
use tools::image::{Access, Cache, Common, Image, ImageSpec, Notation, Opening, Tool};
use tools::options::{Given, asks_for_help, list};
use tools::size;

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::flag(&["C", "copy-range-offloading"]),
    Opt::flag(&["c", "compress"]),
    Opt::flag(&["p", "progress"]),
    Opt::flag(&["q", "quiet"]),
    Opt::flag(&["n", "no-create"]),
    Opt::flag(&["W", "oob-writes"]),
    Opt::value(&["f", "source-format"]),
    Opt::value(&["O", "target-format"]),
    Opt::value(&["B", "b", "backing"]),
    Opt::value(&["F", "backing-format"]),
    Opt::value(&["o", "target-format-options"]),
    Opt::value(&["l", "snapshot"]),
    Opt::value(&["S", "sparse-size"]),
    Opt::value(&["t", "target-cache"]),
    Opt::value(&["T", "source-cache"]),
    Opt::value(&["m", "parallel"]),
    Opt::value(&["r", "rate-limit"]),
    Opt::value(&["object"]),
    Opt::flag(&["image-opts", "source-image-opts"]),
    Opt::flag(&["U", "force-share"]),
    Opt::flag(&["target-image-opts"]),
    Opt::flag(&["target-is-zero"]),
    Opt::flag(&["salvage"]),
    Opt::flag(&["bitmaps"]),
    Opt::flag(&["skip-broken-bitmaps"]),
    Opt::value(&["allow-dir"]),
];

/// Sizes of runs are multiples of this many bytes, up to the other.
const SECTOR: u64 = 512;
const MAX_SPARSE: u64 = 16 << 20;
/// Most chunks in flight.
const MAX_WORKERS: usize = 16;

/// What a command line asks for.
pub(super) enum Asked {
    /// A copy.
    Convert(Box<Request>),
    /// Something that has been answered, with the exit code.
    Answered(u8),
}

/// What is to be converted, and how.
pub(super) struct Request {
    pub(super) common: Common,
    pub(super) names: Vec<String>,
    pub(super) target: String,
    /// `-O`
    pub(super) target_format: Option<String>,
    pub(super) target_notation: Notation,
    /// `-n`: the target is there.
    pub(super) existing: bool,
    pub(super) target_is_zero: bool,
    pub(super) options: Vec<String>,
    pub(super) backing: Option<String>,
    pub(super) backing_format: Option<String>,
    pub(super) snapshot: Option<Selection>,
    pub(super) target_cache: Cache,
    pub(super) source_cache: Cache,
    pub(super) compressed: bool,
    pub(super) offload: bool,
    pub(super) progress: bool,
    pub(super) sparse: Option<u64>,
    pub(super) workers: usize,
    pub(super) order: Order,
    pub(super) rate: Option<u64>,
    pub(super) on_read_error: OnReadError,
    pub(super) bitmaps: Option<Broken>,
}

/// What needs a second look after all options are known.
#[derive(Default)]
struct Raw {
    sparse_given: bool,
    target_cache: Option<String>,
    source_cache: Option<String>,
    skip_broken: bool,
}

impl Request {
    pub(super) fn parse(tool: &Tool, arguments: Vec<String>) -> Result<Asked, Failure> {
        let mut parsed = getopt::parse(arguments, OPTIONS)?;
        let mut request = Self::empty()?;
        let mut raw = Raw::default();
        for (name, value) in parsed.options {
            if name == "h" {
                return Ok(Asked::Answered(crate::help::of(&super::COMMAND)));
            }
            if !request.common.take(tool, (name, &value))? {
                request.take((name, value), &mut raw)?;
            }
        }
        if request.target_format.is_none() && request.target_notation == Notation::Filename {
            request.target_format = Some("raw".to_owned());
        }
        request.check(&raw)?;
        let target = match parsed.operands.len() {
            0 | 1 => None,
            _ => parsed.operands.pop(),
        };
        if request.options.iter().any(|text| asks_for_help(text)) {
            let Some(format) = &request.target_format else {
                return Err(Failure::message(
                    "Option help requires a format be specified",
                ));
            };
            let code = create::show_options(tool, format, target.is_some())?;
            return Ok(Asked::Answered(code));
        }
        let Some(target) = target else {
            return Err(Failure::message("Must specify image file name"));
        };
        request.target = target;
        request.names = parsed.operands;
        request.take_caches(&raw)?;
        Ok(Asked::Convert(Box::new(request)))
    }

    fn empty() -> Result<Self, Failure> {
        Ok(Self {
            common: Common::default(),
            names: Vec::new(),
            target: String::new(),
            target_format: None,
            target_notation: Notation::Filename,
            existing: false,
            target_is_zero: false,
            options: Vec::new(),
            backing: None,
            backing_format: None,
            snapshot: None,
            target_cache: Cache::parse("unsafe")?,
            source_cache: Cache::default(),
            compressed: false,
            offload: false,
            progress: false,
            sparse: Some(SPARSE_BYTES),
            workers: 8,
            order: Order::Ascending,
            rate: None,
            on_read_error: OnReadError::Fail,
            bitmaps: None,
        })
    }

    fn take(&mut self, (name, value): (&str, String), raw: &mut Raw) -> Result<(), Failure> {
        match name {
            "C" => self.offload = true,
            "c" => self.compressed = true,
            "p" => self.progress = true,
            "n" => self.existing = true,
            "W" => self.order = Order::Any,
            "O" => self.target_format = Some(value),
            "B" => self.backing = Some(value),
            "F" => self.backing_format = Some(value),
            "o" => self.options.push(list(value)?),
            "l" => self.snapshot = Some(Selection::parse(&value)?),
            "S" => {
                self.sparse = sparse(&value)?;
                raw.sparse_given = true;
            }
            "t" => raw.target_cache = Some(value),
            "T" => raw.source_cache = Some(value),
            "m" => self.workers = workers(&value)?,
            "r" => self.rate = Some(size::argument("rate limit", &value)?).filter(|rate| *rate > 0),
            "target-image-opts" => self.target_notation = Notation::Options,
            "target-is-zero" => self.target_is_zero = true,
            "salvage" => self.on_read_error = OnReadError::Salvage,
            "bitmaps" => self.bitmaps = Some(Broken::Refuse),
            "skip-broken-bitmaps" => raw.skip_broken = true,
            _ => unreachable!("every option is one of these"),
        }
        Ok(())
    }

    fn check(&mut self, raw: &Raw) -> Result<(), Failure> {
        let salvages = self.on_read_error == OnReadError::Salvage;
        let message = if raw.skip_broken && self.bitmaps.is_none() {
            "Use of --skip-broken-bitmaps requires --bitmaps"
        } else if self.existing && !self.options.is_empty() {
            "-o has no effect when skipping image creation"
        } else if self.offload && self.compressed {
            "Cannot enable copy offloading when -c is used"
        } else if self.offload && raw.sparse_given {
            "Cannot enable copy offloading when -S is used"
        } else if self.offload && salvages {
            "Cannot use copy offloading in salvaging mode"
        } else if self.target_notation == Notation::Options && !self.existing {
            "--target-image-opts requires use of -n flag"
        } else if self.target_is_zero && !self.existing {
            "--target-is-zero requires use of -n flag"
        } else {
            if raw.skip_broken {
                self.bitmaps = Some(Broken::Skip);
            }
            return Ok(());
        };
        Err(Failure::message(message))
    }

    fn take_caches(&mut self, raw: &Raw) -> Result<(), Failure> {
        if let Some(text) = &raw.source_cache {
            let invalid = |_| Failure::message(format!("Invalid source cache option: {text}"));
            self.source_cache = Cache::parse(text).map_err(invalid)?;
        }
        if let Some(text) = &raw.target_cache {
            self.target_cache = Cache::parse(text)?;
        }
        Ok(())
    }

    /// Whether the target has a backing.
    pub(super) fn has_backing(&self) -> bool {
        self.backing.is_some()
    }

    /// Opens all sources.
    pub(super) async fn open_sources(&self, tool: &Tool) -> Result<Vec<Image>, Failure> {
        let opening = Opening {
            sharing: self.common.sharing,
            cache: self.source_cache,
            ..Opening::new(Access::Read)
        };
        let mut images = Vec::new();
        for name in &self.names {
            let spec = self.common.image(name.clone())?;
            images.push(tool.open(&spec, opening).await?);
        }
        Ok(images)
    }

    /// The target that is to be opened.
    pub(super) fn target_spec(&self) -> ImageSpec {
        ImageSpec {
            name: self.target.clone(),
            format: self.target_format.clone(),
            notation: self.target_notation,
        }
    }

    /// Whether a new target reads as zeroes as far as its options go: what is allocated and
    /// encrypted does not.
    pub(super) fn new_is_zero(&self) -> bool {
        let has = |what: &str| self.options.iter().any(|text| text.contains(what));
        let preallocates = has("preallocation=") && !has("preallocation=off");
        !(preallocates && has("encrypt"))
    }

    /// The options of a new target that were given.
    pub(super) fn given(&self, known: &[&block::OptionSpec]) -> Result<Given, Failure> {
        let mut given = Given::default();
        for text in &self.options {
            given.parse(text, known).map_err(Failure::message)?;
        }
        Ok(given)
    }

    /// Lets the target's image name the backing file that the command line names.
    pub(super) fn allow_backing(&self, tool: &Tool) {
        if let Some(backing) = &self.backing
            && let Some(parent) = Path::new(&block::naming::combine(&self.target, backing)).parent()
        {
            tool.allow_dir(match parent == Path::new("") {
                true => Path::new("."),
                false => parent,
            });
        }
    }
}

/// `-S`: `None` for zero, which writes everything.
fn sparse(text: &str) -> Result<Option<u64>, Failure> {
    let bytes = size::argument("buffer size for sparse output", text)?;
    if bytes % SECTOR != 0 || bytes > MAX_SPARSE {
        return Err(Failure::message(format!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of \
             {SECTOR} up to {MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates \
             output)."
        )));
    }
    Ok(Some(bytes).filter(|bytes| *bytes > 0))
}

fn workers(text: &str) -> Result<usize, Failure> {
    match text.trim().parse() {
        Ok(number) if (1..=MAX_WORKERS).contains(&number) => Ok(number),
        _ => {
            report(&format!(
                "Invalid number of coroutines. Allowed number of coroutines is between 1 and \
                 {MAX_WORKERS}"
            ));
            Err(Failure::Silent(1))
        }
    }
}
