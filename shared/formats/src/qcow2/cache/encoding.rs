//! Forms of a slice in memory: all its words, runs, or packed entries.
//!
//! ```text
//!   words    word 0, word 1, ...
//!   runs     number of runs, then for each: index of its first entry (bit 63: each entry is one
//!            cluster further than the one before; else all are the same), its first entry
//!   packed   base and flags, then entries of `width` bits from the lowest bit up, one word of padding
//! ```
//!
//! A packed entry is 0 for the word 0, else 1 more than its code's distance from the base. The code
//! is the index of the host cluster; when COPIED and zero flags differ within the slice, they are
//! the code's two lowest bits. Entries with other bits (compressed clusters) are not packed.
//!
//! Readers look at memory that may be of another slice by now. So every function here takes any
//! content: it gives some word, reads no further than a slice reaches, and does not panic.

use crate::qcow2::tables::{COPIED, OFFSET_MASK, ZERO};

/// How a slice is stored; the number goes into the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form(pub(super) u8);

impl Form {
    /// It is not cached.
    pub(super) const NONE: Form = Form(0);
    pub(super) const WORDS: Form = Form(1);
    pub(super) const RUNS: Form = Form(2);
    /// Packed entries of `width` bits, 1..=57.
    const fn packed(width: u32) -> Form {
        Form(2 + width as u8)
    }
    const fn width(self) -> usize {
        self.0 as usize - 2
    }
}

/// What the words of a cache's slices are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) enum Content {
    /// Nothing is known of them.
    Opaque,
    /// Standard L2 entries of an image with clusters of so many bits.
    L2Entries {
        /// log2 of the cluster size.
        cluster_bits: u32,
    },
    /// Extended L2 entries: a standard one and its subclusters' bitmap in turns.
    ExtendedL2Entries {
        /// log2 of the cluster size.
        cluster_bits: u32,
    },
}

/// Content and length of a cache's slices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Words of a slice.
    pub(super) words: usize,
    pub(super) content: Content,
}

/// Set in a run's first index: its entries are a cluster apart.
const LINEAR: u64 = 1 << 63;
/// Flags beside the base of packed entries.
const BASE_COPIED: u64 = 1 << 63;
const BASE_GATHERED: u64 = 1 << 62;
const BASE_ZERO: u64 = 1 << 61;
const BASE_MASK: u64 = BASE_ZERO - 1;
/// Most bits of a packed entry: what two words always hold.
const MAX_WIDTH: u32 = 57;

impl Layout {
    /// Distance of the entries of a linear run.
    const fn step(&self) -> u64 {
        match self.content {
            Content::Opaque => 0,
            Content::L2Entries { cluster_bits } | Content::ExtendedL2Entries { cluster_bits } => {
                1 << cluster_bits
            }
        }
    }

    /// Where a word of the slice is among those that runs are made of: descriptors first, then bitmaps.
    #[inline]
    const fn position(&self, index: usize) -> usize {
        match self.content {
            Content::ExtendedL2Entries { .. } => (index >> 1) + (index & 1) * (self.words / 2),
            _ => index,
        }
    }

    /// Puts the smallest form of `slice` into `out`.
    pub(super) fn encode(&self, slice: &[u64], out: &mut Vec<u64>) -> Form {
        out.clear();
        match self.content {
            Content::ExtendedL2Entries { .. } => {
                let halves = slice
                    .iter()
                    .step_by(2)
                    .chain(slice.iter().skip(1).step_by(2));
                let sorted: Vec<u64> = halves.copied().collect();
                let runs = self.count_runs(&sorted);
                if 1 + 2 * runs < slice.len() {
                    self.encode_runs(&sorted, out);
                    return Form::RUNS;
                }
                out.extend_from_slice(slice);
                Form::WORDS
            }
            _ => self.encode_sorted(slice, out),
        }
    }

    fn encode_sorted(&self, slice: &[u64], out: &mut Vec<u64>) -> Form {
        let runs_words = 1 + 2 * self.count_runs(slice);
        let packing = match self.content {
            Content::L2Entries { cluster_bits } => Packing::of(slice, cluster_bits),
            _ => None,
        };
        let packed_words = packing.as_ref().map(|packing| packing.words(slice.len()));
        let least_other = packed_words.unwrap_or(usize::MAX).min(slice.len());
        if runs_words <= least_other {
            self.encode_runs(slice, out);
            return Form::RUNS;
        }
        match packing {
            Some(packing) if packing.words(slice.len()) < slice.len() => {
                packing.encode(slice, out);
                Form::packed(packing.width)
            }
            _ => {
                out.extend_from_slice(slice);
                Form::WORDS
            }
        }
    }

    /// The end of the run that begins at `start`, and whether it is linear.
    fn run_end(&self, slice: &[u64], start: usize) -> (usize, bool) {
        let step = self.step();
        let follows = |step: u64, index: usize| slice[index] == slice[index - 1].wrapping_add(step);
        let mut end = start + 1;
        let linear = step != 0 && end < slice.len() && follows(step, end);
        let step = if linear { step } else { 0 };
        while end < slice.len() && follows(step, end) {
            end += 1;
        }
        (end, linear)
    }

    fn count_runs(&self, slice: &[u64]) -> usize {
        let (mut start, mut runs) = (0, 0);
        while start < slice.len() {
            start = self.run_end(slice, start).0;
            runs += 1;
        }
        runs
    }

    fn encode_runs(&self, slice: &[u64], out: &mut Vec<u64>) {
        out.push(0);
        let mut start = 0;
        while start < slice.len() {
            let (end, linear) = self.run_end(slice, start);
            out.push(start as u64 | if linear { LINEAR } else { 0 });
            out.push(slice[start]);
            start = end;
        }
        out[0] = (out.len() as u64 - 1) / 2;
    }

    /// The word at `index` of a slice whose stored words `at` gives.
    #[inline]
    pub(super) fn word(&self, form: Form, index: usize, at: impl Fn(usize) -> u64) -> u64 {
        match form {
            // As writers see them, too.
            Form::WORDS => at(index),
            Form::RUNS => self.word_of_runs(self.position(index), at),
            form => self.word_of_packed(form, index, at),
        }
    }

    fn word_of_runs(&self, index: usize, at: impl Fn(usize) -> u64) -> u64 {
        let run = self.find_run(index, &at);
        let first = at(1 + 2 * run);
        let value = at(2 + 2 * run);
        if first & LINEAR == 0 {
            return value;
        }
        let distance = (index as u64).wrapping_sub(first & !LINEAR);
        value.wrapping_add(distance.wrapping_mul(self.step()))
    }

    /// The run that holds `index`.
    fn find_run(&self, index: usize, at: &impl Fn(usize) -> u64) -> usize {
        let runs = at(0).min(self.words as u64) as usize;
        let starts_after = |run: usize| at(1 + 2 * run) & !LINEAR > index as u64;
        let (mut low, mut high) = (0, runs.max(1));
        while high - low > 1 {
            let middle = (low + high) / 2;
            if starts_after(middle) {
                high = middle;
            } else {
                low = middle;
            }
        }
        low
    }

    #[inline]
    fn word_of_packed(&self, form: Form, index: usize, at: impl Fn(usize) -> u64) -> u64 {
        let Content::L2Entries { cluster_bits } = self.content else {
            return 0;
        };
        let (width, base) = (form.width(), at(0));
        let bit = index * width;
        let (word, shift) = (1 + bit / 64, bit % 64);
        let low = at(word) >> shift;
        let high = at(word + 1) << 1 << (63 - shift);
        let stored = (low | high) & (u64::MAX >> (64 - width));
        if stored == 0 {
            return 0;
        }
        let code = (stored - 1).wrapping_add(base & BASE_MASK);
        if base & BASE_GATHERED == 0 {
            code << cluster_bits | base & BASE_COPIED | (base & BASE_ZERO) >> 61
        } else {
            code >> 2 << cluster_bits | (code & 2) << 62 | code & 1
        }
    }

    /// How many entries from `index` on, `most` at most, are evenly `step` apart. At least one.
    #[inline]
    pub(super) fn run(
        &self,
        form: Form,
        (index, most): (usize, usize),
        step: u64,
        at: impl Fn(usize) -> u64,
    ) -> usize {
        if most <= 1 {
            return 1;
        }
        if form == Form::RUNS && self.position(1) == 1 {
            return self.run_of_runs((index, most), step, at);
        }
        let first = self.word(form, index, &at);
        let is_next = |count: usize| {
            let expected = first.wrapping_add(step.wrapping_mul(count as u64));
            self.word(form, index + count, &at) == expected
        };
        (1..most).find(|&count| !is_next(count)).unwrap_or(most)
    }

    fn run_of_runs(
        &self,
        (index, most): (usize, usize),
        step: u64,
        at: impl Fn(usize) -> u64,
    ) -> usize {
        let runs = at(0).min(self.words as u64) as usize;
        let first = self.word_of_runs(index, &at);
        let mut run = self.find_run(index, &at);
        let mut count = 0;
        loop {
            let own_step = if at(1 + 2 * run) & LINEAR == 0 {
                0
            } else {
                self.step()
            };
            let end = match run + 1 < runs {
                true => (at(3 + 2 * run) & !LINEAR).min(self.words as u64) as usize,
                false => self.words,
            };
            let fits = end.saturating_sub(index);
            count = if own_step == step {
                fits
            } else {
                fits.min(count + 1)
            };
            run += 1;
            if count >= most || count < fits || run >= runs {
                return count.clamp(1, most);
            }
            let expected = first.wrapping_add(step.wrapping_mul(count as u64));
            if at(2 + 2 * run) != expected {
                return count.clamp(1, most);
            }
        }
    }
}

/// How the entries of a slice are packed.
struct Packing {
    cluster_bits: u32,
    /// Smallest code, and the flags of [`BASE_MASK`]'s neighbours.
    base: u64,
    width: u32,
}

impl Packing {
    /// `None` when an entry has bits that are not packed.
    fn of(slice: &[u64], cluster_bits: u32) -> Option<Self> {
        let packed_bits = COPIED | ZERO | (OFFSET_MASK >> cluster_bits << cluster_bits);
        let (mut any, mut all) = (0, u64::MAX);
        let (mut least, mut most) = (u64::MAX, 0);
        for &word in slice.iter().filter(|word| **word != 0) {
            if word & !packed_bits != 0 {
                return None;
            }
            any |= word;
            all &= word;
            let code = gathered(word, cluster_bits);
            least = least.min(code);
            most = most.max(code);
        }
        let flags_differ = (any ^ all) & (COPIED | ZERO) != 0 && any != 0;
        let (least, most, flags) = if flags_differ {
            (least, most, BASE_GATHERED)
        } else {
            let zero = if any & ZERO == 0 { 0 } else { BASE_ZERO };
            (least >> 2, most >> 2, any & COPIED | zero)
        };
        let range = most.checked_sub(least).map_or(0, |distance| distance + 1);
        let width = (u64::BITS - range.leading_zeros()).max(1);
        (width <= MAX_WIDTH).then_some(Self {
            cluster_bits,
            base: least & BASE_MASK | flags,
            width,
        })
    }

    fn words(&self, entries: usize) -> usize {
        2 + (entries * self.width as usize).div_ceil(64)
    }

    fn encode(&self, slice: &[u64], out: &mut Vec<u64>) {
        out.resize(self.words(slice.len()), 0);
        out[0] = self.base;
        let unit = if self.base & BASE_GATHERED == 0 { 2 } else { 0 };
        for (index, &word) in slice.iter().enumerate() {
            if word == 0 {
                continue;
            }
            let code = gathered(word, self.cluster_bits) >> unit;
            let stored = code - (self.base & BASE_MASK) + 1;
            let bit = index * self.width as usize;
            let (at, shift) = (1 + bit / 64, bit % 64);
            out[at] |= stored << shift;
            out[at + 1] |= stored >> 1 >> (63 - shift);
        }
    }
}

/// Index of the host cluster, COPIED, zero.
const fn gathered(word: u64, cluster_bits: u32) -> u64 {
    (word & OFFSET_MASK) >> cluster_bits << 2 | (word & COPIED) >> 62 | word & ZERO
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    const BITS: u32 = 16;

    fn layout(content: Content) -> Layout {
        Layout {
            words: 512,
            content,
        }
    }

    fn l2() -> Layout {
        layout(Content::L2Entries { cluster_bits: BITS })
    }

    /// Encodes, compares every word and every run, and gives form and length.
    fn check(layout: Layout, slice: &[u64]) -> (Form, usize) {
        let mut out = Vec::new();
        let form = layout.encode(slice, &mut out);
        let at = |index: usize| out.get(index).copied().unwrap_or(0);
        for (index, &word) in slice.iter().enumerate() {
            assert_eq!(layout.word(form, index, at), word, "{form:?} entry {index}");
        }
        for index in (0..slice.len()).step_by(7) {
            for step in [0, 1 << BITS] {
                let most = (slice.len() - index).min(100);
                let expected = (1..most)
                    .find(|count| {
                        slice[index + count] != slice[index].wrapping_add(step * *count as u64)
                    })
                    .unwrap_or(most);
                let run = layout.run(form, (index, most), step, at);
                assert_eq!(run, expected, "{form:?} run of {step} at {index}");
            }
        }
        (form, out.len())
    }

    fn data(cluster: u64) -> u64 {
        COPIED | cluster << BITS
    }

    #[test]
    fn a_sparse_slice_takes_a_few_words() {
        let mut slice = vec![0; 512];
        assert_eq!(check(l2(), &slice), (Form::RUNS, 3));
        slice[100] = data(12345);
        assert_eq!(check(l2(), &slice), (Form::RUNS, 7));
    }

    #[test]
    fn a_sequential_slice_is_one_run() {
        let slice: Vec<u64> = (0..512).map(|index| data(1000 + index)).collect();
        assert_eq!(check(l2(), &slice), (Form::RUNS, 3));
    }

    #[test]
    fn clusters_at_random_in_a_tebibyte_take_25_bits_each() {
        let mut random = SmallRng::seed_from_u64(1);
        let slice: Vec<u64> = (0..512)
            .map(|_| data(random.random_range(0..1 << 24)))
            .collect();
        let (form, words) = check(l2(), &slice);
        assert!(form.width() <= 25, "{form:?}");
        assert!(words <= 2 + 512 * 25 / 64);
    }

    #[test]
    fn any_mixture_of_entries_comes_back() {
        let seed: u64 = SmallRng::from_os_rng().random();
        println!("seed {seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        let rounds = if cfg!(miri) { 3 } else { 300 };
        for _ in 0..rounds {
            let host_bits = random.random_range(1..40);
            let variety = random.random_range(1..8);
            let run = random.random_range(1..80);
            let mut slice = Vec::new();
            while slice.len() < 512 {
                let cluster: u64 = random.random_range(0..1 << host_bits);
                let kind = random.random_range(0..variety);
                for number in 0..random.random_range(1..=run) {
                    slice.push(match kind {
                        0 => data(cluster + number),
                        1 => 0,
                        2 => ZERO,
                        3 => data(cluster + number) | ZERO,
                        4 => (cluster + number) << BITS,
                        5 => data(cluster),
                        6 => random.random(),
                        _ => 1 << 62 | cluster,
                    });
                }
            }
            slice.truncate(512);
            check(l2(), &slice);
            check(layout(Content::Opaque), &slice);
            check(
                layout(Content::ExtendedL2Entries { cluster_bits: BITS }),
                &slice,
            );
        }
    }

    #[test]
    fn extended_entries_in_sequence_are_two_runs() {
        let slice: Vec<u64> = (0..512)
            .map(|index| match index % 2 {
                0 => data(1000 + index / 2),
                _ => 0xffff_ffff,
            })
            .collect();
        let content = Content::ExtendedL2Entries { cluster_bits: BITS };
        assert_eq!(check(layout(content), &slice), (Form::RUNS, 5));
    }

    #[test]
    fn reading_garbage_neither_panics_nor_runs_away() {
        let mut random = SmallRng::seed_from_u64(3);
        let rounds = if cfg!(miri) { 20 } else { 5000 };
        for _ in 0..rounds {
            let garbage: Vec<u64> = (0..1200).map(|_| random.random()).collect();
            let at = |index: usize| garbage.get(index).copied().unwrap_or(0);
            let form = Form(random.random_range(1..=2 + MAX_WIDTH as u8));
            let index = random.random_range(0..512);
            let most = random.random_range(1..=512 - index);
            l2().word(form, index, at);
            let run = l2().run(form, (index, most), 1 << BITS, at);
            assert!((1..=most).contains(&run));
        }
    }
}
