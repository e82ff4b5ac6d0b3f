//! Writes the seeds of a target into a directory: `make-seeds TARGET DIRECTORY`.

use fuzz::target::Target;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [target, directory] = arguments.as_slice() else {
        eprintln!("usage: make-seeds TARGET DIRECTORY");
        return ExitCode::from(2);
    };
    let seeds = match (Target::named(target), target.as_str()) {
        (Some(target), _) => fuzz::seeds::of(target),
        (None, "luks") => fuzz::luks_seeds::luks(),
        (None, "net_frame") => fuzz::net_seeds::net_frame(),
        (None, format) if fuzz::image::FORMATS.contains(&format) => fuzz::image::seeds(format),
        (None, "nbd_server") => fuzz::nbd_seeds::nbd_server(),
        (None, _) => {
            eprintln!("make-seeds: no target '{target}'");
            return ExitCode::from(2);
        }
    };
    for seed in seeds {
        let path = Path::new(directory).join(&seed.name);
        if let Err(error) = std::fs::write(&path, &seed.input) {
            eprintln!("make-seeds: {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
