//! The pieces of one request that run side by side.

use crate::driver::IoFuture;
use executor::Errno;
use smallvec::SmallVec;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

/// Most pieces of one request in flight.
pub(super) const MAX_PIECES: usize = 8;

/// Pieces in flight, and the first error of those that ended.
pub(super) struct Pieces<'a> {
    running: SmallVec<[IoFuture<'a>; MAX_PIECES]>,
    result: Result<(), Errno>,
}

impl<'a> Pieces<'a> {
    pub(super) fn new() -> Self {
        Self {
            running: SmallVec::new(),
            result: Ok(()),
        }
    }

    /// Whether no piece has failed yet.
    pub(super) fn ok(&self) -> bool {
        self.result.is_ok()
    }

    /// Records a failure outside of the pieces.
    pub(super) fn fail(&mut self, errno: Errno) {
        self.result = self.result.and(Err(errno));
    }

    /// Adds a piece, waiting for another one to end when there are too many.
    pub(super) async fn push(&mut self, piece: IoFuture<'a>) {
        if let IoFuture::Ready(result) = piece {
            self.result = self.result.and(result);
            return;
        }
        poll_fn(|cx| {
            self.poll_running(cx);
            match self.running.len() < MAX_PIECES {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
        self.running.push(piece);
    }

    /// The output of `future`; the pieces go on meanwhile, so `future` may wait for what they
    /// hold.
    pub(super) async fn drive<T>(&mut self, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        poll_fn(|cx| {
            self.poll_running(cx);
            future.as_mut().poll(cx)
        })
        .await
    }

    /// Waits for all; the first error.
    pub(super) async fn finish(mut self) -> Result<(), Errno> {
        poll_fn(|cx| {
            self.poll_running(cx);
            match self.running.is_empty() {
                true => Poll::Ready(self.result),
                false => Poll::Pending,
            }
        })
        .await
    }

    fn poll_running(&mut self, cx: &mut Context<'_>) {
        let result = &mut self.result;
        self.running.retain(|piece| match Pin::new(piece).poll(cx) {
            Poll::Ready(ended) => {
                *result = result.and(ended);
                false
            }
            Poll::Pending => true,
        });
    }
}
