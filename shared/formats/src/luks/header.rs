//! The LUKS1 header on disk (LUKS On-Disk Format Specification 1.2), all numbers big-endian.
//!
//! ```text
//!   0    magic "LUKS" ba be        104  payload offset, sectors    168  uuid, 40 bytes
//!   6    version                   108  key bytes                  208  8 key slots of 48 bytes:
//!   8    cipher name, 32 bytes     112  key digest, 20 bytes              0  active / inactive
//!   40   cipher mode, 32 bytes     132  its salt, 32 bytes                4  iterations
//!   72   hash name, 32 bytes       164  its iterations                    8  salt, 32 bytes
//!                                                                        40  key material, sectors
//!                                                                        44  stripes
//! ```
//!
//! Promises that a parsed header describes key material that lies behind the header, before the
//! payload, and apart from the others'; keys no longer than any cipher's; and work that ends.

use super::cipher::{Algorithm, IvKind, Mode, Spec};
use super::hash::Hash;
use block::{Error, ErrorKind};

/// Bytes of the header.
pub(super) const LENGTH: usize = 592;
/// Key slots.
pub const SLOTS: usize = 8;
/// Stripes of key material, the only number in use.
pub(super) const STRIPES: u32 = 4000;
/// Bytes of the digest that tells a right key.
pub(super) const DIGEST: usize = 20;
/// Bytes of a salt.
pub(super) const SALT: usize = 32;
/// Sectors that the header takes before the first key material.
const HEADER_SECTORS: u32 = 8;
/// More rounds of key derivation than this are refused. The fastest processors need minutes for it, while programs choose
/// as many as take seconds.
pub(super) const MAX_ITERATIONS: u32 = 1 << 30;

const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;

/// One key slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// It holds the key.
    pub active: bool,
    /// Rounds of key derivation.
    pub iterations: u32,
    pub(super) salt: [u8; SALT],
    /// Where the key material is, in sectors.
    pub(super) material: u32,
    /// Pieces the key is spread over.
    pub stripes: u32,
}

impl Slot {
    /// Where the key material is, in bytes from the header.
    pub fn offset(&self) -> u64 {
        u64::from(self.material) * 512
    }
}

/// A parsed and checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The cipher of the payload and of the key material.
    pub cipher: Spec,
    /// What keys are derived with.
    pub hash: Hash,
    payload: u32,
    pub(super) digest: [u8; DIGEST],
    pub(super) digest_salt: [u8; SALT],
    /// Rounds for the digest that tells a right key.
    pub digest_iterations: u32,
    /// The volume's identity.
    pub uuid: String,
    /// The key slots.
    pub slots: [Slot; SLOTS],
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N]
        .try_into()
        .expect("the header is long enough")
}

fn text<'b>(bytes: &'b [u8], (at, length): (usize, usize), what: &str) -> Result<&'b str, Error> {
    let field = &bytes[at..at + length];
    let end = field.iter().position(|byte| *byte == 0);
    let end = end.ok_or_else(|| invalid(format!("LUKS header {what} is not NUL terminated")))?;
    std::str::from_utf8(&field[..end])
        .map_err(|_| invalid(format!("LUKS header {what} is no text")))
}

/// Sectors between the starts of two slots' key material.
fn slot_sectors(key_bytes: usize) -> u32 {
    let sectors = (key_bytes as u32 * STRIPES).div_ceil(512);
    sectors.next_multiple_of(HEADER_SECTORS)
}

impl Header {
    /// A header for a new volume, its salts and digest still empty.
    pub(super) fn new(cipher: Spec, hash: Hash, uuid: String) -> Self {
        let step = slot_sectors(cipher.key_bytes());
        let mut slots = [Slot {
            active: false,
            iterations: 0,
            salt: [0; SALT],
            material: HEADER_SECTORS,
            stripes: STRIPES,
        }; SLOTS];
        for (number, slot) in (0..).zip(&mut slots) {
            slot.material += number * step;
        }
        Self {
            cipher,
            hash,
            payload: HEADER_SECTORS + SLOTS as u32 * step,
            digest: [0; DIGEST],
            digest_salt: [0; SALT],
            digest_iterations: 0,
            uuid,
            slots,
        }
    }

    /// Bytes before the payload.
    pub fn payload_offset(&self) -> u64 {
        u64::from(self.payload) * 512
    }

    /// Bytes of a slot's key material, in whole sectors.
    pub(super) fn material_bytes(&self) -> usize {
        (self.cipher.key_bytes() * STRIPES as usize).next_multiple_of(512)
    }

    /// Parses the first [`LENGTH`] bytes.
    ///
    /// # Errors
    /// `Corrupt`, or `Unsupported` naming the cipher.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() < LENGTH || !bytes.starts_with(MAGIC) {
            return Err(invalid("Volume is not in LUKS format"));
        }
        let version = u16::from_be_bytes([bytes[6], bytes[7]]);
        if version != 1 {
            let message = format!("LUKS version {version} is not supported");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let name = text(bytes, (8, 32), "cipher name")?;
        let mode = text(bytes, (40, 32), "cipher mode")?;
        let hash_name = text(bytes, (72, 32), "hash spec")?;
        let hash = hash_called(hash_name)?;
        let header = Self {
            cipher: parse_cipher(name, mode, word(bytes, 108))?,
            hash,
            payload: word(bytes, 104),
            digest: array(bytes, 112),
            digest_salt: array(bytes, 132),
            digest_iterations: word(bytes, 164),
            uuid: text(bytes, (168, 40), "uuid")
                .unwrap_or_default()
                .to_owned(),
            slots: parse_slots(bytes)?,
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), Error> {
        if self.payload < (LENGTH as u32).div_ceil(512) {
            return Err(invalid("LUKS payload is overlapping with the header"));
        }
        check_iterations(self.digest_iterations, || "LUKS key".to_owned())?;
        let sectors = (self.material_bytes() as u64).div_ceil(512);
        let span = |slot: &Slot| {
            let start = u64::from(slot.material);
            start..start + sectors
        };
        for (number, slot) in self.slots.iter().enumerate() {
            if slot.stripes != STRIPES {
                return Err(invalid(format!(
                    "Keyslot {number} is corrupted (stripes {} != {STRIPES})",
                    slot.stripes
                )));
            }
            if slot.material < (LENGTH as u32).div_ceil(512) {
                let message = format!("Keyslot {number} is overlapping with the LUKS header");
                return Err(invalid(message));
            }
            if slot.active {
                check_iterations(slot.iterations, || format!("Keyslot {number}"))?;
            }
            if span(slot).end > u64::from(self.payload) {
                let message = format!("Keyslot {number} is overlapping with the encrypted payload");
                return Err(invalid(message));
            }
            for (other, second) in self.slots.iter().enumerate().skip(number + 1) {
                let (a, b) = (span(slot), span(second));
                if a.start < b.end && b.start < a.end {
                    return Err(invalid(format!(
                        "Keyslots {number} and {other} are overlapping in the header"
                    )));
                }
            }
        }
        Ok(())
    }

    /// The bytes on disk.
    pub(super) fn to_bytes(&self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        let mode = match (self.cipher.mode, self.cipher.iv) {
            (mode, IvKind::Essiv(hash)) => format!("{}-essiv:{}", mode.name(), hash.name()),
            (mode, iv) => format!("{}-{}", mode.name(), iv.name()),
        };
        put(0, MAGIC);
        put(6, &1_u16.to_be_bytes());
        put(8, self.cipher.algorithm.header_name().as_bytes());
        put(40, mode.as_bytes());
        put(72, self.hash.name().as_bytes());
        put(104, &self.payload.to_be_bytes());
        put(108, &(self.cipher.key_bytes() as u32).to_be_bytes());
        put(112, &self.digest);
        put(132, &self.digest_salt);
        put(164, &self.digest_iterations.to_be_bytes());
        put(168, &self.uuid.as_bytes()[..self.uuid.len().min(39)]);
        for (number, slot) in self.slots.iter().enumerate() {
            let at = 208 + 48 * number;
            let state = if slot.active { ACTIVE } else { INACTIVE };
            put(at, &state.to_be_bytes());
            put(at + 4, &slot.iterations.to_be_bytes());
            put(at + 8, &slot.salt);
            put(at + 40, &slot.material.to_be_bytes());
            put(at + 44, &slot.stripes.to_be_bytes());
        }
        bytes
    }
}

fn unsupported(message: String) -> Error {
    Error::new(ErrorKind::Unsupported, message)
}

fn hash_called(name: &str) -> Result<Hash, Error> {
    let hash = Hash::from_name(name);
    hash.ok_or_else(|| unsupported(format!("Hash algorithm '{name}' not supported")))
}

fn check_iterations(iterations: u32, whose: impl Fn() -> String) -> Result<(), Error> {
    match iterations {
        0 => Err(invalid(format!("{} iteration count is zero", whose()))),
        1..=MAX_ITERATIONS => Ok(()),
        _ => Err(invalid(format!(
            "{} iteration count {iterations} is too large",
            whose()
        ))),
    }
}

fn parse_slots(bytes: &[u8]) -> Result<[Slot; SLOTS], Error> {
    let mut slots = [Slot {
        active: false,
        iterations: 0,
        salt: [0; SALT],
        material: 0,
        stripes: 0,
    }; SLOTS];
    for (number, slot) in slots.iter_mut().enumerate() {
        let at = 208 + 48 * number;
        *slot = Slot {
            active: match word(bytes, at) {
                ACTIVE => true,
                INACTIVE => false,
                _ => {
                    let message = format!("Keyslot {number} state (active/disable) is corrupted");
                    return Err(invalid(message));
                }
            },
            iterations: word(bytes, at + 4),
            salt: array(bytes, at + 8),
            material: word(bytes, at + 40),
            stripes: word(bytes, at + 44),
        };
    }
    Ok(slots)
}

/// "xts-plain64", "cbc-essiv:sha256", "ecb".
fn parse_cipher(name: &str, mode_spec: &str, key_bytes: u32) -> Result<Spec, Error> {
    let unexpected = || {
        let message = format!("Unexpected cipher mode string format '{mode_spec}'");
        Error::new(ErrorKind::Corrupt, message)
    };
    let (mode_name, iv_spec) = match mode_spec.split_once('-') {
        Some(parts) => parts,
        None if mode_spec == "ecb" => (mode_spec, "plain"),
        None => return Err(unexpected()),
    };
    let mode = Mode::from_name(mode_name)
        .ok_or_else(|| unsupported(format!("Cipher mode '{mode_name}' not supported")))?;
    let one_key = key_bytes as usize / mode.keys();
    let whole = one_key * mode.keys() == key_bytes as usize;
    let algorithm = Algorithm::from_header(name, one_key).filter(|_| whole);
    let algorithm = algorithm.ok_or_else(|| {
        unsupported(format!(
            "Algorithm '{name}' with key size {one_key} bytes not supported"
        ))
    })?;
    let (iv_name, iv_hash) = match iv_spec.split_once(':') {
        Some((name, hash)) => (name, Some(hash_called(hash)?)),
        None => (iv_spec, None),
    };
    let iv = match (iv_name, iv_hash) {
        ("plain", _) => IvKind::Plain,
        ("plain64", _) => IvKind::Plain64,
        ("essiv", Some(hash)) => IvKind::Essiv(hash),
        ("essiv", None) => {
            let message = "Missing IV generator hash specification";
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        _ => {
            let message = format!("IV generator '{iv_name}' not supported");
            return Err(unsupported(message));
        }
    };
    let spec = Spec {
        algorithm,
        mode,
        iv,
    };
    spec.check()?;
    Ok(spec)
}
