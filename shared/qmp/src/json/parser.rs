//! Tokens to one value.

use super::lexer::{Token, TokenKind};
use super::syntax_error;
use crate::Result;
use serde_json::{Map, Number, Value};

/// Parses the tokens of one message. Nesting is bounded by whoever collected the tokens.
pub(super) fn parse(tokens: &[Token]) -> Result<Value> {
    let mut parser = Parser { tokens };
    let value = parser.value()?;
    match parser.tokens {
        [] => Ok(value),
        _ => Err(syntax_error("expecting value")),
    }
}

struct Parser<'a> {
    tokens: &'a [Token],
}

impl<'a> Parser<'a> {
    fn next(&mut self) -> Option<&'a Token> {
        let (first, rest) = self.tokens.split_first()?;
        self.tokens = rest;
        Some(first)
    }

    /// Takes the next token when it is of `kind`.
    fn accept(&mut self, kind: TokenKind) -> bool {
        let found = self.tokens.first().is_some_and(|token| token.kind == kind);
        if found {
            self.tokens = &self.tokens[1..];
        }
        found
    }

    fn value(&mut self) -> Result<Value> {
        let Some(token) = self.next() else {
            return Err(syntax_error("expecting value"));
        };
        match token.kind {
            TokenKind::OpenBrace => self.object(),
            TokenKind::OpenBracket => self.array(),
            TokenKind::String => Ok(Value::String(unescape(&token.text)?)),
            TokenKind::Integer | TokenKind::Float => number(token),
            TokenKind::Keyword => keyword(token),
            _ => Err(syntax_error("expecting value")),
        }
    }

    fn object(&mut self) -> Result<Value> {
        let mut members = Map::new();
        if self.accept(TokenKind::CloseBrace) {
            return Ok(Value::Object(members));
        }
        loop {
            let Value::String(key) = self.value()? else {
                return Err(syntax_error("key is not a string in object"));
            };
            if !self.accept(TokenKind::Colon) {
                return Err(syntax_error("missing : in object pair"));
            }
            let value = self.value()?;
            if members.insert(key, value).is_some() {
                return Err(syntax_error("duplicate key"));
            }
            if self.accept(TokenKind::CloseBrace) {
                return Ok(Value::Object(members));
            }
            if !self.accept(TokenKind::Comma) {
                return Err(syntax_error("expected separator in dict"));
            }
        }
    }

    fn array(&mut self) -> Result<Value> {
        let mut items = Vec::new();
        if self.accept(TokenKind::CloseBracket) {
            return Ok(Value::Array(items));
        }
        loop {
            items.push(self.value()?);
            if self.accept(TokenKind::CloseBracket) {
                return Ok(Value::Array(items));
            }
            if !self.accept(TokenKind::Comma) {
                return Err(syntax_error("expected separator in list"));
            }
        }
    }
}

fn keyword(token: &Token) -> Result<Value> {
    match token.text.as_slice() {
        b"true" => Ok(Value::Bool(true)),
        b"false" => Ok(Value::Bool(false)),
        b"null" => Ok(Value::Null),
        other => {
            let word = String::from_utf8_lossy(other);
            Err(syntax_error(format!("invalid keyword '{word}'")))
        }
    }
}

/// Integers are exact up to 64 bits, signed or not; beyond that they are floating point.
fn number(token: &Token) -> Result<Value> {
    let text = std::str::from_utf8(&token.text).expect("the lexer takes only ASCII in numbers");
    if token.kind == TokenKind::Integer {
        if let Ok(signed) = text.parse::<i64>() {
            return Ok(signed.into());
        }
        if let Ok(unsigned) = text.parse::<u64>() {
            return Ok(unsigned.into());
        }
    }
    let float = text.parse::<f64>().ok().and_then(Number::from_f64);
    float
        .map(Value::Number)
        .ok_or_else(|| syntax_error(format!("number '{text}' is out of range")))
}

fn unescape(text: &[u8]) -> Result<String> {
    let text =
        std::str::from_utf8(text).map_err(|_| syntax_error("invalid UTF-8 sequence in string"))?;
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(position) = rest.find('\\') {
        plain.push_str(&rest[..position]);
        let mut after = rest[position + 1..].chars();
        let escape = after.next();
        rest = after.as_str();
        plain.push(match escape {
            Some(same @ ('"' | '\'' | '\\' | '/')) => same,
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('u') => unicode_escape(&mut rest)?,
            _ => return Err(syntax_error("invalid escape sequence in string")),
        });
    }
    plain.push_str(rest);
    Ok(plain)
}

/// Reads the digits after `\u`, and a second escape when the first is half of a surrogate pair.
fn unicode_escape(rest: &mut &str) -> Result<char> {
    let start = *rest;
    let invalid = || {
        let shown: String = start.chars().take(4).collect();
        syntax_error(format!("\\u{shown} is not a valid Unicode character"))
    };
    let first = hex4(rest).ok_or_else(invalid)?;
    let code = match first {
        0xd800..=0xdbff => {
            *rest = rest.strip_prefix("\\u").ok_or_else(invalid)?;
            let second = hex4(rest).ok_or_else(invalid)?;
            if !(0xdc00..=0xdfff).contains(&second) {
                return Err(invalid());
            }
            0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)
        }
        other => other,
    };
    char::from_u32(code).ok_or_else(invalid)
}

fn hex4(rest: &mut &str) -> Option<u32> {
    let digits = rest.get(..4)?;
    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    *rest = &rest[4..];
    u32::from_str_radix(digits, 16).ok()
}
