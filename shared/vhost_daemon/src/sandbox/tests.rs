use super::*;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Runs `probe` on a thread in a sandbox that knows `directory`. Only that thread is restricted.
fn inside<T: Send + 'static>(
    directory: &Path,
    probe: impl FnOnce() -> T + Send + 'static,
) -> (Paths, T) {
    let policy = Policy {
        file_dirs: vec![directory.join("files")],
        socket_dirs: vec![directory.join("sockets")],
        ..Policy::default()
    };
    for path in policy.file_dirs.iter().chain(&policy.socket_dirs) {
        std::fs::create_dir_all(path).unwrap();
    }
    let sandbox = Sandbox::prepare(Mode::On, &policy).unwrap().unwrap();
    let thread = std::thread::spawn(move || (sandbox.enter().unwrap(), probe()));
    thread.join().unwrap()
}

fn directory(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("outboard-sandbox-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

#[test]
fn only_paths_of_the_policy_open() {
    let root = directory("paths");
    let at = root.clone();
    let (paths, (outside, file, socket, wrong_kind)) = inside(&root, move || {
        (
            std::fs::read("/etc/passwd").map(drop),
            std::fs::write(at.join("files/new"), b"x"),
            UnixListener::bind(at.join("sockets/s")).map(drop),
            std::fs::write(at.join("sockets/new"), b"x"),
        )
    });
    std::fs::remove_dir_all(&root).unwrap();
    if paths == Paths::Unrestricted {
        println!("skipped: this kernel has no Landlock");
        return;
    }
    assert_eq!(outside.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    file.unwrap();
    socket.unwrap();
    assert_eq!(
        wrong_kind.unwrap_err().kind(),
        io::ErrorKind::PermissionDenied
    );
}

#[test]
fn processes_tcp_and_executable_memory_are_refused_and_threads_are_not() {
    let root = directory("syscalls");
    let (_, (process, tcp, thread, capabilities)) = inside(&root, || {
        let thread = std::thread::Builder::new().name("later".into());
        (
            std::process::Command::new("/bin/true").spawn().map(drop),
            TcpListener::bind("127.0.0.1:0").map(drop),
            thread.spawn(|| std::fs::read("/etc/passwd").is_err()),
            caps::read(None, CapSet::Permitted),
        )
    });
    std::fs::remove_dir_all(&root).unwrap();
    assert!(process.is_err());
    assert!(tcp.is_err());
    thread.unwrap().join().unwrap();
    // Reading capabilities is itself no longer allowed.
    assert!(capabilities.is_err());
}

#[test]
fn only_ports_of_the_policy_are_connected_to() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let (known, unknown) = (listener.local_addr().unwrap(), other.local_addr().unwrap());
    let policy = Policy {
        tcp_peers: vec![known.port()],
        ..Policy::default()
    };
    let sandbox = Sandbox::prepare(Mode::On, &policy).unwrap().unwrap();
    let probe = move || {
        let paths = sandbox.enter().unwrap();
        let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").map(drop);
        let connect = |address| TcpStream::connect(address).map(drop);
        (paths, connect(known), connect(unknown), datagrams)
    };
    let (paths, known, unknown, datagrams) = std::thread::spawn(probe).join().unwrap();
    known.unwrap();
    assert!(datagrams.is_err());
    // Landlock before its fourth version knows no ports.
    if paths == Paths::Restricted {
        assert!(unknown.is_err());
    }
}

#[test]
fn a_missing_directory_is_an_error_that_names_it() {
    let policy = Policy {
        file_dirs: vec!["/nonexistent/dir".into()],
        ..Policy::default()
    };
    let Err(error) = Sandbox::prepare(Mode::On, &policy) else {
        panic!("prepared");
    };
    assert_eq!(
        error.to_string(),
        "cannot open directory '/nonexistent/dir'"
    );
    assert!(matches!(Sandbox::prepare(Mode::Off, &policy), Ok(None)));
}

#[test]
fn the_allow_list_stays_small() {
    assert!(syscalls::count() <= 60, "{}", syscalls::count());
}
