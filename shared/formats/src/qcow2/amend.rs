//! Changing what an image was created with: version, size, refcount width, names, features.
//!
//! ```text
//!   replay of the redo log · version 3 · refcount width · names and features · size · version 2
//! ```
//!
//! Everything is checked before anything is changed, but for snapshots of other sizes, which depend on the new size. Each step leaves a consistent image on disk,
//! with the old or the new state of what it changes, wherever a power cut interrupts it: structures
//! are written beside the old ones, and the header's first sector switches. Steps that need the
//! driver open the image for themselves and close it again, so that none has to follow what another
//! does to the geometry.

use super::create::{MIN_NAMES_CLUSTER, feature_names};
use super::crypto::{Crypto, amend_keys, take_amendment};
use super::document::{self, Document};
use super::entry::{Parts, take_parts};
use super::flatten;
use super::header::{
    AUTOCLEAR_DATA_FILE_RAW, COMPATIBLE_LAZY_REFCOUNTS, Header, extension, field, incompatible,
};
use super::open::read_header;
use super::width::change_refcount_width;
use super::{OpenOptions, Qcow2};
use block::amend::{AmendRequest, Amender};
use block::create::{OptionKind, OptionSpec};
use block::{Driver, Edge, Error, ErrorKind, FormatNode, OpenRequest, Resize};
use std::sync::Arc;

const fn text(name: &'static str, member: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec::new((name, member), OptionKind::Text, help)
}

/// How qcow2 images are amended.
pub(super) const AMENDER: Amender = Amender {
    options: &[
        text(
            "encrypt.state",
            "encrypt.state",
            "Select new state of affected keyslots (active/inactive)",
        ),
        OptionSpec::new(
            ("encrypt.keyslot", "encrypt.keyslot"),
            OptionKind::Number,
            "Select a single keyslot to modify explicitly",
        ),
        text(
            "encrypt.old-secret",
            "encrypt.old-secret",
            "Select all keyslots that match this password",
        ),
        text(
            "encrypt.new-secret",
            "encrypt.new-secret",
            "New secret to set in the matching keyslots. Empty string to erase",
        ),
        OptionSpec::new(
            ("encrypt.iter-time", "encrypt.iter-time"),
            OptionKind::Number,
            "Time to spend in PBKDF in milliseconds",
        ),
        OptionSpec::new(("size", "size"), OptionKind::Size, "Virtual disk size"),
        text(
            "compat",
            "version",
            "Compatibility level (v2 [0.10] or v3 [1.1])",
        ),
        text("backing_file", "backing-file", "File name of a base image"),
        text(
            "backing_fmt",
            "backing-fmt",
            "Image format of the base image",
        ),
        text(
            "data_file",
            "data-file",
            "File name of an external data file",
        ),
        OptionSpec::new(
            ("data_file_raw", "data-file-raw"),
            OptionKind::Switch,
            "The external data file must stay valid as a raw image",
        ),
        OptionSpec::new(
            ("lazy_refcounts", "lazy-refcounts"),
            OptionKind::Switch,
            "Postpone refcount updates",
        ),
        OptionSpec::new(
            ("refcount_bits", "refcount-bits"),
            OptionKind::Number,
            "Width of a reference count entry in bits",
        ),
    ],
    amend: |open, changes| Box::pin(amend(open, changes)),
};

fn invalid<T>(message: impl Into<String>) -> Result<T, Error> {
    Err(Error::new(ErrorKind::Invalid, message))
}

/// What the caller asks for.
struct Wanted {
    version: Option<u32>,
    size: Option<u64>,
    refcount_bits: Option<u64>,
    lazy_refcounts: Option<bool>,
    data_file: Option<String>,
    data_file_raw: Option<bool>,
    backing_file: Option<String>,
    backing_format: Option<String>,
}

impl Wanted {
    fn take(changes: &mut AmendRequest<'_>) -> Result<Self, Error> {
        let version = match changes.take_str("version")?.as_deref() {
            None => None,
            Some("0.10" | "v2") => Some(2),
            Some("1.1" | "v3") => Some(3),
            Some(other) => return invalid(format!("Unknown compatibility level {other}")),
        };
        Ok(Self {
            version,
            size: changes.take_size("size")?,
            refcount_bits: changes.take_size("refcount-bits")?,
            lazy_refcounts: changes.take_bool("lazy-refcounts")?,
            data_file: changes.take_str("data-file")?,
            data_file_raw: changes.take_bool("data-file-raw")?,
            backing_file: changes.take_str("backing-file")?,
            backing_format: changes.take_str("backing-fmt")?,
        })
    }

    /// Refuses what cannot be done to the image, before anything is done.
    fn check(&self, header: &Header) -> Result<(), Error> {
        let version = self.version.unwrap_or(header.version);
        let bits = self.refcount_bits.unwrap_or(1 << header.refcount_order);
        if !bits.is_power_of_two() || bits > 64 {
            return invalid("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if self.refcount_bits.is_some() && bits != 16 && version < 3 {
            return invalid(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above \
                 (use compat=1.1 or greater)",
            );
        }
        let has_data_file = header.incompatible & incompatible::DATA_FILE != 0;
        let is_raw = header.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0;
        if self.data_file_raw == Some(true) && !is_raw {
            return invalid("data-file-raw cannot be set on existing images");
        }
        if self.data_file.is_some() && !has_data_file {
            return invalid("data-file can only be set for images that use an external data file");
        }
        let names_backing = self.backing_file.is_some() || self.backing_format.is_some();
        let keeps_backing = self.backing_file == header.backing_name
            && self.backing_format == header.backing_format;
        if names_backing && !keeps_backing {
            let error = Error::new(ErrorKind::Invalid, "Cannot amend the backing file");
            return Err(error.with_hint("You can use 'qemu-img rebase' instead."));
        }
        if self.lazy_refcounts == Some(true) && version < 3 {
            return invalid(
                "Lazy refcounts only supported with compatibility level 1.1 and above \
                 (use compat=1.1 or greater)",
            );
        }
        if version < header.version {
            return self.check_downgrade(header, bits);
        }
        Ok(())
    }

    fn check_downgrade(&self, header: &Header, bits: u64) -> Result<(), Error> {
        if bits != 16 {
            return invalid("compat=0.10 requires refcount_bits=16");
        }
        if header.incompatible & incompatible::DATA_FILE != 0 {
            return invalid("Cannot downgrade an image with a data file");
        }
        let features = header.incompatible & !incompatible::DIRTY;
        if features != 0 {
            return invalid(format!(
                "Cannot downgrade an image with incompatible features {features:#x} set"
            ));
        }
        Ok(())
    }
}

/// An image whose driver is closed between steps.
struct Amended {
    file: Edge,
    data_file: Option<Edge>,
    backing: Option<Edge>,
    header: Header,
    /// What the image's data is encrypted with.
    crypto: Option<Arc<Crypto>>,
}

async fn amend(open: &mut OpenRequest<'_>, changes: &mut AmendRequest<'_>) -> Result<(), Error> {
    let parts = take_parts(open).await?;
    open.finish()?;
    changes.opened();
    let keys = take_amendment(&parts.header, changes)?;
    if let Some(keys) = keys {
        let crypto = parts.options.crypto.as_deref();
        amend_keys((&parts.file, &parts.header), crypto, keys).await?;
    }
    amend_parts(parts, changes).await
}

/// Makes the changes to an image that nothing has open.
pub(super) async fn amend_parts(parts: Parts, changes: &mut AmendRequest<'_>) -> Result<(), Error> {
    let wanted = Wanted::take(changes)?;
    changes.finish()?;
    wanted.check(&parts.header)?;
    let image = Amended::begin(parts).await?;
    changes.progress(0, 1);
    image.make(&wanted, changes).await?;
    changes.progress(1, 1);
    Ok(())
}

impl Amended {
    /// Brings the image up to date.
    async fn begin(parts: Parts) -> Result<Self, Error> {
        let Parts {
            file,
            backing,
            header,
            mut options,
        } = parts;
        let image = Self {
            crypto: options.crypto.clone(),
            file,
            data_file: options.data_file.take(),
            backing,
            header,
        };
        let ((), image) = image.with_driver(options, async |_| Ok(())).await?;
        Ok(image)
    }

    async fn make(mut self, wanted: &Wanted, changes: &mut AmendRequest<'_>) -> Result<(), Error> {
        let version = wanted.version.unwrap_or(self.header.version);
        if version > self.header.version {
            let completed = self.with_driver(OpenOptions::default(), async |node| {
                node.format().complete_snapshots().await
            });
            self = completed.await?.1;
            self.edit(upgrade).await?;
        }
        if let Some(bits) = wanted.refcount_bits {
            let order = bits.trailing_zeros();
            if order != self.header.refcount_order {
                let progress = |done, total| changes.progress(done, total);
                change_refcount_width(&self.file, &self.header, order, progress).await?;
                self.header = read_header(&self.file).await?;
            }
        }
        self.edit(|header| {
            set_features(header, wanted);
            Ok(())
        })
        .await?;
        if let Some(length) = wanted.size {
            self = self.resize(length).await?;
        }
        if version < self.header.version {
            // The snapshots may have the new size and not the old one.
            self = self.check_snapshots().await?;
            self.downgrade(changes).await?;
        }
        Ok(())
    }

    /// Changes the header and reads it again.
    async fn edit(
        &mut self,
        change: impl FnOnce(&mut Document) -> Result<(), Error>,
    ) -> Result<(), Error> {
        document::edit(&self.file, self.header.cluster_bits, change).await?;
        self.header = read_header(&self.file).await?;
        Ok(())
    }

    /// Opens the image, lets `work` use it, closes it again.
    async fn with_driver<T>(
        self,
        options: OpenOptions,
        work: impl AsyncFnOnce(&FormatNode<Qcow2>) -> Result<T, Error>,
    ) -> Result<(T, Self), Error> {
        let crypto = self.crypto;
        let options = OpenOptions {
            data_file: self.data_file,
            crypto: crypto.clone(),
            ..options
        };
        let image = Qcow2::open_parsed(self.file, self.backing, self.header, options).await?;
        let node = FormatNode::new(image);
        let result = work(&node).await;
        let closed = node.close().await;
        let result = result?;
        closed.map_err(|errno| Error::io("Could not close the image", errno))?;
        let Qcow2 {
            file,
            data_file,
            backing,
            ..
        } = node.into_format();
        let header = read_header(&file).await?;
        let image = Self {
            file,
            data_file,
            backing,
            header,
            crypto,
        };
        Ok((result, image))
    }

    async fn resize(self, length: u64) -> Result<Self, Error> {
        let resize = Resize::to(length);
        let resized = self.with_driver(OpenOptions::default(), async |node| {
            node.resize(resize).await
        });
        Ok(resized.await?.1)
    }

    /// Version 2 knows neither the machine state's full size nor the disk's size of a snapshot.
    async fn check_snapshots(self) -> Result<Self, Error> {
        let size = self.header.size;
        let checked = self.with_driver(OpenOptions::default(), async |node| {
            match node.format().has_snapshot_beyond_version_2(size) {
                true => invalid("Internal snapshots prevent downgrade of image"),
                false => Ok(()),
            }
        });
        Ok(checked.await?.1)
    }

    /// Flattens zero clusters, which version 2 has not got, then makes the header one of
    /// version 2.
    async fn downgrade(self, changes: &mut AmendRequest<'_>) -> Result<(), Error> {
        let flattened = self.with_driver(OpenOptions::default(), async |node| {
            let mut progress = |done, total| changes.progress(done, total);
            flatten::zero_clusters(node.format(), &mut progress).await
        });
        let (_, mut image) = flattened.await?;
        image
            .edit(|header| {
                header.set_version(2);
                Ok(())
            })
            .await
    }
}

fn upgrade(header: &mut Document) -> Result<(), Error> {
    header.set_version(3);
    let cluster_size = 1 << header.u32(field::CLUSTER_BITS);
    if cluster_size >= MIN_NAMES_CLUSTER {
        header.set_extension(extension::FEATURE_NAMES, Some(feature_names()));
    }
    Ok(())
}

/// The changes that the header alone has to tell.
fn set_features(header: &mut Document, wanted: &Wanted) {
    if let Some(lazy) = wanted.lazy_refcounts {
        let others = header.u64(field::COMPATIBLE) & !COMPATIBLE_LAZY_REFCOUNTS;
        let bit = if lazy { COMPATIBLE_LAZY_REFCOUNTS } else { 0 };
        header.set_u64(field::COMPATIBLE, others | bit);
    }
    if wanted.data_file_raw == Some(false) {
        let others = header.u64(field::AUTOCLEAR) & !AUTOCLEAR_DATA_FILE_RAW;
        header.set_u64(field::AUTOCLEAR, others);
    }
    if let Some(name) = &wanted.data_file {
        let name = (!name.is_empty()).then(|| name.as_bytes().to_vec());
        header.set_extension(extension::DATA_FILE, name);
    }
}
