//! The order in which QEMU's dictionaries hand out their members.
//!
//! Scripts (QEMU's own test suite among them) compare JSON as text, so the order matters: members
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
