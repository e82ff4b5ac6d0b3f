//! What is printed of requests: sizes, rates, hex dumps.

use std::fmt::Write;
use std::time::Duration;
use tools::output;

/// Bytes with a binary unit and three decimals, which are left out when they are zero.
pub(crate) fn amount(value: f64) -> String {
    const UNITS: [&str; 6] = ["EiB", "PiB", "TiB", "GiB", "MiB", "KiB"];
    let unit = UNITS
        .iter()
        .enumerate()
        .map(|(index, unit)| ((1_u64 << (60 - 10 * index)) as f64, *unit))
        .find(|(size, _)| value >= *size);
    let (text, unit) = match unit {
        Some((size, unit)) => (format!("{:.3}", value / size), unit),
        None => (format!("{value:.6}"), "bytes"),
    };
    let digits = text.find(".000").map_or(&text[..], |at| &text[..at]);
    format!("{digits} {unit}")
}

/// [`amount`] of a whole number of bytes.
pub(crate) fn size(bytes: u64) -> String {
    amount(bytes as f64)
}

/// How statistics are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Style {
    /// For people.
    #[default]
    Human,
    /// Separated by commas: `-C`.
    Machine,
    /// Not at all: `-q`.
    Quiet,
}

/// A request that succeeded.
pub(crate) struct Done {
    /// "read", "wrote" or "discard".
    pub(crate) verb: &'static str,
    /// Where, in bytes.
    pub(crate) offset: u64,
    /// How much was asked for and done, in bytes.
    pub(crate) length: u64,
    /// How long it took.
    pub(crate) elapsed: Duration,
}

impl Done {
    /// Prints the statistics.
    pub(crate) fn report(&self, style: Style) {
        let seconds = self.elapsed.max(Duration::from_nanos(1)).as_secs_f64();
        let rate = self.length as f64 / seconds;
        let operations = seconds.recip();
        let Self {
            verb,
            offset,
            length,
            elapsed,
        } = self;
        match style {
            Style::Quiet => {}
            Style::Human => output::print(&format!(
                "{verb} {length}/{length} bytes at offset {offset}\n{}, 1 ops; {} ({}/sec and \
                 {operations:.4} ops/sec)\n",
                size(*length),
                duration(*elapsed),
                amount(rate)
            )),
            Style::Machine => output::line(&format!(
                "{length},1,{},{rate:.3},{operations:.3}",
                clock(*elapsed)
            )),
        }
    }
}

/// Hours, minutes, seconds and hundredths.
fn clock(elapsed: Duration) -> String {
    let seconds = elapsed.as_secs();
    format!(
        "{}:{:02}:{:02}.{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        elapsed.subsec_millis() / 10
    )
}

fn duration(elapsed: Duration) -> String {
    match elapsed.as_secs() {
        0 => format!("00.{:02} sec", elapsed.subsec_millis() / 10),
        _ => clock(elapsed),
    }
}

/// Sixteen bytes a line: offset, hexadecimal, letters and digits.
pub(crate) fn dump(offset: u64, bytes: &[u8]) {
    for (index, row) in bytes.chunks(16).enumerate() {
        let mut line = format!("{:08x}:  ", offset + 16 * index as u64);
        for byte in row {
            write!(line, "{byte:02x} ").expect("a string takes any text");
        }
        line.push(' ');
        line.extend(row.iter().map(|byte| match byte.is_ascii_alphanumeric() {
            true => char::from(*byte),
            false => '.',
        }));
        output::line(&line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_three_decimals_unless_they_are_zero() {
        let shown = [
            (0.0, "0 bytes"),
            (512.0, "512 bytes"),
            (1023.0, "1023 bytes"),
            (1536.0, "1.500 KiB"),
            (65536.0, "64 KiB"),
            (34.466_362, "34.466362 bytes"),
            (3_080_192.0, "2.938 MiB"),
            ((1_u64 << 60) as f64, "1 EiB"),
        ];
        for (value, text) in shown {
            assert_eq!(amount(value), text);
        }
    }

    #[test]
    fn times_of_a_second_and_more_show_hours() {
        assert_eq!(duration(Duration::from_millis(129)), "00.12 sec");
        assert_eq!(duration(Duration::from_millis(1500)), "0:00:01.50");
        assert_eq!(clock(Duration::from_secs(3723)), "1:02:03.00");
    }
}
