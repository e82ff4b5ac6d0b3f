use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;

use executor::net::poll_fd;

use crate::frame::{MAX_FRAME, VnetHeader};
use crate::link::{DropReason, NetQueue, Received};
use crate::netdev::Netdev;
use crate::netdevs::test_support::*;

/// A frame as it is on the wire.
fn wire(bytes: &[u8]) -> Vec<u8> {
    let mut wire = (bytes.len() as u32).to_be_bytes().to_vec();
    wire.extend(bytes);
    wire
}

/// A server back-end in a directory of its own, with a connected queue.
struct Scene {
    directory: tempfile::TempDir,
    netdev: Rc<dyn Netdev>,
    queue: Rc<dyn NetQueue>,
    sink: Rc<TestSink>,
}

impl Scene {
    fn server(credit: usize) -> Scene {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("net");
        let text = format!(
            "stream,server=on,addr.type=unix,addr.path={}",
            path.display()
        );
        let netdev = open(&text).unwrap();
        let queue = queue(&*netdev, 0);
        let sink = TestSink::new(credit);
        queue.connect(sink.clone());
        Scene {
            directory,
            netdev,
            queue,
            sink,
        }
    }

    /// A peer whose connection is there.
    async fn peer(&self) -> UnixStream {
        let before = self.netdev.details()["connections"].as_u64().unwrap();
        let peer = UnixStream::connect(self.directory.path().join("net")).unwrap();
        while self.netdev.details()["connections"] == before {
            self.queue.receive(1).unwrap();
            executor::time::yield_now().await;
        }
        peer
    }

    async fn receive(&self, count: usize) {
        receive_until(&*self.queue, &self.sink, |sink| {
            sink.frames.borrow().len() == count
        })
        .await;
    }

    /// Receives until the connection has ended.
    async fn until_lost(&self) {
        while self.netdev.details()["connected"] == true {
            self.queue.readable().await;
            self.queue.receive(32).unwrap();
        }
    }

    /// What becomes of one more frame for the network.
    fn drop_reasons(&self) -> Vec<DropReason> {
        let mut reasons = Vec::new();
        with_frame(VnetHeader::default(), &frame_bytes(1, 60), |frame| {
            self.queue
                .transmit(&[*frame], &mut |reason| reasons.push(reason))
        });
        reasons
    }
}

/// Reads exactly `len` bytes of a peer's that another task writes.
async fn read_exactly(peer: &mut (impl Read + AsFd), len: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < len {
        poll_fd(peer.as_fd(), libc::POLLIN).await.unwrap();
        let mut part = vec![0; len - all.len()];
        let count = peer.read(&mut part).unwrap();
        assert!(
            count > 0,
            "the stream ends after {} of {len} bytes",
            all.len()
        );
        all.extend(&part[..count]);
    }
    all
}

/// Whether fewer than 1000 bytes are there to read.
fn peer_is_empty(peer: &UnixStream) -> bool {
    use nix::sys::socket::{MsgFlags, recv};
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let fd = std::os::fd::AsRawFd::as_raw_fd(peer);
    recv(fd, &mut [0; 1000], flags).unwrap_or(0) < 1000
}

#[test]
fn frames_go_both_ways_after_their_lengths() {
    on_executor(async {
        let scene = Scene::server(100);
        assert_eq!(scene.drop_reasons(), [DropReason::LinkDown]);
        let mut peer = scene.peer().await;
        let frames: Vec<_> = [14, 60, 1514, 65_549].map(|len| frame_bytes(3, len)).into();
        for bytes in &frames {
            send(&*scene.queue, bytes);
            assert_eq!(read_exactly(&mut peer, 4 + bytes.len()).await, wire(bytes));
            peer.write_all(&wire(bytes)).unwrap();
        }
        scene.receive(frames.len()).await;
        assert_eq!(scene.sink.bytes(), frames);
        assert_eq!(scene.sink.frames.borrow()[0].0, VnetHeader::default());
        assert!(scene.netdev.attach(&attachment("p1", 1), 0).is_err());
    });
}

#[test]
fn a_peer_that_sends_byte_by_byte_is_understood() {
    on_executor(async {
        let scene = Scene::server(100);
        let mut peer = scene.peer().await;
        let frames: Vec<_> = (1..=5).map(|seed| frame_bytes(seed, 20)).collect();
        for byte in frames.iter().flat_map(|bytes| wire(bytes)) {
            peer.write_all(&[byte]).unwrap();
            scene.queue.receive(32).unwrap();
        }
        assert_eq!(scene.sink.bytes(), frames);
    });
}

#[test]
fn impossible_lengths_end_the_connection_and_the_next_one_works() {
    on_executor(async {
        let scene = Scene::server(100);
        for (round, len) in [MAX_FRAME as u32 + 1, 0x8000_0000, u32::MAX]
            .into_iter()
            .enumerate()
        {
            let mut peer = scene.peer().await;
            peer.write_all(&wire(&frame_bytes(round as u8, 60)))
                .unwrap();
            peer.write_all(&len.to_be_bytes()).unwrap();
            peer.write_all(&[0; 1000]).unwrap();
            scene.until_lost().await;
            assert_eq!(scene.sink.frames.borrow().len(), round + 1);
            assert_eq!(scene.netdev.details()["wrong-lengths"], round as u64 + 1);
        }
        // Runts are for the sink to refuse, and end nothing.
        let mut peer = scene.peer().await;
        for len in [0, 1, 13, 60] {
            peer.write_all(&wire(&frame_bytes(9, 60)[..len])).unwrap();
        }
        scene.receive(4).await;
        assert_eq!(*scene.sink.dropped.borrow(), [DropReason::TooShort; 3]);
    });
}

#[test]
fn a_frame_cut_off_by_the_end_is_forgotten() {
    on_executor(async {
        let scene = Scene::server(100);
        let bytes = frame_bytes(1, 600);
        for cut in [1, 4, 5, 400, 603] {
            let mut peer = scene.peer().await;
            peer.write_all(&wire(&bytes)[..cut]).unwrap();
            drop(peer);
            scene.until_lost().await;
        }
        let mut peer = scene.peer().await;
        peer.write_all(&wire(&bytes)).unwrap();
        scene.receive(1).await;
        assert_eq!(scene.sink.bytes(), [bytes]);
    });
}

#[test]
fn a_peer_that_does_not_read_holds_frames_up_and_gets_all_in_order() {
    on_executor(async {
        let scene = Scene::server(0);
        let mut peer = scene.peer().await;
        let frames: Vec<_> = (0..200)
            .map(|seed| frame_bytes(seed, 3000 + 37 * usize::from(seed)))
            .collect();
        let mut sent = 0;
        let mut expected = Vec::new();
        let mut held_up = 0;
        let mut read = Vec::new();
        while sent < frames.len() {
            let taken = with_frame(VnetHeader::default(), &frames[sent], |frame| {
                scene
                    .queue
                    .transmit(&[*frame], &mut |reason| panic!("{reason:?}"))
            });
            if taken == 1 {
                expected.extend(wire(&frames[sent]));
                sent += 1;
                continue;
            }
            held_up += 1;
            // A unix socket counts as writable once it is nearly empty.
            while !peer_is_empty(&peer) {
                read.extend(read_exactly(&mut peer, 1000).await);
            }
            scene.queue.writable().await;
        }
        assert!(held_up > 3, "the socket took everything");
        let rest = expected.len() - read.len();
        // The last frame's rest goes without another word from the guest.
        read.extend(read_exactly(&mut peer, rest).await);
        assert!(read == expected, "the stream is what was sent");
    });
}

#[test]
fn a_whole_burst_goes_at_once_and_frames_of_many_pieces_too() {
    on_executor(async {
        let scene = Scene::server(0);
        let mut peer = scene.peer().await;
        let bytes = frame_bytes(7, 64);
        let frames: Vec<_> = (0..100)
            .map(|_| crate::frame::Frame::new(VnetHeader::default(), &bytes))
            .collect();
        let sent = scene
            .queue
            .transmit(&frames, &mut |reason| panic!("{reason:?}"));
        assert_eq!(sent, 100);
        assert_eq!(
            read_exactly(&mut peer, 100 * 68).await,
            wire(&bytes).repeat(100)
        );
        let long = frame_bytes(8, 9000);
        let (head, tail) = long.split_at(192);
        let pieces: Vec<_> = tail.chunks(7).map(crate::netdevs::vectors::piece).collect();
        assert!(pieces.len() > 1024);
        #[expect(unsafe_code, reason = "a frame in pieces")]
        // SAFETY: the pieces are parts of `long`.
        let scattered =
            unsafe { crate::frame::Frame::with_tail(VnetHeader::default(), head, &pieces) };
        let sent = scene
            .queue
            .transmit(&[frames[0], scattered, frames[0]], &mut |reason| {
                panic!("{reason:?}")
            });
        assert_eq!(sent, 3);
        let all = [wire(&bytes), wire(&long), wire(&bytes)].concat();
        assert_eq!(read_exactly(&mut peer, all.len()).await, all);
    });
}

#[test]
fn a_guest_without_buffers_loses_nothing() {
    on_executor(async {
        let scene = Scene::server(0);
        let mut peer = scene.peer().await;
        let frames: Vec<_> = (0..50).map(|seed| frame_bytes(seed, 900)).collect();
        for bytes in &frames {
            peer.write_all(&wire(bytes)).unwrap();
        }
        scene.queue.readable().await;
        assert_eq!(scene.queue.receive(32).unwrap(), Received::NotReady);
        while scene.sink.frames.borrow().len() < frames.len() {
            scene.sink.give_credit(3);
            scene.queue.receive(32).unwrap();
        }
        assert_eq!(scene.sink.bytes(), frames);
    });
}

#[test]
fn a_client_connects_again_and_frames_keep_their_order() {
    on_executor(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("peer");
        let text = format!(
            "stream,addr.type=unix,addr.path={},reconnect-ms=20",
            path.display()
        );
        // Nobody is there yet.
        let netdev = open(&text).unwrap();
        let queue = queue(&*netdev, 0);
        let sink = TestSink::new(1000);
        queue.connect(sink.clone());
        let mut expected = Vec::new();
        for round in 0..3 {
            let listener = UnixListener::bind(&path).unwrap();
            poll_fd(listener.as_fd(), libc::POLLIN).await.unwrap();
            let mut peer = listener.accept().unwrap().0;
            for seed in 0..10 {
                expected.push(frame_bytes(10 * round + seed, 100));
                peer.write_all(&wire(expected.last().unwrap())).unwrap();
            }
            let count = expected.len();
            receive_until(&*queue, &sink, |sink| sink.frames.borrow().len() == count).await;
            send(&*queue, &expected[0]);
            assert_eq!(read_exactly(&mut peer, 104).await, wire(&expected[0]));
            drop((peer, listener));
            std::fs::remove_file(&path).unwrap();
            while netdev.details()["connected"] == true {
                queue.readable().await;
                queue.receive(32).unwrap();
            }
        }
        assert_eq!(sink.bytes(), expected);
    });
}

#[test]
fn a_port_that_goes_leaves_the_back_end_to_the_next() {
    on_executor(async {
        let Scene {
            directory,
            netdev,
            queue: first,
            ..
        } = Scene::server(10);
        drop(first);
        // The queue's task goes at the next turn.
        executor::time::yield_now().await;
        let queue = queue(&*netdev, 0);
        let sink = TestSink::new(10);
        queue.connect(sink.clone());
        let mut peer = UnixStream::connect(directory.path().join("net")).unwrap();
        peer.write_all(&wire(&frame_bytes(1, 60))).unwrap();
        receive_until(&*queue, &sink, |sink| sink.frames.borrow().len() == 1).await;
        drop(queue);
        executor::time::yield_now().await;
        drop(netdev);
        assert!(!directory.path().join("net").exists());
    });
}

#[test]
fn tcp_and_descriptors_are_streams_too() {
    on_executor(async {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = open(&format!(
            "stream,addr.type=inet,addr.host=127.0.0.1,addr.port={port}"
        ))
        .unwrap();
        let mut accepted: TcpStream = listener.accept().unwrap().0;
        let (ours, mut other) = UnixStream::pair().unwrap();
        let given = open_with("stream,addr.type=fd,addr.str=x", vec![("x", ours.into())]).unwrap();
        let (tcp_sink, fd_sink) = (TestSink::new(1), TestSink::new(1));
        let (tcp, fd) = (queue(&*client, 0), queue(&*given, 0));
        tcp.connect(tcp_sink.clone());
        fd.connect(fd_sink.clone());
        let bytes = frame_bytes(1, 60);
        accepted.write_all(&wire(&bytes)).unwrap();
        other.write_all(&wire(&bytes)).unwrap();
        receive_until(&*tcp, &tcp_sink, |sink| sink.bytes() == [bytes.clone()]).await;
        receive_until(&*fd, &fd_sink, |sink| sink.bytes() == [bytes.clone()]).await;
        send(&*tcp, &bytes);
        assert_eq!(read_exactly(&mut accepted, 64).await, wire(&bytes));
        // A connection that is gone for good: frames are dropped, nothing fails.
        drop(other);
        while given.details()["connected"] == true {
            fd.readable().await;
            fd.receive(1).unwrap();
        }
        let mut reasons = Vec::new();
        with_frame(VnetHeader::default(), &bytes, |frame| {
            fd.transmit(&[*frame], &mut |reason| reasons.push(reason))
        });
        assert_eq!(reasons, [DropReason::LinkDown]);
    });
}

#[test]
fn options_that_make_no_sense_are_refused() {
    on_executor(async {
        for (text, why) in [
            ("stream", "Parameter 'addr' is missing"),
            (
                "stream,addr.type=unix,addr.path=/nonexistent/socket",
                "cannot connect to '/nonexistent/socket'",
            ),
            (
                "stream,server=on,addr.type=unix,addr.path=/nonexistent/socket",
                "cannot listen at '/nonexistent/socket'",
            ),
            (
                "stream,server=on,reconnect=1,addr.type=unix,addr.path=/x",
                "'reconnect' is for clients",
            ),
            (
                "stream,reconnect=1,reconnect-ms=1,addr.type=unix,addr.path=/x",
                "does not go with",
            ),
            (
                "stream,addr.type=fd,addr.str=9,reconnect=1",
                "cannot be connected again",
            ),
            (
                "stream,addr.type=inet,addr.host=127.0.0.1,addr.port=http",
                "'http' is no port number",
            ),
        ] {
            let error = open_error(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    });
}
