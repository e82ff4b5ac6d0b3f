//! The header cluster as a document: its fields, its extensions and the backing file's name
//! (QEMU docs/interop/qcow2.txt, "Header" and "Header extensions"), to be written or changed as a
//! whole.
//!
//! ```text
//!   fields (header_length bytes) | extension | extension | ... | end | backing file name | zeroes
//! ```
//!
//! Owns: how a header cluster is laid out, and how one is replaced by another. Promises: fields and
//! extensions that it does not know stay byte for byte; what does not fit the cluster is refused
//! before anything is written; a replacement survives a power cut whenever the old and the new
//! header do not need the same sectors behind the first one (see [`write_order`]).

use super::header::{MAX_BACKING_NAME, V2_LENGTH, V3_LENGTH, extension, field};
use super::{SECTOR, read_bytes, write_to};
use block::{Edge, Errno, Error, ErrorKind};

/// Length of the version 3 headers written here.
pub(super) const NEW_V3_LENGTH: usize = 112;

/// One extension.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Extension {
    kind: u32,
    data: Vec<u8>,
}

/// A header cluster taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Document {
    /// The header's fields.
    fields: Vec<u8>,
    extensions: Vec<Extension>,
    backing_name: Vec<u8>,
    /// Where the name has to stay, when there is a choice.
    backing_at: usize,
}

impl Document {
    /// An empty header of a version.
    pub(super) fn new(version: u32) -> Self {
        let mut document = Self {
            fields: vec![0; V2_LENGTH as usize],
            extensions: Vec::new(),
            backing_name: Vec::new(),
            backing_at: 0,
        };
        document.set_version(version);
        document
    }

    /// Takes apart the first cluster of an image whose header parses.
    pub(super) fn parse(cluster: &[u8]) -> Result<Self, Error> {
        let invalid = || Error::new(ErrorKind::Corrupt, "qcow2: the header cannot be rewritten");
        let length = match word(cluster, field::VERSION) {
            2 => V2_LENGTH as usize,
            _ => word(cluster, field::HEADER_LENGTH) as usize,
        };
        let fields = cluster.get(..length).ok_or_else(invalid)?.to_vec();
        let backing_at =
            usize::try_from(long(cluster, field::BACKING_OFFSET)).map_err(|_| invalid())?;
        let backing_length = word(cluster, field::BACKING_LENGTH) as usize;
        let backing_name = match backing_at {
            0 => Vec::new(),
            at => {
                let end = at.checked_add(backing_length).ok_or_else(invalid)?;
                cluster.get(at..end).ok_or_else(invalid)?.to_vec()
            }
        };
        let end = match backing_at {
            0 => cluster.len(),
            at => at.min(cluster.len()),
        };
        let mut extensions = Vec::new();
        let mut rest = cluster.get(length..end).unwrap_or_default();
        while rest.len() >= 8 && word(rest, 0) != extension::END {
            let data_length = word(rest, 4) as usize;
            let data = rest[8..].get(..data_length).ok_or_else(invalid)?;
            extensions.push(Extension {
                kind: word(rest, 0),
                data: data.to_vec(),
            });
            let step = data_length.next_multiple_of(8).saturating_add(8);
            rest = rest.get(step..).unwrap_or_default();
        }
        Ok(Self {
            fields,
            extensions,
            backing_name,
            backing_at,
        })
    }

    /// Makes it a header of another version: the fields that only version 3 has come or go.
    pub(super) fn set_version(&mut self, version: u32) {
        if version < 3 {
            self.fields.truncate(V2_LENGTH as usize);
            self.extensions
                .retain(|known| known.kind != extension::FEATURE_NAMES);
        } else if self.fields.len() < V3_LENGTH as usize {
            self.fields.resize(NEW_V3_LENGTH, 0);
            let length = self.fields.len() as u32;
            self.set_u32(field::HEADER_LENGTH, length);
            self.set_u32(field::REFCOUNT_ORDER, 4);
        }
        self.set_u32(field::VERSION, version);
    }

    /// Sets a field. Fields that the header's version lacks are not there to be set.
    pub(super) fn set_u32(&mut self, at: usize, value: u32) {
        self.set(at, &value.to_be_bytes());
    }

    /// As [`Document::set_u32`].
    pub(super) fn set_u64(&mut self, at: usize, value: u64) {
        self.set(at, &value.to_be_bytes());
    }

    /// As [`Document::set_u32`].
    pub(super) fn set_u8(&mut self, at: usize, value: u8) {
        self.set(at, &[value]);
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.fields.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    /// A field of four bytes.
    pub(super) fn u32(&self, at: usize) -> u32 {
        word(&self.fields, at)
    }

    /// A field of eight bytes; 0 when the version lacks it.
    pub(super) fn u64(&self, at: usize) -> u64 {
        long(&self.fields, at)
    }

    /// The data of an extension.
    #[cfg(test)]
    pub(super) fn extension(&self, kind: u32) -> Option<&[u8]> {
        let found = self.extensions.iter().find(|known| known.kind == kind);
        found.map(|known| known.data.as_slice())
    }

    /// Adds, replaces or removes an extension. Those that QEMU knows come first, in its order; the
    /// others stay in theirs.
    pub(super) fn set_extension(&mut self, kind: u32, data: Option<Vec<u8>>) {
        // An image may have several, of which the last counts.
        self.extensions.retain(|known| known.kind != kind);
        self.extensions
            .extend(data.map(|data| Extension { kind, data }));
        self.extensions.sort_by_key(|known| rank(known.kind));
    }

    /// Sets or removes the backing file's name.
    pub(super) fn set_backing_name(&mut self, name: Option<&str>) -> Result<(), Error> {
        let name = name.unwrap_or_default().as_bytes();
        if name.len() > MAX_BACKING_NAME as usize {
            return Err(Error {
                errno: Some(Errno::EINVAL),
                ..Error::new(ErrorKind::Invalid, "Backing file name too long")
            });
        }
        if name != self.backing_name {
            self.backing_name = name.to_vec();
            self.backing_at = 0;
        }
        Ok(())
    }

    /// The header cluster. The feature name table, which only serves messages, gives way when
    /// there is no room for it.
    ///
    /// # Errors
    /// `Invalid` when it does not fit.
    pub(super) fn encode(&self, cluster_size: usize) -> Result<Vec<u8>, Error> {
        if let Some(cluster) = self.lay_out(cluster_size) {
            return Ok(cluster);
        }
        let mut without_names = self.clone();
        without_names.set_extension(extension::FEATURE_NAMES, None);
        without_names.lay_out(cluster_size).ok_or_else(|| {
            let message = "The names in the image's header do not fit into its first cluster";
            Error {
                errno: Some(Errno::ENOSPC),
                ..Error::new(ErrorKind::Invalid, message)
            }
        })
    }

    fn lay_out(&self, cluster_size: usize) -> Option<Vec<u8>> {
        let mut bytes = self.fields.clone();
        for Extension { kind, data } in &self.extensions {
            bytes.extend_from_slice(&kind.to_be_bytes());
            bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
            bytes.extend_from_slice(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend_from_slice(&[0; 8]);
        // A name that stays where it is makes the change smaller.
        let at = match self.backing_at >= bytes.len() {
            true => self.backing_at,
            false => bytes.len(),
        };
        let (offset, length) = match self.backing_name.len() {
            0 => (0, 0),
            length => (at as u64, length as u32),
        };
        bytes[field::BACKING_OFFSET..][..8].copy_from_slice(&offset.to_be_bytes());
        bytes[field::BACKING_LENGTH..][..4].copy_from_slice(&length.to_be_bytes());
        if length != 0 {
            bytes.resize(at, 0);
            bytes.extend_from_slice(&self.backing_name);
        }
        if bytes.len() > cluster_size {
            return None;
        }
        bytes.resize(cluster_size, 0);
        Some(bytes)
    }
}

/// Which part of a new header cluster is written first, the other after a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WriteOrder {
    /// The sectors behind the first: the old header does not look there.
    RestFirst,
    /// The first sector: the new header does not look behind it for what changes.
    FirstSectorFirst,
}

/// The order in which a power cut between leaves one header or the other: each part that is
/// written must be invisible to the header that is in force meanwhile.
fn write_order(old: &[u8], new: &[u8]) -> WriteOrder {
    let first = SECTOR as usize;
    let mixed = |head: &[u8], rest: &[u8]| [&head[..first], &rest[first..]].concat();
    let same = |one: &[u8], other: &[u8]| match (Document::parse(one), Document::parse(other)) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    };
    match same(&mixed(old, new), old) || !same(&mixed(new, old), new) {
        true => WriteOrder::RestFirst,
        false => WriteOrder::FirstSectorFirst,
    }
}

/// Replaces the header cluster `old` of `file` by `new`; durable when it resolves.
pub(super) async fn replace(file: &Edge, old: &[u8], new: &[u8]) -> Result<(), Errno> {
    let first = SECTOR as usize;
    let (head, rest) = new.split_at(first);
    let rest_changes = old[first..] != *rest;
    let steps = match write_order(old, new) {
        WriteOrder::RestFirst => [(SECTOR, rest), (0, head)],
        WriteOrder::FirstSectorFirst => [(0, head), (SECTOR, rest)],
    };
    for (offset, bytes) in steps {
        if offset == SECTOR && !rest_changes {
            continue;
        }
        write_to(file, offset, bytes).await?;
        file.node().flush().await?;
    }
    Ok(())
}

/// Reads the header cluster of `file`, changes it, and writes it back. Whoever has the image open
/// holds `structure`, and changes in memory what it keeps of the header.
///
/// # Errors
/// `Invalid` when it does not fit its cluster any more; those of `edit`; `Io`.
pub(super) async fn edit(
    file: &Edge,
    cluster_bits: u32,
    edit: impl FnOnce(&mut Document) -> Result<(), Error>,
) -> Result<(), Error> {
    let failed = |errno| Error::io("Could not update qcow2 header", errno);
    let old = read_bytes(file, 0, 1 << cluster_bits)
        .await
        .map_err(failed)?;
    let mut document = Document::parse(&old)?;
    edit(&mut document)?;
    let new = document.encode(old.len())?;
    match old == new {
        true => Ok(()),
        false => replace(file, &old, &new).await.map_err(failed),
    }
}

/// Where an extension stands among the others.
fn rank(kind: u32) -> usize {
    let order = [
        extension::BACKING_FORMAT,
        extension::DATA_FILE,
        extension::CRYPTO,
        extension::FEATURE_NAMES,
        extension::BITMAPS,
    ];
    order
        .iter()
        .position(|known| *known == kind)
        .unwrap_or(order.len())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok());
    u32::from_be_bytes(bytes.unwrap_or_default())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) << 32 | u64::from(word(bytes, at + 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document() -> Document {
        let mut document = Document::new(3);
        document.set_u32(field::CLUSTER_BITS, 12);
        document.set_extension(extension::BACKING_FORMAT, Some(b"raw".to_vec()));
        document.set_extension(0x1234_5678, Some(vec![7; 13]));
        document.set_backing_name(Some("base")).unwrap();
        document
    }

    #[test]
    fn unknown_extensions_and_fields_stay() {
        let mut document = document();
        document.fields.resize(136, 9);
        document.set_u32(field::HEADER_LENGTH, 136);
        let mut parsed = Document::parse(&document.encode(4096).unwrap()).unwrap();
        assert_eq!(parsed.extension(0x1234_5678), Some(&[7; 13][..]));
        assert_eq!(parsed.backing_name, b"base");
        parsed.set_extension(extension::BACKING_FORMAT, None);
        let again = Document::parse(&parsed.encode(4096).unwrap()).unwrap();
        assert_eq!(again.extension(0x1234_5678), Some(&[7; 13][..]));
        assert_eq!(again.extension(extension::BACKING_FORMAT), None);
        assert_eq!(again.fields[112..], [9; 24]);
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        let mut document = document();
        document.set_backing_name(Some(&"x".repeat(800))).unwrap();
        assert_eq!(document.encode(512).unwrap_err().kind, ErrorKind::Invalid);
        assert!(document.encode(1024).is_ok());
        assert!(document.set_backing_name(Some(&"x".repeat(1024))).is_err());
    }

    #[test]
    fn the_feature_names_give_way_to_what_matters() {
        let mut document = document();
        document.set_extension(extension::FEATURE_NAMES, Some(vec![0; 384]));
        let cluster = document.encode(512).unwrap();
        let parsed = Document::parse(&cluster).unwrap();
        assert_eq!(parsed.extension(extension::FEATURE_NAMES), None);
        assert_eq!(parsed.backing_name, b"base");
    }

    #[test]
    fn a_new_version_is_invisible_until_the_first_sector_is_written() {
        let mut old = document();
        old.set_version(2);
        let old_bytes = old.encode(4096).unwrap();
        let mut new = Document::parse(&old_bytes).unwrap();
        new.set_version(3);
        new.set_extension(extension::FEATURE_NAMES, Some(vec![1; 384]));
        let new_bytes = new.encode(4096).unwrap();
        for (old, new) in [(&old_bytes, &new_bytes), (&new_bytes, &old_bytes)] {
            let between = match write_order(old, new) {
                WriteOrder::RestFirst => [&old[..512], &new[512..]].concat(),
                WriteOrder::FirstSectorFirst => [&new[..512], &old[512..]].concat(),
            };
            let between = Document::parse(&between).unwrap();
            let known = [old, new].map(|bytes| Document::parse(bytes).unwrap());
            assert!(known.contains(&between));
        }
    }
}
