//! What is offered: a node under a name.

use ::nbd::limits::{MAX_PAYLOAD, MAX_STRING};
use ::nbd::{
    BASE_ALLOCATION, BlockSizes, ExportFlags, QEMU_ALLOCATION_DEPTH, QEMU_DIRTY_BITMAP_PREFIX,
};
use block::accounting::Accounting;
use block::bitmap::Unusable;
use block::edge::Permissions;
use block::error::{Error, ErrorKind, Result};
use block::{ChildRole, DirtyBitmap, Errno, Node, Resize, Root};
use executor::Handle;
use std::cell::{Cell, RefCell};
use std::sync::Arc;

/// Sizes are multiples of it, as everywhere in QEMU.
const SECTOR: u64 = 512;
/// What is preferred at least, in bytes.
const PREFERRED: u32 = 4096;

/// Options of an NBD export (`BlockExportOptionsNbd` and more).
#[derive(Default)]
pub struct NbdExportOptions {
    /// What clients ask for; may be empty.
    pub name: String,
    /// A text for people.
    pub description: Option<String>,
    /// Whether clients may write.
    pub writable: bool,
    /// What completes is stable.
    pub writethrough: bool,
    /// Bitmaps to offer as metadata contexts.
    pub bitmaps: Vec<Arc<DirtyBitmap>>,
    /// Offers the depth in the backing chain as a metadata context.
    pub allocation_depth: bool,
    /// The smallest request, in bytes, for clients that ask; at least that of the node.
    pub minimum_block: u32,
    /// Threads of the clients, in turn; empty: the server's.
    pub threads: Vec<Handle>,
}

/// An export. Lives on the control thread.
pub struct NbdExport {
    core: Arc<Core>,
    threads: RefCell<Vec<Handle>>,
    next_thread: Cell<usize>,
}

/// What all threads see of an export.
pub(super) struct Core {
    pub(super) name: String,
    pub(super) description: Option<String>,
    pub(super) root: Root,
    pub(super) accounting: Arc<Accounting>,
    pub(super) writable: bool,
    pub(super) writethrough: bool,
    pub(super) bitmaps: Vec<Arc<DirtyBitmap>>,
    pub(super) allocation_depth: bool,
    minimum_block: u32,
}

/// A metadata context that an export has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Context {
    /// Holes and zeroes.
    Allocation,
    /// Depth in the backing chain.
    Depth,
    /// A bitmap, by its place in the list.
    Bitmap(usize),
}

impl NbdExport {
    /// Takes `node` as an export, and the bitmaps out of use for anybody else.
    ///
    /// # Errors
    /// `Invalid` for texts that are too long, and for a bitmap that would not record what is written; `Busy` when the users of the
    /// node or a bitmap do not tolerate it.
    pub fn new(node: &Arc<Node>, options: NbdExportOptions) -> Result<Self> {
        check_texts(&options)?;
        let root = take_root(node, &options)?;
        for (index, bitmap) in options.bitmaps.iter().enumerate() {
            let usable = check_bitmap(bitmap, node, options.writable);
            if let Err(error) = usable.and_then(|()| take_bitmap(bitmap)) {
                for taken in &options.bitmaps[..index] {
                    taken.give_back();
                }
                return Err(error);
            }
        }
        let limits = node.driver().limits();
        Ok(Self {
            core: Arc::new(Core {
                name: options.name,
                description: options.description,
                root,
                accounting: Accounting::new(),
                writable: options.writable,
                writethrough: options.writethrough,
                bitmaps: options.bitmaps,
                allocation_depth: options.allocation_depth,
                minimum_block: options.minimum_block.max(limits.request_alignment),
            }),
            threads: RefCell::new(options.threads),
            next_thread: Cell::new(0),
        })
    }

    /// The node that it shows.
    pub fn node(&self) -> &Arc<Node> {
        self.core.root.node()
    }

    /// What the requests of all its clients came to.
    pub fn accounting(&self) -> &Arc<Accounting> {
        &self.core.accounting
    }

    /// The name that clients ask for.
    pub fn name(&self) -> &str {
        &self.core.name
    }

    /// Serves clients that come from now on on these threads; empty: the server's.
    pub fn set_threads(&self, threads: Vec<Handle>) {
        self.threads.replace(threads);
    }

    pub(super) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// The thread for the next client.
    pub(super) fn thread(&self) -> Handle {
        let threads = self.threads.borrow();
        let turn = self.next_thread.get();
        self.next_thread.set(turn.wrapping_add(1));
        match threads.len() {
            0 => Handle::current(),
            count => threads[turn % count].clone(),
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        for bitmap in &self.bitmaps {
            bitmap.give_back();
        }
    }
}

impl Core {
    /// Bytes that clients see: whole sectors. What the node does not have of the last one reads as zeroes.
    pub(super) fn size(&self) -> u64 {
        self.root.node().length().next_multiple_of(SECTOR)
    }

    /// Makes the node as long as clients see it, before they write to its last sector.
    pub(super) async fn reach_size(&self) -> std::result::Result<(), Errno> {
        let resize = Resize::to(self.size());
        if self.root.node().length() == resize.length {
            return Ok(());
        }
        let resized = self.root.node().resize(resize).await;
        resized.map_err(|error| error.errno.unwrap_or(Errno::EIO))
    }

    /// What clients may do. `several` when there may be more than one.
    pub(super) fn flags(&self, several: Several) -> ExportFlags {
        let mut flags = ExportFlags::HAS_FLAGS
            .with(ExportFlags::SEND_FLUSH)
            .with(ExportFlags::SEND_FUA)
            .with(ExportFlags::SEND_DF)
            .with(ExportFlags::SEND_CACHE);
        // All sessions end in one node, so that a flush is for all of them.
        if several == Several::Clients {
            flags = flags.with(ExportFlags::CAN_MULTI_CONN);
        }
        if self.writable {
            flags
                .with(ExportFlags::SEND_TRIM)
                .with(ExportFlags::SEND_WRITE_ZEROES)
                .with(ExportFlags::SEND_FAST_ZERO)
        } else {
            flags.with(ExportFlags::READ_ONLY)
        }
    }

    pub(super) fn block_sizes(&self) -> BlockSizes {
        let limits = self.root.node().driver().limits();
        let maximum = match limits.max_transfer {
            0 => MAX_PAYLOAD,
            limit => limit.min(MAX_PAYLOAD),
        };
        BlockSizes {
            minimum: self.minimum_block,
            preferred: PREFERRED.max(self.minimum_block).min(maximum),
            maximum,
        }
    }

    /// Every metadata context: its number, its name.
    pub(super) fn contexts(&self) -> Vec<(Context, u32, String)> {
        let mut all = vec![(Context::Allocation, 0, BASE_ALLOCATION.to_owned())];
        if self.allocation_depth {
            all.push((Context::Depth, 1, QEMU_ALLOCATION_DEPTH.to_owned()));
        }
        for (index, bitmap) in self.bitmaps.iter().enumerate() {
            let name = format!("{QEMU_DIRTY_BITMAP_PREFIX}{}", bitmap.name());
            all.push((Context::Bitmap(index), index as u32 + 2, name));
        }
        all
    }
}

/// Whether an export may have more than one client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Several {
    /// One at a time.
    No,
    /// It may.
    Clients,
}

/// The bitmap called `name` of a node, or of the images below it.
pub fn find_bitmap(node: &Node, name: &str) -> Option<Arc<DirtyBitmap>> {
    if let Some(found) = node.bitmaps().find(name) {
        return Some(found);
    }
    let edges = node.driver().edges();
    let below = |role| edges.iter().find(|(_, edge)| edge.role() == role);
    let edge = below(ChildRole::Backing).or_else(|| below(ChildRole::Filtered));
    edge.and_then(|(_, edge)| find_bitmap(edge.node(), name))
}

fn check_texts(options: &NbdExportOptions) -> Result<()> {
    let invalid = |message: String| Err(Error::new(ErrorKind::Invalid, message));
    if options.name.len() > MAX_STRING {
        return invalid(format!("export name '{}' too long", options.name));
    }
    if let Some(text) = &options.description
        && text.len() > MAX_STRING
    {
        return invalid(format!("description '{text}' too long"));
    }
    Ok(())
}

fn check_bitmap(bitmap: &Arc<DirtyBitmap>, node: &Node, writable: bool) -> Result<()> {
    bitmap.check(Unusable::BUSY_OR_INCONSISTENT)?;
    let own = node.bitmaps().find(bitmap.name());
    let own = own.is_some_and(|own| Arc::ptr_eq(&own, bitmap));
    if !writable && own && !node.options().read_only && bitmap.is_recording() {
        let name = bitmap.name();
        let message = format!("Enabled bitmap '{name}' incompatible with readonly export");
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    Ok(())
}

fn take_bitmap(bitmap: &DirtyBitmap) -> Result<()> {
    if bitmap.try_take() {
        return Ok(());
    }
    bitmap.check(Unusable::BUSY_OR_INCONSISTENT)
}

/// A root with the permissions that an export needs. It tolerates everything from others, as an export of qemu-storage-daemon does.
fn take_root(node: &Arc<Node>, options: &NbdExportOptions) -> Result<Root> {
    let permissions = Permissions {
        consistent_read: true,
        write: options.writable,
        // The last sector may have to be completed.
        resize: options.writable && !node.length().is_multiple_of(SECTOR),
        ..Permissions::default()
    };
    Root::new("", node, permissions, Permissions::ALL)
}
