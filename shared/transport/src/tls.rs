//! TLS over memory: records go in and out of byte lists, which the connection moves.
//!
//! ```text
//!   received ──► Pipe.incoming ──► OpenSSL ──► plain bytes
//!   to send  ◄── Pipe.outgoing ◄── OpenSSL ◄── plain bytes
//! ```

use crate::credentials::{Credentials, Endpoint};
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::ssl::{ErrorCode, Ssl, SslStream};
use openssl::x509::{X509NameRef, X509VerifyResult};
use std::io::{self, Read, Write};
use std::net::IpAddr;

/// Why a connection could not be secured.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TlsError {
    /// The peer's certificate is for somebody else.
    #[error("Certificate does not match the hostname {0}")]
    Hostname(String),
    /// Nobody said whose certificate is expected.
    #[error("No hostname for certificate validation")]
    NoHostname,
    /// The certificate is not believed.
    #[error("{0}")]
    Untrusted(&'static str),
    /// A client shows no certificate.
    #[error("Verify failed: No certificate was found.")]
    NoCertificate,
    /// The sides do not agree.
    #[error("TLS handshake failed: {0}")]
    Handshake(String),
    /// The credentials are for the other side.
    #[error("Expected TLS credentials for a {0} endpoint")]
    WrongEndpoint(&'static str),
    /// The library refuses.
    #[error("Unable to start TLS")]
    Library(#[from] ErrorStack),
}

/// Bytes between OpenSSL and the network.
#[derive(Default)]
pub(crate) struct Pipe {
    incoming: Vec<u8>,
    taken: usize,
    outgoing: Vec<u8>,
    ended: bool,
}

impl Read for Pipe {
    fn read(&mut self, place: &mut [u8]) -> io::Result<usize> {
        let rest = &self.incoming[self.taken..];
        if rest.is_empty() {
            return match self.ended {
                true => Ok(0),
                false => Err(io::ErrorKind::WouldBlock.into()),
            };
        }
        let count = rest.len().min(place.len());
        place[..count].copy_from_slice(&rest[..count]);
        self.taken += count;
        if self.taken == self.incoming.len() {
            self.incoming.clear();
            self.taken = 0;
        }
        Ok(count)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.outgoing.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What OpenSSL says to a step.
pub(crate) enum Step {
    /// So many plain bytes.
    Done(usize),
    /// Records have to be received first.
    NeedsInput,
    /// The peer has ended the conversation.
    End,
    /// It cannot go on.
    Broken,
}

/// One side of a conversation.
pub(crate) struct Tls {
    stream: SslStream<Pipe>,
    hostname: Option<String>,
}

impl Tls {
    /// Before the handshake.
    pub(crate) fn new(
        credentials: &Credentials,
        wanted: Endpoint,
        hostname: Option<&str>,
    ) -> Result<Self, TlsError> {
        if credentials.endpoint != wanted {
            let name = match wanted {
                Endpoint::Server => "server",
                Endpoint::Client => "client",
            };
            return Err(TlsError::WrongEndpoint(name));
        }
        let mut ssl = Ssl::new(&credentials.context)?;
        match wanted {
            Endpoint::Server => ssl.set_accept_state(),
            Endpoint::Client => {
                if credentials.has_certificates {
                    expect_host(&mut ssl, hostname.ok_or(TlsError::NoHostname)?)?;
                }
                ssl.set_connect_state();
            }
        }
        Ok(Self {
            stream: SslStream::new(ssl, Pipe::default())?,
            hostname: hostname.map(str::to_owned),
        })
    }

    /// A step of the handshake; `Done` when it is over.
    pub(crate) fn handshake(&mut self) -> Result<Step, TlsError> {
        let error = match self.stream.do_handshake() {
            Ok(()) => return Ok(Step::Done(0)),
            Err(error) if error.code() == ErrorCode::WANT_READ => return Ok(Step::NeedsInput),
            Err(error) => error,
        };
        let result = self.stream.ssl().verify_result();
        if result != X509VerifyResult::OK {
            return Err(self.untrusted(result));
        }
        let reasons = error.ssl_error().map(|stack| {
            let reasons = stack.errors().iter().filter_map(|error| error.reason());
            reasons.map(str::to_owned).collect::<Vec<_>>()
        });
        let reasons = reasons.unwrap_or_default();
        if reasons
            .iter()
            .any(|reason| reason == "peer did not return a certificate")
        {
            return Err(TlsError::NoCertificate);
        }
        Err(TlsError::Handshake(match reasons.is_empty() {
            true => "The TLS connection was non-properly terminated.".to_owned(),
            false => reasons.join(", "),
        }))
    }

    fn untrusted(&self, result: X509VerifyResult) -> TlsError {
        // X509_V_ERR_* of openssl/x509_vfy.h.
        TlsError::Untrusted(match result.as_raw() {
            62 | 64 => {
                return TlsError::Hostname(self.hostname.clone().unwrap_or_default());
            }
            2 | 18..=21 => "The certificate hasn't got a known issuer",
            9 => "The certificate is not yet activated",
            10 => "The certificate has expired",
            23 => "The certificate has been revoked",
            _ => "The certificate is not trusted",
        })
    }

    /// Takes plain bytes.
    pub(crate) fn read(&mut self, place: &mut [u8]) -> Step {
        match self.stream.ssl_read(place) {
            Ok(count) => Step::Done(count),
            Err(error) => match error.code() {
                ErrorCode::WANT_READ => Step::NeedsInput,
                ErrorCode::ZERO_RETURN => Step::End,
                _ => Step::Broken,
            },
        }
    }

    /// Makes records of plain bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Step {
        match self.stream.ssl_write(bytes) {
            Ok(count) => Step::Done(count),
            Err(_) => Step::Broken,
        }
    }

    /// Ends our side of the conversation.
    pub(crate) fn say_goodbye(&mut self) {
        // What it has to say is in the pipe.
        let _ = self.stream.shutdown();
    }

    /// Records that were received; none at the end of the stream.
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        let pipe = self.stream.get_mut();
        pipe.ended |= bytes.is_empty();
        pipe.incoming.extend_from_slice(bytes);
    }

    /// Whether there are records to send.
    pub(crate) fn has_outgoing(&self) -> bool {
        !self.stream.get_ref().outgoing.is_empty()
    }

    /// Records to send.
    pub(crate) fn take_outgoing(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.stream.get_mut().outgoing)
    }

    /// The distinguished name of the peer's certificate.
    pub(crate) fn peer_name(&self) -> Option<String> {
        let certificate = self.stream.ssl().peer_certificate()?;
        Some(distinguished_name(certificate.subject_name()))
    }
}

fn expect_host(ssl: &mut Ssl, hostname: &str) -> Result<(), ErrorStack> {
    match hostname.parse::<IpAddr>() {
        Ok(address) => ssl.param_mut().set_ip(address),
        Err(_) => {
            ssl.set_hostname(hostname)?;
            ssl.param_mut().set_host(hostname)
        }
    }
}

/// A name as RFC 4514 writes it: the most specific part first.
fn distinguished_name(name: &X509NameRef) -> String {
    let mut parts = Vec::new();
    for entry in name.entries() {
        let kind = match entry.object().nid() {
            Nid::UNDEF => entry.object().to_string(),
            nid => nid.short_name().unwrap_or("UNDEF").to_owned(),
        };
        let value = entry.data().to_string().unwrap_or_default();
        let mut escaped = String::new();
        for character in value.chars() {
            if ",+\"\\<>;".contains(character) {
                escaped.push('\\');
            }
            escaped.push(character);
        }
        parts.push(format!("{kind}={escaped}"));
    }
    parts.reverse();
    parts.join(",")
}
