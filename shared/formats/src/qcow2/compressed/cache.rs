//! The last few inflated clusters of an image, and memory to inflate into.
//!
//! A cluster is found by its descriptor. What the descriptor says stays true until the host
//! clusters are given back and used for other compressed data; so whoever takes a fresh host
//! cluster for that begins a new generation, which forgets everything ([`Inflated::forget`]).
//! Readers need no more care: while a request runs, no host cluster that it may have looked up is
//! given back.

use executor::HeapBuffer;
use executor::sync::RangeLock;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Memory for inflated clusters in bytes, about.
const CACHE_BYTES: usize = 1 << 20;
/// Least and most clusters kept.
const ENTRIES: std::ops::RangeInclusive<usize> = 2..=32;

/// See the module.
pub(in super::super) struct Inflated {
    cluster_size: usize,
    entries: usize,
    state: Mutex<State>,
    /// Descriptors that are being inflated: others who want them wait.
    pub(super) busy: RangeLock,
}

#[derive(Default)]
struct State {
    /// The latest last.
    clusters: Vec<(u64, Arc<HeapBuffer>)>,
    generation: u64,
    spare: Vec<HeapBuffer>,
}

impl Inflated {
    pub(in super::super) fn new(cluster_size: u64) -> Self {
        let cluster_size = cluster_size as usize;
        let entries = (CACHE_BYTES / cluster_size).clamp(*ENTRIES.start(), *ENTRIES.end());
        Self {
            cluster_size,
            entries,
            state: Mutex::default(),
            busy: RangeLock::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cluster of a descriptor, if it is one of the last.
    pub(super) fn get(&self, descriptor: u64) -> Option<Arc<HeapBuffer>> {
        let state = self.state();
        let mut clusters = state.clusters.iter().rev();
        let (_, cluster) = clusters.find(|(known, _)| *known == descriptor)?;
        Some(Arc::clone(cluster))
    }

    /// The generation that a cluster belongs to when its bytes are read after this call.
    pub(super) fn generation(&self) -> u64 {
        self.state().generation
    }

    /// Keeps a cluster, unless a new generation has begun.
    pub(super) fn put(&self, descriptor: u64, cluster: Arc<HeapBuffer>, generation: u64) {
        let mut state = self.state();
        if state.generation != generation {
            return;
        }
        if state.clusters.len() >= self.entries {
            let (_, oldest) = state.clusters.remove(0);
            if let Ok(memory) = Arc::try_unwrap(oldest) {
                self.keep(&mut state, memory);
            }
        }
        state.clusters.push((descriptor, cluster));
    }

    /// Forgets every cluster.
    pub(super) fn forget(&self) {
        let mut state = self.state();
        state.generation += 1;
        let clusters = std::mem::take(&mut state.clusters);
        drop(state);
        drop(clusters);
    }

    /// Memory of a cluster's size, with whatever it holds.
    pub(super) fn memory(&self) -> HeapBuffer {
        let spare = self.state().spare.pop();
        spare.unwrap_or_else(|| HeapBuffer::zeroed(self.cluster_size))
    }

    /// Gives memory back.
    pub(super) fn give_back(&self, memory: HeapBuffer) {
        self.keep(&mut self.state(), memory);
    }

    fn keep(&self, state: &mut State, memory: HeapBuffer) {
        if memory.len() == self.cluster_size && state.spare.len() < self.entries {
            state.spare.push(memory);
        }
    }
}
