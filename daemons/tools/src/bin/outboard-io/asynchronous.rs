//! The commands whose requests go on while other commands run. They print when they end.

use crate::arguments::{self, Words, number, pattern, total};
use crate::command::{Answer, Command, Needs, Problem, Running};
use crate::report::{Done, Style};
use crate::requests::{Reading, USUAL, filled, operands, style};
use crate::session::{Opened, Session};
use block::error::reason;
use block::{Buffer, ByteRange, Errno, WriteFlags, ZeroFlags};
use std::rc::Rc;
use std::time::Instant;
use tools::output;

pub(crate) const FLUSH: Command = Command {
    names: &["aio_flush"],
    syntax: None,
    about: "completes all outstanding aio requests",
    help: "",
    words: (0, Some(0)),
    needs: Needs::File,
    run: |session, _| -> Running<'_> {
        Box::pin(async {
            session.settle().await;
            Ok(())
        })
    },
};

pub(crate) const READ: Command = Command {
    names: &["aio_read"],
    syntax: Some("[-Ciqv] [-P pattern] off len [len..]"),
    about: "asynchronously reads a number of bytes",
    help: "
 Begins to read from offset off into as many buffers as lengths are given, and does not wait.
 The result is printed when the read ends; aio_flush waits for all of them. The command itself
 succeeds when the read has begun.

 Example:
 'aio_read -v 512 1k 1k' - shows the two kilobytes that begin at byte 512

 -C, -- statistics separated by commas
 -P, -- what was read has to be this byte
 -i, -- do not read: count an invalid request
 -v, -- show what was read
 -q, -- no statistics
",
    words: (2, None),
    needs: Needs::File,
    run: |session, words| -> Running<'_> { Box::pin(async { read(session, words) }) },
};

pub(crate) const WRITE: Command = Command {
    names: &["aio_write"],
    syntax: Some("[-Cfiquz] [-P pattern] off len [len..]"),
    about: "asynchronously writes a number of bytes",
    help: "
 Begins to write at offset off from as many buffers as lengths are given, and does not wait.
 The result is printed when the write ends; aio_flush waits for all of them. The command itself
 succeeds when the write has begun.

 Example:
 'aio_write 512 1k 1k' - writes two kilobytes at byte 512

 -P, -- write this byte
 -C, -- statistics separated by commas
 -f, -- durable before the request ends (forced unit access)
 -i, -- do not write: count an invalid request
 -q, -- no statistics
 -u, -- with -z: the range may be deallocated
 -z, -- write zeroes by the request that is made for it
",
    words: (2, None),
    needs: Needs::Write,
    run: |session, words| -> Running<'_> { Box::pin(async { write(session, words) }) },
};

fn read(session: &Session<'_>, words: &[&str]) -> Answer {
    let words = arguments::parse("aio_read", words, "CP:iqv")?;
    words.value('P').map(pattern).transpose()?;
    if words.has('i') {
        output::line("injecting invalid read request");
        return Ok(());
    }
    let reading = Reading::vectored(&words)?;
    let image = session.opened()?;
    session.begin(async move {
        let (buffer, started) = (reading.memory(), Instant::now());
        match image.read(reading.range.offset, buffer.clone()).await {
            Ok(()) => drop(reading.conclude(&buffer, started)),
            Err(errno) => output::line(&format!("readv failed: {}", reason(errno))),
        }
    });
    Ok(())
}

/// A write that was asked for.
struct Writing {
    range: ByteRange,
    fua: bool,
    kind: Kind,
}

enum Kind {
    Bytes(u8),
    Zeroes { may_unmap: bool },
}

impl Writing {
    fn parse(words: &Words, byte: Option<u8>) -> Result<Self, Problem> {
        let (offset, lengths) = operands(words)?;
        if words.has('z') && lengths.len() != 1 {
            return Err(Problem::line("-z supports only a single length parameter"));
        }
        if words.has('u') && !words.has('z') {
            return Err(Problem::line("-u requires -z to be specified"));
        }
        let offset = number(offset)?;
        let length = match words.has('z') {
            true => number(&lengths[0])?,
            false => total(lengths)?,
        };
        Ok(Self {
            range: ByteRange::new(offset, length),
            fua: words.has('f'),
            kind: match words.has('z') {
                true => Kind::Zeroes {
                    may_unmap: words.has('u'),
                },
                false => Kind::Bytes(byte.unwrap_or(USUAL)),
            },
        })
    }

    async fn perform(&self, image: &Opened) -> Result<(), Errno> {
        let fua = self.fua;
        match self.kind {
            Kind::Bytes(byte) => {
                let flags = WriteFlags {
                    fua,
                    compressed: false,
                };
                let buffer: Buffer = filled(self.range.length, byte);
                image.write(self.range.offset, buffer, flags).await
            }
            Kind::Zeroes { may_unmap } => {
                let flags = ZeroFlags {
                    fua,
                    may_unmap,
                    no_fallback: false,
                };
                image.write_zeroes(self.range, flags).await
            }
        }
    }

    async fn run(self, image: Rc<Opened>, style: Style) {
        let started = Instant::now();
        if let Err(errno) = self.perform(&image).await {
            return output::line(&format!("aio_write failed: {}", reason(errno)));
        }
        let done = Done {
            verb: "wrote",
            offset: self.range.offset,
            length: self.range.length,
            elapsed: started.elapsed(),
        };
        done.report(style);
    }
}

fn write(session: &Session<'_>, words: &[&str]) -> Answer {
    let words = arguments::parse("aio_write", words, "CfiP:quz")?;
    let byte = words.value('P').map(pattern).transpose()?;
    if words.has('i') {
        output::line("injecting invalid write request");
        return Ok(());
    }
    let writing = Writing::parse(&words, byte)?;
    let image = session.opened()?;
    session.begin(writing.run(image, style(&words)));
    Ok(())
}
