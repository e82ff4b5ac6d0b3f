//! Volumes: made, opened with a password, given and deprived of key slots.

use super::cipher::{Algorithm, IvKind, Mode, Sectors, Spec};
use super::derive::Recipe;
use super::hash::Hash;
use super::header::{DIGEST, Header, LENGTH, MAX_ITERATIONS, SALT, SLOTS, STRIPES, Slot};
use super::split;
use block::cipher::Tweak;
use block::{Buffer, Edge, Error, ErrorKind, SectorCipher, WriteFlags};
use executor::workers::offload;
use nix::time::{ClockId, clock_gettime};
use rand::TryRngCore;
use rand::rngs::OsRng;
use std::sync::Arc;
use std::time::Duration;
use zeroize::{Zeroize, Zeroizing};

/// A password, wiped when its last owner is gone.
pub type Password = Arc<Zeroizing<Vec<u8>>>;

/// Where a volume's header is.
#[derive(Clone, Copy)]
pub struct Location<'e> {
    /// The child.
    pub file: &'e Edge,
    /// Offset in it.
    pub offset: u64,
}

/// What a new volume is like.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// `cipher-alg`, `cipher-mode`, `ivgen-alg` with `ivgen-hash-alg`.
    pub cipher: Spec,
    /// `hash-alg`: for key derivation and the splitter.
    pub hash: Hash,
    /// `iter-time`: how long one key derivation is to take.
    pub iter_time: Duration,
}

/// `iter-time` when nothing is said.
pub(super) const DEFAULT_ITER_TIME: Duration = Duration::from_millis(2000);

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            cipher: Spec {
                algorithm: Algorithm::Aes256,
                mode: Mode::Xts,
                iv: IvKind::Plain64,
            },
            hash: Hash::Sha256,
            iter_time: DEFAULT_ITER_TIME,
        }
    }
}

/// An open volume: its header and its key.
#[derive(Clone)]
pub struct Volume {
    /// The header.
    pub header: Header,
    pub(super) key: Zeroizing<Vec<u8>>,
}

/// Rounds that a derivation never goes below.
const MIN_ITERATIONS: u32 = 1000;
/// The digest of the key takes this fraction of a slot's rounds.
const DIGEST_FRACTION: u32 = 8;
/// CPU time that a measurement takes at least.
const MEASURED: Duration = Duration::from_millis(60);

impl Location<'_> {
    async fn read(&self, offset: u64, length: usize) -> Result<Zeroizing<Vec<u8>>, Error> {
        let buffer = Buffer::zeroed(length);
        let read = self.file.node().read(self.at(offset)?, buffer.clone());
        read.await
            .map_err(|errno| Error::io("Could not read encryption header", errno))?;
        let bytes = Zeroizing::new(buffer.to_heap().to_vec());
        if let Ok(mut memory) = buffer.try_into_heap() {
            memory.zeroize();
        }
        Ok(bytes)
    }

    async fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let failed = |errno| Error::io("Could not write encryption header", errno);
        let write = self
            .file
            .node()
            .write(self.at(offset)?, bytes.into(), WriteFlags::default());
        write.await.map_err(failed)?;
        self.file.node().flush().await.map_err(failed)
    }

    fn at(&self, offset: u64) -> Result<u64, Error> {
        let at = self.offset.checked_add(offset);
        at.ok_or_else(|| Error::new(ErrorKind::Corrupt, "LUKS header out of range"))
    }
}

impl Header {
    /// Reads and checks a header.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported` naming what, `Io`.
    pub async fn read(location: Location<'_>) -> Result<Self, Error> {
        Self::parse(&location.read(0, LENGTH).await?)
    }
}

impl Volume {
    /// Opens a volume.
    ///
    /// # Errors
    /// `Invalid` when no slot takes the password.
    pub async fn open(location: Location<'_>, password: &Password) -> Result<Self, Error> {
        let header = Header::read(location).await?;
        for number in 0..SLOTS {
            if let Some(key) = try_slot(location, &header, number, password).await? {
                return Ok(Self { header, key });
            }
        }
        let message = "Invalid password, cannot unlock any keyslot";
        Err(Error::new(ErrorKind::Invalid, message))
    }

    /// Bytes that the header and key material of a new volume take.
    pub fn header_bytes(options: &CreateOptions) -> u64 {
        Header::new(options.cipher, options.hash, String::new()).payload_offset()
    }

    /// Makes a volume with a new key, which `password` opens.
    ///
    /// # Errors
    /// `Io`, also when the system gives no random bytes.
    pub async fn create(
        location: Location<'_>,
        options: &CreateOptions,
        password: &Password,
    ) -> Result<Self, Error> {
        let mut header = Header::new(options.cipher, options.hash, new_uuid()?);
        let key = Zeroizing::new(random_bytes(options.cipher.key_bytes())?);
        header.digest_salt = random_array()?;
        let per_second = measure(&header).await;
        let rounds = rounds_for(per_second, options.iter_time)? / DIGEST_FRACTION;
        header.digest_iterations = rounds.max(MIN_ITERATIONS);
        header.digest = digest(&header, &key).await;
        let mut volume = Self { header, key };
        volume
            .add_key(location, 0, (password, options.iter_time))
            .await?;
        Ok(volume)
    }

    /// The cipher of the payload.
    pub fn cipher(&self, tweak: Tweak) -> Sectors {
        let keyed = self.header.cipher.keyed(&self.key, tweak);
        keyed.expect("the key has the length that the header gives")
    }

    /// Lets `password` open the volume by way of slot `number`. The key material is durable before
    /// the slot is active.
    pub(super) async fn add_key(
        &mut self,
        location: Location<'_>,
        number: usize,
        (password, iter_time): (&Password, Duration),
    ) -> Result<(), Error> {
        let per_second = measure(&self.header).await;
        let rounds = rounds_for(per_second, iter_time)?;
        let mut slot = Slot {
            active: true,
            iterations: rounds.max(MIN_ITERATIONS),
            salt: random_array()?,
            ..self.header.slots[number]
        };
        slot.stripes = STRIPES;
        let (header, key) = (self.header.clone(), self.key.clone());
        let derived = derived_key(&header, &slot, password).await;
        let material = offload(move || {
            let mut material = split::split(header.hash, &key, STRIPES as usize).ok()?;
            material.resize(header.material_bytes(), 0);
            material_cipher(&header, &derived).encrypt(0, &mut material);
            Some(material)
        })
        .await;
        let material = material.ok_or_else(no_random)?;
        location.write(slot.offset(), &material).await?;
        self.header.slots[number] = slot;
        location.write(0, &self.header.to_bytes()).await
    }

    /// Makes slot `number` inactive and overwrites its key material.
    pub(super) async fn erase_key(
        &mut self,
        location: Location<'_>,
        number: usize,
    ) -> Result<(), Error> {
        let slot = self.header.slots[number];
        let noise = random_bytes(self.header.material_bytes())?;
        // The key material goes first: a slot that is still active without it opens nothing,
        // material that stays behind would open everything.
        location.write(slot.offset(), &noise).await?;
        self.header.slots[number] = Slot {
            active: false,
            iterations: 0,
            salt: [0; SALT],
            ..slot
        };
        location.write(0, &self.header.to_bytes()).await
    }
}

/// The volume's key, when `password` opens slot `number`.
pub(super) async fn try_slot(
    location: Location<'_>,
    header: &Header,
    number: usize,
    password: &Password,
) -> Result<Option<Zeroizing<Vec<u8>>>, Error> {
    let slot = header.slots[number];
    if !slot.active {
        return Ok(None);
    }
    let mut material = location
        .read(slot.offset(), header.material_bytes())
        .await?;
    let derived = derived_key(header, &slot, password).await;
    let described = header.clone();
    let key = offload(move || {
        material_cipher(&described, &derived).decrypt(0, &mut material);
        let length = described.cipher.key_bytes();
        let stripes = &material[..length * STRIPES as usize];
        split::merge(described.hash, stripes, length)
    })
    .await;
    let is_right = digest(header, &key).await == header.digest;
    Ok(is_right.then_some(key))
}

/// The key of a slot's key material.
async fn derived_key(header: &Header, slot: &Slot, password: &[u8]) -> Zeroizing<Vec<u8>> {
    let recipe = Recipe {
        hash: header.hash,
        salt: slot.salt,
        iterations: slot.iterations,
        length: header.cipher.key_bytes(),
    };
    recipe.derive(password).await
}

/// The cipher of a slot's key material.
fn material_cipher(header: &Header, derived: &[u8]) -> Sectors {
    let keyed = header.cipher.keyed(derived, Tweak::HostOffset);
    keyed.expect("the key was made for this cipher")
}

async fn digest(header: &Header, key: &[u8]) -> [u8; DIGEST] {
    let recipe = Recipe {
        hash: header.hash,
        salt: header.digest_salt,
        iterations: header.digest_iterations,
        length: DIGEST,
    };
    let digest = recipe.derive(key).await;
    digest[..].try_into().expect("as long as was asked for")
}

/// Rounds of the header's key derivation that one thread does in a second.
async fn measure(header: &Header) -> u64 {
    let (hash, length) = (header.hash, header.cipher.key_bytes());
    offload(move || {
        let mut rounds = 1 << 12;
        loop {
            let begun = cpu_time();
            let mut key = vec![0; length];
            hash.derive(b"measured", &[0; SALT], rounds, &mut key);
            let taken = cpu_time().saturating_sub(begun);
            if taken >= MEASURED || rounds >= 1 << 30 {
                let nanoseconds = taken.as_nanos().max(1) as u64;
                return u64::from(rounds) * 1_000_000_000 / nanoseconds;
            }
            rounds *= 2;
        }
    })
    .await
}

/// CPU time of this thread: other threads must not make keys weaker.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map(Duration::from)
        .unwrap_or_default()
}

/// Rounds that take so long.
///
/// # Errors
/// `Invalid` when no header may say so many.
fn rounds_for(per_second: u64, time: Duration) -> Result<u32, Error> {
    let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let rounds = per_second.saturating_mul(milliseconds) / 1000;
    let allowed = u32::try_from(rounds).ok();
    let allowed = allowed.filter(|rounds| *rounds <= MAX_ITERATIONS);
    allowed.ok_or_else(|| {
        let message = format!("PBKDF iterations {rounds} larger than {MAX_ITERATIONS}");
        Error::new(ErrorKind::Invalid, message)
    })
}

fn no_random() -> Error {
    Error::new(ErrorKind::Io, "Unable to get random bytes")
}

fn random_bytes(length: usize) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; length];
    OsRng.try_fill_bytes(&mut bytes).map_err(|_| no_random())?;
    Ok(bytes)
}

fn random_array<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    OsRng.try_fill_bytes(&mut bytes).map_err(|_| no_random())?;
    Ok(bytes)
}

/// A random (version 4) UUID as text.
fn new_uuid() -> Result<String, Error> {
    let mut bytes: [u8; 16] = random_array()?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let digits: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let group = |range: std::ops::Range<usize>| digits[range].concat();
    let groups = [0..4, 4..6, 6..8, 8..10, 10..16].map(group);
    Ok(groups.join("-"))
}
