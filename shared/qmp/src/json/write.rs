//! Values to text: ASCII only, a space after `:` and `,`, optionally indented by four.

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, Serializer};
use std::io::{self, Write};

/// The text of `value` on one line.
pub fn to_string(value: &Value) -> String {
    into_text(serialize(value, OneLine))
}

/// The bytes of a message: `value` laid out as told and a line end.
pub fn to_line(value: &Value, layout: Layout) -> Vec<u8> {
    let mut bytes = match layout {
        Layout::OneLine => serialize(value, OneLine),
        Layout::Indented => serialize(value, Indented::default()),
    };
    bytes.extend_from_slice(b"\r\n");
    bytes
}

/// How a message is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// On one line.
    #[default]
    OneLine,
    /// Indented by four spaces per level.
    Indented,
}

fn serialize(value: &Value, formatter: impl Formatter) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128);
    value
        .serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
        .expect("a Value has string keys and a Vec takes any write");
    bytes
}

fn into_text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).expect("serde_json writes UTF-8")
}

fn write_ascii<W: ?Sized + Write>(writer: &mut W, fragment: &str) -> io::Result<()> {
    let mut rest = fragment;
    while let Some(position) = rest.find(|c: char| !c.is_ascii() || c == '\u{7f}') {
        writer.write_all(&rest.as_bytes()[..position])?;
        let mut chars = rest[position..].chars();
        let mut units = [0; 2];
        for unit in chars.next().unwrap_or_default().encode_utf16(&mut units) {
            write!(writer, "\\u{unit:04X}")?;
        }
        rest = chars.as_str();
    }
    writer.write_all(rest.as_bytes())
}

/// `{"a": 1, "b": [1, 2]}`
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }
    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }
    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
    fn write_string_fragment<W: ?Sized + Write>(&mut self, w: &mut W, s: &str) -> io::Result<()> {
        write_ascii(w, s)
    }
}

/// One member per line; an empty array or object takes two lines.
#[derive(Default)]
struct Indented {
    depth: usize,
}

impl Indented {
    fn line<W: ?Sized + Write>(&self, w: &mut W) -> io::Result<()> {
        w.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| w.write_all(b"    "))
    }
    fn begin<W: ?Sized + Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        w.write_all(bracket)
    }
    fn end<W: ?Sized + Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        self.line(w)?;
        w.write_all(bracket)
    }
    fn next<W: ?Sized + Write>(&self, w: &mut W, first: bool) -> io::Result<()> {
        w.write_all(if first { b"" } else { b"," })?;
        self.line(w)
    }
}

impl Formatter for Indented {
    fn begin_array<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.begin(w, b"[")
    }
    fn end_array<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.end(w, b"]")
    }
    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.next(w, first)
    }
    fn begin_object<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.begin(w, b"{")
    }
    fn end_object<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.end(w, b"}")
    }
    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.next(w, first)
    }
    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
    fn write_string_fragment<W: ?Sized + Write>(&mut self, w: &mut W, s: &str) -> io::Result<()> {
        write_ascii(w, s)
    }
}
