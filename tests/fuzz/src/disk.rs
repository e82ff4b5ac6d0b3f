//! An image in memory that is worked on: its files, the open disk, and what a step does to it.

use crate::memory_file::MemoryFile;
use crate::model::Model;
use crate::script::{Kind, Script, Step};
use crate::target::Target;
use block::bitmap::ops::{self, NewBitmap};
use block::edge::EdgeSpec;
use block::node::Discard;
use block::open::ChildRole;
use block::snapshot::NewSnapshot;
use block::{
    Buffer, ByteRange, CheckOptions, CheckResult, CheckSink, Driver, Edge, Errno, FormatNode, Node,
    NodeOptions, Permissions, RedoLog, Repair, Resize, Root, RootHandle, Tweak, WriteFlags,
    ZeroFlags,
};
use formats::luks::{self, Algorithm, IvKind, Mode};
use formats::qcow2::{self, CacheOptions, Crypto, OpenOptions, Qcow2};
use std::cell::{Cell, RefCell};
use std::sync::Arc;

/// Longest transfer of a step in bytes.
const MAX_TRANSFER: u64 = 32 << 10;
/// What all steps together may cost, in bytes that are moved.
const MAX_WORK: u64 = 1 << 20;
/// How much of a disk is read after it was opened again, in bytes.
const MAX_READ_BACK: u64 = 64 << 10;
/// Memory for a check in bytes.
const CHECK_MEMORY: u64 = 16 << 20;
/// Records in the redo log.
const LOG_RECORDS: usize = 512;
/// Where the header says how data is encrypted (its last byte).
const CRYPT_METHOD: usize = 35;

thread_local! {
    /// A log for the next image: making one costs more than most inputs.
    static LOG: Cell<Option<RedoLog>> = const { Cell::new(None) };
}

/// An empty log.
fn empty_log() -> RedoLog {
    let used = LOG.take().filter(RedoLog::is_empty);
    used.unwrap_or_else(|| RedoLog::in_memory(LOG_RECORDS))
}

/// The files of an image.
pub(crate) struct Files {
    image: MemoryFile,
    data: Option<MemoryFile>,
    crypto: Option<Arc<Crypto>>,
}

impl Files {
    pub(crate) fn new(target: Target, image: &[u8]) -> Self {
        Self {
            image: MemoryFile::new(image),
            data: (target == Target::DataFile).then(MemoryFile::default),
            crypto: match target {
                Target::Encrypted => crypto(image),
                _ => None,
            },
        }
    }

    /// The image's bytes; only for images known to be small.
    pub(crate) fn image_bytes(&self) -> Vec<u8> {
        self.image.to_vec()
    }

    /// The files as they are now.
    pub(crate) fn snapshot(&self) -> Self {
        Self {
            image: self.image.duplicate(),
            data: self.data.as_ref().map(MemoryFile::duplicate),
            crypto: self.crypto.clone(),
        }
    }
}

/// A key that fits the image's method, without the work of deriving it.
fn crypto(image: &[u8]) -> Option<Arc<Crypto>> {
    thread_local! {
        static KNOWN: [Arc<Crypto>; 2] = {
            let spec = luks::Spec {
                algorithm: Algorithm::Aes128,
                mode: Mode::Xts,
                iv: IvKind::Plain64,
            };
            let keyed = spec.keyed(&[0x5a; 32], Tweak::HostOffset);
            let xts = keyed.expect("two keys of AES-128");
            [luks::legacy_aes(b"password"), xts].map(|cipher| Arc::new(Crypto::of(cipher)))
        };
    }
    let method = image.get(CRYPT_METHOD).copied().map(usize::from)?;
    KNOWN.with(|known| known.get(method.checked_sub(1)?).cloned())
}

/// The result of a check; `None` when it ended early.
pub(crate) async fn check(
    files: &Files,
    repair: Repair,
    sink: &mut dyn CheckSink,
) -> Option<CheckResult> {
    let node = leaf(files.image.clone(), "file");
    let file = edge(&node, "file", ChildRole::Image, false);
    let options = CheckOptions {
        memory: CHECK_MEMORY,
        ..CheckOptions::repairing(repair)
    };
    qcow2::check(&file, options, sink).await.ok()
}

/// How a disk's life ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Close,
    Kill,
}

/// An open image and a root on it.
pub(crate) struct Disk<'s> {
    node: Arc<Node>,
    root: RootHandle,
    files: &'s Files,
    script: &'s Script<'s>,
    log: RedoLog,
    work: Cell<u64>,
    pub(crate) model: RefCell<Model>,
}

impl<'s> Disk<'s> {
    /// `None` when the image is refused.
    pub(crate) async fn open(files: &'s Files, script: &'s Script<'s>) -> Option<Self> {
        Self::open_with(files, script, empty_log()).await
    }

    async fn open_with(files: &'s Files, script: &'s Script<'s>, log: RedoLog) -> Option<Self> {
        let file = leaf(files.image.clone(), "file");
        let file = edge(&file, "file", ChildRole::Image, script.read_only);
        let backing = script.has_backing.then(|| {
            let backing = leaf(MemoryFile::new(&[0x5a; 8192]), "backing");
            edge(&backing, "backing", ChildRole::Backing, true)
        });
        let data_file = files.data.as_ref().map(|data| {
            let data = leaf(data.clone(), "data-file");
            edge(&data, "data-file", ChildRole::Data, script.read_only)
        });
        let options = OpenOptions {
            read_only: script.read_only,
            caches: CacheOptions {
                l2: Some(script.cache_bytes),
                refcounts: Some(script.cache_bytes),
                ..CacheOptions::default()
            },
            log: log.share(),
            data_file,
            crypto: files.crypto.clone(),
            ..OpenOptions::default()
        };
        let opened = Qcow2::open(file, backing, options).await;
        let Ok(image) = opened else {
            LOG.set(Some(log));
            return None;
        };
        let options = NodeOptions {
            node_name: "disk".to_owned(),
            read_only: script.read_only,
            discard: Discard::Unmap,
            ..NodeOptions::default()
        };
        let node = Node::new(options, Box::new(FormatNode::new(image)));
        let permissions = match script.read_only {
            true => Permissions {
                consistent_read: true,
                ..Permissions::NONE
            },
            false => Permissions {
                resize: true,
                ..Permissions::READ_WRITE
            },
        };
        let root = Root::new("fuzz", &node, permissions, Permissions::ALL)
            .expect("nobody else uses the node");
        let root = root.attach();
        Some(Self {
            node,
            root,
            files,
            script,
            log,
            work: Cell::new(0),
            model: RefCell::default(),
        })
    }

    /// Closes the image; the result, and what it should show.
    pub(crate) async fn close(self) -> (Result<(), Errno>, Model) {
        let closed = self.node.driver().close().await;
        LOG.set(Some(self.log));
        (closed, self.model.take())
    }

    /// The next life of the disk, after the end of this one.
    async fn again(self, end: End) -> Option<Self> {
        let (files, script, log) = (self.files, self.script, self.log.share());
        if end == End::Close && self.node.driver().close().await.is_err() {
            return None;
        }
        let (model, work) = (self.model.take(), self.work.get());
        drop(self);
        let next = Self::open_with(files, script, log).await?;
        next.model.replace(model);
        next.work.set(work);
        Some(next)
    }

    /// Takes note of work; whether there was not too much of it yet.
    fn affords(&self, bytes: u64) -> bool {
        let cluster = u64::from(self.node.driver().limits().optimal_transfer);
        self.work
            .update(|work| work.saturating_add(bytes + cluster + 4096));
        self.work.get() <= MAX_WORK
    }

    /// Does one step, unless there was too much work already; errors are answers, too. `None` when
    /// the image could not be opened again.
    pub(crate) async fn step(self, step: Step) -> Option<Self> {
        let range = step.range(self.node.length());
        if !self.affords(range.length.min(MAX_TRANSFER)) {
            return Some(self);
        }
        match step.kind {
            Kind::Reopen => self.again(End::Close).await,
            Kind::Kill => self.again(End::Kill).await,
            _ => {
                self.request(step).await;
                Some(self)
            }
        }
    }

    async fn request(&self, step: Step) {
        let range = step.range(self.node.length());
        let transfer = ByteRange::new(range.offset, range.length.min(MAX_TRANSFER));
        let plain = WriteFlags::default();
        let compressed = WriteFlags {
            compressed: true,
            ..plain
        };
        match step.kind {
            Kind::Read => drop(self.read(transfer).await),
            Kind::Write => self.write(transfer, step.fill, plain).await,
            Kind::Compress => {
                let whole = self.whole_clusters(transfer);
                self.write(whole, step.fill, compressed).await;
            }
            Kind::Zero | Kind::ZeroUnmap => {
                let flags = ZeroFlags {
                    may_unmap: step.kind == Kind::ZeroUnmap,
                    no_fallback: range.length > MAX_TRANSFER,
                    ..ZeroFlags::default()
                };
                let zeroed = self.root.write_zeroes(range, flags).await;
                self.model
                    .borrow_mut()
                    .change(range, zeroed.ok().map(|()| 0));
            }
            Kind::Discard => {
                self.model.borrow_mut().change(range, None);
                let _ = self.root.discard(range).await;
            }
            Kind::Flush => drop(self.root.flush().await),
            Kind::Status => drop(self.status(range).await),
            Kind::Resize => {
                let end = range.offset + range.length;
                self.resize(end.next_multiple_of(512)).await;
            }
            Kind::Snapshot | Kind::Apply | Kind::Delete | Kind::View => self.snapshots(step).await,
            Kind::AddBitmap | Kind::RemoveBitmap | Kind::ClearBitmap => self.bitmaps(step).await,
            Kind::Reopen | Kind::Kill => {}
        }
    }

    /// The clusters that a range touches.
    fn whole_clusters(&self, range: ByteRange) -> ByteRange {
        let grain = u64::from(self.node.driver().limits().zero_alignment).max(1);
        let start = range.offset / grain * grain;
        let end = (range.offset + range.length).next_multiple_of(grain);
        ByteRange::new(start, end.min(self.node.length()) - start)
    }

    async fn snapshots(&self, step: Step) {
        let Some(snapshots) = self.node.driver().snapshots() else {
            return;
        };
        if self.node.options().read_only && step.kind != Kind::View {
            return;
        }
        if step.kind == Kind::Snapshot {
            let _ = snapshots.create(NewSnapshot::default()).await;
            return;
        }
        let list = snapshots.list();
        let Some(info) = list.get(usize::from(step.fill) % list.len().max(1)) else {
            return;
        };
        match step.kind {
            Kind::Apply => {
                self.model.borrow_mut().forget();
                let _ = self.node.apply_snapshot(&info.id).await;
            }
            Kind::Delete => drop(snapshots.delete(&info.id).await),
            _ => {
                let Ok(view) = snapshots.open(&info.id).await else {
                    return;
                };
                let length = view.length().min(MAX_TRANSFER);
                let _ = view.read(0, Buffer::zeroed(length as usize)).await;
            }
        }
    }

    async fn bitmaps(&self, step: Step) {
        if self.node.options().read_only {
            return;
        }
        let list = self.node.bitmaps().list();
        let chosen = list.get(usize::from(step.fill) % list.len().max(1));
        match (step.kind, chosen) {
            (Kind::AddBitmap, _) => {
                let new = NewBitmap {
                    name: format!("b{}", step.fill),
                    granularity: Some(512 << (step.fill % 8)),
                    persistent: true,
                    disabled: step.fill & 0x80 != 0,
                };
                drop(ops::add(&self.node, new));
            }
            (Kind::RemoveBitmap, Some(bitmap)) => {
                drop(ops::remove(&self.node, bitmap.name()).await);
            }
            (_, Some(bitmap)) => drop(ops::clear(&self.node, bitmap.name())),
            (_, None) => {}
        }
    }

    /// What was written last is what is read.
    pub(crate) async fn compare_with_model(&self) -> Result<(), String> {
        let model = self.model.borrow().clone();
        for range in model.ranges() {
            let end = (range.offset + range.length).min(self.node.length());
            let Some(length) = end.checked_sub(range.offset) else {
                continue;
            };
            let range = ByteRange::new(range.offset, length.min(MAX_TRANSFER));
            let Ok(buffer) = self.read(range).await else {
                continue;
            };
            model.compare(range.offset, &buffer.to_heap())?;
        }
        Ok(())
    }

    async fn read(&self, range: ByteRange) -> Result<Buffer, Errno> {
        let buffer = Buffer::zeroed(range.length as usize);
        self.root.read(range.offset, buffer.clone()).await?;
        Ok(buffer)
    }

    async fn write(&self, range: ByteRange, fill: u8, flags: WriteFlags) {
        let buffer = Buffer::zeroed(range.length as usize);
        buffer.fill(fill);
        let written = self.root.write(range.offset, buffer, flags).await;
        let known = written.ok().map(|()| fill);
        self.model.borrow_mut().change(range, known);
    }

    async fn status(&self, range: ByteRange) -> Result<(), Errno> {
        if range.length == 0 {
            return Ok(());
        }
        let extent = self.node.block_status(range).await?;
        assert!(
            (1..=range.length).contains(&extent.length),
            "a status of {} bytes for {range:?}",
            extent.length
        );
        Ok(())
    }

    async fn resize(&self, length: u64) {
        if self.node.options().read_only {
            return;
        }
        let resize = Resize::to(length);
        self.model.borrow_mut().cut(length);
        if self.node.resize(resize).await.is_ok() {
            assert_eq!(self.node.length(), length, "resized to another length");
        }
    }

    /// Reads the start of the disk.
    pub(crate) async fn read_back(&self) {
        let end = self.node.length().min(MAX_READ_BACK);
        for offset in (0..end).step_by(MAX_TRANSFER as usize) {
            let length = MAX_TRANSFER.min(end - offset);
            let _ = self.read(ByteRange::new(offset, length)).await;
        }
    }
}

/// A file in memory as a node.
pub(crate) fn leaf(file: MemoryFile, name: &str) -> Arc<Node> {
    let options = NodeOptions {
        node_name: name.to_owned(),
        discard: Discard::Unmap,
        ..NodeOptions::default()
    };
    Node::new(options, Box::new(file) as Box<dyn Driver>)
}

/// An edge to `child`.
pub(crate) fn edge(
    child: &Arc<Node>,
    name: &'static str,
    role: ChildRole,
    read_only: bool,
) -> Edge {
    let spec = EdgeSpec {
        parent: "fuzz".to_owned(),
        name,
        role,
        read_only,
    };
    Edge::attach(child, spec).expect("nobody else uses the file")
}
