//! A chunk: read, and told apart into data and zeroes, on whichever thread has time.

use super::runs::{Run, RunRules, Runs, is_zero};
use super::{Copy, Sources, Store};
use executor::{Errno, HeapBuffer};

/// What was read, and how it is to be written.
pub(super) struct Chunk {
    pub(super) memory: HeapBuffer,
    pub(super) runs: Vec<Run>,
    /// Sectors that could not be read, and why; they hold zeroes.
    pub(super) lost: Vec<(u64, Errno)>,
}

/// Memory that could not be filled.
pub(super) struct Unread {
    pub(super) memory: HeapBuffer,
    pub(super) errno: Errno,
}

/// How data is told apart.
#[derive(Clone, Copy)]
pub(super) struct Look {
    sparse: Option<u64>,
    store: Store,
    /// Bytes that the target takes at least.
    alignment: u64,
}

impl Look {
    /// The runs of `data`, which are at `offset`.
    pub(super) fn runs(self, offset: u64, data: &[u8]) -> Vec<Run> {
        match (self.sparse, self.store) {
            (None, _) => vec![Run {
                length: data.len(),
                zero: false,
            }],
            (Some(sparse), Store::Plain) => {
                Runs::new(data, offset, RunRules::new(sparse, self.alignment)).collect()
            }
            (Some(_), Store::Compressed { cluster: unit }) => {
                let mut runs: Vec<Run> = Vec::new();
                for cluster in data.chunks(unit.max(1) as usize) {
                    let zero = is_zero(cluster);
                    let length = cluster.len();
                    match runs.last_mut().filter(|last| last.zero == zero) {
                        Some(last) => last.length += length,
                        None => runs.push(Run { length, zero }),
                    }
                }
                runs
            }
        }
    }
}

impl Sources {
    /// Fills `memory` from `offset` and looks at it.
    async fn read_chunk(
        &self,
        (offset, memory): (u64, HeapBuffer),
        look: Look,
    ) -> Result<Chunk, Unread> {
        let buffer = memory.into_buffer();
        let read = self.read(offset, buffer.clone()).await;
        let memory = buffer.into_heap();
        match read {
            Ok(()) => Ok(Chunk {
                runs: look.runs(offset, &memory),
                memory,
                lost: Vec::new(),
            }),
            Err(errno) => Err(Unread { memory, errno }),
        }
    }
}

impl Copy<'_> {
    /// How this copy tells data apart.
    pub(super) fn look(&self) -> Look {
        Look {
            sparse: self.options.sparse,
            store: self.options.store,
            alignment: u64::from(self.target.limits().request_alignment),
        }
    }

    /// Reads a chunk by one of the readers, or here when these have enough to do.
    pub(super) async fn fetch(&self, offset: u64, memory: HeapBuffer) -> Result<Chunk, Unread> {
        let (asked, look) = ((offset, memory), self.look());
        match self.readers.filter(|readers| readers.has_room()) {
            None => self.sources.read_chunk(asked, look).await,
            Some(readers) => {
                let length = asked.1.len();
                let work = move |sources: std::rc::Rc<Sources>| async move {
                    sources.read_chunk(asked, look).await
                };
                let gone = || Unread {
                    memory: HeapBuffer::zeroed(length),
                    errno: Errno::EIO,
                };
                readers.call(work).await.unwrap_or_else(|| Err(gone()))
            }
        }
    }
}
