//! Command tables: a name and a handler per line.
//!
//! A daemon keeps one static slice per group of commands and builds a [`CommandTable`] from them.
//! The handler type is the daemon's: a plain function for a blocking server
//! ([`SyncHandler`], with [`CommandTable::dispatch`]), a function that returns a boxed future for
//! an asynchronous one.
//!
//! ```
//! use qmp::{Arguments, Command, CommandTable, Result, SyncHandler, Value, json};
//!
//! struct Machine { running: bool }
//!
//! fn stop(machine: &mut Machine, arguments: Arguments) -> Result<Value> {
//!     arguments.finish()?;
//!     machine.running = false;
//!     Ok(json!({}))
//! }
//!
//! const COMMANDS: &[Command<SyncHandler<Machine>>] = &[Command { name: "stop", handler: stop }];
//! let table = CommandTable::new([COMMANDS]);
//! assert!(table.find("stop").is_ok());
//! ```

use crate::{Arguments, Error, Request, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// One line of a table.
#[derive(Clone, Copy, Debug)]
pub struct Command<H: 'static> {
    /// The word after `execute`.
    pub name: &'static str,
    /// What runs it.
    pub handler: H,
}

/// The handler of a server that answers one command after the other.
pub type SyncHandler<C> = fn(&mut C, Arguments) -> Result<Value>;

/// All commands of a server. `qmp_capabilities` belongs to the session and is never in it.
#[derive(Clone, Debug)]
pub struct CommandTable<H: 'static> {
    commands: BTreeMap<&'static str, H>,
}

impl<H: Copy> CommandTable<H> {
    /// A table of every command in `groups`. Two commands of one name are a bug, found here.
    pub fn new(groups: impl IntoIterator<Item = &'static [Command<H>]>) -> Self {
        let mut commands = BTreeMap::new();
        for command in groups.into_iter().flatten() {
            let previous = commands.insert(command.name, command.handler);
            assert!(previous.is_none(), "two commands named {}", command.name);
        }
        Self { commands }
    }

    /// The handler of `name`.
    pub fn find(&self, name: &str) -> Result<H> {
        let handler = self.commands.get(name).copied();
        handler.ok_or_else(|| Error::command_not_found(name))
    }

    /// The handler that `request` asks for, which must be allowed to run when it asks.
    pub fn handler_of(&self, request: &Request) -> Result<H> {
        let handler = self.find(&request.command)?;
        if request.out_of_band {
            let name = &request.command;
            return Err(Error::generic(format!(
                "The command {name} does not support OOB"
            )));
        }
        Ok(handler)
    }

    /// The answer to `query-commands`.
    pub fn describe(&self) -> Value {
        let names = self.commands.keys().copied();
        let all = names.chain(["qmp_capabilities"]);
        all.map(|name| json!({ "name": name })).collect()
    }
}

impl<C> CommandTable<SyncHandler<C>> {
    /// Runs `request` on `context`; the result goes to [`crate::Session::reply`].
    pub fn dispatch(&self, context: &mut C, request: &Request) -> Result<Value> {
        let handler = self.handler_of(request)?;
        handler(context, request.arguments())
    }
}
