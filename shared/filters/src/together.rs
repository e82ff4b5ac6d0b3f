//! Requests to several children at the same time.

use block::{Buffer, Errno, HeapBuffer, IoFuture};
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Drives all futures to their ends; the results are in their order.
pub(crate) async fn all(futures: Vec<IoFuture<'_>>) -> Vec<Result<(), Errno>> {
    let mut running: Vec<_> = futures.into_iter().map(Running::Yes).collect();
    poll_fn(|context| {
        let mut pending = false;
        for one in &mut running {
            pending |= one.poll(context).is_pending();
        }
        match pending {
            true => Poll::Pending,
            false => Poll::Ready(()),
        }
    })
    .await;
    running.iter().map(Running::result).collect()
}

enum Running<'a> {
    Yes(IoFuture<'a>),
    No(Result<(), Errno>),
}

impl Running<'_> {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Self::Yes(future) = self else {
            return Poll::Ready(());
        };
        match Pin::new(future).poll(context) {
            Poll::Ready(result) => {
                *self = Self::No(result);
                Poll::Ready(())
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn result(&self) -> Result<(), Errno> {
        match self {
            Self::Yes(_) => unreachable!("every future was polled to its end"),
            Self::No(result) => *result,
        }
    }
}

/// A private buffer.
pub(crate) fn private(length: usize) -> Buffer {
    HeapBuffer::zeroed(length).into_buffer()
}

/// A private copy: who wrote the original may change it, and it is used more than once.
pub(crate) fn private_copy(buffer: &Buffer) -> Buffer {
    buffer.to_heap().into_buffer()
}

/// The first byte in which buffers of the same length differ.
pub(crate) fn first_difference(one: &Buffer, other: &Buffer) -> Option<usize> {
    let (one, other) = (one.to_heap(), other.to_heap());
    if one[..] == other[..] {
        return None;
    }
    one.iter()
        .zip(other.iter())
        .position(|(one, other)| one != other)
}
