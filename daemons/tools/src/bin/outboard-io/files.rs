//! The commands that open, close and change the file as a whole.

use crate::arguments::{self, number};
use crate::command::{Answer, Command, Needs, Problem, Running};
use crate::open::{OpenArguments, open};
use crate::reopen::reopen;
use crate::session::Session;
use block::{Preallocation, Resize};
use tools::failure::Failure;
use tools::image::Notation;

pub(crate) const OPEN: Command = Command {
    names: &["open", "o"],
    syntax: Some("[-rsCnkU] [-t cache] [-d discard] [-o options] [path]"),
    about: "open the file specified by path",
    help: "
 Opens a file for the other commands.

 Example:
 'open -n -o driver=raw /tmp/data' - opens raw data without the host's page cache

 -r, -- only for reading
 -s, -- changes go to a temporary file
 -C, -- what is read from a backing file is kept
 -n, -- without the host's page cache, as -t none
 -U, -- though others write to it
 -k, -- asks for the kernel's asynchronous I/O, as -i native
 -i, -- how I/O is done: threads, native or io_uring
 -t, -- how the host's page cache is used
 -d, -- what becomes of discards: ignore or unmap
 -o, -- options of the node
",
    words: (1, None),
    needs: Needs::Nothing,
    run: |session, words| -> Running<'_> { Box::pin(run_open(session, words)) },
};

pub(crate) const CLOSE: Command = Command {
    names: &["close", "c"],
    syntax: None,
    about: "close the current open file",
    help: "",
    words: (0, Some(0)),
    needs: Needs::File,
    run: |session, _| -> Running<'_> { Box::pin(close(session)) },
};

pub(crate) const REOPEN: Command = Command {
    names: &["reopen"],
    syntax: Some("[(-r|-w)] [-c cache] [-o options]"),
    about: "reopens an image with new options",
    help: "
 Changes how the open file is open.

 Example:
 'reopen -o lazy-refcounts=on' - sets an option of qcow2

 -r, -- from now on only for reading
 -w, -- from now on for reading and writing
 -c, -- how the host's page cache is used
 -o, -- options of the node
",
    words: (0, None),
    needs: Needs::File,
    run: |session, words| -> Running<'_> { Box::pin(reopen(session, words)) },
};

pub(crate) const TRUNCATE: Command = Command {
    names: &["truncate", "t"],
    syntax: Some("[-m prealloc_mode] off"),
    about: "truncates the current file at the given offset",
    help: "",
    words: (1, Some(3)),
    needs: Needs::Resize,
    run: |session, words| -> Running<'_> { Box::pin(truncate(session, words)) },
};

/// What a failure of the tools' library is here.
pub(crate) fn problem(failure: Failure) -> Problem {
    match failure {
        Failure::Usage(message) | Failure::Message(message, _) => Problem::Error(message),
        Failure::Silent(_) => Problem::Said,
    }
}

async fn run_open(session: &Session<'_>, words: &[&str]) -> Answer {
    let words = arguments::parse("open", words, "snCro:ki:t:d:U")?;
    let mut arguments = OpenArguments::default();
    for (letter, value) in &words.options {
        if *letter == 'o' && session.notation == Notation::Options {
            let message = "--image-opts and 'open -o' are mutually exclusive";
            return Err(Problem::line(message));
        }
        arguments.take(*letter, value).map_err(problem)?;
    }
    match &words.operands[..] {
        [] if arguments.has_options() => {}
        [name] => arguments.name(name.clone(), session.notation),
        _ => return Err(Problem::Usage),
    }
    open(session, &arguments).await
}

async fn close(session: &Session<'_>) -> Answer {
    // What could not be written was an error of the requests that wanted it.
    session.close().await;
    Ok(())
}

fn preallocation(mode: &str) -> Result<Preallocation, Problem> {
    Ok(match mode {
        "off" => Preallocation::Off,
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        "full" => Preallocation::Full,
        _ => {
            let message = format!("Invalid preallocation mode '{mode}'");
            return Err(Problem::Error(message));
        }
    })
}

async fn truncate(session: &Session<'_>, words: &[&str]) -> Answer {
    let words = arguments::parse("truncate", words, "m:")?;
    let preallocation = words
        .value('m')
        .map_or(Ok(Preallocation::Off), preallocation)?;
    let [length] = &words.operands[..] else {
        return Err(Problem::Usage);
    };
    let length = number(length)?;
    let resize = Resize {
        length,
        preallocation,
    };
    let resized = session.opened()?.node().resize(resize).await;
    resized.map_err(|error| Problem::block("", &error))
}
