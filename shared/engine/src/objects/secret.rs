//! `secret` and `secret_keyring` objects: passwords and keys by name.
//!
//! ```text
//!   data | file | key of the kernel ──► [base64] ──► [decrypt with the secret `keyid`: AES-256-CBC] ──► secret
//! ```
//!
//! A file or key is read when the object is made, which for the command line is before the sandbox.
//! Bytes are wiped when the last user drops them, apart from the text of `data`, which the command
//! line or the monitor has seen: `file` is the way to give a password.

use block::error::reason;
use block::secret::from_base64;
use block::{Errno, Graph};
use formats::luks::decrypt_aes_256_cbc;
use linux_keyutils::{Key, KeyError, KeySerialId};
use qmp::{Arguments, Error, Result, Value};
use serde::Deserialize;
use std::fs::File;
use std::io::Read;
use zeroize::Zeroizing;

use super::{Home, Object, ObjectType, Property};

/// The type's table line.
pub(super) const TYPE: ObjectType = ObjectType {
    name: "secret",
    parent: "secret_common",
    properties: &[
        Property::new("data", "string"),
        Property::new("file", "string"),
        Property::new("format", "QCryptoSecretFormat"),
        Property::new("iv", "string"),
        Property::new("keyid", "string"),
    ],
    make,
};

/// Bytes that the kernel keeps.
pub(super) const KEYRING: ObjectType = ObjectType {
    name: "secret_keyring",
    parent: "secret_common",
    properties: &[
        Property::new("format", "QCryptoSecretFormat"),
        Property::new("iv", "string"),
        Property::new("keyid", "string"),
        Property::new("serial", "int"),
    ],
    make: |home, id, mut arguments| {
        let form: Form = arguments.take()?;
        let KeyringProperties { serial } = arguments.parse()?;
        add(home.graph, (id, &form), read_key(serial)?)?;
        let own = vec![("serial", Value::from(serial))];
        Ok(Box::new(Held { form, own }))
    },
};

fn make(home: &Home<'_>, id: &str, mut arguments: Arguments) -> Result<Box<dyn Object>> {
    let form: Form = arguments.take()?;
    let SecretProperties { data, file } = arguments.parse()?;
    let given = given((data.as_deref(), file.as_deref()))?;
    add(home.graph, (id, &form), given)?;
    let own = file.map(|path| ("file", Value::from(path)));
    let own = own.into_iter().collect();
    Ok(Box::new(Held { form, own }))
}

/// A secret that exists. Its bytes are the graph's, and are not told.
struct Held {
    form: Form,
    /// What one type tells besides.
    own: Vec<(&'static str, Value)>,
}

impl Object for Held {
    fn get(&self, property: &str) -> Option<Value> {
        match property {
            "keyid" => self.form.keyid.clone().map(Value::from),
            "iv" => self.form.iv.clone().map(Value::from),
            "format" => Some(Value::from(match self.form.format.unwrap_or_default() {
                Format::Raw => "raw",
                Format::Base64 => "base64",
            })),
            other => {
                let found = self.own.iter().find(|(name, _)| *name == other);
                found.map(|(_, value)| value.clone())
            }
        }
    }

    /// Who has used it keeps what was made of it.
    fn release(&self, home: &Home<'_>, id: &str) -> Result<()> {
        home.graph.secrets().remove(id);
        Ok(())
    }
}

/// Longest file in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Longest key of the kernel in bytes: no type of keys takes more.
const MAX_KEY: usize = 1 << 20;

/// Properties of a `secret` object.
#[derive(Deserialize)]
struct SecretProperties {
    /// The bytes themselves.
    data: Option<String>,
    /// The file that holds them.
    file: Option<String>,
}

/// Properties of a `secret_keyring` object.
#[derive(Deserialize)]
struct KeyringProperties {
    /// The kernel's number of the key.
    serial: i32,
}

/// What is made of bytes.
#[derive(Default, Deserialize)]
struct Form {
    /// How they are given; raw unless told otherwise.
    format: Option<Format>,
    /// The secret that they are encrypted with.
    keyid: Option<String>,
    /// What the encryption started from, in base64.
    iv: Option<String>,
}

/// How bytes are given.
#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Format {
    /// As they are.
    #[default]
    Raw,
    /// In base64.
    Base64,
}

/// The bytes that a `secret` is made of: its data, or the content of its file.
///
/// # Errors
/// With QEMU's words: both or neither are given, an unreadable file.
fn given(given: (Option<&str>, Option<&str>)) -> Result<Zeroizing<Vec<u8>>> {
    match given {
        (Some(_), Some(_)) => Err(Error::generic("'file' and 'data' are mutually exclusive")),
        (None, None) => Err(Error::generic("Must provide 'file' or 'data'")),
        (Some(data), None) => Ok(Zeroizing::new(data.as_bytes().to_vec())),
        (None, Some(path)) => read(path),
    }
}

/// The bytes of the kernel's key number `serial`.
fn read_key(serial: i32) -> Result<Zeroizing<Vec<u8>>> {
    let failed = |reason: String| {
        Error::generic(format!("Unable to read serial key {serial:08x}: {reason}"))
    };
    let key = Key::from_id(KeySerialId(serial));
    let mut bytes = Zeroizing::new(vec![0; MAX_KEY]);
    let length = key.read(&mut *bytes);
    let length = length.map_err(|error| failed(reason(errno_of(error))))?;
    let key = bytes.get(..length);
    let key = key.ok_or_else(|| failed("too long".to_owned()))?;
    Ok(Zeroizing::new(key.to_vec()))
}

fn errno_of(error: KeyError) -> Errno {
    match error {
        KeyError::AccessDenied => Errno::EACCES,
        KeyError::PermissionDenied => Errno::EPERM,
        KeyError::KeyDoesNotExist => Errno::ENOKEY,
        KeyError::KeyExpired => Errno::EKEYEXPIRED,
        KeyError::KeyRevoked => Errno::EKEYREVOKED,
        KeyError::OperationNotSupported => Errno::EOPNOTSUPP,
        KeyError::OutOfMemory => Errno::ENOMEM,
        KeyError::Unknown(errno) => Errno::from_raw(errno),
        _ => Errno::EINVAL,
    }
}

/// Adds the secret `id`, made of bytes in a form.
///
/// # Errors
/// With QEMU's words: bytes that are not base64, a bad key.
fn add(graph: &Graph, (id, form): (&str, &Form), given: Zeroizing<Vec<u8>>) -> Result<()> {
    let mut bytes = match form.format.unwrap_or_default() {
        Format::Raw => given,
        Format::Base64 => decoded(&given)?,
    };
    if let Some(keyid) = &form.keyid {
        bytes = decrypted(graph, keyid, form.iv.as_deref(), bytes)?;
    }
    graph.secrets().insert(id.to_owned(), bytes);
    Ok(())
}

fn read(path: &str) -> Result<Zeroizing<Vec<u8>>> {
    let failed = |error| Error::generic(format!("Unable to read {path}: {error}"));
    let file = File::open(path).map_err(failed)?;
    // Grown once, so that no copy of a shorter buffer stays behind in memory.
    let length = file.metadata().map_err(failed)?.len().min(MAX_FILE) as usize;
    let mut bytes = Zeroizing::new(Vec::with_capacity(length + 1));
    file.take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    match bytes.len() as u64 > MAX_FILE {
        true => Err(Error::generic(format!("Unable to read {path}: too long"))),
        false => Ok(bytes),
    }
}

fn decoded(text: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
    let bytes = from_base64(text).map(Zeroizing::new);
    bytes.ok_or_else(|| Error::generic("Base64 data is not valid"))
}

fn decrypted(
    graph: &Graph,
    keyid: &str,
    iv: Option<&str>,
    mut bytes: Zeroizing<Vec<u8>>,
) -> Result<Zeroizing<Vec<u8>>> {
    let key = graph.secrets().get(keyid);
    let key = key.map_err(|error| Error::generic(error.message))?;
    let key: &[u8; 32] = key[..]
        .try_into()
        .map_err(|_| Error::generic("Key should be 32 bytes in length"))?;
    let iv = iv.ok_or_else(|| Error::generic("IV is required to decrypt secret"))?;
    let iv = decoded(iv.as_bytes())?;
    let iv: &[u8; 16] = iv[..].try_into().map_err(|_| {
        let length = iv.len();
        Error::generic(format!("IV should be 16 bytes in length not {length}"))
    })?;
    if bytes.is_empty() || !bytes.len().is_multiple_of(16) {
        let message = format!("Length {} must be a multiple of block size 16", bytes.len());
        return Err(Error::generic(message));
    }
    decrypt_aes_256_cbc(key, iv, &mut bytes);
    let padding = usize::from(*bytes.last().expect("there is a block"));
    if padding == 0 || padding > 16 {
        return Err(Error::generic(format!(
            "Incorrect number of padding bytes ({padding}) found on decrypted data"
        )));
    }
    let length = bytes.len() - padding;
    bytes.truncate(length);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::graph::NamePolicy;

    fn properties(text: &str) -> Arguments {
        Arguments::from_json(serde_json::from_str(text).unwrap())
    }

    fn add(graph: &Graph, id: &str, properties: &Arguments) -> Result<()> {
        let mut arguments = properties.clone();
        let form: Form = arguments.take()?;
        let SecretProperties { data, file } = arguments.parse()?;
        let given = given((data.as_deref(), file.as_deref()))?;
        super::add(graph, (id, &form), given)
    }

    fn refusal(graph: &Graph, text: &str) -> String {
        add(graph, "s", &properties(text)).unwrap_err().desc
    }

    #[test]
    fn secrets_come_from_data_files_and_other_secrets() {
        let graph = Graph::new(&[], NamePolicy::default());
        let bytes = |id: &str| graph.secrets().get(id).unwrap().to_vec();
        add(&graph, "raw", &properties(r#"{"data": "word"}"#)).unwrap();
        assert_eq!(bytes("raw"), b"word");
        let base64 = r#"{"data": "d29y\nZA==", "format": "base64"}"#;
        add(&graph, "b", &properties(base64)).unwrap();
        assert_eq!(bytes("b"), b"word");
        let path = std::env::temp_dir().join(format!("outboard-secret-{}", std::process::id()));
        std::fs::write(&path, "from a file\n").unwrap();
        let file = format!(r#"{{"file": {:?}}}"#, path.display().to_string());
        add(&graph, "f", &properties(&file)).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(bytes("f"), b"from a file\n");
        // openssl enc -aes-256-cbc -K 0001..1f -iv 00..0f, of "letmein".
        let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
        let master = format!(r#"{{"data": "{key}", "format": "base64"}}"#);
        add(&graph, "master", &properties(&master)).unwrap();
        let sealed = r#"{"data": "CIPHERTEXT", "format": "base64", "keyid": "master",
            "iv": "AAECAwQFBgcICQoLDA0ODw=="}"#;
        let sealed = sealed.replace("CIPHERTEXT", SEALED);
        add(&graph, "sealed", &properties(&sealed)).unwrap();
        assert_eq!(bytes("sealed"), b"letmein");
    }

    const SEALED: &str = "SI4JuWqmJF8bjD9IJ662eg==";

    #[test]
    fn a_secret_that_makes_no_sense_is_refused_with_the_peers_words() {
        let graph = Graph::new(&[], NamePolicy::default());
        for (text, message) in [
            (r#"{}"#, "Must provide 'file' or 'data'"),
            (
                r#"{"data": "a", "file": "b"}"#,
                "'file' and 'data' are mutually exclusive",
            ),
            (r#"{"data": "a", "keyid": "k"}"#, "No secret with id 'k'"),
            (
                r#"{"data": "?", "format": "base64"}"#,
                "Base64 data is not valid",
            ),
        ] {
            assert_eq!(refusal(&graph, text), message);
        }
        add(&graph, "k", &properties(r#"{"data": "short"}"#)).unwrap();
        let text = r#"{"data": "a", "keyid": "k"}"#;
        assert_eq!(refusal(&graph, text), "Key should be 32 bytes in length");
        assert!(!graph.secrets().contains("s"));
    }

    #[test]
    fn a_key_of_the_kernel_is_read_or_its_number_is_named() {
        use linux_keyutils::{KeyRing, KeyRingIdentifier};
        let message = read_key(i32::MAX).unwrap_err().desc;
        let words = "Unable to read serial key 7fffffff: ";
        assert!(message.starts_with(words), "{message}");
        let ring = KeyRing::from_special_id(KeyRingIdentifier::Process, true);
        let Ok(key) = ring.and_then(|ring| ring.add_key("outboard-test", b"letmein")) else {
            eprintln!("skipped: keys of the kernel cannot be made here");
            return;
        };
        let read = read_key(key.get_id().as_raw_id()).unwrap();
        assert_eq!(&read[..], b"letmein");
    }
}
