//! `blkverify`: every read is compared with a second disk.
//!
//! Options: `test`, the disk; `raw`, a disk that gets the same writes. The name `blkverify:RAW:TEST` stands for
//! two file names; `filename` is that of the test disk, or of both in this form. At the first difference the process says
//! so and ends with status 1: the node is for finding defects, and whatever goes on would blur them.
//!
//! Writes go to both, from a private copy. Zeroes are written as bytes; discards are not passed on;
//! a flush is the test disk's.

use crate::together::{all, first_difference, private, private_copy};
use block::error::Result;
use block::open::{ChildRole, DriverEntry};
use block::{
    BoxFuture, Buffer, ByteRange, Driver, Edge, Errno, Error, ErrorKind, ImageIdentity, IoFuture,
    Limits, Names, OpenRequest, Protocol, Reach, Resize, StatusExtent, WriteFlags, ZeroFlags,
};
use serde_json::{Map, Value};

/// The table line of `blkverify`.
pub const ENTRY: DriverEntry = DriverEntry::new("blkverify", |request| Box::pin(open(request)))
    .with_protocol(Protocol {
        prefixes: &["blkverify"],
        parse,
        // It can end the process.
        reach: Reach::Outside,
    });

const PREFIX: &str = "blkverify:";

/// The children that a name stands for; without the prefix it is the test disk's.
fn parse(names: &Names<'_>, name: &str) -> Result<Map<String, Value>> {
    let (raw, test) = match name.strip_prefix(PREFIX) {
        None => (None, name),
        Some(both) => match both.split_once(':') {
            Some((raw, test)) => (Some(raw), test),
            None => {
                let message = "blkverify requires raw copy and original image path";
                return Err(Error::new(ErrorKind::Invalid, message));
            }
        },
    };
    let mut children = Map::new();
    if let Some(raw) = raw {
        children.insert("raw".to_owned(), names.options(raw)?.into());
    }
    let test = names.options(test)?;
    let test = Map::from_iter([("file".to_owned(), test.into())]);
    children.insert("test".to_owned(), test.into());
    Ok(children)
}

/// Most bytes of one request: each needs two buffers of this size.
const MAX_TRANSFER: u32 = 64 << 20;

/// The node.
struct Blkverify {
    raw: Edge,
    test: Edge,
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>> {
    if let Some(name) = request.take_str("filename")? {
        let children = parse(&request.names(), &name)?;
        for (child, options) in children {
            request.give(&child, options);
        }
    }
    let raw = request.required_child("raw", ChildRole::Filtered).await?;
    let test = request.required_child("test", ChildRole::Data).await?;
    Ok(Box::new(Blkverify { raw, test }))
}

/// One request, for messages.
#[derive(Clone, Copy)]
struct Compared {
    act: &'static str,
    range: ByteRange,
}

impl Compared {
    /// What is wrong when the disks answer differently.
    fn results(self, test: Answer, raw: Answer) -> Option<String> {
        let number = |answer: Answer| answer.err().map_or(0, |errno| -(errno as i32));
        (test != raw).then(|| {
            let (test, raw) = (number(test), number(raw));
            self.message(&format!("return value mismatch {test} != {raw}"))
        })
    }

    /// What is wrong when the disks hold different bytes.
    fn contents(self, test: &Buffer, raw: &Buffer) -> Option<String> {
        let at = first_difference(test, raw)?;
        let offset = self.range.offset + at as u64;
        Some(self.message(&format!("contents mismatch at offset {offset}")))
    }

    fn message(self, what: &str) -> String {
        let ByteRange { offset, length } = self.range;
        format!(
            "blkverify: {} offset={offset} bytes={length} {what}",
            self.act
        )
    }
}

type Answer = std::result::Result<(), Errno>;

/// Ends the process when something is wrong.
fn insist(wrong: Option<String>) {
    if let Some(message) = wrong {
        eprintln!("{message}");
        std::process::exit(1);
    }
}

impl Blkverify {
    async fn read_both(&self, offset: u64, buffer: Buffer) -> Answer {
        let (test, raw) = (private(buffer.len()), private(buffer.len()));
        let answers = all(vec![
            self.test.node().read(offset, test.clone()),
            self.raw.node().read(offset, raw.clone()),
        ]);
        let answers = answers.await;
        let compared = Compared {
            act: "read",
            range: ByteRange::new(offset, buffer.len() as u64),
        };
        insist(compared.results(answers[0], answers[1]));
        answers[0]?;
        insist(compared.contents(&test, &raw));
        buffer.copy_from(&test);
        Ok(())
    }

    async fn write_both(&self, offset: u64, buffer: Buffer) -> Answer {
        let buffer = private_copy(&buffer);
        let compared = Compared {
            act: "write",
            range: ByteRange::new(offset, buffer.len() as u64),
        };
        let flags = WriteFlags::default();
        let answers = all(vec![
            self.test.node().write(offset, buffer.clone(), flags),
            self.raw.node().write(offset, buffer, flags),
        ]);
        let answers = answers.await;
        insist(compared.results(answers[0], answers[1]));
        answers[0]
    }
}

impl Driver for Blkverify {
    fn driver_name(&self) -> &'static str {
        "blkverify"
    }
    fn length(&self) -> u64 {
        self.test.node().length()
    }
    fn limits(&self) -> Limits {
        Limits {
            max_transfer: MAX_TRANSFER,
            ..Limits::default()
        }
    }
    fn grows(&self) -> bool {
        self.test.node().grows() && self.raw.node().grows()
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        IoFuture::boxed(self.read_both(offset, buffer))
    }
    fn write(&self, offset: u64, buffer: Buffer, _flags: WriteFlags) -> IoFuture<'_> {
        IoFuture::boxed(self.write_both(offset, buffer))
    }
    fn write_zeroes(&self, _range: ByteRange, _flags: ZeroFlags) -> IoFuture<'_> {
        IoFuture::error(Errno::EOPNOTSUPP)
    }
    fn discard(&self, _range: ByteRange) -> IoFuture<'_> {
        IoFuture::error(Errno::EOPNOTSUPP)
    }
    fn flush(&self) -> IoFuture<'_> {
        self.test.node().flush()
    }
    fn block_status(
        &self,
        range: ByteRange,
    ) -> BoxFuture<'_, std::result::Result<StatusExtent, Errno>> {
        self.test.node().block_status(range)
    }
    fn resize(&self, resize: Resize) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.raw.node().resize(resize).await?;
            self.test.node().resize(resize).await
        })
    }
    fn close(&self) -> BoxFuture<'_, Answer> {
        Box::pin(async { Ok(()) })
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        vec![("raw", &self.raw), ("test", &self.test)]
    }
    fn describe(&self) -> Map<String, Value> {
        Map::new()
    }
    fn filename(&self) -> String {
        let name = |child: &Edge| child.node().exact_filename();
        let (raw, test) = (name(&self.raw), name(&self.test));
        match raw.is_empty() || test.is_empty() {
            true => String::new(),
            false => format!("blkverify:{raw}:{test}"),
        }
    }
    fn identity(&self) -> Option<ImageIdentity> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named_as_the_peer_names_them() {
        let compared = Compared {
            act: "read",
            range: ByteRange::new(4096, 512),
        };
        let (one, other) = (private(512), private(512));
        assert_eq!(compared.contents(&one, &other), None);
        other.slice(7..8).fill(1);
        assert_eq!(
            compared.contents(&one, &other).unwrap(),
            "blkverify: read offset=4096 bytes=512 contents mismatch at offset 4103"
        );
        assert_eq!(compared.results(Ok(()), Ok(())), None);
        assert_eq!(
            compared.results(Err(Errno::EIO), Ok(())).unwrap(),
            "blkverify: read offset=4096 bytes=512 return value mismatch -5 != 0"
        );
    }
}
