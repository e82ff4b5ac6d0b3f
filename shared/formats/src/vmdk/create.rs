//! Making images, laid out as QEMU does.
//!
//! ```text
//!   header │ descriptor (20 sectors) │ redundant directory │ its tables │ directory │ tables │ grains
//! ```
//!
//! The extents come first, then the file that says what they are; each is durable when it is done.

use super::SECTOR;
use super::descriptor::{MAX_EXTENTS, NewDescriptor};
use super::header::{
    DEFLATE, FLAG_COMPRESSED, FLAG_MARKERS, FLAG_NEW_LINES, FLAG_REDUNDANT, FLAG_ZERO_GRAINS,
    HEADER_BYTES, HOSTED_MAGIC,
};
use super::image::random;
use crate::bytes::{write_bytes, zero_file};
use block::create::{CreateRequest, Creator, OptionKind, OptionSpec};
use block::{Edge, Errno, Error, ErrorKind, Preallocation, Resize};
use serde_json::Value;

const fn text(name: &'static str, member: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec::new((name, member), OptionKind::Text, help)
}

/// How images are made.
pub(super) const CREATOR: Creator = Creator {
    options: &[
        OptionSpec::new(("size", "size"), OptionKind::Size, "Virtual disk size"),
        text(
            "adapter_type",
            "adapter-type",
            "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
        ),
        text("backing_file", "backing-file", "File name of a base image"),
        text("backing_fmt", "backing-fmt", "Must be 'vmdk' if present"),
        OptionSpec::new(
            ("compat6", "compat6"),
            OptionKind::Switch,
            "VMDK version 6 image",
        )
        .with_default("off"),
        text("hwversion", "hwversion", "VMDK hardware version").with_default("undefined"),
        text("toolsversion", "toolsversion", "VMware guest tools version"),
        text(
            "subformat",
            "subformat",
            "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | \
             twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
        ),
        OptionSpec::new(
            ("zeroed_grain", "zeroed-grain"),
            OptionKind::Switch,
            "Enable efficient zero writes using the zeroed-grain GTE feature",
        ),
    ],
    size_unit: SECTOR,
    create: |request| Box::pin(create(request)),
};

const SUBFORMATS: [&str; 5] = [
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
];
const ADAPTERS: [&str; 4] = ["ide", "buslogic", "lsilogic", "legacyESX"];

/// Most bytes of an extent of the types whose names say so.
const SPLIT_BYTES: u64 = 2 << 30;
const GRAIN_SECTORS: u64 = 128;
const TABLE_ENTRIES: u64 = 512;
const TABLE_SECTORS: u64 = TABLE_ENTRIES * 4 / SECTOR;
const DESCRIPTOR_AT: u64 = 1;
const DESCRIPTOR_SECTORS: u64 = 20;
/// Most bytes of a disk.
const MAX_DISK: u64 = 1 << 46;

/// What is made.
struct New {
    size: u64,
    subformat: &'static str,
    adapter: &'static str,
    hardware_version: String,
    tools_version: String,
    zero_grains: bool,
    parent: Option<(u32, String)>,
    cid: u32,
}

impl New {
    fn is_flat(&self) -> bool {
        matches!(self.subformat, "monolithicFlat" | "twoGbMaxExtentFlat")
    }

    fn is_split(&self) -> bool {
        matches!(
            self.subformat,
            "twoGbMaxExtentSparse" | "twoGbMaxExtentFlat"
        )
    }

    fn is_compressed(&self) -> bool {
        self.subformat == "streamOptimized"
    }

    /// The descriptor of an image with these extents.
    fn descriptor(&self, extents: &str) -> String {
        let parent = self
            .parent
            .as_ref()
            .map(|(cid, name)| (*cid, name.as_str()));
        let new = NewDescriptor {
            cid: self.cid,
            parent,
            create_type: self.subformat,
            extents,
            hardware_version: &self.hardware_version,
            tools_version: &self.tools_version,
            adapter: self.adapter,
            sectors: self.size.div_ceil(SECTOR),
        };
        new.text()
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

fn failed(errno: Errno) -> Error {
    Error::io("Error writing the image", errno)
}

/// Takes an option that is one of `values`, the first if it is not given.
fn choice(
    request: &mut CreateRequest<'_>,
    name: &str,
    values: &[&'static str],
) -> Result<&'static str, Error> {
    let Some(given) = request.take_str(name)? else {
        return Ok(values[0]);
    };
    let known = values.iter().find(|value| **value == given);
    known
        .copied()
        .ok_or_else(|| invalid(format!("invalid parameter value: {given}")))
}

async fn take(request: &mut CreateRequest<'_>) -> Result<New, Error> {
    let size = request.take_length()?;
    let adapter = choice(request, "adapter-type", &ADAPTERS)?;
    let backing = request.take_str("backing-file")?;
    let backing_format = request.take_str("backing-fmt")?;
    let compat6 = request.take_bool("compat6")?.unwrap_or(false);
    let hardware_version = request.take_str("hwversion")?;
    let hardware_version = hardware_version.filter(|it| it != "undefined");
    let tools_version = request.take_str("toolsversion")?;
    let subformat = choice(request, "subformat", &SUBFORMATS)?;
    let zero_grains = request.take_bool("zeroed-grain")?.unwrap_or(false);
    if compat6 && hardware_version.is_some() {
        return Err(invalid("compat6 cannot be enabled with hwversion set"));
    }
    let default_version = if compat6 { "6" } else { "4" };
    let mut new = New {
        size,
        subformat,
        adapter,
        hardware_version: hardware_version.unwrap_or_else(|| default_version.to_owned()),
        tools_version: tools_version.unwrap_or_else(|| "2147483647".to_owned()),
        zero_grains,
        parent: None,
        cid: random()?,
    };
    for (name, value) in [
        ("hwversion", &new.hardware_version),
        ("toolsversion", &new.tools_version),
    ] {
        if value.contains(['"', '\n', '\0']) {
            return Err(invalid(format!("Invalid parameter '{name}'")));
        }
    }
    if new.is_flat() && backing.is_some() {
        return Err(invalid("Flat image can't have backing file"));
    }
    if new.is_flat() && zero_grains {
        return Err(invalid("Flat image can't enable zeroed grain"));
    }
    if let Some(name) = backing {
        let cid = parent_cid(request, &name, backing_format.as_deref()).await?;
        new.parent = Some((cid, name));
    }
    if size == 0 {
        return Err(invalid("VMDK disks have at least one sector"));
    }
    if new.is_split() && size.div_ceil(SPLIT_BYTES) > MAX_EXTENTS as u64 {
        let message = format!("Image size {size} takes more than {MAX_EXTENTS} extents");
        return Err(invalid(message));
    }
    if size > MAX_DISK {
        let message = format!("Image size {size} is more than the {MAX_DISK} bytes of VMDK disks");
        return Err(invalid(message));
    }
    Ok(new)
}

/// What the parent's content is now.
async fn parent_cid(
    request: &CreateRequest<'_>,
    name: &str,
    format: Option<&str>,
) -> Result<u32, Error> {
    let other = || invalid("backing_file must be a vmdk image");
    if name.contains(['"', '\n', '\0']) || format.is_some_and(|format| format != "vmdk") {
        return Err(other());
    }
    let described = request
        .describe_backing(name, "vmdk")
        .await?
        .ok_or_else(other)?;
    let specific = described
        .get("format-specific")
        .map(|it| &it["data"]["cid"]);
    let cid = specific.and_then(Value::as_u64);
    u32::try_from(cid.unwrap_or(u64::MAX)).map_err(|_| other())
}

async fn create(request: &mut CreateRequest<'_>) -> Result<(), Error> {
    let preallocation = request.take_preallocation()?;
    let new = take(request).await?;
    if preallocation != Preallocation::Off {
        let message = "Preallocation mode is not supported for VMDK images";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    if !new.is_flat() && !new.is_split() {
        let name = request.filename().unwrap_or_default();
        let base = name.rsplit('/').next().unwrap_or(name).to_owned();
        let file = request.file().await?;
        request.finish()?;
        let line = format!("RW {} SPARSE \"{base}\"\n", new.size.div_ceil(SECTOR));
        return create_sparse(&file, (&new, new.size), Some(new.descriptor(&line))).await;
    }
    let mut names = ExtentNames::take(request)?;
    let mut lines = String::new();
    let (mut rest, mut number) = (new.size, 0_u64);
    while rest > 0 {
        number += 1;
        let length = match new.is_split() {
            true => rest.min(SPLIT_BYTES),
            false => rest,
        };
        rest -= length;
        let kind = if new.is_flat() { "FLAT" } else { "SPARSE" };
        let (file, extent) = names.file(request, (&new, number)).await?;
        let sectors = length.div_ceil(SECTOR);
        lines += &match new.is_flat() {
            true => {
                file.node().resize(Resize::to(sectors * SECTOR)).await?;
                file.node().flush().await.map_err(failed)?;
                format!("RW {sectors} {kind} \"{extent}\" 0\n")
            }
            false => {
                create_sparse(&file, (&new, length), None).await?;
                format!("RW {sectors} {kind} \"{extent}\"\n")
            }
        };
    }
    let file = request.file().await?;
    request.finish()?;
    file.node().resize(Resize::to(0)).await?;
    let descriptor = new.descriptor(&lines);
    write_bytes(&file, 0, descriptor.as_bytes())
        .await
        .map_err(failed)?;
    file.node().flush().await.map_err(failed)
}

/// What the files of extents are called.
enum ExtentNames {
    /// They are made beside the image, whose name is in three parts: directory, stem and the rest.
    Made([String; 3]),
    /// They are nodes that are there, in this order.
    Nodes(std::vec::IntoIter<Value>),
}

impl ExtentNames {
    fn take(request: &mut CreateRequest<'_>) -> Result<Self, Error> {
        match request.take("extents") {
            Some(Value::Array(nodes)) => return Ok(Self::Nodes(nodes.into_iter())),
            Some(_) => {
                return Err(invalid(
                    "Invalid parameter type for 'extents', expected: array",
                ));
            }
            None => {}
        }
        let name = request
            .filename()
            .map_err(|_| invalid("Missing 'extents'"))?;
        let base = name.rfind('/').map_or(0, |slash| slash + 1);
        let (directory, base) = name.split_at(base);
        let (stem, rest) = base.split_at(base.rfind('.').unwrap_or(base.len()));
        Ok(Self::Made([directory, stem, rest].map(str::to_owned)))
    }

    /// The file of the extent with a number, counted from 1, and its name in the descriptor.
    async fn file(
        &mut self,
        request: &mut CreateRequest<'_>,
        (new, number): (&New, u64),
    ) -> Result<(Edge, String), Error> {
        match self {
            Self::Made([directory, stem, rest]) => {
                let infix = match (new.is_split(), new.is_flat()) {
                    (false, _) => "-flat".to_owned(),
                    (true, true) => format!("-f{number:03}"),
                    (true, false) => format!("-s{number:03}"),
                };
                let name = format!("{stem}{infix}{rest}");
                let file = request.data_file(&format!("{directory}{name}")).await?;
                Ok((file, name))
            }
            Self::Nodes(nodes) => {
                let missing = || invalid(format!("Extent [{}] not specified", number - 1));
                let node = nodes.next().ok_or_else(missing)?;
                let node = node.as_str().ok_or_else(|| {
                    invalid("Invalid parameter type for 'extents', expected: node names")
                })?;
                let file = request.data_node(node)?;
                let full = file.node().filename();
                let name = full.rsplit('/').next().unwrap_or(&full).to_owned();
                Ok((file, name))
            }
        }
    }
}

/// Makes a sparse extent: the header comes last.
async fn create_sparse(
    file: &Edge,
    (new, size): (&New, u64),
    descriptor: Option<String>,
) -> Result<(), Error> {
    let sectors = size.div_ceil(SECTOR);
    let tables = sectors.div_ceil(GRAIN_SECTORS).div_ceil(TABLE_ENTRIES);
    let directory_sectors = (tables * 4).div_ceil(SECTOR);
    let all = directory_sectors + tables * TABLE_SECTORS;
    let redundant = DESCRIPTOR_AT + DESCRIPTOR_SECTORS;
    let directory = redundant + all;
    let grains = (directory + all).next_multiple_of(GRAIN_SECTORS);
    zero_file(file, grains * SECTOR).await?;
    for first in [redundant, directory] {
        let table = |number| (first + directory_sectors + number * TABLE_SECTORS) as u32;
        let entries: Vec<u8> = (0..tables).flat_map(|it| table(it).to_le_bytes()).collect();
        write_bytes(file, first * SECTOR, &entries)
            .await
            .map_err(failed)?;
    }
    if let Some(descriptor) = descriptor {
        if descriptor.len() as u64 > DESCRIPTOR_SECTORS * SECTOR {
            return Err(invalid("the VMDK descriptor is too long"));
        }
        let at = DESCRIPTOR_AT * SECTOR;
        write_bytes(file, at, descriptor.as_bytes())
            .await
            .map_err(failed)?;
    }
    file.node().flush().await.map_err(failed)?;
    let header = encode_header(new, sectors, [redundant, directory, grains]);
    write_bytes(file, 0, &header).await.map_err(failed)?;
    file.node().flush().await.map_err(failed)
}

fn encode_header(new: &New, sectors: u64, places: [u64; 3]) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    let mut put = |offset: usize, field: &[u8]| {
        bytes[offset..offset + field.len()].copy_from_slice(field);
    };
    let version: u32 = match (new.is_compressed(), new.zero_grains) {
        (true, _) => 3,
        (false, true) => 2,
        (false, false) => 1,
    };
    let flag = |flag: u32, is_set: bool| if is_set { flag } else { 0 };
    let flags = FLAG_NEW_LINES
        | FLAG_REDUNDANT
        | flag(FLAG_ZERO_GRAINS, new.zero_grains)
        | flag(FLAG_COMPRESSED | FLAG_MARKERS, new.is_compressed());
    put(0, &HOSTED_MAGIC);
    put(4, &version.to_le_bytes());
    put(8, &flags.to_le_bytes());
    for (offset, field) in [
        (12, sectors),
        (20, GRAIN_SECTORS),
        (28, DESCRIPTOR_AT),
        (36, DESCRIPTOR_SECTORS),
        (48, places[0]),
        (56, places[1]),
        (64, places[2]),
    ] {
        put(offset, &field.to_le_bytes());
    }
    put(44, &(TABLE_ENTRIES as u32).to_le_bytes());
    put(73, b"\n \r\n");
    if new.is_compressed() {
        put(77, &DEFLATE.to_le_bytes());
    }
    bytes
}
