//! A volume in use: its header, which may change while it serves, and its key.

use super::amend::Amend;
use super::cipher::{IvKind, Sectors};
use super::header::{Header, Slot};
use super::volume::{Location, Password, Volume};
use block::cipher::Tweak;
use block::{Error, ErrorKind};
use executor::sync::Mutex as AsyncMutex;
use serde_json::{Map, Value, json};
use std::sync::{Mutex, MutexGuard, PoisonError};
use zeroize::Zeroizing;

/// A volume in use.
pub struct Served {
    header: Mutex<Header>,
    /// Absent in one that is only described.
    key: Option<Zeroizing<Vec<u8>>>,
    /// One change at a time.
    changing: AsyncMutex<()>,
}

impl Served {
    /// Opens the volume at `location`.
    ///
    /// # Errors
    /// As [`Volume::open`].
    pub async fn open(location: Location<'_>, password: &Password) -> Result<Self, Error> {
        let Volume { header, key } = Volume::open(location, password).await?;
        Ok(Self {
            header: Mutex::new(header),
            key: Some(key),
            changing: AsyncMutex::new(()),
        })
    }

    /// The volume at `location`, to be described only.
    ///
    /// # Errors
    /// As [`Header::read`].
    pub async fn describe_only(location: Location<'_>) -> Result<Self, Error> {
        Ok(Self {
            header: Mutex::new(Header::read(location).await?),
            key: None,
            changing: AsyncMutex::new(()),
        })
    }

    fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes before the payload.
    pub fn payload_offset(&self) -> u64 {
        self.header().payload_offset()
    }

    fn volume(&self) -> Option<Volume> {
        let key = self.key.clone()?;
        let header = self.header().clone();
        Some(Volume { header, key })
    }

    /// The cipher of the payload; `None` without the key.
    pub fn cipher(&self, tweak: Tweak) -> Option<Sectors> {
        self.volume().map(|volume| volume.cipher(tweak))
    }

    /// Changes key slots. The data is not touched and may be read and written meanwhile.
    ///
    /// # Errors
    /// `Invalid` naming the rule that speaks against it, `Io`.
    pub async fn amend(&self, location: Location<'_>, amend: Amend) -> Result<(), Error> {
        let _one = self.changing.lock().await;
        let Some(mut volume) = self.volume() else {
            let message = "a volume that was opened without its key is not amended";
            return Err(Error::new(ErrorKind::Invalid, message));
        };
        let amended = volume.amend(location, amend).await;
        let header = match &amended {
            Ok(()) => Ok(volume.header.clone()),
            // What was written last is what there is.
            Err(_) => Header::read(location).await,
        };
        if let Ok(header) = header {
            *self.header() = header;
        }
        amended
    }

    /// What is told about the volume, in the words of the peer.
    pub fn describe(&self) -> Map<String, Value> {
        let header = self.header();
        let slots: Vec<Value> = header.slots.iter().map(describe_slot).collect();
        let mut described = Map::new();
        let mut tell = |name: &str, value| {
            described.insert(name.to_owned(), value);
        };
        tell("ivgen-alg", json!(header.cipher.iv.name()));
        if let IvKind::Essiv(hash) = header.cipher.iv {
            tell("ivgen-hash-alg", json!(hash.name()));
        }
        tell("hash-alg", json!(header.hash.name()));
        tell("cipher-alg", json!(header.cipher.algorithm.option()));
        tell("uuid", json!(header.uuid));
        tell("cipher-mode", json!(header.cipher.mode.name()));
        tell("slots", Value::Array(slots));
        tell("payload-offset", json!(header.payload_offset()));
        tell("master-key-iters", json!(header.digest_iterations));
        described
    }
}

fn describe_slot(slot: &Slot) -> Value {
    match slot.active {
        true => json!({
            "active": true,
            "iters": slot.iterations,
            "key-offset": slot.offset(),
            "stripes": slot.stripes,
        }),
        false => json!({"active": false, "key-offset": slot.offset()}),
    }
}
