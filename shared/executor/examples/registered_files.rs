//! How long a killed process' file locks outlive it, with and without its file being registered
//! with an io_uring: why the executor registers none.
//!
//! `cargo run --release -p executor --example registered_files [DIRECTORY]`
#![expect(clippy::unwrap_used, reason = "a measuring tool")]

use io_uring::IoUring;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: u32 = 50;

fn open(path: &Path) -> File {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).unwrap()
}

/// Takes a byte-range lock of the open file description, as disk images are locked.
fn lock(file: &File) -> bool {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 100,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).is_ok()
}

/// The process that is killed.
fn hold(path: &Path, registered: bool) {
    let file = open(path);
    assert!(lock(&file));
    let ring = IoUring::new(64).unwrap();
    if registered {
        ring.submitter()
            .register_files(&[file.as_raw_fd()])
            .unwrap();
    }
    println!("held");
    std::io::stdout().flush().unwrap();
    loop {
        std::thread::park();
    }
}

fn measure(path: &Path, registered: bool) {
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let mut holder = Command::new(std::env::current_exe().unwrap())
            .args(["--hold", if registered { "yes" } else { "no" }])
            .arg(path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let output = holder.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        holder.kill().unwrap();
        holder.wait().unwrap();
        let (file, start) = (open(path), Instant::now());
        while !lock(&file) {
            std::thread::yield_now();
        }
        times.push(start.elapsed());
    }
    let mean = times.iter().sum::<Duration>() / ROUNDS;
    let longest = times.iter().max().unwrap();
    println!(
        "registered {registered:<5}: locks outlive their holder by {mean:?}, at most {longest:?}"
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--hold", registered, path] => hold(Path::new(path), registered == "yes"),
        [] | [_] => {
            let directory = arguments.first().map_or(".", String::as_str);
            let path =
                Path::new(directory).join(format!("registered-files-{}", std::process::id()));
            measure(&path, false);
            measure(&path, true);
            std::fs::remove_file(&path).unwrap();
        }
        _ => panic!("usage: registered_files [DIRECTORY]"),
    }
}
