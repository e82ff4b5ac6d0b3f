//! The checks.

use super::Subject;
use super::history::{History, Moment};
use super::session::{Work, read_all, run_writers, with_subject, with_subject_as};
use executor::Errno;
use executor::sim::{Config, Fault, PowerCut, Subset, World};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::rc::Rc;

/// Requests of each writer.
const REQUESTS: usize = 60;

/// Points at which the power is cut in one run, besides the end.
const CUTS: usize = 20;

/// Operations of one run that are made to fail, about.
const FAULTS: u64 = 25;

fn world_of(subject: &Subject, seed: u64) -> World {
    let config = Config {
        seed,
        short_transfers: true,
        ..Config::default()
    };
    World::with_files(config, subject.files.clone())
}

fn config(seed: u64) -> Config {
    Config {
        seed,
        ..Config::default()
    }
}

fn failure(subject: &Subject, seed: u64, what: &str) -> String {
    format!("{}: seed {seed}: {what}", subject.name)
}

/// What the subject holds at first.
fn initial(subject: &Subject) -> Vec<u8> {
    let world = World::with_files(config(0), subject.files.clone());
    let read = with_subject(subject, &world, async |_, root| {
        read_all(&root.attach()).await
    });
    match read {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(reason)) | Err(reason) => panic!("{} cannot be read: {reason}", subject.name),
    }
}

/// Looks at everything after a run: the subject opens, holds what it may, and its file is sound.
fn look(subject: &Subject, world: &World, history: &History, moment: Moment) -> Result<(), String> {
    (subject.check)(&world.files()).map_err(|reason| format!("{moment:?}: before: {reason}"))?;
    let read_only = subject.marks_use && !matches!(moment, Moment::Now);
    let bytes = with_subject_as((subject, read_only), world, async |graph, root| {
        let bytes = read_all(&root.attach()).await;
        drop(root);
        let closed = graph.close_all().await;
        bytes.and_then(|bytes| closed.map(|()| bytes).map_err(|error| error.message))
    })
    .flatten()
    .map_err(|reason| format!("{moment:?}: does not open: {reason}"))?;
    history.judge(0, &bytes, moment)?;
    (subject.check)(&world.files()).map_err(|reason| format!("{moment:?}: after: {reason}"))
}

fn run(subject: &Subject, world: &World, history: &Rc<History>, work: Work) -> Result<(), String> {
    with_subject(subject, world, async |graph, root| {
        run_writers(&root, world, history, work).await;
        drop(root);
        graph.close_all().await.map_err(|error| error.message)
    })
    .flatten()
}

/// Writers side by side: every read sees what its writer wrote last, and so does the next process.
pub fn concurrent_requests(subject: &Subject, seed: u64) {
    println!("{}: seed {seed}", subject.name);
    let history = Rc::new(History::new(initial(subject)));
    let world = world_of(subject, seed);
    let work = Work {
        seed,
        requests: 4 * REQUESTS,
        faults: false,
    };
    let outcome = run(subject, &world, &history, work).and_then(|()| {
        let world = World::with_files(config(seed), world.files());
        look(subject, &world, &history, Moment::Now)
    });
    outcome.unwrap_or_else(|reason| panic!("{}", failure(subject, seed, &reason)));
}

/// The power is cut at many points: what was flushed is there, and the image is sound.
pub fn power_cuts(subject: &Subject, seed: u64) {
    println!("{}: seed {seed}", subject.name);
    let history = Rc::new(History::new(initial(subject)));
    let world = world_of(subject, seed);
    let work = Work {
        seed,
        requests: REQUESTS,
        faults: false,
    };
    let mut outcome = run(subject, &world, &history, work);
    let mut random = SmallRng::seed_from_u64(seed);
    let mut prefixes: Vec<_> = (0..CUTS)
        .map(|_| random.random_range(0..=world.log_len()))
        .collect();
    prefixes.push(world.log_len());
    prefixes.sort_unstable();
    for prefix in prefixes {
        for subset in [Subset::None, Subset::All, Subset::Random(random.random())] {
            let tear = [512, 4096][random.random_range(0..2)];
            let cut = PowerCut {
                prefix,
                subset,
                tear,
            };
            let restarted = world.restart(&cut, config(seed));
            outcome = outcome.and_then(|()| {
                look(subject, &restarted, &history, Moment::Cut(prefix))
                    .map_err(|reason| format!("{cut:?}: {reason}"))
            });
        }
    }
    outcome.unwrap_or_else(|reason| panic!("{}", failure(subject, seed, &reason)));
}

/// The n-th operation fails, once or for good, for many n: nothing hangs, nothing that was
/// reported as done is lost, and the image is sound.
pub fn failed_operations(subject: &Subject, seed: u64) {
    println!("{}: seed {seed}", subject.name);
    let first = initial(subject);
    let work = Work {
        seed,
        requests: REQUESTS / 4,
        faults: true,
    };
    let total = {
        let world = world_of(subject, seed);
        let history = Rc::new(History::new(first.clone()));
        run(subject, &world, &history, work).expect("a run without faults succeeds");
        world.op_count()
    };
    let step = (total / FAULTS).max(1);
    for op_index in (0..total).step_by(usize::try_from(step).expect("a small step")) {
        for (errno, sticky) in [
            (Errno::EIO, false),
            (Errno::ENOSPC, false),
            (Errno::EIO, true),
        ] {
            let world = world_of(subject, seed);
            let fault = Fault {
                op_index,
                errno,
                sticky,
            };
            world.inject(fault);
            let history = Rc::new(History::new(first.clone()));
            // An image that cannot be opened or closed says so; the next process sees to it.
            run(subject, &world, &history, work).ok();
            let next = World::with_files(config(seed), world.files());
            if let Err(reason) = look(subject, &next, &history, Moment::Ended) {
                panic!(
                    "{}",
                    failure(subject, seed, &format!("{fault:?}: {reason}"))
                );
            }
        }
    }
}
