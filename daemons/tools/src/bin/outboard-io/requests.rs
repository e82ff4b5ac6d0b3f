//! The commands that do one request and wait for it.

use crate::arguments::{self, Words, length, number, pattern, sectors, total};
use crate::command::{Answer, Command, Needs, Problem, Running};
use crate::report::{Done, Style, dump};
use crate::session::{Opened, Session};
use block::error::reason;
use block::{Buffer, ByteRange, Errno, WriteFlags, ZeroFlags};
use std::fs::File;
use std::io::Read;
use std::time::Instant;
use tools::output;

/// What memory is filled with before it is read into.
const UNREAD: u8 = 0xab;

/// What is written when nothing else is said.
pub(crate) const USUAL: u8 = 0xcd;

pub(crate) const READ: Command = Command {
    names: &["read", "r"],
    syntax: Some("[-abCqv] [-P pattern [-s off] [-l len]] off len"),
    about: "reads a number of bytes at a specified offset",
    help: "
 Reads len bytes from offset off.

 Example:
 'read -v 512 1k' - shows the kilobyte that begins at byte 512

 -b, -- read the saved machine state instead of the disk
 -C, -- statistics separated by commas
 -l, -- how much has to match the pattern (needs -P)
 -p, -- accepted for compatibility
 -P, -- what was read has to be this byte
 -q, -- no statistics
 -s, -- where what has to match the pattern begins (needs -P)
 -v, -- show what was read
",
    words: (2, None),
    needs: Needs::File,
    run: |session, words| -> Running<'_> { Box::pin(read(session, words)) },
};

pub(crate) const READV: Command = Command {
    names: &["readv", "rv"],
    syntax: Some("[-Cqv] [-P pattern] off len [len..]"),
    about: "reads a number of bytes at a specified offset",
    help: "
 Reads from offset off into as many buffers as lengths are given.

 Example:
 'readv -v 512 1k 1k' - shows the two kilobytes that begin at byte 512

 -C, -- statistics separated by commas
 -P, -- what was read has to be this byte
 -v, -- show what was read
 -q, -- no statistics
",
    words: (2, None),
    needs: Needs::File,
    run: |session, words| -> Running<'_> { Box::pin(readv(session, words)) },
};

pub(crate) const WRITE: Command = Command {
    names: &["write", "w"],
    syntax: Some("[-bcCfnquz] [-P pattern | -s source_file] off len"),
    about: "writes a number of bytes at a specified offset",
    help: "
 Writes len bytes at offset off, 0xcd unless something else is asked for.

 Example:
 'write 512 1k' - writes a kilobyte at byte 512

 -b, -- write the saved machine state instead of the disk
 -c, -- store it compressed
 -f, -- durable before the command ends (forced unit access)
 -n, -- with -z: fail rather than write zero bytes
 -p, -- accepted for compatibility
 -P, -- write this byte
 -s, -- write the content of a file, as often as it takes
 -C, -- statistics separated by commas
 -q, -- no statistics
 -u, -- with -z: the range may be deallocated
 -z, -- write zeroes by the request that is made for it
",
    words: (2, None),
    needs: Needs::Write,
    run: |session, words| -> Running<'_> { Box::pin(write(session, words)) },
};

pub(crate) const WRITEV: Command = Command {
    names: &["writev", "wv"],
    syntax: Some("[-Cfq] [-P pattern] off len [len..]"),
    about: "writes a number of bytes at a specified offset",
    help: "
 Writes at offset off from as many buffers as lengths are given.

 Example:
 'writev 512 1k 1k' - writes two kilobytes at byte 512

 -P, -- write this byte
 -C, -- statistics separated by commas
 -f, -- durable before the command ends (forced unit access)
 -q, -- no statistics
",
    words: (2, None),
    needs: Needs::Write,
    run: |session, words| -> Running<'_> { Box::pin(writev(session, words)) },
};

pub(crate) const DISCARD: Command = Command {
    names: &["discard", "d"],
    syntax: Some("[-Cq] off len"),
    about: "discards a number of bytes at a specified offset",
    help: "
 Discards len bytes at offset off.

 Example:
 'discard 512 1k' - discards a kilobyte at byte 512

 -C, -- statistics separated by commas
 -q, -- no statistics
",
    words: (2, None),
    needs: Needs::Write,
    run: |session, words| -> Running<'_> { Box::pin(discard(session, words)) },
};

pub(crate) const FLUSH: Command = Command {
    names: &["flush", "f"],
    syntax: None,
    about: "flush all in-core file state to disk",
    help: "",
    words: (0, Some(0)),
    needs: Needs::File,
    run: |session, _| -> Running<'_> { Box::pin(flush(session)) },
};

/// How the statistics of a command are shown.
pub(crate) fn style(words: &Words) -> Style {
    match (words.has('q'), words.has('C')) {
        (true, _) => Style::Quiet,
        (false, true) => Style::Machine,
        (false, false) => Style::Human,
    }
}

/// What the bytes that were read have to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected {
    pub(crate) byte: u8,
    /// Which of them, from the start of the request.
    pub(crate) range: ByteRange,
}

/// A read and what becomes of its bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    pub(crate) range: ByteRange,
    pub(crate) expected: Option<Expected>,
    pub(crate) dump: bool,
    pub(crate) style: Style,
}

impl Reading {
    /// The options and operands that reads of several buffers have.
    pub(crate) fn vectored(words: &Words) -> Result<Self, Problem> {
        let byte = words.value('P').map(pattern).transpose()?;
        let (offset, lengths) = operands(words)?;
        let offset = number(offset)?;
        let range = ByteRange::new(offset, total(lengths)?);
        let expected = byte.map(|byte| Expected {
            byte,
            range: ByteRange::new(0, range.length),
        });
        Ok(Self {
            range,
            expected,
            dump: words.has('v'),
            style: style(words),
        })
    }

    /// Memory to read into.
    pub(crate) fn memory(&self) -> Buffer {
        let buffer = Buffer::zeroed(self.range.length as usize);
        buffer.fill(UNREAD);
        buffer
    }

    /// Shows what was read; an error when it is not what was expected.
    pub(crate) fn conclude(&self, buffer: &Buffer, started: Instant) -> bool {
        let elapsed = started.elapsed();
        let mut bytes = vec![0; buffer.len()];
        buffer.copy_to_slice(&mut bytes);
        let matches = self.expected.is_none_or(|expected| {
            let start = expected.range.offset as usize;
            let part = &bytes[start..start + expected.range.length as usize];
            part.iter().all(|byte| *byte == expected.byte)
        });
        if let (false, Some(Expected { range, .. })) = (matches, self.expected) {
            output::line(&format!(
                "Pattern verification failed at offset {}, {} bytes",
                self.range.offset + range.offset,
                range.length
            ));
        }
        if self.style != Style::Quiet {
            if self.dump {
                dump(self.range.offset, &bytes);
            }
            let done = Done {
                verb: "read",
                offset: self.range.offset,
                length: self.range.length,
                elapsed,
            };
            done.report(self.style);
        }
        matches
    }
}

/// The offset and at least one length.
pub(crate) fn operands(words: &Words) -> Result<(&str, &[String]), Problem> {
    match &words.operands[..] {
        [offset, lengths @ ..] if !lengths.is_empty() => Ok((offset, lengths)),
        _ => Err(Problem::Usage),
    }
}

/// The offset and one length.
fn pair(words: &Words) -> Result<(&str, &str), Problem> {
    match &words.operands[..] {
        [offset, length] => Ok((offset, length)),
        _ => Err(Problem::Usage),
    }
}

fn failed(what: &str, errno: Errno) -> Problem {
    Problem::line(format!("{what} failed: {}", reason(errno)))
}

async fn read(session: &Session<'_>, words: &[&str]) -> Answer {
    let words = arguments::parse("read", words, "bCl:pP:qs:v")?;
    let part_length = words.value('l').map(number).transpose()?;
    let byte = words.value('P').map(pattern).transpose()?;
    let part_start = words.value('s').map(number).transpose()?;
    let (offset, count) = pair(&words)?;
    let range = ByteRange::new(number(offset)?, length(count)?);
    if byte.is_none() && (part_length.is_some() || part_start.is_some()) {
        return Err(Problem::Usage);
    }
    let start = part_start.unwrap_or(0);
    let left = range.length.checked_sub(start);
    let part = left.map(|left| (part_length.unwrap_or(left), left));
    let Some((part, _)) = part.filter(|(part, left)| part <= left) else {
        return Err(Problem::line(
            "pattern verification range exceeds end of read data",
        ));
    };
    if words.has('b') {
        sectors(range.offset, range.length)?;
    }
    let reading = Reading {
        range,
        expected: byte.map(|byte| Expected {
            byte,
            range: ByteRange::new(start, part),
        }),
        dump: words.has('v'),
        style: style(&words),
    };
    let image = session.opened()?;
    let (buffer, started) = (reading.memory(), Instant::now());
    let result = match words.has('b') {
        true => image.read_state(range.offset, buffer.clone()).await,
        false => image.read(range.offset, buffer.clone()).await,
    };
    result.map_err(|errno| failed("read", errno))?;
    verified(&reading, &buffer, started)
}

async fn readv(session: &Session<'_>, words: &[&str]) -> Answer {
    let words = arguments::parse("readv", words, "CP:qv")?;
    let reading = Reading::vectored(&words)?;
    let image = session.opened()?;
    let (buffer, started) = (reading.memory(), Instant::now());
    let result = image.read(reading.range.offset, buffer.clone()).await;
    result.map_err(|errno| failed("readv", errno))?;
    verified(&reading, &buffer, started)
}

fn verified(reading: &Reading, buffer: &Buffer, started: Instant) -> Answer {
    match reading.conclude(buffer, started) {
        true => Ok(()),
        false => Err(Problem::Said),
    }
}

/// Memory full of one byte.
pub(crate) fn filled(length: u64, byte: u8) -> Buffer {
    let buffer = Buffer::zeroed(length as usize);
    if byte != 0 {
        buffer.fill(byte);
    }
    buffer
}

/// Memory full of the content of a file, as often as it takes.
fn repeated(path: &str, length: u64) -> Result<Buffer, Problem> {
    let unreadable = |error: std::io::Error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
        Problem::Plain(format!("{path}: {}", reason(errno)))
    };
    let mut content = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    let read = file.take(length).read_to_end(&mut content);
    read.map_err(unreadable)?;
    if content.is_empty() {
        return Err(Problem::Plain(format!("{path}: file is empty")));
    }
    let bytes: Vec<u8> = content.into_iter().cycle().take(length as usize).collect();
    let buffer = Buffer::zeroed(bytes.len());
    buffer.copy_from_slice(&bytes);
    Ok(buffer)
}

fn check_write_options(words: &Words) -> Answer {
    let has = |letter| words.has(letter);
    let sources = ['z', 'P', 's'].iter().filter(|letter| has(**letter));
    let problem = if has('b') && has('z') {
        "-b and -z cannot be specified at the same time"
    } else if has('f') && (has('b') || has('c')) {
        "-f and -b or -c cannot be specified at the same time"
    } else if has('n') && !has('z') {
        "-n requires -z to be specified"
    } else if has('u') && !has('z') {
        "-u requires -z to be specified"
    } else if sources.count() > 1 {
        "Only one of -z, -P, and -s can be specified at the same time"
    } else {
        return Ok(());
    };
    Err(Problem::line(problem))
}

async fn write(session: &Session<'_>, words: &[&str]) -> Answer {
    let words = arguments::parse("write", words, "bcCfnpP:qs:uz")?;
    let byte = words.value('P').map(pattern).transpose()?;
    let (offset, count) = pair(&words)?;
    check_write_options(&words)?;
    let offset = number(offset)?;
    let bytes = number(count)?;
    if bytes > arguments::MAX_REQUEST && !words.has('n') {
        return Err(Problem::line(format!(
            "length cannot exceed {} without -n, given {count}",
            arguments::MAX_REQUEST
        )));
    }
    if words.has('b') || words.has('c') {
        sectors(offset, bytes)?;
    }
    let image = session.opened()?;
    let range = ByteRange::new(offset, bytes);
    let buffer = match words.value('s') {
        _ if words.has('z') => Buffer::zeroed(0),
        Some(path) => repeated(path, bytes)?,
        None => filled(bytes, byte.unwrap_or(USUAL)),
    };
    let started = Instant::now();
    let result = perform_write(&image, (range, buffer), &words).await;
    conclude_write("write", (result, range), (style(&words), started))
}

async fn perform_write(
    image: &Opened,
    (range, buffer): (ByteRange, Buffer),
    words: &Words,
) -> Result<(), Errno> {
    let fua = words.has('f');
    if words.has('b') {
        return image.write_state(range.offset, buffer).await;
    }
    if words.has('z') {
        let flags = ZeroFlags {
            fua,
            may_unmap: words.has('u'),
            no_fallback: words.has('n'),
        };
        return image.write_zeroes(range, flags).await;
    }
    let compressed = words.has('c');
    let flags = WriteFlags { fua, compressed };
    image.write(range.offset, buffer, flags).await
}

fn conclude_write(
    what: &str,
    (result, range): (Result<(), Errno>, ByteRange),
    (style, started): (Style, Instant),
) -> Answer {
    let elapsed = started.elapsed();
    result.map_err(|errno| failed(what, errno))?;
    let done = Done {
        verb: match what {
            "discard" => "discard",
            _ => "wrote",
        },
        offset: range.offset,
        length: range.length,
        elapsed,
    };
    done.report(style);
    Ok(())
}

async fn writev(session: &Session<'_>, words: &[&str]) -> Answer {
    let words = arguments::parse("writev", words, "CfqP:")?;
    let byte = words.value('P').map(pattern).transpose()?;
    let (offset, lengths) = operands(&words)?;
    let range = ByteRange::new(number(offset)?, total(lengths)?);
    let image = session.opened()?;
    let buffer = filled(range.length, byte.unwrap_or(USUAL));
    let started = Instant::now();
    let flags = WriteFlags {
        fua: words.has('f'),
        compressed: false,
    };
    let result = image.write(range.offset, buffer, flags).await;
    conclude_write("writev", (result, range), (style(&words), started))
}

async fn discard(session: &Session<'_>, words: &[&str]) -> Answer {
    let words = arguments::parse("discard", words, "Cq")?;
    let (offset, count) = pair(&words)?;
    let range = ByteRange::new(number(offset)?, length(count)?);
    let image = session.opened()?;
    let started = Instant::now();
    let result = image.discard(range).await;
    conclude_write("discard", (result, range), (style(&words), started))
}

async fn flush(session: &Session<'_>) -> Answer {
    let flushed = session.opened()?.flush().await;
    flushed.map_err(|_| Problem::Said)
}
