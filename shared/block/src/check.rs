//! Checks of an image's consistency, and their repair: what is asked for, found and told.
//!
//! A node that is served is only ever checked; repairs need a node that was opened with
//! [`Purpose::Check`] (nothing else happens on it, and it is opened again afterwards). Findings go
//! to a [`CheckSink`] one by one, in QEMU's words, and are counted in a [`CheckResult`].

/// What a node is opened for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Purpose {
    /// Reads, writes, and everything else.
    #[default]
    Serve,
    /// [`crate::Driver::check`] and nothing else: damage that the check finds is no reason to
    /// refuse the image, and children that it does not need stay closed.
    Check,
    /// To be described: no name in the image is followed, and no key is needed.
    Describe,
    /// To see that it and what it names can be opened, and how long it is: nothing is read from the
    /// disk, so no key is needed.
    Inspect,
}

impl Purpose {
    /// Whether the disk's content is needed, and with it the key that it is encrypted with.
    pub const fn needs_content(self) -> bool {
        matches!(self, Self::Serve | Self::Check)
    }
}

/// What a check may change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    #[default]
    None,
    /// Storage that is counted and not used is given back (`-r leaks`).
    Leaks,
    /// Everything that can be repaired (`-r all`).
    All,
}

impl Repair {
    /// Whether leaks are repaired.
    pub const fn leaks(self) -> bool {
        !matches!(self, Self::None)
    }
    /// Whether errors are repaired.
    pub const fn errors(self) -> bool {
        matches!(self, Self::All)
    }
}

/// How an image is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckOptions {
    /// What is repaired.
    pub repair: Repair,
    /// Most memory for reference counts and lists of tables, in bytes.
    pub memory: u64,
}

/// Default of [`CheckOptions::memory`].
const DEFAULT_MEMORY: u64 = 192 << 20;

impl Default for CheckOptions {
    fn default() -> Self {
        Self {
            repair: Repair::None,
            memory: DEFAULT_MEMORY,
        }
    }
}

impl CheckOptions {
    /// A check that repairs `repair`.
    pub fn repairing(repair: Repair) -> Self {
        Self {
            repair,
            ..Self::default()
        }
    }
}

/// What a check found (`ImageCheck` of qemu-img).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckResult {
    /// Clusters that are counted and not used, and still are.
    pub leaks: u64,
    /// Errors that still are there.
    pub corruptions: u64,
    /// Parts that could not be checked or repaired.
    pub check_errors: u64,
    /// Leaks repaired.
    pub leaks_fixed: u64,
    /// Errors repaired.
    pub corruptions_fixed: u64,
    /// Where the last cluster in use ends, in bytes; `None` when the format does not tell.
    pub image_end_offset: Option<u64>,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Of these, mapped to storage by the active state.
    pub allocated_clusters: u64,
    /// Of the allocated, not where the one before would have it.
    pub fragmented_clusters: u64,
    /// Of the allocated, compressed.
    pub compressed_clusters: u64,
}

/// Who is told about a check while it runs.
pub trait CheckSink {
    /// A finding, in QEMU's words and without a line end.
    fn message(&mut self, text: &str);
    /// Why the check ends early; its answer has the errno alone.
    fn error(&mut self, text: &str) {
        self.message(text);
    }
    /// `done` of `total` units of work; both may still grow.
    fn progress(&mut self, _done: u64, _total: u64) {}
}

/// Tells nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl CheckSink for Silent {
    fn message(&mut self, _text: &str) {}
}

/// Collects the findings.
impl CheckSink for Vec<String> {
    fn message(&mut self, text: &str) {
        self.push(text.to_owned());
    }
}
