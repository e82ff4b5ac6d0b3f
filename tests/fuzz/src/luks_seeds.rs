//! The corpus of the LUKS target to start from: headers of several ciphers and hashes, and volumes that open.

use crate::disk::{edge, leaf};
use crate::memory_file::MemoryFile;
use crate::seeds::Seed;
use block::open::ChildRole;
use executor::{Config, Executor};
use formats::luks::{Algorithm, CreateOptions, Hash, IvKind, Location, Mode, Spec, Volume};
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

/// Bytes of a header.
const HEADER: usize = 592;
/// Where the rounds are: those of the digest, then those of the slots.
const DIGEST_ROUNDS: usize = 164;
const FIRST_SLOT: usize = 208;
const SLOT_LENGTH: usize = 48;

/// Seeds of the LUKS target.
///
/// # Panics
/// When a volume cannot be made.
pub fn luks() -> Vec<Seed> {
    let executor = Executor::new(&Config::default()).expect("io_uring works on this machine");
    let shapes = [
        ("aes-256", "xts", IvKind::Plain64, Hash::Sha256),
        ("aes-128", "cbc", IvKind::Essiv(Hash::Sha256), Hash::Sha1),
        ("serpent-256", "cbc", IvKind::Plain, Hash::Sha512),
        ("twofish-256", "ctr", IvKind::Plain64, Hash::Ripemd160),
        ("aes-128", "ecb", IvKind::Plain, Hash::Md5),
    ];
    let seeds = shapes.into_iter().flat_map(|(algorithm, mode, iv, hash)| {
        let cipher = Spec {
            algorithm: Algorithm::from_option(algorithm).expect("an algorithm of LUKS"),
            mode: Mode::from_name(mode).expect("a mode of LUKS"),
            iv,
        };
        let volume = executor.block_on(volume(cipher, hash));
        let header = with_little_to_do(&volume[..HEADER]);
        let inputs = [(0, &header[..]), (1, &header), (0x80, &volume)];
        inputs.map(|(choice, bytes)| Seed {
            name: format!("{algorithm}-{mode}-{}-{choice:02x}", hash.name()),
            input: [&[choice][..], bytes].concat(),
        })
    });
    seeds.collect()
}

/// A new volume with one key, without the room for others.
async fn volume(cipher: Spec, hash: Hash) -> Vec<u8> {
    let file = MemoryFile::default();
    let edge = edge(&leaf(file.clone(), "luks"), "file", ChildRole::Image, false);
    let location = Location {
        file: &edge,
        offset: 0,
    };
    let options = CreateOptions {
        cipher,
        hash,
        iter_time: Duration::from_millis(1),
    };
    let password = Arc::new(Zeroizing::new(b"geheim".to_vec()));
    let created = Volume::create(location, &options, &password).await;
    let header = created.expect("a volume is made").header;
    let mut bytes = file.to_vec();
    bytes.truncate(header.slots[1].offset() as usize);
    bytes
}

/// A header with a second slot that says it is active, and a single round for each.
fn with_little_to_do(header: &[u8]) -> Vec<u8> {
    let mut header = header.to_vec();
    let second = FIRST_SLOT + SLOT_LENGTH;
    header.copy_within(FIRST_SLOT..FIRST_SLOT + 4, second);
    for at in [DIGEST_ROUNDS, FIRST_SLOT + 4, second + 4] {
        header[at..at + 4].copy_from_slice(&1_u32.to_be_bytes());
    }
    header
}
