//! Makes images: of formats that are only read, and that nothing on a test machine writes, and of
//! others in shapes that nobody writes.
//!
//! Each module has one function from what a disk holds to the bytes of an image, with the few choices
//! that the format leaves. The bytes follow the formats' descriptions and share no code with what
//! reads them. Tests of the formats, the conformance suite and the fuzz seeds are made from them.

pub mod bochs;
pub mod cloop;
pub mod dmg;
pub mod parallels;
pub mod qcow;
pub mod qed;
pub mod vdi;
pub mod vhdx;
pub mod vmdk;
pub mod vpc;

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// A disk with runs of zeroes, of repeated bytes and of noise, the same for the same seed. Runs begin
/// and end at sectors.
pub fn disk(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = vec![0; length];
    let mut rest = &mut bytes[..];
    while !rest.is_empty() {
        let run = (SECTOR * (1 + random() as usize % 24)).min(rest.len());
        let (now, later) = rest.split_at_mut(run);
        match random() % 4 {
            0 | 1 => {}
            2 => now.fill(random() as u8),
            _ => now.iter_mut().for_each(|byte| *byte = random() as u8),
        }
        rest = later;
    }
    bytes
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}
