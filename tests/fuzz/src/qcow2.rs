//! The qcow2 driver on any bytes: check, open, requests, close, check, open again.
//!
//! An image that was sound stays sound, whatever is done with it, and shows what was written last.
//! One that was not is worked on as it is, and once more after a repair that made it sound.

use crate::memory_file::MemoryFile;
use crate::model::Model;
use crate::script::{Kind, Script, Step};
use block::check::Silent;
use block::edge::EdgeSpec;
use block::node::Discard;
use block::open::ChildRole;
use block::snapshot::NewSnapshot;
use block::{
    Buffer, ByteRange, CheckOptions, CheckResult, CheckSink, Driver, Edge, Errno, FormatNode, Node,
    NodeOptions, Permissions, Preallocation, RedoLog, Repair, Resize, Root, RootHandle, WriteFlags,
    ZeroFlags,
};
use executor::{Config, Executor};
use formats::qcow2::{self, CacheOptions, OpenOptions, Qcow2};
use std::cell::{LazyCell, RefCell};
use std::sync::Arc;

/// Longest transfer of a step in bytes.
const MAX_TRANSFER: u64 = 256 << 10;
/// How much of a disk is read after it was opened again, in bytes.
const MAX_READ_BACK: u64 = 1 << 20;
/// Memory for a check in bytes.
const CHECK_MEMORY: u64 = 16 << 20;
/// What a check says of a mapping that does not know that it is the only one.
const ONLY_REFERENCE: &str = "OFLAG_COPIED";
/// Records in the redo log.
const LOG_RECORDS: usize = 512;

thread_local! {
    static EXECUTOR: LazyCell<Executor> = LazyCell::new(|| {
        Executor::new(&Config::default()).expect("io_uring works on this machine")
    });
}

/// Runs one input.
///
/// # Panics
/// When the driver breaks a promise: that is a finding.
pub fn run(input: &[u8]) {
    let Some(script) = Script::parse(input) else {
        return;
    };
    EXECUTOR.with(|executor| executor.block_on(run_script(&script)));
}

async fn run_script(script: &Script<'_>) {
    let file = MemoryFile::new(script.image);
    let was_sound = check(&file, Repair::None).await.is_some_and(is_sound);
    work(&file, script, was_sound).await;
    if was_sound || script.read_only {
        return;
    }
    let file = MemoryFile::new(script.image);
    let repaired = check(&file, Repair::All).await;
    if repaired.is_some() && check(&file, Repair::None).await.is_some_and(is_sound) {
        work(&file, script, true).await;
    }
}

/// Opens the image, does the steps, closes it and opens it again.
async fn work(file: &MemoryFile, script: &Script<'_>, was_sound: bool) {
    let Some(disk) = Disk::open(file, script).await else {
        return;
    };
    for step in &script.steps {
        disk.step(*step).await;
    }
    if was_sound {
        disk.compare_with_model().await;
    }
    let model = disk.model.take();
    let closed = disk.node.driver().close().await;
    drop(disk);
    if closed.is_err() {
        return;
    }
    if was_sound {
        let mut findings: Vec<String> = Vec::new();
        let result = check_telling(file, Repair::None, &mut findings).await;
        // When the input maps a cluster twice (counted twice, so sound), and one mapping goes, the
        // other one stays without the flag that says that it is the only one.
        findings.retain(|finding| !finding.contains(ONLY_REFERENCE));
        findings.retain(|finding| finding.starts_with("ERROR"));
        let stayed_sound = result.is_some() && findings.is_empty();
        assert!(
            stayed_sound,
            "a sound image became {result:?}: {findings:#?}"
        );
    }
    if let Some(disk) = Disk::open(file, script).await {
        if was_sound {
            disk.model.replace(model);
            disk.compare_with_model().await;
        }
        disk.read_back().await;
        // Whatever the result, closing must end.
        let _ = disk.node.driver().close().await;
    }
}

/// The result of a check; `None` when it ended early.
async fn check(file: &MemoryFile, repair: Repair) -> Option<CheckResult> {
    check_telling(file, repair, &mut Silent).await
}

async fn check_telling(
    file: &MemoryFile,
    repair: Repair,
    sink: &mut dyn CheckSink,
) -> Option<CheckResult> {
    let node = leaf(file.clone(), "file");
    let file = edge(&node, "file", ChildRole::Image, false);
    let options = CheckOptions {
        memory: CHECK_MEMORY,
        ..CheckOptions::repairing(repair)
    };
    qcow2::check(&file, options, sink).await.ok()
}

fn is_sound(result: CheckResult) -> bool {
    result.corruptions == 0 && result.check_errors == 0
}

/// An open image and a root on it.
struct Disk {
    node: Arc<Node>,
    root: RootHandle,
    model: RefCell<Model>,
}

impl Disk {
    /// `None` when the image is refused.
    async fn open(file: &MemoryFile, script: &Script<'_>) -> Option<Self> {
        let file = leaf(file.clone(), "file");
        let file = edge(&file, "file", ChildRole::Image, script.read_only);
        let backing = script.has_backing.then(|| {
            let backing = leaf(MemoryFile::new(&[0x5a; 8192]), "backing");
            edge(&backing, "backing", ChildRole::Backing, true)
        });
        let options = OpenOptions {
            read_only: script.read_only,
            caches: CacheOptions {
                l2: Some(script.cache_bytes),
                refcounts: Some(script.cache_bytes),
                ..CacheOptions::default()
            },
            log: RedoLog::in_memory(LOG_RECORDS),
            ..OpenOptions::default()
        };
        let image = Qcow2::open(file, backing, options).await.ok()?;
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
            model: RefCell::default(),
        })
    }

    /// Does one step; errors are answers, too.
    async fn step(&self, step: Step) {
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

    /// What was written last is what is read.
    async fn compare_with_model(&self) {
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
            model.compare(range.offset, &buffer.to_heap());
        }
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
        let resize = Resize {
            length,
            preallocation: Preallocation::Off,
        };
        self.model.borrow_mut().cut(length);
        if self.node.resize(resize).await.is_ok() {
            assert_eq!(self.node.length(), length, "resized to another length");
        }
    }

    async fn read_back(&self) {
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
