//! What users do to a node's named bitmaps, with QEMU's conditions and words.

use super::dirty::{BitmapOptions, DirtyBitmap, Unusable};
use super::{MAX_NAME, MIN_GRANULARITY};
use crate::error::{Error, ErrorKind, Result};
use crate::node::Node;
use std::sync::Arc;

/// A bitmap to be added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewBitmap {
    /// Its name.
    pub name: String,
    /// Bytes of a granule; without one, the node's cluster size between 4 KiB and 64 KiB.
    pub granularity: Option<u32>,
    /// Stored with the image.
    pub persistent: bool,
    /// Does not record at first.
    pub disabled: bool,
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

/// Bytes of a granule when nobody chose.
fn default_granularity(node: &Node) -> u32 {
    match node.driver().limits().optimal_transfer {
        0 => 65536,
        cluster => cluster.clamp(4096, 65536),
    }
}

/// The bitmap of that name.
///
/// # Errors
/// `NotFound`.
pub fn find(node: &Node, name: &str) -> Result<Arc<DirtyBitmap>> {
    node.bitmaps().find(name).ok_or_else(|| {
        let message = format!("Dirty bitmap '{name}' not found");
        Error::new(ErrorKind::NotFound, message)
    })
}

/// Adds a bitmap to a node.
///
/// # Errors
/// `Invalid` for a bad name or granularity, or when the name is taken; `Unsupported` when it cannot
/// be stored.
pub fn add(node: &Node, new: NewBitmap) -> Result<Arc<DirtyBitmap>> {
    let name = new.name;
    if name.is_empty() {
        return Err(invalid("Bitmap name cannot be empty".into()));
    }
    if new
        .granularity
        .is_some_and(|bytes| bytes < MIN_GRANULARITY || !bytes.is_power_of_two())
    {
        let message = "Granularity must be power of 2 and at least 512";
        return Err(invalid(message.into()));
    }
    let granularity = new.granularity.unwrap_or_else(|| default_granularity(node));
    if new.persistent {
        let Some(store) = node.driver().bitmap_store() else {
            let message = format!(
                "Can't store persistent bitmaps to {}: Operation not supported",
                node.name()
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        };
        store.can_store(&name, granularity).map_err(|error| {
            error.context(format!(
                "Can't make bitmap '{name}' persistent in '{}'",
                node.name()
            ))
        })?;
    }
    if node.bitmaps().find(&name).is_some() {
        return Err(invalid(format!("Bitmap already exists: {name}")));
    }
    if name.len() > MAX_NAME {
        return Err(invalid(format!("Bitmap name too long: {name}")));
    }
    let bitmap = DirtyBitmap::new(BitmapOptions {
        name: Some(name),
        granularity,
        size: node.length(),
    })?;
    if new.disabled {
        bitmap.disable();
    }
    bitmap.set_persistent(new.persistent);
    let bitmap = Arc::new(bitmap);
    node.bitmaps().attach(Arc::clone(&bitmap));
    Ok(bitmap)
}

/// Removes a bitmap, from the image too.
///
/// # Errors
/// `NotFound`; what keeps it from being removed; `Io`.
pub async fn remove(node: &Node, name: &str) -> Result<()> {
    let bitmap = find(node, name)?;
    check_remove(&bitmap)?;
    forget_stored(node, &bitmap).await?;
    node.bitmaps().detach(&bitmap);
    Ok(())
}

/// Removes what an image stores of a bitmap.
///
/// # Errors
/// `Io`.
pub async fn forget_stored(node: &Node, bitmap: &DirtyBitmap) -> Result<()> {
    match node.driver().bitmap_store() {
        Some(store) if bitmap.is_persistent() => store.remove(bitmap.name()).await,
        _ => Ok(()),
    }
}

/// What keeps a bitmap from being removed.
///
/// # Errors
/// That.
pub fn check_remove(bitmap: &DirtyBitmap) -> Result<()> {
    bitmap.check(Unusable::BUSY_OR_READ_ONLY)
}

/// What keeps a bitmap from being changed.
///
/// # Errors
/// That.
pub fn check_change(bitmap: &DirtyBitmap) -> Result<()> {
    bitmap.check(Unusable::ANY)
}

/// What keeps a bitmap from being used.
///
/// # Errors
/// That.
pub fn check_use(bitmap: &DirtyBitmap) -> Result<()> {
    bitmap.check(Unusable::BUSY_OR_INCONSISTENT)
}

/// The error for a bitmap that somebody uses.
pub fn busy(bitmap: &DirtyBitmap) -> Error {
    let name = bitmap.name();
    let message =
        format!("Bitmap '{name}' is currently in use by another operation and cannot be used");
    Error::new(ErrorKind::Busy, message)
}

/// Makes everything clean.
///
/// # Errors
/// `NotFound`; what keeps it from being changed.
pub fn clear(node: &Node, name: &str) -> Result<()> {
    let bitmap = find(node, name)?;
    check_change(&bitmap)?;
    bitmap.clear_all();
    Ok(())
}

/// Starts recording.
///
/// # Errors
/// `NotFound`; what keeps it from being used.
pub fn enable(node: &Node, name: &str) -> Result<()> {
    let bitmap = find(node, name)?;
    check_use(&bitmap)?;
    bitmap.enable();
    Ok(())
}

/// Stops recording.
///
/// # Errors
/// `NotFound`; what keeps it from being used.
pub fn disable(node: &Node, name: &str) -> Result<()> {
    let bitmap = find(node, name)?;
    check_use(&bitmap)?;
    bitmap.disable();
    Ok(())
}

/// Adds what is dirty in `sources` to the bitmap `target`: all of them or none.
///
/// # Errors
/// As of [`check_merge`].
pub fn merge(target: &DirtyBitmap, sources: &[Arc<DirtyBitmap>]) -> Result<()> {
    check_merge(target, sources)?;
    sources.iter().for_each(|source| target.merge(source));
    Ok(())
}

/// What keeps `sources` from being merged into `target`.
///
/// # Errors
/// What keeps a bitmap from being used; `Invalid` when the lengths differ.
pub fn check_merge(target: &DirtyBitmap, sources: &[Arc<DirtyBitmap>]) -> Result<()> {
    target.check(Unusable::ANY)?;
    for source in sources {
        source.check(Unusable::BUSY_OR_INCONSISTENT)?;
        if source.size() != target.size() {
            return Err(invalid(format!(
                "Bitmaps are of different sizes (destination size is {}, source size is {}) and \
                 can't be merged",
                target.size(),
                source.size()
            )));
        }
    }
    Ok(())
}
