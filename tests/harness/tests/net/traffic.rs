//! Frames through a device that returns them, checked one by one.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use harness::net::frames::{Mac, number_of, numbered, station};
use harness::net::{Header, Pair, ReceiveQueue, TransmitQueue, wait};

/// Ends of the frames that are sent.
pub(crate) const ENDS: (Mac, Mac) = (station(2), station(1));

/// A plan of frames.
pub(crate) struct Traffic {
    /// How many.
    pub frames: u64,
    /// Their lengths, in turn.
    pub lengths: Vec<usize>,
    /// How their chains are cut, in turn.
    pub cuts: Vec<Vec<usize>>,
    /// Most frames on their way.
    pub window: u64,
}

impl Traffic {
    /// That many frames of these lengths.
    pub(crate) fn new(frames: u64, lengths: &[usize]) -> Self {
        Self {
            frames,
            lengths: lengths.to_vec(),
            cuts: vec![vec![]],
            window: 64,
        }
    }

    /// Frame number `number`.
    pub(crate) fn frame(&self, number: u64) -> Vec<u8> {
        let length = self.lengths[number as usize % self.lengths.len()];
        numbered(ENDS, number, length)
    }

    fn cuts(&self, number: u64, bytes: usize) -> &[usize] {
        let cuts = &self.cuts[number as usize % self.cuts.len()];
        let total: usize = cuts.iter().sum();
        if total < bytes { cuts } else { &[] }
    }

    /// Sends every frame into a device that echoes, and checks that each comes back: once, whole and in order.
    pub(crate) fn echoed(&self, pair: &mut Pair, limit: Duration) -> Result<()> {
        self.carried(&mut pair.tx, &mut pair.rx, limit)
    }

    /// Sends every frame and checks that each arrives at the other queue: once, whole and in order.
    pub(crate) fn carried(
        &self,
        tx: &mut TransmitQueue,
        rx: &mut ReceiveQueue,
        limit: Duration,
    ) -> Result<()> {
        let (mut sent, mut back) = (0, 0);
        let start = Instant::now();
        while back < self.frames {
            while sent < self.frames && sent - back < self.window {
                let frame = self.frame(sent);
                let cuts = self.cuts(sent, frame.len() + 12);
                if !tx.has_room(cuts.len() + 1) {
                    break;
                }
                tx.queue_cut(Header::default(), &frame, cuts)?;
                sent += 1;
            }
            tx.kick()?;
            let mut progress = tx.reap()? > 0;
            while let Some(received) = rx.try_frame()? {
                let number = number_of(&received.frame)?;
                ensure!(number == back, "frame {number} came instead of {back}");
                let expected = self.lengths[number as usize % self.lengths.len()];
                ensure!(
                    received.frame.len() == expected,
                    "frame {number} has {} bytes instead of {expected}",
                    received.frame.len()
                );
                back += 1;
                progress = true;
            }
            rx.fill()?;
            let left = limit.saturating_sub(start.elapsed());
            ensure!(
                !left.is_zero(),
                "{back} of {sent} frames arrived within {limit:?}"
            );
            if back < self.frames && !progress {
                wait(tx, rx, left)?;
            }
        }
        tx.drain()
    }
}
