//! The commands that say what there is.

use crate::arguments::number;
use crate::command::{Answer, Command, Needs, Problem, Running};
use crate::report::size;
use crate::session::{Opened, Session};
use block::error::reason;
use block::{ByteRange, Errno, Layer};
use serde_json::Value;
use tools::dump;
use tools::json::ordered;
use tools::output;

/// What is looked at when no length is given, in bytes.
const SECTOR: u64 = 512;

pub(crate) const ALLOC: Command = Command {
    names: &["alloc"],
    syntax: Some("offset [count]"),
    about: "checks if offset is allocated in the file",
    help: "",
    words: (1, Some(2)),
    needs: Needs::File,
    run: |session, words| -> Running<'_> { Box::pin(alloc(session, words)) },
};

pub(crate) const MAP: Command = Command {
    names: &["map"],
    syntax: Some(""),
    about: "prints the allocated areas of a file",
    help: "",
    words: (0, Some(0)),
    needs: Needs::File,
    run: |session, _| -> Running<'_> { Box::pin(map(session)) },
};

pub(crate) const LENGTH: Command = Command {
    names: &["length", "l"],
    syntax: None,
    about: "gets the length of the current file",
    help: "",
    words: (0, Some(0)),
    needs: Needs::File,
    run: |session, _| -> Running<'_> {
        Box::pin(async {
            output::line(&size(session.opened()?.length()));
            Ok(())
        })
    },
};

pub(crate) const INFO: Command = Command {
    names: &["info", "i"],
    syntax: None,
    about: "prints information about the current file",
    help: "",
    words: (0, Some(0)),
    needs: Needs::File,
    run: |session, _| -> Running<'_> { Box::pin(async { info(session) }) },
};

/// Whether the start of `range` is allocated in the file itself, and for how many bytes.
async fn allocated(image: &Opened, range: ByteRange) -> Result<(bool, u64), Errno> {
    let extent = image.status(range).await?;
    let length = extent.length.clamp(1, range.length);
    Ok((extent.status.allocated, length))
}

async fn alloc(session: &Session<'_>, words: &[&str]) -> Answer {
    let (offset, count) = match words {
        [offset, count] => (number(offset)?, number(count)?),
        [offset, ..] => (number(offset)?, SECTOR),
        [] => return Err(Problem::Usage),
    };
    let image = session.opened()?;
    let left = image.length().saturating_sub(offset);
    let count = count.min(left);
    let (mut at, mut sum) = (offset, 0);
    while at < offset + count {
        let range = ByteRange::new(at, offset + count - at);
        let status = allocated(&image, range).await;
        let (is_allocated, length) = status
            .map_err(|errno| Problem::line(format!("is_allocated failed: {}", reason(errno))))?;
        if is_allocated {
            sum += length;
        }
        at += length;
    }
    output::line(&format!(
        "{sum}/{count} bytes allocated at offset {}",
        size(offset)
    ));
    Ok(())
}

async fn map(session: &Session<'_>) -> Answer {
    let image = session.opened()?;
    let end = image.length();
    let mut at = 0;
    while at < end {
        let start = at;
        let mut first = None;
        while at < end {
            let status = allocated(&image, ByteRange::new(at, end - at)).await;
            let (is_allocated, length) =
                status.map_err(|_| Problem::Error("Failed to get allocation status".to_owned()))?;
            if *first.get_or_insert(is_allocated) != is_allocated {
                break;
            }
            at += length;
        }
        let state = match first {
            Some(true) => "    allocated",
            _ => "not allocated",
        };
        output::line(&format!(
            "{} (0x{:x}) bytes {state} at offset {} (0x{start:x})",
            size(at - start),
            at - start,
            size(start)
        ));
    }
    Ok(())
}

fn info(session: &Session<'_>) -> Answer {
    let image = session.opened()?;
    let driver = image.node().driver();
    let facts = driver.describe();
    let cluster_size = facts.get("cluster-size").and_then(Value::as_u64);
    let state = driver.machine_state().map_or(0, |state| state.offset());
    let name = format!("format name: {}", driver.driver_name());
    output::line(&name);
    if driver.layer() == Layer::Protocol {
        // Once for the format, once for the protocol: they are the same.
        output::line(&name);
    }
    // What is no image in a file has neither clusters nor machine state.
    let is_image = facts.contains_key("format-specific");
    if cluster_size.is_none() && !is_image && driver.identity().is_none() {
        return Err(Problem::Said);
    }
    output::line(&format!(
        "cluster size: {}",
        size(cluster_size.unwrap_or(0))
    ));
    output::line(&format!("vm state offset: {}", size(state)));
    if let Some(specific) = facts.get("format-specific") {
        output::print(&dump::specific(&ordered(specific)));
    }
    Ok(())
}
