use super::*;
use crate::{Session, SessionOptions, Version};
use serde_json::json;

fn stream(bytes: &[u8]) -> Vec<Result<Value, String>> {
    let mut seen = Vec::new();
    Stream::default().feed(bytes, &mut |value| {
        seen.push(value.map_err(|error| error.desc));
    });
    seen
}

/// What `bytes` cause, errors by their text after "JSON parse error, ".
fn errors(bytes: &[u8]) -> Vec<String> {
    let errors = stream(bytes).into_iter().filter_map(Result::err);
    let short = |text: String| text.trim_start_matches("JSON parse error, ").into();
    errors.map(short).collect()
}

#[test]
fn values_are_cut_at_every_byte_alike() {
    let text = br#"{"a":[1,-2.5e1,'x"\u00e4\ud83d\ude00',null]} [] "s" {'b': {'c': true}}5 "#;
    let whole = stream(text);
    let expected = [
        json!({"a": [1, -25.0, "x\"\u{e4}\u{1f600}", null]}),
        json!([]),
        json!("s"),
        json!({"b": {"c": true}}),
        json!(5),
    ];
    assert_eq!(whole, expected.map(Ok));
    for split in 0..text.len() {
        let mut seen = Vec::new();
        let mut stream = Stream::default();
        stream.feed(&text[..split], &mut |value| {
            seen.push(value.map_err(|e| e.desc))
        });
        stream.feed(&text[split..], &mut |value| {
            seen.push(value.map_err(|e| e.desc))
        });
        assert_eq!(seen, whole, "split at {split}");
    }
}

#[test]
fn malformed_input_is_reported_as_the_peer_does() {
    let cases: &[(&[u8], &[&str])] = &[
        (b"{'execute': qq}", &["invalid keyword 'qq'"]),
        (b"{ ]", &["expecting value"]),
        (b"[}", &["expecting value"]),
        (b"}", &["expecting value"]),
        (b",", &["expecting value"]),
        (b"{'a':1,}", &["expecting value"]),
        (b"{'a' 1}", &["missing : in object pair"]),
        (b"{'a'}", &["missing : in object pair"]),
        (b"{5:1}", &["key is not a string in object"]),
        (b"[1 2]", &["expected separator in list"]),
        (b"{'a':1 'b':2}", &["expected separator in dict"]),
        (b"{'a':0x5}", &["expected separator in dict"]),
        (b"{'a':1,'a':2}", &["duplicate key"]),
        (b"{\"a\":\"\\q\"}", &["invalid escape sequence in string"]),
        (b"{\"a\":\"\xc3\"}", &["invalid UTF-8 sequence in string"]),
        (
            b"{\"a\":\"\\u00\"}",
            &["\\u00 is not a valid Unicode character"],
        ),
        (
            b"{\"a\":\"\\ud83dx\"}",
            &["\\ud83d is not a valid Unicode character"],
        ),
        (b"\xff", &["stray '\u{fffd}'"]),
        (b"{'a':%d}", &["stray '%'", "expecting value"]),
        (b"{'a':01}", &["stray '01'", "expecting value"]),
        (b"{'a':1.}", &["stray '1.}'"]),
        (b"{'a':\"a\nb\"}", &["stray '\"a\n'", "expecting value"]),
    ];
    for (input, expected) in cases {
        let shown = String::from_utf8_lossy(input);
        assert_eq!(&errors(input), expected, "{shown}");
    }
}

#[test]
fn the_stream_resumes_after_an_error() {
    for garbage in [&b"\xff"[..], b"{'a': %}", b"{ ]", b"nul ", b"{\"\x01", b"}"] {
        let mut input = garbage.to_vec();
        input.extend_from_slice(b"{'x': 1}");
        let last = stream(&input).pop();
        assert_eq!(last, Some(Ok(json!({"x": 1}))), "{garbage:?}");
    }
}

#[test]
fn limits_hold() {
    let deep = "[".repeat(MAX_NESTING + 1);
    assert_eq!(
        errors(deep.as_bytes()),
        ["JSON nesting depth limit exceeded"]
    );
    let many = format!("[{}", "1,".repeat(MAX_MESSAGE_TOKENS / 2));
    assert_eq!(errors(many.as_bytes()), ["JSON token count limit exceeded"]);
    let long = format!("\"{}", "x".repeat(MAX_MESSAGE_BYTES + 1));
    assert_eq!(errors(long.as_bytes()), ["JSON token size limit exceeded"]);
    let allowed = "[".repeat(MAX_NESTING) + &"]".repeat(MAX_NESTING);
    assert!(stream(allowed.as_bytes())[0].is_ok());
}

#[test]
fn output_is_ascii_with_spaces_and_reads_back() {
    let value = json!({"a": [1, "\u{e4}\u{1f600}\u{7f}\n"], "b": {}});
    let text = to_string(&value);
    assert_eq!(text, r#"{"a": [1, "\u00E4\uD83D\uDE00\u007F\n"], "b": {}}"#);
    assert_eq!(parse(&text), Ok(value.clone()));
    let indented = String::from_utf8(to_line(&json!({"a": [1]}), Layout::Indented)).unwrap();
    assert_eq!(indented, "{\n    \"a\": [\n        1\n    ]\n}\r\n");
}

#[test]
fn a_text_must_hold_one_value() {
    assert_eq!(parse("5"), Ok(json!(5)));
    for text in ["", "{", "{}{}", "{'a'", "'x"] {
        assert!(parse(text).is_err(), "{text}");
    }
}

/// A small generator, so that a failing seed reproduces everywhere.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn random_garbage_never_panics_and_a_session_recovers() {
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64
        | 1;
    println!("seed {seed}");
    let pieces: &[&[u8]] = &[
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"\"",
        b"'",
        b"\\",
        b"\\u",
        b"d83d",
        b"execute",
        b"'execute'",
        b"'id'",
        b"'arguments'",
        b"0",
        b"1",
        b"-",
        b".",
        b"e",
        b"true",
        b"nul",
        b" ",
        b"\n",
        b"\xff",
        b"\xc3",
        b"\x00",
        b"exec-oob",
        b"query-version",
        b"qmp_capabilities",
    ];
    let mut state = seed;
    for _ in 0..3000 {
        let options = SessionOptions {
            version: Version::announced("test"),
            layout: Layout::OneLine,
        };
        let mut session = Session::new(&options);
        for _ in 0..next(&mut state) % 40 {
            let piece = pieces[next(&mut state) as usize % pieces.len()];
            session.feed(piece);
            while let Some(request) = session.next_request() {
                session.reply(request.id, Ok(json!({})));
            }
        }
        // A stray byte ends whatever was begun, an open string included.
        session.feed(b"\xff\n\xff\n{'execute':'qmp_capabilities'}{'execute':'x','id':'end'}");
        let mut last = None;
        while let Some(request) = session.next_request() {
            last = request.id.clone();
            session.reply(request.id, Ok(json!({})));
        }
        assert_eq!(last, Some(json!("end")), "seed {seed}");
    }
}
