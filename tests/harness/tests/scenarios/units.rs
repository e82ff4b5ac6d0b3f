//! The systemd units, as systemd itself judges them.

use std::path::Path;
use std::process::Command;

use harness::process::installed;

/// Highest exposure allowed, in tenths.
const EXPOSURE: &str = "--threshold=15";

#[test]
fn the_daemons_unit_exposes_next_to_nothing() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../daemons/blk/systemd/outboard-blkd@.service");
    let output = Command::new(installed("systemd-analyze", "systemd").unwrap())
        .args(["security", "--offline=true", "--no-pager", EXPOSURE])
        .arg(unit)
        .output()
        .unwrap();
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{report}");
    assert!(report.contains("Overall exposure level"), "{report}");
}
