//! The corpus to start from: small images that use every feature, each with a script.

use crate::disk::{Disk, Files, check, edge, leaf};
use crate::memory_file::MemoryFile;
use crate::script::{Kind, Script, Step};
use crate::target::Target;
use block::open::ChildRole;
use block::{Preallocation, Repair, WriteFlags};
use executor::{Buffer, Config, Executor};
use formats::qcow2::{CreateOptions, create_with_data};

/// A seed's name and content.
pub struct Seed {
    /// File name.
    pub name: String,
    /// Input of the target.
    pub input: Vec<u8>,
}

/// Seeds of a target.
///
/// # Panics
/// When an image cannot be made.
pub fn of(target: Target) -> Vec<Seed> {
    let executor = Executor::new(&Config::default()).expect("io_uring works on this machine");
    let shapes = shapes(target);
    let images = shapes.into_iter().map(|(name, options)| {
        let image = executor.block_on(image(target, &options));
        (name, image)
    });
    images
        .flat_map(|(name, image)| {
            (0..4_u8).map(move |flags| Seed {
                name: format!("{name}-{flags}"),
                input: [&script(target, flags | 0x40)[..], &image].concat(),
            })
        })
        .collect()
}

fn shapes(target: Target) -> Vec<(String, CreateOptions)> {
    let mut shapes = Vec::new();
    let data_file = (target == Target::DataFile).then(|| "data.raw".to_owned());
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
                data_file: data_file.clone().filter(|_| version == 3),
                ..CreateOptions::new(48 * 512)
            };
            let name = format!("v{version}-c{cluster_size}-r{refcount_bits}-{preallocation:?}");
            shapes.push((name.to_lowercase(), options));
        }
    }
    let clusters_of_16k = |version_3: CreateOptions| CreateOptions {
        cluster_size: 16 << 10,
        data_file: data_file.clone(),
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

/// An image, empty but for what its target is about.
async fn image(target: Target, options: &CreateOptions) -> Vec<u8> {
    let file = MemoryFile::default();
    let node = leaf(file.clone(), "file");
    let image = edge(&node, "file", ChildRole::Image, false);
    let data_node = leaf(MemoryFile::default(), "data-file");
    let data = edge(&data_node, "data-file", ChildRole::Data, false);
    let data = options.data_file.is_some().then_some(data);
    create_with_data(image, data, options)
        .await
        .expect("the options are valid");
    // The part of a cluster that was never written belongs to the image all the same.
    let length = file.to_vec().len().next_multiple_of(512);
    let end = Buffer::zeroed(0);
    node.write(length as u64, end, WriteFlags::default())
        .await
        .expect("nothing is written");
    drop(node);
    let bytes = file.to_vec();
    match target {
        Target::Encrypted => encrypted(bytes, options).await,
        // Something to find: tables of every kind.
        Target::Check => {
            let content = used(Target::Snapshots, bytes).await;
            used(Target::Bitmaps, content).await
        }
        Target::Bitmaps => used(target, bytes).await,
        Target::Requests | Target::Snapshots | Target::DataFile => bytes,
    }
}

/// What an image becomes by the target's script.
async fn used(target: Target, image: Vec<u8>) -> Vec<u8> {
    let steps = [script(target, 0x40), image].concat();
    let script = Script::parse(target, &steps).expect("a script and an image");
    let files = Files::new(target, script.image);
    let mut disk = Disk::open(&files, &script).await.expect("a sound image");
    for step in &script.steps {
        disk = disk.step(*step).await.expect("a sound image");
    }
    let (closed, _) = disk.close().await;
    closed.expect("nothing fails");
    files.image_bytes()
}

/// The image with a method of encryption: AES in images of version 2 and with clusters of 1 KiB,
/// else LUKS, whose header and keys the target does without.
async fn encrypted(mut image: Vec<u8>, options: &CreateOptions) -> Vec<u8> {
    const METHOD: usize = 35;
    const HEADER_LENGTH: usize = 100;
    const LUKS_EXTENSION: u32 = 0x0537_be77;
    if options.version == 2 || options.cluster_size == 1024 {
        image[METHOD] = 1;
        return image;
    }
    image[METHOD] = 2;
    let cluster = options.cluster_size;
    let place = (image.len() as u64).next_multiple_of(cluster);
    let word = |at: usize| {
        let bytes = image[at..at + 4].try_into().expect("four bytes");
        u32::from_be_bytes(bytes) as usize
    };
    let mut at = word(HEADER_LENGTH);
    while word(at) != 0 {
        at += 8 + word(at + 4).next_multiple_of(8);
    }
    let mut extension = LUKS_EXTENSION.to_be_bytes().to_vec();
    extension.extend(16_u32.to_be_bytes());
    extension.extend(place.to_be_bytes());
    extension.extend(cluster.to_be_bytes());
    image[at..at + extension.len()].copy_from_slice(&extension);
    image.resize((place + cluster) as usize, 0);
    let files = Files::new(Target::Check, &image);
    let checked = check(&files, Repair::All, &mut Vec::new()).await;
    checked.expect("a cluster that is not counted can be repaired");
    files.image_bytes()
}

/// Steps of each kind that the target has.
fn script(target: Target, flags: u8) -> Vec<u8> {
    let steps = [
        (Kind::AddBitmap, 0x03, 0, 0.0),
        (Kind::Write, 0x11, 1024, 0.0),
        (Kind::Write, 0x22, 4096, 0.3),
        (Kind::Read, 0, 8192, 0.1),
        (Kind::Flush, 0, 0, 0.0),
        (Kind::Zero, 0, 2048, 0.25),
        (Kind::Reopen, 0, 0, 0.0),
        (Kind::ZeroUnmap, 0, 2048, 0.5),
        (Kind::Discard, 0, 1024, 0.0),
        (Kind::Status, 0, 65536, 0.0),
        (Kind::Resize, 0, 8192, 0.9),
        (Kind::Write, 0x33, 640, 0.95),
        (Kind::Kill, 0, 0, 0.0),
        (Kind::Snapshot, 0, 0, 0.0),
        (Kind::Compress, 0x44, 4096, 0.0),
        (Kind::Write, 0x55, 4096, 0.3),
        (Kind::View, 0, 0, 0.0),
        (Kind::Apply, 0, 0, 0.0),
        (Kind::AddBitmap, 0x84, 0, 0.0),
        (Kind::RemoveBitmap, 0, 0, 0.0),
        (Kind::AddBitmap, 0x01, 0, 0.0),
        (Kind::Snapshot, 1, 0, 0.0),
        (Kind::Delete, 0, 0, 0.0),
        (Kind::Read, 0, 65536, 0.0),
    ];
    let encoded = steps.map(|(kind, fill, length_bytes, fraction)| {
        Step::encode(target, (kind, fill), length_bytes, fraction)
    });
    let steps: Vec<_> = encoded.into_iter().flatten().collect();
    let mut script = vec![flags, steps.len() as u8];
    script.extend(steps.as_flattened());
    script
}
