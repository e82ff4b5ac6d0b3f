//! What a frame costs on a tap interface: `readv` and `writev` one by one, against io_uring batches of the same, against
//! io_uring batches on a registered file and registered buffers.
//!
//! Works in a network namespace of its own; needs root. Prints nanoseconds per frame, the median of many bursts, the ways
//! taken in turn.

#![expect(unsafe_code, reason = "system calls, and buffers that a ring works on")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

use io_uring::{IoUring, opcode, types};

const BURST: usize = 32;
const ROUNDS: usize = 4000;
const HEADER: usize = 12;
const ROOM: usize = 2048;

fn check(result: i32) -> io::Result<i32> {
    match result {
        0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A tap interface that is up, and its number.
fn open_tap() -> io::Result<(File, i32)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let tap = options
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: all-zero is a valid request; every call gets what it reads and writes.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as i16;
        check(libc::ioctl(
            tap.as_raw_fd(),
            libc::TUNSETIFF,
            &raw mut request,
        ))?;
        let header = HEADER as i32;
        check(libc::ioctl(
            tap.as_raw_fd(),
            libc::TUNSETVNETHDRSZ,
            &raw const header,
        ))?;
        let socket = check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0))?;
        let socket = OwnedFd::from_raw_fd(socket);
        request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
        check(libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS,
            &raw mut request,
        ))?;
        check(libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCGIFINDEX,
            &raw mut request,
        ))?;
        Ok((tap, request.ifr_ifru.ifru_ifindex))
    }
}

/// A packet socket that sends to the interface and receives nothing.
fn open_network(index: i32) -> io::Result<OwnedFd> {
    // SAFETY: all-zero is a valid address, which is as long as told.
    unsafe {
        let socket = check(libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0))?;
        let socket = OwnedFd::from_raw_fd(socket);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index;
        let len = size_of_val(&address) as u32;
        check(libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            len,
        ))?;
        Ok(socket)
    }
}

/// Frames in memory: a header and room each.
struct Frames {
    memory: Vec<u8>,
    len: usize,
}

impl Frames {
    fn new(len: usize) -> Frames {
        let mut memory = vec![0; BURST * ROOM];
        for slot in memory.chunks_exact_mut(ROOM) {
            slot[HEADER..HEADER + 6].fill(0xff);
            slot[HEADER + 6] = 2;
            slot[HEADER + 12..HEADER + 14].copy_from_slice(&[0x88, 0xb5]);
        }
        Frames { memory, len }
    }

    /// The header, and the frame in two pieces, as a guest has them.
    fn pieces(&mut self, index: usize, len: usize) -> [libc::iovec; 3] {
        let slot = &mut self.memory[index * ROOM..][..HEADER + len];
        let (header, frame) = slot.split_at_mut(HEADER);
        let (head, tail) = frame.split_at_mut(len.min(192));
        [header, head, tail].map(|piece| libc::iovec {
            iov_base: piece.as_mut_ptr().cast(),
            iov_len: piece.len(),
        })
    }

    /// Lets the network send a burst.
    fn send_to(&self, network: &OwnedFd) -> io::Result<()> {
        for slot in self.memory.chunks_exact(ROOM) {
            let frame = &slot[HEADER..HEADER + self.len];
            let (start, len) = (frame.as_ptr().cast(), frame.len());
            // SAFETY: bytes as long as told.
            let sent = unsafe { libc::send(network.as_raw_fd(), start, len, 0) };
            check(sent as i32)?;
        }
        Ok(())
    }
}

/// One way to move a burst.
#[derive(Clone, Copy)]
enum Way {
    /// One system call for each frame.
    OneByOne,
    /// One for the burst; the pieces are a guest's.
    Batch,
    /// One for the burst, and memory that the kernel knows, a piece for each frame.
    Registered,
}

fn one_by_one(tap: RawFd, frames: &mut Frames, reads: bool) -> io::Result<()> {
    let len = if reads { ROOM - HEADER } else { frames.len };
    for index in 0..BURST {
        let pieces = frames.pieces(index, len);
        // SAFETY: the pieces are parts of the frames' memory.
        let moved = unsafe {
            match reads {
                true => libc::readv(tap, pieces.as_ptr(), 3),
                false => libc::writev(tap, pieces.as_ptr(), 3),
            }
        };
        check(moved as i32)?;
    }
    if reads {
        // The look that finds nothing more.
        let pieces = frames.pieces(0, len);
        // SAFETY: as above.
        let moved = unsafe { libc::readv(tap, pieces.as_ptr(), 3) };
        assert!(moved < 0, "more frames than were sent");
    }
    Ok(())
}

fn in_batch(
    ring: &mut IoUring,
    tap: RawFd,
    frames: &mut Frames,
    reads: bool,
    way: Way,
) -> io::Result<()> {
    let len = if reads { ROOM - HEADER } else { frames.len };
    let pieces: [_; BURST] = std::array::from_fn(|index| frames.pieces(index, len));
    let mut queue = ring.submission();
    for index in 0..BURST {
        let start = frames.memory[index * ROOM..].as_mut_ptr();
        let (file, buffer) = (types::Fd(tap), 0);
        let pieces = pieces[index].as_ptr();
        let len = (HEADER + len) as u32;
        let entry = match (matches!(way, Way::Registered), reads) {
            (true, true) => opcode::ReadFixed::new(types::Fixed(0), start, len, buffer).build(),
            (true, false) => opcode::WriteFixed::new(types::Fixed(0), start, len, buffer).build(),
            (false, true) => opcode::Readv::new(file, pieces, 3).build(),
            (false, false) => opcode::Writev::new(file, pieces, 3).build(),
        };
        // SAFETY: the memory outlives the ring's work: this function waits for all of it.
        unsafe { queue.push(&entry) }.map_err(io::Error::other)?;
    }
    drop(queue);
    ring.submit_and_wait(BURST)?;
    let mut count = 0;
    for entry in ring.completion() {
        check(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()))?;
        count += 1;
    }
    assert_eq!(count, BURST);
    Ok(())
}

fn median(mut times: Vec<u128>) -> u128 {
    times.sort_unstable();
    times[times.len() / 2] / BURST as u128
}

fn main() -> io::Result<()> {
    // SAFETY: this process has one thread.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    // The host says nothing by itself. Where it has no IPv6 it does not anyway.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let (tap, index) = open_tap()?;
    let network = open_network(index)?;
    println!("bytes         one by one     batch  registered");
    for len in [60, 512, 1514] {
        let mut frames = Frames::new(len);
        let mut ring = IoUring::new(2 * BURST as u32)?;
        ring.submitter().register_files(&[tap.as_raw_fd()])?;
        let memory = libc::iovec {
            iov_base: frames.memory.as_mut_ptr().cast(),
            iov_len: frames.memory.len(),
        };
        // SAFETY: the memory stays as it is until the ring is gone.
        unsafe { ring.submitter().register_buffers(&[memory])? };
        for reads in [true, false] {
            let mut times = [Vec::new(), Vec::new(), Vec::new()];
            for round in 0..3 * ROUNDS {
                if reads {
                    frames.send_to(&network)?;
                }
                let way = [Way::OneByOne, Way::Batch, Way::Registered][round % 3];
                let start = Instant::now();
                match way {
                    Way::OneByOne => one_by_one(tap.as_raw_fd(), &mut frames, reads)?,
                    _ => in_batch(&mut ring, tap.as_raw_fd(), &mut frames, reads, way)?,
                }
                times[round % 3].push(start.elapsed().as_nanos());
            }
            let [one, batch, registered] = times.map(median);
            let what = if reads { "read" } else { "write" };
            println!("{len:>5}  {what:<5}  {one:>10}  {batch:>8}  {registered:>10}");
        }
        drop(ring);
    }
    Ok(())
}
