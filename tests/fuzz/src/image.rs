//! A format's driver on any bytes, found in its crate's table by its name: open, a script of requests,
//! close.
//!
//! The image lies in a file in memory, the script before it (see [`crate::script`]). Whatever the bytes
//! say, every request ends, in an answer or an error.

use crate::memory_file::MemoryFile;
use crate::processor_time;
use crate::script::{Kind, Script, Step};
use crate::seeds::Seed;
use crate::vhdx;
use block::graph::{Graph, NamePolicy};
use block::{
    Buffer, DriverEntry, Node, Permissions, Resize, Root, RootHandle, WriteFlags, ZeroFlags,
};
use executor::{Config, Executor};
use serde_json::json;
use std::cell::{LazyCell, RefCell};

/// Longest transfer of a step in bytes.
const MAX_TRANSFER: u64 = 64 << 10;
/// Longest disk that an image is grown to, in bytes.
const MAX_DISK: u64 = 1 << 40;

/// What steps do; to a read-only image the later ones are refused.
const KINDS: &[Kind] = &[
    Kind::Read,
    Kind::Status,
    Kind::Write,
    Kind::Zero,
    Kind::ZeroUnmap,
    Kind::Discard,
    Kind::Flush,
    Kind::Resize,
];

/// The formats with a target, which is called as they are.
pub const FORMATS: &[&str] = &[
    "bochs",
    "cloop",
    "dmg",
    "parallels",
    "qcow",
    "qed",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
];

/// The name of the driver of the file in memory.
const MEMORY: &str = "memory";

thread_local! {
    static EXECUTOR: LazyCell<Executor> = LazyCell::new(|| {
        Executor::new(&Config::default()).expect("io_uring works on this machine")
    });
    /// The file that the next node of the memory driver is on.
    static IMAGE: RefCell<MemoryFile> = RefCell::default();
}

static MEMORY_DRIVERS: &[DriverEntry] = &[DriverEntry::new(MEMORY, |_| {
    let file = IMAGE.with_borrow(MemoryFile::clone);
    Box::pin(async move { Ok(Box::new(file) as Box<dyn block::Driver>) })
})];

/// Runs one input of the target of a format.
///
/// # Panics
/// When the driver breaks a promise: that is a finding.
pub fn run(format: &str, input: &[u8]) {
    let Some(script) = Script::of_kinds(KINDS, input) else {
        return;
    };
    IMAGE.set(match format {
        "vhdx" => vhdx::file(script.image),
        _ => MemoryFile::new(script.image),
    });
    processor_time::bounded(|| {
        EXECUTOR.with(|executor| executor.block_on(work(format, &script)));
    });
}

async fn work(format: &str, script: &Script<'_>) {
    let graph = Graph::new(&[formats::DRIVERS, MEMORY_DRIVERS], NamePolicy::default());
    let definition = json!({"driver": format, "node-name": "disk", "read-only": script.read_only,
        "file": {"driver": MEMORY}});
    let definition = definition.as_object().cloned().unwrap_or_default();
    let Ok(node) = graph.add(definition).await else {
        return;
    };
    let permissions = match script.read_only {
        true => Permissions::READ,
        false => Permissions {
            resize: true,
            ..Permissions::READ_WRITE
        },
    };
    let root = Root::new("fuzz", &node, permissions, Permissions::ALL);
    let root = root.expect("nobody else uses the node");
    let handle = root.attach();
    for step in &script.steps {
        request(&node, &handle, *step).await;
    }
    drop((handle, root, node));
    // Whatever the result, closing must end.
    let _ = graph.close_all().await;
}

/// Does one step; errors are answers, too.
async fn request(node: &Node, root: &RootHandle, step: Step) {
    let range = step.range(node.length());
    let buffer = Buffer::zeroed(range.length.min(MAX_TRANSFER) as usize);
    let _ = match step.kind {
        Kind::Read => root.read(range.offset, buffer).await,
        Kind::Status if range.length > 0 => node.block_status(range).await.map(|extent| {
            assert!(
                (1..=range.length).contains(&extent.length),
                "a status of {} bytes for {range:?}",
                extent.length
            );
        }),
        Kind::Write => {
            buffer.fill(step.fill);
            let flags = WriteFlags::default();
            root.write(range.offset, buffer, flags).await
        }
        Kind::Zero | Kind::ZeroUnmap => {
            let flags = ZeroFlags {
                may_unmap: step.kind == Kind::ZeroUnmap,
                no_fallback: range.length > MAX_TRANSFER,
                ..ZeroFlags::default()
            };
            root.write_zeroes(range, flags).await
        }
        Kind::Discard => root.discard(range).await,
        Kind::Flush => root.flush().await,
        Kind::Resize => {
            let resize = Resize::to((range.offset + range.length).min(MAX_DISK));
            let resized = node.resize(resize).await;
            resized.map_err(|_| block::Errno::EINVAL)
        }
        _ => Ok(()),
    };
}

/// A script that reads and asks everywhere, and begins with a read of the start.
fn script(read_only: bool) -> Vec<u8> {
    let mut bytes = vec![u8::from(read_only), 0];
    for (kind, length, fraction) in [
        (Kind::Read, 4096, 0.0),
        (Kind::Status, 1 << 20, 0.0),
        (Kind::Read, 20 << 10, 0.3),
        (Kind::Status, 1 << 20, 0.5),
        (Kind::Write, 3000, 0.4),
        (Kind::Read, 64, 0.999),
        (Kind::Read, 1 << 20, 0.7),
    ] {
        let step = Step::of_kinds(KINDS, (kind, 0x5b), length, fraction);
        bytes.extend(step.expect("the targets have these steps"));
        bytes[1] += 1;
    }
    bytes
}

/// Seeds of the target of a format; none for an unknown one.
pub fn seeds(format: &str) -> Vec<Seed> {
    let disk = samples::disk(48 << 10, 5);
    let images = match format {
        "bochs" => bochs(&disk),
        "cloop" => [512, 4096, 64 << 10]
            .map(|bytes| (format!("{bytes}"), samples::cloop::image(bytes, &disk)))
            .to_vec(),
        "dmg" => dmg(&disk),
        "parallels" => parallels(&disk),
        "qcow" => vec![("packed".to_owned(), samples::qcow::image(&disk))],
        "qed" => qed(&disk),
        "vdi" => {
            // The second block is not in the file.
            let disk = [&disk[..4096], &vec![0; (2 << 20) - 2048]].concat();
            let mut image = samples::vdi::image(&disk);
            // The rest of the block is zeroes, in the file or behind its end.
            image.truncate(8192);
            vec![("dynamic".to_owned(), image)]
        }
        "vhdx" => vhdx::seeds(&disk),
        "vmdk" => vmdk(&disk),
        "vpc" => [512, 4096, 64 << 10]
            .map(|bytes| (format!("{bytes}"), samples::vpc::image(bytes, &disk)))
            .to_vec(),
        _ => Vec::new(),
    };
    let with_script = |(name, image): (String, Vec<u8>)| {
        [true, false].map(|read_only| Seed {
            name: format!("{format}-{name}-{}", u8::from(read_only)),
            input: [script(read_only), image.clone()].concat(),
        })
    };
    images.into_iter().flat_map(with_script).collect()
}

fn vmdk(disk: &[u8]) -> Vec<(String, Vec<u8>)> {
    let line = "RW 96 FLAT \"flat.vmdk\" 0\nRW 8 SPARSE \"sparse.vmdk\"\n";
    let descriptor = samples::vmdk::descriptor("twoGbMaxExtentSparse", line);
    [
        ("stream", samples::vmdk::stream(disk)),
        ("sparse", samples::vmdk::sparse(disk)),
        ("cowd", samples::vmdk::cowd(disk, 8)),
        ("descriptor", descriptor.into_bytes()),
    ]
    .map(|(name, image)| (name.to_owned(), image))
    .to_vec()
}

fn parallels(disk: &[u8]) -> Vec<(String, Vec<u8>)> {
    use samples::parallels::{Form, Shape};
    let shapes = [(Form::Sectors, 7), (Form::Blocks, 8), (Form::Extended, 8)];
    let image = |(form, block_sectors)| {
        let shape = Shape {
            form,
            block_sectors,
        };
        let name = format!("{form:?}").to_lowercase();
        (name, samples::parallels::image(shape, disk))
    };
    shapes.map(image).to_vec()
}

fn bochs(disk: &[u8]) -> Vec<(String, Vec<u8>)> {
    let shapes = [(1, 512), (2, 4096), (2, 64 << 10)];
    let image = |(version, extent_bytes)| {
        let shape = samples::bochs::Shape {
            version,
            extent_bytes,
            spare: 2,
        };
        let image = samples::bochs::image(shape, disk);
        (format!("v{version}-{extent_bytes}"), image)
    };
    shapes.map(image).to_vec()
}

fn qed(disk: &[u8]) -> Vec<(String, Vec<u8>)> {
    let disk = &disk[..32 << 10];
    let features = [("clean", 0), ("dirty", samples::qed::NEED_CHECK)];
    let image =
        |(name, features): (&str, u64)| (name.to_owned(), samples::qed::image(disk, features));
    features.map(image).to_vec()
}

fn dmg(disk: &[u8]) -> Vec<(String, Vec<u8>)> {
    use samples::dmg::{Codec, Shape, Table};
    let codecs = [Codec::Raw, Codec::Zlib, Codec::Bzip2];
    let shapes = codecs.map(|codec| [(codec, Table::Xml), (codec, Table::Fork)]);
    let image = |(codec, table)| {
        let shape = Shape {
            codec,
            table,
            chunk_bytes: 8 << 10,
            chunks_per_table: 4,
            data_fork: 0,
        };
        let name = format!("{codec:?}-{table:?}").to_lowercase();
        (name, samples::dmg::image(shape, disk))
    };
    shapes.into_iter().flatten().map(image).collect()
}
