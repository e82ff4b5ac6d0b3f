//! The header extension of bitmaps: found anew for every change, and changed so that a power cut
//! leaves either state.
//!
//! ```text
//!   header │ extension │ extension │ END (8 zero bytes) │ backing file's name │
//! ```
//!
//! An extension is appended where END is: its body and the END after it first, then its eight bytes
//! of type and length, which no disk tears. A backing file's name in the way is copied further on
//! and its offset switched before. In a header of 512 bytes all is rewritten by one write, without the
//! names of features when there is no room for them. The last extension is removed by turning its first eight bytes
//! into END. A body is changed by one write within a sector; where it crosses sectors, the autoclear
//! bit is off meanwhile, and a power cut makes the bitmaps void.

use super::Extension;
use crate::qcow2::header::{AUTOCLEAR_BITMAPS, V2_LENGTH, extension, field};
use crate::qcow2::{Qcow2, SECTOR, read_bytes};
use executor::Errno;

/// Length of the extension's body: count u32, reserved u32, directory length u64, directory
/// offset u64.
pub(super) const BODY: usize = 24;

/// What the first cluster of the file says.
struct Area {
    bytes: Vec<u8>,
    /// Where the extensions begin.
    start: usize,
    /// Where the type of the bitmaps extension is.
    bitmaps: Option<usize>,
    /// Where END is.
    end: usize,
}

impl Area {
    fn u32(&self, at: usize) -> u32 {
        let bytes = self
            .bytes
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_be_bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }

    /// Where the backing file's name is.
    fn name(&self) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(self.u64(field::BACKING_OFFSET)).ok()?;
        let end = start.checked_add(self.u32(field::BACKING_LENGTH) as usize)?;
        (start != 0 && end <= self.bytes.len()).then_some(start..end)
    }
}

impl Extension {
    fn body(&self) -> [u8; BODY] {
        let mut body = [0; BODY];
        body[..4].copy_from_slice(&self.count.to_be_bytes());
        body[8..16].copy_from_slice(&self.length.to_be_bytes());
        body[16..].copy_from_slice(&self.offset.0.to_be_bytes());
        body
    }
}

impl Qcow2 {
    async fn extension_area(&self) -> Result<Area, Errno> {
        let length = self.geometry.cluster_size() as usize;
        let bytes = read_bytes(&self.file, 0, length).await?;
        let mut area = Area {
            bytes,
            start: 0,
            bitmaps: None,
            end: 0,
        };
        let header_length = match area.u32(field::VERSION) {
            2 => V2_LENGTH as usize,
            _ => area.u32(field::HEADER_LENGTH) as usize,
        };
        let limit = area.name().map_or(length, |name| name.start);
        area.start = header_length.next_multiple_of(8);
        let mut at = area.start;
        while at + 8 <= limit && area.u32(at) != extension::END {
            if area.u32(at) == extension::BITMAPS {
                area.bitmaps = Some(at);
            }
            let next = (area.u32(at + 4) as usize).checked_next_multiple_of(8);
            at = next
                .and_then(|next| at.checked_add(8 + next))
                .ok_or(Errno::EIO)?;
        }
        area.end = at;
        Ok(area)
    }

    async fn write_durable(&self, at: usize, bytes: &[u8]) -> Result<(), Errno> {
        self.write_bytes(at as u64, bytes).await?;
        self.file.node().flush().await
    }

    async fn set_autoclear(&self, area: &Area, set: u64, cleared: u64) -> Result<(), Errno> {
        let value = area.u64(field::AUTOCLEAR) & !cleared | set;
        self.write_durable(field::AUTOCLEAR, &value.to_be_bytes())
            .await
    }

    /// Makes the header refer to a directory, or to none.
    pub(super) async fn switch_extension(&self, new: Option<Extension>) -> Result<(), Errno> {
        // The header is written as it is read here: no flush sets the dirty bit in between.
        let _no_flush = self.flushing.lock().await;
        let area = self.extension_area().await?;
        match (area.bitmaps, new) {
            (None, None) => Ok(()),
            (Some(at), None) => self.remove_extension(&area, at).await,
            (Some(at), Some(new)) => self.change_extension(&area, at, &new).await,
            (None, Some(new)) => self.append_extension(area, &new).await,
        }
    }

    async fn remove_extension(&self, area: &Area, at: usize) -> Result<(), Errno> {
        self.set_autoclear(area, 0, AUTOCLEAR_BITMAPS).await?;
        if at + 8 + BODY == area.end {
            self.write_durable(at, &[0; 8]).await?;
        }
        Ok(())
    }

    async fn change_extension(&self, area: &Area, at: usize, new: &Extension) -> Result<(), Errno> {
        let body = at + 8;
        let sector = SECTOR as usize;
        let is_whole = body / sector == (body + BODY - 1) / sector;
        if !is_whole {
            self.set_autoclear(area, 0, AUTOCLEAR_BITMAPS).await?;
        }
        self.write_durable(body, &new.body()).await?;
        if !is_whole || area.u64(field::AUTOCLEAR) & AUTOCLEAR_BITMAPS == 0 {
            self.set_autoclear(area, AUTOCLEAR_BITMAPS, 0).await?;
        }
        Ok(())
    }

    async fn append_extension(&self, area: Area, new: &Extension) -> Result<(), Errno> {
        let at = area.end;
        let after = at + 8 + BODY + 8;
        // Where the backing file's name has to go.
        let name = area.name().filter(|name| name.start < after);
        let place = name
            .as_ref()
            .map(|name| after.max(name.end).next_multiple_of(8));
        let length = name.as_ref().map_or(0, ExactSizeIterator::len);
        let fits = place.unwrap_or(after) + length <= area.bytes.len();
        // Without an END before it, the old name would read as an extension for a moment.
        let has_end = name.as_ref().is_none_or(|name| at + 8 <= name.start);
        if !fits || !has_end {
            return self.rebuild_area(&area, new).await;
        }
        if let (Some(name), Some(place)) = (name, place) {
            self.write_durable(place, &area.bytes[name]).await?;
            let offset = (place as u64).to_be_bytes();
            self.write_durable(field::BACKING_OFFSET, &offset).await?;
        }
        let mut body = new.body().to_vec();
        body.extend_from_slice(&[0; 8]);
        self.write_durable(at + 8, &body).await?;
        self.write_durable(at, &start_of_extension()).await?;
        self.set_autoclear(&area, AUTOCLEAR_BITMAPS, 0).await
    }

    /// Makes room by leaving the names of features out, where one write can change the whole.
    async fn rebuild_area(&self, area: &Area, new: &Extension) -> Result<(), Errno> {
        if area.bytes.len() != SECTOR as usize {
            return Err(Errno::ENOSPC);
        }
        let mut at = area.start;
        let mut bytes = area.bytes[..at].to_vec();
        while at < area.end {
            let next = at + 8 + (area.u32(at + 4) as usize).next_multiple_of(8);
            if area.u32(at) != extension::FEATURE_NAMES {
                bytes.extend_from_slice(area.bytes.get(at..next).ok_or(Errno::EIO)?);
            }
            at = next;
        }
        bytes.extend_from_slice(&start_of_extension());
        bytes.extend_from_slice(&new.body());
        bytes.extend_from_slice(&[0; 8]);
        if let Some(name) = area.name() {
            let offset = (bytes.len() as u64).to_be_bytes();
            bytes[field::BACKING_OFFSET..field::BACKING_OFFSET + 8].copy_from_slice(&offset);
            bytes.extend_from_slice(&area.bytes[name]);
        }
        if bytes.len() > area.bytes.len() {
            return Err(Errno::ENOSPC);
        }
        bytes.resize(area.bytes.len(), 0);
        let autoclear = area.u64(field::AUTOCLEAR) | AUTOCLEAR_BITMAPS;
        bytes[field::AUTOCLEAR..field::AUTOCLEAR + 8].copy_from_slice(&autoclear.to_be_bytes());
        self.write_durable(0, &bytes).await
    }
}

/// Type and length.
fn start_of_extension() -> [u8; 8] {
    let mut start = [0; 8];
    start[..4].copy_from_slice(&extension::BITMAPS.to_be_bytes());
    start[4..].copy_from_slice(&(BODY as u32).to_be_bytes());
    start
}
