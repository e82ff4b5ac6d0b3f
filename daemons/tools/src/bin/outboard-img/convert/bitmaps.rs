//! Persistent dirty bitmaps, copied with the data.

use block::bitmap::ops::{self, NewBitmap};
use block::{DirtyBitmap, Node, Root};
use std::sync::Arc;
use tools::failure::{Failure, described, warn};

/// What happens to bitmaps that were not saved well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// The conversion fails.
    Refuse,
    /// They are left out.
    Skip,
}

/// The bitmaps of the only one of `roots` that are to be copied.
pub(super) fn to_copy(roots: &[Root], broken: Broken) -> Result<Vec<Arc<DirtyBitmap>>, Failure> {
    let [root] = roots else {
        let message = "Copying bitmaps only possible with single source";
        return Err(Failure::message(message));
    };
    let source = root.node();
    if source.driver().bitmap_store().is_none() {
        return Err(Failure::message("Source lacks bitmap support"));
    }
    let mut bitmaps = Vec::new();
    // From the newest on, as the peer names what is wrong.
    for bitmap in source.bitmaps().list().iter().rev() {
        if !bitmap.is_persistent() {
            continue;
        }
        match (bitmap.is_inconsistent(), broken) {
            (false, _) => bitmaps.push(Arc::clone(bitmap)),
            (true, Broken::Skip) => {
                warn(&format!("Skipping inconsistent bitmap '{}'", bitmap.name()));
            }
            (true, Broken::Refuse) => {
                return Err(Failure::message(format!(
                    "Cannot copy inconsistent bitmap '{}'\nTry --skip-broken-bitmaps, or use \
                     'qemu-img bitmap --remove' to delete it",
                    bitmap.name()
                )));
            }
        }
    }
    bitmaps.reverse();
    Ok(bitmaps)
}

/// Whether the target stores bitmaps.
pub(super) fn check_target(target: &Node) -> Result<(), Failure> {
    let driver = target.driver();
    if driver.bitmap_store().is_some() {
        return Ok(());
    }
    let message = format!(
        "Format driver '{}' does not support bitmaps",
        driver.driver_name()
    );
    Err(Failure::message(message))
}

/// Makes the same bitmaps in the target.
pub(super) async fn copy(bitmaps: &[Arc<DirtyBitmap>], target: &Node) -> Result<(), Failure> {
    for bitmap in bitmaps {
        let name = bitmap.name();
        let failed = |what: &str, error: &block::Error| {
            Failure::message(described(&format!("{what} bitmap {name}"), error))
        };
        let new = NewBitmap {
            name: name.to_owned(),
            granularity: Some(bitmap.granularity()),
            persistent: true,
            disabled: true,
        };
        let added = ops::add(target, new);
        let copy = added.map_err(|error| failed("Failed to create", &error))?;
        if let Err(error) = ops::merge(&copy, &[Arc::clone(bitmap)]) {
            if let Err(error) = ops::remove(target, name).await {
                warn(&described("a bitmap without content stays behind", &error));
            }
            return Err(failed("Failed to populate", &error));
        }
        // A bitmap that is only marked as disabled while the image is read-only was recording.
        if bitmap.is_recorded() {
            ops::enable(target, name).map_err(|error| failed("Failed to enable", &error))?;
        }
    }
    Ok(())
}
