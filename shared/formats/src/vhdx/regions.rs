//! The region tables ([MS-VHDX] 2.2.3): where the block allocation table and the metadata are.
//!
//! | offset | field, little-endian |
//! |---|---|
//! | 0, 4 | signature, CRC-32C of the table's 64 KiB with this field zero |
//! | 8 | how many entries follow from offset 16 on, 2047 at most |
//! | entry: 0, 16, 24, 28 | GUID, offset in the file, bytes, bit 0: whoever does not know it must not open the image |
//!
//! The table is there twice; the second is looked at when the first is not sound.

use super::header::{FIRST_REGION, Guid, field, is_sealed, seal};
use super::{FileRegion, MIB, corrupt, unsupported};
use crate::bytes::read_bytes;
use block::{Edge, Error};

/// Bytes of a table.
pub(super) const TABLE_BYTES: usize = 64 << 10;
/// Where the tables are.
pub(super) const PLACES: [u64; 2] = [192 << 10, 256 << 10];
/// Most entries of a table of 64 KiB, here and in the metadata.
pub(super) const MAX_ENTRIES: usize = 2047;
const SIGNATURE: &[u8; 4] = b"regi";
const ENTRY_BYTES: usize = 32;
/// No file is longer, in bytes: the place of a block takes 29 bits of the map in memory.
pub(super) const MAX_FILE: u64 = MIB << 29;

const BAT: Guid = *b"\x66\x77\xc2\x2d\x23\xf6\x00\x42\x9d\x64\x11\x5e\x9b\xfd\x4a\x08";
const METADATA: Guid = *b"\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e";

impl FileRegion {
    /// One past its last byte.
    pub(super) fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// Whether it has bytes in common with `other`.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    /// Checks where it lies: whole MiB behind the headers, and an end that can be counted.
    pub(super) fn check(&self, name: &str) -> Result<(), Error> {
        let Self { offset, length } = *self;
        let is_aligned = offset.is_multiple_of(MIB) && length.is_multiple_of(MIB);
        let is_inside = offset >= FIRST_REGION && self.end() <= MAX_FILE;
        match is_aligned && is_inside && length > 0 {
            true => Ok(()),
            false => Err(corrupt(format!(
                "the {name} at 0x{offset:x} of 0x{length:x} bytes"
            ))),
        }
    }

    /// The error of bytes that two things use.
    pub(super) fn overlap(&self, other: &Self) -> String {
        format!(
            "VHDX region {}-{} overlaps with region {}-{}",
            self.offset,
            self.end(),
            other.offset,
            other.end()
        )
    }
}

/// Where the table of blocks and the metadata are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Regions {
    pub(super) bat: FileRegion,
    pub(super) metadata: FileRegion,
}

impl Regions {
    /// Reads the tables of `file`. No region overlaps another or the log, and none ends behind the file.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`, `Io`.
    pub(super) async fn read(file: &Edge, log: FileRegion) -> Result<Self, Error> {
        let mut sound = None;
        for offset in PLACES {
            let bytes = read_bytes(file, offset, TABLE_BYTES).await;
            let bytes =
                bytes.map_err(|errno| Error::io("Could not read the region table", errno))?;
            if bytes.starts_with(SIGNATURE) && is_sealed(&bytes) {
                sound = Some(bytes);
                break;
            }
        }
        let bytes = sound.ok_or_else(|| corrupt("no sound region table".to_owned()))?;
        let regions = Self::parse(&bytes, log)?;
        let length = file.node().length();
        for region in [log, regions.bat, regions.metadata] {
            if region.end() > length {
                return Err(corrupt(format!(
                    "a region ends at 0x{:x}, the file at 0x{length:x}",
                    region.end()
                )));
            }
        }
        Ok(regions)
    }

    fn parse(bytes: &[u8], log: FileRegion) -> Result<Self, Error> {
        let count = u32::from_le_bytes(field(bytes, 8)) as usize;
        if count > MAX_ENTRIES {
            return Err(corrupt(format!("{count} regions")));
        }
        let mut seen = vec![log];
        let (mut bat, mut metadata) = (None, None);
        for entry in bytes[16..].chunks_exact(ENTRY_BYTES).take(count) {
            let region = FileRegion {
                offset: u64::from_le_bytes(field(entry, 16)),
                length: u32::from_le_bytes(field(entry, 24)).into(),
            };
            region.check("region")?;
            seen.push(region);
            let known = match field(entry, 0) {
                BAT => &mut bat,
                METADATA => &mut metadata,
                _ if entry[28] & 1 == 0 => continue,
                _ => {
                    return Err(unsupported(
                        "a required region that is not known".to_owned(),
                    ));
                }
            };
            if known.replace(region).is_some() {
                return Err(corrupt("a region is there twice".to_owned()));
            }
        }
        seen.sort_unstable_by_key(|region| region.offset);
        let clash = seen.windows(2).find(|pair| pair[0].overlaps(&pair[1]));
        if let Some(pair) = clash {
            return Err(corrupt(pair[0].overlap(&pair[1])));
        }
        match (bat, metadata) {
            (Some(bat), Some(metadata)) => Ok(Self { bat, metadata }),
            (None, _) => Err(corrupt(
                "no region for the block allocation table".to_owned(),
            )),
            (_, None) => Err(corrupt("no region for the metadata".to_owned())),
        }
    }

    /// A table's bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; TABLE_BYTES];
        bytes[..4].copy_from_slice(SIGNATURE);
        bytes[8..12].copy_from_slice(&2_u32.to_le_bytes());
        let entries = bytes[16..].chunks_exact_mut(ENTRY_BYTES);
        for (entry, (guid, region)) in entries.zip([(BAT, self.bat), (METADATA, self.metadata)]) {
            entry[..16].copy_from_slice(&guid);
            entry[16..24].copy_from_slice(&region.offset.to_le_bytes());
            entry[24..28].copy_from_slice(&(region.length as u32).to_le_bytes());
            entry[28] = 1;
        }
        seal(&mut bytes);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn region(first: u64, mebibytes: u64) -> FileRegion {
        FileRegion {
            offset: first << 20,
            length: mebibytes << 20,
        }
    }

    const SOUND: Regions = Regions {
        bat: region(2, 1),
        metadata: region(3, 1),
    };

    fn parse(changes: &[(usize, &[u8])]) -> Result<Regions, String> {
        let mut bytes = SOUND.encode();
        for (offset, field) in changes {
            bytes[*offset..offset + field.len()].copy_from_slice(field);
        }
        Regions::parse(&bytes, region(1, 1)).map_err(|error| error.message)
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        assert_eq!(parse(&[]), Ok(SOUND));
        assert!(is_sealed(&SOUND.encode()));
        // One more, which need not be known.
        let more = [9; 16];
        let entry = [
            (8, &[3][..]),
            (80, &more),
            (96, &[0, 0, 0x40]),
            (104, &[0, 0, 0x10]),
        ];
        assert_eq!(parse(&entry), Ok(SOUND));
    }

    #[test]
    fn tables_that_lie_are_refused_by_name() {
        for (changes, message) in [
            (&[(8, &[0, 8][..])][..], "2048 regions"),
            (&[(8, &[1])], "no region for the metadata"),
            (&[(8, &[0])], "no region for the block allocation table"),
            (&[(33, &[0x80])], "the region at 0x208000 of 0x100000 bytes"),
            (&[(34, &[0])], "the region at 0x0 of 0x100000 bytes"),
            (&[(42, &[0])], "the region at 0x200000 of 0x0 bytes"),
            (&[(40, &[1])], "the region at 0x200000 of 0x100001 bytes"),
            (
                &[(38, &[0xff, 0xff])],
                "the region at 0xffff000000200000 of 0x100000 bytes",
            ),
            (
                &[(34, &[0x10])],
                "VHDX region 1048576-2097152 overlaps with region 1048576-2097152",
            ),
            (
                &[(42, &[0x20])],
                "VHDX region 2097152-4194304 overlaps with region 3145728-4194304",
            ),
            (
                &[
                    (8, &[3]),
                    (80, &[9; 16]),
                    (98, &[0x40]),
                    (106, &[0x10]),
                    (108, &[1]),
                ],
                "a required region that is not known",
            ),
            (
                &[(8, &[3]), (80, &BAT), (98, &[0x40]), (106, &[0x10])],
                "a region is there twice",
            ),
        ] {
            let error = parse(changes).unwrap_err();
            assert!(
                error.ends_with(&format!("({message})")),
                "{error}: {message}"
            );
        }
    }
}
