//! The bytes of one simulated file: pages that copies share until one of them is written.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

const PAGE: u64 = 4096;

type Page = [u8; PAGE as usize];

/// File content; cloning it copies no page.
#[derive(Clone, Default)]
pub(super) struct Content {
    /// By index; a page that is absent reads as zeroes.
    pages: BTreeMap<u64, Arc<Page>>,
    len: u64,
}

impl Content {
    pub(super) fn new(bytes: &[u8]) -> Content {
        let mut content = Content::default();
        content.write(0, bytes);
        content
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Copies the bytes from `offset` on to `buffer`; how many there were before the end.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> usize {
        let end = self.len.min(offset + buffer.len() as u64);
        for part in parts(offset..end) {
            let to = &mut buffer[part.at..part.at + part.within.len()];
            match self.pages.get(&part.page) {
                Some(page) => to.copy_from_slice(&page[part.within]),
                None => to.fill(0),
            }
        }
        end.saturating_sub(offset) as usize
    }

    /// Writes `bytes` at `offset`, growing the file when they end past it.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        for part in parts(offset..end) {
            let page = self.pages.entry(part.page);
            let page = page.or_insert_with(|| Arc::new([0; PAGE as usize]));
            let from = &bytes[part.at..part.at + part.within.len()];
            Arc::make_mut(page)[part.within].copy_from_slice(from);
        }
        if !bytes.is_empty() {
            self.len = self.len.max(end);
        }
    }

    /// Deallocates a range; the length stays.
    pub(super) fn punch(&mut self, range: Range<u64>) {
        for part in self.present_parts(range) {
            if part.within.len() as u64 == PAGE {
                self.pages.remove(&part.page);
            } else if let Some(page) = self.pages.get_mut(&part.page) {
                Arc::make_mut(page)[part.within].fill(0);
            }
        }
    }

    /// The parts of `range` in pages that exist.
    fn present_parts(&self, range: Range<u64>) -> Vec<Part> {
        if range.is_empty() {
            return Vec::new();
        }
        let pages = self
            .pages
            .range(range.start / PAGE..=(range.end - 1) / PAGE);
        let part = |(&page, _): (&u64, _)| {
            let start = range.start.max(page * PAGE);
            let end = range.end.min((page + 1) * PAGE);
            parts(start..end)
        };
        pages.flat_map(part).collect()
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.punch(len..self.len.next_multiple_of(PAGE));
        }
        self.len = len;
    }

    pub(super) fn grow(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    /// The next run of allocated pages at or after `offset`, cut to the length.
    pub(super) fn next_data(&self, offset: u64) -> Option<(u64, u64)> {
        let mut pages = self.pages.range(offset / PAGE..).map(|(&page, _)| page);
        let first = pages.next()?;
        let start = offset.max(first * PAGE);
        if start >= self.len {
            return None;
        }
        let mut end = first + 1;
        while pages.next() == Some(end) {
            end += 1;
        }
        Some((start, (end * PAGE).min(self.len)))
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        let len = usize::try_from(self.len).expect("a simulated file fits in memory");
        let mut bytes = vec![0; len];
        for (index, page) in &self.pages {
            let start = (index * PAGE) as usize;
            if start < len {
                let end = len.min(start + PAGE as usize);
                bytes[start..end].copy_from_slice(&page[..end - start]);
            }
        }
        bytes
    }
}

/// The part of a range that lies in one page.
struct Part {
    page: u64,
    /// Bytes in the page.
    within: Range<usize>,
    /// Where the part starts in the range.
    at: usize,
}

fn parts(range: Range<u64>) -> impl Iterator<Item = Part> {
    let mut next = range.start;
    std::iter::from_fn(move || {
        if next >= range.end {
            return None;
        }
        let page = next / PAGE;
        let end = range.end.min((page + 1) * PAGE);
        let within = (next - page * PAGE) as usize..(end - page * PAGE) as usize;
        let at = (next - range.start) as usize;
        next = end;
        Some(Part { page, within, at })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    #[test]
    fn pages_behave_like_a_byte_vector() {
        let seed = SmallRng::from_os_rng().random();
        eprintln!("seed {seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        let mut content = Content::default();
        let mut model: Vec<u8> = Vec::new();
        for _ in 0..2000 {
            let offset = random.random_range(0..30000usize);
            let len = random.random_range(0..9000usize);
            match random.random_range(0..4) {
                0 => {
                    let bytes: Vec<u8> = (0..len).map(|_| random.random()).collect();
                    content.write(offset as u64, &bytes);
                    if len > 0 {
                        model.resize(model.len().max(offset + len), 0);
                        model[offset..offset + len].copy_from_slice(&bytes);
                    }
                }
                1 => {
                    content.punch(offset as u64..(offset + len) as u64);
                    let end = model.len().min(offset + len);
                    if offset < end {
                        model[offset..end].fill(0);
                    }
                }
                2 => {
                    content.set_len(offset as u64);
                    model.resize(offset, 0);
                }
                _ => {
                    let mut bytes = vec![0xaa; len];
                    let count = content.read(offset as u64, &mut bytes);
                    let end = model.len().min(offset + len).max(offset);
                    assert_eq!(count, end - offset);
                    assert!(count == 0 || bytes[..count] == model[offset..end]);
                }
            }
            assert_eq!(content.to_vec(), model);
        }
    }
}
