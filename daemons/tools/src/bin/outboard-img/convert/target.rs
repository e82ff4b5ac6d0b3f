//! The target: its options, making it, opening it.

use super::request::Request;
use crate::create::{find, known, make_file};
use block::{DriverEntry, OptionSpec};
use serde_json::{Map, Value, json};
use tools::failure::{Failure, described};
use tools::image::{Access, Image, Opening, Tool};
use tools::options::Given;

/// What a format without compression answers.
pub(super) const NO_COMPRESSION: &str = "Compression not supported for this file format";

/// A target that is known to make sense.
pub(super) struct Prepared<'r> {
    request: &'r Request,
    /// What is to be made; `None` when the target is there.
    new: Option<New>,
}

struct New {
    entry: &'static DriverEntry,
    known: Vec<&'static OptionSpec>,
    given: Given,
}

impl<'r> Prepared<'r> {
    /// Checks the options for a disk of `length` bytes. What the target's own options say of a
    /// backing becomes part of `request`.
    pub(super) fn new(tool: &Tool, request: &'r mut Request, length: u64) -> Result<Self, Failure> {
        let new = match request.existing {
            true => None,
            false => Some(New::of(tool, request, length)?),
        };
        if let Some(backing) = new.as_ref().and_then(|new| new.given.text("backing_file")) {
            request.backing = Some(backing.to_owned());
        }
        let of_new = |name| new.as_ref().and_then(|new| new.given.text(name));
        let message = if request.target_is_zero && request.has_backing() {
            "Cannot use --target-is-zero when the destination image has a backing file"
        } else if request.names.len() > 1 && request.has_backing() {
            "Having a backing file for the target makes no sense when concatenating multiple input \
             images"
        } else if of_new("backing_file").is_some() && of_new("backing_fmt").is_none() {
            "Use of backing file requires explicit backing format"
        } else if !request.compressed {
            return Ok(Self { request, new });
        } else if new.as_ref().is_some_and(|new| !new.entry.compresses) {
            NO_COMPRESSION
        } else if of_new("encryption") == Some("on") || of_new("encrypt.format").is_some() {
            "Compression and encryption not supported at the same time"
        } else if of_new("preallocation").is_some_and(|mode| mode != "off") {
            "Compression and preallocation not supported at the same time"
        } else {
            return Ok(Self { request, new });
        };
        Err(Failure::message(message))
    }

    /// The request, with what the target's options say.
    pub(super) fn request(&self) -> &'r Request {
        self.request
    }

    /// Makes a new target.
    pub(super) async fn make(&self, tool: &Tool) -> Result<(), Failure> {
        let Some(new) = &self.new else {
            return Ok(());
        };
        let target = (self.request.target.as_str(), new.entry);
        let made = make_file(tool, target, (&new.known, &new.given)).await;
        made.map_err(|error| {
            let (name, format) = (&self.request.target, new.entry.name);
            let context = format!("{name}: error while converting {format}");
            Failure::message(described(&context, &error))
        })
    }

    /// Opens the target for writing.
    pub(super) async fn open(&self, tool: &Tool) -> Result<Image, Failure> {
        let request = self.request;
        request.allow_backing(tool);
        let opening = Opening {
            cache: request.target_cache,
            ..Opening::new(Access::Write)
        };
        let spec = request.target_spec();
        let mut options = tool.prepare(&spec, opening)?;
        if request.sparse.is_some() {
            options.entry("discard").or_insert(json!("unmap"));
        }
        if let Some(new) = &self.new {
            options.extend(new.secrets());
        }
        tool.open_prepared(&spec, opening, options).await
    }
}

impl New {
    fn of(tool: &Tool, request: &Request, length: u64) -> Result<Self, Failure> {
        let format = request.target_format.as_deref().unwrap_or("raw");
        let entry = find(tool, format).map_err(Failure::message)?;
        let known = known(tool, entry);
        let mut given = request.given(&known)?;
        given
            .set(&known, "size", &length.to_string())
            .map_err(Failure::message)?;
        let unsupported =
            |what: &str| format!("Backing {what} not supported for file format '{format}'");
        for (option, value, what) in [
            ("backing_file", &request.backing, "file"),
            ("backing_fmt", &request.backing_format, "format"),
        ] {
            if let Some(value) = value {
                let set = given.set(&known, option, value);
                set.map_err(|_| Failure::message(unsupported(what)))?;
            }
        }
        Ok(Self {
            entry,
            known,
            given,
        })
    }

    /// The names of secrets among the options, which opening needs, too.
    fn secrets(&self) -> Map<String, Value> {
        let mut secrets = Map::new();
        if let Some(secret) = self.given.text("key-secret") {
            secrets.insert("key-secret".into(), json!(secret));
        }
        if let Some(secret) = self.given.text("encrypt.key-secret") {
            let format = self.given.text("encrypt.format").unwrap_or("aes");
            let encrypt = json!({"format": format, "key-secret": secret});
            secrets.insert("encrypt".into(), encrypt);
        }
        secrets
    }
}
