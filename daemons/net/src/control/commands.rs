//! The command table, and the commands about the daemon itself.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use qmp::{Arguments, Command, CommandTable, Error, Result, Value, json};
use serde::Deserialize;

use super::{Netd, capture, groups, iothreads, netdevs, ports, query, switches};
use crate::link::LocalFuture;

/// What runs a command, on the control thread. Descriptors are those that its client passed last.
pub(super) type Handler = for<'a> fn(
    &'a Rc<Netd>,
    Arguments,
    &'a mut VecDeque<OwnedFd>,
) -> LocalFuture<'a, Result<Value>>;

/// One line per command: its name and the async function that runs it.
macro_rules! commands {
    ($($name:literal => $function:path,)*) => {
        &[$(Command {
            name: $name,
            handler: |netd, arguments, _fds| Box::pin($function(netd, arguments)),
        },)*]
    };
}

const COMMANDS: &[Command<Handler>] = commands! {
    "announce-self" => ports::announce_self,
    "capture-start" => capture::start,
    "capture-stop" => capture::stop,
    "closefd" => closefd,
    "group-add" => groups::add,
    "group-del" => groups::del,
    "netdev_add" => netdevs::add,
    "netdev_del" => netdevs::del,
    "object-add" => iothreads::object_add,
    "object-del" => iothreads::object_del,
    "port-add" => ports::add,
    "port-del" => ports::del,
    "query-commands" => query_commands,
    "query-groups" => groups::query,
    "query-iothreads" => iothreads::query,
    "query-netdevs" => netdevs::query,
    "query-ports" => query::ports,
    "query-status" => query_status,
    "query-switch" => switches::query,
    "query-version" => query_version,
    "quit" => quit,
    "set-group-rate" => groups::set_rate,
    "set-port-guard" => ports::set_guard,
    "set-port-mtu" => ports::set_mtu,
    "set-port-rate" => ports::set_rate,
    "set_link" => ports::set_link,
};

/// Commands that take a descriptor of their client.
const WITH_FDS: &[Command<Handler>] = &[Command {
    name: "getfd",
    handler: |netd, arguments, fds| Box::pin(getfd(netd, arguments, fds)),
}];

/// The table of all commands.
pub(super) fn table() -> CommandTable<Handler> {
    CommandTable::new([COMMANDS, WITH_FDS])
}

#[derive(Deserialize)]
struct FdName {
    fdname: String,
}

/// Keeps the descriptor that came with the command under a name, for options of later commands.
async fn getfd(
    netd: &Rc<Netd>,
    arguments: Arguments,
    fds: &mut VecDeque<OwnedFd>,
) -> Result<Value> {
    let FdName { fdname } = arguments.parse()?;
    let missing = || Error::generic("No file descriptor supplied via SCM_RIGHTS");
    let fd = fds.pop_front().ok_or_else(missing)?;
    let passed = netd.fds.pass(&fdname, fd);
    passed.map_err(|error| Error::generic(error.to_string()))?;
    Ok(json!({}))
}

async fn closefd(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    let FdName { fdname } = arguments.parse()?;
    let closed = netd.fds.close(&fdname);
    closed.map_err(|error| Error::generic(error.to_string()))?;
    Ok(json!({}))
}

/// What scripts ask of a machine: here it always runs.
async fn query_status(_netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    Ok(json!({ "running": true, "singlestep": false, "status": "running" }))
}

async fn query_version(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    Ok(json!(netd.version))
}

async fn query_commands(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    Ok(netd.table.describe())
}

async fn quit(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    netd.quit.set();
    Ok(json!({}))
}
