//! `nbd` against other people's servers, and servers that mean harm.

use crate::rig::{filled, graph, open_root, options, read, refusal, run};
use block::{ByteRange, Errno, WriteFlags, ZeroFlags};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread::JoinHandle;
use tempfile::TempDir;

/// A server, ended when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Starts nbdkit on a socket in `dir`, and waits until it listens.
fn nbdkit(dir: &TempDir, arguments: &[&str]) -> (Server, PathBuf) {
    let socket = dir.path().join("socket");
    let pid_file = dir.path().join("pid");
    std::fs::remove_file(&pid_file).ok();
    std::fs::remove_file(&socket).ok();
    let mut command = Command::new("nbdkit");
    command
        .arg("-f")
        .arg("-U")
        .arg(&socket)
        .arg("-P")
        .arg(&pid_file);
    let child = command
        .args(arguments)
        .spawn()
        .expect("nbdkit is installed");
    let server = Server(child);
    let begin = std::time::Instant::now();
    // Written when it listens; nbdkit has no other sign of that.
    while !std::fs::read_to_string(&pid_file).is_ok_and(|pid| pid.ends_with('\n')) {
        assert!(begin.elapsed().as_secs() < 20, "nbdkit does not start");
        std::thread::yield_now();
    }
    (server, socket)
}

fn node(socket: &Path, more: Value) -> Value {
    let server = json!({"type": "unix", "path": socket});
    let mut definition = json!({"driver": "nbd", "node-name": "n", "server": server});
    let members = definition.as_object_mut().unwrap();
    members.extend(options(more));
    definition
}

#[test]
fn requests_of_all_kinds_reach_an_nbdkit_server() {
    let dir = TempDir::new().unwrap();
    let (_server, socket) = nbdkit(&dir, &["memory", "8M"]);
    run(async {
        let graph = graph();
        let node = graph.add(options(node(&socket, json!({})))).await.unwrap();
        assert_eq!(node.length(), 8 << 20);
        assert_eq!(
            node.filename(),
            format!("nbd+unix://?socket={}", socket.display())
        );
        let root = open_root(&node);
        let handle = root.attach();
        let data: Vec<u8> = (0..3_000_001_u32).map(|at| (at % 251) as u8).collect();
        handle
            .write(77, filled(&data), WriteFlags::default())
            .await
            .unwrap();
        assert!(read(&handle, 77, data.len()).await.unwrap() == data);
        let zeroed = ByteRange::new(1 << 20, 1 << 20);
        handle
            .write_zeroes(zeroed, ZeroFlags::default())
            .await
            .unwrap();
        assert!(
            read(&handle, 1 << 20, 1 << 20)
                .await
                .unwrap()
                .iter()
                .all(|byte| *byte == 0)
        );
        handle.flush().await.unwrap();
        let hole = node
            .block_status(ByteRange::new(4 << 20, 4 << 20))
            .await
            .unwrap();
        assert!(hole.status.zero && !hole.status.data, "{hole:?}");
        let written = node.block_status(ByteRange::new(0, 65536)).await.unwrap();
        assert!(written.status.data, "{written:?}");
        drop((handle, root, node));
        graph.remove("n").await.unwrap();
    });
}

/// Hands connections to an abstract socket on to the one at `path`.
fn forward(listener: &UnixListener, path: &Path) {
    let Ok((mut client, _)) = listener.accept() else {
        return;
    };
    let mut server = UnixStream::connect(path).unwrap();
    let (mut from_client, mut to_server) =
        (client.try_clone().unwrap(), server.try_clone().unwrap());
    let requests = std::thread::spawn(move || {
        std::io::copy(&mut from_client, &mut to_server).ok();
        to_server.shutdown(std::net::Shutdown::Write).ok();
    });
    std::io::copy(&mut server, &mut client).ok();
    requests.join().unwrap();
}

#[test]
fn a_server_without_a_file_is_reached_by_its_abstract_name() {
    let dir = TempDir::new().unwrap();
    let (_server, socket) = nbdkit(&dir, &["memory", "1M"]);
    for is_tight in [true, false] {
        let name = format!("outboard-nbd-{}", std::process::id());
        let mut bytes = name.clone().into_bytes();
        if !is_tight {
            bytes.resize(107, 0);
        }
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&bytes).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let to = socket.clone();
        let forwarding = std::thread::spawn(move || forward(&listener, &to));
        run(async {
            let graph = graph();
            let server = json!({"type": "unix", "path": name, "abstract": true, "tight": is_tight});
            let definition = json!({"driver": "nbd", "node-name": "n", "server": server});
            let node = graph.add(options(definition)).await.unwrap();
            assert_eq!(node.length(), 1 << 20);
            assert!(node.filename().starts_with("json:{"), "{}", node.filename());
            drop(node);
            graph.remove("n").await.unwrap();
        });
        forwarding.join().unwrap();
    }
    let long = json!({"type": "unix", "path": "x".repeat(108), "abstract": "on"});
    let refused = run(async {
        let definition = json!({"driver": "nbd", "node-name": "n", "server": long});
        refusal(&graph(), definition).await
    });
    assert!(refused.contains("too long"), "{refused}");
}

#[test]
fn the_servers_errors_are_those_of_the_request() {
    let dir = TempDir::new().unwrap();
    let error = ["--filter=error", "memory", "1M", "error=ENOSPC"];
    let (_server, socket) = nbdkit(&dir, &[&error[..], &["error-pwrite-rate=100%"]].concat());
    run(async {
        let graph = graph();
        let node = graph.add(options(node(&socket, json!({})))).await.unwrap();
        let root = open_root(&node);
        let handle = root.attach();
        let refused = handle
            .write(0, filled(&[1; 512]), WriteFlags::default())
            .await;
        assert_eq!(refused, Err(Errno::ENOSPC));
        assert!(
            read(&handle, 0, 512).await.is_ok(),
            "the connection goes on"
        );
        drop((handle, root, node));
        graph.remove("n").await.unwrap();
    });
}

#[test]
fn a_request_outlives_its_connection_when_there_is_time_to_reconnect() {
    let dir = TempDir::new().unwrap();
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![9; 1 << 20]).unwrap();
    let file = format!("file={}", disk.display());
    let (server, socket) = nbdkit(&dir, &["file", &file]);
    run(async {
        let graph = graph();
        let lasting = graph
            .add(options(node(&socket, json!({"reconnect-delay": 30}))))
            .await
            .unwrap();
        let root = open_root(&lasting);
        let handle = root.attach();
        drop(server);
        let reading = executor::spawn(async move { read(&handle, 0, 4096).await });
        let (_server, _) = nbdkit(&dir, &["file", &file]);
        assert_eq!(reading.await.unwrap(), vec![9; 4096]);
        drop((root, lasting));
        graph.remove("n").await.unwrap();
    });
}

#[test]
fn without_a_delay_a_lost_connection_fails_requests() {
    let dir = TempDir::new().unwrap();
    let (server, socket) = nbdkit(&dir, &["memory", "1M"]);
    run(async {
        let graph = graph();
        let node = graph.add(options(node(&socket, json!({})))).await.unwrap();
        let root = open_root(&node);
        let handle = root.attach();
        drop(server);
        assert_eq!(read(&handle, 0, 4096).await, Err(Errno::EIO));
        drop((handle, root, node));
        let closed = graph.remove("n").await;
        assert!(closed.is_err(), "what was not flushed is not flushed");
    });
}

/// A server that says `words` to the next client, after each of which it takes some bytes.
fn hostile(dir: &TempDir, words: Vec<(Vec<u8>, usize)>) -> (PathBuf, JoinHandle<()>) {
    let socket = dir.path().join("hostile");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        for (said, taken) in words {
            if stream.write_all(&said).is_err() {
                return;
            }
            let mut heard = vec![0; taken];
            if stream.read_exact(&mut heard).is_err() {
                return;
            }
        }
        // The client hangs up.
        stream.read_to_end(&mut Vec::new()).ok();
    });
    (socket, server)
}

/// An oldstyle greeting: a disk of 1 MiB, then transmission at once.
fn oldstyle() -> Vec<u8> {
    let mut greeting = b"NBDMAGIC".to_vec();
    greeting.extend(0x0000_4202_8186_1253_u64.to_be_bytes());
    greeting.extend((1_u64 << 20).to_be_bytes());
    greeting.extend(1_u32.to_be_bytes());
    greeting.extend([0; 124]);
    greeting
}

/// A simple reply.
fn reply(magic: u32, cookie: u64) -> Vec<u8> {
    let mut reply = magic.to_be_bytes().to_vec();
    reply.extend(0_u32.to_be_bytes());
    reply.extend(cookie.to_be_bytes());
    reply
}

#[test]
fn replies_that_fit_no_request_end_the_connection() {
    let replies = [
        reply(0x6744_6698, 77),
        reply(0x1234_5678, 1),
        vec![0xff; 64],
    ];
    for answer in replies {
        let dir = TempDir::new().unwrap();
        let words = vec![(oldstyle(), 28), (answer, 0)];
        let (socket, server) = hostile(&dir, words);
        run(async {
            let graph = graph();
            let definition = node(&socket, json!({"reconnect-delay": 30}));
            let node = graph.add(options(definition)).await.unwrap();
            let root = open_root(&node);
            let handle = root.attach();
            assert_eq!(read(&handle, 0, 512).await, Err(Errno::EIO));
            assert_eq!(read(&handle, 0, 512).await, Err(Errno::EIO), "for good");
            drop((handle, root, node));
            graph.remove("n").await.unwrap();
        });
        server.join().unwrap();
    }
}

#[test]
fn a_handshake_that_makes_no_sense_is_an_error() {
    let newstyle = b"NBDMAGICIHAVEOPT\x00\x01".to_vec();
    let mut endless = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    endless.extend(11_u32.to_be_bytes());
    endless.extend(1_u32.to_be_bytes());
    endless.extend(u32::MAX.to_be_bytes());
    let conversations = [
        vec![(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(), 0)],
        vec![(newstyle.clone(), 4 + 16), (endless, 0)],
        vec![(newstyle.clone(), 4 + 16), (vec![0; 20], 0)],
        vec![(b"NBDMAGIC".to_vec(), 0), (vec![1; 8], 0)],
    ];
    for words in conversations {
        let dir = TempDir::new().unwrap();
        let (socket, server) = hostile(&dir, words);
        run(async {
            let graph = graph();
            let error = graph
                .add(options(node(&socket, json!({}))))
                .await
                .map(drop)
                .unwrap_err();
            assert!(error.message.starts_with("Failed to negotiate"), "{error}");
            assert!(graph.nodes().is_empty());
        });
        server.join().unwrap();
    }
}
