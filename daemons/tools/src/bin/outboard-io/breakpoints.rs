//! The commands that stop and resume requests at events of the block layer.

use crate::command::{Answer, Command, Needs, Problem, Running};
use crate::session::Session;
use block::Node;
use block::debug::{Change, Debugger, Event};
use block::error::reason;
use block::{ChildRole, Errno};
use tools::output;

pub(crate) const BREAK: Command = Command {
    names: &["break"],
    syntax: Some("event tag"),
    about: "sets a breakpoint on event and tags the stopped request as tag",
    help: "",
    words: (2, Some(2)),
    needs: Needs::File,
    run: |session, words| -> Running<'_> { Box::pin(async { set(session, words) }) },
};

pub(crate) const REMOVE: Command = Command {
    names: &["remove_break"],
    syntax: Some("tag"),
    about: "remove a breakpoint by tag",
    help: "",
    words: (1, Some(1)),
    needs: Needs::File,
    run: |session, words| -> Running<'_> { Box::pin(async { remove(session, words) }) },
};

pub(crate) const RESUME: Command = Command {
    names: &["resume"],
    syntax: Some("tag"),
    about: "resumes the request tagged as tag",
    help: "",
    words: (1, Some(1)),
    needs: Needs::File,
    run: |session, words| -> Running<'_> { Box::pin(resume(session, words)) },
};

pub(crate) const WAIT: Command = Command {
    names: &["wait_break"],
    syntax: Some("tag"),
    about: "waits for the suspension of a request",
    help: "",
    words: (1, Some(1)),
    needs: Needs::File,
    run: |session, words| -> Running<'_> { Box::pin(wait(session, words)) },
};

/// The topmost node below `node` that stops requests, itself included.
fn find(node: &Node) -> Option<&dyn Debugger> {
    if let Some(found) = node.driver().debugger() {
        return Some(found);
    }
    let edges = node.driver().edges();
    let primary = edges
        .into_iter()
        .find(|(_, edge)| matches!(edge.role(), ChildRole::Image | ChildRole::Filtered));
    primary.and_then(|(_, edge)| find(edge.node()))
}

/// Does something with the breakpoints of the open file.
fn with(
    session: &Session<'_>,
    action: impl FnOnce(&dyn Debugger) -> Result<(), Errno>,
) -> Result<Result<(), Errno>, Problem> {
    let image = session.opened()?;
    Ok(find(image.node()).map_or(Err(Errno::EOPNOTSUPP), action))
}

fn set(session: &Session<'_>, words: &[&str]) -> Answer {
    let &[event, tag] = words else {
        return Err(Problem::Usage);
    };
    let set = with(session, |points| {
        points.watch(announce);
        points.set_breakpoint(Event::parse(event).ok_or(Errno::ENOENT)?, tag);
        Ok(())
    })?;
    set.map_err(|errno| Problem::line(format!("Could not set breakpoint: {}", reason(errno))))
}

fn announce(change: Change, tag: &str) {
    let verb = match change {
        Change::Suspended => "Suspended",
        Change::Resumed => "Resuming",
    };
    output::line(&format!("blkdebug: {verb} request '{tag}'"));
}

fn remove(session: &Session<'_>, words: &[&str]) -> Answer {
    let tag = words.first().ok_or(Problem::Usage)?;
    with(session, |points| points.remove_breakpoint(tag))?.map_err(|errno| {
        Problem::line(format!(
            "Could not remove breakpoint {tag}: {}",
            reason(errno)
        ))
    })
}

async fn resume(session: &Session<'_>, words: &[&str]) -> Answer {
    let tag = words.first().ok_or(Problem::Usage)?;
    with(session, |points| points.resume(tag))?
        .map_err(|errno| Problem::line(format!("Could not resume request: {}", reason(errno))))?;
    // What was resumed goes as far as it can before the next command.
    executor::time::yield_now().await;
    Ok(())
}

async fn wait(session: &Session<'_>, words: &[&str]) -> Answer {
    let tag = words.first().ok_or(Problem::Usage)?;
    let image = session.opened()?;
    match find(image.node()) {
        Some(points) => points.until_suspended(tag).await,
        None => {
            let reason = reason(Errno::EOPNOTSUPP);
            let message = format!("Could not wait for a suspended request: {reason}");
            return Err(Problem::line(message));
        }
    }
    Ok(())
}
