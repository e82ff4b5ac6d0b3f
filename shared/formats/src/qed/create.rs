//! Making images: an empty L1 table, then the header.

use super::header::{BACKING_FILE, BACKING_IS_RAW, Header, MAX_NAME, NamePlace};
use super::header::{HEADER_BYTES, check_cluster_size, check_table_size};
use crate::two_level::NewImage;
use block::create::{CreateRequest, Creator, OptionKind, OptionSpec};
use block::{ByteRange, Error, ErrorKind, Preallocation};

const DEFAULT_CLUSTER: u64 = 64 << 10;
/// Clusters of a table.
const DEFAULT_TABLE: u64 = 4;

/// How images are made.
pub(super) const CREATOR: Creator = Creator {
    options: &[
        OptionSpec::new(("size", "size"), OptionKind::Size, "Virtual disk size"),
        OptionSpec::new(
            ("backing_file", "backing-file"),
            OptionKind::Text,
            "File name of a base image",
        ),
        OptionSpec::new(
            ("backing_fmt", "backing-fmt"),
            OptionKind::Text,
            "Image format of the base image",
        ),
        OptionSpec::new(
            ("cluster_size", "cluster-size"),
            OptionKind::Size,
            "Cluster size (in bytes)",
        )
        .with_default("65536"),
        OptionSpec::new(
            ("table_size", "table-size"),
            OptionKind::Size,
            "L1/L2 table size (in clusters)",
        ),
    ],
    size_unit: 512,
    create: |request| Box::pin(create(request)),
};

async fn create(request: &mut CreateRequest<'_>) -> Result<(), Error> {
    let size = request.take_length()?;
    let cluster_size = request.take_size("cluster-size")?;
    let cluster_size = check_cluster_size(cluster_size.unwrap_or(DEFAULT_CLUSTER))?;
    let table_size = request.take_size("table-size")?;
    let table_size = check_table_size(table_size.unwrap_or(DEFAULT_TABLE))?;
    let mut header = Header::new((cluster_size, table_size), size)?;
    let name = request.take_str("backing-file")?;
    let format = request.take_str("backing-fmt")?;
    if format.is_some() && name.is_none() {
        let message = "Backing format cannot be used without backing file";
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    refer(&mut header, name.as_deref(), format.as_deref())?;
    if request.take_preallocation()? != Preallocation::Off {
        let message = "Preallocation mode is not supported for QED images";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let file = request.file().await?;
    request.finish()?;
    let image = NewImage {
        l1: ByteRange::new(header.l1_offset, header.table_bytes()),
        name: header
            .name
            .as_ref()
            .zip(name.as_deref())
            .map(|(place, name)| (place.offset.into(), name)),
        header: &header.encode(),
    };
    image.write(&file).await
}

/// Makes a header refer to a backing file, whose name goes where the one before is not.
///
/// # Errors
/// `Invalid` for a name that is too long.
pub(super) fn refer(
    header: &mut Header,
    name: Option<&str>,
    format: Option<&str>,
) -> Result<(), Error> {
    header.features &= !(BACKING_FILE | BACKING_IS_RAW);
    let before = header.name.take();
    let Some(name) = name else {
        return Ok(());
    };
    let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
    if length > MAX_NAME {
        return Err(Error::new(ErrorKind::Invalid, "Backing file name too long"));
    }
    let first = HEADER_BYTES as u32;
    let is_free = before.is_none_or(|it| {
        u64::from(it.offset) >= u64::from(first) + u64::from(MAX_NAME)
            || u64::from(it.offset) + u64::from(it.length) <= u64::from(first)
    });
    header.name = Some(NamePlace {
        offset: match is_free {
            true => first,
            // Both fit into the smallest cluster.
            false => first + MAX_NAME,
        },
        length,
    });
    header.features |= BACKING_FILE;
    if format == Some("raw") {
        header.features |= BACKING_IS_RAW;
    }
    Ok(())
}
