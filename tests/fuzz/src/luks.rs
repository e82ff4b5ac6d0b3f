//! LUKS headers, on any bytes.
//!
//! ```text
//!   input = choice ++ header, key material
//!     │ describe ─► open with a password ─► erase the slot chosen ─► read the header again
//!     └─ a volume that opens gives back what it encrypts; one that a slot was erased from is still one
//! ```
//!
//! Behind the input the file reads as zeroes. Headers that ask for many rounds of key derivation, or for a cipher
//! that takes milliseconds for the key material of a slot, are described and not opened: the time is what
//! they ask for.

use crate::disk::{edge, leaf};
use crate::memory_file::MemoryFile;
use crate::qcow2::in_time;
use block::open::ChildRole;
use block::{Edge, Resize, SectorCipher, Tweak};
use formats::luks::{Algorithm, Amend, Header, Location, SLOTS, Select, Served, Volume};
use std::sync::Arc;
use zeroize::Zeroizing;

/// Rounds of key derivation, of all slots together.
const MAX_ROUNDS: u64 = 10_000;
/// Bytes of the file: there is room for the key material of every cipher.
const LENGTH: u64 = 4 << 20;
const SECTOR: usize = 512;
/// What is encrypted and decrypted again, in sectors.
const SECTORS: usize = 9;
/// In the highest bit of the choice: as `--force`.
const FORCE: u8 = 0x80;

/// Runs one input.
///
/// # Panics
/// When the code breaks a promise: that is a finding.
pub fn run(input: &[u8]) {
    let Some((&choice, bytes)) = input.split_first() else {
        return;
    };
    in_time(run_header(choice, bytes));
}

async fn run_header(choice: u8, bytes: &[u8]) {
    let node = leaf(MemoryFile::new(bytes), "luks");
    let grown = node.resize(Resize::to(LENGTH));
    if (bytes.len() as u64) < LENGTH {
        grown.await.expect("the file grows");
    }
    let file = edge(&node, "file", ChildRole::Image, false);
    let location = Location {
        file: &file,
        offset: 0,
    };
    let Ok(served) = Served::describe_only(location).await else {
        return;
    };
    served.describe();
    let header = Header::read(location).await;
    let header = header.expect("what can be described can be read");
    if rounds(&header) > MAX_ROUNDS || !is_quick(header.cipher.algorithm) {
        return;
    }
    let Some(mut volume) = open(&file).await else {
        return;
    };
    let erase = Select {
        slot: Some(i64::from(choice & !FORCE) % (SLOTS as i64 + 2)),
        password: None,
        force: choice & FORCE != 0,
    };
    // Refused for a slot that is not there, or the last one.
    let _ = volume.amend(location, Amend::Erase(erase)).await;
    let again = Header::read(location).await;
    assert!(again.is_ok(), "erasing a slot spoilt the header");
}

/// The processor has instructions for it.
fn is_quick(algorithm: Algorithm) -> bool {
    use Algorithm::{Aes128, Aes192, Aes256};
    matches!(algorithm, Aes128 | Aes192 | Aes256)
}

/// Rounds that trying every slot takes.
fn rounds(header: &Header) -> u64 {
    let active = header.slots.iter().filter(|slot| slot.active);
    active
        .map(|slot| u64::from(slot.iterations) + u64::from(header.digest_iterations))
        .sum()
}

async fn open(file: &Edge) -> Option<Volume> {
    let location = Location { file, offset: 0 };
    let password = Arc::new(Zeroizing::new(b"geheim".to_vec()));
    let volume = Volume::open(location, &password).await.ok()?;
    let cipher = volume.cipher(Tweak::HostOffset);
    let plain: Vec<u8> = (0..SECTORS * SECTOR).map(|at| at as u8).collect();
    let mut bytes = plain.clone();
    cipher.encrypt(volume.header.payload_offset(), &mut bytes);
    cipher.decrypt(volume.header.payload_offset(), &mut bytes);
    assert!(bytes == plain, "decrypts something else");
    Some(volume)
}
