//! Pieces of the file in memory: those that are coming, and the last ones that came.
//!
//! ```text
//!   read 512K..1M     piece 0..768K (coming)        a new piece 768K..1M + readahead
//!        └── planned as ──► its part 512K..768K ──► its part 768K..1M
//! ```
//!
//! Pieces do not overlap, so nothing is fetched twice while it is in memory. A reader waits for as much of a piece
//! as it needs, not for all of it.

use block::{Buffer, ByteRange};
use executor::sync::Notify;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Pieces that are kept once they have come.
const KEPT: usize = 8;

/// Memory that is set aside before anything has come, in bytes.
const FIRST_RESERVE: u64 = 1 << 20;

/// Bytes from `start` on, as many as have come.
pub(super) struct Piece {
    pub(super) start: u64,
    /// Where it ends, or is to end.
    end: Cell<u64>,
    data: RefCell<Vec<u8>>,
    ended: Cell<bool>,
    /// The nearest offset that somebody waits for.
    awaited: Cell<u64>,
    changed: Notify,
}

impl Piece {
    pub(super) fn new(range: ByteRange) -> Rc<Self> {
        let reserve = range.length.min(FIRST_RESERVE) as usize;
        Rc::new(Self {
            start: range.offset,
            end: Cell::new(range.offset.saturating_add(range.length)),
            data: RefCell::new(Vec::with_capacity(reserve)),
            ended: Cell::new(false),
            awaited: Cell::new(u64::MAX),
            changed: Notify::new(),
        })
    }

    /// What is to come.
    pub(super) fn missing(&self) -> ByteRange {
        let filled = self.filled();
        ByteRange::new(filled, self.end.get() - filled)
    }

    /// Up to where it has come.
    fn filled(&self) -> u64 {
        self.start + self.data.borrow().len() as u64
    }

    /// Takes more in.
    pub(super) fn append(&self, data: &[u8]) {
        self.data.borrow_mut().extend_from_slice(data);
        if self.filled() >= self.awaited.get() {
            self.awaited.set(u64::MAX);
            self.changed.notify_all();
        }
    }

    /// No more comes: it ends here.
    pub(super) fn finish(&self) {
        self.end.set(self.filled());
        self.ended.set(true);
        self.changed.notify_all();
    }

    /// Waits until bytes up to `end` are there, or no more come; up to where they are there.
    async fn available(&self, end: u64) -> u64 {
        loop {
            let changed = self.changed.notified();
            let filled = self.filled();
            if filled >= end || self.ended.get() {
                return filled.min(end);
            }
            self.awaited.set(self.awaited.get().min(end));
            changed.await;
        }
    }

    /// Copies what is there from `offset` on to `buffer`, which asks for no more than that.
    fn copy_to(&self, offset: u64, buffer: &Buffer) {
        let from = (offset - self.start) as usize;
        buffer.copy_from_slice(&self.data.borrow()[from..from + buffer.len()]);
    }
}

/// The pieces of one thread.
#[derive(Default)]
pub(super) struct Pieces {
    /// Used last comes last.
    list: RefCell<Vec<Rc<Piece>>>,
}

/// A part of a read, within one piece.
pub(super) struct Part {
    piece: Rc<Piece>,
    range: ByteRange,
}

impl Pieces {
    /// The parts of a read in ascending order, and the pieces among theirs that nobody fetches yet: each is
    /// `readahead` longer than the read asks for, up to `length` or the next piece.
    pub(super) fn plan(
        &self,
        read: ByteRange,
        (readahead, length): (u64, u64),
    ) -> (Vec<Part>, Vec<Rc<Piece>>) {
        let (mut parts, mut new) = (Vec::new(), Vec::new());
        let end = read.offset + read.length;
        let mut at = read.offset;
        while at < end {
            let piece = self.with(at).unwrap_or_else(|| {
                let limit = self.next_start(at).min(length);
                let until = end.saturating_add(readahead).min(limit).max(at + 1);
                let piece = Piece::new(ByteRange::new(at, until - at));
                self.list.borrow_mut().push(Rc::clone(&piece));
                new.push(Rc::clone(&piece));
                piece
            });
            let until = piece.end.get().min(end);
            let range = ByteRange::new(at, until - at);
            parts.push(Part { piece, range });
            at = until;
        }
        self.forget_oldest();
        (parts, new)
    }

    /// The piece with byte `at`, used now.
    fn with(&self, at: u64) -> Option<Rc<Piece>> {
        let mut list = self.list.borrow_mut();
        let found = list
            .iter()
            .position(|piece| piece.start <= at && at < piece.end.get())?;
        let piece = list.remove(found);
        list.push(Rc::clone(&piece));
        Some(piece)
    }

    fn next_start(&self, at: u64) -> u64 {
        let list = self.list.borrow();
        let starts = list
            .iter()
            .map(|piece| piece.start)
            .filter(|start| *start > at);
        starts.min().unwrap_or(u64::MAX)
    }

    /// Drops what came to nothing, and the pieces used longest ago.
    fn forget_oldest(&self) {
        let mut list = self.list.borrow_mut();
        list.retain(|piece| !piece.ended.get() || piece.end.get() > piece.start);
        let ended = list.iter().filter(|piece| piece.ended.get()).count();
        let mut surplus = ended.saturating_sub(KEPT);
        list.retain(|piece| {
            let goes = surplus > 0 && piece.ended.get();
            surplus -= usize::from(goes);
            !goes
        });
    }

    /// Adds a piece that is fetched already.
    pub(super) fn add(&self, piece: Rc<Piece>) {
        self.list.borrow_mut().push(piece);
    }
}

impl Part {
    /// Copies the part to its place in `buffer`, that of a read from `start` on; where it ends, which is early
    /// when no more came.
    pub(super) async fn deliver(&self, (buffer, start): (&Buffer, u64)) -> u64 {
        let ByteRange { offset, length } = self.range;
        let end = self.piece.available(offset + length).await.max(offset);
        let place = (offset - start) as usize..(end - start) as usize;
        self.piece.copy_to(offset, &buffer.slice(place));
        end
    }

    /// Where the part should end.
    pub(super) fn end(&self) -> u64 {
        self.range.offset + self.range.length
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(pieces: &[Rc<Piece>]) -> Vec<(u64, u64)> {
        let span = |piece: &Rc<Piece>| (piece.start, piece.end.get());
        pieces.iter().map(span).collect()
    }

    #[test]
    fn nothing_in_memory_is_fetched_again() {
        let pieces = Pieces::default();
        let plan = |offset, length| {
            let (parts, new) = pieces.plan(ByteRange::new(offset, length), (100, 1000));
            let ends: Vec<u64> = parts.iter().map(Part::end).collect();
            (ends, spans(&new))
        };
        assert_eq!(plan(0, 200), (vec![200], vec![(0, 300)]));
        assert_eq!(plan(200, 200), (vec![300, 400], vec![(300, 500)]));
        assert_eq!(plan(100, 50), (vec![150], vec![]));
        assert_eq!(plan(700, 100), (vec![800], vec![(700, 900)]));
        assert_eq!(
            plan(400, 600),
            (vec![500, 700, 900, 1000], vec![(500, 700), (900, 1000)]),
            "readahead stops at pieces and at the end"
        );
    }

    #[test]
    fn the_pieces_used_last_are_kept() {
        let pieces = Pieces::default();
        let touch = |offset| {
            let (_, new) = pieces.plan(ByteRange::new(offset, 10), (0, 10_000));
            for piece in &new {
                piece.append(&[0; 10]);
                piece.finish();
            }
            new.len()
        };
        for index in 0..KEPT as u64 {
            assert_eq!(touch(index * 100), 1);
        }
        assert_eq!(touch(0), 0);
        assert_eq!(touch(5000), 1);
        assert_eq!(touch(5000) + touch(0), 0);
        assert_eq!(touch(100), 1, "used longest ago");
    }

    #[test]
    fn what_came_to_nothing_is_fetched_again() {
        let pieces = Pieces::default();
        let whole = ByteRange::new(0, 10);
        let (_, new) = pieces.plan(whole, (0, 100));
        new[0].append(&[1; 4]);
        new[0].finish();
        let (parts, new) = pieces.plan(whole, (0, 100));
        assert_eq!((parts.len(), spans(&new)), (2, vec![(4, 10)]));
        new[0].finish();
        let (_, new) = pieces.plan(whole, (0, 100));
        assert_eq!(spans(&new), [(4, 10)]);
    }
}
