//! Images with something of everything, and random damage to their metadata.

use rand::Rng;
use rand::rngs::SmallRng;
use std::path::Path;
use std::process::Command;

/// How an image is made: options of `qemu-img create`, and what it holds.
pub(super) struct Shape {
    pub(super) options: &'static str,
    pub(super) size: &'static str,
    pub(super) snapshots: bool,
    pub(super) compressed: bool,
    pub(super) bitmaps: bool,
}

const PLAIN: Shape = Shape {
    options: "",
    size: "6M",
    snapshots: true,
    compressed: true,
    bitmaps: false,
};

pub(super) const SHAPES: &[Shape] = &[
    Shape {
        options: "cluster_size=4096,compat=1.1",
        ..PLAIN
    },
    Shape {
        options: "cluster_size=512,compat=0.10",
        size: "1M",
        ..PLAIN
    },
    Shape {
        options: "cluster_size=1024,refcount_bits=1",
        size: "2M",
        snapshots: false,
        ..PLAIN
    },
    Shape {
        options: "cluster_size=2048,refcount_bits=64",
        ..PLAIN
    },
    Shape {
        options: "cluster_size=16384,extended_l2=on,refcount_bits=8",
        ..PLAIN
    },
    Shape {
        options: "cluster_size=4096,refcount_bits=4,lazy_refcounts=on",
        ..PLAIN
    },
    Shape {
        options: "cluster_size=4096,data_file=data.raw",
        snapshots: false,
        compressed: false,
        ..PLAIN
    },
    Shape {
        // Without snapshots: opened for a repair, QEMU 7.2 forgets them when there are bitmaps.
        options: "cluster_size=8192",
        snapshots: false,
        bitmaps: true,
        ..PLAIN
    },
    Shape {
        options: "cluster_size=65536",
        size: "64M",
        ..PLAIN
    },
];

pub(super) fn run(directory: &Path, program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .current_dir(directory)
        .args(arguments)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
}

/// Makes an image with QEMU's tools.
pub(super) fn make(directory: &Path, name: &str, shape: &Shape) {
    let mut create = vec!["create", "-q", "-f", "qcow2"];
    if !shape.options.is_empty() {
        create.extend(["-o", shape.options]);
    }
    create.extend([name, shape.size]);
    run(directory, "qemu-img", &create);
    let io = |commands: &[&str]| {
        let mut arguments = vec!["-f", "qcow2"];
        for command in commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(name);
        run(directory, "qemu-io", &arguments);
    };
    io(&[
        "write -P 1 0 200k",
        "write -P 2 500k 64k",
        "write -z 256k 32k",
        "write -z 8k 8k",
    ]);
    if shape.snapshots {
        run(directory, "qemu-img", &["snapshot", "-c", "first", name]);
        io(&["write -P 3 100k 60k", "discard 560k 16k"]);
        run(directory, "qemu-img", &["snapshot", "-c", "second", name]);
    }
    if shape.compressed {
        io(&["write -c -P 4 640k 64k", "write -c -P 5 768k 64k"]);
    }
    io(&["write -P 6 900k 40k"]);
    if shape.bitmaps {
        for bitmap in ["one", "two"] {
            run(directory, "qemu-img", &["bitmap", "--add", name, bitmap]);
        }
    }
}

pub(super) fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn cluster_size(bytes: &[u8]) -> usize {
    1 << bytes[23]
}

/// Where metadata is in an image: the starts of clusters that hold tables.
pub(super) fn metadata(bytes: &[u8]) -> Vec<usize> {
    let cluster = cluster_size(bytes);
    // The L1 table, the refcount table, the snapshot table.
    let [l1, refcounts, snapshots] = [40, 48, 64].map(|at| word(bytes, at) as usize);
    let mut places = vec![l1, refcounts, snapshots];
    let l1_length = (word(bytes, 36) >> 32) as usize * 8;
    for (start, length) in [(l1, l1_length), (refcounts, cluster)] {
        for at in (start..start + length).step_by(8) {
            let offset = (word(bytes, at) & 0x00ff_ffff_ffff_fe00) as usize;
            if offset != 0 && offset + cluster <= bytes.len() {
                places.push(offset);
            }
        }
    }
    // The bitmap directory: the last word of its header extension.
    let bitmaps = 0x2385_2875_0000_0018_u64.to_be_bytes();
    let extension = bytes[..cluster]
        .windows(8)
        .position(|bytes| bytes == bitmaps);
    places.extend(extension.map(|at| word(bytes, at + 24) as usize));
    places.sort_unstable();
    places.dedup();
    places
}

/// Damages a few places of metadata; the header is spared.
pub(super) fn damage(bytes: &mut [u8], places: &[usize], random: &mut SmallRng) {
    let cluster = cluster_size(bytes);
    let clusters = bytes.len() / cluster;
    for _ in 0..random.random_range(1..4) {
        let place = places[random.random_range(0..places.len())];
        // Tables are used from their start on.
        let reach = match random.random_range(0..3) {
            0 => 64,
            1 => 512,
            _ => cluster,
        };
        let mut at = place + random.random_range(0..reach.min(cluster));
        if place == 0 {
            continue;
        }
        at = at.min(bytes.len() - 8);
        let word_at = at / 8 * 8;
        let word = word(bytes, word_at);
        let changed = match random.random_range(0..8) {
            0 => {
                bytes[at] = random.random();
                continue;
            }
            1 => {
                bytes[at] ^= 1 << random.random_range(0..8);
                continue;
            }
            2 => word ^ (1 << 63),
            3 => word ^ 1,
            4 => 0,
            5 => {
                let target = random.random_range(0..clusters as u64 + 3) * cluster as u64;
                target | u64::from(random.random::<bool>()) << 63
            }
            6 => word ^ 0x200,
            _ => word | 1 << random.random_range(0..64),
        };
        bytes[word_at..word_at + 8].copy_from_slice(&changed.to_be_bytes());
    }
}
