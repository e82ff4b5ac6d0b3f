//! A transfer over TCP in which each end checks every byte of the other.
//!
//! ```text
//! client  seed ─► block 0 ─►                          ─► block 1 ─► ... ─► END ─►
//! server                   ─► checksum so far, block 0 ─►                        ─► checksum, bytes
//! ```
//!
//! A block is its number and [`BLOCK_BYTES`] bytes that follow from the seed and the number, so neither end keeps what it sent. The
//! checksum is over everything that the client has sent on that connection.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result, ensure};

/// Payload of a block, in each direction.
pub const BLOCK_BYTES: usize = 256 << 10;

/// The number that asks for the totals.
const END: u64 = u64::MAX;

/// Bytes that are different for every seed; the same seed gives the same bytes.
pub fn fill(seed: u64, buffer: &mut [u8]) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in buffer.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
}

/// What went one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Payload bytes.
    pub bytes: u64,
    /// FNV-1a over the payload's 64-bit words.
    pub checksum: u64,
}

impl Default for Totals {
    fn default() -> Self {
        Self {
            bytes: 0,
            checksum: 0xcbf2_9ce4_8422_2325,
        }
    }
}

impl Totals {
    fn add(&mut self, block: &[u8]) {
        self.bytes += block.len() as u64;
        for chunk in block.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let word = u64::from_le_bytes(word);
            self.checksum = (self.checksum ^ word).wrapping_mul(0x100_0000_01b3);
        }
    }
}

/// What the client sends as block `number`; the server's answer is that of [`answer_seed`].
fn block_seed(seed: u64, number: u64) -> u64 {
    seed << 32 ^ number << 1
}

fn answer_seed(seed: u64, number: u64) -> u64 {
    block_seed(seed, number) | 1
}

/// The end that begins.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    seed: u64,
    number: u64,
    sent: Totals,
    block: Vec<u8>,
    expected: Vec<u8>,
}

impl Client {
    /// Connects; clients of one server have different seeds.
    ///
    /// # Errors
    /// Nobody answers.
    pub fn connect(address: SocketAddr, seed: u64) -> Result<Self> {
        let stream = TcpStream::connect(address);
        let mut stream = stream.with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true)?;
        stream.write_all(&seed.to_le_bytes())?;
        Ok(Self {
            stream,
            seed,
            number: 0,
            sent: Totals::default(),
            block: vec![0; BLOCK_BYTES],
            expected: vec![0; BLOCK_BYTES],
        })
    }

    /// Sends a block and receives one; the payload of both.
    ///
    /// # Errors
    /// The connection broke, or one end received what the other had not sent.
    pub fn exchange(&mut self) -> Result<u64> {
        fill(block_seed(self.seed, self.number), &mut self.block);
        self.stream
            .write_all(&self.number.to_le_bytes())
            .and_then(|()| self.stream.write_all(&self.block))
            .with_context(|| format!("send block {}", self.number))?;
        self.sent.add(&self.block);
        let checksum = read_u64(&mut self.stream)
            .with_context(|| format!("wait for the answer to block {}", self.number))?;
        ensure!(
            checksum == self.sent.checksum,
            "block {} arrived altered",
            self.number
        );
        self.stream
            .read_exact(&mut self.block)
            .with_context(|| format!("receive block {}", self.number))?;
        fill(answer_seed(self.seed, self.number), &mut self.expected);
        ensure!(
            self.block == self.expected,
            "the answer to block {} is altered",
            self.number
        );
        self.number += 1;
        Ok(2 * BLOCK_BYTES as u64)
    }

    /// Compares what was sent with what the server says that it has received.
    ///
    /// # Errors
    /// The connection broke, or they differ.
    pub fn finish(&mut self) -> Result<Totals> {
        self.stream.write_all(&END.to_le_bytes())?;
        let received = Totals {
            checksum: read_u64(&mut self.stream)?,
            bytes: read_u64(&mut self.stream)?,
        };
        ensure!(
            received == self.sent,
            "sent {:?}, but {received:?} arrived",
            self.sent
        );
        Ok(received)
    }
}

/// The end that answers, for any number of clients, until the process ends.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    finished: Arc<Mutex<Vec<Totals>>>,
}

impl Server {
    /// Listens on `address`; port 0 takes a free one.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn start(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address);
        let listener = listener.with_context(|| format!("listen on {address}"))?;
        let address = listener.local_addr()?;
        let finished: Arc<Mutex<Vec<Totals>>> = Arc::default();
        let list = finished.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let list = list.clone();
                // A client that is cut off sees that itself.
                thread::spawn(move || serve(stream, &list));
            }
        });
        Ok(Self { address, finished })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What came from the clients that have finished.
    pub fn received(&self) -> Vec<Totals> {
        lock(&self.finished).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(mut stream: TcpStream, finished: &Mutex<Vec<Totals>>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let seed = read_u64(&mut stream)?;
    let mut received = Totals::default();
    let mut block = vec![0; BLOCK_BYTES];
    loop {
        let number = read_u64(&mut stream)?;
        if number == END {
            lock(finished).push(received);
            stream.write_all(&received.checksum.to_le_bytes())?;
            return stream.write_all(&received.bytes.to_le_bytes());
        }
        stream.read_exact(&mut block)?;
        received.add(&block);
        fill(answer_seed(seed, number), &mut block);
        stream.write_all(&received.checksum.to_le_bytes())?;
        stream.write_all(&block)?;
    }
}

fn read_u64(stream: &mut TcpStream) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_agree_on_what_was_sent() {
        let server = Server::start("127.0.0.1:0".parse().unwrap()).unwrap();
        let mut clients: Vec<_> = (0..2)
            .map(|seed| Client::connect(server.address(), seed).unwrap())
            .collect();
        for client in &mut clients {
            client.exchange().unwrap();
            client.exchange().unwrap();
            assert_eq!(client.finish().unwrap().bytes, 2 * BLOCK_BYTES as u64);
        }
        let received = server.received();
        assert_eq!(received.len(), 2);
        assert_ne!(received[0].checksum, received[1].checksum);
    }

    #[test]
    fn an_altered_byte_is_noticed_by_its_receiver() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let seed = read_u64(&mut stream).unwrap();
            let number = read_u64(&mut stream).unwrap();
            let mut block = vec![0; BLOCK_BYTES];
            stream.read_exact(&mut block).unwrap();
            let mut received = Totals::default();
            received.add(&block);
            fill(answer_seed(seed, number), &mut block);
            block[BLOCK_BYTES - 1] ^= 1;
            stream.write_all(&received.checksum.to_le_bytes()).unwrap();
            stream.write_all(&block).unwrap();
        });
        let mut client = Client::connect(address, 5).unwrap();
        let error = client.exchange().unwrap_err().to_string();
        assert_eq!(error, "the answer to block 0 is altered");
        server.join().unwrap();
    }
}
