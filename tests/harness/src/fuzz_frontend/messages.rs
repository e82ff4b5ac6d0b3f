//! Malformed vhost-user messages: wrong sizes, counts, orders, addresses and descriptors.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::pipe;
use rand::Rng;
use rand::rngs::SmallRng;

use crate::wire::{self, request};

/// Every request with the body size and number of descriptors that belong to it.
const REQUESTS: [(u32, usize, usize); 28] = [
    (request::GET_FEATURES, 0, 0),
    (request::SET_FEATURES, 8, 0),
    (request::SET_OWNER, 0, 0),
    (request::RESET_OWNER, 0, 0),
    (request::SET_MEM_TABLE, 8 + 32, 1),
    (request::SET_MEM_TABLE, 8 + 8 * 32, 8),
    (request::SET_LOG_BASE, 16, 1),
    (request::SET_VRING_NUM, 8, 0),
    (request::SET_VRING_ADDR, 40, 0),
    (request::SET_VRING_BASE, 8, 0),
    (request::GET_VRING_BASE, 8, 0),
    (request::SET_VRING_KICK, 8, 1),
    (request::SET_VRING_CALL, 8, 1),
    (request::SET_VRING_ERR, 8, 1),
    (request::GET_PROTOCOL_FEATURES, 0, 0),
    (request::SET_PROTOCOL_FEATURES, 8, 0),
    (request::GET_QUEUE_NUM, 0, 0),
    (request::SET_VRING_ENABLE, 8, 0),
    (request::SET_BACKEND_REQ_FD, 0, 1),
    (request::GET_CONFIG, 12 + 60, 0),
    (request::SET_CONFIG, 12 + 1, 0),
    (request::GET_INFLIGHT_FD, 24, 0),
    (request::SET_INFLIGHT_FD, 24, 1),
    (request::RESET_DEVICE, 0, 0),
    (request::ADD_MEM_REG, 40, 1),
    (request::REM_MEM_REG, 40, 0),
    (request::SET_STATUS, 8, 0),
    (request::GET_STATUS, 0, 0),
];

/// Numbers that tend to be somebody's limit.
const EDGES: [u64; 20] = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    64,
    128,
    256,
    1024,
    1025,
    4096,
    32768,
    65535,
    65536,
    1 << 30,
    1 << 32,
    1 << 63,
    u64::MAX,
];

/// Sends up to `count` messages, some right and most wrong; ends early when the daemon hangs up.
///
/// # Errors
/// When the descriptors that go with them cannot be made.
pub fn attack_messages(socket: &UnixStream, rng: &mut SmallRng, count: usize) -> Result<()> {
    socket.set_nonblocking(true)?;
    // A session that got further in its negotiation reaches more code.
    if rng.random_ratio(3, 4) {
        let features = (1u64 << 30 | 1 << 32).to_le_bytes();
        let _ = wire::send(socket, (request::SET_OWNER, 0), &[], &[]);
        let _ = wire::send(socket, (request::SET_FEATURES, 0), &features, &[]);
        let protocol = u64::MAX.to_le_bytes();
        let _ = wire::send(socket, (request::SET_PROTOCOL_FEATURES, 0), &protocol, &[]);
    }
    for _ in 0..count {
        let fds = descriptors(rng)?;
        let (number, body, wanted_fds) = random_message(rng);
        let sent_fds = if rng.random_ratio(1, 4) {
            rng.random_range(0..=fds.len())
        } else {
            wanted_fds
        };
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().take(sent_fds).map(AsFd::as_fd).collect();
        let mut bytes = wire::encode(number, if rng.random() { 8 } else { 0 }, &body);
        mutate(rng, &mut bytes);
        if let Err(error) = wire::send_raw(socket, &bytes, &borrowed) {
            // A full socket is drained by a daemon that is still reading; a closed one ends it all.
            if error.kind() != io::ErrorKind::WouldBlock {
                return Ok(());
            }
        }
        discard_replies(socket);
    }
    Ok(())
}

/// The beginnings of a message, each to be followed by closing the connection.
pub fn truncated_messages() -> Vec<Vec<u8>> {
    let whole = wire::encode(request::SET_VRING_ADDR, 8, &[0x55; 40]);
    let mut all: Vec<Vec<u8>> = [0, 1, 4, 11, 12, 13, 51]
        .into_iter()
        .map(|bytes| whole[..bytes].to_vec())
        .collect();
    for size in [41u32, 4096, 1 << 20, u32::MAX] {
        let mut lying = whole.clone();
        lying[8..12].copy_from_slice(&size.to_le_bytes());
        all.push(lying);
    }
    all
}

fn random_message(rng: &mut SmallRng) -> (u32, Vec<u8>, usize) {
    let (number, bytes, fds) = REQUESTS[rng.random_range(0..REQUESTS.len())];
    let mut body = vec![0; bytes];
    for chunk in body.chunks_mut(8) {
        let word = edge(rng).to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
    // Ring numbers and region counts are 32 bits wide: small ones get past the first check.
    for at in (0..bytes.min(16)).step_by(4) {
        if at + 4 <= bytes && rng.random_ratio(2, 3) {
            let small = rng.random_range(0u32..4);
            body[at..at + 4].copy_from_slice(&small.to_le_bytes());
        }
    }
    (number, body, fds)
}

fn mutate(rng: &mut SmallRng, bytes: &mut Vec<u8>) {
    match rng.random_range(0..12) {
        0 => bytes.truncate(rng.random_range(0..=bytes.len())),
        1 => bytes.extend((0..rng.random_range(1..300)).map(|_| 0xee)),
        2 => {
            let size = edge(rng) as u32;
            bytes[8..12].copy_from_slice(&size.to_le_bytes());
        }
        3 => bytes[0..4].copy_from_slice(&rng.random::<u32>().to_le_bytes()),
        4 => bytes[0..4].copy_from_slice(&rng.random_range(0u32..64).to_le_bytes()),
        5 => bytes[4..8].copy_from_slice(&rng.random::<u32>().to_le_bytes()),
        6 => {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = rng.random();
        }
        _ => {}
    }
}

/// Descriptors of every kind, in random order: memfds of several sizes, eventfds, pipes, devices.
fn descriptors(rng: &mut SmallRng) -> Result<Vec<OwnedFd>> {
    let mut fds: Vec<OwnedFd> = Vec::new();
    for bytes in [0, 4096, 1 << 20] {
        let memory = File::from(memfd_create("hostile", MFdFlags::MFD_CLOEXEC).context("memfd")?);
        memory.set_len(bytes)?;
        fds.push(memory.into());
    }
    fds.push(EventFd::new().context("eventfd")?.into());
    let (reader, writer) = pipe().context("pipe")?;
    fds.extend([reader, writer]);
    fds.push(File::open("/dev/null").context("/dev/null")?.into());
    fds.push(
        File::open("/proc/self/stat")
            .context("/proc/self/stat")?
            .into(),
    );
    for at in (1..fds.len()).rev() {
        fds.swap(at, rng.random_range(0..=at));
    }
    Ok(fds)
}

fn edge(rng: &mut SmallRng) -> u64 {
    match rng.random_range(0..4) {
        0 => rng.random(),
        1 => EDGES[rng.random_range(0..EDGES.len())].wrapping_sub(1),
        _ => EDGES[rng.random_range(0..EDGES.len())],
    }
}

fn discard_replies(mut socket: &UnixStream) {
    let mut sink = [0; 4096];
    while socket.read(&mut sink).is_ok_and(|got| got > 0) {}
}
