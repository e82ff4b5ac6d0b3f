//! Opening what an image names.
//!
//! ```text
//!   plain name ──names::resolve──► descriptor ─► file ─► format (stored in the image; probed by tools)
//!   json:, nbd:, ... ──Names::options──► Definition, source = Image ──obey, each node──► nodes
//! ```

use super::names::{self, Access, FileId};
use super::{
    ChildRole, Definition, DriverEntry, FILE_PROTOCOL, Inherited, Options, Place, Source, as_map,
};
use crate::check::Purpose;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, NamePolicy};
use crate::naming::{Names, Reach, has_protocol};
use crate::node::{Node, NodeOptions};
use serde_json::{Map, Value};
use std::sync::Arc;

/// A backing file as an image names it.
#[derive(Clone, Copy, Debug)]
pub struct BackingName<'n> {
    /// A file name, or one with a protocol.
    pub name: &'n str,
    /// The format, when the image tells it.
    pub format: Option<&'n str>,
}

/// What an image names, and where the image is.
pub(super) struct Named<'n> {
    /// What the image is in.
    pub(super) image: &'n Node,
    pub(super) backing: BackingName<'n>,
    /// The user's options beside the name.
    pub(super) options: Map<String, Value>,
}

impl Graph {
    /// Opens the backing image of the image in `of`, to be described: under the same policy as
    /// for use, and without its own backing.
    ///
    /// # Errors
    /// As for opening a node; `Forbidden` by policy.
    pub async fn describe_backing(
        &self,
        of: &Node,
        name: &str,
        format: Option<&str>,
    ) -> Result<Arc<Node>> {
        let named = Named {
            image: of,
            backing: BackingName { name, format },
            options: Map::new(),
        };
        let place = Place {
            purpose: Purpose::Describe,
            ..Place::default()
        };
        let inherited = Inherited::of(of.options(), ChildRole::Backing);
        self.open_named(named, inherited, place).await
    }

    /// What the image that a user calls `name` says about itself as one of `format`; `None` when it is
    /// none of that format. It may be in use.
    pub(crate) async fn describe_named(
        &self,
        name: &str,
        format: &str,
    ) -> Result<Option<Map<String, Value>>> {
        let mut options = self.definition_of(name)?;
        let given = options.insert("driver".to_owned(), format.into());
        let is_other = given.is_some_and(|given| given != *format);
        let (false, Some(Value::Object(file))) = (is_other, options.shift_remove("file")) else {
            return Ok(None);
        };
        let shared = NodeOptions {
            read_only: true,
            force_share: true,
            ..NodeOptions::default()
        };
        let inherited = Some(Inherited::of(&shared, ChildRole::Backing));
        let place = Place {
            purpose: Purpose::Describe,
            ..Place::default()
        };
        let definition = |options, file, place| Definition {
            options,
            inherited,
            place,
            descriptor: None,
            file,
        };
        let file = self.open(definition(file, None, Place::default())).await?;
        if !self.is_of(&file, format).await? {
            return Ok(None);
        }
        let node = self.open(definition(options, Some(file), place)).await?;
        Ok(Some(node.driver().describe()))
    }

    /// Opens what an image names, when policy allows.
    pub(super) async fn open_named(
        &self,
        Named {
            image,
            backing: BackingName { name, format },
            mut options,
        }: Named<'_>,
        inherited: Inherited,
        mut place: Place,
    ) -> Result<Arc<Node>> {
        let format = match options.get("driver") {
            Some(Value::String(driver)) => Some(driver.clone()),
            _ => format.map(str::to_owned),
        };
        if format.is_none() && !self.probes() {
            let message = format!(
                "the image does not tell the format of its backing file '{name}'; \
                 give 'backing' explicitly or store it (qemu-img rebase -u -F)"
            );
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let read_only = self.read_only_of(&options)?;
        let inherited = inherited.with_read_only(read_only.unwrap_or(inherited.is_read_only()));
        place.chain.extend(files_of(image));
        if has_protocol(name) {
            let directory = image.base_directory().unwrap_or_default();
            let mut definition = self.definition_of(name)?;
            definition.extend(format.map(|format| ("driver".to_owned(), format.into())));
            definition.extend(options);
            let name = name.to_owned();
            place.source = Source::Image { directory, name };
            return self
                .open(Definition {
                    options: definition,
                    inherited: Some(inherited),
                    place,
                    descriptor: None,
                    file: None,
                })
                .await;
        }
        let directory = image.base_directory()?;
        let access = Access::of(&inherited);
        let found = names::resolve(&directory, (name, access), &self.policy())?;
        place.enter(found.id, name)?;
        let mut file_place = place.clone();
        file_place.path.push_str("file.");
        file_place.purpose = Purpose::Serve;
        let file = self
            .open(Definition {
                options: as_map([("driver", FILE_PROTOCOL), ("filename", &found.path)]),
                inherited: Some(inherited),
                place: file_place,
                descriptor: Some(found.descriptor),
                file: None,
            })
            .await?;
        let format = match format {
            Some(format) => format,
            None => self.probe(&file).await?.to_owned(),
        };
        options.insert("driver".into(), format.into());
        self.open(Definition {
            options,
            inherited: Some(inherited),
            place,
            descriptor: None,
            file: Some(file),
        })
        .await
    }

    /// Whether the options of a node say that it is only read.
    fn read_only_of(&self, options: &Map<String, Value>) -> Result<Option<bool>> {
        let mut options = Options::new(options.clone(), String::new());
        options.take_bool("read-only")
    }

    /// What the names of drivers mean.
    pub fn names(&self) -> Names<'_> {
        Names::new(&self.drivers)
    }

    /// The options of the image called `name`: those behind `json:`, or a node of the name's
    /// protocol as `file`. Without `driver` its format is to be found out.
    ///
    /// # Errors
    /// `Invalid` when the name is not understood.
    pub fn definition_of(&self, name: &str) -> Result<Map<String, Value>> {
        let options = self.names().options(name)?;
        if name.starts_with("json:") {
            return Ok(options);
        }
        Ok(Map::from_iter([("file".to_owned(), options.into())]))
    }
}

/// The identities of the files that a node's bytes are in.
pub(super) fn files_of(node: &Node) -> Option<FileId> {
    let below = std::iter::successors(Some(node), |node| {
        let edges = node.driver().edges();
        let found = edges.into_iter().find(|(role, _)| *role == "file");
        found.map(|(_, edge)| edge.node())
    });
    let leaf = below.last()?;
    FileId::of_path(&leaf.exact_filename())
}

impl Definition {
    /// Applies the policy for names in images to a node of `entry`.
    ///
    /// # Errors
    /// `Forbidden`; what opening a file answers.
    pub(crate) fn obey(&mut self, entry: &DriverEntry, policy: &NamePolicy) -> Result<()> {
        let Source::Image { directory, name } = &self.place.source else {
            return Ok(());
        };
        let allowed = policy.allowed_drivers.iter().any(|it| it == entry.name);
        match Reach::of(entry) {
            Reach::Nothing => Ok(()),
            _ if allowed => Ok(()),
            Reach::Outside => Err(names::forbidden(
                name,
                &format!("driver '{}' is not allowed for images", entry.name),
            )),
            Reach::File => {
                let filename = self.options.get("filename").and_then(Value::as_str);
                let path = std::path::absolute(filename.unwrap_or_default());
                let path = path.map_err(|_| names::forbidden(name, "it is not a file name"))?;
                let path = path.display().to_string();
                let access = self.inherited.as_ref().map_or(Access::Read, Access::of);
                let found = names::resolve(directory, (&path, access), policy)?;
                self.place.enter(found.id, &path)?;
                self.descriptor = Some(found.descriptor);
                Ok(())
            }
        }
    }
}
