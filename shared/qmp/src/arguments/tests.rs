use super::*;
use crate::keyval;
use serde::Deserialize;
use serde_json::json;

#[derive(Debug, Deserialize, PartialEq)]
#[serde(rename = "type", rename_all = "kebab-case")]
enum Address {
    Unix { path: String },
    Fd { str: String },
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Detect {
    Off,
    On,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
struct Export {
    id: String,
    #[serde(default)]
    writable: bool,
    num_queues: Option<u16>,
    size: Option<u64>,
    delta: Option<i64>,
    detect: Option<Detect>,
    addr: Option<Address>,
    names: Option<Vec<String>>,
}

fn from_json(value: Value) -> Result<Export, String> {
    let Value::Object(members) = value else {
        panic!("not an object")
    };
    Arguments::from_json(members)
        .parse()
        .map_err(|error| error.desc)
}

fn from_option(text: &str) -> Result<Export, String> {
    let arguments = keyval::parse(text, None).map_err(|error| error.desc)?;
    arguments.parse().map_err(|error| error.desc)
}

#[test]
fn json_and_options_spell_the_same_struct() {
    let typed = json!({
        "id": "x", "writable": true, "num-queues": 4, "size": 65536u64, "delta": -3,
        "detect": "on", "addr": {"type": "unix", "path": "/s"}, "names": ["a", "b"],
    });
    let text = "id=x,writable=on,num-queues=4,size=64K,delta=-3,detect=on,addr.type=unix,\
                addr.path=/s,names.0=a,names.1=b";
    let parsed = from_option(text).unwrap();
    assert_eq!(from_json(typed).unwrap(), parsed);
    assert_eq!(parsed.size, Some(65536));
    let path = "/s".to_owned();
    assert_eq!(parsed.addr, Some(Address::Unix { path }));
}

#[test]
fn json_errors_are_those_of_the_peer() {
    for (value, expected) in [
        (json!({}), "Parameter 'id' is missing"),
        (
            json!({"id": 5}),
            "Invalid parameter type for 'id', expected: string",
        ),
        (json!({"id": "x", "zz": 1}), "Parameter 'zz' is unexpected"),
        (
            json!({"id": "x", "writable": "on"}),
            "Invalid parameter type for 'writable', expected: boolean",
        ),
        (
            json!({"id": "x", "num-queues": "x"}),
            "Parameter 'num-queues' expects uint64",
        ),
        (
            json!({"id": "x", "num-queues": -1}),
            "Parameter 'num-queues' expects uint16_t",
        ),
        (
            json!({"id": "x", "num-queues": 1.5}),
            "Parameter 'num-queues' expects uint64",
        ),
        (
            json!({"id": "x", "delta": "5"}),
            "Invalid parameter type for 'delta', expected: integer",
        ),
        (
            json!({"id": "x", "detect": "foo"}),
            "Parameter 'detect' does not accept value 'foo'",
        ),
        (
            json!({"id": "x", "addr": 5}),
            "Invalid parameter type for 'addr', expected: object",
        ),
        (
            json!({"id": "x", "addr": {}}),
            "Parameter 'addr.type' is missing",
        ),
        (
            json!({"id": "x", "addr": {"type": "unix"}}),
            "Parameter 'addr.path' is missing",
        ),
        (
            json!({"id": "x", "addr": {"type": "unix", "path": 5}}),
            "Invalid parameter type for 'addr.path', expected: string",
        ),
        (
            json!({"id": "x", "addr": {"type": "unix", "path": "/s", "zz": 1}}),
            "Parameter 'addr.zz' is unexpected",
        ),
        (
            json!({"id": "x", "addr": {"type": "vsock"}}),
            "Parameter 'type' does not accept value 'vsock'",
        ),
        (
            json!({"id": "x", "names": [1]}),
            "Invalid parameter type for 'names[0]', expected: string",
        ),
    ] {
        assert_eq!(from_json(value.clone()).unwrap_err(), expected, "{value}");
    }
}

#[test]
fn option_errors_are_those_of_the_peer() {
    for (text, expected) in [
        (
            "id=x,writable=maybe",
            "Parameter 'writable' expects 'on' or 'off'",
        ),
        (
            "id=x,num-queues=x",
            "Parameter 'num-queues' expects integer",
        ),
        (
            "id=x,num-queues=99999",
            "Parameter 'num-queues' expects uint16_t",
        ),
        ("id=x,size=1.5kk", "Parameter 'size' expects integer"),
        ("id=x,size=-1", "Parameter 'size' expects uint64"),
        (
            "id=x,size=18446744073709551615K",
            "Parameter 'size' expects uint64",
        ),
        (
            "id=x,addr=5",
            "Invalid parameter type for 'addr', expected: object",
        ),
        ("id=x,addr.type=unix", "Parameter 'addr.path' is missing"),
    ] {
        assert_eq!(from_option(text).unwrap_err(), expected, "{text}");
    }
}

#[test]
fn parts_take_what_they_know_and_finish_refuses_the_rest() {
    #[derive(Deserialize)]
    struct Common {
        id: String,
    }
    let mut arguments = keyval::parse("id=x,type=unix,path=/s,zz=1", None).unwrap();
    let common: Common = arguments.take().unwrap();
    let address: Address = arguments.take().unwrap();
    assert_eq!(common.id, "x");
    assert!(matches!(address, Address::Unix { .. }));
    let error = arguments.finish().unwrap_err();
    assert_eq!(error.desc, "Parameter 'zz' is unexpected");
}
