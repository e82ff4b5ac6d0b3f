//! The channel on which the back-end sends requests of its own (`SET_BACKEND_REQ_FD`).

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::wire::{self, backend_request, flag};

/// Receives the back-end's messages on a thread of its own, which ends with the connection.
#[derive(Debug)]
pub(crate) struct BackendChannel {
    changes: Receiver<Result<()>>,
    socket: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl BackendChannel {
    /// The channel and the end that belongs to the back-end.
    pub(crate) fn open() -> Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair().context("socket pair")?;
        let (sender, changes) = channel();
        let socket = ours.try_clone().context("clone of the back-end channel")?;
        let thread = std::thread::spawn(move || serve(&ours, &sender));
        Ok((
            Self {
                changes,
                socket,
                thread: Some(thread),
            },
            theirs,
        ))
    }

    /// Waits for the next config-change message.
    pub(crate) fn config_change(&self, limit: Duration) -> Result<()> {
        match self.changes.recv_timeout(limit) {
            Ok(received) => received,
            Err(RecvTimeoutError::Timeout) => bail!("no config change within {limit:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("the back-end closed its channel"),
        }
    }
}

impl Drop for BackendChannel {
    fn drop(&mut self) {
        // An error means that the peer shut the socket down first, which ends the thread as well.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(socket: &UnixStream, changes: &Sender<Result<()>>) {
    loop {
        let message = match wire::receive(socket) {
            Ok(message) => message,
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return,
            Err(error) => {
                let _ = changes.send(Err(error).context("back-end channel"));
                return;
            }
        };
        let known = message.request == backend_request::CONFIG_CHANGE;
        if message.flags & flag::NEED_REPLY != 0 {
            let answer = u64::from(!known).to_le_bytes();
            let header = (message.request, flag::REPLY);
            if wire::send(socket, header, &answer, &[]).is_err() {
                return;
            }
        }
        let event = if known {
            Ok(())
        } else {
            Err(anyhow::anyhow!(
                "unexpected back-end request {}",
                message.request
            ))
        };
        if changes.send(event).is_err() {
            return;
        }
    }
}
