//! The JSON dialect of QMP: a stream of values without framing.
//!
//! ```text
//!   bytes ──lexer──> tokens ──until brackets balance──> parser ──> Value | Error
//!                 │
//!                 └─ stray byte: report, drop the message begun, skip to the next bracket,
//!                    comma, colon or white space
//! ```
//!
//! Beyond RFC 8259 strings may be in single quotes and `\'` is an escape. Output is ASCII only,
//! with a space after `:` and `,`. A client that sends a byte that no message contains (0xFF)
//! gets an error and a parser that is ready for its next message.
//!
//! [`MAX_MESSAGE_BYTES`], [`MAX_MESSAGE_TOKENS`] and [`MAX_NESTING`] bound what a peer can make
//! the process keep.

mod lexer;
mod order;
mod parser;
mod write;

pub use order::ordered;
pub use write::{Layout, to_line, to_string};

use crate::{Error, Result};
use lexer::{Lexer, Token, TokenKind};
use serde_json::Value;

/// Longest message in bytes, white space not counted.
pub const MAX_MESSAGE_BYTES: usize = 8 << 20;
/// Most tokens in a message.
pub const MAX_MESSAGE_TOKENS: usize = 1 << 18;
/// Deepest nesting of objects and arrays.
pub const MAX_NESTING: usize = 256;

/// Cuts a byte stream into JSON values.
#[derive(Default)]
pub struct Stream {
    lexer: Lexer,
    message: Message,
}

/// The tokens of a value that is not complete yet.
#[derive(Default)]
struct Message {
    tokens: Vec<Token>,
    bytes: usize,
    braces: isize,
    brackets: isize,
}

impl Stream {
    /// Takes `bytes` and calls `emit` for each value or error that they complete.
    pub fn feed(&mut self, bytes: &[u8], emit: &mut dyn FnMut(Result<Value>)) {
        for &byte in bytes {
            let message = &mut self.message;
            self.lexer
                .push(byte, &mut |token| message.push(token, emit));
            if self.message.bytes + self.lexer.pending_bytes() > MAX_MESSAGE_BYTES {
                self.lexer.abandon_token();
                self.message = Message::default();
                emit(Err(Error::generic("JSON token size limit exceeded")));
            }
        }
    }
}

impl Message {
    fn push(&mut self, token: Token, emit: &mut dyn FnMut(Result<Value>)) {
        match token.kind {
            TokenKind::OpenBrace => self.braces += 1,
            TokenKind::CloseBrace => self.braces -= 1,
            TokenKind::OpenBracket => self.brackets += 1,
            TokenKind::CloseBracket => self.brackets -= 1,
            TokenKind::Stray => {
                *self = Self::default();
                let stray = String::from_utf8_lossy(&token.text);
                emit(Err(syntax_error(format!("stray '{stray}'"))));
                return;
            }
            _ => {}
        }
        self.bytes += token.text.len();
        self.tokens.push(token);
        if self.braces < 0 || self.brackets < 0 || (self.braces == 0 && self.brackets == 0) {
            let message = std::mem::take(self);
            emit(parser::parse(&message.tokens));
        } else if self.tokens.len() > MAX_MESSAGE_TOKENS {
            *self = Self::default();
            emit(Err(Error::generic("JSON token count limit exceeded")));
        } else if self.braces + self.brackets > MAX_NESTING as isize {
            *self = Self::default();
            emit(Err(Error::generic("JSON nesting depth limit exceeded")));
        }
    }
}

/// Parses a text that holds exactly one value.
pub fn parse(text: &str) -> Result<Value> {
    let mut stream = Stream::default();
    let mut values = Vec::new();
    stream.feed(text.as_bytes(), &mut |value| values.push(value));
    // White space ends a number or keyword.
    stream.feed(b"\n", &mut |value| values.push(value));
    let incomplete = !stream.message.tokens.is_empty() || stream.lexer.pending_bytes() > 0;
    if let Some(position) = values.iter().position(Result::is_err) {
        return values.swap_remove(position);
    }
    match (values.pop(), values.is_empty(), incomplete) {
        (Some(value), true, false) => value,
        (_, _, true) => Err(syntax_error("premature EOI")),
        (None, _, false) => Err(Error::generic("Expecting a JSON value")),
        _ => Err(syntax_error("more than one value")),
    }
}

fn syntax_error(what: impl AsRef<str>) -> Error {
    Error::generic(format!("JSON parse error, {}", what.as_ref()))
}

#[cfg(test)]
mod tests;
