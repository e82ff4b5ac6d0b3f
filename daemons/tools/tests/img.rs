//! `outboard-img` beside qemu-img: random options and sequences of commands, run by both; what they
//! print and what the images say, hold and read as must be the same.
//!
//! A failure names its seed: `OUTBOARD_SEED=N` runs that one; `OUTBOARD_SEEDS=N` runs more of them.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The two programs.
const PROGRAMS: [&str; 2] = ["qemu-img", env!("CARGO_BIN_EXE_outboard-img")];

/// What a command gave: exit code, stdout, stderr.
#[derive(Debug, PartialEq, Eq)]
struct Outcome(Option<i32>, String, String);

fn run(directory: &Path, program: &str, arguments: &[String]) -> Outcome {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .output()
        .expect("the program runs");
    let text = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        // Progress is a matter of taste, the name is not its own.
        let lines = text.rsplit('\r').next().unwrap_or_default();
        lines.replace("outboard-img", "qemu-img").trim().to_owned()
    };
    let (printed, error) = (text(&output.stdout), text(&output.stderr));
    // Where it counts processor time in ticks, QEMU now and then cannot measure key derivation.
    if error.contains("Unable to get accurate CPU usage") {
        return run(directory, program, arguments);
    }
    Outcome(output.status.code(), printed, error)
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// One directory per program, with files of the same names.
struct Pair(tempfile::TempDir);

impl Pair {
    fn new() -> Self {
        let pair = Self(tempfile::tempdir().expect("a temporary directory"));
        for directory in pair.directories() {
            std::fs::create_dir(directory).expect("a new directory");
        }
        pair
    }

    fn directories(&self) -> [PathBuf; 2] {
        ["peer", "own"].map(|name| self.0.path().join(name))
    }

    /// Runs a command by both programs; they must agree on everything that they print.
    fn both(&self, line: &str) -> Outcome {
        let [peer, own] = self.directories();
        let arguments = words(line);
        let peer = run(&peer, PROGRAMS[0], &arguments);
        let own = run(&own, PROGRAMS[1], &arguments);
        assert_eq!(own, peer, "{line}");
        peer
    }

    /// Runs a program of QEMU's on both images; the answers must be the same.
    fn judged(&self, program: &str, line: &str) -> Outcome {
        let arguments = words(line);
        let [peer, own] = self
            .directories()
            .map(|directory| run(&directory, program, &arguments));
        assert_eq!(own, peer, "{program} {line}");
        peer
    }

    /// The images are sound, describe themselves alike and read the same.
    fn compare(&self, context: &str) {
        let [peer, own] = self.directories();
        let check = words("check -q -f qcow2 a.qcow2");
        for directory in [&peer, &own] {
            let checked = run(directory, "qemu-img", &check);
            assert_eq!(checked.0, Some(0), "{context}: {checked:?}");
        }
        let info = |directory: &Path, program| {
            let Outcome(code, text, _) =
                run(directory, program, &words("info --output=json a.qcow2"));
            assert_eq!(code, Some(0), "{context}");
            let kept = text
                .lines()
                .filter(|line| !line.contains("\"actual-size\"") && !line.contains("\"date-"));
            kept.collect::<Vec<_>>().join("\n")
        };
        let expected = info(&peer, PROGRAMS[0]);
        assert_eq!(info(&own, PROGRAMS[0]), expected, "{context}");
        assert_eq!(info(&own, PROGRAMS[1]), expected, "{context}");
        let content = |directory: &Path| {
            let convert = words("convert -f qcow2 -O raw a.qcow2 a.raw");
            assert_eq!(run(directory, "qemu-img", &convert).0, Some(0), "{context}");
            std::fs::read(directory.join("a.raw")).expect("what was just written")
        };
        assert!(
            content(&own) == content(&peer),
            "{context}: contents differ"
        );
    }
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn seeds(usual: u64) -> std::ops::Range<u64> {
    match setting("OUTBOARD_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..setting("OUTBOARD_SEEDS").unwrap_or(usual),
    }
}

/// Whether QEMU's tools are there; says so when they are not.
fn has_qemu() -> bool {
    let there = Command::new("qemu-img").arg("--version").output().is_ok();
    if !there {
        println!("skipped: qemu-img is not installed");
    }
    there
}

fn one_of<'a>(random: &mut SmallRng, values: &[&'a str]) -> &'a str {
    values[random.random_range(0..values.len())]
}

/// Options for `create`, some of which do not go together.
fn create_options(random: &mut SmallRng) -> String {
    let mut options = Vec::new();
    let mut add = |random: &mut SmallRng, name: &str, values: &[&str]| {
        if random.random_range(0..3) == 0 {
            options.push(format!("{name}={}", one_of(random, values)));
        }
    };
    let clusters = ["512", "4k", "16k", "64k", "256k", "2M", "3k", "4M"];
    add(random, "cluster_size", &clusters);
    add(random, "compat", &["0.10", "1.1", "v2", "v3", "2.0"]);
    add(
        random,
        "refcount_bits",
        &["1", "2", "8", "16", "32", "64", "7"],
    );
    add(random, "lazy_refcounts", &["on", "off", "maybe"]);
    add(
        random,
        "preallocation",
        &["off", "metadata", "falloc", "full", "x"],
    );
    add(random, "compression_type", &["zlib", "zstd", "zstd", "lzo"]);
    add(random, "extended_l2", &["on", "off"]);
    add(random, "data_file", &["d"]);
    add(random, "data_file_raw", &["on", "off"]);
    add(random, "unknown", &["1"]);
    match options.is_empty() {
        true => String::new(),
        false => format!("-o {}", options.join(",")),
    }
}

/// The same writes to both images.
fn write_alike(pair: &Pair, random: &mut SmallRng, size: u64) {
    let mut line = String::from("-f qcow2");
    for _ in 0..random.random_range(1..5) {
        let offset = random.random_range(0..size / 512) * 512;
        let length = random.random_range(1..=512).min((size - offset) / 512) * 512;
        let kind = one_of(
            random,
            &["write -P 5", "write -P 17", "write -z", "write -z -u"],
        );
        line.push_str(&format!(
            " -c {} ",
            format!("{kind} {offset} {length}").replace(' ', "\u{1}")
        ));
    }
    let arguments: Vec<String> = words(&format!("{line} a.qcow2"))
        .into_iter()
        .map(|word| word.replace('\u{1}', " "))
        .collect();
    for directory in pair.directories() {
        assert_eq!(
            run(&directory, "qemu-io", &arguments).0,
            Some(0),
            "{arguments:?}"
        );
    }
}

#[test]
fn images_are_made_like_qemu_img_makes_them() {
    if !has_qemu() {
        return;
    }
    for seed in seeds(30) {
        println!("seed {seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        let pair = Pair::new();
        let options = create_options(&mut random);
        let size = random.random_range(1..8192) * 512_u64;
        let line = format!("create -f qcow2 {options} a.qcow2 {size}");
        if pair.both(&line).0 != Some(0) {
            for directory in pair.directories() {
                assert!(!directory.join("a.qcow2").exists(), "{line}");
            }
            continue;
        }
        pair.compare(&line);
        write_alike(&pair, &mut random, size);
        pair.compare(&line);
    }
}

#[test]
fn amended_and_resized_images_agree_with_qemu_img() {
    if !has_qemu() {
        return;
    }
    for seed in seeds(4) {
        println!("seed {seed}");
        let mut random = SmallRng::seed_from_u64(1000 + seed);
        let pair = Pair::new();
        let cluster = one_of(&mut random, &["512", "4k", "64k"]);
        let mut size = 2 << 20;
        pair.both(&format!(
            "create -f qcow2 -o cluster_size={cluster} a.qcow2 {size}"
        ));
        for _ in 0..6 {
            write_alike(&pair, &mut random, size);
            let line = match random.random_range(0..4) {
                0 => {
                    // Whole clusters: within one QEMU shows again what was cut off.
                    let length = random.random_range(1..80) * 65536_u64;
                    size = length;
                    format!("resize -f qcow2 --shrink a.qcow2 {length}")
                }
                1 => {
                    let mode = one_of(&mut random, &["off", "metadata", "falloc", "full"]);
                    format!("resize -f qcow2 --preallocation={mode} a.qcow2 +128k")
                }
                _ => {
                    let bits = one_of(&mut random, &["1", "2", "4", "8", "16", "32", "64", "3"]);
                    let options = match random.random_range(0..5) {
                        0 => "compat=0.10".to_owned(),
                        1 => "compat=1.1".to_owned(),
                        2 => format!("refcount_bits={bits}"),
                        3 => format!("compat=1.1,refcount_bits={bits}"),
                        _ => format!("lazy_refcounts={}", one_of(&mut random, &["on", "off"])),
                    };
                    format!("amend -f qcow2 -o {options} a.qcow2")
                }
            };
            println!("{line}");
            let outcome = pair.both(&line);
            if line.contains("+128k") && outcome.0 == Some(0) {
                size += 128 << 10;
            }
            pair.compare(&line);
        }
    }
}

#[test]
fn mistakes_are_answered_in_the_words_of_qemu_img() {
    if !has_qemu() {
        return;
    }
    let pair = Pair::new();
    pair.both("create -f qcow2 base.qcow2 1M");
    pair.both("create -f qcow2 -b base.qcow2 -F qcow2 a.qcow2");
    pair.both("create -f raw r.img 1M");
    let mut different = Vec::new();
    for line in [
        "",
        "nothing",
        "create",
        "create -z",
        "create --nothing x 1M",
        "create -f nothing x 1M",
        "create -f qcow2 x",
        "create -f qcow2 x 1x",
        "create -f qcow2 x 9E",
        "create -f qcow2 x 1M more",
        "create -f qcow2 -o size=1M x 1M",
        "create -f qcow2 -o cluster_size x 1M",
        "create -f qcow2 -o backing_file=a.qcow2 a.qcow2",
        "create -f qcow2 -b nothing -F qcow2 x",
        "create -f qcow2 -F qcow2 x 1M",
        "create -f raw -b base.qcow2 -F qcow2 x 1M",
        "create -f raw -o preallocation=metadata x 1M",
        "create -f qcow2 /nowhere/x 1M",
        "create -f qcow2 x 100P",
        "create -f qcow2 -o help",
        "create -f qcow2 -o help x",
        "create -f raw -o help",
        "info",
        "info nothing",
        "info a.qcow2 base.qcow2",
        "info --output=xml a.qcow2",
        "info -f nothing a.qcow2",
        "map",
        "map --output=json a.qcow2",
        "map a.qcow2",
        "map --start-offset=64k --max-length=128k --output=json a.qcow2",
        "map -f raw --output=json r.img",
        "resize a.qcow2",
        "resize a.qcow2 1x",
        "resize a.qcow2 -2M",
        "resize a.qcow2 512k",
        "resize --preallocation=x a.qcow2 2M",
        "resize --shrink --preallocation=full a.qcow2 512k",
        "resize r.img 2M",
        "resize -f raw --preallocation=metadata r.img 3M",
        "amend a.qcow2",
        "amend -o nothing=1 a.qcow2",
        "amend -o cluster_size=4k a.qcow2",
        "amend -o compat=2 a.qcow2",
        "amend -o backing_file=x a.qcow2",
        "amend -o data_file=x a.qcow2",
        "amend -o data_file_raw=on a.qcow2",
        "amend -o encrypt.state=active a.qcow2",
        "amend -o lazy_refcounts=on,compat=0.10 a.qcow2",
        "amend -f raw -o size=2M r.img",
        "amend -f qcow2 -o help",
        "rebase",
        "rebase a.qcow2",
        "rebase -b nothing a.qcow2",
        "rebase -b base.qcow2 -F nothing a.qcow2",
        "rebase -t nothing -b base.qcow2 a.qcow2",
        "rebase -T nothing -b base.qcow2 a.qcow2",
        "rebase -b r.img a.qcow2",
        "rebase -f raw -u -b x -F raw r.img",
        "commit",
        "commit base.qcow2",
        "commit -b nothing a.qcow2",
        "commit -r x a.qcow2",
        "commit -t nothing a.qcow2",
        "commit -f nothing a.qcow2",
    ] {
        let [peer, own] = pair.directories();
        let peer = run(&peer, PROGRAMS[0], &words(line));
        let own = run(&own, PROGRAMS[1], &words(line));
        if own != peer {
            different.push(format!("{line}\n{own:#?}\n{peer:#?}"));
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n\n"));
    pair.judged("qemu-img", "check a.qcow2");
}

#[test]
fn snapshots_come_and_go_like_those_of_qemu_img() {
    if !has_qemu() {
        return;
    }
    for seed in seeds(6) {
        println!("seed {seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        let pair = Pair::new();
        let shape = one_of(
            &mut random,
            &[
                "cluster_size=512",
                "cluster_size=4k,refcount_bits=4",
                "cluster_size=64k,compat=0.10",
                "cluster_size=16k,extended_l2=on",
            ],
        );
        let size = random.random_range(1024..4096) * 512_u64;
        pair.both(&format!("create -q -f qcow2 -o {shape} a.qcow2 {size}"));
        for number in 0..10 {
            write_alike(&pair, &mut random, size);
            let name = random.random_range(0..4);
            let line = match random.random_range(0..5) {
                0..3 => format!("snapshot -c s{name} a.qcow2"),
                3 => format!("snapshot -a s{name} a.qcow2"),
                _ => format!("snapshot -d s{name} a.qcow2"),
            };
            pair.both(&line);
            pair.compare(&format!("operation {number}: {line}"));
        }
        for name in 0..4 {
            let convert = format!("convert -f qcow2 -l s{name} -O raw a.qcow2 s.raw");
            if pair.judged("qemu-img", &convert).0 == Some(0) {
                let [peer, own] = pair
                    .directories()
                    .map(|directory| std::fs::read(directory.join("s.raw")).unwrap());
                assert!(own == peer, "snapshot s{name} reads as something else");
            }
        }
    }
}

#[test]
fn bitmaps_are_changed_like_qemu_img_changes_them() {
    if !has_qemu() {
        return;
    }
    for seed in seeds(4) {
        println!("seed {seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        let pair = Pair::new();
        let clusters = one_of(&mut random, &["512", "4k", "64k"]);
        let size = 1 << 20;
        pair.both(&format!(
            "create -q -f qcow2 -o cluster_size={clusters} a.qcow2 {size}"
        ));
        for number in 0..12 {
            let (name, other) = (random.random_range(0..3), random.random_range(0..3));
            let change = match random.random_range(0..8) {
                0..3 => "--add".to_owned(),
                3 => "--remove".to_owned(),
                4 => "--clear".to_owned(),
                5 => "--disable".to_owned(),
                6 => "--enable".to_owned(),
                _ => format!("--merge b{other}"),
            };
            let line = format!("bitmap {change} -f qcow2 a.qcow2 b{name}");
            pair.both(&line);
            write_alike(&pair, &mut random, size);
            pair.compare(&format!("operation {number}: {line}"));
        }
    }
}

/// Writes to any image of both chains.
fn write_to(pair: &Pair, (image, offset, length): (&str, u64, u64), kind: &str) {
    let command = format!("{kind} {offset} {length}");
    for directory in pair.directories() {
        let arguments = ["-f", "qcow2", "-c", &command, image].map(str::to_owned);
        let outcome = run(&directory, "qemu-io", &arguments);
        assert_eq!(outcome.0, Some(0), "{command} {image}: {outcome:?}");
    }
}

/// The images of the chain read alike in both directories.
fn compare_chain(pair: &Pair, images: &[&str], context: &str) {
    for image in images {
        let contents = pair.directories().map(|directory| {
            let check = words(&format!("check -q -f qcow2 {image}"));
            let checked = run(&directory, "qemu-img", &check);
            assert_eq!(checked.0, Some(0), "{context}: {image} {checked:?}");
            let convert = words(&format!("convert -f qcow2 -O raw {image} out.raw"));
            let converted = run(&directory, "qemu-img", &convert);
            assert_eq!(converted.0, Some(0), "{context}: {image} {converted:?}");
            std::fs::read(directory.join("out.raw")).expect("what was just written")
        });
        assert!(contents[0] == contents[1], "{context}: {image} differs");
    }
}

#[test]
fn rebase_and_commit_move_content_like_qemu_img() {
    if !has_qemu() {
        return;
    }
    for seed in seeds(8) {
        println!("seed {seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        let pair = Pair::new();
        let images = ["a.qcow2", "mid.qcow2", "base.qcow2", "other.qcow2"];
        let mut sizes = Vec::new();
        for (index, image) in images.iter().enumerate().rev() {
            let cluster = one_of(&mut random, &["512", "4k", "64k"]);
            let size = random.random_range(8..40) * 65536_u64;
            let backing = match index {
                0 => "-b mid.qcow2 -F qcow2",
                1 => "-b base.qcow2 -F qcow2",
                _ => "",
            };
            let options = format!("-o cluster_size={cluster} {backing}");
            pair.both(&format!("create -q -f qcow2 {options} {image} {size}"));
            sizes.push(size);
            for _ in 0..4 {
                let offset = random.random_range(0..size / 512) * 512;
                let length = (random.random_range(1..300) * 512).min(size - offset);
                let kind = one_of(&mut random, &["write -P 3", "write -P 9", "write -z"]);
                write_to(&pair, (image, offset, length), kind);
            }
        }
        let line = one_of(
            &mut random,
            &[
                "rebase -b other.qcow2 -F qcow2 a.qcow2",
                "rebase -b base.qcow2 -F qcow2 a.qcow2",
                "rebase -u -b other.qcow2 -F qcow2 a.qcow2",
                "rebase -F qcow2 -b  a.qcow2",
                "commit a.qcow2",
                "commit -d a.qcow2",
                "commit -b base.qcow2 a.qcow2",
                "commit mid.qcow2",
            ],
        );
        let line = line.replace("-b  a", "-b\u{1} a");
        println!("{line}, sizes {sizes:?}");
        let [peer, own] = pair.directories();
        // An empty word stands for no backing.
        let arguments: Vec<String> = words(&line)
            .into_iter()
            .flat_map(|word| match word.strip_suffix('\u{1}') {
                Some(option) => vec![option.to_owned(), String::new()],
                None => vec![word],
            })
            .collect();
        let outcomes = [(&peer, PROGRAMS[0]), (&own, PROGRAMS[1])]
            .map(|(directory, program)| run(directory, program, &arguments));
        assert_eq!(outcomes[1], outcomes[0], "{line}");
        compare_chain(&pair, &images, &line);
    }
}

#[test]
fn committed_zeroes_take_no_space_in_the_base_as_with_qemu_img() {
    if !has_qemu() {
        return;
    }
    let pair = Pair::new();
    pair.both("create -q -f qcow2 base.qcow2 1M");
    pair.both("create -q -f qcow2 -b base.qcow2 -F qcow2 a.qcow2");
    write_to(&pair, ("base.qcow2", 0, 1 << 20), "write -P 3");
    write_to(&pair, ("a.qcow2", 0, 768 << 10), "write -z");
    pair.both("commit -q a.qcow2");
    let checked = pair.both("check -f qcow2 base.qcow2");
    assert!(checked.1.contains("4/16 = 25.00% allocated"), "{checked:?}");
}

#[test]
fn conversions_give_what_qemu_img_gives() {
    if !has_qemu() {
        return;
    }
    for seed in seeds(8) {
        let mut random = SmallRng::seed_from_u64(seed);
        let random = &mut random;
        let pair = Pair::new();
        let size = random.random_range(1..12_000) * 512;
        let create = format!("create -q -f qcow2 a.qcow2 {size}");
        pair.both(&create);
        write_alike(&pair, random, size);
        let format = one_of(random, &["raw", "qcow2"]);
        let mut options = format!("-O {format}");
        if random.random_bool(0.4) {
            let sparse = one_of(random, &["0", "512", "4k", "64k", "96k"]);
            options.push_str(&format!(" -S {sparse}"));
        }
        if random.random_bool(0.4) {
            let workers = one_of(random, &["1", "3", "16"]);
            options.push_str(&format!(" -m {workers}"));
        }
        if format == "qcow2" && random.random_bool(0.5) {
            options.push_str(one_of(random, &[" -c", " -o cluster_size=2M", " -W"]));
        }
        let context = format!("seed {seed}: {options}");
        let converted = pair.both(&format!("convert -f qcow2 {options} a.qcow2 b"));
        assert_eq!(converted.0, Some(0), "{context}");
        let lengths = pair.directories().map(|directory| {
            let metadata = std::fs::metadata(directory.join("b"));
            let length = metadata.expect("the target is there").len();
            length.next_multiple_of(512)
        });
        if !options.contains("-W") {
            assert_eq!(lengths[1], lengths[0], "{context}");
        }
        let [peer, own] = pair.directories();
        let files = [&peer, &own].map(|directory| directory.join("b").display().to_string());
        let line = format!("compare -f {format} -F {format} {} {}", files[0], files[1]);
        assert_eq!(pair.both(&line).0, Some(0), "{context}");
        for line in [
            format!("compare -s -f qcow2 -F {format} a.qcow2 b"),
            format!("measure -O qcow2 -f {format} b"),
        ] {
            let [expected, answer] = PROGRAMS.map(|program| run(&peer, program, &words(&line)));
            assert_eq!(answer, expected, "{context}: {line}");
        }
        pair.both("dd -f qcow2 bs=1000 count=900 skip=3 if=a.qcow2 of=c");
        let copies = [&peer, &own].map(|directory| std::fs::read(directory.join("c")));
        let [peer, own] = copies.map(|bytes| bytes.expect("what was just written"));
        assert!(peer == own, "{context}: dd");
    }
}

#[test]
fn a_data_file_is_looked_for_from_the_working_directory() {
    let pair = Pair::new();
    for directory in pair.directories() {
        std::fs::create_dir(directory.join("images")).expect("a new directory");
    }
    pair.both("create -q -f qcow2 -o data_file=d.data images/i.qcow2 1M");
    let [_, own] = pair.directories();
    let map = |options: &str| {
        let line = format!("map --output=json {options} images/i.qcow2");
        run(&own, PROGRAMS[1], &words(&line))
    };
    let refused = map("");
    let reason = "elsewhere than beside the image it needs an allowed directory";
    assert!(refused.2.contains(reason), "{refused:?}");
    assert_eq!(map("--allow-dir .").0, Some(0));
    std::fs::rename(own.join("d.data"), own.join("images/d.data")).expect("moved");
    assert_eq!(map("").0, Some(0), "it is beside the image");
    for directory in pair.directories() {
        for name in ["d.data", "images/d.data"] {
            let _ = std::fs::remove_file(directory.join(name));
        }
    }
    let missing = pair.both("map --output=json images/i.qcow2");
    assert!(missing.2.contains("Could not open 'd.data'"), "{missing:?}");
}

#[test]
fn sigusr1_has_the_progress_told_once() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| scratch.path().join(name);
    std::fs::write(path("a"), vec![7; 1 << 20]).expect("a new file");
    // Blocked and pending when the program starts, so that its first step finds it.
    let script = "import os, signal, sys\n\
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\n\
        os.kill(os.getpid(), signal.SIGUSR1)\n\
        os.execv(sys.argv[1], sys.argv[1:])";
    let convert = format!("{} convert -f raw -O qcow2 a b", PROGRAMS[1]);
    let arguments = [&["-c".to_owned(), script.to_owned()], &words(&convert)[..]].concat();
    let Outcome(code, printed, error) = run(scratch.path(), "python3", &arguments);
    assert_eq!((code, printed.as_str()), (Some(0), ""), "{error}");
    let told = error
        .strip_prefix('(')
        .and_then(|error| error.strip_suffix("/100%)"));
    let percent: f64 = told.and_then(|text| text.parse().ok()).expect(&error);
    assert!((0.0..=100.0).contains(&percent), "{percent}");
}

#[test]
fn convert_with_copy_range_leaves_the_copy_to_the_kernel() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let content: Vec<u8> = (0..1 << 20)
        .map(|index| (index / 4096 % 255) as u8 + 1)
        .collect();
    std::fs::write(scratch.path().join("a"), &content).expect("a new file");
    let copied_bytes = |option: &str, name: &str| {
        let own = PROGRAMS[1];
        let line = format!(
            "-f -qq -o calls -e trace=copy_file_range {own} convert {option} -f raw -O raw a {name}"
        );
        let outcome = run(scratch.path(), "strace", &words(&line));
        assert_eq!(outcome.0, Some(0), "{outcome:?}");
        assert!(std::fs::read(scratch.path().join(name)).expect("the copy") == content);
        let calls = std::fs::read_to_string(scratch.path().join("calls")).expect("the calls");
        let results = calls.lines().filter_map(|line| line.rsplit_once("= "));
        let bytes: u64 = results
            .filter_map(|(_, result)| result.trim().parse::<u64>().ok())
            .sum();
        bytes
    };
    assert_eq!(copied_bytes("-C", "b"), content.len() as u64);
    assert_eq!(copied_bytes("", "c"), 0);
}

#[test]
fn encrypted_images_are_made_and_measured_like_those_of_qemu_img() {
    if !has_qemu() {
        return;
    }
    let pair = Pair::new();
    let secret = "--object secret,id=s,data=geheim";
    let luks = format!("{secret} -o key-secret=s,iter-time=10");
    pair.both(&format!("create -f luks {luks} a.luks 1000"));
    pair.both(&format!("measure -O luks {luks} --size 1001"));
    pair.both("measure -O luks --size 1M");
    // A file is gone when no image could be made in it.
    for directory in pair.directories() {
        std::fs::write(directory.join("b.luks"), "old").expect("a new file");
    }
    pair.both("create -f luks -o key-secret=s b.luks 1M");
    for name in ["a.luks", "b.luks"] {
        let files = pair.directories().map(|directory| directory.join(name));
        let [peer, own] = files.map(|file| file.metadata().ok().map(|file| file.len()));
        assert_eq!(own, peer, "{name}");
    }
    // A backing file's key is no concern of those who make an overlay.
    let luks = "-o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1";
    let base = words(&format!("create {secret} -f qcow2 {luks} base 1M"));
    for directory in pair.directories() {
        assert_eq!(run(&directory, PROGRAMS[1], &base).0, Some(0));
    }
    pair.both("create -f qcow2 -b base -F qcow2 overlay");
}

#[test]
fn long_options_of_newer_versions_mean_the_short_ones() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let own = |line: &str| run(scratch.path(), PROGRAMS[1], &words(line));
    let ok = |line: &str| {
        let Outcome(code, printed, error) = own(line);
        assert_eq!((code, error.as_str()), (Some(0), ""), "{line}");
        printed
    };
    ok("create --quiet --format qcow2 --options cluster_size=4k a 64k");
    ok("convert --source-format=qcow2 --target-format=qcow2 --parallel 2 --oob-writes a b");
    ok("compare --a-format qcow2 --b-format qcow2 --quiet a b");
    ok("snapshot --format qcow2 --create one a");
    assert!(ok("snapshot --list a").contains("one"));
    ok("bench --format qcow2 --count 1 --buffer-size 4k a");
    let measured = ok("measure --source-format qcow2 --target-format qcow2 a");
    assert_eq!(measured, ok("measure -f qcow2 -O qcow2 a"));
    let limits = ok("info --limits a");
    let (_, limits) = limits.split_once("Block limits:\n").expect("they are told");
    for line in [
        "request alignment: 1",
        "opt transfer: 4096",
        "max iov: 1024",
    ] {
        assert!(limits.contains(&format!("    {line}\n")), "{limits}");
    }
    assert!(!ok("info a").contains("limits"));
    assert!(ok("resize --help").starts_with("usage: qemu-img resize [--object objectdef]"));
}
