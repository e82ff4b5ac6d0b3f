//! Names of files as FAT has them: a long one in UTF-16 and a short one of eight and three characters
//! (Microsoft's "FAT: General Overview of On-Disk Format", "FAT Directory Structure" and "FAT Long
//! Directory Entries").

use std::collections::{HashMap, HashSet};

/// Bytes of a short name, padded with spaces.
pub(super) const SHORT: usize = 11;
const BASE: usize = 8;

/// The two names of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Names {
    /// The short one.
    pub(super) short: [u8; SHORT],
    /// The long one, unless the short one says it all.
    pub(super) long: Option<Vec<u16>>,
}

/// The names that a directory has so far. Names that differ in upper and lower case only are the same to FAT.
#[derive(Default)]
pub(super) struct Taken {
    long: HashSet<String>,
    short: HashSet<[u8; SHORT]>,
    /// The last number that told names like this one apart; directories with many like names are usual.
    numbers: HashMap<String, u32>,
}

impl Taken {
    /// Names for a file that the host calls `name`: what FAT forbids is replaced by `_`, and what is
    /// there already is told apart by a number.
    pub(super) fn names(&mut self, name: &str) -> Names {
        let long = self.long(long_characters(name));
        if let Some(short) = exact_short(&long)
            && self.short.insert(short)
        {
            return Names { short, long: None };
        }
        Names {
            short: self.short(&long),
            long: Some(long.encode_utf16().collect()),
        }
    }

    /// The first of "name.x", "name~1.x", "name~2.x" that is not taken.
    fn long(&mut self, name: String) -> String {
        if self.long.insert(name.to_lowercase()) {
            return name;
        }
        let (base, extension) = match name.rfind('.') {
            Some(dot) if dot > 0 => name.split_at(dot),
            _ => (name.as_str(), ""),
        };
        loop {
            let number = self.number(&name.to_lowercase());
            let candidate = format!("{base}~{number}{extension}");
            if self.long.insert(candidate.to_lowercase()) {
                return candidate;
            }
        }
    }

    fn short(&mut self, long: &str) -> [u8; SHORT] {
        let (base, extension) = shortened(long);
        loop {
            let number = self.number(&format!("{base}/{extension}"));
            let short = with_tail(&base, &extension, number);
            // Files are found by either name: it is no other file's long one.
            if !self.short.contains(&short) && self.long.insert(dotted(&short)) {
                self.short.insert(short);
                return short;
            }
        }
    }

    fn number(&mut self, of: &str) -> u32 {
        let number = self.numbers.entry(of.to_owned()).or_default();
        *number += 1;
        *number
    }
}

fn long_characters(name: &str) -> String {
    let replaced = |c: char| match c {
        '"' | '*' | '/' | ':' | '<' | '>' | '?' | '\\' | '|' | '\0'..='\x1f' | '\x7f' => '_',
        c => c,
    };
    let kept: String = name.chars().map(replaced).collect();
    let end = kept.trim_end_matches(['.', ' ']).len();
    // Dots and spaces at the end are dropped by those who read them.
    format!("{}{}", &kept[..end], "_".repeat(kept.len() - end))
}

fn is_short_character(c: char) -> bool {
    c.is_ascii_uppercase() || c.is_ascii_digit() || "!#$%&'()-@^_`{}~".contains(c)
}

fn padded(base: &str, extension: &str) -> [u8; SHORT] {
    let mut short = [b' '; SHORT];
    short[..base.len()].copy_from_slice(base.as_bytes());
    short[BASE..BASE + extension.len()].copy_from_slice(extension.as_bytes());
    short
}

/// The short name that is the same as `name`.
fn exact_short(name: &str) -> Option<[u8; SHORT]> {
    let (base, extension) = name.split_once('.').unwrap_or((name, ""));
    let fits = (1..=BASE).contains(&base.len()) && extension.len() <= SHORT - BASE;
    let has_empty_extension = name.ends_with('.');
    let plain = base
        .chars()
        .chain(extension.chars())
        .all(is_short_character);
    (fits && plain && !has_empty_extension).then(|| padded(base, extension))
}

/// Base and extension of a short name like `name`, each cut to its length.
fn shortened(name: &str) -> (String, String) {
    let part = |text: &str, length: usize| -> String {
        let upper = text.chars().filter(|c| !matches!(c, ' ' | '.'));
        let upper = upper.map(|c| c.to_ascii_uppercase());
        let plain = upper.map(|c| if is_short_character(c) { c } else { '_' });
        plain.take(length).collect()
    };
    let trimmed = name.trim_start_matches(['.', ' ']);
    let (base, extension) = trimmed.rsplit_once('.').unwrap_or((trimmed, ""));
    let base = match part(base, BASE) {
        empty if empty.is_empty() => "_".to_owned(),
        base => base,
    };
    (base, part(extension, SHORT - BASE))
}

/// A short name as it is looked up.
fn dotted(short: &[u8; SHORT]) -> String {
    let text = |part: &[u8]| String::from_utf8_lossy(part).trim_end().to_lowercase();
    let (base, extension) = short.split_at(BASE);
    match text(extension) {
        none if none.is_empty() => text(base),
        extension => format!("{}.{extension}", text(base)),
    }
}

fn with_tail(base: &str, extension: &str, number: u32) -> [u8; SHORT] {
    let tail = format!("~{number}");
    let kept = &base[..base.len().min(BASE - tail.len())];
    padded(&format!("{kept}{tail}"), extension)
}

/// The checksum by which long entries belong to a short one.
pub(super) fn checksum(short: &[u8; SHORT]) -> u8 {
    short
        .iter()
        .fold(0, |sum: u8, byte| sum.rotate_right(1).wrapping_add(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_of(names: &[&str]) -> Vec<(String, Option<String>)> {
        let mut taken = Taken::default();
        let both = |name: &&str| {
            let names = taken.names(name);
            let long = names.long.map(|long| String::from_utf16(&long).unwrap());
            (String::from_utf8(names.short.to_vec()).unwrap(), long)
        };
        names.iter().map(both).collect()
    }

    #[test]
    fn names_that_fit_have_no_long_one_and_others_do() {
        let expected = [
            ("README", "README     ", None),
            ("A.TXT", "A       TXT", None),
            ("readme.txt", "README~1TXT", Some("readme.txt")),
            ("README.TXT", "README~2TXT", None),
            ("long name.bin", "LONGNA~1BIN", Some("long name.bin")),
            ("long name 2.bin", "LONGNA~2BIN", Some("long name 2.bin")),
            (".profile", "PROFIL~1   ", Some(".profile")),
            ("...a", "A~1        ", Some("...a")),
            ("äöü", "___~1      ", Some("äöü")),
            ("a:b.", "A_B_~1     ", Some("a_b_")),
            ("archive.tar.gz", "ARCHIV~1GZ ", Some("archive.tar.gz")),
        ];
        let given = expected.map(|(name, ..)| name);
        let expected = expected.map(|(_, short, long)| (short.to_owned(), long.map(str::to_owned)));
        assert_eq!(names_of(&given), expected);
    }

    #[test]
    fn a_thousand_like_names_are_told_apart() {
        let given: Vec<String> = (0..1000).map(|n| format!("measurement {n}.data")).collect();
        let given: Vec<&str> = given.iter().map(String::as_str).collect();
        let short: HashSet<String> = names_of(&given).into_iter().map(|(s, _)| s).collect();
        assert_eq!(short.len(), 1000);
        assert!(short.contains("MEA~1000DAT"), "{short:?}");
    }
}
