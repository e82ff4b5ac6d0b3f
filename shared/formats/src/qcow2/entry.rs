//! The driver's line in the table of formats: options and children of a qcow2 node.

use super::cache::clean_regularly;
use super::header::{Header, MAGIC, incompatible};
use super::open::{OpenOptions, check_data_file, read_header};
use super::reclaim::DiscardPolicy;
use super::{CacheOptions, OverlapChecks, Qcow2, check, crypto};
use block::open::{BackingName, ChildRole};
use block::{
    BoxFuture, Discard, Driver, DriverEntry, Edge, Error, ErrorKind, FormatNode, OpenRequest,
    Purpose,
};
use std::sync::Arc;

/// The qcow2 driver.
pub const ENTRY: DriverEntry = DriverEntry::new(
    "qcow2",
    |request| -> BoxFuture<'_, Result<Box<dyn Driver>, Error>> { Box::pin(open_node(request)) },
)
.with_probe(probe)
.with_compression()
.with_strong_options(&["encrypt.key-secret"])
.with_supersede(|new, old| {
    CacheOptions::supersede(new, old);
    OverlapChecks::supersede(new, old)
})
.with_create(super::create_entry::CREATOR)
.with_measure(|request, source| Box::pin(super::measure::measure(request, source)))
.with_amend(super::amend::AMENDER);

fn probe(start: &[u8]) -> u8 {
    let known = start.starts_with(&MAGIC.to_be_bytes())
        && start
            .get(4..8)
            .is_some_and(|version| version[..3] == [0; 3] && version[3] >= 2);
    if known { 100 } else { 0 }
}

async fn open_node(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>, Error> {
    let Parts {
        file,
        backing,
        header,
        options,
    } = match request.purpose() {
        Purpose::Check => {
            take_options(request)?;
            return check::open_node(request).await;
        }
        Purpose::Serve | Purpose::Describe | Purpose::Inspect => take_parts(request).await?,
    };
    let clean_interval = options.caches.clean_interval()?;
    let image = Qcow2::open_parsed(file, backing, header, options).await?;
    if let Some(interval) = clean_interval {
        for cache in [&image.l2, &image.refcounts] {
            drop(executor::spawn(clean_regularly(cache, interval)));
        }
    }
    Ok(Box::new(FormatNode::new(image)))
}

/// What an image is opened from.
pub(super) struct Parts {
    pub(super) file: Edge,
    pub(super) backing: Option<Edge>,
    pub(super) header: Header,
    pub(super) options: OpenOptions,
}

fn take_options(request: &mut OpenRequest<'_>) -> Result<OpenOptions, Error> {
    let mut options = OpenOptions {
        read_only: request.node().read_only,
        reporter: request.reporter(),
        ..OpenOptions::default()
    };
    options.caches = CacheOptions {
        total: request.take_size("cache-size")?,
        l2: request.take_size("l2-cache-size")?,
        l2_entry: request.take_size("l2-cache-entry-size")?,
        refcounts: request.take_size("refcount-cache-size")?,
        // A negative number is too big a one.
        clean_interval_s: request
            .take_int("cache-clean-interval")?
            .map(i64::cast_unsigned),
    };
    if let Some(value) = request.take("overlap-check") {
        options.overlap_checks = OverlapChecks::parse(&value)?;
    }
    options.lazy_refcounts = request.take_bool("lazy-refcounts")?;
    options.discards = discard_policy(request)?;
    Ok(options)
}

/// Takes the options and children of a node out of the request.
pub(super) async fn take_parts(request: &mut OpenRequest<'_>) -> Result<Parts, Error> {
    let mut options = take_options(request)?;
    let file = request.required_child("file", ChildRole::Image).await?;
    let header = read_header(&file).await?;
    if options.discards.keeps_clusters && header.version < 3 {
        let message = "discard-no-unref is only supported since qcow2 version 3";
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    options.data_file = data_file(request, &file, &header).await?;
    let named = header.backing_name.as_deref().map(|name| BackingName {
        name,
        format: header.backing_format.as_deref(),
    });
    let backing = request.backing(&file, named).await?;
    options.crypto = crypto::open_for(request, (&file, &header))
        .await?
        .map(Arc::new);
    if !options.read_only {
        options.log = request.redo_log(&file)?;
    } else if request.purpose() != Purpose::Describe && !request.node().force_share {
        // With force-share the writer may be alive: what is read is as of its last flush.
        options.left_behind = request.left_behind(&file)?;
    }
    Ok(Parts {
        file,
        backing,
        header,
        options,
    })
}

/// What becomes of discards, by default as the node's own `discard` says.
fn discard_policy(request: &mut OpenRequest<'_>) -> Result<DiscardPolicy, Error> {
    let unmaps = request.node().discard == Discard::Unmap;
    Ok(DiscardPolicy {
        request: request.take_bool("pass-discard-request")?.unwrap_or(unmaps),
        snapshot: request.take_bool("pass-discard-snapshot")?.unwrap_or(true),
        other: request.take_bool("pass-discard-other")?.unwrap_or(false),
        keeps_clusters: request.take_bool("discard-no-unref")?.unwrap_or(false),
    })
}

/// The external data file: the one given, or the one that the image names.
async fn data_file(
    request: &mut OpenRequest<'_>,
    file: &Edge,
    header: &Header,
) -> Result<Option<Edge>, Error> {
    let given = request.child("data-file", ChildRole::Data).await?.flatten();
    let needed = header.incompatible & incompatible::DATA_FILE != 0;
    if request.purpose() == Purpose::Describe {
        return Ok(given);
    }
    match (given, &header.data_file) {
        (None, Some(name)) if needed => request.data_file_named(file, name).await.map(Some),
        (given, _) => {
            check_data_file(header, given.is_some())?;
            Ok(given)
        }
    }
}
