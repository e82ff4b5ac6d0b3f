//! Pieces of work in flight at a time.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

/// A few pieces of work that go on side by side. What they do is done only while one of the methods
/// is waited for.
pub struct Window<'w, T> {
    pieces: VecDeque<Piece<'w, T>>,
    most: usize,
}

enum Piece<'w, T> {
    Running(Pin<Box<dyn Future<Output = T> + 'w>>),
    Done(T),
}

impl<'w, T> Window<'w, T> {
    /// For at most `most` pieces, at least one.
    pub fn new(most: usize) -> Self {
        Self {
            pieces: VecDeque::new(),
            most: most.max(1),
        }
    }

    /// Whether another piece may be added.
    pub fn has_room(&self) -> bool {
        self.pieces.len() < self.most
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Pieces that were begun and not taken out.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Adds a piece.
    pub fn push(&mut self, work: impl Future<Output = T> + 'w) {
        self.pieces.push_back(Piece::Running(Box::pin(work)));
    }

    /// The output of the piece that was added first; `None` without any.
    pub async fn first(&mut self) -> Option<T> {
        self.take(|pieces| match pieces.front() {
            Some(Piece::Done(_)) => Some(0),
            _ => None,
        })
        .await
    }

    /// The output of a piece that is done; `None` without any.
    pub async fn any(&mut self) -> Option<T> {
        self.take(|pieces| {
            pieces
                .iter()
                .position(|piece| matches!(piece, Piece::Done(_)))
        })
        .await
    }

    async fn take(&mut self, find: impl Fn(&VecDeque<Piece<'w, T>>) -> Option<usize>) -> Option<T> {
        poll_fn(|cx| {
            if self.pieces.is_empty() {
                return Poll::Ready(None);
            }
            self.poll_all(cx);
            let Some(index) = find(&self.pieces) else {
                return Poll::Pending;
            };
            match self.pieces.remove(index) {
                Some(Piece::Done(output)) => Poll::Ready(Some(output)),
                _ => unreachable!("a piece that is done was found"),
            }
        })
        .await
    }

    fn poll_all(&mut self, cx: &mut Context<'_>) {
        for piece in &mut self.pieces {
            if let Piece::Running(work) = piece
                && let Poll::Ready(output) = work.as_mut().poll(cx)
            {
                *piece = Piece::Done(output);
            }
        }
    }
}
