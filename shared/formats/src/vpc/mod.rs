//! `vpc`: virtual hard disks (VHD) of Virtual PC and Hyper-V, dynamic and fixed (Microsoft's "Virtual Hard
//! Disk Image Format Specification", 1.0). Differences to other images are refused.
//!
//! ```text
//!   last sector a footer that says "fixed"? ──► fixed.rs: the disk as it is, footer behind it
//!        └─ no ─► footer at the start? ───────► dynamic.rs: map, blocks, footer behind them
//! ```
//!
//! The end is asked first: the start of a fixed disk is the guest's, who could make it look like a dynamic
//! one. Disks are as long as their geometry says, or as the footer says, by the program that made them
//! (`footer.rs`; the option `force_size_calc` decides otherwise).
//!
//! Owns: footers, headers, entries; the map takes at most 64 MiB of memory.

mod create;
mod dynamic;
mod fixed;
mod footer;

use crate::bytes::read_bytes;
use block::open::{ChildRole, DriverEntry};
use block::{Driver, Edge, Error, ErrorKind, FormatNode, OpenRequest, Purpose};
use dynamic::{Dynamic, Opened};
use fixed::Fixed;
use footer::{FOOTER_BYTES, Footer, Kind, SizeRule};

/// The table line of `vpc`.
pub const ENTRY: DriverEntry = DriverEntry::new("vpc", |request| Box::pin(open(request)))
    .with_probe(footer::probe)
    .with_strong_options(&["force_size_calc"])
    .with_create(create::CREATOR);

const SECTOR: u64 = 512;

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>, Error> {
    let rule = match request.take_str("force_size_calc")?.as_deref() {
        None => SizeRule::Creator,
        Some("chs") => SizeRule::Geometry,
        Some("current_size") => SizeRule::Footer,
        Some(other) => {
            let message = format!("Invalid size calculation algorithm '{other}'");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
    };
    let file = request.required_child("file", ChildRole::Image).await?;
    let writes = request.purpose() == Purpose::Serve && !request.node().read_only;
    let length = file.node().length();
    let invalid = |what: &str| Err(Error::new(ErrorKind::Corrupt, what));
    let end = match length.checked_sub(FOOTER_BYTES as u64) {
        Some(at) => Footer::parse(&sector(&file, at).await?).ok().flatten(),
        None => return invalid("invalid VPC image"),
    };
    if let Some(footer) = end.filter(|footer| footer.kind == Kind::Fixed) {
        let disk_bytes = footer.disk_bytes(rule)?;
        if writes && disk_bytes > length - FOOTER_BYTES as u64 {
            return invalid("invalid VPC image: the fixed disk is longer than its file");
        }
        return Ok(Box::new(FormatNode::new(Fixed { file, disk_bytes })));
    }
    let bytes = sector(&file, 0).await?;
    let Some(footer) = Footer::parse(&bytes)? else {
        return invalid("invalid VPC image");
    };
    match footer.kind {
        Kind::Dynamic => {}
        Kind::Difference => {
            let message = "vpc: differencing disks are not supported";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Kind::Fixed | Kind::Other(_) => return invalid("invalid VPC image"),
    }
    let opened = Opened {
        footer,
        bytes,
        disk_bytes: footer.disk_bytes(rule)?,
        purpose: request.purpose(),
        writes,
        at_end: end,
    };
    let image = Dynamic::open(file, opened).await?;
    Ok(Box::new(FormatNode::new(image)))
}

async fn sector(file: &Edge, at: u64) -> Result<[u8; FOOTER_BYTES], Error> {
    let bytes = read_bytes(file, at, FOOTER_BYTES).await;
    let bytes = bytes.map_err(|errno| Error::io("Unable to read VHD header", errno))?;
    Ok(*bytes.first_chunk().expect("as many as were asked for"))
}
