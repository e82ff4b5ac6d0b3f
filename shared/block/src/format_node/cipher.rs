//! Data of encrypted images: every transfer goes through private memory.
//!
//! ```text
//!   read    data child ──► private memory ──decrypt──► guest's buffer
//!   write   guest's buffer ──► private memory ──encrypt──► data child
//! ```
//!
//! A guest may change its buffer at any time. Encrypted in place, its buffer would show cipher
//! text and what is written could be neither the old nor the new content; read in place, the guest
//! could change cipher text under the cipher. Without a cipher the child's own future is handed
//! on, at the cost of one branch.

use super::FormatNode;
use crate::cipher::{SECTOR, SectorCipher, Tweak};
use crate::debug::Event;
use crate::driver::{IoFuture, WriteFlags};
use crate::format::Format;
use executor::{Buffer, Errno};

/// Private memory of one transfer, in bytes; longer ones are done part by part. The cipher takes
/// some tens of microseconds for this much.
const BOUNCE_BYTES: usize = 128 << 10;

/// A place of the virtual disk and where it is stored.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) guest_offset: u64,
    pub(super) host_offset: u64,
}

impl Place {
    pub(super) fn before(self, bytes: u64) -> Option<Self> {
        Some(Self {
            guest_offset: self.guest_offset.checked_sub(bytes)?,
            host_offset: self.host_offset.checked_sub(bytes)?,
        })
    }

    pub(super) fn after(self, bytes: usize) -> Self {
        Self {
            guest_offset: self.guest_offset + bytes as u64,
            host_offset: self.host_offset + bytes as u64,
        }
    }

    fn tweak(self, cipher: &dyn SectorCipher) -> u64 {
        match cipher.tweak() {
            Tweak::GuestOffset => self.guest_offset,
            Tweak::HostOffset => self.host_offset,
        }
    }
}

impl<F: Format> FormatNode<F> {
    /// Reads plain data.
    #[inline]
    pub(super) fn read_data(&self, place: Place, buffer: Buffer) -> IoFuture<'_> {
        let file = self.format.file().node();
        file.after(Event::ReadAio, move || self.read_stored(place, buffer))
    }

    /// Writes plain data to storage of its own.
    #[inline]
    pub(super) fn write_data(&self, place: Place, buffer: Buffer) -> IoFuture<'_> {
        let file = self.format.file().node();
        file.after(Event::WriteAio, move || self.write_stored(place, buffer))
    }

    /// Writes old content around a write.
    pub(super) fn write_margin(&self, place: Place, buffer: Buffer) -> IoFuture<'_> {
        let file = self.format.file().node();
        file.after(Event::CowWrite, move || self.write_stored(place, buffer))
    }

    #[inline]
    fn read_stored(&self, place: Place, buffer: Buffer) -> IoFuture<'_> {
        match self.format.cipher() {
            None => self.data().read(place.host_offset, buffer),
            Some(cipher) => IoFuture::boxed(self.read_encrypted(cipher, place, buffer)),
        }
    }

    #[inline]
    fn write_stored(&self, place: Place, buffer: Buffer) -> IoFuture<'_> {
        match self.format.cipher() {
            None => self
                .data()
                .write(place.host_offset, buffer, WriteFlags::default()),
            Some(cipher) => IoFuture::boxed(self.write_encrypted(cipher, place, buffer)),
        }
    }

    async fn read_encrypted(
        &self,
        cipher: &dyn SectorCipher,
        place: Place,
        buffer: Buffer,
    ) -> Result<(), Errno> {
        check_sectors(place, &buffer)?;
        let mut done = 0;
        while done < buffer.len() {
            let length = (buffer.len() - done).min(BOUNCE_BYTES);
            let place = place.after(done);
            let bounce = Buffer::zeroed(length);
            let read = self.data().read(place.host_offset, bounce.clone());
            read.await?;
            let mut sectors = bounce.into_heap();
            cipher.decrypt(place.tweak(cipher), &mut sectors);
            buffer.slice(done..done + length).copy_from_slice(&sectors);
            done += length;
        }
        Ok(())
    }

    async fn write_encrypted(
        &self,
        cipher: &dyn SectorCipher,
        place: Place,
        buffer: Buffer,
    ) -> Result<(), Errno> {
        check_sectors(place, &buffer)?;
        let mut done = 0;
        while done < buffer.len() {
            let length = (buffer.len() - done).min(BOUNCE_BYTES);
            let place = place.after(done);
            let mut sectors = buffer.slice(done..done + length).to_heap();
            cipher.encrypt(place.tweak(cipher), &mut sectors);
            let write = self.data().write(
                place.host_offset,
                sectors.into_buffer(),
                WriteFlags::default(),
            );
            write.await?;
            done += length;
        }
        Ok(())
    }
}

/// The node's limits see to whole sectors; a format that maps them otherwise is wrong.
fn check_sectors(place: Place, buffer: &Buffer) -> Result<(), Errno> {
    let all = place.guest_offset | place.host_offset | buffer.len() as u64;
    match all.is_multiple_of(SECTOR as u64) {
        true => Ok(()),
        false => Err(Errno::EINVAL),
    }
}
