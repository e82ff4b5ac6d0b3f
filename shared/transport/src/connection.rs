//! A connection.

use executor::net::{Closer, Part, Stream};
use executor::sync::Mutex;
use executor::{Buffer, Errno};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

/// A connection to a peer. It may move to another thread while nothing is in flight.
pub struct Connection {
    stream: Stream,
    /// Held while a message is sent.
    sending: Mutex<()>,
}

impl Connection {
    /// A connection without protection.
    pub fn plain(stream: Stream) -> Self {
        Self {
            stream,
            sending: Mutex::new(()),
        }
    }

    /// Fills `buffer`; resolves to the number of bytes received, which is smaller only at the end of the stream. One caller at a time.
    pub async fn recv_exact(&self, buffer: Buffer) -> Result<usize, Errno> {
        self.stream.recv_exact(buffer).await
    }

    /// Sends all of `parts`.
    pub async fn send(&self, parts: Vec<Part>) -> Result<(), Errno> {
        let _one_at_a_time = self.sending.lock().await;
        self.stream.send_parts(parts).await
    }

    /// Ends the connection; pending transfers end.
    pub fn shutdown(&self) {
        self.stream.shutdown();
    }

    /// Ends the connection from elsewhere.
    pub fn closer(&self) -> Closer {
        self.stream.closer()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
