//! The systemd units, as systemd itself judges them.

use std::path::Path;
use std::process::Command;

use harness::process::installed;

/// Highest exposure allowed, in tenths.
const EXPOSURE: &str = "--threshold=15";

#[test]
fn the_daemons_units_expose_next_to_nothing() {
    for unit in [
        "daemons/blk/systemd/outboard-blkd@.service",
        "daemons/net/systemd/outboard-netd@.service",
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../..")
            .join(unit);
        let output = Command::new(installed("systemd-analyze", "systemd").unwrap())
            .args(["security", "--offline=true", "--no-pager", EXPOSURE])
            .arg(path)
            .output()
            .unwrap();
        let report = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{unit}: {report}");
        assert!(
            report.contains("Overall exposure level"),
            "{unit}: {report}"
        );
    }
}
