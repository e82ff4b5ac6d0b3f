//! Secrets by name: what `secret` objects hold, for drivers that need a password or a key.
//!
//! Owns the bytes, wiped when the last user drops them. Must not know: where they came from.

use crate::error::{Error, ErrorKind, Result};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use zeroize::Zeroizing;

/// A secret's bytes.
pub type Secret = Arc<Zeroizing<Vec<u8>>>;

/// The secrets of a process. Used by the control thread only.
#[derive(Default)]
pub struct Secrets {
    by_id: RefCell<BTreeMap<String, Secret>>,
}

impl Secrets {
    /// Adds a secret, or replaces one.
    pub fn insert(&self, id: String, bytes: Zeroizing<Vec<u8>>) {
        self.by_id.borrow_mut().insert(id, Arc::new(bytes));
    }
    /// Removes a secret; false when there is none. Who has used it keeps what was made of it.
    pub fn remove(&self, id: &str) -> bool {
        self.by_id.borrow_mut().remove(id).is_some()
    }
    /// Whether there is a secret of this name.
    pub fn contains(&self, id: &str) -> bool {
        self.by_id.borrow().contains_key(id)
    }
    /// The secret `id`.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, id: &str) -> Result<Secret> {
        let found = self.by_id.borrow().get(id).cloned();
        found.ok_or_else(|| not_found(id))
    }
    /// The secret `id`, which is to be a password.
    ///
    /// # Errors
    /// `NotFound`, `Invalid` when it is no text.
    pub fn text(&self, id: &str) -> Result<Secret> {
        let secret = self.get(id)?;
        if std::str::from_utf8(&secret).is_err() {
            let message = format!("Data from secret {id} is not valid UTF-8");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Ok(secret)
    }
}

/// The error for a secret that is not there.
pub(crate) fn not_found(id: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("No secret with id '{id}'"))
}

/// The bytes of base64 text, in which white space does not count; `None` when it is none.
pub fn from_base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut symbols = text.iter().filter(|byte| !byte.is_ascii_whitespace());
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut held, mut count) = (0_u32, 0_u32, 0_usize);
    let mut padding = 0;
    for &symbol in symbols.by_ref() {
        let value = match symbol {
            b'A'..=b'Z' => symbol - b'A',
            b'a'..=b'z' => symbol - b'a' + 26,
            b'0'..=b'9' => symbol - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => {
                padding += 1;
                continue;
            }
            _ => return None,
        };
        if padding > 0 {
            return None;
        }
        bits = bits << 6 | u32::from(value);
        (held, count) = (held + 6, count + 1);
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    let whole = (count + padding).is_multiple_of(4) && padding <= 2;
    (whole && bits == 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_decoded_and_other_text_refused() {
        for (text, bytes) in [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9v\nYg==", "foob"),
        ] {
            assert_eq!(from_base64(text.as_bytes()), Some(bytes.into()));
        }
        for bad in ["Z", "Zg", "Zg=", "Z===", "Zg==Zg==", "Zh==", "Zg=!"] {
            assert_eq!(from_base64(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn a_password_is_text() {
        let secrets = Secrets::default();
        secrets.insert("s".into(), Zeroizing::new(vec![0xff]));
        let refused = secrets.text("s").unwrap_err();
        assert_eq!(refused.message, "Data from secret s is not valid UTF-8");
        assert_eq!(
            secrets.get("x").unwrap_err().message,
            "No secret with id 'x'"
        );
    }
}
