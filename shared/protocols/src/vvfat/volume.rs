//! A disk with a FAT volume, computed: what is at an offset is told and not stored
//! ("FAT: General Overview of On-Disk Format").
//!
//! ```text
//!   hard disk:  partition table │ (62 sectors) │ volume
//!   volume:     boot sector, ... │ FAT │ FAT │ top directory (FAT12, FAT16) │ clusters: 2, 3, ...
//! ```
//!
//! Every file and directory has clusters that follow one another, so the allocation tables follow from
//! where each begins and ends. Owns: the disk's geometry, directories (in memory), places of files.

use super::names::{Names, SHORT, Taken};
use super::records::{self, Facts, RECORD};
use super::tree::Tree;
use block::error::{Error, ErrorKind, Result};

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;
/// Sectors before the partition of a hard disk.
const BEFORE_PARTITION: u64 = 63;
const FATS: u64 = 2;
const FIRST_CLUSTER: u32 = 2;
/// Below these numbers of clusters a volume is FAT12, or FAT16.
const FAT12_CLUSTERS: u64 = 4085;
const FAT16_CLUSTERS: u64 = 65525;
/// FAT32 has 28 bits for a cluster, and a partition 32 for a sector.
const FAT32_CLUSTERS: u64 = (1 << 28) - 16;
const MAX_SECTORS: u64 = u32::MAX as u64;
/// Which volume it is; a constant, as the content is not.
const SERIAL: [u8; 4] = *b"obfs";

/// Bits of an entry of the allocation table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    /// FAT12.
    Twelve,
    /// FAT16.
    Sixteen,
    /// FAT32.
    ThirtyTwo,
}

impl Width {
    fn bits(self) -> u64 {
        match self {
            Self::Twelve => 12,
            Self::Sixteen => 16,
            Self::ThirtyTwo => 32,
        }
    }

    /// Fewest clusters, and one more than the most.
    fn clusters(self) -> (u64, u64) {
        match self {
            Self::Twelve => (1, FAT12_CLUSTERS),
            Self::Sixteen => (FAT12_CLUSTERS, FAT16_CLUSTERS),
            Self::ThirtyTwo => (FAT16_CLUSTERS, FAT32_CLUSTERS),
        }
    }
}

/// Shape of the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    cylinders: u64,
    heads: u64,
    sectors_per_track: u64,
    /// Sectors before the volume: of a hard disk, whose first holds the partition table.
    before: u64,
    sectors_per_cluster: u64,
    /// Records of the top directory of FAT12 and FAT16.
    top_records: u64,
    media: u8,
}

impl Geometry {
    /// QEMU's floppy disks (1.44 MB for FAT12, else 2.88 MB), and hard disks (31.5 MiB for FAT12, else
    /// 504 MiB).
    pub(super) fn new(is_floppy: bool, asked: Option<Width>) -> (Self, Width) {
        let width = match asked {
            Some(width) => width,
            None if is_floppy => Width::Twelve,
            None => Width::Sixteen,
        };
        let geometry = match is_floppy {
            true => Self {
                cylinders: 80,
                heads: 2,
                sectors_per_track: if asked == Some(Width::Twelve) { 18 } else { 36 },
                before: 0,
                sectors_per_cluster: if asked.is_none() { 2 } else { 1 },
                top_records: if asked == Some(Width::Twelve) {
                    224
                } else {
                    240
                },
                media: 0xf0,
            },
            false => Self {
                cylinders: if width == Width::Twelve { 64 } else { 1024 },
                heads: 16,
                sectors_per_track: 63,
                before: BEFORE_PARTITION,
                sectors_per_cluster: if width == Width::ThirtyTwo { 8 } else { 16 },
                top_records: 512,
                media: 0xf8,
            },
        };
        (geometry, width)
    }

    fn sectors(&self) -> u64 {
        self.cylinders * self.heads * self.sectors_per_track
    }

    /// The same disk with room for more clusters; `None` when FAT32 has no larger one.
    fn grown(self, clusters: u64) -> Option<Self> {
        // Cluster sizes as usual for FAT32: 4 KiB up to 8 GiB, and so on.
        let bytes = clusters * self.sectors_per_cluster * SECTOR;
        let sectors_per_cluster = match bytes >> 30 {
            0..8 => 8,
            8..16 => 16,
            16..32 => 32,
            _ => 64,
        };
        // Tables, a little room, and a part of a cylinder.
        let sectors = (bytes + bytes / 64) / SECTOR + 65536;
        let cylinders = sectors.div_ceil(self.heads * self.sectors_per_track);
        let grown = Self {
            cylinders: cylinders.max(self.cylinders),
            sectors_per_cluster,
            ..self
        };
        let is_larger = grown.cylinders > self.cylinders
            || grown.sectors_per_cluster != self.sectors_per_cluster;
        (is_larger && grown.sectors() <= MAX_SECTORS).then_some(grown)
    }
}

/// Where the parts of a volume are, in sectors from its start.
#[derive(Clone, Copy, Debug)]
struct Layout {
    width: Width,
    geometry: Geometry,
    sectors: u64,
    reserved: u64,
    fat_sectors: u64,
    top_sectors: u64,
    clusters: u64,
}

impl Layout {
    fn new(geometry: Geometry, width: Width) -> Result<Self> {
        let sectors = geometry.sectors() - geometry.before;
        let (reserved, top_sectors) = match width {
            Width::ThirtyTwo => (32, 0),
            _ => (1, (geometry.top_records * RECORD as u64).div_ceil(SECTOR)),
        };
        let mut layout = Self {
            width,
            geometry,
            sectors,
            reserved,
            fat_sectors: 1,
            top_sectors,
            clusters: 0,
        };
        loop {
            let data = sectors.saturating_sub(layout.data_start());
            layout.clusters = data / geometry.sectors_per_cluster;
            let entries = layout.clusters + u64::from(FIRST_CLUSTER);
            let needed = (entries * width.bits()).div_ceil(8 * SECTOR);
            if needed <= layout.fat_sectors {
                break;
            }
            layout.fat_sectors = needed;
        }
        let (fewest, end) = width.clusters();
        match layout.clusters {
            clusters if clusters < fewest => {
                let message = "FAT32 needs a larger disk than a floppy disk";
                Err(Error::new(ErrorKind::Unsupported, message))
            }
            // More would make it another kind of volume: what is beyond stays unused.
            clusters => {
                layout.clusters = clusters.min(end - 1);
                Ok(layout)
            }
        }
    }

    fn data_start(&self) -> u64 {
        self.reserved + FATS * self.fat_sectors + self.top_sectors
    }

    /// One past the last cluster.
    fn end(&self) -> u64 {
        self.clusters + u64::from(FIRST_CLUSTER)
    }

    fn cluster_bytes(&self) -> u64 {
        self.geometry.sectors_per_cluster * SECTOR
    }
}

/// What is in clusters that follow one another.
#[derive(Debug)]
enum Content {
    /// The records of a directory; the rest is zeroes.
    Directory(Box<[u8]>),
    /// A file, by its number in the tree.
    File(usize),
}

#[derive(Debug)]
struct Run {
    first: u32,
    count: u32,
    content: Content,
}

impl Run {
    fn end(&self) -> u32 {
        self.first + self.count
    }
}

/// What is at an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// Nothing.
    Zero,
    /// These bytes.
    Bytes(&'a [u8]),
    /// An allocation table from this byte on: [`Volume::fill_fat`] computes it.
    Fat(u64),
    /// A file of the tree, from this byte on.
    File(usize, u64),
}

/// The disk.
#[derive(Debug)]
pub(super) struct Volume {
    layout: Layout,
    partitions: Option<Box<[u8]>>,
    /// The sectors before the allocation tables.
    reserved: Box<[u8]>,
    /// The top directory, when it is not in clusters.
    top: Box<[u8]>,
    /// In the order of their clusters.
    runs: Vec<Run>,
}

impl Volume {
    /// The volume that shows `tree`.
    ///
    /// # Errors
    /// `Unsupported` when it does not fit.
    pub(super) fn new(
        tree: &Tree,
        (geometry, width): (Geometry, Width),
        label: &[u8; SHORT],
    ) -> Result<Self> {
        let names = names_of(tree);
        let mut layout = Layout::new(geometry, width)?;
        let mut places = Places::new(tree, &names, &layout);
        // Longer clusters may have to hold a little more.
        while places.end > layout.end()
            && width == Width::ThirtyTwo
            && let Some(larger) = layout.geometry.grown(places.end)
        {
            layout = Layout::new(larger, width)?;
            places = Places::new(tree, &names, &layout);
        }
        let does_not_fit = places.end > layout.end()
            || places.top_records > layout.geometry.top_records && width != Width::ThirtyTwo;
        if does_not_fit {
            let bytes = layout.sectors * SECTOR;
            let message = format!(
                "Directory does not fit in FAT{} (capacity {:.2} MB)",
                width.bits(),
                bytes as f64 / 1e6
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let (top, runs) = places.runs(tree, &names, label);
        Ok(Self {
            partitions: (layout.geometry.before > 0).then(|| layout.partition_table()),
            reserved: layout.reserved_sectors(label),
            top,
            runs,
            layout,
        })
    }

    /// Bytes of the disk.
    pub(super) fn length(&self) -> u64 {
        self.layout.geometry.sectors() * SECTOR
    }

    /// What is at `offset`, and for how many bytes.
    pub(super) fn piece(&self, offset: u64) -> (Piece<'_>, u64) {
        let layout = &self.layout;
        let before = layout.geometry.before * SECTOR;
        let Some(at) = offset.checked_sub(before) else {
            return bytes_or_zeroes(
                self.partitions.as_deref().unwrap_or_default(),
                offset,
                before,
            );
        };
        let reserved = layout.reserved * SECTOR;
        let Some(in_fats) = at.checked_sub(reserved) else {
            return bytes_or_zeroes(&self.reserved, at, reserved);
        };
        let fat = layout.fat_sectors * SECTOR;
        let Some(in_top) = in_fats.checked_sub(FATS * fat) else {
            return (Piece::Fat(in_fats % fat), fat - in_fats % fat);
        };
        let top = layout.top_sectors * SECTOR;
        let Some(in_data) = in_top.checked_sub(top) else {
            return bytes_or_zeroes(&self.top, in_top, top);
        };
        self.data(in_data)
    }

    fn data(&self, at: u64) -> (Piece<'_>, u64) {
        let bytes = self.layout.cluster_bytes();
        let cluster = at / bytes + u64::from(FIRST_CLUSTER);
        let after = self
            .runs
            .partition_point(|run| u64::from(run.end()) <= cluster);
        let Some(run) = self.runs.get(after) else {
            let end = self.layout.geometry.sectors() * SECTOR;
            return (Piece::Zero, end);
        };
        let within = at - u64::from(run.first - FIRST_CLUSTER) * bytes;
        let length = u64::from(run.count) * bytes;
        match &run.content {
            Content::Directory(records) => bytes_or_zeroes(records, within, length),
            Content::File(index) => (Piece::File(*index, within), length - within),
        }
    }

    /// The next cluster of a chain, or why there is none.
    fn next_cluster(&self, cluster: u64) -> u32 {
        const END: u32 = 0x0fff_ffff;
        match cluster {
            0 => END & !0xff | u32::from(self.layout.geometry.media),
            1 => END,
            _ => {
                let after = self
                    .runs
                    .partition_point(|run| u64::from(run.end()) <= cluster);
                match self.runs.get(after) {
                    None => 0,
                    Some(run) if u64::from(run.end()) == cluster + 1 => END,
                    Some(_) => cluster as u32 + 1,
                }
            }
        }
    }

    /// Computes the bytes of an allocation table from `start` on.
    pub(super) fn fill_fat(&self, start: u64, bytes: &mut [u8]) {
        for (at, byte) in (start..).zip(bytes) {
            *byte = match self.layout.width {
                Width::Twelve => {
                    // Two entries in three bytes.
                    let pair = self.next_cluster(at / 3 * 2) & 0xfff
                        | (self.next_cluster(at / 3 * 2 + 1) & 0xfff) << 12;
                    pair.to_le_bytes()[(at % 3) as usize]
                }
                Width::Sixteen => {
                    let entry = self.next_cluster(at / 2) as u16;
                    entry.to_le_bytes()[(at % 2) as usize]
                }
                Width::ThirtyTwo => self.next_cluster(at / 4).to_le_bytes()[(at % 4) as usize],
            };
        }
    }
}

fn bytes_or_zeroes(bytes: &[u8], at: u64, end: u64) -> (Piece<'_>, u64) {
    match bytes.get(at as usize..) {
        Some(rest) if !rest.is_empty() => (Piece::Bytes(rest), rest.len() as u64),
        _ => (Piece::Zero, end - at),
    }
}

/// The names of all entries. The top directory's own, the first, is nowhere to be seen.
fn names_of(tree: &Tree) -> Vec<Names> {
    let (top, below) = tree.entries().split_at(1);
    let directories = below.chunk_by(|one, other| one.parent == other.parent);
    let directories = std::iter::once(top).chain(directories);
    let names = directories.flat_map(|entries| {
        let mut taken = Taken::default();
        entries.iter().map(move |entry| taken.names(&entry.name))
    });
    names.collect()
}

/// Which clusters belong to what.
struct Places {
    /// The first cluster and the number of clusters of each entry.
    of: Vec<(u32, u32)>,
    /// Records of each directory.
    records: Vec<usize>,
    top_records: u64,
    /// One past the last cluster; beyond what 32 bits hold when nothing fits.
    end: u64,
    has_fixed_top: bool,
}

impl Places {
    fn new(tree: &Tree, names: &[Names], layout: &Layout) -> Self {
        let entries = tree.entries();
        // The label, or "." and "..".
        let own = |index| if index == 0 { 1 } else { 2 };
        let mut records: Vec<usize> = (0..entries.len()).map(own).collect();
        for (entry, names) in entries.iter().zip(names).skip(1) {
            records[entry.parent] += records::count(names);
        }
        let has_fixed_top = layout.width != Width::ThirtyTwo;
        let mut end = u64::from(FIRST_CLUSTER);
        let place = |index: usize| {
            let bytes = match entries[index].size {
                Some(size) => u64::from(size),
                None if index == 0 && has_fixed_top => 0,
                None => (records[index] * RECORD) as u64,
            };
            let count = bytes.div_ceil(layout.cluster_bytes());
            let first = if count == 0 { 0 } else { end };
            end += count;
            (first as u32, count as u32)
        };
        let of = (0..entries.len()).map(place).collect();
        Self {
            of,
            top_records: records[0] as u64,
            records,
            end,
            has_fixed_top,
        }
    }

    /// The top directory, when it is in no cluster, and what is in clusters.
    fn runs(&self, tree: &Tree, names: &[Names], label: &[u8; SHORT]) -> (Box<[u8]>, Vec<Run>) {
        let entries = tree.entries();
        let facts = |index: usize| Facts {
            size: entries[index].size,
            cluster: self.of[index].0,
            modified: entries[index].modified,
        };
        let mut directories: Vec<Vec<u8>> = self
            .records
            .iter()
            .zip(entries)
            .map(|(count, entry)| match entry.size {
                None => Vec::with_capacity(count * RECORD),
                Some(_) => Vec::new(),
            })
            .collect();
        directories[0].extend(records::label(label, entries[0].modified));
        for (index, entry) in entries.iter().enumerate().skip(1) {
            if entry.size.is_none() {
                // The top directory is called cluster 0 there, wherever it is.
                let above = match entry.parent {
                    0 => Facts {
                        cluster: 0,
                        ..facts(0)
                    },
                    parent => facts(parent),
                };
                let dots = records::dots(facts(index), above);
                directories[index].extend(dots.as_flattened());
            }
            records::append(&mut directories[entry.parent], &names[index], facts(index));
        }
        let mut top = Box::default();
        let mut runs = Vec::new();
        for (index, (entry, records)) in entries.iter().zip(directories).enumerate() {
            let (first, count) = self.of[index];
            let content = match entry.size {
                Some(_) => Content::File(index),
                None if index == 0 && self.has_fixed_top => {
                    top = records.into();
                    continue;
                }
                None => Content::Directory(records.into()),
            };
            if count > 0 {
                runs.push(Run {
                    first,
                    count,
                    content,
                });
            }
        }
        (top, runs)
    }
}

impl Layout {
    /// The first sector of a hard disk.
    fn partition_table(&self) -> Box<[u8]> {
        const CHS_END: u64 = 1024;
        let mut sector = vec![0; SECTOR as usize];
        let geometry = &self.geometry;
        let chs = |sector: u64| {
            let track = sector / geometry.sectors_per_track;
            let cylinder = track / geometry.heads;
            match cylinder < CHS_END {
                true => [
                    (track % geometry.heads) as u8,
                    (sector % geometry.sectors_per_track + 1) as u8 | (cylinder >> 8 << 6) as u8,
                    cylinder as u8,
                ],
                false => [0xfe, 0xff, 0xff],
            }
        };
        let kind = match self.width {
            Width::Twelve => 0x01,
            Width::Sixteen => 0x06,
            Width::ThirtyTwo => 0x0c,
        };
        sector[440..444].copy_from_slice(&SERIAL);
        let partition = &mut sector[446..462];
        partition[0] = 0x80;
        partition[1..4].copy_from_slice(&chs(geometry.before));
        partition[4] = kind;
        partition[5..8].copy_from_slice(&chs(geometry.sectors() - 1));
        partition[8..12].copy_from_slice(&(geometry.before as u32).to_le_bytes());
        partition[12..16].copy_from_slice(&(self.sectors as u32).to_le_bytes());
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        sector.into()
    }

    /// The boot sector, and for FAT32 the counts of free clusters and a copy of both.
    fn reserved_sectors(&self, label: &[u8; SHORT]) -> Box<[u8]> {
        let mut sectors = vec![0; (self.reserved * SECTOR) as usize];
        let boot = self.boot_sector(label);
        sectors[..boot.len()].copy_from_slice(&boot);
        if self.width == Width::ThirtyTwo {
            let mut counts = [0; SECTOR as usize];
            counts[..4].copy_from_slice(b"RRaA");
            counts[484..488].copy_from_slice(b"rrAa");
            // Not known: whoever wants to know counts.
            counts[488..496].fill(0xff);
            counts[508..].copy_from_slice(&[0, 0, 0x55, 0xaa]);
            for copy in [0, 6] {
                let at = copy * SECTOR as usize;
                sectors[at..at + boot.len()].copy_from_slice(&boot);
                sectors[at + boot.len()..][..counts.len()].copy_from_slice(&counts);
            }
        }
        sectors.into()
    }

    fn boot_sector(&self, label: &[u8; SHORT]) -> [u8; SECTOR as usize] {
        let geometry = &self.geometry;
        let is_32 = self.width == Width::ThirtyTwo;
        let mut sector = [0; SECTOR as usize];
        let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
        // A jump to an endless loop behind the fields: the volume does not start anything.
        put(0, &[0xeb, if is_32 { 0x58 } else { 0x3c }, 0x90]);
        put(3, b"MSWIN4.1");
        put(11, &(SECTOR as u16).to_le_bytes());
        put(13, &[geometry.sectors_per_cluster as u8]);
        put(14, &(self.reserved as u16).to_le_bytes());
        put(16, &[FATS as u8]);
        let (top_records, short_fat) = match is_32 {
            true => (0, 0),
            false => (geometry.top_records, self.fat_sectors),
        };
        put(17, &(top_records as u16).to_le_bytes());
        match u16::try_from(self.sectors) {
            Ok(sectors) if !is_32 => put(19, &sectors.to_le_bytes()),
            _ => put(32, &(self.sectors as u32).to_le_bytes()),
        }
        put(21, &[geometry.media]);
        put(22, &(short_fat as u16).to_le_bytes());
        put(24, &(geometry.sectors_per_track as u16).to_le_bytes());
        put(26, &(geometry.heads as u16).to_le_bytes());
        put(28, &(geometry.before as u32).to_le_bytes());
        if is_32 {
            put(36, &(self.fat_sectors as u32).to_le_bytes());
            put(44, &FIRST_CLUSTER.to_le_bytes());
            put(48, &1u16.to_le_bytes());
            put(50, &6u16.to_le_bytes());
        }
        let more = if is_32 { 64 } else { 36 };
        put(more, &[if geometry.before > 0 { 0x80 } else { 0 }, 0, 0x29]);
        put(more + 3, &SERIAL);
        put(more + 7, label);
        put(more + 18, format!("FAT{}   ", self.width.bits()).as_bytes());
        put(more + 26, &[0xeb, 0xfe]);
        put(510, &[0x55, 0xaa]);
        sector
    }
}
