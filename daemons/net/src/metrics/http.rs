//! As much of HTTP/1.1 as reading metrics takes: one request, one answer, and the connection is closed.

use std::time::Duration;

use executor::net::Stream;

/// Bytes that the head of a request may have.
const MAX_HEAD: usize = 8 << 10;
/// Headers that a request may have.
const MAX_HEADERS: usize = 64;
/// Bytes per read.
const READ_BYTES: usize = 2 << 10;
/// How long a client may take to send its request.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// How long a client may take to read the answer.
const RESPONSE_TIME: Duration = Duration::from_secs(5);

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What came of reading a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// The metrics are asked for.
    Get,
    /// Only the headers of the answer.
    Head,
    /// Something else is asked for.
    NotFound,
    /// Something is to be changed.
    WrongMethod,
    /// Not HTTP.
    Malformed,
    /// Larger than a request for metrics can be.
    TooLarge,
    /// Nothing complete came in time.
    TooSlow,
}

/// Reads a request; `None` when the client went away without one.
pub(super) async fn receive(stream: &Stream) -> Option<Request> {
    let read = executor::time::timeout(REQUEST_TIME, read_head(stream)).await;
    read.unwrap_or(Some(Request::TooSlow))
}

async fn read_head(stream: &Stream) -> Option<Request> {
    let mut head = Vec::new();
    loop {
        let bytes = stream.recv(READ_BYTES).await.ok()?;
        if bytes.is_empty() {
            return None;
        }
        head.extend_from_slice(&bytes);
        if let Some(request) = parse(&head) {
            return Some(request);
        }
        if head.len() >= MAX_HEAD {
            return Some(Request::TooLarge);
        }
    }
}

/// The request; `None` while it is not complete.
fn parse(head: &[u8]) -> Option<Request> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Partial) => return None,
        Ok(httparse::Status::Complete(_)) => {}
        Err(httparse::Error::TooManyHeaders) => return Some(Request::TooLarge),
        Err(_) => return Some(Request::Malformed),
    }
    let path = request.path.unwrap_or_default();
    let path = path.split_once('?').map_or(path, |(path, _query)| path);
    Some(match (request.method, path) {
        (Some("GET"), "/metrics" | "/") => Request::Get,
        (Some("HEAD"), "/metrics" | "/") => Request::Head,
        (Some("GET" | "HEAD"), _) => Request::NotFound,
        _ => Request::WrongMethod,
    })
}

/// The bytes of the answer.
pub(super) fn response(request: Request, metrics: impl FnOnce() -> String) -> Vec<u8> {
    let plain = |status: &str, more: &str| {
        let body = format!("{status}\n");
        (head(status, "text/plain", body.len(), more), body)
    };
    let (mut head, body) = match request {
        Request::Get | Request::Head => {
            let body = metrics();
            (head("200 OK", CONTENT_TYPE, body.len(), ""), body)
        }
        Request::NotFound => plain("404 Not Found", ""),
        Request::WrongMethod => plain("405 Method Not Allowed", "Allow: GET, HEAD\r\n"),
        Request::Malformed => plain("400 Bad Request", ""),
        Request::TooLarge => plain("431 Request Header Fields Too Large", ""),
        Request::TooSlow => plain("408 Request Timeout", ""),
    };
    if request != Request::Head {
        head.push_str(&body);
    }
    head.into_bytes()
}

fn head(status: &str, content_type: &str, length: usize, more: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n{more}Connection: close\r\n\r\n"
    )
}

/// Sends the answer, unless the client is too slow to read it.
pub(super) async fn send(stream: &Stream, response: Vec<u8>) {
    // Whoever does not read it does without it.
    let _ = executor::time::timeout(RESPONSE_TIME, stream.send_all(response)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        for (text, expected) in [
            (
                "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
                Some(Request::Get),
            ),
            ("GET / HTTP/1.0\r\n\r\n", Some(Request::Get)),
            ("GET /metrics?x=1 HTTP/1.1\r\n\r\n", Some(Request::Get)),
            ("HEAD /metrics HTTP/1.1\r\n\r\n", Some(Request::Head)),
            ("GET /other HTTP/1.1\r\n\r\n", Some(Request::NotFound)),
            ("POST /metrics HTTP/1.1\r\n", None),
            ("POST /metrics HTTP/1.1\r\n\r\n", Some(Request::WrongMethod)),
            ("GET /metrics", None),
            ("", None),
            ("\0\0\0\0", Some(Request::Malformed)),
            ("{\"execute\": \"quit\"}\n", Some(Request::Malformed)),
        ] {
            assert_eq!(parse(text.as_bytes()), expected, "{text:?}");
        }
        let many = "x: y\r\n".repeat(MAX_HEADERS + 1);
        let many = format!("GET / HTTP/1.1\r\n{many}\r\n");
        assert_eq!(parse(many.as_bytes()), Some(Request::TooLarge));
    }

    #[test]
    fn answers_tell_their_length_and_close() {
        let text = |request| String::from_utf8(response(request, || "abc".into())).unwrap();
        let got = text(Request::Get);
        assert!(got.starts_with("HTTP/1.1 200 OK\r\n") && got.ends_with("\r\n\r\nabc"));
        assert!(got.contains("Content-Length: 3\r\n") && got.contains("Connection: close\r\n"));
        assert!(text(Request::Head).ends_with("\r\n\r\n"));
        assert!(text(Request::WrongMethod).contains("\r\nAllow: GET, HEAD\r\n"));
    }
}
