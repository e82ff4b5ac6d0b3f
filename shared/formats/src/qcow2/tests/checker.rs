//! An independent look at an image's bytes: are the refcounts right, and what does it read as?
//!
//! Written from the specification alone, without the driver's code.

use block::{SectorCipher, Tweak};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::rc::Rc;

/// An image as bytes.
pub(super) struct Checker<'b> {
    bytes: &'b [u8],
    /// The external data file, whose clusters are not counted.
    data: Option<&'b [u8]>,
    /// What the data is encrypted with.
    cipher: Option<&'b dyn SectorCipher>,
    cluster_size: u64,
    /// Bytes of an L2 entry.
    entry_size: u64,
    refcount_order: u32,
    size: u64,
}

/// An entry of the snapshot table.
pub(super) struct Snapshot {
    pub(super) name: String,
    /// Offset and entries of its L1 table.
    l1: (u64, u64),
    size: u64,
}

/// A stored bitmap.
pub(super) struct Bitmap {
    pub(super) name: String,
    pub(super) in_use: bool,
    /// Bytes of a granule.
    pub(super) granularity: u64,
    clusters: Vec<Vec<u8>>,
    /// Offset and entries of the table.
    table: (u64, u64),
    /// Offsets of the data clusters.
    data: Vec<u64>,
}

impl Bitmap {
    pub(super) fn is_dirty(&self, granule: u64) -> bool {
        let byte = granule as usize / 8;
        let cluster = self.clusters.first().map_or(1, Vec::len);
        self.clusters[byte / cluster][byte % cluster] >> (granule % 8) & 1 != 0
    }
}

/// What a check found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Findings {
    pub(super) corruptions: Vec<String>,
    pub(super) leaks: u64,
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

impl<'b> Checker<'b> {
    pub(super) fn new(bytes: &'b [u8]) -> Self {
        let mut checker = Self {
            bytes,
            data: None,
            cipher: None,
            cluster_size: 0,
            entry_size: 8,
            refcount_order: 4,
            size: 0,
        };
        assert_eq!(checker.u32(0), 0x5146_49fb, "not a qcow2 image");
        checker.cluster_size = 1 << checker.u32(20);
        checker.size = checker.u64(24);
        if checker.u32(4) >= 3 {
            checker.refcount_order = checker.u32(96);
            if checker.u64(72) & 16 != 0 {
                checker.entry_size = 16;
            }
        }
        checker
    }

    /// With the external data file.
    pub(super) fn with_data(self, data: &'b [u8]) -> Self {
        assert_ne!(self.u64(72) & 4, 0, "the image has no external data file");
        let data = Some(data);
        Self { data, ..self }
    }

    /// With what its data is encrypted with.
    pub(super) fn with_cipher(self, cipher: &'b dyn SectorCipher) -> Self {
        assert_ne!(self.u32(32), 0, "the image is not encrypted");
        let cipher = Some(cipher);
        Self { cipher, ..self }
    }

    fn u32(&self, at: u64) -> u32 {
        (self.u64(at) >> 32) as u32
    }

    fn u64(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        if let Some(bytes) = self.bytes.get(at as usize..at as usize + 8) {
            word.copy_from_slice(bytes);
            return u64::from_be_bytes(word);
        }
        for (byte, slot) in self.bytes.iter().skip(at as usize).zip(&mut word) {
            *slot = *byte;
        }
        u64::from_be_bytes(word)
    }

    /// The snapshot table.
    pub(super) fn snapshots(&self) -> Vec<Snapshot> {
        let mut at = self.u64(64);
        let snapshots = (0..self.u32(60)).map(|_| {
            let (id, name) = (self.u32(at + 12) >> 16, self.u32(at + 12) & 0xffff);
            let extra = u64::from(self.u32(at + 36));
            let name_at = (at + 40 + extra + u64::from(id)) as usize;
            let bytes = &self.bytes[name_at..name_at + name as usize];
            let snapshot = Snapshot {
                name: String::from_utf8(bytes.to_vec()).unwrap(),
                l1: (self.u64(at), u64::from(self.u32(at + 8))),
                size: if extra >= 16 {
                    self.u64(at + 48)
                } else {
                    self.size
                },
            };
            at += (40 + extra + u64::from(id) + u64::from(name)).next_multiple_of(8);
            snapshot
        });
        snapshots.collect()
    }

    /// Bytes of the snapshot table.
    fn snapshot_table(&self) -> (u64, u64) {
        let start = self.u64(64);
        let mut at = start;
        for _ in 0..self.u32(60) {
            let lengths = self.u32(at + 12);
            let length = 40 + u64::from(self.u32(at + 36)) + u64::from(lengths >> 16);
            at += (length + u64::from(lengths & 0xffff)).next_multiple_of(8);
        }
        (start, at - start)
    }

    /// Where the body of a header extension is.
    fn extension(&self, kind: u32) -> Option<u64> {
        let mut at = match self.u32(4) {
            2 => 72,
            _ => u64::from(self.u32(100)).next_multiple_of(8),
        };
        loop {
            match (self.u32(at), self.u32(at + 4)) {
                (0, _) => return None,
                (found, _) if found == kind => return Some(at + 8),
                (_, length) => at += 8 + u64::from(length).next_multiple_of(8),
            }
        }
    }

    /// Offset and bytes of the bitmap directory, and its entries.
    fn bitmap_directory(&self) -> Option<(u64, u64, u32)> {
        if self.u32(4) < 3 || self.u64(88) & 1 == 0 {
            return None;
        }
        let at = self.extension(0x2385_2875)?;
        Some((self.u64(at + 16), self.u64(at + 8), self.u32(at)))
    }

    /// The stored bitmaps.
    pub(super) fn bitmaps(&self) -> Vec<Bitmap> {
        let Some((mut at, bytes, count)) = self.bitmap_directory() else {
            return Vec::new();
        };
        let end = at + bytes;
        let bitmaps = (0..count).map(|_| {
            let (name, extra) = (self.u32(at + 16) & 0xffff, self.u32(at + 20));
            let name_at = at + 24 + u64::from(extra);
            let name = &self.bytes[name_at as usize..name_at as usize + name as usize];
            let table = (self.u64(at), u64::from(self.u32(at + 8)));
            let words = (0..table.1).map(|index| self.u64(table.0 + index * 8));
            let bitmap = Bitmap {
                name: String::from_utf8(name.to_vec()).unwrap(),
                in_use: self.u32(at + 12) & 1 != 0,
                granularity: 1 << (self.u32(at + 16) >> 16 & 0xff),
                clusters: words.map(|word| self.bitmap_cluster(word)).collect(),
                table,
                data: (0..table.1)
                    .map(|index| self.u64(table.0 + index * 8) & OFFSET)
                    .filter(|offset| *offset != 0)
                    .collect(),
            };
            at = (name_at + name.len() as u64).next_multiple_of(8);
            bitmap
        });
        let bitmaps = bitmaps.collect();
        assert_eq!(at, end, "the directory has another length");
        bitmaps
    }

    fn bitmap_cluster(&self, word: u64) -> Vec<u8> {
        let length = self.cluster_size as usize;
        match (word & OFFSET, word & 1) {
            (0, 0) => vec![0; length],
            (0, _) => vec![0xff; length],
            (at, _) => {
                let rest = self.bytes.get(at as usize..).unwrap_or_default();
                let mut cluster = rest[..rest.len().min(length)].to_vec();
                cluster.resize(length, 0);
                cluster
            }
        }
    }

    fn l1(&self) -> (u64, u64) {
        (self.u64(40), u64::from(self.u32(36)))
    }

    pub(super) fn refcount_table_clusters(&self) -> u32 {
        self.u32(56)
    }

    /// The first word of the L2 entry of the guest's bytes at `offset`, and the second where there is one; 0 without a table.
    pub(super) fn entry(&self, offset: u64) -> (u64, u64) {
        let entries = self.cluster_size / self.entry_size;
        let cluster = offset / self.cluster_size;
        match self.u64(self.l1().0 + cluster / entries * 8) & OFFSET {
            0 => (0, 0),
            l2 => {
                let at = l2 + cluster % entries * self.entry_size;
                let has_second = self.entry_size == 16;
                (self.u64(at), if has_second { self.u64(at + 8) } else { 0 })
            }
        }
    }

    /// The refcount of a host cluster.
    pub(super) fn refcount(&self, cluster: u64) -> u64 {
        let per_block = (self.cluster_size * 8) >> self.refcount_order;
        let table_entries = u64::from(self.u32(56)) * self.cluster_size / 8;
        let index = cluster / per_block;
        if index >= table_entries {
            return 0;
        }
        let block = self.u64(self.u64(48) + index * 8) & !0x1ff;
        if block == 0 {
            return 0;
        }
        let bits = 1_u64 << self.refcount_order;
        let bit = cluster % per_block * bits;
        if bits >= 8 {
            self.u64(block + bit / 8) >> (64 - bits)
        } else {
            let byte = self.bytes.get((block + bit / 8) as usize).unwrap_or(&0);
            u64::from(*byte) >> (bit % 8) & ((1 << bits) - 1)
        }
    }

    /// Counts the references to each cluster by what refers to it.
    fn references(&self) -> BTreeMap<u64, (u64, &'static str)> {
        let mut counts = BTreeMap::new();
        let mut count = |offset: u64, bytes: u64, what: &'static str| {
            for cluster in offset / self.cluster_size..(offset + bytes).div_ceil(self.cluster_size)
            {
                let entry = counts.entry(cluster).or_insert((0, what));
                entry.0 += 1;
            }
        };
        count(0, 1, "header");
        if self.u32(32) == 2 {
            let at = self.extension(0x0537_be77).expect("LUKS has a header");
            count(self.u64(at), self.u64(at + 8), "LUKS header");
        }
        let (l1, entries) = self.l1();
        count(l1, entries * 8, "L1 table");
        let table = self.u64(48);
        let table_bytes = u64::from(self.u32(56)) * self.cluster_size;
        count(table, table_bytes, "refcount table");
        for index in 0..table_bytes / 8 {
            let block = self.u64(table + index * 8) & !0x1ff;
            if block != 0 {
                count(block, self.cluster_size, "refcount block");
            }
        }
        let (snapshots, bytes) = self.snapshot_table();
        count(snapshots, bytes, "snapshot table");
        if let Some((offset, bytes, _)) = self.bitmap_directory() {
            count(offset, bytes, "bitmap directory");
        }
        for bitmap in self.bitmaps() {
            count(bitmap.table.0, bitmap.table.1 * 8, "bitmap table");
            for offset in bitmap.data {
                count(offset, self.cluster_size, "bitmap");
            }
        }
        let mut l1_tables = vec![(l1, entries)];
        for snapshot in self.snapshots() {
            count(snapshot.l1.0, snapshot.l1.1 * 8, "snapshot's L1 table");
            l1_tables.push(snapshot.l1);
        }
        for (l1, entries) in l1_tables {
            for index in 0..entries {
                let l2 = self.u64(l1 + index * 8) & OFFSET;
                if l2 == 0 {
                    continue;
                }
                count(l2, self.cluster_size, "L2 table");
                for number in 0..self.cluster_size / self.entry_size {
                    let entry = self.u64(l2 + number * self.entry_size);
                    let data = entry & OFFSET;
                    if entry & COMPRESSED != 0 {
                        let (offset, length) = self.compressed(entry);
                        count(offset, length, "compressed data");
                    } else if data != 0 && self.data.is_none() {
                        count(data, self.cluster_size, "data");
                    }
                }
            }
        }
        counts
    }

    /// Offset and length of the sectors that a compressed cluster lies in.
    fn compressed(&self, entry: u64) -> (u64, u64) {
        let x = 62 - (self.cluster_size.trailing_zeros() - 8);
        let offset = entry & ((1 << x) - 1);
        let additional = (entry & !(0b11 << 62)) >> x;
        (offset & !511, (additional + 1) * 512)
    }

    /// The content of a compressed cluster.
    fn decompressed(&self, entry: u64) -> Rc<Vec<u8>> {
        let x = 62 - (self.cluster_size.trailing_zeros() - 8);
        let start = (entry & ((1 << x) - 1)) as usize;
        let (offset, length) = self.compressed(entry);
        let end = ((offset + length) as usize).min(self.bytes.len());
        let packed = self.bytes.get(start..end).unwrap_or_default();
        let is_zstd = self.u32(4) >= 3 && self.u32(100) > 104 && self.bytes[104] == 1;
        // One cluster is looked at after very many power cuts.
        DECODED.with_borrow_mut(|decoded| {
            let plain = decoded
                .entry((is_zstd, packed.to_vec()))
                .or_insert_with(|| Rc::new(decode(packed, is_zstd, self.cluster_size as usize)));
            assert_eq!(plain.len() as u64, self.cluster_size, "{entry:#x}");
            Rc::clone(plain)
        })
    }

    /// Compares refcounts with references, and COPIED flags with refcounts.
    pub(super) fn check(&self) -> Findings {
        let mut findings = Findings::default();
        let references = self.references();
        for (&cluster, &(count, what)) in &references {
            let refcount = self.refcount(cluster);
            let at = cluster * self.cluster_size;
            if refcount < count {
                let text = format!("{what} at {at:#x}: refcount {refcount}, references {count}");
                findings.corruptions.push(text);
            } else if refcount > count {
                findings.leaks += 1;
            }
        }
        let clusters = self.bytes.len() as u64 / self.cluster_size + 1;
        findings.leaks += (0..clusters)
            .filter(|cluster| !references.contains_key(cluster) && self.refcount(*cluster) != 0)
            .count() as u64;
        self.check_copied(&mut findings);
        self.check_entries(&mut findings);
        findings
    }

    /// What the specification forbids in the entries of extended L2 tables and of external data files.
    fn check_entries(&self, findings: &mut Findings) {
        let (l1, entries) = self.l1();
        let per_table = self.cluster_size / self.entry_size;
        for index in 0..entries {
            let l2 = self.u64(l1 + index * 8) & OFFSET;
            for number in 0..if l2 == 0 { 0 } else { per_table } {
                let at = l2 + number * self.entry_size;
                let entry = self.u64(at);
                let guest = (index * per_table + number) * self.cluster_size;
                let mut found = |what: &str| {
                    let text = format!("L2 entry {entry:#x} of {guest:#x}: {what}");
                    findings.corruptions.push(text);
                };
                if self.data.is_some() && entry >> 63 != 0 && entry & OFFSET != guest {
                    found("not at its place in the data file");
                }
                if self.entry_size != 16 || entry >> 62 & 1 != 0 {
                    continue;
                }
                let bitmap = self.u64(at + 8);
                let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
                let has_host = entry & OFFSET != 0 || (self.data.is_some() && entry >> 63 != 0);
                if entry & 1 != 0 {
                    found("zero flag");
                }
                if allocated & zero != 0 || (allocated != 0 && !has_host) {
                    found(&format!("bitmap {bitmap:#x}"));
                }
            }
        }
    }

    fn check_copied(&self, findings: &mut Findings) {
        let mut check = |entry: u64, what: &str| {
            if entry & COMPRESSED != 0 {
                if entry >> 63 != 0 {
                    let text = format!("{what} {entry:#x}: compressed and COPIED");
                    findings.corruptions.push(text);
                }
                return;
            }
            let offset = entry & OFFSET;
            let copied = entry >> 63 != 0;
            let refcount = self.refcount(offset / self.cluster_size);
            if offset != 0 && copied != (refcount == 1) {
                let text = format!("{what} {entry:#x}: COPIED with refcount {refcount}");
                findings.corruptions.push(text);
            }
        };
        let (l1, entries) = self.l1();
        for index in 0..entries {
            let entry = self.u64(l1 + index * 8);
            check(entry, "L1 entry");
            let l2 = entry & OFFSET;
            for number in 0..self.cluster_size / self.entry_size {
                if l2 != 0 && self.data.is_none() {
                    check(self.u64(l2 + number * self.entry_size), "L2 entry");
                }
            }
        }
    }

    /// Where the guest's bytes at `offset` are.
    fn place(&self, l1: u64, offset: u64) -> Place {
        let entries = self.cluster_size / self.entry_size;
        let cluster = offset / self.cluster_size;
        let l2 = self.u64(l1 + cluster / entries * 8) & OFFSET;
        if l2 == 0 {
            return Place::Backing;
        }
        let at = l2 + cluster % entries * self.entry_size;
        let entry = self.u64(at);
        if entry & COMPRESSED != 0 {
            return Place::Compressed(entry);
        }
        let host = (entry & OFFSET) + offset % self.cluster_size;
        if self.entry_size == 16 {
            let subcluster = offset % self.cluster_size / (self.cluster_size / 32);
            let bitmap = self.u64(at + 8);
            return match (bitmap >> subcluster & 1, bitmap >> (32 + subcluster) & 1) {
                (1, _) => Place::File(host),
                (_, 1) => Place::Zero,
                _ => Place::Backing,
            };
        }
        let is_first = self.data.is_some() && entry >> 63 != 0;
        match (entry & 1, entry & OFFSET) {
            (1, _) => Place::Zero,
            (_, 0) if !is_first => Place::Backing,
            _ => Place::File(host),
        }
    }

    /// The whole disk over a backing's content.
    pub(super) fn read_all(&self, backing: &[u8]) -> Vec<u8> {
        self.read_from(self.l1().0, self.size, backing)
    }

    /// The whole disk as it was when a snapshot was taken.
    pub(super) fn read_snapshot(&self, snapshot: &Snapshot) -> Vec<u8> {
        self.read_from(snapshot.l1.0, snapshot.size, &[])
    }

    fn read_from(&self, l1: u64, size: u64, backing: &[u8]) -> Vec<u8> {
        let mut disk = vec![0; size as usize];
        let mut last = (0, Rc::default());
        for (number, sector) in disk.chunks_mut(512).enumerate() {
            let offset = number as u64 * 512;
            let place = self.place(l1, offset);
            let (source, at) = match place {
                Place::Backing => (backing, offset),
                Place::Zero => continue,
                Place::File(host) => (self.data.unwrap_or(self.bytes), host),
                Place::Compressed(entry) => {
                    if last.0 != entry {
                        last = (entry, self.decompressed(entry));
                    }
                    (&last.1[..], offset % self.cluster_size)
                }
            };
            let rest = source.get(at as usize..).unwrap_or_default();
            let held = rest.len().min(sector.len());
            sector[..held].copy_from_slice(&rest[..held]);
            if let (Some(cipher), Place::File(host)) = (self.cipher, place) {
                let tied_to = match cipher.tweak() {
                    Tweak::GuestOffset => offset,
                    Tweak::HostOffset => host,
                };
                cipher.decrypt(tied_to, sector);
            }
        }
        disk
    }
}

/// Decoded clusters by their bytes, and whether these are zstd's.
type Decoded = HashMap<(bool, Vec<u8>), Rc<Vec<u8>>>;

thread_local! {
    static DECODED: RefCell<Decoded> = RefCell::default();
}

/// Decodes by means of decoders that read streams; shorter than a cluster when the stream is bad.
fn decode(packed: &[u8], is_zstd: bool, cluster_size: usize) -> Vec<u8> {
    let mut plain = vec![0; cluster_size];
    let mut filled = 0;
    if is_zstd {
        let mut input = zstd_safe::InBuffer::around(packed);
        let mut context = zstd_safe::DCtx::create();
        let mut output = zstd_safe::OutBuffer::around(&mut plain[..]);
        while filled < cluster_size && input.pos < packed.len() {
            if context.decompress_stream(&mut output, &mut input).is_err() {
                break;
            }
            filled = output.pos();
        }
    } else {
        let mut decoder = flate2::read::DeflateDecoder::new(packed);
        while filled < cluster_size {
            match decoder.read(&mut plain[filled..]) {
                Ok(1..) => filled = decoder.total_out() as usize,
                _ => break,
            }
        }
    }
    plain.truncate(filled);
    plain
}

/// Where a sector's bytes are.
#[derive(Clone, Copy)]
enum Place {
    Backing,
    Zero,
    /// An offset of the image file.
    File(u64),
    /// In the compressed cluster of this L2 entry.
    Compressed(u64),
}
