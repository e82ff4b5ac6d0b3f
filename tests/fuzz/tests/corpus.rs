//! Every seed, and everything that fuzzing ever found, once.

use std::path::Path;

#[test]
fn every_seed_runs() {
    let seeds = fuzz::seeds::qcow2();
    assert!(!seeds.is_empty());
    for seed in seeds {
        println!("{}", seed.name);
        fuzz::qcow2::run(&seed.input);
    }
}

#[test]
fn what_fuzzing_found_stays_fixed() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions/qcow2");
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        fuzz::qcow2::run(&std::fs::read(path).unwrap());
    }
}
