//! `outboard-nbd` with other people's clients and servers: libnbd's, QEMU's, fio's; and with clients that mean harm.

mod client;
mod sockets;
mod tls;

use nix::errno::Errno;
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

const OWN: &str = env!("CARGO_BIN_EXE_outboard-nbd");
const IO: &str = env!("CARGO_BIN_EXE_outboard-io");
const IMG: &str = env!("CARGO_BIN_EXE_outboard-img");
const PEER: &str = "qemu-nbd";

/// A command's stdout; it must succeed.
fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect("the program runs");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A directory with an image.
struct Place(tempfile::TempDir);

impl Place {
    /// `a.qcow2`: 8 MiB, of which 1 MiB from 1 MiB on holds 0x11.
    fn new() -> Self {
        let place = Self(tempfile::tempdir().expect("a temporary directory"));
        let image = place.path("a.qcow2");
        output("qemu-img", &["create", "-q", "-f", "qcow2", &image, "8M"]);
        output(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 0x11 1M 1M", &image],
        );
        place
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// Serves `a.qcow2`.
    fn serve(&self, program: &str, arguments: &[&str]) -> Server {
        let server = Server {
            socket: self.path("socket").into(),
            pid_file: self.path("pid").into(),
        };
        let (socket, pid_file, image) =
            (self.path("socket"), self.path("pid"), self.path("a.qcow2"));
        let mut all = vec!["--fork", "--pid-file", &pid_file, "-k", &socket];
        all.extend(arguments);
        all.push(&image);
        // Not `output`: the server in the background holds the pipe of stderr.
        set_child_subreaper(true).expect("orphans come to us");
        let status = Command::new(program).args(&all).status();
        assert!(status.expect("the server runs").success(), "{all:?}");
        server
    }
}

/// A server in the background.
struct Server {
    socket: PathBuf,
    pid_file: PathBuf,
}

impl Server {
    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    fn pid(&self) -> Option<i32> {
        fs::read_to_string(&self.pid_file).ok()?.trim().parse().ok()
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).expect("the server listens");
        let limit = Some(Duration::from_secs(20));
        stream.set_read_timeout(limit).expect("a limit");
        stream
    }

    /// A connection behind the greeting.
    fn greet(&self) -> UnixStream {
        let mut stream = self.connect();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        stream.write_all(&3u32.to_be_bytes()).expect("flags");
        stream
    }

    /// A connection in transmission, with simple replies.
    fn transmission(&self) -> UnixStream {
        let mut stream = self.greet();
        send_option(&mut stream, 1, b"");
        let mut export = [0; 10];
        stream.read_exact(&mut export).expect("an export");
        stream
    }

    /// Resident memory in MiB.
    fn memory_mib(&self) -> u64 {
        let pid = self.pid().expect("it runs");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let line = status.lines().find(|line| line.starts_with("VmHWM"));
        let number = line.and_then(|line| line.split_whitespace().nth(1));
        number
            .and_then(|kib| kib.parse::<u64>().ok())
            .expect("a number")
            / 1024
    }

    fn check_alive(&self) {
        let read = output(
            "qemu-io",
            &["-r", "-f", "raw", "-c", "read -P 0x11 1M 1M", &self.uri()],
        );
        assert!(!read.contains("failed"), "{read}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Some(pid) = self.pid() else { return };
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        wait_for_end(pid);
    }
}

/// Waits until a server in the background has ended: it became a child of ours when its parent ended.
fn wait_for_end(pid: i32) {
    match waitpid(Pid::from_raw(pid), None) {
        // Waited for already.
        Ok(_) | Err(Errno::ECHILD) => {}
        Err(errno) => panic!("waitpid: {errno}"),
    }
}

fn send_option(stream: &mut UnixStream, option: u32, data: &[u8]) {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    stream.write_all(&bytes).expect("an option");
}

/// A compact request.
fn request(command: u16, flags: u16, (offset, length): (u64, u32)) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&77u64.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

/// The error of a simple reply.
fn reply(stream: &mut UnixStream) -> u32 {
    let mut bytes = [0; 16];
    stream.read_exact(&mut bytes).expect("a reply");
    assert_eq!(bytes[..4], 0x6744_6698_u32.to_be_bytes());
    assert_eq!(bytes[8..], 77u64.to_be_bytes());
    u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]])
}

#[test]
fn what_one_client_writes_every_other_reads() {
    let place = Place::new();
    let server = place.serve(OWN, &["-t", "-e", "0", "-f", "qcow2"]);
    let uri = server.uri();
    let commands = [
        "write -P 7 100 3M",
        "write -z 5M 1M",
        "write -f -P 9 7M 64k",
        "discard 1M 64k",
        "flush",
        "read -P 9 7M 64k",
        "read -P 0 5M 1M",
    ];
    let mut arguments = vec!["-f", "raw"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", *command]));
    arguments.push(&uri);
    let done = output("qemu-io", &arguments);
    assert!(!done.contains("failed"), "{done}");
    let copy = place.path("copy");
    output("nbdcopy", &[&uri, &copy]);
    let map = output("nbdinfo", &["--map", &uri]);
    assert!(map.contains("hole,zero"), "{map}");
    drop(server);
    output(
        "qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "qcow2",
            &copy,
            &place.path("a.qcow2"),
        ],
    );
    output("qemu-img", &["check", "-q", &place.path("a.qcow2")]);
}

#[test]
fn fio_finds_what_it_wrote_over_several_connections() {
    let place = Place::new();
    let server = place.serve(OWN, &["-t", "-e", "0", "-f", "qcow2"]);
    let uri = format!("--uri={}", server.uri());
    let arguments = [
        "--name=nbd",
        "--ioengine=nbd",
        &uri,
        "--rw=randrw",
        "--bsrange=512-256k",
        "--iodepth=16",
        "--size=8M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--time_based=0",
    ];
    let status = Command::new("fio")
        .args(arguments)
        .current_dir(place.0.path())
        .output();
    let output = status.expect("fio runs");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn the_list_is_the_one_that_the_peer_prints() {
    let place = Place::new();
    let image = place.path("a.qcow2");
    output("qemu-img", &["bitmap", "--add", "-f", "qcow2", &image, "b"]);
    for arguments in [
        &["-t", "-f", "qcow2", "-x", "disk", "-D", "a disk"][..],
        &["-t", "-f", "qcow2", "-r", "-A", "-B", "b"],
        &["-t", "-f", "raw", "-e", "3", "-o", "1048576"],
    ] {
        let lists = [PEER, OWN].map(|program| {
            let server = place.serve(program, arguments);
            let socket = server.socket.display().to_string();
            [PEER, OWN].map(|client| output(client, &["-L", "-k", &socket]))
        });
        assert_eq!(lists[0][0], lists[0][1], "clients of the peer's server");
        assert_eq!(lists[0], lists[1], "the peer's server, and ours");
    }
}

#[test]
fn dirty_parts_and_depths_are_told() {
    let place = Place::new();
    let image = place.path("a.qcow2");
    output("qemu-img", &["bitmap", "--add", "-f", "qcow2", &image, "b"]);
    output("qemu-io", &["-f", "qcow2", "-c", "write 2M 128k", &image]);
    let server = place.serve(OWN, &["-t", "-r", "-f", "qcow2", "-A", "-B", "b"]);
    let map = output("nbdinfo", &["--map=qemu:dirty-bitmap:b", &server.uri()]);
    let numbers = |line: &str| {
        let words = line.split_whitespace().take(3);
        words.map(str::to_owned).collect::<Vec<_>>().join(" ")
    };
    let lines: Vec<_> = map.lines().map(numbers).collect();
    assert_eq!(
        lines,
        ["0 2097152 0", "2097152 131072 1", "2228224 6160384 0"]
    );
    let depths = output("nbdinfo", &["--map=qemu:allocation-depth", &server.uri()]);
    let lines: Vec<_> = depths.lines().map(numbers).collect();
    assert_eq!(
        lines,
        ["0 1048576 0", "1048576 1179648 1", "2228224 6160384 0"]
    );
}

#[test]
fn the_last_client_ends_the_server_and_takes_its_socket_along() {
    let place = Place::new();
    let server = place.serve(OWN, &["-f", "qcow2"]);
    let pid = server.pid().expect("it runs");
    output(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 3 0 64k", &server.uri()],
    );
    wait_for_end(pid);
    assert!(!server.socket.exists());
    // Its number may be another process's soon.
    fs::remove_file(&server.pid_file).expect("the pid file stays");
    output(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "read -P 3 0 64k",
            &place.path("a.qcow2"),
        ],
    );
}

#[test]
fn a_snapshot_is_shown_and_an_overlay_takes_the_writes() {
    let place = Place::new();
    let image = place.path("a.qcow2");
    output("qemu-img", &["snapshot", "-c", "old", &image]);
    output(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 4 1M 1M", &image],
    );
    for name in ["old", "snapshot.name=old"] {
        let server = place.serve(OWN, &["-t", "-f", "qcow2", "-l", name]);
        server.check_alive();
    }
    let before = fs::read(&image).expect("the image");
    let server = place.serve(OWN, &["-t", "-f", "qcow2", "-s"]);
    let both = [
        "-f",
        "raw",
        "-c",
        "write -P 5 1M 64k",
        "-c",
        "read -P 5 1M 64k",
    ];
    let uri = server.uri();
    let done = output("qemu-io", &[&both[..], &[&uri]].concat());
    assert!(!done.contains("failed"), "{done}");
    drop(server);
    assert!(before == fs::read(&image).expect("the image"));
}

#[test]
fn requests_beyond_what_is_allowed_get_their_error() {
    let place = Place::new();
    let server = place.serve(OWN, &["-t", "-f", "qcow2"]);
    let mut stream = server.transmission();
    const MIB: u64 = 1 << 20;
    for (command, flags, range, error) in [
        (0, 0, (8 * MIB, 512), 22),
        (0, 0, (0, 33 << 20), 22),
        (0, 0, (u64::MAX, 512), 22),
        (0, 4, (0, 512), 22),
        (0, 0x8000, (0, 512), 22),
        (6, 0, (8 * MIB - 512, 1024), 28),
        (4, 0, (8 * MIB, 512), 22),
        (7, 0, (0, 512), 22),
        (9, 0, (0, 512), 22),
        (3, 0, (0, 0), 0),
        (5, 0, (0, 4 << 20), 0),
        (6, 3, (0, 65536), 0),
    ] {
        let bytes = request(command, flags, range);
        stream.write_all(&bytes).expect("a request");
        assert_eq!(reply(&mut stream), error, "{command} {flags} {range:?}");
    }
    let mut write = request(1, 0, (8 * MIB, 512));
    write.extend_from_slice(&[1; 512]);
    stream.write_all(&write).expect("a request");
    assert_eq!(reply(&mut stream), 28);
    drop((stream, server));
    let server = place.serve(OWN, &["-t", "-r", "-f", "qcow2"]);
    let mut stream = server.transmission();
    for command in [4, 6] {
        let bytes = request(command, 0, (0, 512));
        stream.write_all(&bytes).expect("a request");
        assert_eq!(reply(&mut stream), 1);
    }
}

#[test]
fn noise_ends_its_own_connection_and_no_other() {
    let place = Place::new();
    let server = place.serve(OWN, &["-t", "-e", "0", "-f", "qcow2"]);
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut noise = |length: usize| -> Vec<u8> {
        let next = |_| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed as u8
        };
        (0..length).map(next).collect()
    };
    for round in 0..40_u32 {
        let mut stream = match round % 4 {
            0 => server.connect(),
            1 => server.greet(),
            _ => server.transmission(),
        };
        if round % 4 == 1 {
            let mut data = noise(200);
            data[..4].copy_from_slice(&(round * 13).to_be_bytes());
            send_option(&mut stream, round % 12, &data);
        }
        if round % 4 == 3 {
            let range = (u64::from(round) << 40, round << 20);
            let _ = stream.write_all(&request((round % 9) as u16, 0, range));
        }
        // The server may have hung up.
        let _ = stream.write_all(&noise(300));
    }
    let mut stream = server.greet();
    stream
        .write_all(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff")
        .expect("an option");
    assert_eq!(stream.read(&mut [0; 16]).expect("an end"), 0);
    server.check_alive();
}

#[test]
fn a_client_that_does_not_read_costs_bounded_memory() {
    let place = Place::new();
    let server = place.serve(OWN, &["-t", "-e", "0", "-f", "qcow2"]);
    let mut stream = server.transmission();
    let limit = Some(Duration::from_millis(300));
    stream.set_write_timeout(limit).expect("a limit");
    for _ in 0..20_000 {
        if stream.write_all(&request(0, 0, (0, 8 << 20))).is_err() {
            break;
        }
    }
    server.check_alive();
    assert!(server.memory_mib() < 200, "{} MiB", server.memory_mib());
}

#[test]
fn a_client_that_says_nothing_is_sent_away() {
    let place = Place::new();
    let server = place.serve(OWN, &["-t", "-f", "qcow2", "--handshake-limit=1"]);
    let mut stream = server.connect();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).expect("an end");
    assert_eq!(rest.len(), 18);
    server.check_alive();
}

#[test]
fn mistakes_are_told_in_the_words_of_the_peer() {
    let place = Place::new();
    let image = place.path("a.qcow2");
    let socket = place.path("nothing");
    for arguments in [
        &["-L", "-k", &socket][..],
        &["-e", "x", &image],
        &["-k", "relative", &image],
        &["-L", &image],
        &["--cache=foo", &image],
        &["--discard=foo", &image],
        &["-f", "qcow2", "-l", "nosuch", &image],
        &["-f", "qcow2", "-k", &socket, "-B", "nosuch", &image],
        &["--fork", "-r", "-f", "raw", "-k", "/nonexistent/x", &image],
        &["-f", "raw", "-k", &socket, "/nonexistent"],
    ] {
        let texts = [PEER, OWN].map(|program| {
            let output = Command::new(program).args(arguments).output();
            let output = output.expect("the program runs");
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            (
                output.status.code(),
                text.replace("outboard-nbd", "qemu-nbd"),
            )
        });
        assert_eq!(texts[0], texts[1], "{arguments:?}");
    }
}
