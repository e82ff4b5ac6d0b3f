//! What tests of back-ends share: a guest that is a list of frames, and network namespaces of their own.

#![expect(
    unsafe_code,
    reason = "the guest's buffers are handed out as raw pieces; namespaces are system calls"
)]

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use executor::sync::Notify;
use executor::{Config, Executor, Handle};

use super::Context;
use crate::frame::{Frame, HEAD_LEN, MAX_FRAME, MacAddress, VnetHeader};
use crate::link::{Delivery, DropReason, LocalFuture, NetQueue, Offloads, Received, Sink};
use crate::netdev::{Attachment, Netdev, Notice, VlanMode};

/// A guest's receiving half.
#[derive(Default)]
pub(crate) struct TestSink {
    pub(crate) offloads: Cell<Offloads>,
    /// Frames that it still takes.
    pub(crate) credit: Cell<usize>,
    /// Most bytes of a frame that reserved buffers hold.
    pub(crate) reserve_limit: Cell<usize>,
    /// What it was given.
    pub(crate) frames: RefCell<Vec<(VnetHeader, Vec<u8>)>>,
    pub(crate) dropped: RefCell<Vec<DropReason>>,
    pub(crate) flushes: Cell<usize>,
    /// Frames that came through `reserve`.
    pub(crate) in_place: Cell<usize>,
    changed: Notify,
    /// Reserved buffers: pieces of this many bytes.
    memory: RefCell<Vec<Box<[u8]>>>,
}

const PIECE: usize = 700;

impl TestSink {
    pub(crate) fn new(credit: usize) -> Rc<TestSink> {
        let sink = TestSink::default();
        sink.credit.set(credit);
        sink.reserve_limit.set(MAX_FRAME);
        Rc::new(sink)
    }

    pub(crate) fn give_credit(&self, credit: usize) {
        self.credit.set(self.credit.get() + credit);
        self.changed.notify_all();
    }

    /// The frames without their headers.
    pub(crate) fn bytes(&self) -> Vec<Vec<u8>> {
        let frames = self.frames.borrow();
        frames.iter().map(|(_, bytes)| bytes.clone()).collect()
    }

    fn take(&self, header: VnetHeader, bytes: Vec<u8>) -> Delivery {
        if bytes.len() < 14 {
            self.dropped.borrow_mut().push(DropReason::TooShort);
            return Delivery::Dropped(DropReason::TooShort);
        }
        if bytes.len() > MAX_FRAME {
            self.dropped.borrow_mut().push(DropReason::TooLong);
            return Delivery::Dropped(DropReason::TooLong);
        }
        if self.credit.get() == 0 {
            return Delivery::NotReady(DropReason::NoBuffers);
        }
        self.credit.set(self.credit.get() - 1);
        self.frames.borrow_mut().push((header, bytes));
        Delivery::Taken
    }
}

impl Sink for TestSink {
    fn offloads(&self) -> Offloads {
        self.offloads.get()
    }

    fn ready(&self) -> bool {
        self.credit.get() > 0
    }

    fn until_ready(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            loop {
                let changed = self.changed.notified();
                if self.ready() {
                    return;
                }
                changed.await;
            }
        })
    }

    fn deliver(&self, frame: &Frame<'_>) -> Delivery {
        let mut bytes = Vec::new();
        frame.append_to(&mut bytes, frame.len());
        self.take(frame.header, bytes)
    }

    fn reserve(&self, len: usize, buffers: &mut Vec<libc::iovec>) -> usize {
        if !self.ready() {
            return 0;
        }
        let mut left = VnetHeader::LEN + len.min(self.reserve_limit.get());
        let all = left;
        let mut memory = self.memory.borrow_mut();
        memory.clear();
        while left > 0 {
            memory.push(vec![0xee; PIECE.min(left)].into());
            left -= PIECE.min(left);
        }
        buffers.extend(memory.iter_mut().map(|piece| libc::iovec {
            iov_base: piece.as_mut_ptr().cast(),
            iov_len: piece.len(),
        }));
        all
    }

    fn commit(&self, written: usize) -> Delivery {
        let bytes = self.memory.borrow().concat();
        let (header, bytes) = bytes[..written].split_first_chunk().unwrap();
        self.in_place.set(self.in_place.get() + 1);
        self.take(VnetHeader::from_bytes(header), bytes.to_vec())
    }

    fn flush(&self) {
        self.flushes.set(self.flushes.get() + 1);
    }
}

/// Runs `test` on an executor of a thread in a network namespace of its own. Says why when there is none.
pub(crate) fn in_namespace<T, F>(test: T)
where
    T: FnOnce() -> F + Send + 'static,
    F: Future<Output = ()>,
{
    let thread = std::thread::spawn(move || {
        // SAFETY: changes the namespace of this thread only, which ends with the test.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            let error = std::io::Error::last_os_error();
            println!("skipped: no network namespace can be made: {error}");
            return;
        }
        run(["ip", "link", "set", "lo", "up"]);
        on_executor(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `test` on an executor of this thread; a test that hangs fails.
pub(crate) fn on_executor(test: impl Future<Output = ()>) {
    let config = Config {
        poll_max: Duration::ZERO,
        ..Config::default()
    };
    let executor = Executor::new(&config).unwrap();
    let limited = executor::time::timeout(Duration::from_secs(20), test);
    executor.block_on(limited).expect("the test ends in time");
}

/// Runs a program in this thread's namespace and gives what it printed.
pub(crate) fn run<'a>(command: impl IntoIterator<Item = &'a str>) -> String {
    let words: Vec<&str> = command.into_iter().collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{words:?}: {complaint}");
    text
}

/// Opens a back-end from an option's text, with `descriptors` by name.
pub(crate) fn open_with(
    text: &str,
    descriptors: Vec<(&str, OwnedFd)>,
) -> anyhow::Result<Rc<dyn Netdev>> {
    let options = qmp::keyval::parse(text, Some("type"))?.parse()?;
    with_context(descriptors, Rc::new(|_| {}), |context| {
        super::open(&options, context)
    })
}

/// Calls `open` with what a back-end may ask for.
pub(crate) fn with_context<T>(
    descriptors: Vec<(&str, OwnedFd)>,
    notice: Rc<dyn Fn(Notice)>,
    open: impl FnOnce(&Context<'_>) -> T,
) -> T {
    let descriptors = RefCell::new(descriptors);
    let claim = |name: &str| {
        let mut descriptors = descriptors.borrow_mut();
        let at = descriptors.iter().position(|(known, _)| *known == name);
        let at = at.ok_or_else(|| anyhow::anyhow!("there is no descriptor '{name}'"))?;
        Ok(descriptors.remove(at).1)
    };
    let context = Context {
        id: "n0",
        descriptor: &claim,
        thread: &|_| Ok(Handle::current()),
        netdev: &|id| anyhow::bail!("no netdev '{id}'"),
        notice,
    };
    open(&context)
}

/// Opens a back-end from an option's text.
pub(crate) fn open(text: &str) -> anyhow::Result<Rc<dyn Netdev>> {
    open_with(text, Vec::new())
}

/// What is wrong with an option's text.
pub(crate) fn open_error(text: &str) -> String {
    match open(text) {
        Ok(netdev) => panic!("'{text}' opened a {}", netdev.kind()),
        Err(error) => format!("{error:#}"),
    }
}

/// A port named `port`.
pub(crate) fn attachment(port: &str, queues: u16) -> Attachment {
    Attachment {
        port: port.to_owned(),
        mac: MacAddress([0x52, 0x54, 0, 0, 0, 1]),
        queues,
        vlan: VlanMode::Transparent,
        isolated: false,
    }
}

/// Queue `index` of a port "p0", on this thread.
pub(crate) fn queue(netdev: &dyn Netdev, index: u16) -> Rc<dyn NetQueue> {
    let maker = netdev.attach(&attachment("p0", index + 1), index);
    maker.unwrap()().unwrap()
}

/// A broadcast frame of this length whose bytes count up from `seed`.
pub(crate) fn frame_bytes(seed: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xff; 6];
    bytes.extend([0x02, 0, 0, 0, 0, seed, 0x88, 0xb5]);
    let rest = (bytes.len()..len).map(|at| seed.wrapping_add(at as u8));
    bytes.extend(rest);
    bytes
}

/// Calls `use_frame` with a frame of these bytes as a queue pair makes it: a head and pieces.
pub(crate) fn with_frame<T>(
    header: VnetHeader,
    bytes: &[u8],
    use_frame: impl FnOnce(&Frame<'_>) -> T,
) -> T {
    let (head, rest) = bytes.split_at(bytes.len().min(HEAD_LEN));
    let tail: Vec<libc::iovec> = rest.chunks(1000).map(super::vectors::piece).collect();
    // SAFETY: the pieces are parts of `bytes`.
    use_frame(&unsafe { Frame::with_tail(header, head, &tail) })
}

/// Sends one frame; panics when it is not taken.
pub(crate) fn send(queue: &dyn NetQueue, bytes: &[u8]) {
    let mut dropped = |reason| panic!("a frame was dropped: {reason:?}");
    let sent = with_frame(VnetHeader::default(), bytes, |frame| {
        queue.transmit(std::slice::from_ref(frame), &mut dropped)
    });
    assert_eq!(sent, 1);
    queue.flush();
}

/// Receives until `done` says so of the sink.
pub(crate) async fn receive_until(
    queue: &dyn NetQueue,
    sink: &TestSink,
    done: impl Fn(&TestSink) -> bool,
) {
    loop {
        let received = queue.receive(32).unwrap();
        if done(sink) {
            return;
        }
        match received {
            Received::More => executor::time::yield_now().await,
            Received::Drained => queue.readable().await,
            Received::NotReady => sink.until_ready().await,
        }
    }
}
