//! No image makes its opening take memory without bounds: tables with every entry in use.
//!
//! An eighth of what the format allows, so that the tests are quick; memory follows the number of
//! entries. All of it may take a quarter of a gibibyte.

use crate::allocation::peak;
use crate::rig::{graph, options, run};
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MIB: i64 = 1 << 20;
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;

/// An image with tables of so many entries, which refer to places far behind the end of the file.
struct Crafted {
    l1_entries: u64,
    refcount_table_clusters: u64,
    /// Snapshots, each with a name of so many bytes.
    snapshots: (u64, u16),
}

impl Crafted {
    fn write(&self, path: &Path) {
        let l1_offset = CLUSTER;
        let refcounts_offset = (l1_offset + self.l1_entries * 8).next_multiple_of(CLUSTER);
        let refcount_bytes = self.refcount_table_clusters * CLUSTER;
        let snapshots_offset = refcounts_offset + refcount_bytes;
        let file = File::create(path).unwrap();
        let mut header = vec![0; 104];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        let word = |value: u64| (value as u32).to_be_bytes();
        put(0, b"QFI\xfb");
        put(4, &word(3));
        put(20, &word(u64::from(CLUSTER_BITS)));
        let size = self.l1_entries << (CLUSTER_BITS + CLUSTER_BITS - 3);
        put(24, &size.to_be_bytes());
        put(36, &word(self.l1_entries));
        put(40, &l1_offset.to_be_bytes());
        put(48, &refcounts_offset.to_be_bytes());
        put(56, &word(self.refcount_table_clusters));
        put(60, &word(self.snapshots.0));
        put(64, &snapshots_offset.to_be_bytes());
        put(96, &word(4));
        put(100, &word(104));
        file.write_all_at(&header, 0).unwrap();
        let table = |first: u64, entries: u64| -> Vec<u8> {
            let places = (0..entries).map(|index| first + index * CLUSTER);
            places.flat_map(u64::to_be_bytes).collect()
        };
        let l1 = table(1 << 40, self.l1_entries);
        file.write_all_at(&l1, l1_offset).unwrap();
        let refcounts = table(1 << 48, refcount_bytes / 8);
        file.write_all_at(&refcounts, refcounts_offset).unwrap();
        let snapshots: Vec<u8> = (0..self.snapshots.0)
            .flat_map(|n| self.snapshot(n))
            .collect();
        file.write_all_at(&snapshots, snapshots_offset).unwrap();
        let end = (snapshots_offset + snapshots.len() as u64).next_multiple_of(CLUSTER);
        file.set_len(end).unwrap();
    }

    fn snapshot(&self, number: u64) -> Vec<u8> {
        let (id, name_length) = (number.to_string(), self.snapshots.1);
        let mut entry = vec![0; 40 + 16];
        let place = (1_u64 << 50) + number * CLUSTER;
        entry[..8].copy_from_slice(&place.to_be_bytes());
        entry[8..12].copy_from_slice(&1_u32.to_be_bytes());
        entry[12..14].copy_from_slice(&(id.len() as u16).to_be_bytes());
        entry[14..16].copy_from_slice(&name_length.to_be_bytes());
        entry[36..40].copy_from_slice(&16_u32.to_be_bytes());
        entry.extend(id.bytes());
        entry.resize(entry.len() + usize::from(name_length), b'n');
        entry.resize(entry.len().next_multiple_of(8), 0);
        entry
    }
}

/// Most bytes held at once while the image is opened, whether or not it is refused.
fn peak_of_opening(image: &Crafted, read_only: bool) -> i64 {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("image.qcow2");
    image.write(&path);
    let node = json!({
        "driver": "qcow2", "node-name": "disk", "read-only": read_only,
        "file": {"driver": "file", "filename": path},
    });
    let (message, bytes) = peak(|| {
        run(async {
            let graph = graph();
            let opened = graph.add(options(node)).await;
            opened.map_or_else(|error| error.to_string(), |_| "opened".to_owned())
        })
    });
    println!("read-only {read_only}: {bytes} bytes at most; {message}");
    bytes
}

const LARGE_TABLES: Crafted = Crafted {
    l1_entries: 512 << 10,
    refcount_table_clusters: 16,
    snapshots: (0, 0),
};

#[test]
fn large_tables_are_opened_for_writing_within_their_share() {
    assert!(peak_of_opening(&LARGE_TABLES, false) < 32 * MIB);
}

#[test]
fn large_tables_are_opened_for_reading_in_the_size_of_the_l1_table() {
    assert!(peak_of_opening(&LARGE_TABLES, true) < 8 * MIB);
}

#[test]
fn many_snapshots_are_opened_within_their_share() {
    let image = Crafted {
        l1_entries: 1,
        refcount_table_clusters: 1,
        snapshots: (8192, 900),
    };
    assert!(peak_of_opening(&image, false) < 32 * MIB);
}

#[test]
fn an_ordinary_tebibyte_takes_next_to_nothing_before_it_is_used() {
    let image = Crafted {
        l1_entries: 2048,
        refcount_table_clusters: 1,
        snapshots: (0, 0),
    };
    assert!(peak_of_opening(&image, false) < 4 * MIB);
}
