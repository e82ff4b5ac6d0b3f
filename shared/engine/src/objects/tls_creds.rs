//! `tls-creds-x509`, `tls-creds-psk`, `tls-creds-anon`: what TLS proves, and asks of peers.
//!
//! Files are read when the object is made, which for the command line is before the sandbox.

use std::path::PathBuf;
use std::sync::Arc;

use block::Graph;
use qmp::{Error, Result, Value};
use serde::Deserialize;
use transport::{CredentialKind, Credentials, Endpoint, PeerCheck};

use super::{Home, Object, ObjectType, Property};

const ENDPOINT: Property = Property::new("endpoint", "QCryptoTLSCredsEndpoint");
const DIR: Property = Property::new("dir", "string");
const VERIFY_PEER: Property = Property::new("verify-peer", "bool");

/// Certificates.
pub(super) const X509: ObjectType = ObjectType {
    name: "tls-creds-x509",
    parent: "tls-creds",
    properties: &[
        DIR,
        ENDPOINT,
        VERIFY_PEER,
        Property::new("passwordid", "string"),
        Property::new("sanity-check", "bool"),
    ],
    make: |home, id, arguments| {
        let given: X509Properties = arguments.parse()?;
        let password = given.passwordid.as_deref().map(|id| password(home, id));
        let kind = CredentialKind::X509 {
            dir: directory(given.dir.clone())?,
            peers: match given.verify_peer {
                false => PeerCheck::Anybody,
                true => PeerCheck::Verified,
            },
            password: password.transpose()?,
        };
        let held = Held {
            endpoint: given.endpoint,
            dir: given.dir,
            verify_peer: given.verify_peer,
        };
        add(home, (id, &kind), held)
    },
};

/// Pre-shared keys.
pub(super) const PRE_SHARED: ObjectType = ObjectType {
    name: "tls-creds-psk",
    parent: "tls-creds",
    properties: &[
        DIR,
        ENDPOINT,
        VERIFY_PEER,
        Property::new("username", "string"),
    ],
    make: |home, id, arguments| {
        let given: PskProperties = arguments.parse()?;
        let kind = CredentialKind::Psk {
            dir: directory(given.dir.clone())?,
            username: given.username.unwrap_or_else(|| "qemu".to_owned()),
        };
        let held = Held {
            endpoint: given.endpoint,
            dir: given.dir,
            verify_peer: given.verify_peer,
        };
        add(home, (id, &kind), held)
    },
};

/// No proof at all.
pub(super) const ANONYMOUS: ObjectType = ObjectType {
    name: "tls-creds-anon",
    parent: "tls-creds",
    properties: &[DIR, ENDPOINT, VERIFY_PEER],
    make: |home, id, arguments| {
        let given: AnonymousProperties = arguments.parse()?;
        let held = Held {
            endpoint: given.endpoint,
            dir: given.dir,
            verify_peer: given.verify_peer,
        };
        add(home, (id, &CredentialKind::Anonymous), held)
    },
};

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Side {
    #[default]
    Client,
    Server,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct X509Properties {
    #[serde(default)]
    endpoint: Side,
    dir: Option<String>,
    #[serde(default = "yes")]
    verify_peer: bool,
    /// The secret that the private key is encrypted with.
    passwordid: Option<String>,
    /// Certificates are checked in any case.
    #[serde(rename = "sanity-check")]
    _sanity_check: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct PskProperties {
    #[serde(default)]
    endpoint: Side,
    dir: Option<String>,
    #[serde(default = "yes")]
    verify_peer: bool,
    username: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct AnonymousProperties {
    #[serde(default)]
    endpoint: Side,
    dir: Option<String>,
    #[serde(default = "yes")]
    verify_peer: bool,
}

fn directory(dir: Option<String>) -> Result<PathBuf> {
    let dir = dir.ok_or_else(|| Error::generic("Missing 'dir' property value"))?;
    Ok(dir.into())
}

fn password(home: &Home<'_>, id: &str) -> Result<String> {
    let secret = home.graph.secrets().text(id);
    let secret = secret.map_err(crate::error::from_block)?;
    let text = std::str::from_utf8(&secret);
    let text = text.map_err(|_| Error::generic(format!("secret '{id}' is no text")))?;
    Ok(text.to_owned())
}

/// Credentials that exist. The graph holds what was made of them.
struct Held {
    endpoint: Side,
    dir: Option<String>,
    verify_peer: bool,
}

fn add(
    home: &Home<'_>,
    (id, kind): (&str, &CredentialKind),
    held: Held,
) -> Result<Box<dyn Object>> {
    let endpoint = match held.endpoint {
        Side::Client => Endpoint::Client,
        Side::Server => Endpoint::Server,
    };
    let loaded = Credentials::load(kind, endpoint);
    let credentials = loaded.map_err(|error| Error::generic(error.to_string()))?;
    home.graph
        .objects()
        .insert(id.to_owned(), Arc::new(credentials));
    Ok(Box::new(held))
}

impl Object for Held {
    fn get(&self, property: &str) -> Option<Value> {
        match property {
            "dir" => self.dir.clone().map(Value::from),
            "verify-peer" => Some(Value::from(self.verify_peer)),
            "endpoint" => Some(Value::from(match self.endpoint {
                Side::Client => "client",
                Side::Server => "server",
            })),
            _ => None,
        }
    }

    /// Who uses them keeps them.
    fn release(&self, home: &Home<'_>, id: &str) -> Result<()> {
        home.graph.objects().remove(id);
        Ok(())
    }
}

/// The credentials `id`, for one side.
///
/// # Errors
/// There are none, or they are for the other side.
pub fn find(graph: &Graph, id: &str, endpoint: Endpoint) -> Result<Arc<Credentials>> {
    let found = graph.objects().find::<Credentials>(id);
    let credentials =
        found.ok_or_else(|| Error::generic(format!("No TLS credentials with id '{id}'")))?;
    if credentials.endpoint() == endpoint {
        return Ok(credentials);
    }
    let side = match endpoint {
        Endpoint::Client => "client",
        Endpoint::Server => "server",
    };
    Err(Error::generic(format!(
        "Expected TLS credentials for a {side} endpoint"
    )))
}
