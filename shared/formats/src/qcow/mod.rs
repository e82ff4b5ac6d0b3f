//! qcow images, version 1: two levels of tables, compressed clusters, the older AES encryption.
//!
//! ```text
//!   L2 entry  0 | offset of a cluster                        a cluster, plain or encrypted
//!             1 | bytes, cluster_bits | offset, the rest     raw deflate, byte behind byte
//! ```
//!
//! Allocating, and the order in which metadata reaches the disk, is `two_level`'s. The header never
//! changes. Compressed clusters are not encrypted; an image that encrypts takes no compressed writes.

mod create;
mod header;
#[cfg(test)]
mod tests;

use crate::bytes::read_bytes;
use crate::chunks::{Chunks, copy_part, decode};
use crate::codec::Codec;
use crate::luks::options::{Members, missing_key};
use crate::luks::{Sectors, legacy_aes};
use crate::two_level::{Entries, Entry, Shape, Tables, Token};
use block::cipher::SECTOR;
use block::format::{Extent, Format, Lookup, WritePlan};
use block::open::{BackingName, ChildRole, DriverEntry};
use block::{
    Buffer, ByteRange, Driver, Edge, EncodedBytes, Errno, Error, ErrorKind, FormatNode, Limits,
    OpenRequest, Purpose, SectorCipher, ZeroFlags,
};
use executor::HeapBuffer;
use executor::workers::offload;
use header::{Crypt, ENTRY_BYTES, HEADER_BYTES, Header};
use serde_json::{Map, Value, json};

/// The table line of `qcow`.
pub const ENTRY: DriverEntry = DriverEntry::new("qcow", |request| Box::pin(open(request)))
    .with_probe(header::probe)
    .with_compression()
    .with_strong_options(&["encrypt.key-secret"])
    .with_create(create::CREATOR);

/// The flag of an L2 entry that says that the cluster is compressed.
const COMPRESSED: u64 = 1 << 63;

/// What entries mean.
struct QcowEntries {
    cluster_bits: u32,
    table_bytes: u64,
    l1_end: u64,
    is_encrypted: bool,
}

impl QcowEntries {
    fn new(header: &Header) -> Self {
        Self {
            cluster_bits: header.cluster_bits.into(),
            table_bytes: ENTRY_BYTES << header.l2_bits,
            l1_end: header.l1_end(),
            is_encrypted: header.crypt != Crypt::None,
        }
    }

    /// Bits of an entry that are an offset, when the rest is a length.
    fn offset_bits(&self) -> u32 {
        63 - self.cluster_bits
    }

    /// Where the bytes of a compressed cluster are.
    fn packed(&self, descriptor: u64) -> ByteRange {
        let length = descriptor >> self.offset_bits() & ((1 << self.cluster_bits) - 1);
        ByteRange::new(descriptor & ((1 << self.offset_bits()) - 1), length)
    }

    /// The entry of a compressed cluster.
    fn packed_entry(&self, offset: u64, length: usize) -> Option<u64> {
        let fits = offset >> self.offset_bits() == 0 && length >> self.cluster_bits == 0;
        fits.then(|| COMPRESSED | (length as u64) << self.offset_bits() | offset)
    }
}

impl Entries for QcowEntries {
    const WIDTH: usize = ENTRY_BYTES as usize;

    fn load(bytes: &[u8]) -> u64 {
        u64::from_be_bytes(*bytes.first_chunk().expect("an entry has eight bytes"))
    }
    fn store(entry: u64, bytes: &mut [u8]) {
        bytes.copy_from_slice(&entry.to_be_bytes());
    }
    fn table(&self, entry: u64, end: u64) -> Result<Option<u64>, Errno> {
        let table_end = entry.checked_add(self.table_bytes);
        match entry {
            0 => Ok(None),
            _ if entry >= self.l1_end && table_end.is_some_and(|table_end| table_end <= end) => {
                Ok(Some(entry))
            }
            _ => Err(Errno::EIO),
        }
    }
    fn decode(&self, entry: u64, end: u64) -> Entry {
        match entry {
            0 => Entry::Unallocated,
            packed if packed & COMPRESSED != 0 => Entry::Encoded(packed & !COMPRESSED),
            offset if offset >= self.l1_end && offset < end => Entry::Data(offset),
            _ => Entry::Bad(Errno::EIO),
        }
    }
    fn zeroes_are_plain(&self) -> bool {
        !self.is_encrypted
    }
    fn zero(&self) -> Option<u64> {
        None
    }
    async fn before_growth(&self, _file: &Edge) -> Result<(), Errno> {
        Ok(())
    }
}

/// An open image.
struct Qcow {
    tables: Tables<QcowEntries>,
    header: Header,
    backing_name: Option<String>,
    cipher: Option<Sectors>,
    inflated: Chunks,
    writable: bool,
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>, Error> {
    let file = request.required_child("file", ChildRole::Image).await?;
    let header = read_header(&file).await?;
    let name = read_name(&file, &header).await?;
    let backing = match request.purpose() {
        Purpose::Check => {
            request.take("backing");
            None
        }
        _ => {
            let named = name
                .as_deref()
                .map(|name| BackingName { name, format: None });
            request.backing(&file, named).await?
        }
    };
    let parts = Parts {
        cipher: open_cipher(request, &header)?,
        header,
        backing_name: name,
    };
    let access = match (request.purpose(), request.node().read_only) {
        (Purpose::Describe, _) => Access::Describe,
        (_, true) => Access::Read,
        (_, false) => Access::Write,
    };
    let image = Qcow::open((file, backing), parts, access).await?;
    Ok(Box::new(FormatNode::new(image)))
}

/// What an image is opened from.
struct Parts {
    header: Header,
    backing_name: Option<String>,
    cipher: Option<Sectors>,
}

/// What is done with an image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    /// Its tables are not needed.
    Describe,
    Read,
    Write,
}

async fn read_header(file: &Edge) -> Result<Header, Error> {
    let bytes = read_bytes(file, 0, HEADER_BYTES).await;
    let bytes = bytes.map_err(|errno| Error::io("Could not read qcow header", errno))?;
    Header::parse(bytes.first_chunk().expect("as many as were asked for"))
}

/// The name of the backing file.
async fn read_name(file: &Edge, header: &Header) -> Result<Option<String>, Error> {
    let Some(place) = header.name else {
        return Ok(None);
    };
    let bytes = read_bytes(file, place.offset, place.length as usize).await;
    let bytes = bytes.map_err(|errno| Error::io("Could not read the backing file name", errno))?;
    match String::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(Some(name)),
        _ => {
            let message = "The name of the backing file is no text";
            Err(Error::new(ErrorKind::Corrupt, message))
        }
    }
}

/// Takes the `encrypt` option of a node and makes the image's cipher of it.
fn open_cipher(request: &mut OpenRequest<'_>, header: &Header) -> Result<Option<Sectors>, Error> {
    let invalid = |message: String| Err(Error::new(ErrorKind::Invalid, message));
    let mut members = Members::of_encrypt(request.take("encrypt"))?;
    let format = members.text("format")?;
    let secret = members.text("key-secret")?;
    members.finish()?;
    match (format, header.crypt) {
        (Some(format), Crypt::None) => {
            return invalid(format!(
                "No encryption in image header, but options specified format '{format}'"
            ));
        }
        (Some(format), Crypt::Aes) if format != "aes" => {
            return invalid(format!(
                "Header reported 'aes' encryption format but options specify '{format}'"
            ));
        }
        (_, Crypt::None) => return Ok(None),
        (_, Crypt::Aes) => {}
    }
    if !request.purpose().needs_content() {
        return Ok(None);
    }
    let secret = secret.ok_or_else(|| missing_key("encrypt."))?;
    Ok(Some(legacy_aes(&request.secret(&secret)?)))
}

fn inflate(packed: &[u8], plain: &mut [u8]) -> Result<(), crate::chunks::BadStream> {
    Codec::Zlib.decode(packed, plain)
}

impl Qcow {
    async fn open(
        (file, backing): (Edge, Option<Edge>),
        parts: Parts,
        access: Access,
    ) -> Result<Self, Error> {
        let Parts {
            header,
            backing_name,
            cipher,
        } = parts;
        let too_long = || Error::new(ErrorKind::Corrupt, "qcow: the file is too long");
        let in_use = file.node().length().max(header.l1_end());
        let next = in_use.checked_next_multiple_of(1 << header.cluster_bits);
        let shape = Shape {
            cluster_bits: header.cluster_bits.into(),
            l2_bits: header.l2_bits.into(),
            l1_offset: header.l1_offset,
            l1_entries: match access {
                Access::Describe => 0,
                Access::Read | Access::Write => header.l1_entries(),
            },
            next: next.ok_or_else(too_long)?,
        };
        Ok(Self {
            tables: Tables::open((file, backing), shape, QcowEntries::new(&header)).await?,
            header,
            backing_name,
            cipher,
            inflated: Chunks::new(1 << header.cluster_bits),
            writable: access == Access::Write,
        })
    }

    fn cluster_size(&self) -> usize {
        1 << self.header.cluster_bits
    }

    fn check_writable(&self) -> Result<(), Errno> {
        match self.writable {
            true => Ok(()),
            false => Err(Errno::EPERM),
        }
    }
}

impl Format for Qcow {
    type Token<'a> = Token<'a>;

    fn name(&self) -> &'static str {
        "qcow"
    }
    fn virtual_size(&self) -> u64 {
        self.header.disk_bytes
    }
    fn limits(&self) -> Limits {
        Limits {
            request_alignment: match self.header.crypt {
                Crypt::Aes => SECTOR as u32,
                Crypt::None => 1,
            },
            optimal_transfer: self.cluster_size() as u32,
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
        Some(self.tables.changes())
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
    async fn write_zeroes(&self, _range: ByteRange, _flags: ZeroFlags) -> Result<u64, Errno> {
        Err(Errno::EOPNOTSUPP)
    }
    async fn read_encoded(
        &self,
        offset: u64,
        descriptor: u64,
        buffer: Buffer,
    ) -> Result<(), Errno> {
        let (file, cluster_size) = (self.tables.file(), self.cluster_size());
        let packed = self.tables.entries.packed(descriptor);
        let make = || decode(file, (packed, inflate), cluster_size);
        let cluster = self.inflated.get(descriptor, make).await?;
        let within = offset as usize & (cluster_size - 1);
        copy_part(&cluster, within, &buffer)
    }
    fn can_encode(&self) -> bool {
        self.writable && self.header.crypt == Crypt::None
    }
    fn cipher(&self) -> Option<&dyn SectorCipher> {
        let cipher = self.cipher.as_ref();
        cipher.map(|cipher| cipher as &dyn SectorCipher)
    }
    async fn encode(
        &self,
        _range: ByteRange,
        buffer: Buffer,
    ) -> Result<Option<EncodedBytes>, Errno> {
        self.check_writable()?;
        let mut plain = HeapBuffer::zeroed(self.cluster_size());
        let filled = plain.get_mut(..buffer.len()).ok_or(Errno::EINVAL)?;
        buffer.copy_to_slice(filled);
        let work = move || {
            let mut packed = HeapBuffer::zeroed(plain.len());
            let most = packed.len() - 1;
            let length = Codec::Zlib.encode(&plain, &mut packed[..most]);
            length.map(|length| EncodedBytes {
                memory: packed,
                length,
            })
        };
        Ok(match self.cluster_size() <= Codec::Zlib.encoded_inline() {
            true => work(),
            false => offload(work).await,
        })
    }
    async fn store_encoded(&self, range: ByteRange, bytes: EncodedBytes) -> Result<(), Errno> {
        self.check_writable()?;
        let cluster = range.offset >> self.header.cluster_bits;
        let (entries, length) = (&self.tables.entries, bytes.length);
        let entry = |offset| entries.packed_entry(offset, length);
        self.tables.store_encoded((cluster, bytes), entry).await
    }
    async fn flush(&self) -> Result<(), Errno> {
        self.tables.file().node().flush().await
    }
    fn metadata_dirty(&self) -> bool {
        false
    }
    async fn make_empty(&self) -> Result<(), Error> {
        let failed = |errno| Error::io("Could not empty the image", errno);
        self.check_writable().map_err(failed)?;
        let end = self.header.l1_end().next_multiple_of(SECTOR as u64);
        let cleared = self.tables.clear(end).await;
        self.inflated.forget_all();
        cleared.map_err(failed)
    }
    async fn close(&self) -> Result<(), Errno> {
        match self.writable {
            true => self.tables.close().await,
            false => Ok(()),
        }
    }
    fn describe(&self) -> Map<String, Value> {
        let mut members = Map::new();
        if self.header.crypt != Crypt::None {
            members.insert("encrypted".into(), json!(true));
        }
        members.insert("cluster-size".into(), json!(self.cluster_size()));
        members.insert("dirty-flag".into(), json!(false));
        if let Some(name) = &self.backing_name {
            members.insert("backing-filename".into(), json!(name));
        }
        members
    }
}
