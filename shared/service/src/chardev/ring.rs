//! `ringbuf`: the last bytes that were written, to be read over QMP.

/// Bytes unless told otherwise.
pub(super) const DEFAULT_BYTES: u64 = 65536;
/// Most bytes.
const MAX_BYTES: u64 = 64 << 20;

/// A buffer that forgets its oldest bytes.
pub(crate) struct Ring {
    bytes: std::collections::VecDeque<u8>,
    capacity: usize,
}

impl Ring {
    /// An empty buffer of `size` bytes; `None` unless that is a power of two and not too much.
    pub(super) fn new(size: u64) -> Option<Self> {
        let fits = size.is_power_of_two() && size <= MAX_BYTES;
        fits.then(|| Self {
            bytes: std::collections::VecDeque::new(),
            capacity: size as usize,
        })
    }

    /// Adds bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        let kept = &bytes[bytes.len().saturating_sub(self.capacity)..];
        let excess = (self.bytes.len() + kept.len()).saturating_sub(self.capacity);
        self.bytes.drain(..excess);
        self.bytes.extend(kept);
    }

    /// Takes at most `count` of the oldest bytes.
    pub(crate) fn read(&mut self, count: usize) -> Vec<u8> {
        let count = count.min(self.bytes.len());
        self.bytes.drain(..count).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_bytes_are_forgotten_first() {
        let mut ring = Ring::new(4).unwrap();
        ring.write(b"abc");
        ring.write(b"de");
        assert_eq!(ring.read(1), b"b");
        assert_eq!(ring.read(9), b"cde");
        ring.write(b"0123456789");
        assert_eq!(ring.read(9), b"6789");
        assert_eq!(ring.read(1), b"");
    }

    #[test]
    fn sizes_are_powers_of_two_with_a_limit() {
        for size in [0, 3, 1000, 1 << 40] {
            assert!(Ring::new(size).is_none(), "{size}");
        }
    }
}
