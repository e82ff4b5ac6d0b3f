//! A device for tests: it answers each request with the request's own bytes, at once or, when they
//! begin with `H`, when the test lets it.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use executor::buffer::IoVecs;
use executor::sync::Notify;
use executor::{Buffer, Executor, Handle};

use crate::queue::QueueChange;
use crate::session::PROTOCOL_FEATURES;
use crate::{
    Address, Chain, Device, DeviceError, Handler, Queue, QueueError, QueueRemote, QueueSetup,
    Server,
};

/// What test and device share.
#[derive(Default)]
pub(super) struct Control {
    /// Requests beginning with `H` may complete.
    pub(super) release: AtomicBool,
    pub(super) released: Notify,
    /// Requests that wait.
    pub(super) held: AtomicU32,
}

impl Control {
    pub(super) fn release(&self) {
        self.release.store(true, Ordering::SeqCst);
        self.released.notify_all();
    }
}

struct Echo {
    control: Arc<Control>,
}

impl Handler for Echo {
    fn handle(&self, queue: &Rc<Queue>, chain: &Chain) {
        let mut data = vec![0; chain.readable_len().min(4096)];
        assert!(chain.copy_readable(0, &mut data));
        let len = data.len().min(chain.writable_len());
        let mut iovecs = IoVecs::new();
        assert!(chain.writable_iovecs(0..len, &mut iovecs));
        let target = Buffer::from_iovecs(Rc::new(iovecs));
        let (head, queue) = (chain.head(), queue.clone());
        let answer = move || {
            target.copy_from_slice(&data[..len]);
            queue.complete(head, len as u32);
        };
        if chain.read_head().is_none_or(|first| first != *b"H") {
            return answer();
        }
        let control = self.control.clone();
        control.held.fetch_add(1, Ordering::SeqCst);
        executor::spawn(async move {
            loop {
                let released = control.released.notified();
                if control.release.load(Ordering::SeqCst) {
                    break;
                }
                released.await;
            }
            answer();
        });
    }
}

struct EchoDevice {
    control: Arc<Control>,
    thread: Handle,
    queues: RefCell<Vec<Option<QueueRemote>>>,
}

impl Device for EchoDevice {
    fn name(&self) -> &str {
        "echo"
    }

    fn features(&self) -> u64 {
        1 << 34 | 1 << 32 | 1 << 29 | 1 << 28
    }

    fn protocol_features(&self) -> u64 {
        PROTOCOL_FEATURES
    }

    fn set_features(&self, _acked: u64) {}

    fn queue_count(&self) -> u16 {
        2
    }

    fn max_queue_size(&self) -> u16 {
        256
    }

    fn config(&self) -> Vec<u8> {
        b"configuration".to_vec()
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        Err(DeviceError::ReadOnlyConfig {
            offset: u64::from(offset),
            end: u64::from(offset) + data.len() as u64,
        })
    }

    async fn start_queue(&self, setup: QueueSetup) -> Result<(), QueueError> {
        let index = usize::from(setup.index);
        let control = self.control.clone();
        let make = move || Echo { control };
        let queue = QueueRemote::start(&self.thread, setup, make).await?;
        self.queues.borrow_mut()[index] = Some(queue);
        Ok(())
    }

    async fn change_queue(&self, index: u16, change: QueueChange) {
        let queue = self.queues.borrow_mut()[usize::from(index)].take();
        let queue = queue.expect("a running queue is changed");
        queue.change(change).await;
        self.queues.borrow_mut()[usize::from(index)] = Some(queue);
    }

    async fn stop_queue(&self, index: u16) -> u32 {
        let queue = self.queues.borrow_mut()[usize::from(index)].take();
        let queue = queue.expect("a running queue is stopped");
        queue.stop().await.expect("the queue's thread runs").base
    }

    fn reset(&self) {}
}

/// A back-end on two threads of its own: control and queues.
pub(super) struct BackEnd {
    pub(super) control: Arc<Control>,
    pub(super) path: PathBuf,
    pub(super) config_changed: Arc<Notify>,
    stop: mpsc::Sender<()>,
    stopper: Arc<Notify>,
    queues: Handle,
    threads: Vec<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

/// How the back-end meets its front-end.
pub(super) enum Mode {
    Listen,
    Connect,
}

impl BackEnd {
    pub(super) fn start(mode: Mode) -> BackEnd {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let control = Arc::new(Control::default());
        let (queues, queue_thread) = spawn_executor();
        let stopper = Arc::new(Notify::new());
        let (stop, stopped) = mpsc::channel::<()>();
        let address = match mode {
            Mode::Listen => Address::Listen(path.clone()),
            Mode::Connect => Address::Connect(path.clone()),
        };
        let (started, ready) = mpsc::channel();
        let device = (control.clone(), queues.clone(), stopper.clone());
        let control_thread = std::thread::spawn(move || {
            let (control, thread, stopper) = device;
            let executor = Executor::new(&executor::Config::default()).unwrap();
            executor.block_on(async move {
                let device = Rc::new(EchoDevice {
                    control,
                    thread,
                    queues: RefCell::new(vec![None, None]),
                });
                let server = Server::start(device, address).unwrap();
                started.send(server.config_changed()).unwrap();
                loop {
                    let stopping = stopper.notified();
                    if stopped.try_recv().is_ok() {
                        break;
                    }
                    stopping.await;
                }
                server.stop().await;
            });
        });
        BackEnd {
            control,
            config_changed: ready.recv().unwrap(),
            path,
            stop,
            stopper,
            queues,
            threads: vec![control_thread, queue_thread],
            _dir: dir,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Stops the back-end; fails the test when one of its threads panicked.
    pub(super) fn stop(mut self) {
        self.control.release();
        self.stop.send(()).unwrap();
        self.stopper.notify_all();
        self.threads.remove(0).join().expect("the control thread");
        assert!(!self.path.exists() || self.path.metadata().is_err());
        self.queues.stop();
        self.threads.remove(0).join().expect("the queue thread");
    }
}

fn spawn_executor() -> (Handle, JoinHandle<()>) {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let executor = Executor::new(&executor::Config::default()).unwrap();
        sender.send(executor.handle()).unwrap();
        executor.run();
    });
    (receiver.recv().unwrap(), thread)
}
