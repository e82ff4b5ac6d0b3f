//! `quorum`: several copies of a disk, and what most of them hold.
//!
//! Options: `children`; `vote-threshold`, how many must agree; `read-pattern`: `quorum` (read all and vote) or
//! `fifo` (the first that can be read); `rewrite-corrupted`, which writes what won to copies that
//! differ; `blkverify`, which ends the process when two copies differ.
//!
//! ```text
//!   read ─► all copies ─► too few could be read ─► FAILURE, the most common error
//!                  └► equal contents counted ─► below the threshold ─► FAILURE, EIO
//!                                          └► winner ─► caller; the others REPORT_BAD (rewritten, if asked for)
//!   write, zeroes, flush ─► all copies ─► as many successes as the threshold?
//! ```
//!
//! Owns: the votes. Promises: bytes are voted on in private memory; every copy that fails or
//! differs is reported. Discards are not passed on: copies may answer differently afterwards. Must not
//! know: what the copies are.

mod vote;

use crate::together::{all, private, private_copy};
use block::error::Result;
use block::events::{QuorumBad, QuorumOperation, Reporter};
use block::open::{ChildRole, DriverEntry};
use block::{
    BlockStatus, BoxFuture, Buffer, ByteRange, ChildrenChange, ChildrenRefusal, Driver, Edge,
    Errno, Error, ErrorKind, ImageIdentity, IoFuture, Limits, OpenRequest, Resize, StatusExtent,
    WriteFlags, ZeroFlags,
};
use serde_json::{Map, Value};

/// The table line of `quorum`.
pub const ENTRY: DriverEntry = DriverEntry::new("quorum", |request| Box::pin(open(request)))
    .with_strong_options(&[
        "vote-threshold",
        "blkverify",
        "rewrite-corrupted",
        "read-pattern",
    ]);

/// Most bytes of one request: a read needs as many in memory per copy.
const MAX_TRANSFER: u32 = 64 << 20;

/// The node.
struct Quorum {
    children: Vec<Edge>,
    threshold: usize,
    reads: Reads,
    reporter: Reporter,
}

/// How reads are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reads {
    /// By the first copy that can be read.
    First,
    /// By a vote.
    Vote(Losers),
}

/// What becomes of copies that lose a vote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Losers {
    Reported,
    Rewritten,
    /// There must be none.
    EndTheProcess,
}

type Answer = std::result::Result<(), Errno>;

fn invalid<T>(message: &str) -> Result<T> {
    Err(Error::new(ErrorKind::Invalid, message))
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>> {
    let (threshold, reads) = take_rules(request)?;
    let role = match reads {
        Reads::Vote(Losers::Rewritten) => ChildRole::RepairedCopy,
        _ => ChildRole::Copy,
    };
    let children = request.children("children", role).await?;
    let lengths = children.iter().map(|child| child.node().length());
    if lengths.clone().min() != lengths.max() {
        let what = "Could not refresh total sector count";
        return Err(Error::io(what, Errno::EIO));
    }
    Ok(Box::new(Quorum {
        children,
        threshold,
        reads,
        reporter: request.reporter(),
    }))
}

/// How many copies must agree, and what is read how.
fn take_rules(request: &mut OpenRequest<'_>) -> Result<(usize, Reads)> {
    let children = request.count("children");
    if children == 0 {
        let words = "Number of provided children must be 1 or more";
        return Err(request.missing_or("children", words));
    }
    let too_low = "Parameter 'vote-threshold' expects a value >= 1";
    let threshold = match request.take_int("vote-threshold")? {
        Some(threshold) => threshold,
        None => return Err(request.missing_or("vote-threshold", too_low)),
    };
    if threshold < 1 {
        return invalid(too_low);
    }
    let threshold = usize::try_from(threshold).unwrap_or(usize::MAX);
    if threshold > children {
        return invalid("threshold may not exceed children count");
    }
    let pattern = request.take_str("read-pattern")?;
    let blkverify = request.take_bool("blkverify")?.unwrap_or(false);
    let rewrite = request.take_bool("rewrite-corrupted")?.unwrap_or(false);
    if blkverify {
        request.only_for_users("the end")?;
    }
    let reads = match pattern.as_deref() {
        None | Some("quorum") => Reads::Vote(losers((blkverify, rewrite), (children, threshold))?),
        Some("fifo") => Reads::First,
        Some(_) => return invalid("Please set read-pattern as fifo or quorum"),
    };
    Ok((threshold, reads))
}

fn losers(
    (blkverify, rewrite): (bool, bool),
    (children, threshold): (usize, usize),
) -> Result<Losers> {
    if blkverify && (children != 2 || threshold != 2) {
        return invalid(
            "blkverify=on can only be set if there are exactly two files and vote-threshold is 2",
        );
    }
    match (blkverify, rewrite) {
        (true, true) => invalid("rewrite-corrupted=on cannot be used with blkverify=on"),
        (true, false) => Ok(Losers::EndTheProcess),
        (false, true) => Ok(Losers::Rewritten),
        (false, false) => Ok(Losers::Reported),
    }
}

impl Quorum {
    /// Reports a copy that failed (`error`) or differs.
    fn report_bad(
        &self,
        child: usize,
        (operation, range): (QuorumOperation, ByteRange),
        error: Option<Errno>,
    ) {
        self.reporter.quorum_bad(QuorumBad {
            node_name: self.children[child].node().name().to_owned(),
            operation,
            range,
            error,
        });
    }

    /// Reports the copies that failed; the error, when too few did not.
    fn judge(
        &self,
        answers: &[Answer],
        (operation, range): (QuorumOperation, ByteRange),
    ) -> Answer {
        let mut failures = Vec::new();
        for (child, answer) in answers.iter().enumerate() {
            if let Err(errno) = *answer {
                self.report_bad(child, (operation, range), Some(errno));
                failures.push(errno);
            }
        }
        if answers.len() - failures.len() >= self.threshold {
            return Ok(());
        }
        if operation != QuorumOperation::Flush {
            self.reporter.quorum_failed(range);
        }
        Err(vote::most_common(&failures).unwrap_or(Errno::EIO))
    }

    async fn read_first(&self, offset: u64, buffer: Buffer) -> Answer {
        let range = ByteRange::new(offset, buffer.len() as u64);
        let mut answer = Err(Errno::EIO);
        for (index, child) in self.children.iter().enumerate() {
            answer = child.node().read(offset, buffer.clone()).await;
            match answer {
                Ok(()) => break,
                Err(errno) => {
                    self.report_bad(index, (QuorumOperation::Read, range), Some(errno));
                }
            }
        }
        answer
    }

    async fn read_voting(&self, offset: u64, (buffer, losers): (Buffer, Losers)) -> Answer {
        let range = ByteRange::new(offset, buffer.len() as u64);
        let copies: Vec<Buffer> = self
            .children
            .iter()
            .map(|_| private(buffer.len()))
            .collect();
        let reads = self.children.iter().zip(&copies);
        let reads = reads.map(|(child, copy)| child.node().read(offset, copy.clone()));
        let answers = all(reads.collect()).await;
        self.judge(&answers, (QuorumOperation::Read, range))?;
        let read: Vec<usize> = (0..copies.len()).filter(|&i| answers[i].is_ok()).collect();
        if losers == Losers::EndTheProcess {
            vote::insist_equal(&copies, range);
        }
        let winners = vote::largest_camp(&read, &copies);
        if winners.len() < self.threshold {
            self.reporter.quorum_failed(range);
            return Err(Errno::EIO);
        }
        let winner = &copies[winners[0]];
        buffer.copy_from(winner);
        let beaten: Vec<usize> = read.into_iter().filter(|i| !winners.contains(i)).collect();
        for &child in &beaten {
            self.report_bad(child, (QuorumOperation::Read, range), None);
        }
        if losers == Losers::Rewritten && !beaten.is_empty() {
            let repairs = beaten.iter().map(|&child| {
                let flags = WriteFlags::default();
                self.children[child]
                    .node()
                    .write(offset, winner.clone(), flags)
            });
            // Best effort, as the next read finds what is left.
            all(repairs.collect()).await;
        }
        Ok(())
    }

    /// Does the same to all copies.
    async fn everywhere<'a>(
        &'a self,
        about: (QuorumOperation, ByteRange),
        request: impl Fn(&'a Edge) -> IoFuture<'a>,
    ) -> Answer {
        let answers = all(self.children.iter().map(request).collect()).await;
        self.judge(&answers, about)
    }

    /// The longest piece that some copy has data for, or the shortest that reads as zeroes in all.
    async fn status(&self, range: ByteRange) -> std::result::Result<StatusExtent, Errno> {
        let (mut data, mut zeroes) = (0, range.length);
        for (index, child) in self.children.iter().enumerate() {
            match block::copy::status::above(child.node(), None, range).await {
                Ok(above) if above.status.data && !above.status.zero => {
                    data = data.max(above.length);
                }
                Ok(above) => zeroes = zeroes.min(above.length),
                Err(errno) => {
                    let about = (QuorumOperation::Read, range);
                    self.report_bad(index, about, Some(errno));
                    data = range.length;
                }
            }
        }
        let length = if data > 0 { data } else { zeroes };
        let status = BlockStatus {
            data: data > 0,
            zero: data == 0,
            allocated: true,
            ..BlockStatus::default()
        };
        Ok(StatusExtent { length, status })
    }

    async fn set_length(&self, resize: Resize) -> Result<()> {
        for child in &self.children {
            child.node().resize(resize).await?;
        }
        Ok(())
    }
}

impl Driver for Quorum {
    fn driver_name(&self) -> &'static str {
        "quorum"
    }
    fn length(&self) -> u64 {
        self.children[0].node().length()
    }
    fn limits(&self) -> Limits {
        let optimal = self.children.iter().map(|child| {
            let limits = child.node().driver().limits();
            (limits.optimal_transfer, limits.zero_alignment)
        });
        Limits {
            max_transfer: MAX_TRANSFER,
            optimal_transfer: optimal
                .clone()
                .map(|(optimal, _)| optimal)
                .max()
                .unwrap_or(0),
            zero_alignment: optimal.map(|(_, zeroes)| zeroes).max().unwrap_or(0),
            ..Limits::default()
        }
    }
    fn grows(&self) -> bool {
        self.children.iter().all(|child| child.node().grows())
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        match self.reads {
            Reads::First => IoFuture::boxed(self.read_first(offset, buffer)),
            Reads::Vote(losers) => IoFuture::boxed(self.read_voting(offset, (buffer, losers))),
        }
    }
    fn write(&self, offset: u64, buffer: Buffer, _flags: WriteFlags) -> IoFuture<'_> {
        IoFuture::boxed(async move {
            let buffer = private_copy(&buffer);
            let range = ByteRange::new(offset, buffer.len() as u64);
            let flags = WriteFlags::default();
            self.everywhere((QuorumOperation::Write, range), |child| {
                child.node().write(offset, buffer.clone(), flags)
            })
            .await
        })
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        // Each copy writes zero bytes when it must.
        let flags = ZeroFlags {
            no_fallback: false,
            ..flags
        };
        IoFuture::boxed(
            self.everywhere((QuorumOperation::Write, range), move |child| {
                child.node().write_zeroes(range, flags)
            }),
        )
    }
    fn discard(&self, _range: ByteRange) -> IoFuture<'_> {
        IoFuture::error(Errno::EOPNOTSUPP)
    }
    fn flush(&self) -> IoFuture<'_> {
        let range = ByteRange::new(0, self.length());
        IoFuture::boxed(self.everywhere((QuorumOperation::Flush, range), |child| {
            child.node().flush()
        }))
    }
    fn block_status(
        &self,
        range: ByteRange,
    ) -> BoxFuture<'_, std::result::Result<StatusExtent, Errno>> {
        Box::pin(self.status(range))
    }
    fn resize(&self, resize: Resize) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.set_length(resize))
    }
    fn check_children_change(
        &self,
        change: ChildrenChange,
    ) -> std::result::Result<(), ChildrenRefusal> {
        let reason = match change {
            ChildrenChange::Add if self.reads == Reads::Vote(Losers::EndTheProcess) => {
                "Cannot add a child to a quorum in blkverify mode".to_owned()
            }
            ChildrenChange::Remove if self.children.len() <= self.threshold => format!(
                "The number of children cannot be lower than the vote threshold {}",
                self.threshold
            ),
            _ => return Ok(()),
        };
        Err(ChildrenRefusal::Reason(reason))
    }
    fn close(&self) -> BoxFuture<'_, Answer> {
        Box::pin(async { Ok(()) })
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        let named = self.children.iter().map(|child| (child.name(), child));
        named.collect()
    }
    fn base_directory(&self) -> Option<Result<String>> {
        let message = "Cannot generate a base directory for quorum nodes";
        Some(invalid(message))
    }
    fn describe(&self) -> Map<String, Value> {
        Map::new()
    }
    fn identity(&self) -> Option<ImageIdentity> {
        None
    }
}
