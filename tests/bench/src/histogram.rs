//! Log-linear histogram of durations: 64 sub-buckets per power of two, so less than 1.6 % error.

const SUB_BITS: u32 = 6;

/// A histogram of `u64` values in any unit.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        let buckets = vec![0; (65 - SUB_BITS as usize) << SUB_BITS];
        Self {
            buckets,
            count: 0,
            max: 0,
        }
    }
}

impl Histogram {
    #[inline]
    pub(crate) fn add(&mut self, value: u64) {
        self.buckets[bucket_of(value)] += 1;
        self.count += 1;
        self.max = self.max.max(value);
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.buckets
            .iter_mut()
            .zip(&other.buckets)
            .for_each(|(mine, theirs)| *mine += theirs);
        self.count += other.count;
        self.max = self.max.max(other.max);
    }

    pub(crate) fn max(&self) -> u64 {
        self.max
    }

    /// The value that `percent` per cent of all values do not exceed.
    pub(crate) fn percentile(&self, percent: f64) -> u64 {
        let rank = (self.count as f64 * percent / 100.0).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return middle_of(index).min(self.max);
            }
        }
        self.max
    }
}

#[inline]
fn bucket_of(value: u64) -> usize {
    if value < 1 << SUB_BITS {
        return value as usize;
    }
    let exponent = 63 - value.leading_zeros();
    let sub = (value >> (exponent - SUB_BITS)) & ((1 << SUB_BITS) - 1);
    (((exponent - SUB_BITS + 1) << SUB_BITS) as u64 + sub) as usize
}

fn middle_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 1 << SUB_BITS {
        return bucket;
    }
    let shift = (bucket >> SUB_BITS) - 1;
    let mantissa = (bucket & ((1 << SUB_BITS) - 1)) | 1 << SUB_BITS;
    (mantissa << shift) + ((1 << shift) >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_within_1_6_per_cent_of_its_values() {
        for value in [
            0u64,
            1,
            63,
            64,
            65,
            127,
            128,
            1000,
            123_456,
            1 << 40,
            u64::MAX / 2,
        ] {
            let middle = middle_of(bucket_of(value));
            let error = middle.abs_diff(value) as f64 / value.max(1) as f64;
            assert!(error < 0.016, "{value} became {middle}");
        }
    }

    #[test]
    fn percentiles_are_ordered_and_bounded_by_the_maximum() {
        let mut histogram = Histogram::default();
        (1..=1000).for_each(|value| histogram.add(value));
        let [half, most] = [50.0, 99.0].map(|p| histogram.percentile(p));
        assert!(
            (490..=510).contains(&half) && (980..=1000).contains(&most),
            "{half} {most}"
        );
        assert_eq!(histogram.max(), 1000);
    }
}
