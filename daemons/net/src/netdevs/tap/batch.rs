//! Writes of a burst in one system call: a small ring whose operations all end while it is entered.
//!
//! A tap interface takes or refuses a frame at once as long as its send buffer is without limit, so the kernel works the
//! entries off in their order. [`Batch::write`] waits for all of them: nothing is in flight outside of it.

#![expect(
    unsafe_code,
    reason = "a ring's entries are promises about memory, and the memory is a guest's"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, types};

use crate::frame::{Frame, VnetHeader};
use crate::link::BURST;
use crate::netdevs::vectors;

/// Frames below which a call for each is as good.
pub(super) const WORTHWHILE: usize = 4;

/// The ring, and what its entries point at.
pub(super) struct Batch {
    // Dropped first: it has nothing in flight, but it knows the memory below.
    ring: IoUring,
    pieces: Vec<libc::iovec>,
}

impl Batch {
    /// An empty ring. It knows no file: one that it knew would be open for a moment longer than its process.
    pub(super) fn new() -> io::Result<Batch> {
        Ok(Batch {
            ring: IoUring::new(BURST as u32)?,
            pieces: Vec::new(),
        })
    }

    /// Writes a burst's first frames to `fd`, a header before each. How many; what became of them is in `results`: bytes, or an errno
    /// with its sign turned. 0 when the first frame is in too many pieces.
    ///
    /// # Errors
    /// The host's: the ring is not to be used again, and what has no result was not written.
    pub(super) fn write(
        &mut self,
        fd: BorrowedFd<'_>,
        frames: &[Frame<'_>],
        results: &mut [i32; BURST],
    ) -> io::Result<usize> {
        let mut headers = [[0; VnetHeader::LEN]; BURST];
        let mut ranges = [(0, 0); BURST];
        let mut count = 0;
        self.pieces.clear();
        for (frame, header) in frames.iter().zip(&mut headers) {
            if frame.tail().len() + 2 > vectors::MAX_PIECES {
                break;
            }
            *header = frame.header.to_bytes();
            let start = self.pieces.len();
            self.pieces.push(vectors::piece(header));
            self.pieces.push(vectors::piece(frame.head()));
            self.pieces.extend_from_slice(frame.tail());
            ranges[count] = (start, self.pieces.len() - start);
            count += 1;
        }
        for (index, (start, len)) in ranges[..count].iter().enumerate() {
            let pieces = self.pieces[*start..].as_ptr();
            let entry = opcode::Writev::new(types::Fd(fd.as_raw_fd()), pieces, *len as u32);
            let entry = entry.build().user_data(index as u64);
            // SAFETY: the list and the pieces, ours or those of frames, are readable until `finish` has seen the result.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            pushed.expect("the ring has room for a burst and is empty");
        }
        results[..count].fill(-libc::EIO);
        self.finish(count, results)?;
        Ok(count)
    }

    /// Waits for `count` results.
    fn finish(&mut self, count: usize, results: &mut [i32; BURST]) -> io::Result<()> {
        let mut seen = 0;
        while seen < count {
            match self.ring.submit_and_wait(count - seen) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            for entry in self.ring.completion() {
                if let Some(result) = results.get_mut(entry.user_data() as usize) {
                    *result = entry.result();
                }
                seen += 1;
            }
        }
        Ok(())
    }
}
