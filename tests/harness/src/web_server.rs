//! A web server that knows ranges, and the ways in which others are wrong about them.
//!
//! ```text
//!   GET /TRICK/...  ──► Trick ──► the file, or less, or something else
//! ```
//!
//! One thread for each connection, which stays open. Every request is written down, in order of arrival.

use openssl::asn1::Asn1Time;
use openssl::bn::{BigNum, MsbOption};
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::ssl::{SslAcceptor, SslMethod};
use openssl::x509::extension::{BasicConstraints, SubjectAlternativeName};
use openssl::x509::{X509, X509Name};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// What a request asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// `GET` or `HEAD`.
    pub method: String,
    /// With the query.
    pub path: String,
    /// First and last byte.
    pub range: Option<(u64, u64)>,
    /// The other fields, names in small letters.
    pub fields: Vec<(String, String)>,
}

impl Asked {
    /// The value of a field.
    pub fn field(&self, name: &str) -> Option<&str> {
        let found = self.fields.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// A server on a port of its own, ended when dropped.
pub struct WebServer {
    address: SocketAddr,
    certificate: Option<Vec<u8>>,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    file: Vec<u8>,
    /// Where `/elsewhere` leads.
    elsewhere: String,
    asked: Mutex<Vec<Asked>>,
    count: AtomicUsize,
    ended: AtomicBool,
}

/// A connection, plain or secured.
trait Peer: Read + Write + Send {}
impl<T: Read + Write + Send> Peer for T {}

impl WebServer {
    /// Serves `file`; `/elsewhere` leads to the given address.
    pub fn start(file: Vec<u8>, elsewhere: &str) -> std::io::Result<Self> {
        Self::with(file, elsewhere, None)
    }

    /// The same over TLS, with a certificate for `localhost` that nobody else has signed.
    pub fn start_secure(file: Vec<u8>, elsewhere: &str) -> std::io::Result<Self> {
        let (key, certificate) = self_signed().map_err(std::io::Error::other)?;
        Self::with(file, elsewhere, Some((key, certificate)))
    }

    fn with(
        file: Vec<u8>,
        elsewhere: &str,
        identity: Option<(PKey<Private>, X509)>,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            file,
            elsewhere: elsewhere.to_owned(),
            asked: Mutex::default(),
            count: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
        });
        let tls = identity.as_ref().map(acceptor).transpose();
        let tls = tls.map_err(std::io::Error::other)?;
        let certificate = identity.map(|(_, certificate)| certificate.to_pem());
        let certificate = certificate.transpose().map_err(std::io::Error::other)?;
        let served = Arc::clone(&shared);
        let acceptor = std::thread::spawn(move || accept(&listener, &served, tls.as_ref()));
        Ok(Self {
            address,
            certificate,
            shared,
            acceptor: Some(acceptor),
        })
    }

    /// The address of `path`.
    pub fn url(&self, path: &str) -> String {
        match self.certificate {
            Some(_) => format!("https://localhost:{}{path}", self.address.port()),
            None => format!("http://{}{path}", self.address),
        }
    }

    /// What was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        let asked = self.shared.asked.lock();
        asked.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The server's certificate (PEM), when it has one.
    pub fn certificate(&self) -> Option<&[u8]> {
        self.certificate.as_deref()
    }
}

impl Drop for WebServer {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes the acceptor.
        drop(TcpStream::connect(self.address));
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().ok();
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>, tls: Option<&SslAcceptor>) {
    for stream in listener.incoming() {
        if shared.ended.load(Ordering::Relaxed) {
            return;
        }
        let Ok(stream) = stream else { continue };
        stream.set_nodelay(true).ok();
        let (shared, tls) = (Arc::clone(shared), tls.cloned());
        // Ends with its connection.
        std::thread::spawn(move || {
            let peer: Option<Box<dyn Peer>> = match tls {
                None => Some(Box::new(stream)),
                Some(tls) => match tls.accept(stream) {
                    Ok(secured) => Some(Box::new(secured)),
                    Err(_) => None,
                },
            };
            if let Some(peer) = peer {
                let mut peer = BufReader::with_capacity(16 << 10, peer);
                while let Some(asked) = receive(&mut peer) {
                    shared.note(asked.clone());
                    if shared.answer(peer.get_mut(), &asked).is_none() {
                        return;
                    }
                }
            }
        });
    }
}

/// The next request of a connection.
fn receive(peer: &mut impl BufRead) -> Option<Asked> {
    let mut line = String::new();
    peer.read_line(&mut line).ok()?;
    let mut words = line.split_ascii_whitespace().map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let mut fields = Vec::new();
    loop {
        let mut line = String::new();
        peer.read_line(&mut line).ok()?;
        let Some((name, value)) = line.split_once(':') else {
            break;
        };
        fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let range = fields.iter().find(|(name, _)| name == "range");
    let range = range.and_then(|(_, value)| {
        let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    });
    Some(Asked {
        method,
        path,
        range,
        fields,
    })
}

impl Shared {
    fn note(&self, asked: Asked) {
        let mut all = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(asked);
    }

    /// Answers by the path; `None` ends the connection.
    fn answer(&self, peer: &mut dyn Write, asked: &Asked) -> Option<()> {
        let is_later = asked.range.is_some_and(|(first, _)| first > 0);
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let trick = asked.path.split('/').nth(1).unwrap_or_default();
        match trick {
            "whole" => send(peer, "200 OK", &[], &self.file),
            "missing" => send(peer, "404 Not Found", &[], b"no such file"),
            "busy" if is_later => send(peer, "503 Service Unavailable", &[], b"try again"),
            "elsewhere" => self.redirect(peer, &self.elsewhere),
            "loop" => self.redirect(peer, "/loop"),
            "local" => self.redirect(peer, "file:///etc/passwd"),
            "endless" => endless_head(peer),
            "silent" if is_later => {
                // Until the client gives up.
                std::thread::park_timeout(std::time::Duration::from_secs(60));
                None
            }
            "cut" if is_later => {
                self.part(peer, asked, Part::HEAD)?;
                None
            }
            "halves" if is_later => {
                self.part(peer, asked, Part::HALF)?;
                None
            }
            "shifted" if is_later => self.part(
                peer,
                asked,
                Part {
                    shift: 1,
                    ..Part::ALL
                },
            ),
            "new-version" => self.part(
                peer,
                asked,
                Part {
                    version: number,
                    ..Part::ALL
                },
            ),
            "grows" if is_later => self.part(
                peer,
                asked,
                Part {
                    growth: 512,
                    ..Part::ALL
                },
            ),
            _ => self.part(peer, asked, Part::ALL),
        }
    }

    fn redirect(&self, peer: &mut dyn Write, to: &str) -> Option<()> {
        let location = format!("Location: {to}");
        send(peer, "302 Found", &[&location], b"over there")
    }

    /// The range that was asked for, or all.
    fn part(&self, peer: &mut dyn Write, asked: &Asked, part: Part) -> Option<()> {
        let version = format!("ETag: \"{}\"", part.version);
        let total = self.file.len() as u64;
        let Some((first, last)) = asked.range else {
            let body = if asked.method == "HEAD" {
                &[]
            } else {
                &self.file[..]
            };
            let head = format!(
                "HTTP/1.1 200 OK\r\nAccept-Ranges: bytes\r\n{version}\r\nContent-Length: {total}\r\n\r\n"
            );
            peer.write_all(head.as_bytes()).ok()?;
            return peer.write_all(body).ok();
        };
        if first >= total {
            let range = format!("Content-Range: bytes */{total}");
            return send(peer, "416 Range Not Satisfiable", &[&range, &version], b"");
        }
        let body = &self.file[first as usize..=last.min(total - 1) as usize];
        let head = format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {}-{}/{}\r\n{version}\r\nContent-Length: {}\r\n\r\n",
            first + part.shift,
            first + part.shift + body.len() as u64 - 1,
            total + part.growth,
            body.len()
        );
        peer.write_all(head.as_bytes()).ok()?;
        peer.write_all(&body[..(body.len() * part.sent).div_ceil(2)])
            .ok()?;
        peer.flush().ok()
    }
}

/// How a range is sent.
#[derive(Clone, Copy)]
struct Part {
    /// Halves of the body.
    sent: usize,
    /// What the head says of the range beyond the truth.
    shift: u64,
    /// What the head says of the length beyond the truth.
    growth: u64,
    version: usize,
}

impl Part {
    const ALL: Part = Part {
        sent: 2,
        shift: 0,
        growth: 0,
        version: 0,
    };
    const HALF: Part = Part {
        sent: 1,
        ..Part::ALL
    };
    const HEAD: Part = Part {
        sent: 0,
        ..Part::ALL
    };
}

fn send(peer: &mut dyn Write, status: &str, fields: &[&str], body: &[u8]) -> Option<()> {
    let mut answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n", body.len());
    for field in fields {
        answer.push_str(field);
        answer.push_str("\r\n");
    }
    answer.push_str("\r\n");
    peer.write_all(answer.as_bytes()).ok()?;
    peer.write_all(body).ok()
}

/// Fields for as long as the client takes them.
fn endless_head(peer: &mut dyn Write) -> Option<()> {
    peer.write_all(b"HTTP/1.1 206 Partial Content\r\n").ok()?;
    loop {
        peer.write_all(b"X-Filler: 0123456789012345678901234567890123456789\r\n")
            .ok()?;
    }
}

fn acceptor(
    (key, certificate): &(PKey<Private>, X509),
) -> Result<SslAcceptor, openssl::error::ErrorStack> {
    let mut builder = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls())?;
    builder.set_private_key(key)?;
    builder.set_certificate(certificate)?;
    Ok(builder.build())
}

fn self_signed() -> Result<(PKey<Private>, X509), openssl::error::ErrorStack> {
    let key = PKey::from_rsa(Rsa::generate(2048)?)?;
    let mut name = X509Name::builder()?;
    name.append_entry_by_text("CN", "localhost")?;
    let name = name.build();
    let mut serial = BigNum::new()?;
    serial.rand(64, MsbOption::MAYBE_ZERO, false)?;
    let serial = serial.to_asn1_integer()?;
    let mut builder = X509::builder()?;
    builder.set_version(2)?;
    builder.set_serial_number(&serial)?;
    builder.set_subject_name(&name)?;
    builder.set_issuer_name(&name)?;
    builder.set_pubkey(&key)?;
    let (yesterday, tomorrow) = (Asn1Time::from_unix(0)?, Asn1Time::days_from_now(1)?);
    builder.set_not_before(&yesterday)?;
    builder.set_not_after(&tomorrow)?;
    builder.append_extension(BasicConstraints::new().critical().ca().build()?)?;
    let context = builder.x509v3_context(None, None);
    let names = SubjectAlternativeName::new()
        .dns("localhost")
        .build(&context)?;
    builder.append_extension(names)?;
    builder.sign(&key, MessageDigest::sha256())?;
    Ok((key, builder.build()))
}
