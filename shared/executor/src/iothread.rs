//! A named thread with an executor of its own.

use std::cell::Cell;
use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::runtime::current;
use crate::{Config, Executor, Handle};
use nix::unistd::{SysconfVar, sysconf};

/// A running thread; dropping it ends the executor and waits for the thread. Users hold it in an `Rc`, so that its count tells
/// whether it is in use.
pub struct IoThread {
    id: String,
    handle: Handle,
    thread: Option<thread::JoinHandle<()>>,
    options: Cell<IoThreadOptions>,
}

/// What can be said of an iothread.
#[derive(Clone, Copy, Debug)]
pub struct IoThreadOptions {
    /// Longest time to poll before sleeping; zero never polls.
    pub poll_max: Duration,
}

impl Default for IoThreadOptions {
    /// Polling pays only when a core is left for whoever is waited for.
    fn default() -> Self {
        let cores = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten();
        let poll_max = match cores {
            Some(1) => Duration::ZERO,
            _ => Config::default().poll_max,
        };
        Self { poll_max }
    }
}

impl IoThread {
    /// Starts the thread; its executor exists when this returns.
    ///
    /// # Errors
    /// The host's, of the thread or its ring.
    pub fn start(id: &str, options: IoThreadOptions) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        // The kernel shows 15 bytes of a thread's name.
        let name: String = id.chars().take(15).collect();
        let config = Config {
            poll_max: options.poll_max,
            ..Config::default()
        };
        let thread = thread::Builder::new().name(name).spawn(move || {
            let executor = match Executor::new(&config) {
                Ok(executor) => executor,
                Err(error) => {
                    let _ = sender.send(Err(error));
                    return;
                }
            };
            let _ = sender.send(Ok(executor.handle()));
            drop(sender);
            executor.run();
        })?;
        let started = receiver.recv().map_err(io::Error::other)?;
        Ok(Self {
            id: id.to_owned(),
            handle: started?,
            thread: Some(thread),
            options: Cell::new(options),
        })
    }

    /// The object's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Reaches its executor.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// How it runs.
    pub fn options(&self) -> IoThreadOptions {
        self.options.get()
    }

    /// Makes it run in another way, from the next time that it has nothing to do.
    pub fn set_options(&self, options: IoThreadOptions) {
        self.options.set(options);
        // A thread that has ended polls no more.
        let _ = self.handle.spawn(move || async move {
            current().pollers.set_max(options.poll_max);
        });
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            // A panic was reported where it happened.
            let _ = thread.join();
        }
    }
}
