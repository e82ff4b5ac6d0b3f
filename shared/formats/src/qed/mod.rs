//! QED images (QEMU docs/interop/qed_spec.txt): two levels of tables, no reference counts.
//!
//! Allocating, and the order in which metadata reaches the disk, is `two_level`'s. What is added here:
//! before the file is made longer, the header says that the image has to be checked (`marks.rs`);
//! closing takes that back. An image that says so is checked and repaired when it is opened for
//! writing, and what nothing refers to at its end is cut off; who only reads leaves it as it is.
//!
//! The header is written in one sector, after what it refers to is durable; the name of a backing file goes
//! where the one before is not (`create.rs`).

mod check;
mod create;
mod header;
mod marks;
#[cfg(test)]
mod tests;

use crate::bytes::{read_bytes, write_bytes};
use crate::two_level::{Entries, Entry, MAX_L1_ENTRIES, Shape, Tables, Token};
use block::format::{Extent, Format, Lookup, WritePlan};
use block::open::{BackingName, ChildRole, DriverEntry};
use block::{
    BackingReference, ByteRange, CheckOptions, CheckResult, CheckSink, Driver, Edge, Errno, Error,
    ErrorKind, FormatNode, Limits, OpenRequest, Preallocation, Purpose, Repair, Resize, ZeroFlags,
};
use header::{
    AUTOCLEAR_AT, BACKING_IS_RAW, ENTRY_BYTES, HEADER_BYTES, Header, NEED_CHECK, SIZE_AT,
};
use marks::Marks;
use serde_json::{Map, Value, json};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The table line of `qed`.
pub const ENTRY: DriverEntry = DriverEntry::new("qed", |request| Box::pin(open(request)))
    .with_probe(header::probe)
    .with_create(create::CREATOR);

/// Findings of a repair at open that are logged.
const MAX_REPAIR_MESSAGES: usize = 100;
/// The L2 entry of a cluster of zeroes.
const ZERO_CLUSTER: u64 = 1;

/// What entries mean.
struct QedEntries {
    cluster_size: u64,
    table_bytes: u64,
    header_end: u64,
    marks: Marks,
}

impl QedEntries {
    fn new(header: &Header) -> Self {
        Self {
            cluster_size: header.cluster_size.into(),
            table_bytes: header.table_bytes(),
            header_end: header.header_end(),
            marks: Marks::new(header.features),
        }
    }

    fn cluster_bits(&self) -> u32 {
        self.cluster_size.trailing_zeros()
    }

    /// Whether a cluster may begin there, in a file of `end` bytes.
    fn is_cluster(&self, offset: u64, end: u64) -> bool {
        offset.is_multiple_of(self.cluster_size) && offset >= self.header_end && offset < end
    }
}

impl Entries for QedEntries {
    const WIDTH: usize = ENTRY_BYTES as usize;

    fn load(bytes: &[u8]) -> u64 {
        u64::from_le_bytes(*bytes.first_chunk().expect("an entry has eight bytes"))
    }
    fn store(entry: u64, bytes: &mut [u8]) {
        bytes.copy_from_slice(&entry.to_le_bytes());
    }
    fn table(&self, entry: u64, end: u64) -> Result<Option<u64>, Errno> {
        if entry == 0 {
            return Ok(None);
        }
        let last = entry.checked_add(self.table_bytes - self.cluster_size);
        match self.is_cluster(entry, end) && last.is_some_and(|last| last < end) {
            true => Ok(Some(entry)),
            false => Err(Errno::EINVAL),
        }
    }
    fn decode(&self, entry: u64, end: u64) -> Entry {
        match entry {
            0 => Entry::Unallocated,
            ZERO_CLUSTER => Entry::Zero,
            offset if self.is_cluster(offset, end) => Entry::Data(offset),
            _ => Entry::Bad(Errno::EINVAL),
        }
    }
    fn zero(&self) -> Option<u64> {
        Some(ZERO_CLUSTER)
    }
    async fn before_growth(&self, file: &Edge) -> Result<(), Errno> {
        self.marks.mark(file).await
    }
}

/// An open image.
struct Qed {
    tables: Tables<QedEntries>,
    header: Mutex<Header>,
    backing_name: Mutex<Option<String>>,
    disk_bytes: AtomicU64,
    purpose: Purpose,
    writable: bool,
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>, Error> {
    let file = request.required_child("file", ChildRole::Image).await?;
    let header = read_header(&file).await?;
    let name = read_name(&file, &header).await?;
    let purpose = request.purpose();
    let backing = match purpose {
        Purpose::Check => {
            request.take("backing");
            None
        }
        _ => {
            let named = name.as_deref().map(|name| BackingName {
                name,
                format: format_of(header.features),
            });
            request.backing(&file, named).await?
        }
    };
    let options = OpenOptions {
        purpose,
        read_only: request.node().read_only,
    };
    let image = Qed::open((file, backing), (header, name), options).await?;
    Ok(Box::new(FormatNode::new(image)))
}

/// How an image is opened.
struct OpenOptions {
    purpose: Purpose,
    read_only: bool,
}

async fn read_header(file: &Edge) -> Result<Header, Error> {
    let bytes = read_bytes(file, 0, HEADER_BYTES).await;
    let bytes = bytes.map_err(|errno| Error::io("Failed to read QED header", errno))?;
    let length = file.node().length();
    Header::parse(
        bytes.first_chunk().expect("as many as were asked for"),
        length,
    )
}

/// The name of the backing file.
async fn read_name(file: &Edge, header: &Header) -> Result<Option<String>, Error> {
    let Some(place) = header.name else {
        return Ok(None);
    };
    let bytes = read_bytes(file, place.offset.into(), place.length as usize).await;
    let bytes = bytes.map_err(|errno| Error::io("Failed to read backing filename", errno))?;
    match String::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(Some(name)),
        _ => {
            let message = "The name of the backing file is no text";
            Err(Error::new(ErrorKind::Corrupt, message))
        }
    }
}

/// The format of the backing file, as far as the features tell it.
fn format_of(features: u64) -> Option<&'static str> {
    (features & BACKING_IS_RAW != 0).then_some("raw")
}

impl Qed {
    async fn open(
        (file, backing): (Edge, Option<Edge>),
        (mut header, name): (Header, Option<String>),
        options: OpenOptions,
    ) -> Result<Self, Error> {
        let writable = !options.read_only;
        let failed = |errno| Error::io("Could not update the QED header", errno);
        if writable && header.autoclear != 0 {
            let written = write_bytes(&file, AUTOCLEAR_AT, &[0; 8]).await;
            written.map_err(failed)?;
            file.node().flush().await.map_err(failed)?;
            header.autoclear = 0;
        }
        let entries = QedEntries::new(&header);
        let is_served = options.purpose != Purpose::Check;
        if writable && is_served && header.features & NEED_CHECK != 0 {
            repair(&file, (&header, &entries)).await?;
            header.features = entries.marks.features();
        }
        let cluster_size = entries.cluster_size;
        let in_use = file
            .node()
            .length()
            .max(entries.header_end)
            .max(header.l1_offset + header.table_bytes());
        let mut shape = Shape {
            cluster_bits: entries.cluster_bits(),
            l2_bits: header.table_entries().trailing_zeros(),
            l1_offset: header.l1_offset,
            l1_entries: 0,
            next: in_use
                .checked_next_multiple_of(cluster_size)
                .ok_or_else(|| Error::new(ErrorKind::Corrupt, "QED: the file is too long"))?,
        };
        if options.purpose != Purpose::Describe {
            shape.l1_entries = l1_entries(&shape, header.disk_bytes)?;
        }
        Ok(Self {
            tables: Tables::open((file, backing), shape, entries).await?,
            disk_bytes: AtomicU64::new(header.disk_bytes),
            header: Mutex::new(header),
            backing_name: Mutex::new(name),
            purpose: options.purpose,
            writable,
        })
    }

    fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn marks(&self) -> &Marks {
        &self.tables.entries.marks
    }

    fn check_writable(&self) -> Result<(), Errno> {
        match self.writable {
            true => Ok(()),
            false => Err(Errno::EPERM),
        }
    }
}

/// L1 entries for a disk, if they may be in memory.
fn l1_entries(shape: &Shape, disk_bytes: u64) -> Result<u64, Error> {
    let entries = shape.l1_entries_for(disk_bytes);
    if entries > MAX_L1_ENTRIES as u64 {
        let message = format!("QED: the disk needs {entries} L1 entries, max is {MAX_L1_ENTRIES}");
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    Ok(entries)
}

/// Checks and repairs an image that was not closed, and cuts off what was never referred to.
async fn repair(file: &Edge, (header, entries): (&Header, &QedEntries)) -> Result<(), Error> {
    let name = file.node().name();
    tracing::info!(file = name, "QED image was not closed cleanly; repairing");
    let context = |error: Error| error.context("Could not repair dirty image");
    let failed = |errno| context(Error::io("Could not write", errno));
    let mut messages = Vec::new();
    let options = CheckOptions::repairing(Repair::All);
    let checked = check::check(file, (header, entries), options, &mut messages).await;
    for message in messages.iter().take(MAX_REPAIR_MESSAGES) {
        tracing::warn!(file = name, "{message}");
    }
    let checked = checked.map_err(context)?;
    tracing::info!(file = name, result = ?checked.result, "QED image repaired");
    if checked.result.corruptions != 0 {
        let message = "Could not repair dirty image: errors remain";
        return Err(Error::new(ErrorKind::Corrupt, message));
    }
    let node = file.node();
    if node.grows() && node.length() > checked.used_end {
        let resize = Resize::to(checked.used_end);
        node.resize(resize).await.map_err(context)?;
    }
    node.flush().await.map_err(failed)?;
    entries.marks.unmark(file).await.map_err(failed)
}

impl Format for Qed {
    type Token<'a> = Token<'a>;

    fn name(&self) -> &'static str {
        "qed"
    }
    fn virtual_size(&self) -> u64 {
        self.disk_bytes.load(Acquire)
    }
    fn limits(&self) -> Limits {
        let cluster_size = self.tables.entries.cluster_size as u32;
        Limits {
            optimal_transfer: cluster_size,
            zero_alignment: cluster_size,
            ..Limits::default()
        }
    }
    fn file(&self) -> &Edge {
        self.tables.file()
    }
    fn takes_backing(&self) -> bool {
        true
    }
    fn backing(&self) -> Option<&Edge> {
        self.tables.backing()
    }
    fn lookup(&self, range: ByteRange) -> Lookup {
        self.tables.lookup(range)
    }
    fn changes(&self) -> Option<u64> {
        // Data keeps its place.
        Some(0)
    }
    async fn resolve(&self, range: ByteRange) -> Result<Extent, Errno> {
        self.tables.resolve(range).await
    }
    async fn prepare_write(&self, range: ByteRange) -> Result<WritePlan<Token<'_>>, Errno> {
        self.check_writable()?;
        self.tables.prepare(range).await
    }
    async fn commit<'a>(&'a self, plan: WritePlan<Token<'a>>) -> Result<(), Errno> {
        self.tables.commit(plan).await
    }
    async fn abort<'a>(&'a self, plan: WritePlan<Token<'a>>) {
        self.tables.abort(plan);
    }
    async fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<u64, Errno> {
        self.check_writable()?;
        self.tables.zero(range, (self.virtual_size(), flags)).await
    }
    async fn flush(&self) -> Result<(), Errno> {
        self.tables.file().node().flush().await
    }
    fn metadata_dirty(&self) -> bool {
        false
    }
    async fn resize(&self, resize: Resize) -> Result<(), Error> {
        let failed = |errno| Error::io("Could not resize the image", errno);
        self.check_writable().map_err(failed)?;
        let refuse = |message: String| Err(Error::new(ErrorKind::Unsupported, message));
        let mode = match resize.preallocation {
            Preallocation::Off => None,
            Preallocation::Metadata => Some("metadata"),
            Preallocation::Falloc => Some("falloc"),
            Preallocation::Full => Some("full"),
        };
        if let Some(mode) = mode {
            return refuse(format!("Unsupported preallocation mode '{mode}'"));
        }
        if !self.header().takes(resize.length) {
            return refuse("Invalid image size specified".into());
        }
        if resize.length < self.virtual_size() {
            return refuse("Shrinking images is currently not supported".into());
        }
        let entries = l1_entries(self.tables.shape(), resize.length)?;
        self.tables.load_l1(entries).await?;
        let file = self.tables.file();
        let written = write_bytes(file, SIZE_AT, &resize.length.to_le_bytes()).await;
        written.map_err(failed)?;
        file.node().flush().await.map_err(failed)?;
        self.header().disk_bytes = resize.length;
        self.disk_bytes.store(resize.length, Release);
        Ok(())
    }
    async fn refer_to_backing(&self, to: BackingReference) -> Result<(), Error> {
        let failed = |errno| Error::io("Could not update the QED header", errno);
        self.check_writable().map_err(failed)?;
        let _held = self.marks().hold().await;
        let mut header = *self.header();
        header.features = self.marks().features();
        create::refer(&mut header, to.name.as_deref(), to.format.as_deref())?;
        let file = self.tables.file();
        if let (Some(place), Some(name)) = (header.name, &to.name) {
            let offset = place.offset.into();
            let written = write_bytes(file, offset, name.as_bytes()).await;
            written.map_err(failed)?;
        }
        // What was written because the new backing differs is durable when the header tells of it.
        file.node().flush().await.map_err(failed)?;
        let written = write_bytes(file, 0, &header.encode()).await;
        written.map_err(failed)?;
        file.node().flush().await.map_err(failed)?;
        self.marks().written(header.features);
        *self.header() = header;
        let mut name = self.backing_name.lock();
        let name = name.as_mut().unwrap_or_else(|poisoned| poisoned.get_mut());
        **name = to.name;
        Ok(())
    }
    async fn close(&self) -> Result<(), Errno> {
        if !self.writable || self.purpose == Purpose::Check {
            return Ok(());
        }
        self.tables.close().await?;
        self.marks().unmark(self.tables.file()).await
    }
    async fn check(
        &self,
        options: CheckOptions,
        sink: &mut dyn CheckSink,
    ) -> Result<CheckResult, Error> {
        if options.repair != Repair::None && self.purpose != Purpose::Check {
            let message = "an image in use cannot be repaired; it must be opened for a check";
            return Err(Error::new(ErrorKind::Busy, message));
        }
        let (header, file) = (*self.header(), self.tables.file());
        let entries = &self.tables.entries;
        let checked = check::check(file, (&header, entries), options, sink).await?;
        if options.repair != Repair::None && checked.result.corruptions == 0 {
            let unmarked = entries.marks.unmark(file).await;
            unmarked.map_err(|errno| Error::io("Check failed", errno))?;
        }
        Ok(checked.result)
    }
    fn describe(&self) -> Map<String, Value> {
        let features = self.marks().features();
        let mut members = Map::new();
        let cluster_size = self.tables.entries.cluster_size;
        members.insert("cluster-size".into(), json!(cluster_size));
        members.insert("dirty-flag".into(), json!(features & NEED_CHECK != 0));
        let name = self.backing_name.lock();
        if let Some(name) = &*name.unwrap_or_else(PoisonError::into_inner) {
            members.insert("backing-filename".into(), json!(name));
            if let Some(format) = format_of(features) {
                members.insert("backing-filename-format".into(), json!(format));
            }
        }
        members
    }
}
