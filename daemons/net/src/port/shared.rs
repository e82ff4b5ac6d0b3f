//! What the control thread says and the threads of the pairs go by.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};

use super::features;
use super::filter::Filter;
use crate::frame::MacAddress;
use crate::link::Offloads;
use crate::live::Live;

/// Which pairs a guest uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Used {
    /// Those whose rings the front-end enables.
    Enabled,
    /// Those of the enabled ones with something in their rings: the driver told a predecessor which, and nothing is known of it.
    Filled,
    /// The first of the enabled ones, so many, as the driver told.
    First(u16),
}

impl Used {
    /// As a word.
    pub(super) fn encode(self) -> u16 {
        match self {
            Used::Enabled => u16::MAX,
            Used::Filled => 0,
            Used::First(pairs) => pairs,
        }
    }

    /// What [`Used::encode`] gave.
    pub(super) fn decode(word: u16) -> Used {
        match word {
            u16::MAX => Used::Enabled,
            0 => Used::Filled,
            pairs => Used::First(pairs),
        }
    }
}

/// The state of a port that all of its threads see.
pub(super) struct Shared {
    link: AtomicBool,
    used: AtomicU16,
    /// Feature bits of what the guest can do by itself for what it receives.
    guest_offloads: AtomicU64,
    /// The receive filter.
    pub(super) filter: Arc<Live<Filter>>,
    /// Which rings the guest broke, by index.
    broken: Box<[AtomicBool]>,
}

impl Shared {
    /// Of a port of `rings` rings without a guest, with the link up.
    pub(super) fn new(mac: MacAddress, rings: u16) -> Shared {
        Shared {
            link: AtomicBool::new(true),
            used: AtomicU16::new(Used::Enabled.encode()),
            guest_offloads: AtomicU64::new(0),
            filter: Arc::new(Live::new(Filter::open(mac))),
            broken: (0..rings).map(|_| AtomicBool::new(false)).collect(),
        }
    }

    /// Whether the link is up.
    #[inline]
    pub(super) fn link(&self) -> bool {
        self.link.load(Ordering::Relaxed)
    }

    pub(super) fn set_link(&self, up: bool) {
        self.link.store(up, Ordering::Relaxed);
    }

    /// Which pairs the guest uses.
    pub(super) fn used(&self) -> Used {
        Used::decode(self.used.load(Ordering::Relaxed))
    }

    pub(super) fn set_used(&self, used: Used) {
        self.used.store(used.encode(), Ordering::Relaxed);
    }

    /// What the guest can do by itself for what it receives.
    pub(super) fn guest_offloads(&self) -> Offloads {
        features::guest_offloads(self.guest_offloads.load(Ordering::Relaxed))
    }

    /// The same as feature bits.
    pub(super) fn guest_offload_bits(&self) -> u64 {
        self.guest_offloads.load(Ordering::Relaxed)
    }

    pub(super) fn set_guest_offloads(&self, bits: u64) {
        self.guest_offloads.store(bits, Ordering::Relaxed);
    }

    /// Whether the guest broke ring `index`.
    pub(super) fn is_broken(&self, index: u16) -> bool {
        self.broken[usize::from(index)].load(Ordering::Relaxed)
    }

    pub(super) fn set_broken(&self, index: u16, broken: bool) {
        self.broken[usize::from(index)].store(broken, Ordering::Relaxed);
    }
}
