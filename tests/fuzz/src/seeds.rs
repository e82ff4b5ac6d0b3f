//! The corpus to start from: small images that use every feature, each with a script.

use crate::memory_file::MemoryFile;
use crate::qcow2::{edge, leaf};
use crate::script::{Kind, Step};
use block::open::ChildRole;
use block::{Preallocation, WriteFlags};
use executor::{Buffer, Config, Executor};
use formats::qcow2::{CreateOptions, create};

/// A seed's name and content.
pub struct Seed {
    /// File name.
    pub name: String,
    /// Input of the target.
    pub input: Vec<u8>,
}

/// Seeds of the qcow2 target.
///
/// # Panics
/// When an image cannot be made.
pub fn qcow2() -> Vec<Seed> {
    let executor = Executor::new(&Config::default()).expect("io_uring works on this machine");
    let shapes = shapes();
    let images = shapes.into_iter().map(|(name, options)| {
        let image = executor.block_on(image(&options));
        (name, image)
    });
    images
        .flat_map(|(name, image)| {
            (0..4_u8).map(move |flags| Seed {
                name: format!("{name}-{flags}"),
                input: [&script(flags | 0x40)[..], &image].concat(),
            })
        })
        .collect()
}

fn shapes() -> Vec<(String, CreateOptions)> {
    let mut shapes = Vec::new();
    for (cluster_size, refcount_bits, version) in [
        (512, 16, 3),
        (512, 1, 3),
        (512, 64, 3),
        (1024, 8, 3),
        (1024, 16, 2),
        (4096, 16, 3),
        (65536, 16, 3),
    ] {
        for preallocation in [Preallocation::Off, Preallocation::Metadata] {
            let options = CreateOptions {
                cluster_size,
                refcount_bits,
                version,
                preallocation,
                ..CreateOptions::new(48 * 512)
            };
            let name = format!("v{version}-c{cluster_size}-r{refcount_bits}-{preallocation:?}");
            shapes.push((name.to_lowercase(), options));
        }
    }
    let clusters_of_16k = |version_3: CreateOptions| CreateOptions {
        cluster_size: 16 << 10,
        ..version_3
    };
    let disk = || CreateOptions::new(3 * (16 << 10) - 512);
    let extended_l2 = CreateOptions {
        extended_l2: true,
        ..clusters_of_16k(disk())
    };
    let zstd = CreateOptions {
        compression_type: 1,
        ..clusters_of_16k(disk())
    };
    shapes.push(("extended-l2".to_owned(), extended_l2));
    shapes.push(("zstd".to_owned(), zstd));
    shapes
}

/// An empty image.
async fn image(options: &CreateOptions) -> Vec<u8> {
    let file = MemoryFile::default();
    let node = leaf(file.clone(), "file");
    create(edge(&node, "file", ChildRole::Image, false), options)
        .await
        .expect("the options are valid");
    // The part of a cluster that was never written belongs to the image all the same.
    let length = file.to_vec().len().next_multiple_of(512);
    let end = Buffer::zeroed(0);
    node.write(length as u64, end, WriteFlags::default())
        .await
        .expect("nothing is written");
    file.to_vec()
}

/// One step of each kind.
fn script(flags: u8) -> Vec<u8> {
    let steps = [
        Step::encode(Kind::Write, 0x11, 1024, 0.0),
        Step::encode(Kind::Write, 0x22, 4096, 0.3),
        Step::encode(Kind::Read, 0, 8192, 0.1),
        Step::encode(Kind::Flush, 0, 0, 0.0),
        Step::encode(Kind::Zero, 0, 2048, 0.25),
        Step::encode(Kind::ZeroUnmap, 0, 2048, 0.5),
        Step::encode(Kind::Discard, 0, 1024, 0.0),
        Step::encode(Kind::Status, 0, 65536, 0.0),
        Step::encode(Kind::Resize, 0, 8192, 0.9),
        Step::encode(Kind::Write, 0x33, 640, 0.95),
        Step::encode(Kind::Snapshot, 0, 0, 0.0),
        Step::encode(Kind::Compress, 0x44, 4096, 0.0),
        Step::encode(Kind::Write, 0x55, 4096, 0.3),
        Step::encode(Kind::View, 0, 0, 0.0),
        Step::encode(Kind::Apply, 0, 0, 0.0),
        Step::encode(Kind::Snapshot, 1, 0, 0.0),
        Step::encode(Kind::Delete, 0, 0, 0.0),
        Step::encode(Kind::Read, 0, 65536, 0.0),
    ];
    let mut script = vec![flags, steps.len() as u8];
    script.extend(steps.as_flattened());
    script
}
