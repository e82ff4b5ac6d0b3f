//! The authorities whose certificates are believed: those of the system, or of `SSL_CERT_FILE`.

use std::sync::OnceLock;

/// Longest file of certificates, in bytes.
const MAX_FILE: u64 = 16 << 20;

static AUTHORITIES: OnceLock<Option<Vec<u8>>> = OnceLock::new();

/// Their certificates. Read once, when the first file is opened: later a sandbox may be in the way.
pub(super) fn authorities() -> Option<&'static [u8]> {
    AUTHORITIES.get_or_init(read).as_deref()
}

fn read() -> Option<Vec<u8>> {
    let path = openssl_probe::probe().cert_file?;
    let is_small = std::fs::metadata(&path).is_ok_and(|metadata| metadata.len() <= MAX_FILE);
    let read = is_small.then(|| std::fs::read(&path).ok()).flatten();
    if read.is_none() {
        let path = path.display();
        tracing::warn!(%path, "the certificates of authorities cannot be read");
    }
    read
}
