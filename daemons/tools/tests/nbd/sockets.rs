//! The sockets that `outboard-nbd` serves besides one with a path: TCP, and what a service manager hands over.

use crate::{OWN, Place, output};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::process::{Child, Command};

/// A server in the foreground, ended when dropped.
struct Foreground(Child);

impl Drop for Foreground {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Serves `a.qcow2` on a descriptor, which becomes number 3, as systemd passes it.
fn activate(place: &Place, descriptor: i32) -> Foreground {
    // A shell, for a child's process ID must be in its own environment.
    let script = format!("exec 3<&{descriptor}; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\"");
    let image = place.path("a.qcow2");
    let child = Command::new("sh")
        .args(["-c", &script, "sh", OWN, "-t", "-r", "-f", "qcow2", &image])
        .spawn();
    Foreground(child.expect("the server runs"))
}

fn keep_across_exec(descriptor: impl AsFd) {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty())).expect("a flag");
}

fn reads_well(uri: &str) {
    let commands = ["-r", "-f", "raw", "-c", "read -P 0x11 1M 1M", uri];
    let read = output("qemu-io", &commands);
    assert!(!read.contains("failed"), "{read}");
}

#[test]
fn a_service_managers_sockets_are_served() {
    let place = Place::new();
    let path = place.path("socket");
    let unix = UnixListener::bind(&path).expect("a socket");
    keep_across_exec(&unix);
    let server = activate(&place, unix.as_raw_fd());
    // Whoever connects before the server runs waits in the socket's queue.
    reads_well(&format!("nbd+unix:///?socket={path}"));
    drop(server);

    let tcp = TcpListener::bind("127.0.0.1:0").expect("a socket");
    keep_across_exec(&tcp);
    let port = tcp.local_addr().expect("an address").port();
    let _server = activate(&place, tcp.as_raw_fd());
    reads_well(&format!("nbd://127.0.0.1:{port}"));
}

#[test]
fn a_port_of_an_address_is_served() {
    let place = Place::new();
    // Free until somebody takes it; another try is made then.
    let served = (0..20).find_map(|_| {
        let free = TcpListener::bind("127.0.0.1:0").expect("a socket");
        let port = free.local_addr().expect("an address").port().to_string();
        drop(free);
        let (pid_file, image) = (place.path("pid"), place.path("a.qcow2"));
        let status = Command::new(OWN)
            .args(["-t", "-r", "--fork", "--pid-file", &pid_file])
            .args(["-b", "127.0.0.1", "-p", &port, "-f", "qcow2", &image])
            .status();
        let server = crate::Server {
            socket: place.path("none").into(),
            pid_file: pid_file.into(),
        };
        status.expect("it runs").success().then_some((server, port))
    });
    let (_server, port) = served.expect("a free port");
    reads_well(&format!("nbd://127.0.0.1:{port}"));
}
