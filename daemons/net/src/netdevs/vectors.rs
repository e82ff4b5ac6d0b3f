//! System calls that move frames between descriptors and lists of memory pieces, which may be a guest's.
//!
//! Promises: nothing here waits (descriptors are non-blocking), raises a signal, or keeps a piece after it returned.

#![expect(unsafe_code, reason = "pieces of guest memory are raw pointers")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::frame::Frame;

/// Pieces that one call can take (`IOV_MAX`).
pub(super) const MAX_PIECES: usize = libc::UIO_MAXIOV as usize;

/// The piece that `bytes` are, for the kernel to read.
pub(super) fn piece(bytes: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

/// The piece that `bytes` are, for the kernel to write.
pub(super) fn piece_mut(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

/// Bytes in `pieces`.
pub(super) fn total(pieces: &[libc::iovec]) -> usize {
    pieces.iter().map(|piece| piece.iov_len).sum()
}

fn result(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// Reads into `pieces`; a frame where the descriptor has frames.
///
/// # Safety
/// Every piece is memory that may be written, whoever else writes there too.
pub(super) unsafe fn read(fd: BorrowedFd<'_>, pieces: &[libc::iovec]) -> io::Result<usize> {
    let count = pieces.len().min(MAX_PIECES) as i32;
    // SAFETY: the list is as long as told, its pieces are the caller's promise.
    result(unsafe { libc::readv(fd.as_raw_fd(), pieces.as_ptr(), count) })
}

/// Writes `pieces`; a frame where the descriptor has frames.
///
/// # Safety
/// Every piece is readable memory, whoever else writes there meanwhile.
pub(super) unsafe fn write(fd: BorrowedFd<'_>, pieces: &[libc::iovec]) -> io::Result<usize> {
    let count = pieces.len().min(MAX_PIECES) as i32;
    // SAFETY: the list is as long as told, its pieces are the caller's promise.
    result(unsafe { libc::writev(fd.as_raw_fd(), pieces.as_ptr(), count) })
}

/// Sends `pieces` on a connected stream socket. A peer that is gone is an error, not a signal.
///
/// # Safety
/// Every piece is readable memory, whoever else writes there meanwhile.
pub(super) unsafe fn send(fd: BorrowedFd<'_>, pieces: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: all-zero is a valid message header.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_ptr().cast_mut();
    message.msg_iovlen = pieces.len().min(MAX_PIECES);
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the header names a list as long as told, whose pieces are the caller's promise.
    result(unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) })
}

/// Receives what is there of a stream into `room`.
pub(super) fn receive(fd: BorrowedFd<'_>, room: &mut [u8]) -> io::Result<usize> {
    let start = room.as_mut_ptr().cast();
    // SAFETY: exactly the bytes of `room`.
    result(unsafe { libc::recv(fd.as_raw_fd(), start, room.len(), libc::MSG_DONTWAIT) })
}

/// Whether the descriptor has to be waited for.
pub(super) fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

/// Makes every call on `fd` return at once.
///
/// # Errors
/// The host's.
pub(super) fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: reads a flag of the descriptor.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: sets flags of the descriptor.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Appends the pieces of a frame to `pieces`. One in more pieces than a call can take, with `before` that are there, is put
/// together in `flat`, which has to stay as it is until the call.
pub(super) fn append_frame(frame: &Frame<'_>, pieces: &mut Vec<libc::iovec>, flat: &mut Vec<u8>) {
    pieces.push(piece(frame.head()));
    if frame.tail().len() + pieces.len() <= MAX_PIECES {
        pieces.extend_from_slice(frame.tail());
        return;
    }
    pieces.pop();
    flat.clear();
    frame.append_to(flat, frame.len());
    pieces.push(piece(flat));
}

/// Copies the first `len` bytes of `pieces` to the end of `target`.
///
/// # Safety
/// Every piece is readable memory, whoever else writes there meanwhile.
pub(super) unsafe fn copy_from(pieces: &[libc::iovec], len: usize, target: &mut Vec<u8>) {
    let mut left = len;
    target.reserve(len);
    for piece in pieces {
        let part = left.min(piece.iov_len);
        let at = target.len();
        // SAFETY: `part` bytes of a readable piece into reserved room of a vector of our own.
        unsafe {
            let room = target.as_mut_ptr().add(at);
            std::ptr::copy_nonoverlapping(piece.iov_base.cast::<u8>(), room, part);
            target.set_len(at + part);
        }
        left -= part;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::VnetHeader;

    #[test]
    fn a_frame_of_too_many_pieces_is_put_together() {
        let byte = [7u8];
        let tail = vec![piece(&byte); MAX_PIECES];
        // SAFETY: all pieces are the one byte above.
        let frame = unsafe { Frame::with_tail(VnetHeader::default(), b"ab", &tail) };
        let (mut pieces, mut flat) = (vec![piece(b"header")], Vec::new());
        append_frame(&frame, &mut pieces, &mut flat);
        assert_eq!(pieces.len(), 2);
        assert_eq!(total(&pieces), 6 + 2 + MAX_PIECES);
        assert_eq!(flat[..3], *b"ab\x07");
    }

    #[test]
    fn pieces_are_copied_up_to_the_limit() {
        let pieces = [piece(b"ab"), piece(b""), piece(b"cde")];
        for len in 0..=5 {
            let mut target = Vec::new();
            // SAFETY: the pieces are constants.
            unsafe { copy_from(&pieces, len, &mut target) };
            assert_eq!(target, b"abcde"[..len]);
        }
    }
}
