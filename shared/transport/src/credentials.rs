//! Credentials: what proves who we are, and whom we believe. File names are QEMU's.
//!
//! | kind | directory holds |
//! |---|---|
//! | x509 | `ca-cert.pem`, `ca-crl.pem` (if wanted); `server-cert.pem`, `server-key.pem`; `client-cert.pem`, `client-key.pem` (both or none) |
//! | psk | `keys.psk`: lines `name:key`, keys in hexadecimal |
//! | anon | nothing: no side knows the other |

use openssl::dh::Dh;
use openssl::error::ErrorStack;
use openssl::pkey::PKey;
use openssl::ssl::{
    SslContext, SslContextBuilder, SslMethod, SslMode, SslOptions, SslVerifyMode, SslVersion,
};
use openssl::x509::X509;
use openssl::x509::store::X509Lookup;
use openssl::x509::verify::X509VerifyFlags;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// Longest file in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Which side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Accepts.
    Server,
    /// Connects.
    Client,
}

/// Whether a server asks its clients for certificates. A client always verifies its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerCheck {
    /// It asks, and verifies them.
    Verified,
    /// Anybody may come.
    Anybody,
}

/// What credentials are made of.
#[derive(Clone, Debug)]
pub enum CredentialKind {
    /// Certificates.
    X509 {
        /// Where they are.
        dir: PathBuf,
        /// What a server asks of its clients.
        peers: PeerCheck,
        /// The password of the private key.
        password: Option<String>,
    },
    /// Pre-shared keys.
    Psk {
        /// Where they are.
        dir: PathBuf,
        /// Which one a client uses.
        username: String,
    },
    /// None.
    Anonymous,
}

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("Unable to access credentials {}: {reason}", path.display())]
    Access {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file holds something else.
    #[error("Unable to import {what} {}", path.display())]
    Malformed {
        /// What was expected.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: ErrorStack,
    },
    /// A line of the keys, or a client's own key, is missing or wrong.
    #[error("Unable to load PSK credentials from {}", .0.display())]
    Keys(PathBuf),
    /// The library refuses.
    #[error("Unable to use the credentials")]
    Library(#[from] ErrorStack),
}

/// Credentials of one side. Any thread may use them.
pub struct Credentials {
    pub(crate) context: SslContext,
    pub(crate) endpoint: Endpoint,
    /// Whether the peer shows a certificate that is compared with a host name.
    pub(crate) has_certificates: bool,
}

impl Credentials {
    /// Reads and checks what `kind` names.
    ///
    /// # Errors
    /// A file that cannot be read, or holds something else.
    pub fn load(kind: &CredentialKind, endpoint: Endpoint) -> Result<Self, CredentialsError> {
        let mut builder = SslContext::builder(SslMethod::tls())?;
        builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        builder.set_mode(SslMode::ENABLE_PARTIAL_WRITE | SslMode::ACCEPT_MOVING_WRITE_BUFFER);
        builder.set_options(SslOptions::NO_RENEGOTIATION | SslOptions::NO_COMPRESSION);
        // Sessions are not resumed: every connection proves itself.
        builder.set_num_tickets(0)?;
        match kind {
            CredentialKind::X509 {
                dir,
                peers,
                password,
            } => x509(&mut builder, dir, (endpoint, *peers, password.as_deref()))?,
            CredentialKind::Psk { dir, username } => {
                pre_shared(&mut builder, dir, (endpoint, username))?;
            }
            CredentialKind::Anonymous => anonymous(&mut builder)?,
        }
        Ok(Self {
            context: builder.build(),
            endpoint,
            has_certificates: matches!(kind, CredentialKind::X509 { .. }),
        })
    }

    /// Which side they are for.
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint
    }
}

fn read(path: &Path) -> Result<Vec<u8>, CredentialsError> {
    use std::io::Read;
    let failed = |error: io::Error| {
        let text = error.to_string();
        let reason = text.split(" (os error").next().unwrap_or_default();
        CredentialsError::Access {
            path: path.to_owned(),
            reason: reason.to_owned(),
        }
    };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_FILE)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok(bytes)
}

fn x509(
    builder: &mut SslContextBuilder,
    dir: &Path,
    (endpoint, peers, password): (Endpoint, PeerCheck, Option<&str>),
) -> Result<(), CredentialsError> {
    let malformed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| CredentialsError::Malformed { what, path, source }
    };
    let path = dir.join("ca-cert.pem");
    let authorities = X509::stack_from_pem(&read(&path)?);
    for authority in authorities.map_err(malformed("CA certificate", &path))? {
        builder.cert_store_mut().add_cert(authority)?;
    }
    let revoked = dir.join("ca-crl.pem");
    if revoked.exists() {
        let lookup = builder.cert_store_mut().add_lookup(X509Lookup::file())?;
        let loaded = lookup.load_crl_file(&revoked, openssl::ssl::SslFiletype::PEM);
        loaded.map_err(malformed("certificate revocation list", &revoked))?;
        builder
            .cert_store_mut()
            .set_flags(X509VerifyFlags::CRL_CHECK)?;
    }
    let side = match endpoint {
        Endpoint::Server => "server",
        Endpoint::Client => "client",
    };
    let (own, key) = (
        dir.join(format!("{side}-cert.pem")),
        dir.join(format!("{side}-key.pem")),
    );
    // A client may do without.
    if endpoint == Endpoint::Server || own.exists() || key.exists() {
        let chain = X509::stack_from_pem(&read(&own)?);
        let mut chain = chain.map_err(malformed("certificate", &own))?.into_iter();
        let first = chain.next().ok_or_else(|| CredentialsError::Access {
            path: own.clone(),
            reason: "no certificate in it".to_owned(),
        })?;
        builder.set_certificate(&first)?;
        for further in chain {
            builder.add_extra_chain_cert(further)?;
        }
        let secret = read(&key)?;
        let private = match password {
            None => PKey::private_key_from_pem(&secret),
            Some(password) => PKey::private_key_from_pem_passphrase(&secret, password.as_bytes()),
        };
        builder.set_private_key(private.map_err(malformed("private key", &key))?.as_ref())?;
        builder
            .check_private_key()
            .map_err(malformed("private key", &key))?;
    }
    builder.set_verify(match (endpoint, peers) {
        (Endpoint::Server, PeerCheck::Anybody) => SslVerifyMode::NONE,
        (Endpoint::Server, PeerCheck::Verified) => {
            SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT
        }
        (Endpoint::Client, _) => SslVerifyMode::PEER,
    });
    Ok(())
}

fn pre_shared(
    builder: &mut SslContextBuilder,
    dir: &Path,
    (endpoint, username): (Endpoint, &str),
) -> Result<(), CredentialsError> {
    let path = dir.join("keys.psk");
    let keys = parse_keys(&read(&path)?).ok_or_else(|| CredentialsError::Keys(path.clone()))?;
    // Without certificates, only what the keys prove is left.
    builder.set_cipher_list("PSK")?;
    builder.set_ciphersuites("TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256")?;
    match endpoint {
        Endpoint::Server => builder.set_psk_server_callback(move |_, identity, place| {
            let name = identity.and_then(|name| std::str::from_utf8(name).ok());
            // No key ends the handshake.
            Ok(name
                .and_then(|name| keys.get(name))
                .map_or(0, |key| put(place, key)))
        }),
        Endpoint::Client => {
            let found = keys.get(username).cloned();
            let key = found.ok_or(CredentialsError::Keys(path))?;
            let name = format!("{username}\0");
            builder.set_psk_client_callback(move |_, _, identity, place| {
                if put(identity, name.as_bytes()) == 0 {
                    return Ok(0);
                }
                Ok(put(place, &key))
            });
        }
    }
    Ok(())
}

/// Puts bytes at the start of a place; how many, or 0 when there is no room.
fn put(place: &mut [u8], bytes: &[u8]) -> usize {
    match place.get_mut(..bytes.len()) {
        Some(room) => {
            room.copy_from_slice(bytes);
            bytes.len()
        }
        None => 0,
    }
}

/// `None` when a line is none.
fn parse_keys(text: &[u8]) -> Option<BTreeMap<String, Vec<u8>>> {
    let text = std::str::from_utf8(text).ok()?;
    let lines = text.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    let parsed = lines.map(|line| {
        let (name, key) = line.rsplit_once(':')?;
        let whole = key.len() % 2 == 0 && !key.is_empty() && key.is_ascii();
        let pairs = (0..key.len() / 2).map(|at| u8::from_str_radix(&key[2 * at..2 * at + 2], 16));
        let bytes: Vec<u8> = whole.then(|| pairs.collect::<Result<_, _>>())?.ok()?;
        Some((name.to_owned(), bytes))
    });
    parsed.collect()
}

/// Neither side shows anything; TLS 1.3 has no such mode.
fn anonymous(builder: &mut SslContextBuilder) -> Result<(), CredentialsError> {
    builder.set_max_proto_version(Some(SslVersion::TLS1_2))?;
    builder.set_cipher_list("ADH+AESGCM:AECDH+AES:ADH+AES:@SECLEVEL=0")?;
    builder.set_tmp_dh(Dh::get_2048_256()?.as_ref())?;
    builder.set_verify(SslVerifyMode::NONE);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_lines_of_a_name_and_hexadecimal_digits() {
        let keys = parse_keys(b"# all\nalice:00ff\nb:ob:0a\n\n").expect("keys");
        assert_eq!(keys["alice"], [0, 255]);
        assert_eq!(keys["b:ob"], [10]);
        for wrong in [
            "alice",
            "alice:0",
            "alice:",
            "alice:zz",
            "alice:\u{e4}\u{e4}",
        ] {
            assert!(parse_keys(wrong.as_bytes()).is_none(), "{wrong}");
        }
    }
}
