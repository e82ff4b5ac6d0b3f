//! Sockets on the real ring.
#![expect(clippy::unwrap_used, reason = "tests")]

use executor::net::{Listener, Part, Stream, poll_fd};
use executor::{Buffer, Config, Errno, Executor, spawn, time};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

fn real() -> Executor {
    Executor::new(&Config::default()).unwrap()
}

fn pair() -> (Stream, Stream) {
    let (left, right) = UnixStream::pair().unwrap();
    // The ring must wait on sockets that are non-blocking, too.
    left.set_nonblocking(true).unwrap();
    let left = Stream::from_fd(left.into()).unwrap();
    (left, Stream::from_fd(right.into()).unwrap())
}

fn pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    std::io::pipe().unwrap()
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    drop(Listener::bind_unix(&path).unwrap());
    let _live = Listener::bind_unix(&path).unwrap();
    let error = Listener::bind_unix(&path).err().unwrap();
    assert_eq!(error.raw_os_error(), Some(libc::EADDRINUSE));
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(Listener::bind_unix(&file).is_err());
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}

#[test]
fn connections_carry_large_transfers_both_ways() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let data: Vec<u8> = (0..3_000_000u32).map(|at| (at / 3) as u8).collect();
    real().block_on(async {
        let listener = Listener::bind_unix(&path).unwrap();
        let expected = data.clone();
        let server = spawn(async move {
            let stream = listener.accept().await.unwrap();
            let mut received = Vec::new();
            while received.len() < expected.len() {
                received.extend(stream.recv(100_000).await.unwrap());
            }
            assert!(received == expected);
            stream.send_all(received).await.unwrap();
        });
        let client = Stream::connect_unix(&path).await.unwrap();
        client.send_all(data.clone()).await.unwrap();
        let mut back = Vec::new();
        loop {
            let part = client.recv(1 << 20).await.unwrap();
            if part.is_empty() {
                break;
            }
            back.extend(part);
        }
        assert!(back == data);
        server.await;
    });
}

#[test]
fn descriptors_arrive_and_too_many_are_refused_and_closed() {
    real().block_on(async {
        let (left, right) = pair();
        let (mut reader, writer) = pipe();
        let fds = [writer.as_fd(); 2];
        left.send_with_fds(b"hello".to_vec(), &fds).await.unwrap();
        let (data, fds) = right.recv_with_fds(100, 2).await.unwrap();
        assert_eq!((&data[..], fds.len()), (&b"hello"[..], 2));
        drop(writer);
        for fd in fds {
            std::fs::File::from(fd).write_all(b"x").unwrap();
        }
        let mut text = String::new();
        // Ends, because no copy of the writing end is left.
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "xx");

        let (mut reader, writer) = pipe();
        let fds = [writer.as_fd(); 3];
        left.send_with_fds(b"!".to_vec(), &fds).await.unwrap();
        drop(writer);
        assert_eq!(
            right.recv_with_fds(100, 1).await.err(),
            Some(Errno::EMSGSIZE)
        );
        reader.read_to_string(&mut text).unwrap();
    });
}

#[test]
fn descriptors_of_a_dropped_receive_are_closed() {
    let executor = real();
    let (left, right) = pair();
    let (mut reader, writer) = pipe();
    executor.block_on(async {
        let timed_out = time::timeout(Duration::ZERO, right.recv_with_fds(10, 1)).await;
        assert!(timed_out.is_none());
        let fds = [writer.as_fd()];
        left.send_with_fds(b"x".to_vec(), &fds).await.unwrap();
    });
    drop((executor, left, right, writer));
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
}

#[test]
fn waits_end_when_the_executor_goes() {
    let directory = tempfile::tempdir().unwrap();
    let listener = Listener::bind_unix(&directory.path().join("socket")).unwrap();
    let (_left, right) = pair();
    let executor = real();
    executor.block_on(async {
        spawn(async move { listener.accept().await.map(drop) });
        spawn(async move { right.recv(1).await.map(drop) });
        let blocked = pair();
        spawn(async move { blocked.0.send_all(vec![0; 10_000_000]).await });
        time::sleep(Duration::from_millis(1)).await;
    });
    drop(executor);
}

#[test]
fn shutting_down_ends_a_receive() {
    real().block_on(async {
        let (_left, right) = pair();
        let right = std::rc::Rc::new(right);
        let receiver = std::rc::Rc::clone(&right);
        let receive = spawn(async move { receiver.recv(10).await });
        time::yield_now().await;
        right.shutdown();
        assert_eq!(receive.await, Ok(Vec::new()));
    });
}

#[test]
fn readiness_is_seen_and_a_dropped_wait_is_gone() {
    real().block_on(async {
        let (reader, mut writer) = pipe();
        let wait = poll_fd(reader.as_fd(), libc::POLLIN);
        assert!(
            time::timeout(Duration::from_millis(1), wait)
                .await
                .is_none()
        );
        writer.write_all(b"x").unwrap();
        let seen = poll_fd(reader.as_fd(), libc::POLLIN).await.unwrap();
        assert_eq!(seen & libc::POLLIN, libc::POLLIN);
        let fd = OwnedFd::from(reader);
        drop(fd);
    });
}

#[test]
fn parts_are_sent_in_order_and_fill_a_buffer_over_tcp() {
    const HALF: usize = 1_500_000;
    real().block_on(async {
        let listener = Listener::bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_address().unwrap();
        let server = spawn(async move {
            let stream = listener.accept().await.unwrap();
            assert!(stream.peer_address().is_some());
            let buffer = Buffer::zeroed(5 + 2 * HALF);
            let count = stream.recv_exact(buffer.clone()).await.unwrap();
            assert_eq!(count, buffer.len());
            let rest = Buffer::zeroed(10);
            // The end of the stream comes first.
            assert_eq!(stream.recv_exact(rest.clone()).await, Ok(3));
            buffer.to_heap()
        });
        let client = Stream::connect_tcp(address).await.unwrap();
        let (first, second) = (Buffer::zeroed(HALF), Buffer::zeroed(HALF));
        first.fill(1);
        second.fill(2);
        let parts = vec![
            Part::Bytes(b"hello".to_vec()),
            Part::Buffer(first),
            Part::Bytes(Vec::new()),
            Part::Buffer(second),
        ];
        client.send_parts(parts).await.unwrap();
        client.send_parts(Vec::new()).await.unwrap();
        client
            .send_parts(vec![Part::Bytes(b"end".to_vec())])
            .await
            .unwrap();
        client.shutdown();
        let received = server.await;
        assert_eq!(&received[..5], b"hello");
        assert!(received[5..5 + HALF].iter().all(|byte| *byte == 1));
        assert!(received[5 + HALF..].iter().all(|byte| *byte == 2));
    });
}

#[test]
fn a_dropped_fill_leaves_the_executor_free_to_end() {
    real().block_on(async {
        let (_left, right) = pair();
        let fill = right.recv_exact(Buffer::zeroed(10));
        let ended = time::timeout(Duration::from_millis(1), fill).await;
        assert!(ended.is_none());
    });
}
