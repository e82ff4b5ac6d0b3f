//! The bytes of one simulated file: pages that copies share until one of them is written.
//!
//! Pages are gathered in chunks, which are shared as well, so that a copy of a file of some MiB,
//! and a few writes to it, cost microseconds.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

const PAGE: u64 = 4096;
const PAGES_PER_CHUNK: usize = 64;
const CHUNK: u64 = PAGE * PAGES_PER_CHUNK as u64;

type Page = [u8; PAGE as usize];

/// Pages that follow each other; one that is absent reads as zeroes.
#[derive(Clone)]
struct Chunk {
    pages: [Option<Arc<Page>>; PAGES_PER_CHUNK],
}

impl Default for Chunk {
    fn default() -> Self {
        Chunk {
            pages: [const { None }; PAGES_PER_CHUNK],
        }
    }
}

/// File content; cloning it copies no page.
#[derive(Clone, Default)]
pub(super) struct Content {
    /// By offset divided by [`CHUNK`].
    chunks: BTreeMap<u64, Arc<Chunk>>,
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

    fn page(&self, part: &Part) -> Option<&Arc<Page>> {
        self.chunks.get(&part.chunk)?.pages[part.page].as_ref()
    }

    /// Copies the bytes from `offset` on to `buffer`; how many there were before the end.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> usize {
        let end = self.len.min(offset + buffer.len() as u64);
        for part in parts(offset..end) {
            let to = &mut buffer[part.at..part.at + part.within.len()];
            match self.page(&part) {
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
            let chunk = Arc::make_mut(self.chunks.entry(part.chunk).or_default());
            let page = chunk.pages[part.page].get_or_insert_with(|| Arc::new([0; PAGE as usize]));
            let from = &bytes[part.at..part.at + part.within.len()];
            Arc::make_mut(page)[part.within].copy_from_slice(from);
        }
        if !bytes.is_empty() {
            self.len = self.len.max(end);
        }
    }

    /// Deallocates a range; the length stays.
    pub(super) fn punch(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let touched = range.start / CHUNK..=(range.end - 1) / CHUNK;
        self.chunks
            .retain(|index, _| !(range.start <= index * CHUNK && range.end >= (index + 1) * CHUNK));
        for (index, chunk) in self.chunks.range_mut(touched) {
            let start = range.start.max(index * CHUNK);
            let end = range.end.min((index + 1) * CHUNK);
            let chunk = Arc::make_mut(chunk);
            for part in parts(start..end) {
                let page = &mut chunk.pages[part.page];
                if part.within.len() as u64 == PAGE {
                    *page = None;
                } else if let Some(page) = page {
                    Arc::make_mut(page)[part.within].fill(0);
                }
            }
        }
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

    /// Numbers of the allocated pages from page `first` on.
    fn pages_from(&self, first: u64) -> impl Iterator<Item = u64> {
        let per_chunk = PAGES_PER_CHUNK as u64;
        let chunks = self.chunks.range(first / per_chunk..);
        let pages = move |(&index, chunk): (&u64, _)| {
            let chunk: &Arc<Chunk> = chunk;
            let pages = (index * per_chunk..).zip(&chunk.pages);
            pages.filter_map(|(number, page)| page.as_ref().map(|_| number))
        };
        chunks.flat_map(pages).skip_while(move |&page| page < first)
    }

    /// The next run of allocated pages at or after `offset`, cut to the length.
    pub(super) fn next_data(&self, offset: u64) -> Option<(u64, u64)> {
        let mut pages = self.pages_from(offset / PAGE);
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
        let mut next = 0;
        while let Some((start, end)) = self.next_data(next) {
            self.read(start, &mut bytes[start as usize..end as usize]);
            next = end;
        }
        bytes
    }
}

/// The part of a range that lies in one page.
struct Part {
    chunk: u64,
    /// Of the chunk.
    page: usize,
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
        let part = Part {
            chunk: next / CHUNK,
            page: (page % PAGES_PER_CHUNK as u64) as usize,
            within: (next - page * PAGE) as usize..(end - page * PAGE) as usize,
            at: (next - range.start) as usize,
        };
        next = end;
        Some(part)
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
        for _ in 0..300 {
            let offset = random.random_range(0..600_000usize);
            let len = random.random_range(0..400_000usize);
            match random.random_range(0..4) {
                0 => {
                    let bytes = vec![random.random::<u8>() | 1; len];
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
