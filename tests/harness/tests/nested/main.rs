//! Scenarios with real guests.

use std::time::Duration;

use harness::nested::NestedVm;

#[test]
fn the_outer_machine_offers_kvm_to_programs() {
    let script = r#"test -c /dev/kvm && echo '{"event": "kvm"}'; echo plain; exit 3"#;
    let outcome = NestedVm::new()
        .unwrap()
        .script(script)
        .run(Duration::from_secs(120), |_| ());
    let outcome = outcome.unwrap();
    assert!(outcome.event("kvm").is_some(), "{outcome:#?}");
    assert_eq!(outcome.output, ["plain"]);
    assert_eq!(outcome.exit, Some(3));
}
