//! The descriptor: a text file, or a text inside a sparse file (Virtual Disk Format 5.0, "The
//! Descriptor").
//!
//! ```text
//!   # Disk DescriptorFile
//!   version=1
//!   CID=12ab34cd                         a number that changes with the content
//!   parentCID=ffffffff                   that of the parent; without one all bits are set
//!   createType="monolithicSparse"
//!   parentFileNameHint="base.vmdk"
//!   RW 10240 SPARSE "disk-s001.vmdk"     access, sectors, type, file, first sector of flat ones
//!   ddb.adapterType = "ide"
//! ```
//!
//! It is read up to its first NUL, and only ever changed by writing other digits over those of its CID:
//! whatever else it says stays.

use block::{Error, ErrorKind};

/// Longest descriptor, in bytes.
pub(super) const MAX_BYTES: u64 = (1 << 20) - 1;
/// Most extents of a disk.
pub(super) const MAX_EXTENTS: usize = 4096;
/// The CID of no parent.
pub(super) const NO_PARENT: u32 = u32::MAX;
/// Longest names of files, in bytes.
const MAX_EXTENT_NAME: usize = 511;
const MAX_PARENT_NAME: usize = 1023;

/// What kind of file an extent is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExtentType {
    Flat,
    Sparse,
    Vmfs,
    VmfsSparse,
    SeSparse,
}

impl ExtentType {
    const ALL: [Self; 5] = [
        Self::Flat,
        Self::Sparse,
        Self::Vmfs,
        Self::VmfsSparse,
        Self::SeSparse,
    ];

    /// Its name in a descriptor.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Flat => "FLAT",
            Self::Sparse => "SPARSE",
            Self::Vmfs => "VMFS",
            Self::VmfsSparse => "VMFSSPARSE",
            Self::SeSparse => "SESPARSE",
        }
    }

    /// Whether the file holds the bytes of the disk one after the other.
    pub(super) const fn is_flat(self) -> bool {
        matches!(self, Self::Flat | Self::Vmfs)
    }
}

/// A line about an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExtentLine {
    pub(super) sectors: u64,
    pub(super) kind: ExtentType,
    pub(super) name: String,
    /// Where a flat extent begins in its file, in sectors.
    pub(super) first_sector: u64,
}

/// The digits of a content identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ContentId {
    pub(super) value: u32,
    /// Where the digits stand in the text, and how many they are.
    pub(super) at: usize,
    pub(super) digits: usize,
}

/// What a descriptor says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) cid: Option<ContentId>,
    pub(super) parent_cid: Option<u32>,
    pub(super) create_type: Option<String>,
    pub(super) parent: Option<String>,
}

fn corrupt(message: String) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

/// The text of what was read: up to the first NUL.
fn text(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|byte| *byte == 0);
    &bytes[..end.unwrap_or(bytes.len())]
}

/// The lines of a text, without what ends them, and where they begin.
fn lines(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = 0;
    text(bytes).split(|byte| *byte == b'\n').map(move |line| {
        let start = at;
        at += line.len() + 1;
        (start, line.strip_suffix(b"\r").unwrap_or(line))
    })
}

fn unquoted(value: &str) -> &str {
    let inner = value.strip_prefix('"');
    inner
        .and_then(|inner| inner.strip_suffix('"'))
        .unwrap_or(value)
}

/// A number without a prefix, of at most eight digits.
fn content_id(line: &[u8], start: usize, value_at: usize) -> Option<ContentId> {
    let value = &line[value_at..];
    let blanks = value.iter().take_while(|byte| byte.is_ascii_whitespace());
    let skipped = blanks.count();
    let digits = value[skipped..]
        .iter()
        .take_while(|byte| byte.is_ascii_hexdigit())
        .count();
    let number = str::from_utf8(&value[skipped..skipped + digits]).ok()?;
    let value = u32::from_str_radix(number, 16).ok()?;
    (digits <= 8).then_some(ContentId {
        value,
        at: start + value_at + skipped,
        digits,
    })
}

impl Descriptor {
    /// Reads the keys of a descriptor; of a key that is there twice, the first counts.
    ///
    /// # Errors
    /// `Corrupt` naming the value that is none.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut found = Self::default();
        for (start, line) in lines(bytes) {
            let Some(equals) = line.iter().position(|byte| *byte == b'=') else {
                continue;
            };
            let key = line[..equals].trim_ascii();
            let value = || {
                let value = str::from_utf8(line[equals + 1..].trim_ascii());
                value.map(unquoted).map_err(|_| {
                    let key = String::from_utf8_lossy(key);
                    corrupt(format!(
                        "the value of {key} in the VMDK descriptor is no text"
                    ))
                })
            };
            let number = || {
                content_id(line, start, equals + 1).ok_or_else(|| {
                    let line = String::from_utf8_lossy(line);
                    corrupt(format!(
                        "invalid number in the VMDK descriptor: {}",
                        line.escape_debug()
                    ))
                })
            };
            let is_key = |name: &str| key.eq_ignore_ascii_case(name.as_bytes());
            if is_key("CID") && found.cid.is_none() {
                found.cid = Some(number()?);
            } else if is_key("parentCID") && found.parent_cid.is_none() {
                found.parent_cid = Some(number()?.value);
            } else if is_key("createType") && found.create_type.is_none() {
                found.create_type = Some(value()?.to_owned());
            } else if is_key("parentFileNameHint") && found.parent.is_none() {
                found.parent = Some(parent_name(value()?)?);
            }
        }
        Ok(found)
    }

    /// Whether the content of another image shows where this one has nothing.
    pub(super) fn has_parent(&self) -> bool {
        self.parent.is_some() || self.parent_cid.is_some_and(|cid| cid != NO_PARENT)
    }
}

fn parent_name(name: &str) -> Result<String, Error> {
    match name.len() {
        0 => Err(corrupt("the VMDK descriptor names no parent".to_owned())),
        1..=MAX_PARENT_NAME => Ok(name.to_owned()),
        length => Err(corrupt(format!(
            "the parent's name of {length} bytes in the VMDK descriptor is too long"
        ))),
    }
}

/// The extents that a descriptor file is about, in their order on the disk.
///
/// # Errors
/// `Corrupt` and `Unsupported`, with the line.
pub(super) fn extents(bytes: &[u8]) -> Result<Vec<ExtentLine>, Error> {
    let mut extents = Vec::new();
    for (_, line) in lines(bytes) {
        let line = String::from_utf8_lossy(line);
        if let Some(extent) = extent(&line)? {
            extents.push(extent);
        }
        if extents.len() > MAX_EXTENTS {
            let message = format!("more than {MAX_EXTENTS} extents in the VMDK descriptor");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
    }
    Ok(extents)
}

/// The extent that a line is about, if it is about one.
fn extent(line: &str) -> Result<Option<ExtentLine>, Error> {
    let invalid = || {
        corrupt(format!(
            "Invalid extent line: {}",
            line.escape_debug_nicely()
        ))
    };
    let mut words = line.trim_start().splitn(4, [' ', '\t']);
    let (access, sectors, kind) = (words.next(), words.next(), words.next());
    let (Some(access), Some(sectors), Some(kind)) = (access, sectors, kind) else {
        return Ok(None);
    };
    if !matches!(access, "RW" | "RDONLY" | "NOACCESS") {
        return Ok(None);
    }
    let Ok(sectors) = sectors.parse::<u64>() else {
        return Err(invalid());
    };
    if access != "RW" {
        let message = format!("Unsupported extent access '{access}'");
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let known = ExtentType::ALL.into_iter().find(|it| it.name() == kind);
    let Some(kind) = known else {
        let message = format!("Unsupported extent type '{}'", kind.escape_debug());
        return Err(Error::new(ErrorKind::Unsupported, message));
    };
    let rest = words
        .next()
        .map(str::trim)
        .and_then(|it| it.strip_prefix('"'));
    let (name, offset) = rest
        .and_then(|rest| rest.split_once('"'))
        .ok_or_else(invalid)?;
    let offset = offset.trim();
    let first_sector = match (kind, offset) {
        (ExtentType::Flat, offset) => offset.parse().map_err(|_| invalid())?,
        (_, "") => 0,
        _ => return Err(invalid()),
    };
    let is_readable = !name.contains(char::REPLACEMENT_CHARACTER);
    let is_name = (1..=MAX_EXTENT_NAME).contains(&name.len()) && is_readable;
    if sectors == 0 || !is_name {
        return Err(invalid());
    }
    Ok(Some(ExtentLine {
        sectors,
        kind,
        name: name.to_owned(),
        first_sector,
    }))
}

/// Lines as they are shown in messages.
trait Shown {
    fn escape_debug_nicely(&self) -> String;
}

impl Shown for str {
    /// Without control characters; quotes stay.
    fn escape_debug_nicely(&self) -> String {
        let shown = self.trim_end().chars().take(MAX_EXTENT_NAME);
        shown
            .map(|c| if c.is_control() { '?' } else { c })
            .collect()
    }
}

/// How sure it is that a file that begins so is a descriptor: after comments and blank lines it
/// says which version it is.
pub(super) fn probe(start: &[u8]) -> u8 {
    let mut rest = start.split_inclusive(|byte| *byte == b'\n');
    let first = rest.find(|line| {
        let blank = line.first() == Some(&b' ') && line.trim_ascii().is_empty();
        line[0] != b'#' && !blank
    });
    let versions: [&[u8]; 4] = [
        b"version=1\n",
        b"version=1\r\n",
        b"version=2\n",
        b"version=2\r\n",
    ];
    match first {
        Some(line) if versions.contains(&line) => 100,
        _ => 0,
    }
}

/// What a new descriptor says.
pub(super) struct NewDescriptor<'a> {
    pub(super) cid: u32,
    pub(super) parent: Option<(u32, &'a str)>,
    pub(super) create_type: &'a str,
    /// Lines, each with its end.
    pub(super) extents: &'a str,
    pub(super) hardware_version: &'a str,
    pub(super) tools_version: &'a str,
    pub(super) adapter: &'a str,
    pub(super) sectors: u64,
}

/// Sectors of a track, and tracks of a cylinder for disks on IDE and others.
const TRACK_SECTORS: u64 = 63;
const IDE_HEADS: u64 = 16;
const OTHER_HEADS: u64 = 255;

impl NewDescriptor<'_> {
    /// The text.
    pub(super) fn text(&self) -> String {
        let heads = match self.adapter {
            "ide" => IDE_HEADS,
            _ => OTHER_HEADS,
        };
        let (parent_cid, parent) = match self.parent {
            None => (NO_PARENT, String::new()),
            Some((cid, name)) => (cid, format!("parentFileNameHint=\"{name}\"\n")),
        };
        format!(
            "# Disk DescriptorFile\nversion=1\nCID={:x}\nparentCID={parent_cid:x}\n\
             createType=\"{}\"\n{parent}\n\
             # Extent description\n{}\n\
             # The Disk Data Base\n#DDB\n\n\
             ddb.virtualHWVersion = \"{}\"\n\
             ddb.geometry.cylinders = \"{}\"\n\
             ddb.geometry.heads = \"{heads}\"\n\
             ddb.geometry.sectors = \"{TRACK_SECTORS}\"\n\
             ddb.adapterType = \"{}\"\n\
             ddb.toolsVersion = \"{}\"\n",
            self.cid,
            self.create_type,
            self.extents,
            self.hardware_version,
            self.sectors / (TRACK_SECTORS * heads),
            self.adapter,
            self.tools_version,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Disk DescriptorFile\r\nversion=1\nCID=12ab\nparentCID = FFFFFFFF\n\
        unknown = \"kept\"\ncreateType=\"vmfs\"\nRW 10 FLAT \"a b.vmdk\" 7\n\
        RW 20 SPARSE \"s\"\nCID=99\n\0RW 1 SPARSE \"behind\"\n";

    #[test]
    fn keys_and_extents_are_found_up_to_the_first_nul() {
        let found = Descriptor::parse(TEXT.as_bytes()).unwrap();
        let at = TEXT.find("12ab").unwrap();
        let (value, digits) = (0x12ab, 4);
        assert_eq!(found.cid, Some(ContentId { value, at, digits }));
        assert_eq!(
            (found.parent_cid, found.has_parent()),
            (Some(NO_PARENT), false)
        );
        assert_eq!(found.create_type.as_deref(), Some("vmfs"));
        let line = |sectors, kind, name: &str, first_sector| ExtentLine {
            sectors,
            kind,
            name: name.to_owned(),
            first_sector,
        };
        assert_eq!(
            extents(TEXT.as_bytes()).unwrap(),
            [
                line(10, ExtentType::Flat, "a b.vmdk", 7),
                line(20, ExtentType::Sparse, "s", 0)
            ]
        );
    }

    #[test]
    fn lines_that_lie_are_refused_and_shown() {
        for (line, message) in [
            (
                "RW x FLAT \"a\" 0",
                "Invalid extent line: RW x FLAT \"a\" 0",
            ),
            ("RW 1 FLAT \"a\"", "Invalid extent line: RW 1 FLAT \"a\""),
            (
                "RW 1 FLAT \"a\" -1",
                "Invalid extent line: RW 1 FLAT \"a\" -1",
            ),
            (
                "RW 1 VMFS \"a\" 1",
                "Invalid extent line: RW 1 VMFS \"a\" 1",
            ),
            (
                "RW 1 SPARSE \"a\" 1",
                "Invalid extent line: RW 1 SPARSE \"a\" 1",
            ),
            ("RW 1 SPARSE a", "Invalid extent line: RW 1 SPARSE a"),
            ("RW 1 SPARSE \"a", "Invalid extent line: RW 1 SPARSE \"a"),
            ("RW 1 SPARSE \"\"", "Invalid extent line: RW 1 SPARSE \"\""),
            (
                "RW 0 SPARSE \"a\"",
                "Invalid extent line: RW 0 SPARSE \"a\"",
            ),
            (
                "RW 99999999999999999999 SPARSE \"a\"",
                "Invalid extent line: RW 99999999999999999999 SPARSE \"a\"",
            ),
            ("RW 1 ZERO", "Unsupported extent type 'ZERO'"),
            (
                "RDONLY 1 SPARSE \"a\"",
                "Unsupported extent access 'RDONLY'",
            ),
        ] {
            let refused = extents(line.as_bytes()).map_err(|error| error.message);
            assert_eq!(refused, Err(message.to_owned()), "{line}");
        }
        let many = "RW 1 SPARSE \"a\"\n".repeat(MAX_EXTENTS + 1);
        let refused = extents(many.as_bytes()).unwrap_err().message;
        assert_eq!(refused, "more than 4096 extents in the VMDK descriptor");
        for other in [
            "",
            "RW",
            "RW 1",
            "# RW 1 SPARSE",
            "rw 1 SPARSE \"a\"",
            "CID=1",
        ] {
            assert_eq!(extents(other.as_bytes()).unwrap(), [], "{other}");
        }
    }

    #[test]
    fn values_that_lie_are_refused() {
        let long = format!("parentFileNameHint=\"{}\"", "x".repeat(1024));
        for text in [
            "CID=",
            "CID=x",
            "CID=123456789",
            "parentCID=-1",
            "parentFileNameHint=\"\"",
            &long,
        ] {
            assert!(Descriptor::parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(Descriptor::parse(b"createType=\"\xff\"").is_err());
        assert_eq!(Descriptor::parse(b"CIX=1").unwrap(), Descriptor::default());
    }

    #[test]
    fn a_descriptor_file_is_recognised() {
        for text in [TEXT, "version=1\n", "# x\n   \n#\nversion=2\r\nx"] {
            assert_eq!(probe(text.as_bytes()), 100, "{text}");
        }
        for text in [
            "",
            "\n",
            "\nversion=1\n",
            "version=3\n",
            "version=1",
            "x\nversion=1\n",
            " x\nversion=1\n",
        ] {
            assert_eq!(probe(text.as_bytes()), 0, "{text}");
        }
    }
}
