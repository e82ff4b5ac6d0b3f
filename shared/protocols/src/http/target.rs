//! Which file of which server, and how it is asked for.

use block::error::Result;
use block::secret::Secret;
use block::{Error, ErrorKind, OpenRequest};
use http::Uri;
use http::uri::Scheme;
use std::time::Duration;

/// Bytes read ahead with each request when nothing else is said.
const READAHEAD: u64 = 256 << 10;

/// Most bytes read ahead: several such pieces are in memory at once.
const MAX_READAHEAD: u64 = 256 << 20;

/// How long a server may be silent when nothing else is said.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Longest time that a server may be given, in seconds.
const MAX_TIMEOUT: i64 = 10_000;

/// Redirections that are followed one after another.
pub(super) const MAX_REDIRECTS: usize = 10;

/// An address of a file.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// As it is asked for.
    pub(super) url: String,
    uri: Uri,
}

/// See the module.
pub(super) struct Target {
    pub(super) place: Place,
    pub(super) readahead: u64,
    /// How long a server may be silent; zero: for ever.
    pub(super) timeout: Duration,
    /// Whether the server's certificate is checked.
    pub(super) verifies: bool,
    pub(super) username: Option<String>,
    pub(super) password: Option<Secret>,
    pub(super) proxy_username: Option<String>,
    pub(super) proxy_password: Option<Secret>,
    pub(super) cookie: Option<Secret>,
    /// Something was given that the address does not say and that decides what is read.
    pub(super) is_particular: bool,
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

impl Place {
    pub(super) fn parse(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let is_known = uri.scheme() == Some(&Scheme::HTTP) || uri.scheme() == Some(&Scheme::HTTPS);
        let has_host = uri.host().is_some_and(|host| !host.is_empty());
        (is_known && has_host).then(|| Self {
            url: url.to_owned(),
            uri,
        })
    }

    pub(super) fn is_secure(&self) -> bool {
        self.uri.scheme() == Some(&Scheme::HTTPS)
    }

    /// Without brackets.
    pub(super) fn host(&self) -> &str {
        let host = self.uri.host().unwrap_or_default();
        host.trim_start_matches('[').trim_end_matches(']')
    }

    pub(super) fn port(&self) -> u16 {
        let default = if self.is_secure() { 443 } else { 80 };
        self.uri.port_u16().unwrap_or(default)
    }

    /// Whether both are on the same server, which may be told what the user trusts it with.
    pub(super) fn is_same_server(&self, other: &Place) -> bool {
        let origin = |place: &Place| {
            (
                place.is_secure(),
                place.host().to_ascii_lowercase(),
                place.port(),
            )
        };
        origin(self) == origin(other)
    }

    /// For messages: without a user's name and password.
    pub(super) fn shown(&self) -> String {
        let authority = self
            .uri
            .authority()
            .map(|it| it.as_str())
            .unwrap_or_default();
        match authority.rsplit_once('@') {
            Some((_, host)) => self.url.replacen(authority, host, 1),
            None => self.url.clone(),
        }
    }
}

impl Target {
    /// Takes the options of a request for `driver`.
    pub(super) fn take(request: &mut OpenRequest<'_>, driver: &str) -> Result<Self> {
        let readahead = request.take_size("readahead")?.unwrap_or(READAHEAD);
        if !readahead.is_multiple_of(512) {
            let message = format!("HTTP_READAHEAD_SIZE {readahead} is not a multiple of 512");
            return Err(invalid(message));
        }
        if readahead > MAX_READAHEAD {
            let message = format!("readahead {readahead} is larger than {MAX_READAHEAD}");
            return Err(invalid(message));
        }
        let timeout = match request.take_int("timeout")? {
            None => TIMEOUT,
            Some(seconds @ 0..=MAX_TIMEOUT) => Duration::from_secs(seconds.cast_unsigned()),
            Some(_) => return Err(invalid("timeout parameter is too large or negative")),
        };
        let verifies = request.take_bool("sslverify")?.unwrap_or(true);
        let cookie = take_cookie(request)?;
        let url = request
            .take_str("url")?
            .ok_or_else(|| invalid("curl block driver requires an 'url' option"))?;
        let start = format!("{driver}://");
        if !url.starts_with(&start) {
            let message = format!(
                "{driver} curl driver cannot handle the URL '{url}' (does not start with '{start}')"
            );
            return Err(invalid(message));
        }
        let place = Place::parse(&url)
            .ok_or_else(|| invalid(format!("'{url}' is not an address of a file on a server")))?;
        let username = request.take_str("username")?;
        let password = take_secret(request, "password-secret")?;
        let proxy_username = request.take_str("proxy-username")?;
        let proxy_password = take_secret(request, "proxy-password-secret")?;
        let is_particular = !verifies
            || cookie.is_some()
            || username.is_some()
            || password.is_some()
            || proxy_username.is_some()
            || proxy_password.is_some();
        Ok(Self {
            place,
            readahead,
            timeout,
            verifies,
            username,
            password,
            proxy_username,
            proxy_password,
            cookie,
            is_particular,
        })
    }

    /// Where a server sends those who ask at `from`, when they may go there.
    ///
    /// # Errors
    /// Why not: what was asked for securely is not fetched in the clear, nor by another protocol than HTTP.
    pub(super) fn redirected(from: &Place, to: &str) -> std::result::Result<Place, String> {
        let place = Place::parse(to)
            .ok_or_else(|| format!("redirection to '{to}', which is no address of HTTP"))?;
        match from.is_secure() && !place.is_secure() {
            true => Err(format!(
                "redirection from https to '{}', in the clear",
                place.shown()
            )),
            false => Ok(place),
        }
    }
}

fn take_secret(request: &mut OpenRequest<'_>, option: &str) -> Result<Option<Secret>> {
    let id = request.take_str(option)?;
    id.map(|id| request.secret(&id)).transpose()
}

/// `cookie`, or the secret that holds it.
fn take_cookie(request: &mut OpenRequest<'_>) -> Result<Option<Secret>> {
    let plain = request.take_str("cookie")?;
    let id = request.take_str("cookie-secret")?;
    match (plain, id) {
        (Some(_), Some(_)) => {
            let message = "curl driver cannot handle both cookie and cookie secret";
            Err(invalid(message))
        }
        (Some(plain), None) => Ok(Some(Secret::new(plain.into_bytes().into()))),
        (None, Some(id)) => request.secret(&id).map(Some),
        (None, None) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(url: &str) -> Place {
        Place::parse(url).unwrap()
    }

    #[test]
    fn addresses_are_taken_apart() {
        let local = place("http://[::1]:8080/a?b=c");
        assert_eq!((local.host(), local.port()), ("::1", 8080));
        let plain = place("https://user:word@Example.org/a%20b");
        assert_eq!((plain.host(), plain.port()), ("Example.org", 443));
        assert_eq!(plain.shown(), "https://Example.org/a%20b");
        for bad in ["http://", "ftp://h/x", "h/x", "http:///x", "http://a b/"] {
            assert!(Place::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_server_is_scheme_host_and_port() {
        let server = place("http://h/x");
        assert!(server.is_same_server(&place("http://H:80/y?z")));
        for other in ["https://h/x", "http://h:81/x", "http://h.example/x"] {
            assert!(!server.is_same_server(&place(other)), "{other}");
        }
    }

    #[test]
    fn redirections_stay_with_http_and_do_not_leave_tls() {
        let (plain, secure) = (place("http://h/x"), place("https://h/x"));
        assert!(Target::redirected(&plain, "https://i/y").is_ok());
        assert!(Target::redirected(&plain, "http://i/y").is_ok());
        assert!(Target::redirected(&secure, "https://i/y").is_ok());
        let clear = Target::redirected(&secure, "http://u:p@i/y").unwrap_err();
        assert_eq!(
            clear,
            "redirection from https to 'http://i/y', in the clear"
        );
        for to in ["file:///etc/passwd", "ftp://h/x", "gopher://h/"] {
            assert!(Target::redirected(&plain, to).is_err(), "{to}");
        }
    }
}
