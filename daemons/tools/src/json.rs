//! JSON as qemu-img prints it: indented by four, members in the order of its dictionaries.

pub use qmp::json::ordered;
use serde_json::Value;

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
