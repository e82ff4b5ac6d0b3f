//! Copies to memory that is not looked at soon: past the processor's caches.
//!
//! A plain copy first reads each line that it is going to overwrite, and pushes something else out of the cache
//! for it. For long copies to memory that is not in the cache anyway that is a third of the traffic.
#![expect(unsafe_code, reason = "pieces of shared memory are raw pointers")]

#[cfg(target_arch = "x86_64")]
use super::mapped::LINE;

/// Copies `len` bytes; [`finish`] is due before anybody is told.
///
/// # Safety
/// Both ranges are mapped, the second for writing, and they do not overlap. Others may write to either
/// meanwhile: the result is then some mixture.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    use std::ptr::copy_nonoverlapping;

    let head = to.align_offset(LINE).min(len);
    let lines = (len - head) / LINE;
    let tail = head + lines * LINE;
    // SAFETY: the head, the lines and the tail are the parts of both ranges, which the caller vouches for. Lines begin at a
    // multiple of their length in the second range, as these stores need.
    unsafe {
        copy_nonoverlapping(from, to, head);
        for at in (head..tail).step_by(LINE) {
            let (from, to) = (from.add(at).cast::<__m128i>(), to.add(at).cast::<__m128i>());
            let line: [__m128i; LINE / size_of::<__m128i>()] =
                std::array::from_fn(|part| _mm_loadu_si128(from.add(part)));
            for (part, value) in line.into_iter().enumerate() {
                _mm_stream_si128(to.add(part), value);
            }
        }
        copy_nonoverlapping(from.add(tail), to.add(tail), len - tail);
    }
}

/// Orders the copies made so far before all later stores.
#[cfg(target_arch = "x86_64")]
pub(super) fn finish() {
    // SAFETY: a fence has no other effect.
    unsafe { std::arch::x86_64::_mm_sfence() }
}

/// Copies `len` bytes.
///
/// # Safety
/// Both ranges are mapped, the second for writing, and they do not overlap. Others may write to either
/// meanwhile: the result is then some mixture.
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: as the caller vouches.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) }
}

/// Plain copies need nothing.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn finish() {}

#[cfg(test)]
mod tests {
    #[test]
    fn bytes_arrive_from_and_at_any_alignment() {
        let from: Vec<u8> = (0..1024_u32).map(|at| (at * 7 % 251) as u8).collect();
        for (skip, to_skip, len) in [0, 1, 15, 16, 63]
            .into_iter()
            .flat_map(|skip| [0, 1, 31, 63].map(|to_skip| (skip, to_skip)))
            .flat_map(|(skip, to_skip)| {
                [0, 1, 62, 63, 64, 65, 128, 200, 777].map(|len| (skip, to_skip, len))
            })
        {
            let mut to = vec![0xee; 1024];
            // SAFETY: both are within their vectors.
            unsafe { super::copy(from[skip..].as_ptr(), to[to_skip..].as_mut_ptr(), len) }
            super::finish();
            let expected = [&vec![0xee; to_skip], &from[skip..skip + len]].concat();
            assert_eq!(to[..to_skip + len], expected, "{skip}, {to_skip}, {len}");
            assert!(to[to_skip + len..].iter().all(|byte| *byte == 0xee));
        }
    }
}
