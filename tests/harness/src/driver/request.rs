//! virtio-blk requests (virtio 1.2, section 5.2.6) and how their data is spread over memory.

use std::time::Instant;

use rand::Rng;

/// Bytes of a sector, the unit of addresses and lengths on a virtio disk.
pub const SECTOR_BYTES: usize = 512;

/// Status byte of a request that succeeded.
pub const STATUS_OK: u8 = 0;
/// Status byte of a failed request.
pub const STATUS_IOERR: u8 = 1;
/// Status byte of a request that the device does not know.
pub const STATUS_UNSUPPORTED: u8 = 2;

/// Bytes that a `GetId` request returns.
pub const ID_BYTES: usize = 20;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `VIRTIO_BLK_T_IN`.
    Read,
    /// `VIRTIO_BLK_T_OUT`.
    Write,
    /// `VIRTIO_BLK_T_FLUSH`.
    Flush,
    /// `VIRTIO_BLK_T_GET_ID`.
    GetId,
    /// `VIRTIO_BLK_T_DISCARD`.
    Discard,
    /// `VIRTIO_BLK_T_WRITE_ZEROES`, allowed to unmap.
    WriteZeroesUnmap,
    /// `VIRTIO_BLK_T_WRITE_ZEROES`, not allowed to unmap.
    WriteZeroes,
    /// A type number that the device does not know.
    Unknown(u32),
}

impl Operation {
    /// The header's type field.
    pub fn wire_type(self) -> u32 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Flush => 4,
            Self::GetId => 8,
            Self::Discard => 11,
            Self::WriteZeroes | Self::WriteZeroesUnmap => 13,
            Self::Unknown(number) => number,
        }
    }

    /// True when the device fills the data buffers.
    pub fn device_writes_data(self) -> bool {
        matches!(self, Self::Read | Self::GetId)
    }
}

/// A range of the disk in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SectorRange {
    /// First sector.
    pub first: u64,
    /// Number of sectors.
    pub count: u64,
}

impl SectorRange {
    /// The range of `count` sectors from `first`.
    pub fn new(first: u64, count: u64) -> Self {
        Self { first, count }
    }

    /// One past the last sector.
    pub fn end(self) -> u64 {
        self.first + self.count
    }

    /// Bytes in the range.
    pub fn bytes(self) -> usize {
        self.count as usize * SECTOR_BYTES
    }
}

/// Memory lanes that one request's segments alternate between; each lane may lie in another region.
pub const LANES: usize = 2;

/// Room between two neighbouring segments never exceeds this many bytes, alignment included.
pub(super) const MAX_GAP_BYTES: usize = 1024;

/// One data descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Which lane.
    pub lane: usize,
    /// First byte in the lane.
    pub offset: usize,
    /// Bytes.
    pub bytes: usize,
}

/// How segment addresses and lengths are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alignment {
    /// Addresses and lengths are multiples of 512.
    Sector,
    /// Any address, any length.
    Byte,
}

/// Where the bytes of a request lie in memory, in disk order.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Layout {
    /// The descriptors.
    pub segments: Vec<Segment>,
}

impl Layout {
    /// One segment.
    pub fn contiguous(bytes: usize) -> Self {
        if bytes == 0 {
            return Self::default();
        }
        Self {
            segments: vec![Segment {
                lane: 0,
                offset: 0,
                bytes,
            }],
        }
    }

    /// `segments` pieces (fewer when `bytes` is too small for that many) with unused bytes between
    /// neighbours, alternating between the lanes.
    pub fn scattered(
        rng: &mut impl Rng,
        bytes: usize,
        segments: usize,
        alignment: Alignment,
    ) -> Self {
        let unit = match alignment {
            Alignment::Sector => SECTOR_BYTES,
            Alignment::Byte => 1,
        };
        let units = bytes / unit;
        let segments = segments.clamp(1, units.max(1));
        let mut cuts = rand::seq::index::sample(rng, units.max(2) - 1, segments - 1).into_vec();
        cuts.sort_unstable();
        let ends = cuts.into_iter().map(|cut| (cut + 1) * unit).chain([bytes]);
        let mut cursor = [0usize; LANES];
        let mut start = 0;
        let mut layout = Self::default();
        for (at, end) in ends.enumerate() {
            let lane = at % LANES;
            let gap = match alignment {
                Alignment::Sector => SECTOR_BYTES,
                Alignment::Byte => rng.random_range(8..64),
            };
            let offset = (cursor[lane] + gap).next_multiple_of(unit);
            layout.segments.push(Segment {
                lane,
                offset,
                bytes: end - start,
            });
            cursor[lane] = offset + (end - start);
            start = end;
        }
        layout
    }

    /// Bytes of data.
    pub fn bytes(&self) -> usize {
        self.segments.iter().map(|s| s.bytes).sum()
    }

    /// One past the last byte used in `lane`.
    pub fn lane_end(&self, lane: usize) -> usize {
        self.segments
            .iter()
            .filter(|s| s.lane == lane)
            .map(|s| s.offset + s.bytes)
            .max()
            .unwrap_or(0)
    }
}

/// One request as the guest would build it.
#[derive(Clone, Debug)]
pub struct Request {
    /// What.
    pub operation: Operation,
    /// Where on the disk; ignored by `Flush` and `GetId`.
    pub range: SectorRange,
    /// More ranges, for `Discard` and `WriteZeroes` with several segments.
    pub more_ranges: Vec<SectorRange>,
    /// Where in memory.
    pub layout: Layout,
}

impl Request {
    /// A read or write of `range` through `layout`.
    pub fn transfer(operation: Operation, range: SectorRange, layout: Layout) -> Self {
        Self {
            operation,
            range,
            more_ranges: Vec::new(),
            layout,
        }
    }

    /// A read or write of `range` through one segment.
    pub fn contiguous(operation: Operation, range: SectorRange) -> Self {
        Self::transfer(operation, range, Layout::contiguous(range.bytes()))
    }

    /// A discard or write-zeroes of `range`.
    pub fn clear(operation: Operation, range: SectorRange) -> Self {
        Self::transfer(operation, range, Layout::default())
    }

    /// A flush.
    pub fn flush() -> Self {
        Self::clear(Operation::Flush, SectorRange::new(0, 0))
    }

    /// A request for the serial.
    pub fn get_id() -> Self {
        let layout = Layout::contiguous(ID_BYTES);
        Self::transfer(Operation::GetId, SectorRange::new(0, 0), layout)
    }
}

/// A request that came back.
#[derive(Clone, Debug)]
pub struct Completion {
    /// What the submitter named it.
    pub token: u64,
    /// What it asked for.
    pub operation: Operation,
    /// Where on the disk.
    pub range: SectorRange,
    /// Status byte.
    pub status: u8,
    /// What the device wrote, for `Read` and `GetId`.
    pub data: Vec<u8>,
    /// When it was shown to the device.
    pub submitted: Instant,
}

impl Completion {
    /// The data of a request that succeeded.
    ///
    /// # Errors
    /// When the status is not OK.
    pub fn ok(self) -> anyhow::Result<Vec<u8>> {
        anyhow::ensure!(
            self.status == STATUS_OK,
            "{:?} of {:?} ended with status {}",
            self.operation,
            self.range,
            self.status
        );
        Ok(self.data)
    }
}
