//! Every seed, and everything that fuzzing ever found, once.

#![expect(clippy::unwrap_used, reason = "tests")]

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

/// What fuzzing found in a folder of `regressions`.
fn findings(folder: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("regressions")
        .join(folder);
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        std::fs::read(path).unwrap()
    };
    let found: Vec<_> = std::fs::read_dir(directory).unwrap().map(read).collect();
    assert!(!found.is_empty(), "{folder}");
    found
}

/// A finding of one target is an input of the others, too.
#[test]
fn what_fuzzing_found_in_qcow2_stays_fixed() {
    for input in findings("qcow2") {
        for target in Target::ALL {
            fuzz::qcow2::run(target, &input);
        }
    }
}

#[test]
fn what_fuzzing_found_in_frames_stays_fixed() {
    for input in findings("net_frame") {
        fuzz::net_frame::run(&input);
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

#[test]
fn every_nbd_seed_runs() {
    let seeds = fuzz::nbd_seeds::nbd_server();
    assert!(!seeds.is_empty());
    for seed in seeds {
        println!("{}", seed.name);
        fuzz::nbd::run(&seed.input);
    }
}

/// Conversations with changed bytes, lost and repeated parts: what a fuzzer tries first. `OUTBOARD_FUZZ_SECONDS` is how long.
#[test]
fn mutated_nbd_conversations_end() {
    let given = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let seconds = given("OUTBOARD_FUZZ_SECONDS").unwrap_or(2);
    let seed = given("OUTBOARD_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    println!("OUTBOARD_SEED={seed}");
    let mut random = Random(seed);
    let seeds = fuzz::nbd_seeds::nbd_server();
    let began = std::time::Instant::now();
    let mut runs = 0;
    while began.elapsed().as_secs() < seconds {
        let mut input = seeds[random.below(seeds.len())].input.clone();
        for _ in 0..=random.below(8) {
            random.mutate(&mut input);
        }
        runs += 1;
        let ended = std::panic::catch_unwind(|| fuzz::nbd::run(&input));
        assert!(ended.is_ok(), "run {runs}: {input:02x?}");
    }
    println!("{runs} runs");
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn mutate(&mut self, input: &mut Vec<u8>) {
        let at = self.below(input.len());
        let end = (at + 1 + self.below(40)).min(input.len());
        match self.below(6) {
            0 => input[at] ^= 1 << self.below(8),
            1 => input[at] = self.next() as u8,
            // Numbers at the edges.
            2 => {
                let edges = [0, 1, 0x7f, 0x80, 0xff];
                let edge = edges[self.below(edges.len())];
                let end = end.min(at + 8);
                input[at..end].fill(edge);
            }
            3 => drop(input.drain(at..end)),
            4 => {
                let part = input[at..end].to_vec();
                let to = self.below(input.len());
                input.splice(to..to, part);
            }
            _ => input.truncate(end),
        }
        if input.is_empty() {
            input.push(0);
        }
    }
}
