//! Options of volumes as `create` and `amend` spell them, for `luks` images and for those inside
//! other formats ("encrypt.hash-alg").

use super::amend::{Amend, Select};
use super::cipher::{Algorithm, IvKind, Mode};
use super::hash::Hash;
use super::volume::{CreateOptions, Password};
use block::amend::Force;
use block::create::{OptionKind, OptionSpec};
use block::{Error, ErrorKind};
use serde_json::{Map, Value};
use std::time::Duration;

/// The options that describe a new volume, without a place for them.
pub(crate) const CREATION: &[&str] = &[
    "key-secret",
    "cipher-alg",
    "cipher-mode",
    "ivgen-alg",
    "ivgen-hash-alg",
    "hash-alg",
    "iter-time",
];

/// The options that change key slots, without a place for them.
pub(crate) const AMENDMENT: &[&str] =
    &["state", "new-secret", "old-secret", "keyslot", "iter-time"];

/// Ciphers that have a name and no place in a LUKS header.
const UNSUPPORTED: &[&str] = &["des", "3des"];

/// One option of a table: its name, its help.
pub(crate) const fn text(name: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec::new((name, name), OptionKind::Text, help)
}

/// One option of a table that is a number: its name, its help.
pub(crate) const fn number(name: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec::new((name, name), OptionKind::Number, help)
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

/// The members of an object of options, taken one by one.
pub(crate) struct Members {
    values: Map<String, Value>,
    /// What comes before their names in messages.
    prefix: &'static str,
}

impl Members {
    /// Those of `values`; `prefix` comes before their names in messages ("encrypt.").
    pub(crate) fn new(values: Map<String, Value>, prefix: &'static str) -> Self {
        Self { values, prefix }
    }

    /// Those of the object that option `encrypt` is.
    pub(crate) fn of_encrypt(value: Option<Value>) -> Result<Self, Error> {
        let values = match value {
            None => Map::new(),
            Some(Value::Object(values)) => values,
            Some(_) => {
                let message = "Invalid parameter type for 'encrypt', expected: object";
                return Err(invalid(message));
            }
        };
        Ok(Self::new(values, "encrypt."))
    }

    /// The same members, called by their last name in messages.
    pub(crate) fn without_prefix(self) -> Self {
        Self { prefix: "", ..self }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The error for a mandatory option that is not there.
    pub(crate) fn missing(&self, name: &str) -> Error {
        invalid(format!("Parameter '{}{name}' is missing", self.prefix))
    }

    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>, Error> {
        match self.values.shift_remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(invalid(format!(
                "Invalid parameter type for '{}{name}', expected: string",
                self.prefix
            ))),
        }
    }

    fn integer(&mut self, name: &str) -> Result<Option<i64>, Error> {
        let expects = |prefix| invalid(format!("Parameter '{prefix}{name}' expects a number"));
        match self.values.shift_remove(name) {
            None => Ok(None),
            Some(Value::Number(number)) => {
                let number = number.as_i64().map(Some);
                number.ok_or_else(|| expects(self.prefix))
            }
            Some(Value::String(text)) => text.parse().map(Some).map_err(|_| expects(self.prefix)),
            Some(_) => Err(expects(self.prefix)),
        }
    }

    fn milliseconds(&mut self) -> Result<Option<Duration>, Error> {
        let number = self.integer("iter-time")?;
        let Some(number) = number else {
            return Ok(None);
        };
        let number = u64::try_from(number);
        let number = number.map_err(|_| {
            invalid(format!(
                "Parameter '{}iter-time' expects a number",
                self.prefix
            ))
        })?;
        Ok(Some(Duration::from_millis(number)))
    }

    /// A member that names one of many things.
    fn choice<T>(
        &mut self,
        name: &str,
        of: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(text) = self.text(name)? else {
            return Ok(None);
        };
        of(&text).map(Some).ok_or_else(|| unknown(name, &text))
    }

    pub(crate) fn finish(&self) -> Result<(), Error> {
        match self.values.keys().next() {
            None => Ok(()),
            Some(name) => Err(invalid(format!(
                "Parameter '{}{name}' is unexpected",
                self.prefix
            ))),
        }
    }

    /// The name of the secret that opens or will open the volume.
    pub(crate) fn key_secret(&mut self) -> Result<String, Error> {
        let secret = self.text("key-secret")?;
        secret.ok_or_else(|| missing_key(self.prefix))
    }

    /// What a new volume is to be like.
    pub(crate) fn creation(&mut self) -> Result<CreateOptions, Error> {
        let mut options = CreateOptions::default();
        let algorithm = self.choice("cipher-alg", |name| {
            let known = Algorithm::from_option(name).map(Ok);
            known.or(UNSUPPORTED.contains(&name).then(|| Err(name.to_owned())))
        })?;
        if let Some(mode) = self.choice("cipher-mode", Mode::from_name)? {
            options.cipher.mode = mode;
        }
        let iv_hash = self.choice("ivgen-hash-alg", Hash::from_name)?;
        options.cipher.iv = match self.text("ivgen-alg")?.as_deref() {
            None | Some("plain64") => IvKind::Plain64,
            Some("plain") => IvKind::Plain,
            Some("essiv") => IvKind::Essiv(iv_hash.unwrap_or(Hash::Sha256)),
            Some(other) => return Err(unknown("ivgen-alg", other)),
        };
        if let Some(hash) = self.choice("hash-alg", Hash::from_name)? {
            options.hash = hash;
        }
        if let Some(time) = self.milliseconds()? {
            options.iter_time = time;
        }
        match algorithm {
            Some(Ok(algorithm)) => options.cipher.algorithm = algorithm,
            Some(Err(name)) => return Err(invalid(format!("Algorithm '{name}' not supported"))),
            None => {}
        }
        options.cipher.check()?;
        Ok(options)
    }

    /// The change of key slots that is asked for.
    pub(crate) fn amendment(
        &mut self,
        force: Force,
        secret: impl Fn(&str) -> Result<Password, Error>,
    ) -> Result<Amend, Error> {
        let state = self.text("state")?.ok_or_else(|| self.missing("state"))?;
        let (new, old) = (self.text("new-secret")?, self.text("old-secret")?);
        let slot = self.integer("keyslot")?;
        let iter_time = self.milliseconds()?;
        let force = force == Force::Allow;
        match (state.as_str(), new) {
            ("active", None) => Err(invalid("'new-secret' is required to activate a keyslot")),
            ("active", Some(_)) if old.is_some() => Err(invalid(
                "'old-secret' must not be given when activating keyslots",
            )),
            ("active", Some(new)) => Ok(Amend::Add {
                password: secret(&new)?,
                slot,
                iter_time,
                force,
            }),
            ("inactive", Some(_)) => Err(invalid(
                "'new-secret' must not be given when erasing keyslots",
            )),
            ("inactive", None) if iter_time.is_some() => Err(invalid(
                "'iter-time' must not be given when erasing keyslots",
            )),
            ("inactive", None) => Ok(Amend::Erase(Select {
                slot,
                password: old.as_deref().map(secret).transpose()?,
                force,
            })),
            (other, _) => Err(unknown("state", other)),
        }
    }
}

fn unknown(name: &str, value: &str) -> Error {
    invalid(format!(
        "Parameter '{name}' does not accept value '{value}'"
    ))
}

/// The error of a volume that is used without its password.
pub(crate) fn missing_key(prefix: &str) -> Error {
    invalid(format!(
        "Parameter '{prefix}key-secret' is required for cipher"
    ))
}
