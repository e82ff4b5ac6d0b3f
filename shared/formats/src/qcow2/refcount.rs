//! Refcounts in a cached slice of a refcount block (QEMU docs/interop/qcow2.txt, "Host cluster
//! management"): 1 to 64 bits each, big-endian from one byte up, filled from the least
//! significant bits of each byte below that.

use super::cache::Pinned;

/// Place of a refcount in the slice's 64-bit words.
#[derive(Clone, Copy)]
struct Place {
    word: usize,
    shift: u32,
    mask: u64,
}

/// `order` is log2 of the width in bits.
const fn place(order: u32, position: u64) -> Place {
    let bit = position << order;
    let width = 1_u32 << order;
    let in_word = (bit % 64) as u32;
    let shift = if width >= 8 {
        64 - width - in_word
    } else {
        (7 - in_word / 8) * 8 + in_word % 8
    };
    Place {
        word: (bit / 64) as usize,
        shift,
        mask: u64::MAX >> (64 - width),
    }
}

/// The refcount at `position` of a word as [`Pinned::word`] gives it.
pub(super) fn get(slice: &Pinned<'_>, order: u32, position: u64) -> u64 {
    let place = place(order, position);
    slice.word(place.word) >> place.shift & place.mask
}

/// Changes a refcount; the caller holds the state lock and knows that `value` fits.
pub(super) fn set(slice: &Pinned<'_>, order: u32, position: u64, value: u64) {
    let place = place(order, position);
    let kept = slice.word(place.word) & !(place.mask << place.shift);
    slice.set_word(place.word, kept | (value & place.mask) << place.shift);
}

/// Changes a refcount in the bytes of a whole refcount block that is not in the cache yet.
pub(super) fn set_in_bytes(block: &mut [u8], order: u32, position: u64, value: u64) {
    let place = place(order, position);
    let at = place.word * 8;
    let bytes: [u8; 8] = block[at..at + 8].try_into().expect("eight bytes");
    let kept = u64::from_be_bytes(bytes) & !(place.mask << place.shift);
    let word = kept | (value & place.mask) << place.shift;
    block[at..at + 8].copy_from_slice(&word.to_be_bytes());
}

/// A refcount in the bytes of a whole refcount block.
pub(super) fn get_in_bytes(block: &[u8], order: u32, position: u64) -> u64 {
    let place = place(order, position);
    let at = place.word * 8;
    let bytes: [u8; 8] = block[at..at + 8].try_into().expect("eight bytes");
    u64::from_be_bytes(bytes) >> place.shift & place.mask
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_narrower_than_a_byte_fill_it_from_its_low_bits() {
        let mut block = [0; 16];
        set_in_bytes(&mut block, 0, 9, 1);
        assert_eq!(block[1], 0b10);
        set_in_bytes(&mut block, 2, 1, 0xa);
        assert_eq!(block[0], 0xa0);
    }

    #[test]
    fn wide_refcounts_are_big_endian() {
        let mut block = [0; 16];
        set_in_bytes(&mut block, 4, 1, 0x1234);
        assert_eq!(block[..4], [0, 0, 0x12, 0x34]);
        set_in_bytes(&mut block, 6, 1, 7);
        assert_eq!(block[8..], [0, 0, 0, 0, 0, 0, 0, 7]);
        assert_eq!(get_in_bytes(&block, 6, 1), 7);
    }
}
