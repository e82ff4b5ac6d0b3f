//! JSON as qemu-img prints it: indented by four, members in the order of its dictionaries.
//!
//! Scripts (QEMU's own test suite among them) compare this text, so the order matters: members
//! follow their key's hash.

use serde_json::{Map, Value};

const BUCKETS: u32 = 512;

/// The bucket of QEMU's dictionary that a key falls into.
fn bucket(key: &str) -> u32 {
    let seed = 0x238f_13af_u32.wrapping_mul(key.len() as u32);
    let mixed = key.bytes().zip(0_u32..).fold(seed, |hash, (byte, at)| {
        hash.wrapping_add(u32::from(byte) << (at * 5 % 24))
    });
    mixed.wrapping_mul(1_103_515_243).wrapping_add(12_345) % BUCKETS
}

/// `value` with the members of all objects in QEMU's order.
pub fn ordered(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            // Of two in one bucket the later comes first.
            let mut sorted: Vec<_> = members.iter().rev().collect();
            sorted.sort_by_key(|(key, _)| bucket(key));
            let sorted = sorted
                .into_iter()
                .map(|(key, value)| (key.clone(), ordered(value)));
            Value::Object(sorted.collect::<Map<_, _>>())
        }
        Value::Array(items) => Value::Array(items.iter().map(ordered).collect()),
        other => other.clone(),
    }
}

/// The text of `value`, with a line end.
pub fn text(value: &Value) -> String {
    let line = qmp::json::to_line(&ordered(value), qmp::json::Layout::Indented);
    let text = String::from_utf8_lossy(&line);
    format!("{}\n", text.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn members_stand_where_the_peer_puts_them() {
        let value =
            json!({"filename": "a", "dirty-flag": false, "virtual-size": 1, "format": "raw"});
        let expected = "{\n    \"virtual-size\": 1,\n    \"filename\": \"a\",\n    \
                        \"format\": \"raw\",\n    \"dirty-flag\": false\n}\n";
        assert_eq!(text(&value), expected);
    }
}
