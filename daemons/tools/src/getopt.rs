//! Command lines as getopt_long reads them: `-abvalue`, `--name=value`, `--name value`, unique
//! beginnings of long names, options after operands, `--` to end them.
//!
//! `clap` differs in what its users notice (messages, beginnings of names, `-fqcow2`), so this is
//! its own.

use crate::failure::Failure;

/// An option: its spellings without dashes; those of one character are short.
pub struct Opt {
    names: &'static [&'static str],
    takes_value: bool,
}

impl Opt {
    /// An option without a value.
    pub const fn flag(names: &'static [&'static str]) -> Self {
        Self {
            names,
            takes_value: false,
        }
    }
    /// An option with a value.
    pub const fn value(names: &'static [&'static str]) -> Self {
        Self {
            names,
            takes_value: true,
        }
    }
}

/// A parsed command line.
#[derive(Debug, Default)]
pub struct Parsed {
    /// Options in order: the first spelling of each, and its value ("" for flags).
    pub options: Vec<(&'static str, String)>,
    /// What is not an option.
    pub operands: Vec<String>,
}

/// The only operand of a command that takes one image.
///
/// # Errors
/// When there are more or less.
pub fn one_image(operands: Vec<String>) -> Result<String, Failure> {
    let wrong = |_| Failure::usage("Expecting one image file name");
    let [name] = <[String; 1]>::try_from(operands).map_err(wrong)?;
    Ok(name)
}

/// Parses `arguments`.
pub fn parse(arguments: Vec<String>, known: &[Opt]) -> Result<Parsed, Failure> {
    let mut parsed = Parsed::default();
    let mut rest = arguments.into_iter();
    while let Some(argument) = rest.next() {
        if argument == "--" {
            parsed.operands.extend(rest);
            break;
        }
        if let Some(long) = argument.strip_prefix("--") {
            let (name, inline) = match long.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (long, None),
            };
            let option = find_long(known, name)
                .filter(|option| option.takes_value || inline.is_none())
                .ok_or_else(|| unrecognized(&argument))?;
            let value = match (option.takes_value, inline) {
                (false, _) => String::new(),
                (true, Some(value)) => value,
                (true, None) => rest.next().ok_or_else(|| missing(&argument))?,
            };
            parsed.options.push((option.names[0], value));
        } else if argument.len() > 1 && argument.starts_with('-') {
            parse_short(&argument, &mut rest, (known, &mut parsed))?;
        } else {
            parsed.operands.push(argument);
        }
    }
    Ok(parsed)
}

/// A group of short options, the last perhaps with its value.
fn parse_short(
    argument: &str,
    rest: &mut impl Iterator<Item = String>,
    (known, parsed): (&[Opt], &mut Parsed),
) -> Result<(), Failure> {
    let group = &argument[1..];
    for (at, letter) in group.char_indices() {
        let mut buffer = [0; 4];
        let name: &str = letter.encode_utf8(&mut buffer);
        let option = known
            .iter()
            .find(|option| option.names.contains(&name))
            .ok_or_else(|| unrecognized(argument))?;
        if !option.takes_value {
            parsed.options.push((option.names[0], String::new()));
            continue;
        }
        let inline = &group[at + letter.len_utf8()..];
        let value = match inline {
            "" => rest.next().ok_or_else(|| missing(argument))?,
            inline => inline.to_owned(),
        };
        parsed.options.push((option.names[0], value));
        break;
    }
    Ok(())
}

fn find_long<'o>(known: &'o [Opt], name: &str) -> Option<&'o Opt> {
    let long = |option: &&'o Opt, fits: &dyn Fn(&str) -> bool| {
        option
            .names
            .iter()
            .any(|known| known.len() > 1 && fits(known))
    };
    if let Some(exact) = known
        .iter()
        .find(|option| long(option, &|known| known == name))
    {
        return Some(exact);
    }
    let mut beginnings = known
        .iter()
        .filter(|option| long(option, &|known| known.starts_with(name)));
    let found = beginnings.next();
    found.filter(|_| beginnings.next().is_none() && !name.is_empty())
}

fn unrecognized(argument: &str) -> Failure {
    Failure::usage(format!("unrecognized option '{argument}'"))
}

fn missing(argument: &str) -> Failure {
    Failure::usage(format!("missing argument for option '{argument}'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[Opt] = &[
        Opt::flag(&["q"]),
        Opt::flag(&["U", "force-share"]),
        Opt::value(&["f"]),
        Opt::value(&["object"]),
        Opt::value(&["output"]),
    ];

    fn parsed(line: &str) -> Result<Parsed, String> {
        let arguments = line.split_whitespace().map(str::to_owned).collect();
        parse(arguments, KNOWN).map_err(|failure| match failure {
            Failure::Usage(message) => message,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn options_stand_anywhere_and_values_stick_to_them_or_follow() {
        let line = parsed("a -qfraw b --force --output=json -f qcow2 -- -q").unwrap();
        let expected = [
            ("q", ""),
            ("f", "raw"),
            ("U", ""),
            ("output", "json"),
            ("f", "qcow2"),
        ];
        let options: Vec<_> = line
            .options
            .iter()
            .map(|(name, value)| (*name, &**value))
            .collect();
        assert_eq!(options, expected);
        assert_eq!(line.operands, ["a", "b", "-q"]);
    }

    #[test]
    fn mistakes_are_named_as_they_were_written() {
        assert_eq!(parsed("-qz").unwrap_err(), "unrecognized option '-qz'");
        assert_eq!(parsed("--o x").unwrap_err(), "unrecognized option '--o'");
        assert_eq!(
            parsed("--force=1").unwrap_err(),
            "unrecognized option '--force=1'"
        );
        assert_eq!(
            parsed("-f").unwrap_err(),
            "missing argument for option '-f'"
        );
    }
}
