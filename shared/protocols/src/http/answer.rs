//! What a server answers to a request for a range (RFC 9110, sections 14 and 15), checked as it comes in.
//!
//! Nothing is stored of an answer that is not the range asked for, of the file that the node was opened on: a
//! server that sends the whole file, another range or another version of the file is not believed.

use super::pieces::Piece;
use block::ByteRange;
use curl::easy::{Handler, WriteError};
use std::rc::Rc;
use std::sync::Arc;

/// Bytes of a body that says nothing, which are read so that the connection can be used again.
const MAX_DISCARDED: usize = 64 << 10;

/// The file as it was when the node was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Remote {
    /// In bytes.
    pub(super) length: u64,
    /// What the server tells versions apart by: its `ETag`, else `Last-Modified`.
    pub(super) version: Option<String>,
}

/// Why a range did not come. The words of those that QEMU has too are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    #[error("The requested URL returned error: {0}")]
    Status(u16),
    #[error("Server does not support 'range' (byte ranges).")]
    NoRanges,
    #[error("Server didn't report file size.")]
    NoLength,
    #[error("the file is not what it was when it was opened")]
    Changed,
    #[error("the server sent another range than was asked for")]
    OtherRange,
    #[error("the server sent more than it announced")]
    TooMuch,
    #[error("{0}")]
    Redirection(String),
    /// In libcurl's words.
    #[error("{0}")]
    Library(String),
    #[error("the node is closed")]
    Closed,
}

/// `Content-Range` of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ContentRange {
    /// First and last byte; absent when there is no such range.
    bytes: Option<(u64, u64)>,
    /// Length of the file, when the server knows it.
    total: Option<u64>,
}

impl ContentRange {
    fn parse(value: &str) -> Option<Self> {
        let (unit, rest) = value.split_once(' ')?;
        let (bytes, total) = rest.trim().split_once('/')?;
        let number = |text: &str| match text.bytes().all(|digit| digit.is_ascii_digit()) {
            true => text.parse::<u64>().ok(),
            false => None,
        };
        let bytes = match bytes {
            "*" => None,
            range => {
                let (first, last) = range.split_once('-')?;
                let (first, last) = (number(first)?, number(last)?);
                Some((first, last)).filter(|_| first <= last)?.into()
            }
        };
        let total = match total {
            "*" => None,
            length => Some(number(length)?),
        };
        unit.eq_ignore_ascii_case("bytes")
            .then_some(Self { bytes, total })
    }
}

/// Status and those fields of an answer's head that matter.
#[derive(Clone, Debug, Default)]
struct Head {
    status: u16,
    content_range: Option<ContentRange>,
    etag: Option<String>,
    last_modified: Option<String>,
    /// The empty line has come.
    is_whole: bool,
}

impl Head {
    /// Takes one line. A status line begins anew: interim answers and refusals that libcurl answers to by itself
    /// come before the last one.
    fn take(&mut self, line: &str) {
        if line.starts_with("HTTP/") {
            let status = line.split_ascii_whitespace().nth(1);
            *self = Self {
                status: status.and_then(|it| it.parse().ok()).unwrap_or(0),
                ..Self::default()
            };
            return;
        }
        let Some((name, value)) = line.split_once(':') else {
            self.is_whole |= line.trim_end().is_empty();
            return;
        };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-range" => self.content_range = ContentRange::parse(value),
            "etag" => self.etag = Some(value.to_owned()),
            "last-modified" => self.last_modified = Some(value.to_owned()),
            _ => {}
        }
    }

    fn version(&self) -> Option<String> {
        self.etag.clone().or_else(|| self.last_modified.clone())
    }

    /// The file that the answer is about, when the answer is the range that begins where `asked` does and does not
    /// go beyond it; with the number of bytes that come.
    fn judge(&self, asked: ByteRange, known: Option<&Remote>) -> Result<(Remote, u64), Failure> {
        let told = |total: Option<u64>| {
            let length = total.or_else(|| known.map(|known| known.length));
            let version = self.version();
            length.map(|length| Remote { length, version })
        };
        match (self.status, self.content_range) {
            (
                206,
                Some(ContentRange {
                    bytes: Some((first, last)),
                    total,
                }),
            ) => {
                let remote = told(total).ok_or(Failure::NoLength)?;
                remote.check(known)?;
                let within = first == asked.offset && last - first < asked.length;
                match within && last < remote.length {
                    true => Ok((remote, last - first + 1)),
                    false => Err(Failure::OtherRange),
                }
            }
            (200 | 206, _) => Err(Failure::NoRanges),
            (
                416,
                Some(ContentRange {
                    bytes: None,
                    total: Some(length),
                }),
            ) => {
                let remote = told(Some(length)).ok_or(Failure::NoLength)?;
                remote.check(known)?;
                match length == 0 {
                    true => Ok((remote, 0)),
                    false => Err(Failure::Status(416)),
                }
            }
            (status, _) => Err(Failure::Status(status)),
        }
    }
}

impl Remote {
    fn check(&self, known: Option<&Remote>) -> Result<(), Failure> {
        match known.is_none_or(|known| known == self) {
            true => Ok(()),
            false => Err(Failure::Changed),
        }
    }
}

/// What becomes of a body.
#[derive(Clone, Copy, Debug)]
enum Body {
    /// The head is not judged yet.
    Unknown,
    /// So many bytes of the range are to come.
    Range(u64),
    /// It says nothing; so many bytes were read.
    Discarded(usize),
}

/// Takes one answer in.
pub(super) struct Receiver {
    asked: ByteRange,
    piece: Rc<Piece>,
    known: Option<Arc<Remote>>,
    head: Head,
    body: Body,
    judged: Option<Result<Remote, Failure>>,
}

impl Receiver {
    /// For the answer to a request for `asked`, whose bytes go to the end of `piece`.
    pub(super) fn new(asked: ByteRange, piece: Rc<Piece>, known: Option<Arc<Remote>>) -> Self {
        Self {
            asked,
            piece,
            known,
            head: Head::default(),
            body: Body::Unknown,
            judged: None,
        }
    }

    /// Where the server says that the file is elsewhere.
    pub(super) fn is_redirection(&self) -> bool {
        matches!(self.head.status, 301 | 302 | 303 | 307 | 308)
    }

    /// Whether the server knows nothing of such a file (any more), or not for us.
    pub(super) fn is_refusal(&self) -> bool {
        (400..500).contains(&self.head.status) && self.head.status != 416
    }

    /// What the answer was, once it is over.
    ///
    /// # Errors
    /// See [`Failure`].
    pub(super) fn outcome(&mut self) -> Result<Remote, Failure> {
        self.judge();
        let judged = self.judged.clone().unwrap_or(Err(Failure::Closed));
        match (judged, self.body) {
            (Ok(_), Body::Range(left)) if left > 0 => {
                let message = format!("transfer closed with {left} bytes remaining to read");
                Err(Failure::Library(message))
            }
            (judged, _) => judged,
        }
    }

    /// Whether there was an answer, and it is not cut short only.
    pub(super) fn has_answer(&self) -> bool {
        self.head.is_whole && matches!(self.judged, Some(Err(_)))
    }

    fn judge(&mut self) {
        if self.judged.is_some() {
            return;
        }
        let judged = self.head.judge(self.asked, self.known.as_deref());
        self.body = match &judged {
            Ok((_, coming)) => Body::Range(*coming),
            Err(_) => Body::Discarded(0),
        };
        self.judged = Some(judged.map(|(remote, _)| remote));
    }
}

impl Handler for Receiver {
    fn header(&mut self, line: &[u8]) -> bool {
        self.head.take(&String::from_utf8_lossy(line));
        true
    }

    fn write(&mut self, data: &[u8]) -> Result<usize, WriteError> {
        self.judge();
        // Less than all of it ends the transfer.
        match &mut self.body {
            Body::Range(left) => match left.checked_sub(data.len() as u64) {
                Some(rest) => {
                    *left = rest;
                    self.piece.append(data);
                    Ok(data.len())
                }
                None => {
                    self.judged = Some(Err(Failure::TooMuch));
                    Ok(0)
                }
            },
            Body::Discarded(count) => {
                *count = count.saturating_add(data.len());
                Ok(if *count > MAX_DISCARDED {
                    0
                } else {
                    data.len()
                })
            }
            Body::Unknown => Ok(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(lines: &[&str]) -> Head {
        let mut head = Head::default();
        lines.iter().for_each(|line| head.take(line));
        head
    }

    fn remote(length: u64, version: &str) -> Remote {
        Remote {
            length,
            version: Some(version.to_owned()),
        }
    }

    const ASKED: ByteRange = ByteRange {
        offset: 10,
        length: 5,
    };

    #[test]
    fn only_the_range_that_was_asked_for_is_taken() {
        let judge = |range: &str| {
            let range = format!("Content-Range: {range}\r\n");
            head(&["HTTP/1.1 206 Partial Content\r\n", &range]).judge(ASKED, None)
        };
        let file = |length| Remote {
            length,
            version: None,
        };
        assert_eq!(judge("bytes 10-14/20"), Ok((file(20), 5)));
        assert_eq!(
            judge("bytes 10-11/20"),
            Ok((file(20), 2)),
            "less is allowed"
        );
        for other in [
            "bytes 9-14/20",
            "bytes 10-15/20",
            "bytes 11-14/20",
            "bytes 10-14/12",
        ] {
            assert_eq!(judge(other), Err(Failure::OtherRange), "{other}");
        }
        for nonsense in [
            "bytes 14-10/20",
            "bytes +10-14/20",
            "lines 10-14/20",
            "bytes 10/20",
        ] {
            assert_eq!(judge(nonsense), Err(Failure::NoRanges), "{nonsense}");
        }
        assert_eq!(judge("bytes 10-14/*"), Err(Failure::NoLength));
        assert_eq!(
            judge("bytes 10-99999999999999999999/20"),
            Err(Failure::NoRanges)
        );
    }

    #[test]
    fn the_last_status_line_counts() {
        let answer = head(&[
            "HTTP/1.1 401 Unauthorized\r\n",
            "ETag: \"old\"\r\n",
            "HTTP/2 206\r\n",
            "etag: \"a\"\r\n",
            "content-range: bytes 10-14/20\r\n",
            "\r\n",
        ]);
        assert_eq!(answer.judge(ASKED, None), Ok((remote(20, "\"a\""), 5)));
    }

    #[test]
    fn another_version_of_the_file_is_refused() {
        let answer = head(&[
            "HTTP/1.1 206 x",
            "Content-Range: bytes 10-14/20",
            "ETag: \"b\"",
        ]);
        let judge = |known: Remote| answer.judge(ASKED, Some(&known)).map(|(_, coming)| coming);
        assert_eq!(judge(remote(20, "\"b\"")), Ok(5));
        assert_eq!(judge(remote(20, "\"a\"")), Err(Failure::Changed));
        assert_eq!(judge(remote(21, "\"b\"")), Err(Failure::Changed));
    }

    #[test]
    fn an_empty_file_has_no_range() {
        let answer = head(&["HTTP/1.1 416 x", "Content-Range: bytes */0"]);
        let (empty, coming) = answer.judge(ASKED, None).unwrap();
        assert_eq!((empty.length, coming), (0, 0));
        let shrunk = answer.judge(ASKED, Some(&remote(20, "a")));
        assert_eq!(shrunk, Err(Failure::Changed));
        let refused = head(&["HTTP/1.1 416 x"]).judge(ASKED, None);
        assert_eq!(refused, Err(Failure::Status(416)));
        assert_eq!(
            head(&["HTTP/1.0 200 OK"]).judge(ASKED, None),
            Err(Failure::NoRanges)
        );
    }
}
