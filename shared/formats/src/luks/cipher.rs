//! Sector ciphers: block ciphers in XTS, CBC or ECB mode, and what each sector starts from.
//!
//! ```text
//!   offset / 512 ──► initial vector (plain, plain64, essiv) ──► mode ──► 512 bytes
//! ```
//!
//! The block ciphers come from the RustCrypto crates, which use the processor's instructions and
//! take many blocks at once; the modes here give them whole sectors, so that AES runs at the
//! speed of its parallel implementation. Keys and round keys are wiped when dropped.

use aes::{Aes128, Aes192, Aes256};
use block::cipher::{SECTOR, Tweak};
use block::{Error, ErrorKind, SectorCipher};
use cipher::consts::U16;
use cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit, KeySizeUser};
use serpent::Serpent;
use twofish::Twofish;
use zeroize::Zeroizing;

use super::hash::Hash;

const BLOCK: usize = 16;
const BLOCKS: usize = SECTOR / BLOCK;

type Block = Array<u8, U16>;

/// A keyed block cipher, many blocks at a time.
trait Blocks: Send + Sync {
    fn encrypt(&self, blocks: &mut [Block]);
    fn decrypt(&self, blocks: &mut [Block]);
}

impl<C> Blocks for C
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + Send + Sync,
{
    fn encrypt(&self, blocks: &mut [Block]) {
        self.encrypt_blocks(blocks);
    }
    fn decrypt(&self, blocks: &mut [Block]) {
        self.decrypt_blocks(blocks);
    }
}

/// A block cipher with its key's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// AES with a key of 128 bits.
    Aes128,
    /// AES with a key of 192 bits.
    Aes192,
    /// AES with a key of 256 bits.
    Aes256,
    /// Serpent with a key of 128 bits.
    Serpent128,
    /// Serpent with a key of 192 bits.
    Serpent192,
    /// Serpent with a key of 256 bits.
    Serpent256,
    /// Twofish with a key of 128 bits.
    Twofish128,
    /// Twofish with a key of 192 bits.
    Twofish192,
    /// Twofish with a key of 256 bits.
    Twofish256,
}

/// QEMU's name, the name in LUKS headers, bytes of the key.
const ALGORITHMS: &[(Algorithm, &str, &str, usize)] = &[
    (Algorithm::Aes128, "aes-128", "aes", 16),
    (Algorithm::Aes192, "aes-192", "aes", 24),
    (Algorithm::Aes256, "aes-256", "aes", 32),
    (Algorithm::Serpent128, "serpent-128", "serpent", 16),
    (Algorithm::Serpent192, "serpent-192", "serpent", 24),
    (Algorithm::Serpent256, "serpent-256", "serpent", 32),
    (Algorithm::Twofish128, "twofish-128", "twofish", 16),
    (Algorithm::Twofish192, "twofish-192", "twofish", 24),
    (Algorithm::Twofish256, "twofish-256", "twofish", 32),
];

impl Algorithm {
    /// By the name that options use.
    pub fn from_option(name: &str) -> Option<Self> {
        let found = ALGORITHMS.iter().find(|(_, option, ..)| *option == name);
        found.map(|(algorithm, ..)| *algorithm)
    }

    /// By the name in a header and the bytes of one key.
    pub(super) fn from_header(name: &str, key_bytes: usize) -> Option<Self> {
        let fits =
            |(_, _, header, bytes): &&(_, _, &str, usize)| *header == name && *bytes == key_bytes;
        ALGORITHMS
            .iter()
            .find(fits)
            .map(|(algorithm, ..)| *algorithm)
    }

    fn line(self) -> &'static (Self, &'static str, &'static str, usize) {
        let mut lines = ALGORITHMS.iter();
        let line = lines.find(|(algorithm, ..)| *algorithm == self);
        line.expect("every algorithm is in the table")
    }

    /// The name that options and descriptions use.
    pub fn option(self) -> &'static str {
        self.line().1
    }

    pub(super) fn header_name(self) -> &'static str {
        self.line().2
    }

    /// Bytes of one key.
    pub(super) fn key_bytes(self) -> usize {
        self.line().3
    }

    /// The name in messages.
    fn spoken_name(self) -> &'static str {
        match self.header_name() {
            "aes" => "AES",
            "serpent" => "Serpent",
            _ => "Twofish",
        }
    }

    fn keyed(self, key: &[u8]) -> Option<Box<dyn Blocks>> {
        match self {
            Self::Aes128 => make::<Aes128>(key),
            Self::Aes192 => make::<Aes192>(key),
            Self::Aes256 => make::<Aes256>(key),
            Self::Serpent128 | Self::Serpent192 | Self::Serpent256 => make::<Serpent>(key),
            Self::Twofish128 | Self::Twofish192 | Self::Twofish256 => make::<Twofish>(key),
        }
    }
}

fn make<C>(key: &[u8]) -> Option<Box<dyn Blocks>>
where
    C: Blocks + KeyInit + KeySizeUser + 'static,
{
    Some(Box::new(C::new_from_slice(key).ok()?))
}

/// How blocks of a sector depend on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Not at all.
    Ecb,
    /// Each on the cipher text before it.
    Cbc,
    /// Each on its place; takes two keys.
    Xts,
    /// Not at all: what is encrypted is a counter.
    Ctr,
}

impl Mode {
    /// By name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "ecb" => Some(Self::Ecb),
            "cbc" => Some(Self::Cbc),
            "xts" => Some(Self::Xts),
            "ctr" => Some(Self::Ctr),
            _ => None,
        }
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ecb => "ecb",
            Self::Cbc => "cbc",
            Self::Xts => "xts",
            Self::Ctr => "ctr",
        }
    }

    /// Keys of the block cipher that the mode's key consists of.
    pub(super) const fn keys(self) -> usize {
        match self {
            Self::Ecb | Self::Cbc | Self::Ctr => 1,
            Self::Xts => 2,
        }
    }
}

/// What a sector's initial vector is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IvKind {
    /// The low 32 bits of the sector's number.
    Plain,
    /// The sector's number.
    Plain64,
    /// The sector's number, encrypted with the key's hash.
    Essiv(Hash),
}

impl IvKind {
    /// The name that options and descriptions use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Plain64 => "plain64",
            Self::Essiv(_) => "essiv",
        }
    }
}

/// A cipher, without its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// The block cipher.
    pub algorithm: Algorithm,
    /// Its mode.
    pub mode: Mode,
    /// How sectors start.
    pub iv: IvKind,
}

impl Spec {
    /// Bytes of the whole key.
    pub fn key_bytes(&self) -> usize {
        self.algorithm.key_bytes() * self.mode.keys()
    }

    /// Whether there is such a cipher.
    ///
    /// # Errors
    /// `Invalid` with the peer's words: ESSIV needs a cipher that takes the hash's digest as its key.
    pub fn check(&self) -> Result<(), Error> {
        let IvKind::Essiv(hash) = self.iv else {
            return Ok(());
        };
        match Algorithm::from_header(self.algorithm.header_name(), hash.bytes()) {
            Some(_) => Ok(()),
            None => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "No {} cipher with key size {} available",
                    self.algorithm.spoken_name(),
                    hash.bytes()
                ),
            )),
        }
    }

    /// With a key; `None` when the key has another length, or there is no such cipher.
    pub fn keyed(&self, key: &[u8], tweak: Tweak) -> Option<Sectors> {
        if key.len() != self.key_bytes() {
            return None;
        }
        let (data_key, second_key) = key.split_at(self.algorithm.key_bytes());
        let iv = match self.iv {
            IvKind::Plain => Iv::Plain,
            IvKind::Plain64 => Iv::Plain64,
            IvKind::Essiv(hash) => {
                let digest = Zeroizing::new(hash.digest(&[key]));
                let name = self.algorithm.header_name();
                let algorithm = Algorithm::from_header(name, digest.len())?;
                Iv::Essiv(algorithm.keyed(&digest)?)
            }
        };
        Some(Sectors {
            data: self.algorithm.keyed(data_key)?,
            mode: match self.mode {
                Mode::Ecb => KeyedMode::Ecb,
                Mode::Cbc => KeyedMode::Cbc,
                Mode::Ctr => KeyedMode::Ctr,
                Mode::Xts => KeyedMode::Xts(self.algorithm.keyed(second_key)?),
            },
            iv,
            tweak,
        })
    }
}

enum KeyedMode {
    Ecb,
    Cbc,
    Ctr,
    /// With the cipher of the tweaks.
    Xts(Box<dyn Blocks>),
}

enum Iv {
    Plain,
    Plain64,
    Essiv(Box<dyn Blocks>),
}

/// A keyed sector cipher.
pub struct Sectors {
    data: Box<dyn Blocks>,
    mode: KeyedMode,
    iv: Iv,
    tweak: Tweak,
}

/// Sectors that go through the cipher together: as much as stays in the nearest cache, and several times what
/// the processor's vector instructions work on at once (1 KiB), below which blocks take turns.
const GROUP: usize = 16;

#[derive(Clone, Copy)]
enum Direction {
    Encrypt,
    Decrypt,
}

impl Sectors {
    fn run(&self, offset: u64, sectors: &mut [u8], direction: Direction) {
        assert!(
            offset.is_multiple_of(SECTOR as u64) && sectors.len().is_multiple_of(SECTOR),
            "only whole sectors are en- and decrypted"
        );
        let first = offset / SECTOR as u64;
        let groups = sectors.chunks_mut(GROUP * SECTOR);
        for (number, group) in (first..).step_by(GROUP).zip(groups) {
            let (blocks, _) = Array::slice_as_chunks_mut(group);
            let count = blocks.len() / BLOCKS;
            let mut ivs = self.initial_vectors(number, count);
            match (&self.mode, direction) {
                (KeyedMode::Ecb, Direction::Encrypt) => self.data.encrypt(blocks),
                (KeyedMode::Ecb, Direction::Decrypt) => self.data.decrypt(blocks),
                (KeyedMode::Cbc, Direction::Encrypt) => self.encrypt_cbc(&mut ivs[..count], blocks),
                (KeyedMode::Cbc, Direction::Decrypt) => self.decrypt_cbc(&ivs[..count], blocks),
                (KeyedMode::Ctr, _) => self.run_ctr(&ivs[..count], blocks),
                (KeyedMode::Xts(tweaks), _) => {
                    tweaks.encrypt(&mut ivs[..count]);
                    self.run_xts(&ivs[..count], blocks, direction);
                }
            }
        }
    }

    /// Those of `count` sectors, and nothing behind them.
    fn initial_vectors(&self, first: u64, count: usize) -> [Block; GROUP] {
        let mut ivs = [Block::default(); GROUP];
        for (number, iv) in (first..).zip(&mut ivs[..count]) {
            match self.iv {
                Iv::Plain => iv[..4].copy_from_slice(&(number as u32).to_le_bytes()),
                Iv::Plain64 | Iv::Essiv(_) => iv[..8].copy_from_slice(&number.to_le_bytes()),
            }
        }
        if let Iv::Essiv(cipher) = &self.iv {
            cipher.encrypt(&mut ivs[..count]);
        }
        ivs
    }

    /// IEEE 1619 without stealing: sectors are whole blocks.
    fn run_xts(&self, tweaks: &[Block], blocks: &mut [Block], direction: Direction) {
        let mut masks = [0_u128; GROUP * BLOCKS];
        for (tweak, masks) in tweaks.iter().zip(masks.chunks_mut(BLOCKS)) {
            let mut mask = u128::from_le_bytes(tweak.0);
            for slot in masks {
                *slot = mask;
                let carry = (mask >> 127) * 0x87;
                mask = mask << 1 ^ carry;
            }
        }
        mix(blocks, &masks);
        match direction {
            Direction::Encrypt => self.data.encrypt(blocks),
            Direction::Decrypt => self.data.decrypt(blocks),
        }
        mix(blocks, &masks);
    }

    /// NIST SP 800-38A, the counter a number in network order.
    fn run_ctr(&self, ivs: &[Block], blocks: &mut [Block]) {
        let mut masks = [Block::default(); GROUP * BLOCKS];
        let masks = &mut masks[..blocks.len()];
        for (iv, masks) in ivs.iter().zip(masks.chunks_mut(BLOCKS)) {
            let mut counter = u128::from_be_bytes(iv.0);
            for mask in masks {
                mask.0 = counter.to_be_bytes();
                counter = counter.wrapping_add(1);
            }
        }
        self.data.encrypt(masks);
        for (block, mask) in blocks.iter_mut().zip(masks) {
            block.iter_mut().zip(mask).for_each(|(a, b)| *a ^= *b);
        }
    }

    /// The blocks at one place of every sector together, because a sector's own depend on each
    /// other.
    fn encrypt_cbc(&self, ivs: &mut [Block], blocks: &mut [Block]) {
        let count = ivs.len();
        for place in 0..BLOCKS {
            for (sector, chained) in ivs.iter_mut().enumerate() {
                let plain = &blocks[sector * BLOCKS + place];
                chained.iter_mut().zip(plain).for_each(|(a, b)| *a ^= b);
            }
            self.data.encrypt(&mut ivs[..count]);
            for (sector, chained) in ivs.iter().enumerate() {
                blocks[sector * BLOCKS + place] = *chained;
            }
        }
    }

    fn decrypt_cbc(&self, ivs: &[Block], blocks: &mut [Block]) {
        let mut before = [Block::default(); GROUP * BLOCKS];
        let sectors = blocks.chunks(BLOCKS).zip(before.chunks_mut(BLOCKS));
        for (iv, (sector, before)) in ivs.iter().zip(sectors) {
            before[0] = *iv;
            before[1..].copy_from_slice(&sector[..BLOCKS - 1]);
        }
        self.data.decrypt(blocks);
        for (plain, chained) in blocks.iter_mut().zip(&before) {
            plain.iter_mut().zip(chained).for_each(|(a, b)| *a ^= b);
        }
    }
}

fn mix(blocks: &mut [Block], masks: &[u128]) {
    for (block, mask) in blocks.iter_mut().zip(masks) {
        let mixed = u128::from_le_bytes(block.0) ^ mask;
        block.0 = mixed.to_le_bytes();
    }
}

impl SectorCipher for Sectors {
    fn tweak(&self) -> Tweak {
        self.tweak
    }
    fn encrypt(&self, offset: u64, sectors: &mut [u8]) {
        self.run(offset, sectors, Direction::Encrypt);
    }
    fn decrypt(&self, offset: u64, sectors: &mut [u8]) {
        self.run(offset, sectors, Direction::Decrypt);
    }
}

/// The cipher of qcow2's crypt method 1: AES-128 in CBC mode, tied to guest offsets; the key is
/// the password's first 16 bytes, filled up with zeroes.
pub fn legacy_aes(password: &[u8]) -> Sectors {
    let mut key = Zeroizing::new([0; 16]);
    let used = password.len().min(key.len());
    key[..used].copy_from_slice(&password[..used]);
    let spec = Spec {
        algorithm: Algorithm::Aes128,
        mode: Mode::Cbc,
        iv: IvKind::Plain64,
    };
    let keyed = spec.keyed(&key[..], Tweak::GuestOffset);
    keyed.expect("the key is as long as AES-128 needs")
}

/// Decrypts whole blocks in place: AES-256 in CBC mode, as secrets are encrypted with secrets.
///
/// # Panics
/// When there is a partial block.
pub fn decrypt_aes_256_cbc(key: &[u8; 32], iv: &[u8; 16], bytes: &mut [u8]) {
    let (blocks, rest) = Array::slice_as_chunks_mut(bytes);
    assert!(rest.is_empty(), "only whole blocks are decrypted");
    let cipher = Aes256::new(key.into());
    let mut chained: Block = (*iv).into();
    for block in blocks {
        let encrypted = *block;
        cipher.decrypt_block(block);
        block.iter_mut().zip(&chained).for_each(|(a, b)| *a ^= b);
        chained = encrypted;
    }
}
