//! Is the image consistent, and what can be done when it is not (what `qemu-img check` counts and
//! repairs; QEMU docs/interop/qcow2.txt).
//!
//! ```text
//!   layout      the header, with no more refused than would make the rest meaningless
//!   snapshots   their table is read; entries beyond the caps are dropped
//!   walk        every reference to a host cluster is counted: header, L1, L2, data, snapshots,
//!               bitmaps, LUKS header, refcount table and blocks      (bad L2 entries become zero)
//!   compare     with the refcounts on disk                            (refcounts are corrected)
//!     rebuild   or, when they cannot be, written anew behind everything else
//!   copied      COPIED flags against the refcounts                    (flags are corrected)
//!   snapshots   their table is written when entries were dropped
//!   marks       the dirty and the corrupt bit go
//! ```
//!
//! The check reads the file and not the caches of an open image: it runs on an image that nothing
//! else uses, or (without repair) on one that is drained and flushed. An L2 table that several L1
//! tables share is read once and counts as often as it is referred to.
//!
//! A repair may be cut off at any point, and may be repeated: each step is durable before the next
//! begins; counts go up before anything relies on them and down after the last reference is gone;
//! a new refcount structure uses only clusters past the end of the file until one sector of the
//! header switches to it. Nothing is discarded on the host, so that a wrong repair destroys no data.
//!
//! Hostile images: memory is bounded by [`CheckOptions::memory`], reading by the file's length
//! ([`io`]), findings told by [`MAX_MESSAGES`].

mod bitmaps;
mod copied;
mod io;
mod l2;
mod layout;
mod node;
mod rebuild;
mod refcounts;
mod references;
mod snapshots;
mod walk;

pub(super) use node::open_node;

use super::header::{AUTOCLEAR_BITMAPS, field, incompatible};
use super::tables::HostCluster;
use block::{CheckOptions, CheckResult, CheckSink, Edge, Errno, Error, Repair};
use io::Io;
use layout::{Extent, Layout};
use references::References;
use snapshots::SnapshotList;
use walk::Tables;

/// Most findings that are told one by one; the rest is counted.
const MAX_MESSAGES: u64 = 100_000;
/// Autoclear feature: data in the external file is raw.
const AUTOCLEAR_DATA_FILE_RAW: u64 = 2;

/// Checks the image in `file`, and repairs it as `options` say.
///
/// # Errors
/// `Io` with the errno that ended the check early (as `qemu-img check` reports it), `Corrupt` and
/// `Unsupported` when the header makes no sense.
pub async fn check(
    file: &Edge,
    options: CheckOptions,
    sink: &mut dyn CheckSink,
) -> Result<CheckResult, Error> {
    let layout = read_layout(file).await?;
    let mut check = Check::new(file, layout, options, sink)?;
    let done = check.run().await;
    check.report.finish();
    match done {
        Ok(()) => Ok(check.result),
        Err(errno) => Err(failed(errno)),
    }
}

fn failed(errno: Errno) -> Error {
    Error::io("Check failed", errno)
}

async fn read_layout(file: &Edge) -> Result<Layout, Error> {
    let failed = |errno| Error::io("Could not read qcow2 header", errno);
    let mut io = Io::new(file);
    let start = io.read(0, 512).await.map_err(failed)?;
    let length = super::header::Header::cluster_size_hint(&start);
    let bytes = io.read(0, length as u64).await.map_err(failed)?;
    Layout::parse(&bytes)
}

/// Tells findings, up to a number.
struct Report<'a> {
    sink: &'a mut dyn CheckSink,
    told: u64,
    /// What follows from a repair is no finding.
    quiet: bool,
}

impl Report<'_> {
    fn say(&mut self, text: std::fmt::Arguments<'_>) {
        if self.quiet {
            return;
        }
        self.told += 1;
        if self.told <= MAX_MESSAGES {
            self.sink.message(&text.to_string());
        }
    }
    /// Tells what ends the check.
    fn fail(&mut self, text: std::fmt::Arguments<'_>) {
        self.sink.error(&text.to_string());
    }
    fn finish(&mut self) {
        if self.told > MAX_MESSAGES {
            let more = self.told - MAX_MESSAGES;
            self.sink.message(&format!(
                "({more} more findings are counted and not listed)"
            ));
        }
    }
}

/// Where a refcount structure stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refcounts {
    /// Single refcounts may be wrong.
    Usable,
    /// It has to be written anew.
    Broken,
}

/// A check under way.
struct Check<'a> {
    io: Io<'a>,
    report: Report<'a>,
    repair: Repair,
    memory: u64,
    layout: Layout,
    snapshots: SnapshotList,
    references: References,
    tables: Tables,
    /// The refcount table, in host byte order.
    refcount_table: Vec<u64>,
    /// Clusters that refcount table and blocks were counted for.
    refcount_clusters: Vec<HostCluster>,
    refcounts: Refcounts,
    result: CheckResult,
}

impl<'a> Check<'a> {
    fn new(
        file: &'a Edge,
        layout: Layout,
        options: CheckOptions,
        sink: &'a mut dyn CheckSink,
    ) -> Result<Self, Error> {
        let io = Io::new(file);
        let clusters = layout.clusters(io.length());
        let references = References::new(clusters, layout.refcount_max(), options.memory);
        Ok(Self {
            references: references.map_err(failed)?,
            io,
            report: Report {
                sink,
                told: 0,
                quiet: false,
            },
            repair: options.repair,
            memory: options.memory,
            layout,
            snapshots: SnapshotList::default(),
            tables: Tables::default(),
            refcount_table: Vec::new(),
            refcount_clusters: Vec::new(),
            refcounts: Refcounts::Usable,
            result: CheckResult::default(),
        })
    }

    async fn run(&mut self) -> Result<(), Errno> {
        let found = self.read_snapshots().await?;
        self.check_refcounts().await?;
        self.result.corruptions += found.corruptions;
        self.report.quiet = true;
        let repaired = self.repair_snapshots(found).await;
        self.report.quiet = false;
        repaired?;
        let sound = self.result.check_errors == 0 && self.result.corruptions == 0;
        if self.repair != Repair::None && sound {
            self.clear_marks().await?;
        }
        Ok(())
    }

    /// Everything between reading and writing the snapshot table.
    async fn check_refcounts(&mut self) -> Result<(), Errno> {
        let size = self.layout.size;
        self.result.total_clusters = self.layout.clusters(size);
        self.read_refcount_table().await?;
        self.walk(self.repair).await?;
        if self.repair.errors() {
            // Entries that became zero lose their clusters only when they are gone for good.
            self.io.flush().await?;
        }
        let before = self.result;
        let mut end = self.compare(Repair::None).await?;
        if self.refcounts == Refcounts::Broken && self.repair.errors() {
            self.report
                .say(format_args!("Rebuilding refcount structure"));
            end = self.rebuild_and_recount(0).await?.end;
        } else if self.repair != Repair::None {
            if self.refcounts == Refcounts::Broken {
                self.report
                    .say(format_args!("ERROR need to rebuild refcount structures"));
                return Err(Errno::EIO);
            }
            if self.result.leaks != 0 || self.result.corruptions != 0 {
                self.result = before;
                end = self.compare(self.repair).await?;
                self.io.flush().await?;
            }
        }
        self.check_copied().await?;
        self.result.image_end_offset = Some(end.0 << self.layout.cluster_bits);
        Ok(())
    }

    /// The image is sound: it is neither dirty nor corrupt any more.
    async fn clear_marks(&mut self) -> Result<(), Errno> {
        self.io.flush().await?;
        if self.layout.version < 3 {
            return Ok(());
        }
        let cleared = incompatible::DIRTY | incompatible::CORRUPT;
        if self.layout.incompatible & cleared != 0 {
            self.layout.incompatible &= !cleared;
            let bytes = self.layout.incompatible.to_be_bytes();
            self.io.write(field::INCOMPATIBLE as u64, &bytes).await?;
        }
        let known = AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW;
        if self.layout.autoclear & !known != 0 {
            self.layout.autoclear &= known;
            let bytes = self.layout.autoclear.to_be_bytes();
            self.io.write(field::AUTOCLEAR as u64, &bytes).await?;
        }
        self.io.flush().await
    }

    /// Counts `times` references to all clusters of a range of bytes.
    fn count(&mut self, place: Extent, times: u64) -> Result<(), Errno> {
        self.count_and_tell(place, times, |_| {})
    }

    /// As `count`; tells `counted` the clusters whose count went up by all of `times`.
    fn count_and_tell(
        &mut self,
        place: Extent,
        times: u64,
        mut counted: impl FnMut(HostCluster),
    ) -> Result<(), Errno> {
        let Extent { offset, bytes } = place;
        if bytes == 0 || times == 0 {
            return Ok(());
        }
        let cluster_size = self.layout.cluster_size();
        let beyond = offset
            .0
            .checked_add(bytes)
            .is_none_or(|end| end >= self.io.length().saturating_add(cluster_size));
        if beyond {
            self.report.say(format_args!(
                "ERROR: counting reference for region exceeding the end of the file by one \
                 cluster or more: offset {:#x} size {bytes:#x}",
                offset.0
            ));
            self.result.corruptions += times;
            return Ok(());
        }
        let last = self.layout.cluster(offset.0 + bytes - 1);
        for cluster in self.layout.cluster(offset.0).0..=last.0 {
            let overflow = self.references.add(HostCluster(cluster), times)?;
            if overflow == 0 {
                counted(HostCluster(cluster));
            } else {
                let at = cluster << self.layout.cluster_bits;
                self.report.say(format_args!(
                    "ERROR: overflow cluster offset={at:#x}\nUse qemu-img amend to increase the \
                     refcount entry width or qemu-img convert to create a clean copy if the image \
                     cannot be opened for writing"
                ));
                self.result.corruptions += overflow;
            }
        }
        Ok(())
    }

    /// Fails when lists and counts together take more memory than allowed.
    fn check_memory(&self, more: u64) -> Result<(), Errno> {
        let lists = self.tables.memory() + self.refcount_clusters.len() as u64 * 8;
        match self.references.memory() + lists + more > self.memory {
            true => Err(Errno::ENOMEM),
            false => Ok(()),
        }
    }

    fn action(&self) -> &'static str {
        if self.repair.errors() {
            "Repairing"
        } else {
            "ERROR"
        }
    }
}
