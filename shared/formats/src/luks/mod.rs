//! LUKS version 1: what a qcow2 image of crypt method 2 keeps its key in, and a format of its own
//! (LUKS On-Disk Format Specification 1.2).
//!
//! ```text
//!   password ──PBKDF2──► slot key ──► key material (decrypt, merge stripes) ──► volume key
//!                                                  right when its digest is the header's
//! ```
//!
//! [`header`] parses and checks, [`volume`] makes, opens and changes volumes, [`cipher`] en- and
//! decrypts sectors, [`served`] is a volume in use, [`options`] are those of `create` and `amend`,
//! [`driver`] is the format `luks`. Key derivation runs on worker threads. Passwords, keys and key
//! material are wiped when dropped. Apart from the driver, nothing here knows where in a file the
//! header lies, and what the payload is.

mod amend;
mod cipher;
mod derive;
mod driver;
mod hash;
mod header;
pub(crate) mod options;
mod served;
mod split;
#[cfg(test)]
mod tests;
mod volume;

pub use amend::{Amend, Select};
pub use cipher::{Algorithm, IvKind, Mode, Sectors, Spec, decrypt_aes_256_cbc, legacy_aes};
pub use driver::{ENTRY, Luks};
pub use hash::Hash;
pub use header::{Header, SLOTS, Slot};
pub use served::Served;
pub use volume::{CreateOptions, Location, Password, Volume};
