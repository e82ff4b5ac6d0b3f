//! A qcow2 node over a file of the simulated or the real world.

use crate::luks::Password;
use crate::qcow2::crypto::Crypto;
use crate::qcow2::open::read_header;
use crate::qcow2::{
    CacheOptions, CreateOptions, DiscardPolicy, OpenOptions, Qcow2, create, create_with_data,
};
use block::edge::{EdgeSpec, Permissions};
use block::node::Discard;
use block::open::ChildRole;
use block::redo_log::Record;
use block::{
    BlockStatus, BoxFuture, Buffer, ByteRange, Driver, Edge, Errno, Error, FormatNode,
    ImageIdentity, IoFuture, Limits, Node, NodeOptions, RedoLog, Resize, Root, RootHandle,
    StatusExtent, WriteFlags, ZeroFlags,
};
use executor::file::Fallocate;
use executor::{File, OpenOptions as FileOptions};
use serde_json::{Map, Value};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use zeroize::Zeroizing;

thread_local! {
    /// Operations that this thread's leaves may still start before they stop answering.
    static BUDGET: Cell<u64> = const { Cell::new(u64::MAX) };
    /// Holes that this thread's leaves were asked for since somebody looked.
    static HOLES: RefCell<Vec<Hole>> = const { RefCell::new(Vec::new()) };
    /// Wakes who waits for the death.
    static MAIN: Cell<Option<std::task::Waker>> = const { Cell::new(None) };
}

/// A range of a file whose storage is given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hole {
    pub(super) path: PathBuf,
    pub(super) range: Range<u64>,
}

/// The holes that this thread's leaves were asked for since the last call, in ascending order; neighbours as one.
pub(super) fn take_holes() -> Vec<Hole> {
    let mut holes = HOLES.take();
    holes.sort_by_key(|hole| (hole.path.clone(), hole.range.start));
    holes.dedup_by(|next, hole| {
        let goes_on = next.path == hole.path && next.range.start <= hole.range.end;
        if goes_on {
            hole.range.end = hole.range.end.max(next.range.end);
        }
        goes_on
    });
    holes
}

/// From the `operations`-th file operation on, none is started nor answered: the process is dead.
pub(super) fn die_after(operations: u64) {
    BUDGET.set(operations);
}

/// Runs `life` to its end or to the death of the process.
pub(super) async fn until_death(life: impl Future<Output = ()>) {
    let mut life = std::pin::pin!(life);
    std::future::poll_fn(|context| {
        MAIN.set(Some(context.waker().clone()));
        match is_dead() {
            true => std::task::Poll::Ready(()),
            false => life.as_mut().poll(context),
        }
    })
    .await;
}

fn is_dead() -> bool {
    BUDGET.get() == 0
}

fn die() {
    if let Some(main) = MAIN.take() {
        main.wake();
    }
}

/// A file as a leaf.
struct Leaf {
    path: PathBuf,
    file: File,
    length: AtomicU64,
}

impl Leaf {
    fn punch(&self, range: ByteRange) -> IoFuture<'_> {
        let ByteRange { offset, length } = range;
        let hole = Hole {
            path: self.path.clone(),
            range: offset..offset + length,
        };
        HOLES.with_borrow_mut(|holes| holes.push(hole));
        self.op(|| self.file.fallocate(Fallocate::PunchHole, offset, length))
    }

    fn op<'a>(&self, start: impl FnOnce() -> executor::FileOp) -> IoFuture<'a> {
        match BUDGET.get() {
            0 => {
                die();
                IoFuture::boxed(std::future::pending())
            }
            left => {
                if left != u64::MAX {
                    BUDGET.set(left - 1);
                }
                let op = start();
                IoFuture::boxed(async move {
                    let result = op.await;
                    if is_dead() {
                        die();
                        std::future::pending::<()>().await;
                    }
                    result
                })
            }
        }
    }
}

impl Driver for Leaf {
    fn driver_name(&self) -> &'static str {
        "leaf"
    }
    fn length(&self) -> u64 {
        self.length.load(Ordering::Relaxed)
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn grows(&self) -> bool {
        true
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        self.op(|| self.file.read_at(buffer, offset))
    }
    fn write(&self, offset: u64, buffer: Buffer, _flags: WriteFlags) -> IoFuture<'_> {
        let end = offset + buffer.len() as u64;
        self.length.fetch_max(end, Ordering::Relaxed);
        self.op(|| self.file.write_at(buffer, offset))
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        if flags.may_unmap && range.offset + range.length <= self.length() {
            return self.punch(range);
        }
        self.write(
            range.offset,
            Buffer::zeroed(range.length as usize),
            WriteFlags::default(),
        )
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        self.punch(range)
    }
    fn flush(&self) -> IoFuture<'_> {
        self.op(|| self.file.sync_data())
    }
    fn block_status(&self, range: ByteRange) -> BoxFuture<'_, Result<StatusExtent, Errno>> {
        let status = BlockStatus {
            data: true,
            allocated: true,
            offset: Some(range.offset),
            ..BlockStatus::default()
        };
        let length = range.length;
        Box::pin(async move { Ok(StatusExtent { length, status }) })
    }
    fn resize(&self, resize: Resize) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let done = self.file.set_len(resize.length).await;
            done.map_err(|errno| Error::io("resize", errno))?;
            self.length.store(resize.length, Ordering::Relaxed);
            Ok(())
        })
    }
    fn close(&self) -> BoxFuture<'_, Result<(), Errno>> {
        Box::pin(async { Ok(()) })
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        Vec::new()
    }
    fn describe(&self) -> Map<String, Value> {
        Map::new()
    }
    fn filename(&self) -> String {
        String::new()
    }
    fn identity(&self) -> Option<ImageIdentity> {
        None
    }
}

/// A file as a node.
pub(crate) fn leaf(path: &Path) -> Arc<Node> {
    let options = FileOptions {
        write: true,
        create: true,
        ..FileOptions::default()
    };
    let file = File::open(path, &options).unwrap();
    let length = AtomicU64::new(file.len().unwrap());
    let options = NodeOptions {
        node_name: path.display().to_string(),
        discard: Discard::Unmap,
        ..NodeOptions::default()
    };
    let path = path.to_owned();
    Node::new(options, Box::new(Leaf { path, file, length }))
}

pub(crate) fn edge(child: &Arc<Node>, name: &'static str, role: ChildRole) -> Edge {
    let spec = EdgeSpec {
        parent: "test".into(),
        name,
        role,
        read_only: role == ChildRole::Backing,
    };
    Edge::attach(child, spec).unwrap()
}

/// A file as the child of an image that is open for writing.
pub(super) fn image_edge(path: &Path) -> Edge {
    edge(&leaf(path), "file", ChildRole::Image)
}

/// Makes an image.
pub(super) async fn make(path: &Path, options: &CreateOptions) {
    let file = edge(&leaf(path), "file", ChildRole::Image);
    create(file, options).await.unwrap();
}

/// Makes an image with an external data file, whose name in the image is its path.
pub(super) async fn make_with_data(path: &Path, data: &Path, options: CreateOptions) {
    let options = CreateOptions {
        data_file: Some(data.display().to_string()),
        ..options
    };
    let data = edge(&leaf(data), "data-file", ChildRole::Data);
    let file = image_edge(path);
    create_with_data(file, Some(data), &options).await.unwrap();
}

/// Turns an empty image of version 3 into one with other incompatible and autoclear features, for a
/// disk of `size` bytes (at most what its L1 table maps then).
pub(super) async fn with_features(path: &Path, size: u64, (incompatible, autoclear): (u64, u64)) {
    let node = leaf(path);
    for (at, value) in [(24, size), (72, incompatible), (88, autoclear)] {
        let bytes = Buffer::from(&u64::to_be_bytes(value)[..]);
        let write = node.write(at, bytes, WriteFlags::default());
        write.await.unwrap();
    }
    node.flush().await.unwrap();
}

/// How the rig opens an image.
pub(super) struct Setup {
    pub(super) backing: Option<Arc<Node>>,
    /// The external data file.
    pub(super) data_file: Option<PathBuf>,
    pub(super) discards: DiscardPolicy,
    pub(super) log: RedoLog,
    /// Memory for each cache in bytes.
    pub(super) cache: u64,
    /// Bytes of an L2 table that are cached as one.
    pub(super) l2_entry: Option<u64>,
    /// Opens an encrypted image.
    pub(super) password: Option<&'static str>,
    /// Leaves refcounts in memory; the image says otherwise.
    pub(super) lazy_refcounts: bool,
    /// Opens it to be read only, with what a killed writer left in its log.
    pub(super) left_behind: Option<Vec<Record>>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            backing: None,
            data_file: None,
            discards: DiscardPolicy::default(),
            log: RedoLog::in_memory(1024),
            cache: 1 << 20,
            l2_entry: None,
            password: None,
            lazy_refcounts: false,
            left_behind: None,
        }
    }
}

/// A secret.
pub(super) fn password(text: &str) -> Password {
    Arc::new(Zeroizing::new(text.as_bytes().to_vec()))
}

/// An open image with a root on it.
#[derive(Clone)]
pub(super) struct Disk {
    pub(super) node: Arc<Node>,
    pub(super) root: Rc<RootHandle>,
    /// Otherwise a discard changes nothing.
    pub(super) discard_reads_zero: bool,
    /// How often a writer had to wait for a flush.
    pub(super) stalls: Arc<AtomicU64>,
}

impl Disk {
    pub(super) async fn open(path: &Path, setup: Setup) -> Result<Disk, Error> {
        let file = edge(&leaf(path), "file", ChildRole::Image);
        let has_backing = setup.backing.is_some();
        let backing = setup
            .backing
            .map(|node| edge(&node, "backing", ChildRole::Backing));
        let crypto = match setup.password {
            Some(text) => {
                let header = read_header(&file).await?;
                let password = password(text);
                Crypto::open(&file, &header, &password).await?.map(Arc::new)
            }
            None => None,
        };
        let options = OpenOptions {
            read_only: setup.left_behind.is_some(),
            caches: CacheOptions {
                l2: Some(setup.cache),
                l2_entry: setup.l2_entry,
                refcounts: Some(setup.cache),
                ..CacheOptions::default()
            },
            log: setup.log,
            left_behind: setup.left_behind.unwrap_or_default(),
            data_file: setup
                .data_file
                .map(|path| edge(&leaf(&path), "data-file", ChildRole::Data)),
            discards: setup.discards,
            lazy_refcounts: Some(setup.lazy_refcounts),
            crypto,
            ..OpenOptions::default()
        };
        let read_only = options.read_only;
        let image = Qcow2::open(file, backing, options).await?;
        let stalls = Arc::clone(&image.stalls);
        let options = NodeOptions {
            node_name: "disk".into(),
            discard: Discard::Unmap,
            read_only,
            ..NodeOptions::default()
        };
        let node = Node::new(options, Box::new(FormatNode::new(image)));
        let permissions = match read_only {
            true => Permissions::READ,
            false => Permissions::ALL,
        };
        let root = Root::new("test", &node, permissions, Permissions::ALL)?;
        let root = Rc::new(root.attach());
        let compat = &node.driver().describe()["format-specific"]["data"]["compat"];
        let discard_reads_zero = !has_backing || compat != "0.10";
        Ok(Disk {
            node,
            root,
            discard_reads_zero,
            stalls,
        })
    }

    pub(super) async fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        let buffer = Buffer::zeroed(length);
        self.root.read(offset, buffer.clone()).await?;
        Ok(buffer.to_heap().to_vec())
    }

    pub(super) async fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let buffer = Buffer::zeroed(bytes.len());
        buffer.copy_from_slice(bytes);
        self.root.write(offset, buffer, WriteFlags::default()).await
    }

    pub(super) async fn write_compressed(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let flags = WriteFlags {
            compressed: true,
            ..WriteFlags::default()
        };
        self.root.write(offset, bytes.into(), flags).await
    }

    pub(super) async fn read_all(&self) -> Result<Vec<u8>, Errno> {
        let mut disk = Vec::new();
        while (disk.len() as u64) < self.node.length() {
            let left = self.node.length() - disk.len() as u64;
            disk.extend(
                self.read(disk.len() as u64, left.min(65536) as usize)
                    .await?,
            );
        }
        Ok(disk)
    }

    pub(super) fn snapshots(&self) -> &dyn block::Snapshots {
        self.node.driver().snapshots().unwrap()
    }

    pub(super) async fn close(self) -> Result<(), Errno> {
        self.node.driver().close().await
    }
}
