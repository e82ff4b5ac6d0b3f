//! Every seed, and everything that fuzzing ever found, once.

use fuzz::target::Target;
use std::path::Path;

#[test]
fn every_seed_runs() {
    for target in Target::ALL {
        let seeds = fuzz::seeds::of(target);
        assert!(!seeds.is_empty());
        for seed in seeds {
            println!("{}: {}", target.name(), seed.name);
            fuzz::qcow2::run(target, &seed.input);
        }
    }
}

#[test]
fn every_seed_of_a_format_runs() {
    for format in fuzz::image::FORMATS {
        let seeds = fuzz::image::seeds(format);
        assert!(!seeds.is_empty(), "{format}");
        for seed in seeds {
            println!("{}", seed.name);
            fuzz::image::run(format, &seed.input);
        }
    }
}

/// A finding of one target is an input of the others, too.
#[test]
fn what_fuzzing_found_stays_fixed() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions/qcow2");
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        let input = std::fs::read(path).unwrap();
        for target in Target::ALL {
            fuzz::qcow2::run(target, &input);
        }
    }
}

#[test]
fn every_luks_seed_runs() {
    let seeds = fuzz::luks_seeds::luks();
    assert!(!seeds.is_empty());
    for seed in seeds {
        println!("{}", seed.name);
        fuzz::luks::run(&seed.input);
    }
}

#[test]
fn every_frame_seed_runs() {
    let seeds = fuzz::net_seeds::net_frame();
    assert!(!seeds.is_empty());
    for seed in seeds {
        println!("{}", seed.name);
        fuzz::net_frame::run(&seed.input);
    }
}
