//! `outboard-io` beside qemu-io: random sequences of commands, run by both; what they print, their
//! exit codes and the images that they leave must be the same.
//!
//! A failure names its seed: `OUTBOARD_SEED=N` runs that one; `OUTBOARD_SEEDS=N` runs more of them.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process::{Command, Stdio};

const OWN: &str = env!("CARGO_BIN_EXE_outboard-io");
const IMG: &str = env!("CARGO_BIN_EXE_outboard-img");
const PEER: &str = "qemu-io";
/// Bytes of the disks.
const LENGTH: u64 = 4 << 20;

/// What a run gave: exit code, stdout, stderr.
#[derive(Debug, PartialEq, Eq)]
struct Outcome(Option<i32>, String, String);

/// Whether QEMU's tools are there; says so when they are not.
fn has_qemu() -> bool {
    let there = Command::new(PEER).arg("--version").output().is_ok();
    if !there {
        println!("skipped: qemu-io is not installed");
    }
    there
}

fn seeds(usual: u64) -> std::ops::Range<u64> {
    let setting = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    match setting("OUTBOARD_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..setting("OUTBOARD_SEEDS").unwrap_or(usual),
    }
}

/// Times and rates differ from run to run.
fn without_times(text: &str) -> String {
    let lines = text.lines().map(|line| {
        if let Some((size, _)) = line.split_once(", 1 ops; ") {
            return format!("{size}, 1 ops");
        }
        match line.split_once(",1,0:") {
            Some((bytes, _)) => format!("{bytes},1"),
            None => line.to_owned(),
        }
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn run(directory: &Path, program: &str, (arguments, input): (&[String], &str)) -> Outcome {
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(input.as_bytes()).expect("it reads");
    drop(stdin);
    let output = child.wait_with_output().expect("the program ends");
    let text = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        without_times(&text.replace("outboard-io", PEER))
    };
    Outcome(
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// Runs the same by both programs, each in a directory of its own with an image in it.
fn compare(create: &[&str], runs: &[(Vec<String>, String)]) {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let directories = ["peer", "own"].map(|name| scratch.path().join(name));
    for directory in &directories {
        std::fs::create_dir(directory).expect("a new directory");
        let created = Command::new("qemu-img")
            .arg("create")
            .arg("-q")
            .args(create)
            .current_dir(directory)
            .status();
        assert!(created.expect("qemu-img runs").success());
    }
    for (arguments, input) in runs {
        let what = (&arguments[..], &input[..]);
        let peer = run(&directories[0], PEER, what);
        let own = run(&directories[1], OWN, what);
        assert_eq!(own, peer, "{arguments:?} {input:?}");
    }
    let compared = Command::new("qemu-img")
        .args(["compare", "-q", "-f", create[1], "-F", create[1]])
        .args(directories.map(|directory| directory.join("image")))
        .status();
    assert!(compared.expect("qemu-img runs").success(), "contents");
}

fn one_of<'a>(random: &mut SmallRng, values: &[&'a str]) -> &'a str {
    values[random.random_range(0..values.len())]
}

/// An offset or a length as somebody may write it; now and then not one at all.
fn number(random: &mut SmallRng, most: u64) -> String {
    let value = random.random_range(0..most);
    match random.random_range(0..12) {
        0 => format!("{:#x}", value),
        1..=3 => format!("{}k", value >> 10),
        4 => format!("{}", value & !511),
        5 if random.random_range(0..4) == 0 => one_of(random, &["-1", "x", "9E", "1.5", ""]).into(),
        _ => value.to_string(),
    }
}

/// A command, mostly a good one.
fn command(random: &mut SmallRng) -> String {
    let flags = |random: &mut SmallRng, values: &[&str]| -> String {
        match random.random_range(0..3) {
            0 => one_of(random, values).to_owned(),
            _ => String::new(),
        }
    };
    let offset = number(random, LENGTH);
    let length = number(random, 200_000);
    let byte = format!("-P {}", random.random_range(0..4));
    match random.random_range(0..12) {
        0..=2 => {
            let flags = flags(random, &["-q", "-C", "-f", "-z", "-zu", "-u", "-n", "-p"]);
            let byte = if flags.contains('z') { "" } else { &byte };
            format!("write {flags} {byte} {offset} {length}")
        }
        3 | 4 => {
            let flags = flags(random, &["-q", "-C", "-v", "-p", "-x", "-s 5", "-l 5"]);
            let length = if flags == "-v" { "70" } else { &length };
            format!("read {flags} {byte} {offset} {length}")
        }
        5 => format!(
            "writev {} {byte} {offset} {length} 512",
            flags(random, &["-q", "-f"])
        ),
        6 => format!(
            "readv {} {offset} 10 {length}",
            flags(random, &["-q", "-C"])
        ),
        7 => format!("discard {} {offset} {length}", flags(random, &["-q", "-C"])),
        8 => format!("alloc {offset} {length}"),
        9 => one_of(
            random,
            &["map", "length", "flush", "nothing", "sleep 1", "truncate"],
        )
        .into(),
        10 => format!(
            "aio_read {} {byte} {offset} {length}",
            flags(random, &["-q", "-C"])
        ),
        _ => format!(
            "aio_write {} {byte} {offset} {length}",
            flags(random, &["-q", "-f"])
        ),
    }
}

/// Commands of which none runs beside another: what they print has an order.
fn sequence(random: &mut SmallRng) -> Vec<String> {
    let mut commands = Vec::new();
    for _ in 0..40 {
        let command = command(random);
        let is_asynchronous = command.starts_with("aio");
        commands.push(command);
        if is_asynchronous {
            commands.push("aio_flush".to_owned());
        }
    }
    commands
}

fn words(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn random_commands_print_and_do_the_same_as_in_qemu_io() {
    if !has_qemu() {
        return;
    }
    let images: [&[&str]; 3] = [
        &["-f", "raw", "image", "4M"],
        &["-f", "qcow2", "image", "4M"],
        &["-f", "qcow2", "-o", "cluster_size=4k", "image", "4M"],
    ];
    for seed in seeds(6) {
        println!("OUTBOARD_SEED={seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        let create = images[seed as usize % images.len()];
        let mut arguments = words(&["-t", "writeback", "-f", create[1], "image"]);
        for command in sequence(&mut random) {
            arguments.extend(["-c".to_owned(), command]);
        }
        let lines = sequence(&mut random).join("\n") + "\n";
        let interactive = words(&["-t", "writeback", "-f", create[1], "image"]);
        compare(create, &[(arguments, String::new()), (interactive, lines)]);
    }
}

#[test]
fn files_come_and_go_as_in_qemu_io() {
    if !has_qemu() {
        return;
    }
    let lines = [
        "length",
        "open nosuch",
        "open -t x image",
        "open -x",
        "open",
        "open -r -o driver=qcow2 image",
        "write 0 512",
        "reopen -w",
        "write -P 7 0 512",
        "reopen -r -w",
        "reopen -c none",
        "read -P 7 0 512",
        "open image",
        "reopen -o driver=raw",
        "truncate 8M",
        "length",
        "close",
        "map",
        "help read -x",
        "quit",
        "length",
    ];
    let script = lines.join("\n") + "\n";
    let commands = lines.iter().flat_map(|line| words(&["-c", line])).collect();
    compare(
        &["-f", "qcow2", "image", "4M"],
        &[(Vec::new(), script), (commands, String::new())],
    );
}

#[test]
fn a_stopped_request_lets_others_pass_and_goes_on() {
    if !has_qemu() {
        return;
    }
    let script = [
        "break pwritev_rmw_after_tail A",
        "aio_write -P 10 0x200 0x200",
        "wait_break A",
        "aio_write -P 11 0x2000 0x400",
        "sleep 100",
        "resume A",
        "aio_flush",
        "read -P 10 0x200 0x200",
        "read -P 11 0x2000 0x400",
        "remove_break A",
        "break foo A",
    ];
    let arguments = [
        "-t",
        "writeback",
        "--image-opts",
        "driver=raw,file.driver=blkdebug,file.align=4096,file.image.driver=file,\
         file.image.filename=image",
    ];
    let script = script.join("\n") + "\n";
    compare(
        &["-f", "raw", "image", "4M"],
        &[(words(&arguments), script)],
    );
}

#[test]
fn injected_errors_fail_the_same_requests() {
    if !has_qemu() {
        return;
    }
    let mut arguments = words(&[
        "-t",
        "writeback",
        "--image-opts",
        "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=image,\
         file.inject-error.0.event=write_aio,file.inject-error.0.errno=28,\
         file.inject-error.0.once=on,file.inject-error.0.sector=8,\
         file.inject-error.1.event=none,file.inject-error.1.iotype=flush,\
         file.set-state.0.event=read_aio,file.set-state.0.new_state=2,\
         file.inject-error.2.event=read_aio,file.inject-error.2.state=2,\
         file.inject-error.2.immediately=on",
    ]);
    let commands = [
        "flush",
        "write 0 512",
        "write 4096 512",
        "write 4096 512",
        "read 0 512",
        "read 0 512",
        "write 0 512",
    ];
    for command in commands {
        arguments.extend(words(&["-c", command]));
    }
    compare(&["-f", "raw", "image", "4M"], &[(arguments, String::new())]);
}

#[test]
fn with_image_opts_files_are_opened_by_options_throughout() {
    if !has_qemu() {
        return;
    }
    let script = [
        "open driver=raw,file.filename=image",
        "write -P 3 0 4k",
        "close",
        "open -o driver=raw image",
        "open -r driver=raw,file.filename=image",
        "read -P 3 0 4k",
        "close",
        "open driver=raw,file.filename=image x",
        "open",
    ];
    let runs = [(words(&["--image-opts"]), script.join("\n") + "\n")];
    compare(&["-f", "raw", "image", "4M"], &runs);
}

#[test]
fn a_new_image_has_nothing_of_what_a_killed_writer_left_for_the_old_one() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    // Logs are kept where a daemon has made the directory for them.
    let logs = engine::host::redo_dir();
    let made = std::fs::DirBuilder::new().mode(0o700).create(&logs);
    assert!(made.is_ok() || logs.is_dir(), "{made:?}");
    let tool = |program: &str, arguments: &[&str]| {
        let output = Command::new(program)
            .args(arguments)
            .current_dir(scratch.path())
            .output()
            .expect("the program runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let create = || tool(IMG, &["create", "-q", "-f", "qcow2", "image", "1M"]);
    create();
    let write_and_die = ["-t", "writeback", "-c", "write 0 4k", "-c", "sigraise 9"];
    tool(OWN, &[&write_and_die[..], &["image"]].concat());
    create();
    tool(OWN, &["-c", "write 64k 4k", "image"]);
    let map = tool(IMG, &["map", "--output=json", "image"]);
    assert!(map.contains("\"start\": 65536"), "{map}");
    assert!(
        !map.contains("\"start\": 0, \"length\": 65536, \"depth\": 0, \"present\": true"),
        "{map}"
    );
    let check = tool(IMG, &["check", "image"]);
    assert!(check.starts_with("No errors"), "{check}");
}
