//! Zero detection: a chunk's runs of data and of zeroes that are worth leaving out.

use super::SECTOR;

/// Which zeroes are worth it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunRules {
    /// Least run of zeroes between data, in bytes. Shorter ones are data.
    pub shortest: u64,
    /// Runs of zeroes begin and end at multiples of this many bytes, a power of two, or at the ends
    /// of the chunk.
    pub alignment: u64,
}

impl RunRules {
    /// Runs of at least `sparse` bytes, for a target that takes requests of `alignment`.
    pub fn new(sparse: u64, alignment: u64) -> Self {
        let power = match sparse {
            0 => 1,
            sparse => 1 << sparse.ilog2(),
        };
        Self {
            shortest: sparse,
            alignment: alignment.max(power).max(SECTOR).next_power_of_two(),
        }
    }
}

/// A run of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Bytes, more than none.
    pub length: usize,
    /// All of them are zero.
    pub zero: bool,
}

/// The runs of a chunk from its start to its end, of data and zeroes in turn (two of the same kind
/// may follow each other where alignment divides them).
pub struct Runs<'a> {
    rest: &'a [u8],
    offset: u64,
    rules: RunRules,
}

impl<'a> Runs<'a> {
    /// The runs of `bytes`, which are at `offset`.
    pub fn new(bytes: &'a [u8], offset: u64, rules: RunRules) -> Self {
        Self {
            rest: bytes,
            offset,
            rules,
        }
    }

    /// The run at `at` of the rest by zeroes alone, its end moved to the alignment: for the better
    /// of data.
    fn plain(&self, at: usize) -> Run {
        let bytes = &self.rest[at..];
        let mut sectors = bytes.chunks(SECTOR as usize);
        let zero = sectors.next().is_none_or(is_zero);
        let same: usize = sectors
            .take_while(|sector| is_zero(sector) == zero)
            .map(<[u8]>::len)
            .sum();
        let length = bytes.len().min(SECTOR as usize) + same;
        if length == bytes.len() {
            return Run { length, zero };
        }
        let end = self.offset + (at + length) as u64;
        let beyond = (end & (self.rules.alignment - 1)) as usize;
        match (zero, beyond) {
            (_, 0) => Run { length, zero },
            (true, beyond) if beyond < length => Run {
                length: length - beyond,
                zero,
            },
            (_, beyond) => Run {
                length: bytes
                    .len()
                    .min(length + self.rules.alignment as usize - beyond),
                zero: false,
            },
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        if self.rest.is_empty() {
            return None;
        }
        let mut run = self.plain(0);
        if !run.zero {
            let shortest = self.rules.shortest.min(self.rest.len() as u64) as usize;
            let mut seen = run.length;
            while seen < self.rest.len() {
                let next = self.plain(seen);
                seen += next.length;
                if !next.zero {
                    run.length = seen;
                } else if next.length >= shortest {
                    break;
                }
            }
        }
        self.rest = &self.rest[run.length..];
        self.offset += run.length as u64;
        Some(run)
    }
}

/// Whether every byte is zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // Most data differs in its first bytes; the rest in blocks that the compiler makes vectors of.
    let (first, rest) = bytes.split_at(bytes.len().min(16));
    if first.iter().any(|byte| *byte != 0) {
        return false;
    }
    let mut blocks = rest.chunks_exact(128);
    blocks.all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest
            .chunks_exact(128)
            .remainder()
            .iter()
            .all(|byte| *byte == 0)
}

/// The first sector that is not all zero, by its offset in `bytes`.
pub fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    if is_zero(bytes) {
        return None;
    }
    let mut sectors = bytes.chunks(SECTOR as usize);
    sectors
        .position(|sector| !is_zero(sector))
        .map(|number| number * SECTOR as usize)
}

/// The first sector in which two pieces of one length differ, by its offset in them.
pub fn first_difference(left: &[u8], right: &[u8]) -> Option<usize> {
    assert_eq!(left.len(), right.len(), "pieces of one length are compared");
    if left == right {
        return None;
    }
    let sector = SECTOR as usize;
    let mut pairs = left.chunks(sector).zip(right.chunks(sector));
    pairs
        .position(|(left, right)| left != right)
        .map(|number| number * sector)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(sectors: &[u8]) -> Vec<u8> {
        let sector = |kind: &u8| {
            let mut sector = vec![0; SECTOR as usize];
            // At the end, where only a whole look finds it.
            sector[511] = *kind;
            sector
        };
        sectors.iter().flat_map(sector).collect()
    }

    /// Runs in sectors, `-` before zeroes.
    fn runs(sectors: &[u8], first: u64, rules: (u64, u64)) -> Vec<i64> {
        let rules = RunRules {
            shortest: rules.0 * SECTOR,
            alignment: rules.1 * SECTOR,
        };
        let bytes = chunk(sectors);
        let runs: Vec<_> = Runs::new(&bytes, first * SECTOR, rules).collect();
        let length = |run: &Run| (run.length as u64 / SECTOR) as i64;
        runs.iter()
            .map(|run| length(run) * if run.zero { -1 } else { 1 })
            .collect()
    }

    #[test]
    fn short_runs_of_zeroes_between_data_are_data() {
        assert_eq!(runs(&[1, 0, 0, 1, 0, 0, 0, 1], 0, (3, 1)), [4, -3, 1]);
        assert_eq!(runs(&[1, 0, 0, 1, 0, 0, 0, 1], 0, (4, 1)), [8]);
        assert_eq!(runs(&[0, 0, 1], 0, (4, 1)), [-2, 1]);
    }

    #[test]
    fn runs_of_zeroes_are_aligned_for_the_better_of_data() {
        assert_eq!(runs(&[1, 0, 0, 0, 0, 0, 1, 1], 0, (1, 2)), [2, -4, 2]);
        assert_eq!(runs(&[0, 0, 0, 1, 1, 1, 1, 1], 1, (1, 4)), [-3, 5]);
        assert_eq!(runs(&[0, 1, 1, 1, 0, 0, 0, 0], 0, (1, 4)), [4, -4]);
    }

    #[test]
    fn a_chunk_of_one_kind_is_one_run_whatever_its_ends_are() {
        assert_eq!(runs(&[0, 0, 0], 1, (8, 8)), [-3]);
        assert_eq!(runs(&[1, 1, 1], 1, (8, 8)), [3]);
        assert_eq!(Runs::new(&[], 0, RunRules::new(4096, 1)).next(), None);
    }

    #[test]
    fn differences_are_told_by_sector() {
        let (left, mut right) = (chunk(&[1, 0, 0, 1]), chunk(&[1, 0, 0, 1]));
        assert_eq!(first_difference(&left, &right), None);
        right[1300] = 9;
        assert_eq!(first_difference(&left, &right), Some(1024));
        assert_eq!(first_nonzero(&right[512..]), Some(512));
        assert_eq!(first_nonzero(&left[512..1536]), None);
    }

    #[test]
    fn the_alignment_is_a_power_of_two_below_the_shortest_run() {
        assert_eq!(RunRules::new(3 * 4096, 1).alignment, 8192);
        assert_eq!(RunRules::new(0, 4096).alignment, 4096);
        assert_eq!(RunRules::new(512, 1).alignment, 512);
    }
}
