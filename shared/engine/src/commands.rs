//! The command table, and the commands about the daemon itself.

use std::rc::Rc;

use block::BoxFuture;
use qmp::{Arguments, Command, CommandTable, Result, Value, json};

use crate::engine::Engine;
use crate::jobs::{self, commands as job_commands};
use crate::{
    bitmaps, block_stats, chardevs, exports, graph_query, nodes, objects, overlays, qom, schema,
    snapshots, transaction,
};

/// What runs a command. The future runs on the control thread.
pub type Handler = for<'a> fn(&'a Rc<Engine>, Arguments) -> BoxFuture<'a, Result<Value>>;

/// One line per command: its name and the async function that runs it.
macro_rules! commands {
    ($($name:literal => $function:path,)*) => {
        &[$(Command {
            name: $name,
            handler: |engine, arguments| Box::pin($function(engine, arguments)),
        },)*]
    };
}

/// What each takes and answers is in `schema/commands.schema`; a test holds the two together.
const COMMANDS: &[Command<Handler>] = commands! {
    "block-dirty-bitmap-add" => bitmaps::add,
    "block-dirty-bitmap-clear" => bitmaps::clear,
    "block-dirty-bitmap-disable" => bitmaps::disable,
    "block-dirty-bitmap-enable" => bitmaps::enable,
    "block-dirty-bitmap-merge" => bitmaps::merge,
    "block-dirty-bitmap-remove" => bitmaps::remove,
    "block-export-add" => exports::block_export_add,
    "block-export-del" => exports::block_export_del,
    "block-job-cancel" => job_commands::block_job_cancel,
    "block-job-complete" => job_commands::block_job_complete,
    "block-job-dismiss" => job_commands::block_job_dismiss,
    "block-job-finalize" => job_commands::block_job_finalize,
    "block-job-pause" => job_commands::block_job_pause,
    "block-job-resume" => job_commands::block_job_resume,
    "block-job-set-speed" => job_commands::set_speed,
    "block-latency-histogram-set" => block_stats::set_histogram,
    "block-set-write-threshold" => block_stats::set_write_threshold,
    "block_resize" => nodes::block_resize,
    "blockdev-add" => nodes::blockdev_add,
    "blockdev-create" => jobs::blockdev_create,
    "blockdev-del" => nodes::blockdev_del,
    "blockdev-reopen" => overlays::blockdev_reopen,
    "blockdev-snapshot" => overlays::snapshot,
    "blockdev-snapshot-delete-internal-sync" => snapshots::delete,
    "blockdev-snapshot-internal-sync" => snapshots::create,
    "change-backing-file" => overlays::change_backing_file,
    "chardev-add" => chardevs::add,
    "chardev-change" => chardevs::change,
    "chardev-remove" => chardevs::remove,
    "chardev-send-break" => chardevs::send_break,
    "blockdev-snapshot-sync" => overlays::snapshot_sync,
    "job-cancel" => job_commands::cancel,
    "job-complete" => job_commands::complete,
    "job-dismiss" => job_commands::dismiss,
    "job-finalize" => job_commands::finalize,
    "job-pause" => job_commands::pause,
    "job-resume" => job_commands::resume,
    "nbd-server-add" => exports::nbd_server::add,
    "nbd-server-remove" => exports::nbd_server::remove,
    "nbd-server-start" => exports::nbd_server::start,
    "nbd-server-stop" => exports::nbd_server::stop,
    "object-add" => objects::object_add,
    "object-del" => objects::object_del,
    "query-block" => query_block,
    "query-block-exports" => exports::query_block_exports,
    "query-block-jobs" => job_commands::query_block_jobs,
    "query-blockstats" => block_stats::query,
    "query-chardev" => chardevs::query,
    "query-chardev-backends" => chardevs::query_backends,
    "query-commands" => query_commands,
    "query-iothreads" => objects::query_iothreads,
    "query-jobs" => job_commands::query_jobs,
    "query-named-block-nodes" => nodes::query_named_block_nodes,
    "query-qmp-schema" => schema::query,
    "query-version" => query_version,
    "quit" => quit,
    "qom-get" => qom::get,
    "qom-list" => qom::list,
    "qom-list-properties" => qom::list_properties,
    "qom-list-types" => qom::list_types,
    "qom-set" => qom::set,
    "ringbuf-read" => chardevs::ringbuf_read,
    "ringbuf-write" => chardevs::ringbuf_write,
    "transaction" => transaction::transaction,
    "x-blockdev-amend" => jobs::x_blockdev_amend,
    "x-blockdev-change" => overlays::blockdev_change,
    "x-blockdev-set-iothread" => graph_query::set_iothread,
    "x-debug-block-dirty-bitmap-sha256" => bitmaps::sha256,
    "x-debug-query-block-graph" => graph_query::debug_graph,
    "x-block-export-set-iothread" => exports::set_iothread,
};

/// The table of all commands.
pub fn table() -> CommandTable<Handler> {
    CommandTable::new([COMMANDS])
}

/// Devices are the system emulator's; there are none here.
async fn query_block(_engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    Ok(json!([]))
}

async fn query_version(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    Ok(json!(engine.version))
}

async fn query_commands(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    Ok(engine.commands().describe())
}

async fn quit(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    engine.request_quit();
    Ok(json!({}))
}
