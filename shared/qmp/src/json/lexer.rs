//! Bytes to tokens, one byte at a time, with the state kept between calls.

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenKind {
    OpenBrace,
    CloseBrace,
    OpenBracket,
    CloseBracket,
    Comma,
    Colon,
    /// Text: the bytes between the quotes, escapes not resolved.
    String,
    Integer,
    Float,
    /// Text: lower-case letters.
    Keyword,
    /// Bytes that start no token, or break the one begun.
    Stray,
}

/// A token and its text.
#[derive(Clone, Debug)]
pub(super) struct Token {
    pub(super) kind: TokenKind,
    pub(super) text: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Between tokens.
    #[default]
    Start,
    Keyword,
    Number(NumberState),
    String {
        quote: u8,
        escaped: bool,
    },
    /// After a stray byte: skip to something that can separate messages.
    Recovery,
}

/// How far a number has got, named by what was last seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NumberState {
    Minus,
    LeadingZero,
    Digits,
    Point,
    Fraction,
    ExponentMark,
    ExponentSign,
    Exponent,
}

impl NumberState {
    /// The state after `byte`; `None` when `byte` does not continue the number.
    fn next(self, byte: u8) -> Option<Self> {
        use NumberState::*;
        Some(match (self, byte) {
            (Minus, b'0') => LeadingZero,
            (Minus | Digits, b'0'..=b'9') => Digits,
            (LeadingZero | Digits, b'.') => Point,
            (Point | Fraction, b'0'..=b'9') => Fraction,
            (LeadingZero | Digits | Fraction, b'e' | b'E') => ExponentMark,
            (ExponentMark, b'+' | b'-') => ExponentSign,
            (ExponentMark | ExponentSign | Exponent, b'0'..=b'9') => Exponent,
            _ => return None,
        })
    }

    /// The kind of a number that ends before `byte`; `None` when it cannot end there.
    fn end(self, byte: u8) -> Option<TokenKind> {
        use NumberState::*;
        match self {
            LeadingZero if byte.is_ascii_digit() => None,
            LeadingZero | Digits => Some(TokenKind::Integer),
            Fraction | Exponent => Some(TokenKind::Float),
            Minus | Point | ExponentMark | ExponentSign => None,
        }
    }
}

/// The lexer: what it has read of the token under way.
#[derive(Default)]
pub(super) struct Lexer {
    state: State,
    text: Vec<u8>,
}

impl Lexer {
    /// Bytes of the token under way.
    pub(super) fn pending_bytes(&self) -> usize {
        self.text.len()
    }

    /// Gives the token under way up and skips its rest.
    pub(super) fn abandon_token(&mut self) {
        self.text = Vec::new();
        self.state = State::Recovery;
    }

    /// Takes one byte and calls `emit` for each token that it completes (two at most).
    pub(super) fn push(&mut self, byte: u8, emit: &mut dyn FnMut(Token)) {
        match self.state {
            State::Start => self.start(byte, emit),
            State::Recovery => {
                if is_separator(byte) {
                    self.start(byte, emit);
                }
            }
            State::Keyword if byte.is_ascii_lowercase() => self.text.push(byte),
            State::Keyword => {
                self.finish(TokenKind::Keyword, emit);
                self.start(byte, emit);
            }
            State::Number(number) => self.in_number(number, byte, emit),
            State::String { quote, escaped } => match byte {
                0x00..=0x1f | 0xfe | 0xff => {
                    self.text.insert(0, quote);
                    self.stray(byte, emit);
                }
                _ if byte == quote && !escaped => self.finish(TokenKind::String, emit),
                _ => {
                    let escaped = byte == b'\\' && !escaped;
                    self.state = State::String { quote, escaped };
                    self.text.push(byte);
                }
            },
        }
    }

    fn in_number(&mut self, number: NumberState, byte: u8, emit: &mut dyn FnMut(Token)) {
        if let Some(next) = number.next(byte) {
            self.state = State::Number(next);
            self.text.push(byte);
        } else if let Some(kind) = number.end(byte) {
            self.finish(kind, emit);
            self.start(byte, emit);
        } else {
            self.stray(byte, emit);
        }
    }

    fn start(&mut self, byte: u8, emit: &mut dyn FnMut(Token)) {
        self.state = State::Start;
        let kind = match byte {
            b' ' | b'\t' | b'\r' | b'\n' => return,
            b'{' => TokenKind::OpenBrace,
            b'}' => TokenKind::CloseBrace,
            b'[' => TokenKind::OpenBracket,
            b']' => TokenKind::CloseBracket,
            b',' => TokenKind::Comma,
            b':' => TokenKind::Colon,
            b'"' | b'\'' => {
                let (quote, escaped) = (byte, false);
                self.state = State::String { quote, escaped };
                return;
            }
            _ => {
                self.state = match byte {
                    b'a'..=b'z' => State::Keyword,
                    b'-' => State::Number(NumberState::Minus),
                    b'0' => State::Number(NumberState::LeadingZero),
                    b'1'..=b'9' => State::Number(NumberState::Digits),
                    _ => return self.stray(byte, emit),
                };
                self.text.push(byte);
                return;
            }
        };
        self.text.push(byte);
        self.finish(kind, emit);
    }

    fn finish(&mut self, kind: TokenKind, emit: &mut dyn FnMut(Token)) {
        self.state = State::Start;
        let text = std::mem::take(&mut self.text);
        emit(Token { kind, text });
    }

    fn stray(&mut self, byte: u8, emit: &mut dyn FnMut(Token)) {
        self.text.push(byte);
        self.finish(TokenKind::Stray, emit);
        self.state = State::Recovery;
    }
}

fn is_separator(byte: u8) -> bool {
    matches!(
        byte,
        b' ' | b'\t' | b'\r' | b'\n' | b'{' | b'}' | b'[' | b']' | b',' | b':'
    )
}
