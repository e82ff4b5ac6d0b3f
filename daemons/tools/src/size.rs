//! Sizes: as users write them, and as they are shown.

use crate::failure::{Failure, report};

/// Why a text is not a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeError {
    /// It is not a number of bytes.
    Malformed,
    /// It does not fit.
    OutOfRange,
}

/// Bytes: decimal, perhaps with a fraction and a suffix, or hexadecimal without one.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let text = text.trim_start_matches(|c: char| c.is_ascii_whitespace());
    let text = text.strip_prefix('+').unwrap_or(text);
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(SizeError::Malformed);
        }
        return u64::from_str_radix(digits, 16).map_err(|_| SizeError::OutOfRange);
    }
    let whole_end = text.bytes().take_while(u8::is_ascii_digit).count();
    if whole_end == 0 {
        return Err(SizeError::Malformed);
    }
    let (whole, rest) = text.split_at(whole_end);
    let (fraction, suffix) = match rest.strip_prefix('.') {
        None => ("", rest),
        Some(after) => after.split_at(after.bytes().take_while(u8::is_ascii_digit).count()),
    };
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(SizeError::Malformed),
    };
    let part: f64 = match fraction {
        "" => 0.0,
        digits => format!("0.{digits}")
            .parse()
            .map_err(|_| SizeError::Malformed)?,
    };
    if shift == 0 && part != 0.0 {
        return Err(SizeError::Malformed);
    }
    let whole: u64 = whole.parse().map_err(|_| SizeError::OutOfRange)?;
    let bytes = whole.checked_mul(1 << shift).ok_or(SizeError::OutOfRange)?;
    // Half away from zero, as the fraction of a power of two.
    let extra = (part * (1_u64 << shift) as f64 + 0.5) as u64;
    bytes.checked_add(extra).ok_or(SizeError::OutOfRange)
}

/// A size on the command line, called `what` in messages, at most `i64::MAX`.
pub fn argument(what: &str, text: &str) -> Result<u64, Failure> {
    match parse(text) {
        Ok(bytes) if bytes <= i64::MAX as u64 => Ok(bytes),
        Ok(_) | Err(SizeError::OutOfRange) => Err(Failure::message(format!(
            "Invalid {what} specified. Must be between 0 and {}.",
            i64::MAX
        ))),
        Err(SizeError::Malformed) => {
            report(&format!(
                "Invalid {what} specified. You may use k, M, G, T, P or E suffixes for"
            ));
            Err(Failure::message(
                "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.",
            ))
        }
    }
}

/// The message for an option whose value is not a size.
pub fn option_error(name: &str, value: &str, error: SizeError) -> String {
    match error {
        SizeError::OutOfRange => format!("Value '{value}' is out of range for parameter '{name}'"),
        SizeError::Malformed => format!(
            "Parameter '{name}' expects a non-negative number below 2^64\n\
             Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
             and exabytes, respectively."
        ),
    }
}

/// Bytes for people: three significant digits and a binary unit.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    // A unit is used from 1000 of the smaller one on.
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}B", three_digits(value), UNITS[unit])
}

/// `%.3g` for values from 0 to below 1024.
fn three_digits(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let scientific = format!("{value:.2e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if exponent >= 3 {
        let digits = digits.trim_end_matches('0').trim_end_matches('.');
        return format!("{digits}e+{exponent:02}");
    }
    let decimals = (2 - exponent).max(0) as usize;
    let plain = format!("{value:.decimals$}");
    match plain.contains('.') {
        true => plain.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_may_have_fractions_and_suffixes() {
        let sizes = [
            ("0", 0),
            ("1.5M", 3 << 19),
            ("0x100", 256),
            ("12b", 12),
            ("1.0", 1),
            (" 7k", 7168),
            ("15.5E", 31 << 59),
        ];
        for (text, bytes) in sizes {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "-1", "1.5", "k", "1x", "0x", "1kk", "0x1k", ".5k"] {
            assert_eq!(parse(text), Err(SizeError::Malformed), "{text}");
        }
        for text in ["16E", "99999999999999999999", "0x10000000000000000"] {
            assert_eq!(parse(text), Err(SizeError::OutOfRange), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_with_three_digits() {
        let shown = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1 << 20, "1 MiB"),
            (1_000_001, "977 KiB"),
            (3 << 29, "1.5 GiB"),
            (1_023_999, "1e+03 KiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (bytes, text) in shown {
            assert_eq!(human(bytes), text, "{bytes}");
        }
    }
}
