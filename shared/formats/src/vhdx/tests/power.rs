//! Power cuts while the log fills, is emptied and begins again: what was flushed is there, for this code and for the peer.

use super::super::header::Current;
use super::super::log::Replay;
use super::*;
use executor::sim::{PowerCut, Subset};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::io::Write;
use std::process::Command;

/// Blocks with entries in one page of the table.
const PER_PAGE: u64 = 512;
/// Blocks that are written, each with its own page of the table: the log's halves are full after 14 of them or less.
const BLOCKS: u64 = 56;
/// Written at a time, side by side.
const GROUP: u64 = 4;
/// Bytes written to each.
const LENGTH: usize = 1536;
const CUTS: usize = 30;

/// Where on the disk the n-th write goes, and what it writes.
fn nth(number: u64) -> (u64, u8) {
    let block = (number * 23 % BLOCKS) * PER_PAGE + number;
    (block * MIB + 4096, number as u8 + 1)
}

/// What happened, by lengths of the world's log.
struct Done {
    /// When the write was begun.
    begun: Vec<usize>,
    /// A flush was done, and covered so many writes.
    flushes: Vec<(usize, u64)>,
}

/// Writes and flushes, and is killed.
fn work(world: &World) -> Done {
    let mut done = Done {
        begun: Vec::new(),
        flushes: Vec::new(),
    };
    with_disk(world, WRITING, async |node| {
        for group in 0..BLOCKS / GROUP {
            let writes: Vec<_> = (group * GROUP..(group + 1) * GROUP)
                .map(|number| {
                    done.begun.push(world.log_len());
                    let (node, (offset, tag)) = (Arc::clone(&node), nth(number));
                    executor::spawn(async move { write(&node, offset, &[tag; LENGTH]).await })
                })
                .collect();
            for write in writes {
                write.await;
            }
            if group % 2 == 1 {
                node.flush().await.unwrap();
                done.flushes.push((world.log_len(), (group + 1) * GROUP));
            }
        }
    })
    .unwrap();
    done
}

impl Done {
    /// How many of the first writes are durable when the power is cut there.
    fn durable(&self, prefix: usize) -> u64 {
        let before = self.flushes.iter().filter(|(at, _)| *at <= prefix);
        before.map(|(_, writes)| *writes).max().unwrap_or(0)
    }

    /// Judges what a block holds after a cut.
    fn judge(&self, (number, bytes): (u64, &[u8]), prefix: usize) {
        let (_, tag) = nth(number);
        let is_begun = self.begun[number as usize] <= prefix;
        for sector in bytes.chunks(512) {
            let is_old = sector.iter().all(|byte| *byte == 0);
            let is_new = sector.iter().all(|byte| *byte == tag);
            let fits = match number < self.durable(prefix) {
                true => is_new,
                false => is_old || is_new && is_begun,
            };
            assert!(fits, "write {number} at {prefix}: {:?}", &sector[..8]);
        }
    }
}

fn a_world(seed: u64) -> World {
    let config = Config {
        seed,
        ..Config::default()
    };
    let image = new_image(BLOCKS * PER_PAGE * MIB, Kind::Zero);
    World::with_files(config, Image::from([(IMAGE.into(), image)]))
}

#[test]
fn what_was_flushed_is_there_after_power_cuts_through_a_log_that_wraps() {
    for seed in 0..2 {
        println!("seed {seed}");
        let world = a_world(seed);
        let done = work(&world);
        // The log was emptied: pages are in their places, although nothing was closed.
        let image = content(&world);
        let table = &image[BAT as usize..][..MIB as usize];
        let in_place = table.chunks(8).filter(|raw| raw[0] & 7 == 6).count();
        assert!(in_place > 28 && in_place < BLOCKS as usize, "{in_place}");
        let mut random = SmallRng::seed_from_u64(seed);
        for number in 0..CUTS {
            let prefix = random.random_range(0..=world.log_len());
            let subsets = [Subset::None, Subset::All, Subset::Random(random.random())];
            let cut = PowerCut {
                prefix,
                subset: subsets[number % 3],
                tear: [512, 4096][number / 3 % 2],
            };
            println!("{cut:?}");
            let after = world.restart(&cut, Config::default());
            if number % 5 == 0 {
                the_peer_replays(&content(&after), (&done, prefix));
            }
            with_disk(&after, WRITING, async |node| {
                for number in 0..BLOCKS {
                    let bytes = read(&node, nth(number).0, LENGTH).await;
                    done.judge((number, &bytes), prefix);
                }
                node.driver().close().await.unwrap();
            })
            .unwrap_or_else(|error| panic!("{}", error.message));
            // Nothing is left to be replayed.
            let read = with_disk(&after, READING, async |node| {
                read(&node, nth(0).0, LENGTH).await
            });
            done.judge((0, &read.unwrap()), prefix);
        }
    }
}

/// QEMU makes the same of the log.
fn the_peer_replays(image: &[u8], (done, prefix): (&Done, usize)) {
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.write_all(image).unwrap();
    let check = Command::new("qemu-img")
        .args(["check", "-q", "-f", "vhdx", "-r", "all"])
        .arg(file.path())
        .output()
        .unwrap();
    assert!(check.status.success(), "{check:?}");
    let reads = (0..done.durable(prefix)).flat_map(|number| {
        let (offset, tag) = nth(number);
        ["-c".to_owned(), format!("read -P {tag} {offset} {LENGTH}")]
    });
    let read = Command::new("qemu-io")
        .args(["-r", "-f", "vhdx"])
        .args(reads)
        .arg(file.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&read.stdout);
    let is_right = read.status.success() && !said.contains("fail");
    assert!(is_right, "{read:?}");
}

#[test]
fn a_log_is_named_only_while_it_has_something() {
    let world = a_world(7);
    work(&world);
    for prefix in 0..world.log_len().min(150) {
        let cut = PowerCut {
            prefix,
            subset: Subset::Random(prefix as u64),
            tear: 512,
        };
        let after = world.restart(&cut, Config::default());
        Executor::simulated(&after).block_on(async {
            let file = file();
            let header = Current::read(&file).await.unwrap().header;
            let is_named = header.log_guid != super::super::NO_GUID;
            let found = Replay::find(&file, &header).await.unwrap();
            assert_eq!(found.is_some(), is_named, "{cut:?}");
        });
    }
}
