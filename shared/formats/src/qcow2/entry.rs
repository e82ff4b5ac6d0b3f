//! The driver's line in the table of formats: options and children of a qcow2 node.

use super::open::{OpenOptions, read_header};
use super::{Qcow2, header::Header};
use block::open::ChildRole;
use block::{BoxFuture, Driver, DriverEntry, Edge, Error, ErrorKind, FormatNode, OpenRequest};

/// The qcow2 driver.
pub const ENTRY: DriverEntry = DriverEntry {
    name: "qcow2",
    open: |request| -> BoxFuture<'_, Result<Box<dyn Driver>, Error>> {
        Box::pin(open_node(request))
    },
};

async fn open_node(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>, Error> {
    let mut options = OpenOptions {
        read_only: request.node().read_only,
        ..OpenOptions::default()
    };
    if let Some(size) = request.take_size("l2-cache-size")? {
        options.l2_cache = size;
    }
    if let Some(size) = request.take_size("refcount-cache-size")? {
        options.refcount_cache = size;
    }
    // Refcounts are kept exact whatever the image or the user asks: it costs nothing here.
    request.take_bool("lazy-refcounts")?;
    let file = request.required_child("file", ChildRole::Image).await?;
    let header = read_header(&file).await?;
    let backing = match request.child("backing", ChildRole::Backing).await? {
        Some(given) => given,
        None => implicit_backing(request, &file, &header).await?,
    };
    if !options.read_only {
        options.log = request.redo_log(&file)?;
    }
    let image = Qcow2::open_parsed(file, backing, header, options).await?;
    Ok(Box::new(FormatNode::new(image)))
}

/// The backing file that the image names. Its format is never guessed.
async fn implicit_backing(
    request: &mut OpenRequest<'_>,
    file: &Edge,
    header: &Header,
) -> Result<Option<Edge>, Error> {
    let Some(name) = &header.backing_name else {
        return Ok(None);
    };
    let Some(format) = &header.backing_format else {
        let message = format!(
            "the image does not tell the format of its backing file '{name}'; \
             give 'backing' explicitly or store it (qemu-img rebase -u -F)"
        );
        return Err(Error::new(ErrorKind::Invalid, message));
    };
    let backing = request.backing_named(file, name, Some(format)).await;
    backing.map(Some)
}
