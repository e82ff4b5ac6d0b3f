//! `convert`: the content of images in a new image, or in one that is there.
//!
//! ```text
//!   request.rs   the command line, and what goes together
//!   source.rs    the images to read, or a snapshot in one
//!   target.rs    the new image: options, making and opening it
//!   bitmaps.rs   persistent bitmaps, copied after the data
//!   this file    one after the other; the data goes through block::copy
//! ```

mod bitmaps;
mod request;
pub(crate) mod source;
mod target;

use crate::{Command, Running};
use block::copy::{
    Backed, CHUNK_BYTES, Copy, CopyOptions, Kind, LONG_CHUNK_BYTES, Observer, Offload, OnReadError,
    SPARSE_BYTES, Sources, Store, Unwritten, Walk, status::backing_of,
};
use block::{BlockStatus, ByteRange, Errno, Node};
use request::Request;
use source::Source;
use std::cell::Cell;
use target::Prepared;
use tools::failure::{Failure, Outcome, warn};
use tools::helpers;
use tools::image::{Image, Tool};
use tools::progress::{Progress, Show};

/// The subcommand.
pub(crate) const COMMAND: Command = Command {
    name: "convert",
    usage: "[--object objectdef] [--image-opts] [--target-image-opts] [--target-is-zero] \
            [--bitmaps] [-U] [-C] [-c] [-p] [-q] [-n] [-f fmt] [-t cache] [-T src_cache] \
            [-O output_fmt] [-B backing_file [-F backing_fmt]] [-o options] [-l snapshot_param] \
            [-S sparse_size] [-r rate_limit] [-m num_coroutines] [-W] [--salvage] filename \
            [filename2 [...]] output_filename",
    run: |tool, arguments| -> Running<'_> { Box::pin(run(tool, arguments)) },
};

/// Largest chunk, in bytes.
const MAX_CHUNK: u64 = 16 << 20;

async fn run(tool: &Tool, arguments: Vec<String>) -> Outcome {
    let mut request = match Request::parse(tool, arguments)? {
        request::Asked::Convert(request) => *request,
        request::Asked::Answered(code) => return Ok(code),
    };
    let progress = Progress::begin(match request.progress && !request.common.quiet {
        true => Show::Always,
        false => Show::OnSignal,
    });
    let images = request.open_sources(tool).await?;
    let sharing = request.common.sharing;
    let source = Source::select(&images, request.snapshot.as_ref(), sharing).await?;
    let roots = source.roots();
    let sources = Sources::new(roots)
        .ok_or_else(|| Failure::message("The sources are together longer than an image can be"))?;
    let prepared = Prepared::new(tool, &mut request, sources.length())?;
    let request = prepared.request();
    let bitmaps = match request.bitmaps {
        Some(broken) => Some(bitmaps::to_copy(source.roots(), broken)?),
        None => None,
    };
    prepared.make(tool).await?;
    let target = prepared.open(tool).await?;
    if bitmaps.is_some() {
        bitmaps::check_target(&target.node)?;
    }
    copy(request, (&sources, &target), &progress).await?;
    if let Some(bitmaps) = bitmaps {
        bitmaps::copy(&bitmaps, &target.node).await?;
    }
    drop(sources);
    source.close(tool, images).await?;
    tool.close_image(target).await?;
    progress.at(1, 1);
    Ok(0)
}

/// Copies the data.
async fn copy(
    request: &Request,
    (sources, target): (&Sources, &Image),
    progress: &Progress,
) -> Result<(), Failure> {
    let handle = target.root.attach();
    if request.existing && handle.length() < sources.length() {
        return Err(Failure::message("output file is smaller than input file"));
    }
    let options = options(request, target).await?;
    let shown = Shown {
        progress,
        quiet: request.common.quiet,
        done: Cell::new(0),
        total: Cell::new(sources.length()),
    };
    // What is unknown of a disk to be salvaged is told before its data is read, which may take long.
    let salvages = request.on_read_error == OnReadError::Salvage;
    if salvages || request.progress && !request.common.quiet {
        shown.total.set(to_copy(sources, &options, &shown).await?);
    }
    // A single chunk at a time is what `-m 1` asks for.
    let bytes = if options.in_flight > 1 {
        sources.length()
    } else {
        0
    };
    let disks = sources.disks();
    let readers = helpers::start(bytes, move || disks.attach());
    let copy = Copy::new((sources, &handle), &options, &shown).with_readers(readers.as_ref());
    let copied = copy.run().await;
    copied.map_err(|error| Failure::message(error.to_string()))
}

/// How it is copied.
async fn options(request: &Request, target: &Image) -> Result<CopyOptions, Failure> {
    let limits = target.node.driver().limits();
    let cluster = u64::from(limits.optimal_transfer);
    let driver = target.node.driver();
    let compressed = request.compressed || driver.stores_only_compressed();
    let is_long =
        compressed || request.offload || request.sparse.is_some_and(|bytes| bytes > SPARSE_BYTES);
    let least = match is_long {
        true => LONG_CHUNK_BYTES,
        false => CHUNK_BYTES,
    };
    let mut chunk = cluster.clamp(least, MAX_CHUNK);
    let store = match compressed {
        false => Store::Plain,
        true if !driver.compresses() => {
            return Err(Failure::message(target::NO_COMPRESSION));
        }
        true if cluster == 0 => return Err(Failure::message("invalid cluster size")),
        true => {
            chunk = (chunk / cluster).max(1) * cluster;
            Store::Compressed { cluster }
        }
    };
    let backed = match request.has_backing() {
        false => Backed::No,
        true => Backed::Alike {
            length: backing_of(&target.node).map(|backing| backing.length()),
        },
    };
    let mut unwritten = Unwritten::Anything;
    if backed == Backed::No {
        let new = !request.existing && request.sparse.is_some() && request.new_is_zero();
        let is_zero = request.target_is_zero
            || new && (target.node.driver().reads_zero_when_new() || says_zero(&target.node).await);
        if is_zero {
            unwritten = Unwritten::Zeroes;
        }
    }
    Ok(CopyOptions {
        chunk,
        in_flight: request.workers,
        order: request.order,
        sparse: request.sparse,
        unwritten,
        backed,
        store,
        offload: match request.offload {
            true => Offload::WherePossible,
            false => Offload::Never,
        },
        may_unmap: false,
        on_read_error: request.on_read_error,
        rate: request.rate,
    })
}

/// Whether a new image, wherever its bytes are stored, tells of nothing but zeroes.
async fn says_zero(node: &Node) -> bool {
    let (mut at, end) = (0, node.length());
    // There is no backing to show anything.
    let is_absent = |status: &BlockStatus| node.driver().takes_backing() && !status.allocated;
    while at < end {
        let told = node.block_status(ByteRange::new(at, end - at)).await;
        match told {
            Ok(extent)
                if extent.length > 0 && (extent.status.zero || is_absent(&extent.status)) =>
            {
                at += extent.length;
            }
            _ => return false,
        }
    }
    true
}

/// How many bytes will be read, or written though they are zeroes.
async fn to_copy(
    sources: &Sources,
    options: &CopyOptions,
    observer: &dyn Observer,
) -> Result<u64, Failure> {
    let mut walk = Walk::new(sources, options, observer);
    let mut total = 0;
    loop {
        let step = walk.next().await;
        match step.map_err(|error| Failure::message(error.to_string()))? {
            None => return Ok(total),
            Some(step) => match step.kind {
                Kind::Data => total += step.range.length,
                Kind::Zero if options.sparse.is_none() => total += step.range.length,
                Kind::Zero | Kind::Backing => {}
            },
        }
    }
}

/// What the user sees of a copy.
struct Shown<'p> {
    progress: &'p Progress,
    quiet: bool,
    done: Cell<u64>,
    total: Cell<u64>,
}

impl Observer for Shown<'_> {
    fn copied(&self, bytes: u64) {
        self.done.set(self.done.get() + bytes);
        self.progress.at(self.done.get(), self.total.get());
    }
    fn lost(&self, offset: u64, errno: Errno) {
        if !self.quiet {
            let reason = block::error::reason(errno);
            warn(&format!("error while reading offset {offset}: {reason}"));
        }
    }
    fn status_unknown(&self, offset: u64, errno: Errno) {
        if !self.quiet {
            let reason = block::error::reason(errno);
            warn(&format!(
                "error while reading block status at offset {offset}: {reason}"
            ));
        }
    }
}
