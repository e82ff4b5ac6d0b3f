//! Opening an image: what the file is, the extents that it names, the parent.

use super::SECTOR;
use super::descriptor::{self, Descriptor, ExtentLine, ExtentType, MAX_BYTES};
use super::driver::{Part, Storage, Vmdk};
use super::header::{self, COWD_MAGIC, Found, HOSTED_MAGIC, Layout};
use super::image::{Content, Parent};
use super::sparse::{Belonging, Sparse};
use crate::bytes::read_bytes;
use block::open::{BackingName, ChildRole};
use block::{Driver, Edge, Error, ErrorKind, FormatNode, OpenRequest, Purpose};
use std::sync::Arc;

/// A file that an extent is in, opened, with what its header says if it is sparse.
struct Opened {
    edge: Arc<Edge>,
    layout: Option<Layout>,
}

/// What is known of an extent before the parent is.
struct Planned {
    sectors: u64,
    line: Option<ExtentLine>,
    filename: String,
    /// Absent when the image is only described.
    opened: Option<Opened>,
}

fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

/// Opens a node.
///
/// # Errors
/// `Corrupt`, `Unsupported`, `Invalid` naming what it is; `Forbidden` by the policy for names; `Io`.
pub(super) async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>, Error> {
    let file = Arc::new(request.required_child("file", ChildRole::Image).await?);
    let start = read_bytes(&file, 0, HOSTED_MAGIC.len()).await;
    let start = start.map_err(|errno| Error::io("Could not read the header", errno))?;
    let found = match start.first_chunk() {
        Some(&HOSTED_MAGIC | &COWD_MAGIC) => header::read(&file).await?,
        _ => Found::DescriptorAt(0),
    };
    let (text_at, text, plans, create_type) = match found {
        Found::Extent(layout) => {
            refuse_writes(request, &layout)?;
            let (at, text) = match layout.descriptor {
                Some(place) => (
                    place.offset,
                    read_text(&file, place.offset, place.length).await?,
                ),
                None => (0, Vec::new()),
            };
            let kind = match layout.compressed {
                true => "streamOptimized",
                false => "monolithicSparse",
            };
            let plan = Planned {
                sectors: layout.sectors,
                line: None,
                filename: file.node().filename(),
                opened: Some(Opened {
                    edge: Arc::clone(&file),
                    layout: Some(layout),
                }),
            };
            (at, text, vec![plan], kind.to_owned())
        }
        Found::DescriptorAt(at) => {
            let length = file.node().length().saturating_sub(at);
            let text = read_text(&file, at, length).await?;
            let create_type = known_type(&text)?;
            let plans = named_extents(request, (&file, &text)).await?;
            (at, text, plans, create_type)
        }
    };
    let descriptor = Descriptor::parse(&text)?;
    let named = descriptor.parent.as_deref().map(|name| BackingName {
        name,
        format: Some("vmdk"),
    });
    let backing = request.backing(&file, named).await?;
    let parent = backing.map(|edge| Arc::new(Parent::new(edge, &descriptor)));
    let has_parent = descriptor.has_parent();
    let mut parts = Vec::with_capacity(plans.len());
    let mut start = 0;
    for plan in plans {
        let belonging = Belonging {
            start,
            parent: parent.clone(),
            has_parent,
        };
        let part = plan.open(belonging).await?;
        start = part.end;
        parts.push(part);
    }
    Ok(Box::new(Vmdk {
        content: Content::new(descriptor.cid, text_at),
        file,
        descriptor,
        create_type,
        parent,
        parts,
    }))
}

impl Planned {
    async fn open(self, to: Belonging) -> Result<Part, Error> {
        let start = to.start;
        let length = self.sectors.checked_mul(SECTOR);
        let end = length.and_then(|length| start.checked_add(length));
        let end = end.filter(|end| *end <= i64::MAX as u64);
        let end = end.ok_or_else(|| corrupt("the extents are longer than any disk"))?;
        let storage = match (self.opened, &self.line) {
            (None, _) => Storage::Closed,
            (Some(Opened { edge, layout }), line) => match (layout, line) {
                (Some(layout), _) => {
                    let sparse = Sparse::open(edge, layout, to).await?;
                    Storage::Sparse(Box::new(FormatNode::new(sparse)))
                }
                (None, line) => {
                    let first = line.as_ref().map_or(0, |line| line.first_sector);
                    Storage::Flat(Arc::clone(&edge), flat_start(&edge, first, end - start)?)
                }
            },
        };
        let kind = self.line.map(|line| line.kind);
        Ok(Part::new((start, end), storage, (kind, self.filename)))
    }
}

/// Where a flat extent begins in its file, which holds all of it.
fn flat_start(edge: &Edge, first_sector: u64, length: u64) -> Result<u64, Error> {
    let there = edge.node().length();
    let first = first_sector.checked_mul(SECTOR);
    let needed = first.and_then(|first| first.checked_add(length));
    match (first, needed) {
        (Some(first), Some(needed)) if needed <= there => Ok(first),
        _ => {
            let name = edge.node().filename();
            let needed = u128::from(first_sector) * u128::from(SECTOR) + u128::from(length);
            let message = format!(
                "the flat extent '{name}' is too short: it has {there} bytes, {needed} are needed"
            );
            Err(corrupt(message))
        }
    }
}

/// A descriptor of at most `length` bytes.
async fn read_text(file: &Edge, offset: u64, length: u64) -> Result<Vec<u8>, Error> {
    if length > MAX_BYTES {
        let message = format!("the VMDK descriptor of {length} bytes is longer than {MAX_BYTES}");
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let text = read_bytes(file, offset, length as usize).await;
    text.map_err(|errno| Error::io("Could not read the VMDK descriptor", errno))
}

/// The type of a descriptor whose extents are in files of their own.
fn known_type(text: &[u8]) -> Result<String, Error> {
    let known = [
        "monolithicFlat",
        "vmfs",
        "vmfsSparse",
        "seSparse",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
    ];
    match Descriptor::parse(text)?.create_type {
        None => Err(corrupt("invalid VMDK image descriptor")),
        Some(name) if known.contains(&name.as_str()) => Ok(name),
        Some(name) => {
            let message = format!("Unsupported image type '{}'", name.escape_debug());
            Err(Error::new(ErrorKind::Unsupported, message))
        }
    }
}

/// What version 3 has beside its grains has to stay as it is.
fn refuse_writes(request: &OpenRequest<'_>, layout: &Layout) -> Result<(), Error> {
    let writes = !request.node().read_only && request.purpose() == Purpose::Serve;
    match layout.version == 3 && !layout.compressed && writes {
        true => Err(Error::new(
            ErrorKind::Unsupported,
            "VMDK version 3 must be read only",
        )),
        false => Ok(()),
    }
}

/// Opens the files that a descriptor names, each once; none of them when the image is described.
async fn named_extents(
    request: &mut OpenRequest<'_>,
    (file, text): (&Arc<Edge>, &[u8]),
) -> Result<Vec<Planned>, Error> {
    let lines = descriptor::extents(text)?;
    if lines.is_empty() {
        return Err(corrupt("the VMDK descriptor names no extent"));
    }
    let is_relative = lines.iter().any(|line| !line.name.starts_with('/'));
    let directory = match is_relative {
        false => String::new(),
        true => file.node().base_directory().map_err(|error| {
            let name = file.node().filename();
            let context = format!("Cannot use relative paths with VMDK descriptor file '{name}'");
            error.context(context)
        })?,
    };
    let mut given = given_extents(request, &lines).await?.into_iter();
    let mut plans: Vec<Planned> = Vec::with_capacity(lines.len());
    let mut sectors = 0_u64;
    for (index, line) in lines.into_iter().enumerate() {
        if line.kind == ExtentType::SeSparse && request.only_reads().is_err() {
            let message = "No write support for seSparse images available";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let filename = match line.name.starts_with('/') {
            true => line.name.clone(),
            false => format!("{directory}{}", line.name),
        };
        let mut plan = Planned {
            sectors: line.sectors,
            filename,
            opened: None,
            line: Some(line),
        };
        if let Some(edge) = given.next() {
            plan.filename = edge.node().filename();
            plan.open_header(request, Arc::new(edge)).await?;
        } else if request.purpose() != Purpose::Describe {
            let edge = plan.open_file(request, (file, index), &plans).await?;
            plan.open_header(request, edge).await?;
        }
        sectors = sectors.saturating_add(plan.sectors);
        if sectors > i64::MAX as u64 / SECTOR {
            return Err(corrupt("the extents are longer than any disk"));
        }
        plans.push(plan);
    }
    Ok(plans)
}

/// The nodes that a user gives for the extents: for all of them, or for none.
async fn given_extents(
    request: &mut OpenRequest<'_>,
    lines: &[ExtentLine],
) -> Result<Vec<Edge>, Error> {
    let given = request.children("extents", ChildRole::Image).await?;
    match given.len() {
        0 => Ok(given),
        count if count == lines.len() => Ok(given),
        count => {
            let message = format!("{count} extents are given, the image has {}", lines.len());
            Err(Error::new(ErrorKind::Invalid, message))
        }
    }
}

impl Planned {
    /// Opens the file that the descriptor names, or finds it among those before.
    async fn open_file(
        &self,
        request: &mut OpenRequest<'_>,
        (file, index): (&Arc<Edge>, usize),
        before: &[Planned],
    ) -> Result<Arc<Edge>, Error> {
        let Some(line) = &self.line else {
            return Ok(Arc::clone(file));
        };
        let same = |plan: &&Planned| plan.filename == self.filename;
        let known = before.iter().find(same).and_then(|it| it.opened.as_ref());
        Ok(match (known, line.kind.is_flat()) {
            (Some(known), true) if known.layout.is_none() => Arc::clone(&known.edge),
            (Some(_), _) => {
                let message = format!("the extent '{}' is named twice", self.filename);
                return Err(corrupt(message));
            }
            (None, is_flat) => {
                let role = match is_flat {
                    true => ChildRole::Data,
                    false => ChildRole::Image,
                };
                let named = (index, line.name.as_str());
                Arc::new(request.extent_named(file, named, role).await?)
            }
        })
    }

    /// Reads what the extent says about itself.
    async fn open_header(
        &mut self,
        request: &OpenRequest<'_>,
        edge: Arc<Edge>,
    ) -> Result<(), Error> {
        let kind = self.line.as_ref().map(|line| line.kind);
        let layout = match kind.unwrap_or(ExtentType::Sparse) {
            ExtentType::Flat | ExtentType::Vmfs => None,
            ExtentType::SeSparse => Some(header::read_se_sparse(&edge).await?),
            ExtentType::Sparse | ExtentType::VmfsSparse => match header::read(&edge).await? {
                Found::Extent(layout) => Some(layout),
                Found::DescriptorAt(_) => {
                    let message = format!("the extent '{}' is a descriptor", self.filename);
                    return Err(corrupt(message));
                }
            },
        };
        if let Some(layout) = &layout {
            refuse_writes(request, layout)?;
            self.sectors = layout.sectors;
        }
        self.opened = Some(Opened { edge, layout });
        Ok(())
    }
}
