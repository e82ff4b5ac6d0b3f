//! The fuzz targets of qcow2: one for each part of the driver, so that each is fast and goes deep.

use crate::script::Kind;

/// A part of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Guest requests, resizing, kills.
    Requests,
    /// Check and repair, then requests to what was repaired.
    Check,
    /// Snapshots beside requests.
    Snapshots,
    /// Persistent bitmaps beside requests.
    Bitmaps,
    /// Requests to an encrypted image.
    Encrypted,
    /// Requests to an image with an external data file.
    DataFile,
}

impl Target {
    /// Every target.
    pub const ALL: [Self; 6] = [
        Self::Requests,
        Self::Check,
        Self::Snapshots,
        Self::Bitmaps,
        Self::Encrypted,
        Self::DataFile,
    ];

    /// The name of its program.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Requests => "qcow2_requests",
            Self::Check => "qcow2_check",
            Self::Snapshots => "qcow2_snapshots",
            Self::Bitmaps => "qcow2_bitmaps",
            Self::Encrypted => "qcow2_encrypted",
            Self::DataFile => "qcow2_data_file",
        }
    }

    /// The target of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|target| target.name() == name)
    }

    /// What the steps of its scripts do.
    pub const fn kinds(self) -> &'static [Kind] {
        match self {
            Self::Requests => &[
                Kind::Read,
                Kind::Write,
                Kind::Zero,
                Kind::ZeroUnmap,
                Kind::Discard,
                Kind::Flush,
                Kind::Status,
                Kind::Resize,
                Kind::Compress,
                Kind::Kill,
            ],
            Self::Check => &[Kind::Read, Kind::Write, Kind::Discard, Kind::Flush],
            Self::Snapshots => &[
                Kind::Read,
                Kind::Write,
                Kind::Zero,
                Kind::ZeroUnmap,
                Kind::Discard,
                Kind::Flush,
                Kind::Status,
                Kind::Resize,
                Kind::Compress,
                Kind::Snapshot,
                Kind::Apply,
                Kind::Delete,
                Kind::View,
            ],
            Self::Bitmaps => &[
                Kind::Write,
                Kind::Zero,
                Kind::Discard,
                Kind::Flush,
                Kind::Resize,
                Kind::Reopen,
                Kind::Kill,
                Kind::AddBitmap,
                Kind::RemoveBitmap,
                Kind::ClearBitmap,
            ],
            Self::Encrypted | Self::DataFile => &[
                Kind::Read,
                Kind::Write,
                Kind::Zero,
                Kind::ZeroUnmap,
                Kind::Discard,
                Kind::Flush,
                Kind::Status,
                Kind::Resize,
                Kind::Snapshot,
                Kind::Apply,
                Kind::Kill,
            ],
        }
    }
}
