//! The Internet checksum (RFC 1071) of private memory.
//!
//! Sums are kept in the processor's byte order: the one's complement sum of swapped words is the swapped sum.

/// A running one's complement sum. All parts but the last have an even length.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum(u64);

impl Sum {
    /// Adds bytes.
    #[inline]
    pub(crate) fn add(self, bytes: &[u8]) -> Sum {
        // Words of 32 bits in sums of 64: a carry cannot be lost before 2^32 of them. Four sums go side by side.
        let (blocks, rest) = bytes.as_chunks::<16>();
        let mut sums = [0_u64; 4];
        for block in blocks {
            let (words, _) = block.as_chunks::<4>();
            for (sum, word) in sums.iter_mut().zip(words) {
                *sum += u64::from(u32::from_ne_bytes(*word));
            }
        }
        let mut sum: u64 = sums.iter().sum();
        let (pairs, last) = rest.as_chunks::<2>();
        for pair in pairs {
            sum += u64::from(u16::from_ne_bytes(*pair));
        }
        if let [last] = last {
            sum += u64::from(u16::from_ne_bytes([*last, 0]));
        }
        self.plus(sum)
    }

    /// Adds a number of 16 bits as it goes over the wire.
    #[inline]
    pub(crate) fn add_word(self, word: u16) -> Sum {
        self.plus(u64::from(word.to_be()))
    }

    fn plus(self, sum: u64) -> Sum {
        let (sum, carry) = self.0.overflowing_add(sum);
        Sum(sum + u64::from(carry))
    }

    /// Folded to 16 bits, in memory order, not complemented: what a partial checksum is.
    pub(crate) fn partial(self) -> [u8; 2] {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_ne_bytes()
    }

    /// The checksum in memory order.
    pub(crate) fn complement(self) -> [u8; 2] {
        self.partial().map(|byte| !byte)
    }

    /// The checksum in memory order, never zero: zero says "none" in UDP, and means the same as all ones elsewhere.
    pub(crate) fn nonzero(self) -> [u8; 2] {
        match self.complement() {
            [0, 0] => [0xff, 0xff],
            checksum => checksum,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::tests::slow_sum;

    #[test]
    fn any_length_sums_as_the_definition_says() {
        let bytes: Vec<u8> = (0..600_u32).map(|i| (i * i % 251) as u8 | 0x80).collect();
        for len in 0..bytes.len() {
            let sum = Sum::default().add(&bytes[..len]);
            assert_eq!(
                u16::from_be_bytes(sum.partial()),
                slow_sum(&bytes[..len]),
                "{len} bytes"
            );
        }
    }

    #[test]
    fn parts_sum_as_the_whole() {
        let bytes = [0xff; 77];
        let parts = Sum::default()
            .add(&bytes[..30])
            .add(&bytes[30..])
            .add_word(0x1234);
        let mut whole = bytes.to_vec();
        whole.extend([0, 0x12, 0x34]);
        assert_eq!(u16::from_be_bytes(parts.partial()), slow_sum(&whole));
        assert_eq!(Sum::default().add(&[0xff, 0xff]).complement(), [0, 0]);
        assert_eq!(Sum::default().add(&[0xff, 0xff]).nonzero(), [0xff, 0xff]);
    }
}
