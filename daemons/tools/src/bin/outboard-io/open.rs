//! How a file is opened: by the command line, and by `open`.

use crate::command::{Answer, Problem};
use crate::session::{Mode, Opened, Recipe, Session, WriteCache};
use crate::temporary;
use block::{Error, ErrorKind};
use qmp::keyval;
use serde_json::{Map, Value, json};
use tools::failure::{Failure, described, report};
use tools::image::{Access, Cache, ImageSpec, Notation, Opening, Sharing};

/// What the user said about a file to open.
#[derive(Debug, Default)]
pub(crate) struct OpenArguments {
    /// `-f`
    pub(crate) format: Option<String>,
    /// The file's name, when its options do not tell.
    path: Option<String>,
    options: Option<String>,
    read_only: bool,
    snapshot: bool,
    copy_on_read: bool,
    force_share: bool,
    ignore_discards: bool,
    cache: Option<Cache>,
    aio: Option<String>,
}

impl OpenArguments {
    /// Takes an option that `open` and the command line share.
    pub(crate) fn take(&mut self, letter: char, value: &str) -> Result<(), Failure> {
        match letter {
            's' => self.snapshot = true,
            'n' => self.cache = Some(Cache::parse("none")?),
            'C' => self.copy_on_read = true,
            'r' => self.read_only = true,
            'k' => self.aio = Some("native".to_owned()),
            'U' => self.force_share = true,
            't' => self.cache = Some(Cache::parse(value)?),
            'd' => {
                self.ignore_discards = match value {
                    "ignore" | "off" => true,
                    "unmap" | "on" => false,
                    _ => {
                        let message = format!("Invalid discard option: {value}");
                        return Err(Failure::message(message));
                    }
                }
            }
            'i' => {
                if !["threads", "native", "io_uring"].contains(&value) {
                    return Err(Failure::message(format!("Invalid aio option: {value}")));
                }
                self.aio = Some(value.to_owned());
            }
            'o' => self.add_options(value),
            _ => {}
        }
        Ok(())
    }

    /// Takes what names the file.
    pub(crate) fn name(&mut self, text: String, notation: Notation) {
        match notation {
            Notation::Filename => self.path = Some(text),
            Notation::Options => self.add_options(&text),
        }
    }

    /// Adds options of the node, `key=value,...`.
    fn add_options(&mut self, text: &str) {
        match &mut self.options {
            Some(options) => {
                options.push(',');
                options.push_str(text);
            }
            None => self.options = Some(text.to_owned()),
        }
    }

    /// Whether the user gave options of the node.
    pub(crate) fn has_options(&self) -> bool {
        self.options.is_some()
    }

    fn writes(&self) -> bool {
        // With a temporary file the image itself is only read.
        !self.read_only && !self.snapshot
    }

    fn opening(&self) -> Opening {
        Opening {
            access: match self.writes() {
                true => Access::Write,
                false => Access::Read,
            },
            sharing: match self.force_share {
                true => Sharing::Forced,
                false => Sharing::Locked,
            },
            cache: self.cache.unwrap_or_default(),
        }
    }

    /// The options of the node without what the flags add.
    fn definition(&self, session: &Session<'_>) -> Result<Map<String, Value>, Error> {
        let given = match &self.options {
            None => Map::new(),
            Some(text) => keyval::parse(text, None)
                .map_err(|error| invalid(error.desc))?
                .into_members(),
        };
        let driver = given.get("driver").and_then(Value::as_str);
        let mut definition = match &self.path {
            None => Map::new(),
            Some(path) => session.tool.definition(&ImageSpec {
                name: path.clone(),
                format: self.format.clone().or(driver.map(str::to_owned)),
                notation: Notation::Filename,
            })?,
        };
        merge(&mut definition, given);
        if !definition.contains_key("driver") && !definition.contains_key("file") {
            return Err(invalid("Must specify either driver or file"));
        }
        Ok(definition)
    }

    fn add_flags(&self, definition: &mut Map<String, Value>) {
        let discard = match self.ignore_discards {
            true => "ignore",
            false => "unmap",
        };
        definition.entry("discard").or_insert(json!(discard));
        let Some(aio) = &self.aio else { return };
        let is_file = |options: &Map<String, Value>| {
            let driver = options.get("driver").and_then(Value::as_str);
            matches!(driver, Some("file" | "host_device" | "host_cdrom"))
        };
        let file = match is_file(definition) {
            true => Some(definition),
            false => definition.get_mut("file").and_then(Value::as_object_mut),
        };
        if let Some(file) = file.filter(|file| is_file(file)) {
            file.entry("aio").or_insert(json!(aio));
        }
    }

    /// All options of the node.
    fn node_options(&self, session: &Session<'_>) -> Result<Map<String, Value>, Error> {
        let mut definition = self.definition(session)?;
        self.add_flags(&mut definition);
        let name = self.path.clone().unwrap_or_default();
        let spec = ImageSpec {
            name,
            format: None,
            notation: match self.path {
                Some(_) => Notation::Filename,
                None => Notation::Options,
            },
        };
        let tool = session.tool;
        Ok(tool.complete(definition, (&spec, self.opening())))
    }

    async fn recipe(&self, session: &Session<'_>) -> Result<Recipe, Error> {
        if self.copy_on_read && self.read_only {
            return Err(invalid("Can't use copy-on-read on read-only device"));
        }
        let mut options = self.node_options(session)?;
        if self.snapshot {
            options = temporary::overlay(session.tool, options).await?;
        }
        if self.copy_on_read {
            let name = options.shift_remove("node-name");
            let name = name.unwrap_or_else(|| json!("copy-on-read"));
            options = [
                ("driver".to_owned(), json!("copy-on-read")),
                ("node-name".to_owned(), name),
                ("file".to_owned(), Value::Object(options)),
            ]
            .into_iter()
            .collect();
        }
        let is_set = |name: &str| match options.get(name) {
            Some(Value::Bool(set)) => *set,
            Some(Value::String(text)) => text == "on",
            _ => false,
        };
        let mode = match self.read_only || is_set("read-only") {
            true => Mode::ReadOnly,
            false => Mode::ReadWrite,
        };
        let cache = match self.cache {
            Some(cache) if !cache.write_through => WriteCache::Back,
            _ => WriteCache::Through,
        };
        Ok(Recipe {
            options,
            mode,
            cache,
        })
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

/// Puts `changes` over `options`, member by member.
pub(crate) fn merge(options: &mut Map<String, Value>, changes: Map<String, Value>) {
    for (name, change) in changes {
        match (options.get_mut(&name), change) {
            (Some(Value::Object(below)), Value::Object(change)) => merge(below, change),
            (_, change) => {
                options.insert(name, change);
            }
        }
    }
}

/// Opens a file; says why when that fails.
pub(crate) async fn open(session: &Session<'_>, arguments: &OpenArguments) -> Answer {
    if session.image().is_some() {
        return Err(Problem::Error(
            "file open already, try 'help close'".to_owned(),
        ));
    }
    let opened = match arguments.recipe(session).await {
        Ok(recipe) => Opened::open(session.tool, recipe).await,
        Err(error) => Err(error),
    };
    match opened {
        Ok(image) => {
            session.set(image);
            Ok(())
        }
        Err(error) => {
            let context = match &arguments.path {
                Some(path) => format!("can't open device {path}"),
                None => "can't open".to_owned(),
            };
            report(&described(&context, &error));
            Err(Problem::Said)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_options_win_member_by_member() {
        let object = |value: Value| value.as_object().cloned().expect("an object");
        let mut options =
            object(json!({"driver": "raw", "file": {"driver": "file", "aio": "native"}}));
        merge(
            &mut options,
            object(json!({"driver": "qcow2", "file": {"aio": "threads"}})),
        );
        let expected = json!({"driver": "qcow2", "file": {"driver": "file", "aio": "threads"}});
        assert_eq!(Value::Object(options), expected);
    }

    #[test]
    fn modes_that_do_not_exist_are_named() {
        let message = |letter, value| match OpenArguments::default().take(letter, value) {
            Err(Failure::Message(message, _)) => message,
            other => panic!("{other:?}"),
        };
        assert_eq!(message('t', "x"), "Invalid cache option: x");
        assert_eq!(message('d', "x"), "Invalid discard option: x");
        assert_eq!(message('i', "x"), "Invalid aio option: x");
    }
}
