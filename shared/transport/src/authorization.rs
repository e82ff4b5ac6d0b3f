//! Who may come in, by the name that their certificate proves.

use std::path::PathBuf;

/// Whether a rule lets somebody in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Yes.
    Allow,
    /// No.
    Deny,
}

/// How a rule compares names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RuleFormat {
    /// Byte by byte.
    #[default]
    Exact,
    /// `*` for any text, `?` for any character.
    Glob,
}

/// A rule of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The name, or a pattern for it.
    pub pattern: String,
    /// What happens to whom it fits.
    pub access: Access,
    /// How it is compared.
    pub format: RuleFormat,
}

/// Decides about names.
pub enum Authorization {
    /// One name is let in.
    Simple(String),
    /// The first rule that fits decides.
    List {
        /// In order.
        rules: Vec<Rule>,
        /// Without any that fits.
        otherwise: Access,
    },
    /// A list in a file, which is read for each decision, so that changes of it count at once.
    ListFile {
        /// The file.
        path: PathBuf,
        /// Makes rules of its content; an error denies.
        parse: fn(&str) -> Option<Authorization>,
    },
}

impl Authorization {
    /// Whether `name` may come in.
    pub fn allows(&self, name: &str) -> bool {
        match self {
            Self::Simple(identity) => identity == name,
            Self::List { rules, otherwise } => {
                let rule = rules.iter().find(|rule| rule.fits(name));
                rule.map_or(*otherwise, |rule| rule.access) == Access::Allow
            }
            Self::ListFile { path, parse } => {
                let text = std::fs::read_to_string(path).ok();
                let list = text.and_then(|text| parse(&text));
                list.is_some_and(|list| list.allows(name))
            }
        }
    }
}

impl Rule {
    fn fits(&self, name: &str) -> bool {
        match self.format {
            RuleFormat::Exact => self.pattern == name,
            RuleFormat::Glob => glob(&self.pattern, name),
        }
    }
}

/// Whether a pattern fits a text. Takes no longer than the product of their lengths.
fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), text.chars().collect());
    let (mut at, mut from) = (0, 0);
    // The last `*`, and where its text ends for now.
    let mut star = None;
    while from < text.len() {
        match pattern.get(at) {
            Some('*') => {
                star = Some((at, from));
                at += 1;
            }
            Some(wanted) if *wanted == '?' || *wanted == text[from] => {
                at += 1;
                from += 1;
            }
            _ => match star {
                Some((place, end)) => {
                    star = Some((place, end + 1));
                    at = place + 1;
                    from = end + 1;
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|rest| *rest == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_any_text_in_their_gaps() {
        for (pattern, text, fits) in [
            ("CN=*,O=us", "CN=a,b,O=us", true),
            ("CN=*,O=us", "CN=a,O=usa", false),
            ("?", "", false),
            ("*", "", true),
            ("a*b*c", "aXbYbZc", true),
        ] {
            assert_eq!(glob(pattern, text), fits, "{pattern} {text}");
        }
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rule = |pattern: &str, access, format| Rule {
            pattern: pattern.to_owned(),
            access,
            format,
        };
        let list = Authorization::List {
            rules: vec![
                rule("bob", Access::Deny, RuleFormat::Exact),
                rule("b*", Access::Allow, RuleFormat::Glob),
            ],
            otherwise: Access::Deny,
        };
        assert!(!list.allows("bob") && list.allows("bert") && !list.allows("alice"));
    }

    #[test]
    fn a_list_that_cannot_be_read_lets_nobody_in() {
        let list = Authorization::ListFile {
            path: "/nonexistent".into(),
            parse: |_| Some(Authorization::Simple("a".to_owned())),
        };
        assert!(!list.allows("a"));
    }
}
