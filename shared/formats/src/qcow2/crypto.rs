//! Encryption (QEMU docs/interop/qcow2.txt, "Full disk encryption header pointer" and "Data
//! encryption").
//!
//! ```text
//!   crypt method 2  LUKS header in clusters of its own ◄── extension 0x0537be77 (offset, length)
//!                   sectors tied to their offset in the file
//!   crypt method 1  AES-128-CBC, key = password; sectors tied to their offset on the disk
//! ```
//!
//! Plain data is encrypted, metadata and compressed clusters are not; so an image that encrypts
//! takes no compressed writes. Owns: options, making and opening of the key; the data itself goes
//! through [`block::FormatNode`].

use super::document::edit;
use super::header::{CryptMethod, Header, extension, field};
use super::open::read_header;
use super::tables::{ClusterRun, HostCluster};
use super::{OpenOptions, Qcow2};
use crate::luks::{
    self, Algorithm, Hash, IvKind, Location, Mode, Password, Sectors, Volume, legacy_aes,
};
use block::amend::{AmendRequest, Force};
use block::cipher::Tweak;
use block::create::CreateRequest;
use block::{Edge, Error, ErrorKind, Format, OpenRequest, Purpose, SectorCipher};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Duration;

/// What an encrypted image is opened with.
pub struct Crypto {
    cipher: Option<Sectors>,
    luks: Option<Luks>,
}

/// A LUKS header, with the key when it was opened.
enum Luks {
    Header(luks::Header),
    Open(Volume),
}

impl Luks {
    fn header(&self) -> &luks::Header {
        match self {
            Self::Header(header) => header,
            Self::Open(volume) => &volume.header,
        }
    }
}

/// How a new image is encrypted.
#[derive(Clone)]
pub enum Encryption {
    /// Crypt method 1.
    Aes(Password),
    /// Crypt method 2.
    Luks(luks::CreateOptions, Password),
}

impl std::fmt::Debug for Encryption {
    /// Says nothing about the password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Aes(_) => "aes",
            Self::Luks(..) => "luks",
        })
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

impl Crypto {
    /// Reads and writes with a cipher that is keyed already, whatever the image's own keys are.
    pub fn of(cipher: Sectors) -> Self {
        Self {
            cipher: Some(cipher),
            luks: None,
        }
    }

    /// Opens what the header says with a password.
    ///
    /// # Errors
    /// As [`Volume::open`].
    pub(super) async fn open(
        file: &Edge,
        header: &Header,
        password: &Password,
    ) -> Result<Option<Self>, Error> {
        Ok(match header.crypt {
            CryptMethod::None => None,
            CryptMethod::Aes => Some(Self {
                cipher: Some(legacy_aes(password)),
                luks: None,
            }),
            CryptMethod::Luks { offset, .. } => {
                let volume = Volume::open(Location { file, offset }, password).await?;
                Some(Self {
                    cipher: Some(volume.cipher(Tweak::HostOffset)),
                    luks: Some(Luks::Open(volume)),
                })
            }
        })
    }

    /// What a new image was just encrypted with.
    pub(super) async fn of_new(
        file: &Edge,
        encryption: Option<&Encryption>,
    ) -> Result<Option<Arc<Self>>, Error> {
        let Some(encryption) = encryption else {
            return Ok(None);
        };
        let header = read_header(file).await?;
        let crypto = match encryption {
            Encryption::Aes(password) | Encryption::Luks(_, password) => {
                Self::open(file, &header, password).await?
            }
        };
        Ok(crypto.map(Arc::new))
    }

    /// What can be said about an encrypted image without its key.
    async fn describe_only(file: &Edge, header: &Header) -> Result<Option<Self>, Error> {
        Ok(match header.crypt {
            CryptMethod::None => None,
            CryptMethod::Aes => Some(Self {
                cipher: None,
                luks: None,
            }),
            CryptMethod::Luks { offset, .. } => Some(Self {
                cipher: None,
                luks: Some(Luks::Header(
                    luks::Header::read(Location { file, offset }).await?,
                )),
            }),
        })
    }

    pub(super) fn cipher(&self) -> Option<&dyn SectorCipher> {
        self.cipher
            .as_ref()
            .map(|cipher| cipher as &dyn SectorCipher)
    }

    /// The "encrypt" member of format-specific information.
    pub(super) fn describe(&self) -> Value {
        let Some(header) = self.luks.as_ref().map(Luks::header) else {
            return json!({"format": "aes"});
        };
        let slots: Vec<Value> = header.slots.iter().map(describe_slot).collect();
        let mut described = json!({
            "ivgen-alg": header.cipher.iv.name(),
            "hash-alg": header.hash.name(),
            "cipher-alg": header.cipher.algorithm.option(),
            "uuid": header.uuid,
            "format": "luks",
            "cipher-mode": header.cipher.mode.name(),
            "slots": slots,
            "payload-offset": header.payload_offset(),
            "master-key-iters": header.digest_iterations,
        });
        if let IvKind::Essiv(hash) = header.cipher.iv {
            described["ivgen-hash-alg"] = json!(hash.name());
        }
        described
    }
}

fn describe_slot(slot: &luks::Slot) -> Value {
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

/// The members of `encrypt`, taken one by one.
struct Members(Map<String, Value>);

impl Members {
    fn new(value: Option<Value>) -> Result<Self, Error> {
        match value {
            None => Ok(Self(Map::new())),
            Some(Value::Object(members)) => Ok(Self(members)),
            Some(_) => Err(invalid(
                "Invalid parameter type for 'encrypt', expected: object",
            )),
        }
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, Error> {
        match self.0.shift_remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(invalid(format!(
                "Invalid parameter type for 'encrypt.{name}', expected: string"
            ))),
        }
    }

    fn number(&mut self, name: &str) -> Result<Option<u64>, Error> {
        let expects = || invalid(format!("Parameter 'encrypt.{name}' expects a number"));
        match self.0.shift_remove(name) {
            None => Ok(None),
            Some(Value::Number(number)) => number.as_u64().map(Some).ok_or_else(expects),
            Some(Value::String(text)) => text.parse().map(Some).map_err(|_| expects()),
            Some(_) => Err(expects()),
        }
    }

    /// A member that names one of many things.
    fn choice<T>(
        &mut self,
        name: &str,
        of: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(text) = self.text(name)? else {
            return Ok(None);
        };
        let known = of(&text).map(Some);
        known.ok_or_else(|| {
            invalid(format!(
                "Parameter 'encrypt.{name}' does not accept value '{text}'"
            ))
        })
    }

    fn finish(&self) -> Result<(), Error> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(invalid(format!("Parameter 'encrypt.{name}' is unexpected"))),
        }
    }
}

fn missing_key() -> Error {
    invalid("Parameter 'encrypt.key-secret' is required for cipher")
}

/// Takes the `encrypt` option of a node and opens the image's key with it.
pub(super) async fn open_for(
    request: &mut OpenRequest<'_>,
    (file, header): (&Edge, &Header),
) -> Result<Option<Crypto>, Error> {
    let mut members = Members::new(request.take("encrypt"))?;
    let format = members.text("format")?;
    let secret = members.text("key-secret")?;
    members.finish()?;
    match (&format, header.crypt.name()) {
        (Some(format), None) => {
            return Err(invalid(format!(
                "No encryption in image header, but options specified format '{format}'"
            )));
        }
        (Some(format), Some(name)) if format != name => {
            return Err(invalid(format!(
                "Header reported '{name}' encryption format but options specify '{format}'"
            )));
        }
        (_, None) => return Ok(None),
        _ => {}
    }
    let Some(secret) = secret else {
        return match request.purpose() {
            Purpose::Describe => Crypto::describe_only(file, header).await,
            _ => Err(missing_key()),
        };
    };
    Crypto::open(file, header, &request.secret(&secret)?).await
}

/// Takes the `encrypt` option of `create`.
pub(super) fn take_creation(request: &mut CreateRequest<'_>) -> Result<Option<Encryption>, Error> {
    let mut members = Members::new(request.take("encrypt"))?;
    let format = members.text("format")?;
    let legacy = request.take_bool("encryption")? == Some(true);
    let format = match (format, legacy) {
        (Some(_), true) => {
            let message = "Options encryption and encrypt.format are mutually exclusive";
            return Err(invalid(message));
        }
        (None, true) => Some("aes".to_owned()),
        (format, false) => format,
    };
    let Some(format) = format else {
        members.finish()?;
        return Ok(None);
    };
    let secret = members.text("key-secret")?;
    let password = || match &secret {
        Some(secret) => request.secret(secret),
        None => Err(missing_key()),
    };
    let encryption = match format.as_str() {
        "aes" => Encryption::Aes(password()?),
        "luks" => Encryption::Luks(luks_options(&mut members)?, password()?),
        other => {
            return Err(invalid(format!(
                "Parameter 'encrypt.format' does not accept value '{other}'"
            )));
        }
    };
    members.finish()?;
    Ok(Some(encryption))
}

fn luks_options(members: &mut Members) -> Result<luks::CreateOptions, Error> {
    let mut options = luks::CreateOptions::default();
    if let Some(algorithm) = members.choice("cipher-alg", Algorithm::from_option)? {
        options.cipher.algorithm = algorithm;
    }
    if let Some(mode) = members.choice("cipher-mode", Mode::from_name)? {
        options.cipher.mode = mode;
    }
    let iv_hash = members.choice("ivgen-hash-alg", Hash::from_name)?;
    let iv = members.text("ivgen-alg")?;
    options.cipher.iv = match iv.as_deref() {
        None | Some("plain64") => IvKind::Plain64,
        Some("plain") => IvKind::Plain,
        Some("essiv") => IvKind::Essiv(iv_hash.unwrap_or(Hash::Sha256)),
        Some(other) => {
            return Err(invalid(format!(
                "Parameter 'encrypt.ivgen-alg' does not accept value '{other}'"
            )));
        }
    };
    if let Some(hash) = members.choice("hash-alg", Hash::from_name)? {
        options.hash = hash;
    }
    if let Some(milliseconds) = members.number("iter-time")? {
        if milliseconds == 0 {
            return Err(invalid("iter-time must be non-zero"));
        }
        options.iter_time = Duration::from_millis(milliseconds);
    }
    Ok(options)
}

/// Takes the change of key slots that `encrypt` asks for.
pub(super) fn take_amendment(
    request: &OpenRequest<'_>,
    header: &Header,
    changes: &mut AmendRequest<'_>,
) -> Result<Option<luks::Amend>, Error> {
    let Some(value) = changes.take("encrypt") else {
        return Ok(None);
    };
    header_offset(header)?;
    let mut members = Members::new(Some(value))?;
    if members
        .text("format")?
        .is_some_and(|format| format != "luks")
    {
        return Err(invalid(
            "Amend can't be used to change the qcow2 encryption format",
        ));
    }
    let state = members.text("state")?;
    let slot = members.number("keyslot")?;
    let iter_time = members.number("iter-time")?.map(Duration::from_millis);
    let secret = |name: Option<String>| name.map(|name| request.secret(&name)).transpose();
    let old = secret(members.text("old-secret")?)?;
    let new = secret(members.text("new-secret")?)?;
    members.finish()?;
    match (state.as_deref(), new) {
        (Some("active"), _) if old.is_some() => Err(invalid(
            "'old-secret' must not be given when activating keyslots",
        )),
        (Some("active"), None) => Err(invalid("'new-secret' is required to activate a keyslot")),
        (Some("active"), Some(password)) => Ok(Some(luks::Amend::Add {
            password,
            slot,
            iter_time,
        })),
        (Some("inactive"), Some(_)) => Err(invalid(
            "'new-secret' must not be given when erasing keyslots",
        )),
        (Some("inactive"), None) if iter_time.is_some() => Err(invalid(
            "'iter-time' must not be given when erasing keyslots",
        )),
        (Some("inactive"), None) => Ok(Some(luks::Amend::Erase(luks::Select {
            slot,
            password: old,
            force: changes.force == Force::Allow,
        }))),
        (None, _) => Err(invalid("Parameter 'encrypt.state' is missing")),
        (Some(other), _) => Err(invalid(format!(
            "Parameter 'encrypt.state' does not accept value '{other}'"
        ))),
    }
}

/// Where the key slots of an image are.
fn header_offset(header: &Header) -> Result<u64, Error> {
    match header.crypt {
        CryptMethod::Luks { offset, .. } => Ok(offset),
        CryptMethod::Aes => Err(invalid(
            "Only LUKS encryption options can be amended for qcow2 with blockdev-amend",
        )),
        CryptMethod::None => Err(invalid(
            "Can't amend encryption options - encryption not present",
        )),
    }
}

/// Changes the key slots of an image that was opened with `crypto`.
pub(super) async fn amend_keys(
    (file, header): (&Edge, &Header),
    crypto: Option<&Crypto>,
    amend: luks::Amend,
) -> Result<(), Error> {
    let offset = header_offset(header)?;
    let luks = crypto.and_then(|crypto| crypto.luks.as_ref());
    let Some(Luks::Open(volume)) = luks else {
        return Err(missing_key());
    };
    let mut volume = volume.clone();
    volume.amend(Location { file, offset }, amend).await
}

/// Makes a new, empty image an encrypted one; gives the file back. The header comes last.
pub(super) async fn encrypt_new(file: Edge, encryption: &Encryption) -> Result<Edge, Error> {
    let failed = |errno| Error::io("Could not write encryption header", errno);
    let image = Qcow2::open(file, None, OpenOptions::default()).await?;
    let (method, pointer) = match encryption {
        Encryption::Aes(_) => (CryptMethod::AES, None),
        Encryption::Luks(options, password) => {
            let length = Volume::header_bytes(options);
            let clusters = length.div_ceil(image.geometry.cluster_size());
            let run = image.contiguous(clusters).await?;
            let offset = image.geometry.host_offset(run.first).0;
            let location = Location {
                file: &image.file,
                offset,
            };
            Volume::create(location, options, password).await?;
            // The last cluster may reach beyond what was written.
            let end = offset + (clusters << image.geometry.cluster_bits);
            if image.file.node().length() < end {
                image.write_bytes(end - 1, &[0]).await.map_err(failed)?;
            }
            let pointer = [offset.to_be_bytes(), length.to_be_bytes()].concat();
            (CryptMethod::LUKS, Some(pointer))
        }
    };
    image.close().await.map_err(failed)?;
    let (file, cluster_bits) = (image.file, image.geometry.cluster_bits);
    edit(&file, cluster_bits, |header| {
        header.set_u32(field::CRYPT_METHOD, method);
        header.set_extension(extension::CRYPTO, pointer);
        Ok(())
    })
    .await?;
    Ok(file)
}

/// How often a row of clusters is looked for.
const MAX_RESTARTS: u32 = 8;

impl Qcow2 {
    /// Allocates `want` clusters in a row.
    async fn contiguous(&self, want: u64) -> Result<ClusterRun, Error> {
        let failed = |errno| {
            let message = format!("Cannot allocate {want} clusters for the LUKS header");
            Error::io(message, errno)
        };
        let mut found = ClusterRun {
            first: HostCluster(0),
            count: 0,
        };
        let mut restarts = 0;
        // A refcount block in between starts it over, behind which there is room for many.
        while found.count < want {
            let (run, _) = self.allocate(want - found.count).await.map_err(failed)?;
            if found.count > 0 && found.end() == run.first.0 {
                found.count += run.count;
                continue;
            }
            if found.count > 0 {
                self.state().give_back(found);
                restarts += 1;
            }
            found = run;
            if restarts > MAX_RESTARTS {
                // Small clusters: a refcount block lies in every row that is long enough.
                self.state().give_back(found);
                return Err(failed(executor::Errno::EFBIG));
            }
        }
        Ok(found)
    }
}
