//! The checks of what is read: they need nothing to be written, so formats that are only read run
//! them too.

use super::Subject;
use super::session::{read_all, with_subject};
use block::{Buffer, ByteRange, Errno, Graph, Root, RootHandle, WriteFlags, ZeroFlags};
use executor::sim::{Config, Fault, World};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::rc::Rc;

/// Readers at work at the same time.
const READERS: usize = 4;
/// Requests of each.
const REQUESTS: usize = 60;
/// Longest request in bytes.
const MAX_REQUEST: usize = 192 << 10;
/// Operations of one run that are made to fail, about.
const FAULTS: u64 = 25;
/// Broken images of one seed.
const BROKEN: usize = 40;
/// Most that is read of a broken image, in bytes.
const MAX_BROKEN: u64 = 4 << 20;

fn world(subject: &Subject, seed: u64) -> World {
    let config = Config {
        seed,
        short_transfers: true,
        ..Config::default()
    };
    World::with_files(config, subject.files.clone())
}

/// The subject holds `expected`: for readers side by side and requests of any alignment, by what is
/// known of each range, when it is opened again, and after failures. Nothing is written.
///
/// # Panics
/// When it does not.
pub fn readings(subject: &Subject, expected: &[u8], seed: u64) {
    println!("{}: seed {seed}", subject.name);
    let world = world(subject, seed);
    let files = world.files();
    for _ in 0..2 {
        let looked = with_subject(subject, &world, async |graph, root| {
            assert_eq!(root.attach().length(), expected.len() as u64, "the length");
            if read_all(&root.attach()).await? != expected {
                return Err("something else is read from end to end".to_owned());
            }
            side_by_side(&root, expected, seed).await;
            status(graph, &root, (expected, &files)).await?;
            outside(&root).await?;
            if graph
                .node("subject")
                .is_some_and(|node| node.options().read_only)
            {
                refuses_changes(&root).await?;
            }
            drop(root);
            graph.close_all().await.map_err(|error| error.message)
        });
        if let Err(reason) | Ok(Err(reason)) = looked {
            panic!("{}: seed {seed}: {reason}", subject.name);
        }
    }
    assert!(world.files() == files, "{}: reading wrote", subject.name);
    failed_reads(subject, expected, seed);
}

async fn side_by_side(root: &Root, expected: &[u8], seed: u64) {
    let expected: Rc<[u8]> = expected.into();
    let readers: Vec<_> = (0..READERS as u64)
        .map(|number| {
            let (root, expected) = (root.attach(), Rc::clone(&expected));
            executor::spawn(async move {
                let mut random = SmallRng::seed_from_u64(seed ^ (number << 32));
                for _ in 0..REQUESTS {
                    let start = random.random_range(0..expected.len());
                    let longest = (expected.len() - start).min(MAX_REQUEST);
                    let mut length = random.random_range(1..=longest);
                    if random.random() {
                        length = length.min(2048);
                    }
                    let read = read(&root, start as u64, length).await;
                    let read = read.expect("nothing fails here");
                    assert!(
                        read == expected[start..start + length],
                        "reader {number}: {length} bytes at {start}"
                    );
                }
            })
        })
        .collect();
    for reader in readers {
        reader.await;
    }
}

async fn read(root: &RootHandle, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
    let buffer = Buffer::zeroed(length);
    // What was there before must not show.
    buffer.fill(0xdb);
    root.read(offset, buffer.clone()).await?;
    Ok(buffer.to_heap().to_vec())
}

/// What is known of all ranges adds up to the disk, and is true.
async fn status(
    graph: &Graph,
    root: &Root,
    (expected, files): (&[u8], &executor::sim::Image),
) -> Result<(), String> {
    let node = graph
        .node("subject")
        .ok_or("the node is called otherwise")?;
    let mut at = 0;
    while at < expected.len() as u64 {
        let range = ByteRange::new(at, expected.len() as u64 - at);
        let extent = node.block_status(range).await;
        let extent = extent.map_err(|errno| format!("status at {at}: {errno}"))?;
        let end = at + extent.length;
        if extent.length == 0 || end > expected.len() as u64 {
            return Err(format!("{} bytes are alike at {at}", extent.length));
        }
        let content = &expected[at as usize..end as usize];
        if extent.status.zero && content.iter().any(|byte| *byte != 0) {
            return Err(format!("{at}..{end} does not read as zeroes"));
        }
        if let (true, Some(offset)) = (extent.status.data, extent.status.offset) {
            let file = files.get(Path::new(super::IMAGE)).ok_or("no image")?;
            let stored = file.get(offset as usize..).unwrap_or_default();
            let stored = &stored[..stored.len().min(content.len())];
            if stored != &content[..stored.len()] {
                return Err(format!("{at}..{end} is not stored at {offset}"));
            }
        }
        at = end;
    }
    drop(root.attach());
    Ok(())
}

/// Beyond the end there is nothing, and asking does no harm.
async fn outside(root: &Root) -> Result<(), String> {
    let root = root.attach();
    let end = root.length();
    for (offset, length) in [(end, 1), (end.saturating_sub(1), 2), (u64::MAX - 512, 512)] {
        if let Ok(bytes) = read(&root, offset, length).await
            && bytes[(end.saturating_sub(offset) as usize).min(length)..]
                .iter()
                .any(|byte| *byte != 0)
        {
            return Err(format!("something is read at {offset}, behind {end}"));
        }
    }
    Ok(())
}

async fn refuses_changes(root: &Root) -> Result<(), String> {
    let root = root.attach();
    let range = ByteRange::new(0, 512.min(root.length()));
    let buffer = Buffer::zeroed(range.length as usize);
    let results = [
        root.write(0, buffer, WriteFlags::default()).await,
        root.write_zeroes(range, ZeroFlags::default()).await,
        root.discard(range).await,
    ];
    match results.iter().all(Result::is_err) {
        true => root
            .flush()
            .await
            .map_err(|errno| format!("a flush: {errno}")),
        false => Err(format!("a read-only disk is changed: {results:?}")),
    }
}

/// The n-th operation fails, for many n: reads fail or are right, and are right afterwards.
fn failed_reads(subject: &Subject, expected: &[u8], seed: u64) {
    let total = {
        let world = world(subject, seed);
        let read = with_subject(subject, &world, async |_, root| {
            read_all(&root.attach()).await
        });
        assert!(matches!(read, Ok(Ok(_))), "{}: {read:?}", subject.name);
        world.op_count()
    };
    let step = (total / FAULTS).max(1) as usize;
    for op_index in (0..total).step_by(step) {
        let world = world(subject, seed);
        world.inject(Fault {
            op_index,
            errno: Errno::EIO,
            sticky: false,
        });
        let read = with_subject(subject, &world, async |_, root| {
            let first = read_all(&root.attach()).await;
            (first, read_all(&root.attach()).await)
        });
        let complain = |what: &str| panic!("{}: operation {op_index}: {what}", subject.name);
        match read {
            // It could not be opened.
            Err(_) => {}
            Ok((Ok(bytes), _)) if bytes != expected => complain("wrong bytes"),
            Ok((_, Ok(bytes))) if bytes == expected => {}
            Ok(_) => complain("the failure stays"),
        }
    }
}

/// Images with broken bytes, and with their end missing, are refused or read as something: nothing
/// panics or goes on for ever.
pub fn broken_images(subject: &Subject, seed: u64) {
    println!("{}: seed {seed}", subject.name);
    let mut random = SmallRng::seed_from_u64(seed);
    let image = &subject.files[Path::new(super::IMAGE)];
    for _ in 0..BROKEN {
        let mut bytes = image.clone();
        for _ in 0..random.random_range(1..8) {
            // Most of what can be broken stands at the ends.
            let near = bytes.len().min(1024);
            let at = match random.random_range(0..4) {
                0 => random.random_range(0..bytes.len()),
                1 => bytes.len() - 1 - random.random_range(0..near),
                _ => random.random_range(0..near),
            };
            match random.random_range(0..3) {
                0 => bytes[at] ^= 1 << random.random_range(0..8),
                1 => bytes[at] = [0, 0x7f, 0x80, 0xff][random.random_range(0..4)],
                _ => {
                    let end = (at + 8).min(bytes.len());
                    bytes[at..end].fill(0xff);
                }
            }
        }
        if random.random_range(0..4) == 0 {
            bytes.truncate(random.random_range(0..bytes.len()));
        }
        let mut files = subject.files.clone();
        files.insert(super::IMAGE.into(), bytes);
        let world = World::with_files(Config::default(), files);
        // It may be refused, and reads may fail.
        let _ = with_subject(subject, &world, async |graph, root| {
            let handle = root.attach();
            let length = handle.length().min(MAX_BROKEN);
            let mut at = 0;
            while at < length {
                let piece = (length - at).min(64 << 10);
                let _ = read(&handle, at, piece as usize).await;
                at += piece;
            }
            let last = handle.length().saturating_sub(4096);
            let _ = read(&handle, last, 4096).await;
            if let Some(node) = graph.node("subject") {
                for offset in [0, last] {
                    let range = ByteRange::new(offset, handle.length() - offset);
                    if range.length > 0 {
                        let _ = node.block_status(range).await;
                    }
                }
            }
        });
    }
}
