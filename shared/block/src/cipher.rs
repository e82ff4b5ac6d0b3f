//! The seam of encryption: what turns sectors of plain text into sectors of an image and back.
//!
//! A format that encrypts its data hands one of these to [`crate::FormatNode`], which calls it on
//! private memory only: a guest may change or read its own buffers at any time.

/// Bytes of a sector, the unit of encryption.
pub const SECTOR: usize = 512;

/// Which offset the sectors are tied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tweak {
    /// Where the sector is on the virtual disk.
    GuestOffset,
    /// Where the sector is in the data child.
    HostOffset,
}

/// A cipher over whole sectors, keyed. Any thread may call at any time.
pub trait SectorCipher: Send + Sync {
    /// Which offset `encrypt` and `decrypt` are given.
    fn tweak(&self) -> Tweak;
    /// Encrypts whole sectors in place; `offset` is that of the first byte, a multiple of 512.
    fn encrypt(&self, offset: u64, sectors: &mut [u8]);
    /// Decrypts whole sectors in place.
    fn decrypt(&self, offset: u64, sectors: &mut [u8]);
}
