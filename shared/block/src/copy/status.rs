//! Who decides the content of a range: the first image of a backing chain that has something.

use crate::driver::{BlockStatus, ByteRange};
use crate::node::Node;
use crate::open::ChildRole;
use executor::Errno;

/// What is known of the start of a range, looking down a backing chain.
#[derive(Clone, Copy)]
pub struct Above<'a> {
    /// Bytes it holds for (> 0).
    pub length: u64,
    /// The status in the image that decides.
    pub status: BlockStatus,
    /// Images between the first one and that.
    pub depth: u32,
    /// The node that `status.offset` is in.
    pub storage: Option<&'a Node>,
}

impl Above<'_> {
    /// Whether an image that was looked at decides (zeroes or data).
    pub fn is_decided(&self) -> bool {
        self.status.zero || self.status.data
    }
}

/// The image behind `node`, filters in front of it left out.
pub fn backing_of(node: &Node) -> Option<&Node> {
    if let Some(child) = node.driver().filtered() {
        return backing_of(child.node());
    }
    let edges = node.driver().edges();
    let backing = edges.iter().find(|(name, _)| *name == "backing");
    if let Some((_, backing)) = backing {
        return Some(backing.node());
    }
    match &edges[..] {
        [(_, only)] if only.role() == ChildRole::Filtered => backing_of(only.node()),
        _ => None,
    }
}

/// The status of the start of `range`: from `node` or the images behind it, but for `base` and
/// what is behind that.
///
/// # Errors
/// Those of the drivers.
pub async fn above<'a>(
    node: &'a Node,
    base: Option<&Node>,
    range: ByteRange,
) -> Result<Above<'a>, Errno> {
    let mut current = node;
    let mut above = Above {
        length: range.length,
        status: BlockStatus::default(),
        depth: 0,
        storage: None,
    };
    loop {
        let asked = ByteRange::new(range.offset, above.length);
        let here = in_image(current, asked).await?;
        above.length = here.length.min(above.length);
        above.status = here.status;
        above.storage = here.storage;
        if above.is_decided() {
            return Ok(above);
        }
        match backing_of(current) {
            Some(backing) if !base.is_some_and(|base| std::ptr::eq(base, backing)) => {
                current = backing;
                above.depth += 1;
            }
            _ => return Ok(above),
        }
    }
}

/// The image below filters.
fn unfiltered(node: &Node) -> &Node {
    match node.driver().filtered() {
        Some(child) => unfiltered(child.node()),
        None => node,
    }
}

/// The status in one image. Storage that is a hole in the file below reads as zeroes.
async fn in_image(node: &Node, range: ByteRange) -> Result<Above<'_>, Errno> {
    let extent = node.block_status(range).await?;
    let mut found = Above {
        length: extent.length.min(range.length),
        status: extent.status,
        depth: 0,
        storage: None,
    };
    // A filter's status is its child's.
    let node = unfiltered(node);
    let edges = node.driver().edges();
    let find = |name: &str| edges.iter().find(|(role, _)| *role == name);
    let Some(offset) = found.status.offset else {
        return Ok(found);
    };
    let named = || find("data-file").or_else(|| find("file"));
    let several = node.driver().data_child(range.offset);
    let Some(storage) = several.or_else(|| named().map(|(_, edge)| *edge)) else {
        found.storage = Some(node);
        return Ok(found);
    };
    let storage = storage.node();
    found.storage = Some(storage);
    if found.status.data && found.status.sparse {
        let below = storage
            .block_status(ByteRange::new(offset, found.length))
            .await?;
        found.length = found.length.min(below.length);
        found.status.zero |= below.status.zero;
    }
    Ok(found)
}
