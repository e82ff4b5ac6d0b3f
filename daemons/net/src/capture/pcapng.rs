//! The blocks of a pcapng file (draft-ietf-opsawg-pcapng), in the host's byte order: four of them, of one interface.
//!
//! ```text
//!   section header │ interface description │ enhanced packet ... │ interface statistics
//! ```

use super::Direction;

/// `LINKTYPE_ETHERNET`
const ETHERNET: u16 = 1;
/// Times are in nanoseconds: 10 to the minus 9.
const TIME_RESOLUTION: u8 = 9;

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
const INTERFACE_DESCRIPTION: u32 = 1;
const INTERFACE_STATISTICS: u32 = 5;
const ENHANCED_PACKET: u32 = 6;

const END_OF_OPTIONS: u16 = 0;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;
const EPB_DROPCOUNT: u16 = 4;
const ISB_STARTTIME: u16 = 2;
const ISB_ENDTIME: u16 = 3;
const ISB_IFRECV: u16 = 4;
const ISB_IFDROP: u16 = 5;

/// Appends the section header and the description of interface 0.
pub(super) fn begin(target: &mut Vec<u8>, interface: &str, snaplen: u32) {
    block(target, SECTION_HEADER, |body| {
        body.extend(BYTE_ORDER_MAGIC.to_ne_bytes());
        // Version 1.0.
        body.extend(1u16.to_ne_bytes());
        body.extend(0u16.to_ne_bytes());
        // Of unknown length.
        body.extend(u64::MAX.to_ne_bytes());
        let program = concat!("outboard-netd ", env!("CARGO_PKG_VERSION"));
        option(body, SHB_USERAPPL, program.as_bytes());
        option(body, END_OF_OPTIONS, &[]);
    });
    block(target, INTERFACE_DESCRIPTION, |body| {
        body.extend(ETHERNET.to_ne_bytes());
        body.extend(0u16.to_ne_bytes());
        body.extend(snaplen.to_ne_bytes());
        option(body, IF_NAME, interface.as_bytes());
        option(body, IF_TSRESOL, &[TIME_RESOLUTION]);
        option(body, END_OF_OPTIONS, &[]);
    });
}

/// What is recorded of a frame besides its bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    /// Nanoseconds since 1970.
    pub(super) time_ns: u64,
    pub(super) direction: Direction,
    /// Bytes that the frame has.
    pub(super) frame_len: u32,
    /// Bytes of it that are kept.
    pub(super) kept_len: u32,
    /// Frames that were lost since the one before.
    pub(super) lost: u64,
}

/// Appends a frame.
pub(super) fn packet(target: &mut Vec<u8>, record: &Record, bytes: &[u8]) {
    block(target, ENHANCED_PACKET, |body| {
        // Of interface 0.
        body.extend(0u32.to_ne_bytes());
        time(body, record.time_ns);
        body.extend(record.kept_len.to_ne_bytes());
        body.extend(record.frame_len.to_ne_bytes());
        body.extend(bytes);
        pad(body);
        // As the guest's interface sees it.
        let flags: u32 = match record.direction {
            Direction::Rx => 1,
            Direction::Tx => 2,
        };
        option(body, EPB_FLAGS, &flags.to_ne_bytes());
        if record.lost > 0 {
            option(body, EPB_DROPCOUNT, &record.lost.to_ne_bytes());
        }
        option(body, END_OF_OPTIONS, &[]);
    });
}

/// What a capture came to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Statistics {
    /// Nanoseconds since 1970.
    pub(super) start_ns: u64,
    /// Nanoseconds since 1970.
    pub(super) end_ns: u64,
    /// Frames that passed the filter.
    pub(super) seen: u64,
    /// Those of them that were not recorded.
    pub(super) lost: u64,
}

/// Appends statistics.
pub(super) fn statistics(target: &mut Vec<u8>, statistics: &Statistics) {
    block(target, INTERFACE_STATISTICS, |body| {
        body.extend(0u32.to_ne_bytes());
        time(body, statistics.end_ns);
        for (code, value) in [
            (ISB_STARTTIME, statistics.start_ns),
            (ISB_ENDTIME, statistics.end_ns),
        ] {
            let mut halves = Vec::with_capacity(8);
            time(&mut halves, value);
            option(body, code, &halves);
        }
        option(body, ISB_IFRECV, &statistics.seen.to_ne_bytes());
        option(body, ISB_IFDROP, &statistics.lost.to_ne_bytes());
        option(body, END_OF_OPTIONS, &[]);
    });
}

/// A time is written as its upper and its lower half.
fn time(body: &mut Vec<u8>, time_ns: u64) {
    body.extend(((time_ns >> 32) as u32).to_ne_bytes());
    body.extend((time_ns as u32).to_ne_bytes());
}

/// A block: type, length, body, length again. The length counts all of these.
fn block(target: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = target.len();
    target.extend(kind.to_ne_bytes());
    target.extend([0; 4]);
    body(target);
    pad_from(target, start);
    let len = (target.len() + 4 - start) as u32;
    target[start + 4..start + 8].copy_from_slice(&len.to_ne_bytes());
    target.extend(len.to_ne_bytes());
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    body.extend(code.to_ne_bytes());
    body.extend((value.len() as u16).to_ne_bytes());
    body.extend(value);
    pad(body);
}

/// Blocks begin at multiples of 4 bytes of a target that holds nothing but blocks.
fn pad(body: &mut Vec<u8>) {
    pad_from(body, 0);
}

fn pad_from(target: &mut Vec<u8>, start: usize) {
    while !(target.len() - start).is_multiple_of(4) {
        target.push(0);
    }
}
