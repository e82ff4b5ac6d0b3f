//! The words of one command: options, numbers, patterns.

use crate::command::Problem;
use tools::size::{self, SizeError};

/// Longest request in bytes.
pub(crate) const MAX_REQUEST: u64 = 0x7fff_fe00;

/// What requests of some commands must be a multiple of, in bytes.
const SECTOR: u64 = 512;

/// A command's words, sorted.
#[derive(Debug, Default)]
pub(crate) struct Words {
    /// Options in order, with their values ("" for those without).
    pub(crate) options: Vec<(char, String)>,
    /// What is not an option.
    pub(crate) operands: Vec<String>,
}

/// Sorts the words of `command` into options (`known` as for getopt) and operands, which may be
/// mixed.
pub(crate) fn parse(command: &str, words: &[&str], known: &str) -> Result<Words, Problem> {
    let mut parsed = Words::default();
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        if *word == "--" {
            parsed.operands.extend(rest.map(|word| (*word).to_owned()));
            break;
        }
        let Some(group) = word.strip_prefix('-').filter(|group| !group.is_empty()) else {
            parsed.operands.push((*word).to_owned());
            continue;
        };
        for (at, letter) in group.char_indices() {
            let inline = &group[at + letter.len_utf8()..];
            match takes_value(known, letter) {
                None => {
                    let message = format!("{command}: invalid option -- '{letter}'");
                    return Err(Problem::Option(message));
                }
                Some(false) => parsed.options.push((letter, String::new())),
                Some(true) => {
                    let value = match inline {
                        "" => rest.next().copied(),
                        inline => Some(inline),
                    };
                    let value = value.ok_or_else(|| {
                        let message =
                            format!("{command}: option requires an argument -- '{letter}'");
                        Problem::Option(message)
                    })?;
                    parsed.options.push((letter, value.to_owned()));
                    break;
                }
            }
        }
    }
    Ok(parsed)
}

fn takes_value(known: &str, letter: char) -> Option<bool> {
    let at = known.find(letter).filter(|_| letter != ':')?;
    Some(known[at + letter.len_utf8()..].starts_with(':'))
}

impl Words {
    /// Whether a flag was given.
    pub(crate) fn has(&self, letter: char) -> bool {
        self.options.iter().any(|(given, _)| *given == letter)
    }
    /// The last value of an option.
    pub(crate) fn value(&self, letter: char) -> Option<&str> {
        let given = self.options.iter().rev();
        let mut values = given.filter(|(given, _)| *given == letter);
        values.next().map(|(_, value)| &**value)
    }
}

/// A number of bytes.
pub(crate) fn number(text: &str) -> Result<u64, Problem> {
    let problem = match size::parse(text) {
        Ok(value) if value <= i64::MAX as u64 => return Ok(value),
        Ok(_) | Err(SizeError::OutOfRange) => "argument too large",
        Err(SizeError::Malformed) => "non-numeric argument, or extraneous/unrecognized suffix",
    };
    Err(Problem::line(format!("Parsing error: {problem} -- {text}")))
}

/// The length of one request.
pub(crate) fn length(text: &str) -> Result<u64, Problem> {
    match number(text)? {
        bytes if bytes > MAX_REQUEST => Err(Problem::line(format!(
            "length cannot exceed {MAX_REQUEST}, given {text}"
        ))),
        bytes => Ok(bytes),
    }
}

/// The sum of the lengths of a request with several buffers.
pub(crate) fn total(texts: &[String]) -> Result<u64, Problem> {
    let mut total = 0;
    for text in texts {
        let bytes = number(text)?;
        if bytes > MAX_REQUEST {
            return Err(Problem::line(format!(
                "Argument '{text}' exceeds maximum size {MAX_REQUEST}"
            )));
        }
        total += bytes;
        if total > MAX_REQUEST {
            return Err(Problem::line(format!(
                "The total number of bytes exceed the maximum size {MAX_REQUEST}"
            )));
        }
    }
    Ok(total)
}

/// A byte: decimal, `0x` hexadecimal or `0` octal.
pub(crate) fn pattern(text: &str) -> Result<u8, Problem> {
    integer(text)
        .and_then(|value| u8::try_from(value).ok())
        .ok_or_else(|| Problem::line(format!("{text} is not a valid pattern byte")))
}

/// An integer as C reads it.
pub(crate) fn integer(text: &str) -> Option<u64> {
    let digits = text.strip_prefix('+').unwrap_or(text);
    let (digits, radix) = match digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        Some(hexadecimal) => (hexadecimal, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (&digits[1..], 8),
        None => (digits, 10),
    };
    let plain = digits.starts_with(|first: char| first.is_digit(radix));
    plain.then(|| u64::from_str_radix(digits, radix).ok())?
}

/// Offset and length must be whole sectors.
pub(crate) fn sectors(offset: u64, length: u64) -> Result<(), Problem> {
    for (value, name) in [(offset, "offset"), (length, "count")] {
        if !value.is_multiple_of(SECTOR) {
            return Err(Problem::line(format!(
                "{value} is not a sector-aligned value for '{name}'"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_stick_together_and_stand_anywhere() {
        let words = parse("w", &["0", "-zP", "7", "1", "-s3", "--", "-q"], "zP:s:q").unwrap();
        assert_eq!(words.operands, ["0", "1", "-q"]);
        assert!(words.has('z') && !words.has('q'));
        assert_eq!((words.value('P'), words.value('s')), (Some("7"), Some("3")));
    }

    #[test]
    fn mistakes_name_the_command_and_the_letter() {
        let message = |words: &[&str]| match parse("read", words, "P:") {
            Err(Problem::Option(message)) => message,
            other => panic!("{other:?}"),
        };
        assert_eq!(message(&["-x"]), "read: invalid option -- 'x'");
        assert_eq!(message(&["-:"]), "read: invalid option -- ':'");
        assert_eq!(message(&["-P"]), "read: option requires an argument -- 'P'");
    }

    #[test]
    fn integers_are_read_as_in_c() {
        let read = [("7", 7), ("0x1F", 31), ("010", 8), ("0", 0), ("+5", 5)];
        for (text, value) in read {
            assert_eq!(integer(text), Some(value), "{text}");
        }
        for text in ["", "-1", "0x", "09", "1k", "zz", "++1", "0x+1"] {
            assert_eq!(integer(text), None, "{text}");
        }
        assert!(pattern("256").is_err());
    }

    #[test]
    fn requests_have_a_longest_length() {
        assert!(length("2147483136").is_ok());
        assert!(length("2147483137").is_err());
        assert!(total(&["1G".into(), "1G".into()]).is_err());
    }
}
