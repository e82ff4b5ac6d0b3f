//! The qcow2 driver on any bytes: open, requests, close, open again.

use crate::memory_file::MemoryFile;
use crate::script::{Kind, Script, Step};
use block::edge::EdgeSpec;
use block::node::Discard;
use block::open::ChildRole;
use block::{
    Buffer, ByteRange, Driver, Edge, Errno, FormatNode, Node, NodeOptions, Permissions,
    Preallocation, RedoLog, Resize, Root, RootHandle, WriteFlags, ZeroFlags,
};
use executor::{Config, Executor};
use formats::qcow2::{CacheOptions, OpenOptions, Qcow2};
use std::cell::LazyCell;
use std::sync::Arc;

/// Longest transfer of a step in bytes.
const MAX_TRANSFER: u64 = 256 << 10;
/// How much of a disk is read after it was opened again, in bytes.
const MAX_READ_BACK: u64 = 1 << 20;
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
    let Some(disk) = Disk::open(&file, script).await else {
        return;
    };
    for step in &script.steps {
        disk.step(*step).await;
    }
    let closed = disk.node.driver().close().await;
    drop(disk);
    if closed.is_err() {
        return;
    }
    if let Some(disk) = Disk::open(&file, script).await {
        disk.read_back().await;
        // Whatever the result, closing must end.
        let _ = disk.node.driver().close().await;
    }
}

/// An open image and a root on it.
struct Disk {
    node: Arc<Node>,
    root: RootHandle,
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
        Some(Self { node, root })
    }

    /// Does one step; errors are answers, too.
    async fn step(&self, step: Step) {
        let mut range = step.range(self.node.length());
        let transfer = ByteRange::new(range.offset, range.length.min(MAX_TRANSFER));
        let zero = |may_unmap| ZeroFlags {
            may_unmap,
            no_fallback: range.length > MAX_TRANSFER,
            ..ZeroFlags::default()
        };
        let _: Result<(), Errno> = match step.kind {
            Kind::Read => self.read(transfer).await.map(drop),
            Kind::Write => self.write(transfer, step.fill).await,
            Kind::Zero => self.root.write_zeroes(range, zero(false)).await,
            Kind::ZeroUnmap => self.root.write_zeroes(range, zero(true)).await,
            Kind::Discard => self.root.discard(range).await,
            Kind::Flush => self.root.flush().await,
            Kind::Status => self.status(range).await,
            Kind::Resize => {
                range.length = range.length.next_multiple_of(512);
                self.resize(range.offset / 512 * 512 + range.length).await;
                Ok(())
            }
        };
    }

    async fn read(&self, range: ByteRange) -> Result<Buffer, Errno> {
        let buffer = Buffer::zeroed(range.length as usize);
        self.root.read(range.offset, buffer.clone()).await?;
        Ok(buffer)
    }

    async fn write(&self, range: ByteRange, fill: u8) -> Result<(), Errno> {
        let buffer = Buffer::zeroed(range.length as usize);
        buffer.fill(fill);
        let flags = WriteFlags::default();
        self.root.write(range.offset, buffer, flags).await
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
