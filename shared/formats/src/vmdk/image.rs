//! What all extents of an image share: the content identifier, and the parent.
//!
//! Whoever makes an image over another keeps that one's CID as its parent's. A program that changes an
//! image gives it another CID, so that images over it can tell: the first change after an image was
//! opened waits until the new digits are durable. They are as many as before and stand in the place of
//! the old ones, so a power cut leaves the old number, the new one, or digits of both.

use super::descriptor::{ContentId, Descriptor, NO_PARENT};
use crate::bytes::write_bytes;
use block::{Edge, Errno, Error, ErrorKind};
use executor::sync::Mutex as AsyncMutex;
use rand::TryRngCore;
use rand::rngs::OsRng;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// A random number.
///
/// # Errors
/// `Io` when the host has none.
pub(super) fn random() -> Result<u32, Error> {
    let number = OsRng.try_next_u32();
    number.map_err(|error| Error::new(ErrorKind::Io, format!("no random number: {error}")))
}

/// The CID of an open image.
pub(super) struct Content {
    cid: AtomicU32,
    /// Where its digits are in the file, and how many they are.
    place: Option<(u64, usize)>,
    is_changed: AtomicBool,
    changing: AsyncMutex<()>,
}

impl Content {
    /// Of a descriptor at `offset` of the file.
    pub(super) fn new(cid: Option<ContentId>, offset: u64) -> Self {
        Self {
            cid: AtomicU32::new(cid.map_or(NO_PARENT, |cid| cid.value)),
            place: cid.map(|cid| (offset + cid.at as u64, cid.digits)),
            is_changed: AtomicBool::new(cid.is_none()),
            changing: AsyncMutex::new(()),
        }
    }

    pub(super) fn cid(&self) -> u32 {
        self.cid.load(Ordering::Relaxed)
    }

    /// Whether changes need not wait.
    #[inline]
    pub(super) fn is_changed(&self) -> bool {
        self.is_changed.load(Ordering::Acquire)
    }

    /// Tells, durably, that the content is another one than when the image was opened.
    pub(super) async fn change(&self, file: &Edge) -> Result<(), Errno> {
        let _alone = self.changing.lock().await;
        if self.is_changed() {
            return Ok(());
        }
        if let Some((at, digits)) = self.place {
            let number = random().map_err(|_| Errno::EIO)?;
            let cid = another(self.cid(), number, digits);
            let text = format!("{cid:0digits$x}");
            write_bytes(file, at, text.as_bytes()).await?;
            file.node().flush().await?;
            self.cid.store(cid, Ordering::Relaxed);
        }
        self.is_changed.store(true, Ordering::Release);
        Ok(())
    }
}

/// A CID of so many digits, made of `number`, that is neither `old` nor that of no parent.
fn another(old: u32, number: u32, digits: usize) -> u32 {
    let most = u32::MAX >> (32 - 4 * digits.clamp(1, 8));
    let new = number & most;
    let candidates = [new, new.wrapping_add(1) & most, new.wrapping_add(2) & most];
    let fits = |cid: &u32| *cid != old && *cid != NO_PARENT;
    candidates.into_iter().find(fits).unwrap_or(new)
}

/// The parent of an image.
pub(super) struct Parent {
    edge: Edge,
    expected: u32,
    is_known: AtomicBool,
}

impl Parent {
    /// The node at `edge`, as the descriptor of the image above knows it.
    pub(super) fn new(edge: Edge, descriptor: &Descriptor) -> Self {
        Self {
            edge,
            expected: descriptor.parent_cid.unwrap_or(NO_PARENT),
            is_known: AtomicBool::new(false),
        }
    }

    pub(super) fn edge(&self) -> &Edge {
        &self.edge
    }

    /// Whether it was found to be what it was when the image above was made.
    #[inline]
    pub(super) fn is_known(&self) -> bool {
        self.is_known.load(Ordering::Relaxed)
    }

    /// Finds that out. `EINVAL` when it is another one, or was changed.
    pub(super) fn check(&self) -> Result<(), Errno> {
        if self.is_known() {
            return Ok(());
        }
        let driver = self.edge.node().driver();
        let described = driver.describe();
        let specific = described
            .get("format-specific")
            .map(|it| &it["data"]["cid"]);
        let cid = specific.and_then(serde_json::Value::as_u64);
        if driver.driver_name() != "vmdk" || cid != Some(self.expected.into()) {
            let parent = self.edge.node().name();
            let expected = self.expected;
            tracing::warn!(parent, expected, cid, "the parent is not what it was");
            return Err(Errno::EINVAL);
        }
        self.is_known.store(true, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_image_has_another_number_of_as_many_digits() {
        for (old, number, digits, expected) in [
            (1, 0x1234_5678, 8, 0x1234_5678),
            (0x1234_5678, 0x1234_5678, 8, 0x1234_5679),
            (0x12, 0xffff_ffff, 8, 0),
            (0, 0xffff_ffff, 8, 1),
            (0xab, 0x1234_56ab, 2, 0xac),
            (0xf, 0xf, 1, 0),
        ] {
            assert_eq!(another(old, number, digits), expected);
        }
    }
}
