//! The images and workloads that are crashed.

use super::bitmaps::{self, State};
use super::checker::Checker;
use super::encrypted::{PASSWORD, encryption};
use super::rig::{Disk, Setup};
use super::snapshots;
use super::workload::{Check, History, Workload};
use crate::qcow2::{CreateOptions, DiscardPolicy};
use block::RedoLog;
use executor::spawn;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::rc::Rc;

/// The name of the image's external data file.
pub(super) const DATA: &str = "disk.data";

/// What is crashed.
#[derive(Clone, Copy)]
pub(super) struct Case {
    pub(super) size: u64,
    pub(super) cluster_size: u64,
    pub(super) refcount_bits: u32,
    pub(super) layout: Layout,
    /// Memory of each cache in bytes.
    pub(super) cache: u64,
    /// Records in the redo log.
    pub(super) log: usize,
    pub(super) workload: Workload,
    /// Operations on snapshots beside the workload.
    pub(super) snapshots: usize,
    /// Bitmaps stored in the image before.
    pub(super) bitmaps: usize,
    /// Refcounts stay in memory until the image is closed.
    pub(super) lazy_refcounts: bool,
    /// Discards leave clusters where they are.
    pub(super) keeps_clusters: bool,
}

/// What the image's L2 entries are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    Standard,
    /// Extended L2 entries.
    Subclusters,
    /// An external data file, raw when it is so by itself.
    DataFile {
        raw: bool,
    },
    /// Encrypted, by the older method or by LUKS.
    Encrypted(Method),
    /// Encrypted in an external data file, with the key material in the image.
    EncryptedDataFile(Method),
}

/// How an image is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Aes,
    Luks,
}

impl Layout {
    /// Incompatible and autoclear features.
    pub(super) fn features(self) -> (u64, u64) {
        match self {
            Self::Standard | Self::Encrypted(_) => (0, 0),
            Self::Subclusters => (16, 0),
            Self::DataFile { raw } => (4, u64::from(raw) * 2),
            Self::EncryptedDataFile(_) => (4, 0),
        }
    }
    pub(super) fn has_data_file(self) -> bool {
        matches!(self, Self::DataFile { .. } | Self::EncryptedDataFile(_))
    }
    /// How it is encrypted.
    pub(super) fn method(self) -> Option<Method> {
        match self {
            Self::Encrypted(method) | Self::EncryptedDataFile(method) => Some(method),
            _ => None,
        }
    }
}

/// Few tables that all fit the caches.
pub(super) const ROOMY: Case = Case {
    size: 256 << 10,
    cluster_size: 1024,
    refcount_bits: 16,
    layout: Layout::Standard,
    cache: 1 << 20,
    log: 1024,
    workload: Workload {
        seed: 0,
        tasks: 4,
        requests: 40,
        longest: 24 << 10,
    },
    snapshots: 0,
    bitmaps: 0,
    lazy_refcounts: false,
    keeps_clusters: false,
};

/// Subclusters of a sector each.
pub(super) const SUBCLUSTERS: Case = Case {
    size: 1 << 20,
    cluster_size: 16 << 10,
    layout: Layout::Subclusters,
    workload: Workload {
        longest: 40 << 10,
        ..ROOMY.workload
    },
    ..ROOMY
};

pub(super) const SUBCLUSTER_SNAPSHOTS: Case = Case {
    snapshots: 6,
    ..SUBCLUSTERS
};

pub(super) const DATA_FILE: Case = Case {
    layout: Layout::DataFile { raw: false },
    ..ROOMY
};

pub(super) const RAW_DATA_FILE: Case = Case {
    layout: Layout::DataFile { raw: true },
    ..ROOMY
};

pub(super) const AES: Case = Case {
    layout: Layout::Encrypted(Method::Aes),
    snapshots: 2,
    ..ROOMY
};

/// Its header takes half a megabyte.
pub(super) const LUKS: Case = Case {
    layout: Layout::Encrypted(Method::Luks),
    cluster_size: 8192,
    ..AES
};

pub(super) const AES_DATA_FILE: Case = Case {
    layout: Layout::EncryptedDataFile(Method::Aes),
    ..ROOMY
};

pub(super) const BRIEF_AES_DATA_FILE: Case = Case {
    layout: Layout::EncryptedDataFile(Method::Aes),
    ..BRIEF
};

pub(super) const BRIEF_LUKS_DATA_FILE: Case = Case {
    layout: Layout::EncryptedDataFile(Method::Luks),
    cluster_size: 8192,
    ..BRIEF
};

/// Discarded clusters of an encrypted image stay where they are.
pub(super) const BRIEF_AES_KEPT: Case = Case {
    keeps_clusters: true,
    ..BRIEF_AES
};

pub(super) const BRIEF_AES: Case = Case {
    layout: Layout::Encrypted(Method::Aes),
    snapshots: 2,
    ..BRIEF
};

pub(super) const BRIEF_LUKS: Case = Case {
    layout: Layout::Encrypted(Method::Luks),
    cluster_size: 8192,
    ..BRIEF_AES
};

/// Discarded clusters stay where they are, with and without snapshots that share them.
pub(super) const KEPT: Case = Case {
    keeps_clusters: true,
    ..ROOMY
};

pub(super) const BRIEF_KEPT: Case = Case {
    keeps_clusters: true,
    ..BRIEF_SNAPSHOTS
};

pub(super) const KEPT_SUBCLUSTERS: Case = Case {
    keeps_clusters: true,
    ..SUBCLUSTER_SNAPSHOTS
};

/// Caches that hold a fraction of the tables, a refcount table that must grow, a log that fills.
pub(super) const TIGHT: Case = Case {
    size: 4 << 20,
    cluster_size: 512,
    refcount_bits: 64,
    layout: Layout::Standard,
    cache: 0,
    log: 320,
    workload: Workload {
        seed: 0,
        tasks: 4,
        requests: 40,
        longest: 400 << 10,
    },
    snapshots: 0,
    bitmaps: 0,
    lazy_refcounts: false,
    keeps_clusters: false,
};

/// Snapshots come and go meanwhile.
pub(super) const SNAPSHOTS: Case = Case {
    snapshots: 12,
    workload: Workload {
        requests: 20,
        ..ROOMY.workload
    },
    ..ROOMY
};

/// As brief as [`BRIEF`], with snapshots.
pub(super) const BRIEF_SNAPSHOTS: Case = Case {
    snapshots: 4,
    ..BRIEF
};

/// Stored bitmaps, one of which is removed meanwhile, and snapshots.
pub(super) const BITMAPS: Case = Case {
    bitmaps: 2,
    snapshots: 3,
    ..BRIEF
};

/// Snapshots, with narrow clusters and more tables than the caches hold.
pub(super) const TIGHT_SNAPSHOTS: Case = Case {
    size: 1 << 20,
    snapshots: 6,
    workload: Workload {
        requests: 16,
        longest: 100 << 10,
        ..TIGHT.workload
    },
    ..TIGHT
};

/// So short that every operation can be the last one.
pub(super) const BRIEF: Case = Case {
    size: 96 << 10,
    workload: Workload {
        seed: 0,
        tasks: 3,
        requests: 12,
        longest: 12 << 10,
    },
    ..ROOMY
};

/// Refcounts that only a close writes, with and without all that must write them before.
pub(super) const LAZY: Case = Case {
    lazy_refcounts: true,
    ..ROOMY
};

pub(super) const TIGHT_LAZY: Case = Case {
    lazy_refcounts: true,
    ..TIGHT
};

pub(super) const BRIEF_LAZY: Case = Case {
    lazy_refcounts: true,
    ..BRIEF
};

pub(super) const LAZY_BITMAPS: Case = Case {
    lazy_refcounts: true,
    ..BITMAPS
};

impl Case {
    pub(super) fn image(&self) -> CreateOptions {
        CreateOptions {
            cluster_size: self.cluster_size,
            refcount_bits: self.refcount_bits,
            encryption: self.layout.method().map(encryption),
            // Extended entries map half as much with the same L1 table.
            ..CreateOptions::new(self.size * 2)
        }
    }
    pub(super) fn workload(&self, seed: u64) -> Workload {
        Workload {
            seed,
            ..self.workload
        }
    }
    /// Runs the workload, and the operations on snapshots beside it.
    pub(super) async fn run(&self, disk: &Disk, history: &Rc<History>, seed: u64) {
        let random = SmallRng::seed_from_u64(seed ^ 0x5eed);
        let (other, operations) = (Rc::clone(history), self.snapshots);
        let snapshots = spawn(snapshots::operate(disk.clone(), other, random, operations));
        let replacing = (self.bitmaps > 1).then(|| spawn(bitmaps::replace(disk.clone())));
        self.workload(seed).run(disk, history).await;
        snapshots.await;
        if let Some(replacing) = replacing {
            replacing.await;
        }
    }
    /// Checks the bitmaps of an image that was not closed, if it has any.
    pub(super) fn check_bitmaps(&self, image: &Checker<'_>, content: &[u8]) -> Check {
        match self.bitmaps {
            0 => Ok(()),
            _ => bitmaps::check(image, content, State::Crashed),
        }
    }
    pub(super) fn setup(&self) -> Setup {
        self.setup_with(RedoLog::in_memory(self.log))
    }
    pub(super) fn setup_with(&self, log: RedoLog) -> Setup {
        Setup {
            log,
            cache: self.cache,
            data_file: self.layout.has_data_file().then(|| DATA.into()),
            lazy_refcounts: self.lazy_refcounts,
            discards: DiscardPolicy {
                keeps_clusters: self.keeps_clusters,
                ..DiscardPolicy::default()
            },
            password: self.layout.method().map(|_| PASSWORD),
            ..Setup::default()
        }
    }
}
