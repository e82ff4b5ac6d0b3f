//! The `luks` driver: a LUKS header, and behind it the encrypted disk.
//!
//! ```text
//!   0        header    key material    payload offset                       end of the file
//!   ├────────┼─────────────────────────┼─ disk, sector by sector ───────────┤
//! ```
//!
//! Sectors are tied to their offset on the disk. Nothing is ever moved or allocated, so every
//! write goes to its place; zeroes are written as what they encrypt to, and discards change
//! nothing, because a hole decrypts to noise. What a grown disk shows in its new part is noise, too.

use super::options::{AMENDMENT, CREATION, Members, missing_key, number, text};
use super::served::Served;
use super::volume::{Location, Volume};
use super::{CreateOptions, Password, Sectors};
use block::amend::{AmendRequest, Amender};
use block::cipher::{SECTOR, Tweak};
use block::create::{CreateRequest, Creator, OptionKind, OptionSpec};
use block::format::{Extent, Format, Lookup, Mapping, WritePlan};
use block::measure::Measured;
use block::open::{ChildRole, DriverEntry};
use block::{
    ByteRange, Driver, Edge, Errno, Error, ErrorKind, FormatNode, Limits, OpenRequest,
    Preallocation, Resize, RootHandle, SectorCipher, ZeroFlags,
};
use serde_json::{Map, Value, json};

/// The table line of `luks`.
pub const ENTRY: DriverEntry = DriverEntry::new("luks", |request| Box::pin(open(request)))
    .with_probe(probe)
    .with_strong_options(&["key-secret"])
    .with_create(CREATOR)
    .with_measure(|request, source| Box::pin(async move { measure(request, source) }))
    .with_amend(AMENDER);

/// How volumes are made.
const CREATOR: Creator = Creator {
    options: &[
        OptionSpec::new(("size", "size"), OptionKind::Size, "Virtual disk size"),
        text(
            "key-secret",
            "ID of the secret that provides the keyslot passphrase",
        ),
        text("cipher-alg", "Name of encryption cipher algorithm"),
        text("cipher-mode", "Name of encryption cipher mode"),
        text("ivgen-alg", "Name of IV generator algorithm"),
        text("ivgen-hash-alg", "Name of IV generator hash algorithm"),
        text("hash-alg", "Name of encryption hash algorithm"),
        number("iter-time", "Time to spend in PBKDF in milliseconds"),
    ],
    size_unit: 1,
    create: |request| Box::pin(create(request)),
};

/// How key slots are changed.
const AMENDER: Amender = Amender {
    options: &[
        text(
            "state",
            "Select new state of affected keyslots (active/inactive)",
        ),
        number("keyslot", "Select a single keyslot to modify explicitly"),
        text("old-secret", "Select all keyslots that match this password"),
        text(
            "new-secret",
            "New secret to set in the matching keyslots. Empty string to erase",
        ),
        number("iter-time", "Time to spend in PBKDF in milliseconds"),
    ],
    amend: |open, changes| Box::pin(amend(open, changes)),
};

fn probe(start: &[u8]) -> u8 {
    if start.starts_with(b"LUKS\xba\xbe\0\x01") {
        100
    } else {
        0
    }
}

/// An open image.
pub struct Luks {
    file: Edge,
    volume: Served,
    payload: u64,
    /// Absent when the image is only described.
    cipher: Option<Sectors>,
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>, Error> {
    let image = Luks::open(request).await?;
    Ok(Box::new(FormatNode::new(image)))
}

impl Luks {
    async fn open(request: &mut OpenRequest<'_>) -> Result<Self, Error> {
        let secret = request.take_str("key-secret")?;
        let file = request.required_child("file", ChildRole::Image).await?;
        let location = Location {
            file: &file,
            offset: 0,
        };
        let volume = match secret {
            _ if !request.purpose().needs_content() => Served::describe_only(location).await?,
            Some(secret) => Served::open(location, &request.secret(&secret)?).await?,
            None => return Err(missing_key("")),
        };
        let payload = volume.payload_offset();
        if payload > file.node().length() {
            // The disk begins behind the end of the file.
            let message = "Could not refresh total sector count";
            return Err(Error::io(message, Errno::EIO));
        }
        Ok(Self {
            cipher: volume.cipher(Tweak::GuestOffset),
            payload,
            volume,
            file,
        })
    }

    fn location(&self) -> Location<'_> {
        Location {
            file: &self.file,
            offset: 0,
        }
    }

    fn extent(&self, range: ByteRange) -> Extent {
        Extent {
            length: range.length,
            mapping: Mapping::Data(self.payload.saturating_add(range.offset)),
            in_place: true,
        }
    }

    async fn amend(&self, changes: &mut AmendRequest<'_>) -> Result<(), Error> {
        let members = AMENDMENT
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), changes.take(name)?)));
        let mut members = Members::new(members.collect(), "");
        let amend = members.amendment(changes.force, |id| changes.secret(id))?;
        changes.finish()?;
        self.volume.amend(self.location(), amend).await
    }
}

async fn amend(open: &mut OpenRequest<'_>, changes: &mut AmendRequest<'_>) -> Result<(), Error> {
    let image = Luks::open(open).await?;
    open.finish()?;
    changes.opened();
    image.amend(changes).await
}

/// Makes the file long enough, then writes key material, then the header.
async fn create(request: &mut CreateRequest<'_>) -> Result<(), Error> {
    let size = request.take_length()?;
    let preallocation = take_preallocation(request)?;
    let (options, secret) = take_creation(request)?;
    let length = file_length(&options, size)?;
    let file = request.file().await?;
    request.finish()?;
    // What was in a file of that name is gone by now, and the file goes with it when its password
    // cannot be had: nobody takes the old file for the image that was asked for.
    let password = password_of(request, secret)?;
    let steps = [(0, Preallocation::Off), (length, preallocation)];
    for (length, preallocation) in steps {
        let resize = Resize {
            length,
            preallocation,
        };
        file.node().resize(resize).await?;
    }
    let location = Location {
        file: &file,
        offset: 0,
    };
    Volume::create(location, &options, &password).await?;
    Ok(())
}

/// There is no metadata that could be preallocated.
fn take_preallocation(request: &mut CreateRequest<'_>) -> Result<Preallocation, Error> {
    match request.take_str("preallocation")?.as_deref() {
        None | Some("off" | "metadata") => Ok(Preallocation::Off),
        Some("falloc") => Ok(Preallocation::Falloc),
        Some("full") => Ok(Preallocation::Full),
        Some(other) => {
            let message = format!("invalid parameter value: {other}");
            Err(Error::new(ErrorKind::Invalid, message))
        }
    }
}

/// Longest file.
const MAX_LENGTH: u64 = i64::MAX as u64;

/// What the volume is like, and the name of the secret that is to open it.
fn take_creation(
    request: &mut CreateRequest<'_>,
) -> Result<(CreateOptions, Option<String>), Error> {
    let members = CREATION
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), request.take(name)?)));
    let mut members = Members::new(members.collect(), "");
    let secret = members.text("key-secret")?;
    Ok((members.creation()?, secret))
}

fn password_of(request: &CreateRequest<'_>, secret: Option<String>) -> Result<Password, Error> {
    request.secret(&secret.ok_or_else(|| missing_key(""))?)
}

/// All of the disk is in the file, whatever it holds. The secret must be there, as for `create`.
fn measure(
    request: &mut CreateRequest<'_>,
    source: Option<&RootHandle>,
) -> Result<Measured, Error> {
    let size = match source {
        Some(source) => source.length(),
        None => request.take_size("size")?.unwrap_or(0),
    };
    let (options, secret) = take_creation(request)?;
    password_of(request, secret)?;
    let bytes = file_length(&options, size)?;
    Ok(Measured {
        required: bytes,
        fully_allocated: bytes,
        bitmaps: None,
    })
}

/// Length of the file for a disk of `size` bytes.
fn file_length(options: &CreateOptions, size: u64) -> Result<u64, Error> {
    let too_large = || Error::io("The image size is too large", Errno::EFBIG);
    let length = Volume::header_bytes(options).checked_add(size);
    length
        .filter(|end| *end <= MAX_LENGTH)
        .ok_or_else(too_large)
}

impl Format for Luks {
    type Token<'a> = ();

    fn name(&self) -> &'static str {
        "luks"
    }
    fn virtual_size(&self) -> u64 {
        self.file.node().length().saturating_sub(self.payload)
    }
    fn limits(&self) -> Limits {
        Limits {
            request_alignment: SECTOR as u32,
            ..Limits::default()
        }
    }
    fn file(&self) -> &Edge {
        &self.file
    }
    fn lookup(&self, range: ByteRange) -> Lookup {
        Lookup::Hit(self.extent(range))
    }
    async fn resolve(&self, range: ByteRange) -> Result<Extent, Errno> {
        Ok(self.extent(range))
    }
    async fn prepare_write(&self, range: ByteRange) -> Result<WritePlan<()>, Errno> {
        Ok(WritePlan {
            range,
            host_offset: self.payload.checked_add(range.offset).ok_or(Errno::EFBIG)?,
            head: block::format::Fill::Nothing,
            tail: block::format::Fill::Nothing,
            token: (),
        })
    }
    async fn commit(&self, _plan: WritePlan<()>) -> Result<(), Errno> {
        Ok(())
    }
    async fn abort(&self, _plan: WritePlan<()>) {}
    async fn write_zeroes(&self, _range: ByteRange, _flags: ZeroFlags) -> Result<u64, Errno> {
        Err(Errno::EOPNOTSUPP)
    }
    fn cipher(&self) -> Option<&dyn SectorCipher> {
        self.cipher
            .as_ref()
            .map(|cipher| cipher as &dyn SectorCipher)
    }
    async fn flush(&self) -> Result<(), Errno> {
        self.file.node().flush().await
    }
    fn metadata_dirty(&self) -> bool {
        false
    }
    async fn resize(&self, resize: Resize) -> Result<(), Error> {
        let length = self.payload.checked_add(resize.length);
        let length = length.filter(|length| *length <= MAX_LENGTH);
        let length = length.ok_or_else(|| {
            Error::new(ErrorKind::Invalid, "The requested file size is too large")
        })?;
        self.file.node().resize(Resize { length, ..resize }).await
    }
    async fn close(&self) -> Result<(), Errno> {
        self.flush().await
    }
    async fn amend(&self, changes: &mut AmendRequest<'_>) -> Result<(), Error> {
        self.amend(changes).await
    }
    fn describe(&self) -> Map<String, Value> {
        let mut members = Map::new();
        members.insert("encrypted".into(), json!(true));
        let specific = json!({"type": "luks", "data": self.volume.describe()});
        members.insert("format-specific".into(), specific);
        members
    }
}
