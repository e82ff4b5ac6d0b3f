//! A connection.

use crate::credentials::{Credentials, Endpoint};
use crate::tls::{Step, Tls, TlsError};
use executor::net::{Closer, Part, Stream};
use executor::sync::Mutex;
use executor::{Buffer, Errno, HeapBuffer, time};
use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

/// Records are received in pieces of this size: one record.
const RECEIVE: usize = 17 << 10;
/// Plain bytes that are made into records at a time.
const SEND: usize = 256 << 10;
/// How long a peer may take to hear our goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// A connection to a peer. It may move to another thread while nothing is in flight.
pub struct Connection {
    stream: Stream,
    tls: Option<RefCell<Tls>>,
    /// Held while a message is sent.
    sending: Mutex<()>,
}

impl Connection {
    /// A connection without protection.
    pub fn plain(stream: Stream) -> Self {
        Self {
            stream,
            tls: None,
            sending: Mutex::new(()),
        }
    }

    /// Secures a connection whose peer begins the handshake now.
    ///
    /// # Errors
    /// A peer that does not prove itself, or no agreement.
    pub async fn accept_tls(self, credentials: &Credentials) -> Result<Self, TlsError> {
        let tls = Tls::new(credentials, Endpoint::Server, None)?;
        self.secure(tls).await
    }

    /// Secures a connection to a peer that has the certificate of `hostname`, where credentials are certificates.
    ///
    /// # Errors
    /// A peer that does not prove itself, or no agreement.
    pub async fn connect_tls(
        self,
        credentials: &Credentials,
        hostname: Option<&str>,
    ) -> Result<Self, TlsError> {
        let tls = Tls::new(credentials, Endpoint::Client, hostname)?;
        self.secure(tls).await
    }

    async fn secure(self, mut tls: Tls) -> Result<Self, TlsError> {
        let gone = |errno: Errno| TlsError::Handshake(executor::reason(errno));
        loop {
            let step = tls.handshake();
            let outgoing = tls.take_outgoing();
            let sent = self.stream.send_all(outgoing).await;
            // What we think of the peer tells more than that it has gone.
            let step = step?;
            sent.map_err(gone)?;
            match step {
                Step::NeedsInput => {
                    let received = self.stream.recv(RECEIVE).await.map_err(gone)?;
                    tls.feed(&received);
                }
                _ => break,
            }
        }
        Ok(Self {
            tls: Some(RefCell::new(tls)),
            ..self
        })
    }

    /// Whether the connection is secured.
    pub fn is_secure(&self) -> bool {
        self.tls.is_some()
    }

    /// The distinguished name that the peer's certificate proves.
    pub fn peer_name(&self) -> Option<String> {
        self.tls.as_ref().and_then(|tls| tls.borrow().peer_name())
    }

    /// Fills `buffer`; resolves to the number of bytes received, which is smaller only at the end of the stream. One caller at a time.
    pub async fn recv_exact(&self, buffer: Buffer) -> Result<usize, Errno> {
        let Some(tls) = &self.tls else {
            return self.stream.recv_exact(buffer).await;
        };
        let mut plain = HeapBuffer::zeroed(buffer.len().min(RECEIVE));
        let mut done = 0;
        while done < buffer.len() {
            let room = plain.len().min(buffer.len() - done);
            let step = tls.borrow_mut().read(&mut plain[..room]);
            match step {
                Step::Done(count) => {
                    buffer
                        .slice(done..done + count)
                        .copy_from_slice(&plain[..count]);
                    done += count;
                }
                Step::NeedsInput => self.exchange(tls).await?,
                Step::End => break,
                Step::Broken => return Err(Errno::ECONNABORTED),
            }
        }
        Ok(done)
    }

    /// Receives records; sends first what the library has to answer to earlier ones.
    async fn exchange(&self, tls: &RefCell<Tls>) -> Result<(), Errno> {
        let has_outgoing = tls.borrow().has_outgoing();
        if has_outgoing {
            // Taken under the lock: records keep the order in which they were made.
            let _one_at_a_time = self.sending.lock().await;
            let outgoing = tls.borrow_mut().take_outgoing();
            self.stream.send_all(outgoing).await?;
        }
        let received = self.stream.recv(RECEIVE).await?;
        tls.borrow_mut().feed(&received);
        Ok(())
    }

    /// Sends all of `parts`.
    pub async fn send(&self, parts: Vec<Part>) -> Result<(), Errno> {
        let _one_at_a_time = self.sending.lock().await;
        let Some(tls) = &self.tls else {
            return self.stream.send_parts(parts).await;
        };
        for part in parts {
            match part {
                Part::Bytes(bytes) => self.encrypt(tls, &bytes).await?,
                Part::Buffer(buffer) => {
                    let mut done = 0;
                    while done < buffer.len() {
                        let end = (done + SEND).min(buffer.len());
                        let piece = buffer.slice(done..end).to_heap();
                        self.encrypt(tls, &piece).await?;
                        done = end;
                    }
                }
            }
        }
        let rest = tls.borrow_mut().take_outgoing();
        self.stream.send_all(rest).await
    }

    /// Makes records of bytes, and sends them when there are many.
    async fn encrypt(&self, tls: &RefCell<Tls>, bytes: &[u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < bytes.len() {
            let step = tls.borrow_mut().write(&bytes[done..]);
            match step {
                Step::Done(count) => done += count,
                _ => return Err(Errno::ECONNABORTED),
            }
        }
        if bytes.len() < SEND {
            return Ok(());
        }
        let outgoing = tls.borrow_mut().take_outgoing();
        self.stream.send_all(outgoing).await
    }

    /// Ends the connection in order: a secured peer is told.
    pub async fn close(&self) {
        if let Some(tls) = &self.tls {
            let goodbye = async {
                let _one_at_a_time = self.sending.lock().await;
                tls.borrow_mut().say_goodbye();
                let outgoing = tls.borrow_mut().take_outgoing();
                self.stream.send_all(outgoing).await
            };
            // A peer that does not take it is gone.
            let _ = time::timeout(GOODBYE, goodbye).await;
        }
        self.stream.shutdown();
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
