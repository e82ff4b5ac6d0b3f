//! Names of NBD exports: `nbd:HOST:PORT[:exportname=X]`, `nbd:unix:PATH[:exportname=X]`, and URIs.

use super::target::{Address, DEFAULT_PORT, Target};
use block::error::Result;
use block::{Error, ErrorKind};
use serde_json::{Map, Value, json};

const EXPORT: &str = ":exportname=";

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

/// The options that a name stands for.
pub(super) fn parse(name: &str) -> Result<Map<String, Value>> {
    if name.contains("://") {
        return parse_uri(name).ok_or_else(|| invalid("No valid URL specified"));
    }
    let Some(rest) = name.strip_prefix("nbd:") else {
        return Err(invalid("File name string for NBD must start with 'nbd:'"));
    };
    let (address, export) = match rest.split_once(EXPORT) {
        Some((address, export)) => (address, Some(export).filter(|name| !name.is_empty())),
        None => (rest, None),
    };
    let mut options = Map::new();
    if let Some(export) = export {
        options.insert("export".into(), export.into());
    }
    if let Some(path) = address.strip_prefix("unix:") {
        options.insert("server".into(), json!({"type": "unix", "path": path}));
    } else if !address.is_empty() {
        let (host, port) = host_and_port(address)
            .ok_or_else(|| invalid(format!("error parsing address '{address}'")))?;
        let server = json!({"type": "inet", "host": host, "port": port});
        options.insert("server".into(), server);
    }
    Ok(options)
}

/// `HOST:PORT` or `[HOST]:PORT`.
fn host_and_port(address: &str) -> Option<(&str, &str)> {
    let (host, port) = match address.strip_prefix('[') {
        Some(rest) => rest.split_once("]:")?,
        None => address.split_once(':')?,
    };
    let is_port = !port.is_empty() && !port.contains([':', '/']);
    is_port.then_some((host, port))
}

fn parse_uri(uri: &str) -> Option<Map<String, Value>> {
    let (scheme, rest) = uri.split_once("://")?;
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let (authority, path) = match rest.find('/') {
        Some(at) => (&rest[..at], &rest[at + 1..]),
        None => (rest, ""),
    };
    let mut options = Map::new();
    if !path.is_empty() {
        options.insert("export".into(), decoded(path)?.into());
    }
    let server = match scheme {
        "nbd+unix" => {
            let path = query?.strip_prefix("socket=")?;
            if !authority.is_empty() || path.is_empty() || path.contains('&') {
                return None;
            }
            json!({"type": "unix", "path": decoded(path)?})
        }
        "nbd" | "nbd+tcp" => {
            if authority.is_empty() || query.is_some() {
                return None;
            }
            let bare = authority.trim_start_matches('[').trim_end_matches(']');
            let (host, port) = match host_and_port(authority) {
                Some((host, port)) => (host, port.to_owned()),
                None => (bare, DEFAULT_PORT.to_string()),
            };
            json!({"type": "inet", "host": decoded(host)?, "port": port})
        }
        _ => return None,
    };
    options.insert("server".into(), server);
    Some(options)
}

/// `%41` is `A`.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [rest.next()?, rest.next()?];
        let digits = std::str::from_utf8(&digits).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
    }
    String::from_utf8(bytes).ok()
}

/// The name that opens the export again; "" when there is none.
pub(super) fn generate(target: &Target) -> String {
    let export = &target.export;
    match (&target.address, export.is_empty()) {
        (Address::Unix(path), true) => format!("nbd+unix://?socket={}", path.display()),
        (Address::Unix(path), false) => {
            format!("nbd+unix:///{export}?socket={}", path.display())
        }
        (Address::Inet { host, port }, true) => format!("nbd://{host}:{port}"),
        (Address::Inet { host, port }, false) => format!("nbd://{host}:{port}/{export}"),
        (Address::Abstract(_) | Address::Descriptor(_) | Address::Vsock { .. }, _) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_options() {
        let unix = |path: &str| json!({"type": "unix", "path": path});
        let inet = |host: &str, port: &str| json!({"type": "inet", "host": host, "port": port});
        let cases = [
            ("nbd:unix:/s", json!({"server": unix("/s")})),
            (
                "nbd:unix:/s:exportname=a:b",
                json!({"export": "a:b", "server": unix("/s")}),
            ),
            ("nbd:unix:/s:exportname=", json!({"server": unix("/s")})),
            ("nbd:h:1", json!({"server": inet("h", "1")})),
            ("nbd:[::1]:1", json!({"server": inet("::1", "1")})),
            ("nbd:", json!({})),
            ("nbd://h", json!({"server": inet("h", "10809")})),
            (
                "nbd+tcp://h:1/a%20b/c",
                json!({"export": "a b/c", "server": inet("h", "1")}),
            ),
            ("nbd://[::1]/", json!({"server": inet("::1", "10809")})),
            (
                "nbd+unix:///x?socket=/s",
                json!({"export": "x", "server": unix("/s")}),
            ),
            ("nbd+unix://?socket=/s", json!({"server": unix("/s")})),
        ];
        for (name, expected) in cases {
            assert_eq!(Value::Object(parse(name).unwrap()), expected, "{name}");
        }
    }

    #[test]
    fn bad_names_are_refused_in_the_peers_words() {
        for name in [
            "nbd://",
            "nbd+unix:///x",
            "nbd+unix://h/x?socket=/s",
            "nbd://h?a=b",
            "nbd://h/%zz",
            "nbd://h/%f",
        ] {
            let error = parse(name).unwrap_err();
            assert_eq!(error.message, "No valid URL specified", "{name}");
        }
        let error = parse("nbd:foo").unwrap_err();
        assert_eq!(error.message, "error parsing address 'foo'");
    }
}
