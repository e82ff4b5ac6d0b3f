//! Volumes as other programs see them: `fsck.fat` says that they are sound, mtools take files out.

use super::*;
use executor::{Executor, HeapBuffer};
use std::fs;
use std::path::Path;
use std::process::Command;

/// The part of a disk that the samples fill.
const FILLED: u64 = 48 << 20;

/// The disk of a directory, and its length; beyond [`FILLED`] bytes there is nothing.
fn image(directory: &Path, shape: (Geometry, Width)) -> Result<(Vec<u8>, u64)> {
    let tree = Tree::scan(directory)?;
    let volume = Volume::new(&tree, shape, b"TEST VOLUME")?;
    let disk = Vvfat {
        directory: directory.to_owned(),
        tree: Arc::new(tree),
        volume,
        files: Mutex::default(),
    };
    let length = disk.length();
    let filled = length.min(FILLED);
    if filled < length {
        assert_eq!(disk.volume.piece(filled).0, Piece::Zero);
    }
    let executor = Executor::new(&executor::Config::default()).unwrap();
    let bytes = executor.block_on(async move {
        let buffer = HeapBuffer::zeroed(filled as usize).into_buffer();
        disk.read(0, buffer.clone()).await.unwrap();
        buffer.into_heap().to_vec()
    });
    Ok((bytes, length))
}

/// The directory's files, by path.
fn files(directory: &Path) -> Vec<(PathBuf, Option<Vec<u8>>)> {
    let mut found = Vec::new();
    let mut next = vec![directory.to_owned()];
    while let Some(at) = next.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(directory).unwrap().to_owned();
            match path.is_dir() {
                true => {
                    found.push((name, None));
                    next.push(path);
                }
                false => found.push((name, Some(fs::read(&path).unwrap()))),
            }
        }
    }
    found.sort();
    found
}

fn run(program: &str, arguments: &[&str], path: &Path) -> String {
    let output = Command::new(program)
        .args(arguments)
        .arg(path)
        .env("MTOOLS_SKIP_CHECK", "0")
        .output()
        .expect("scripts/setup installs dosfstools and mtools");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program}: {output:?}");
    said
}

/// A directory with names and sizes of all kinds.
fn sample() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let noise = |length: usize| -> Vec<u8> { (0..length).map(|i| (i * i / 7 + i) as u8).collect() };
    for (name, length) in [
        ("README", 5),
        ("empty", 0),
        ("one cluster.bin", 8192),
        ("b.Bin", 70_001),
    ] {
        fs::write(root.join(name), noise(length)).unwrap();
    }
    fs::create_dir_all(root.join("deep/deeper/the deepest of all")).unwrap();
    fs::write(root.join("deep/deeper/the deepest of all/x"), noise(513)).unwrap();
    fs::create_dir(root.join("many")).unwrap();
    for number in 0..300 {
        let path = root.join(format!("many/a file with the number {number}.text"));
        fs::write(path, noise(number)).unwrap();
    }
    directory
}

/// `fsck.fat` finds nothing wrong, and mtools take out what was in the directory.
fn check(shape: (Geometry, Width), offset: u64) {
    let directory = sample();
    let (filled, length) = image(directory.path(), shape).unwrap();
    let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
    let volume = scratch.path().join("volume");
    fs::write(&volume, &filled[offset as usize..]).unwrap();
    let whole = fs::File::options().write(true).open(&volume).unwrap();
    whole.set_len(length - offset).unwrap();
    run("fsck.fat", &["-n", "-v"], &volume);
    let out = scratch.path().join("out");
    fs::create_dir(&out).unwrap();
    let taken = Command::new("mcopy")
        .args(["-s", "-n", "-Q", "-i"])
        .arg(&volume)
        .arg("::*")
        .arg(&out)
        .output()
        .unwrap();
    assert!(taken.status.success(), "{taken:?}");
    assert_eq!(files(&out), files(directory.path()));
    assert!(
        run(
            "mlabel",
            &["-s", "-i", volume.to_str().unwrap()],
            Path::new("::")
        )
        .contains("TEST VOLUME")
    );
}

#[test]
fn hard_disks_of_all_kinds_hold_what_the_directory_holds() {
    for width in [Width::Twelve, Width::Sixteen, Width::ThirtyTwo] {
        check(Geometry::new(false, Some(width)), 63 * 512);
    }
    check(Geometry::new(false, None), 63 * 512);
}

#[test]
fn floppy_disks_hold_what_the_directory_holds() {
    check(Geometry::new(true, None), 0);
    check(Geometry::new(true, Some(Width::Twelve)), 0);
    check(Geometry::new(true, Some(Width::Sixteen)), 0);
    let empty = tempfile::tempdir().unwrap();
    let refused = image(empty.path(), Geometry::new(true, Some(Width::ThirtyTwo)));
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("larger disk"), "{message}");
}

#[test]
fn fat32_grows_with_the_directory_and_the_others_refuse() {
    let directory = tempfile::tempdir().unwrap();
    for number in 0..3 {
        let file = fs::File::create(directory.path().join(format!("{number}"))).unwrap();
        file.set_len(u64::from(u32::MAX) - number).unwrap();
    }
    let volume = |shape| {
        let tree = Tree::scan(directory.path()).unwrap();
        Volume::new(&tree, shape, b"TEST VOLUME")
    };
    let grown = volume(Geometry::new(false, Some(Width::ThirtyTwo))).unwrap();
    assert!(grown.length() > 12 << 30 && grown.length() < 13 << 30);
    let refused = volume(Geometry::new(false, None)).unwrap_err().to_string();
    assert!(
        refused.contains("does not fit in FAT16 (capacity 528."),
        "{refused}"
    );
    fs::File::options()
        .write(true)
        .open(directory.path().join("0"))
        .unwrap()
        .set_len(1 << 32)
        .unwrap();
    let refused = Tree::scan(directory.path()).unwrap_err().to_string();
    assert!(refused.contains("0 is too long for FAT"), "{refused}");
}

#[test]
fn a_top_directory_with_too_many_files_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    for number in 0..600 {
        fs::write(directory.path().join(format!("{number}")), "").unwrap();
    }
    let shape = Geometry::new(false, None);
    let refused = image(directory.path(), shape).unwrap_err().to_string();
    assert!(refused.contains("does not fit in FAT16"), "{refused}");
    let tree = Tree::scan(directory.path()).unwrap();
    let shape = Geometry::new(false, Some(Width::ThirtyTwo));
    Volume::new(&tree, shape, b"TEST VOLUME").unwrap();
}

#[test]
fn nothing_outside_of_the_directory_is_reached() {
    let outside = tempfile::NamedTempFile::new().unwrap();
    fs::write(outside.path(), "secret").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    std::os::unix::fs::symlink(outside.path(), root.join("link")).unwrap();
    std::os::unix::fs::symlink("/", root.join("all")).unwrap();
    nix::unistd::mkfifo(&root.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::write(root.join("plain"), "plain").unwrap();
    let tree = Tree::scan(root).unwrap();
    let names: Vec<&str> = tree.entries().iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names, ["", "plain"]);
    // What takes the place of a file later is not followed, either.
    fs::remove_file(root.join("plain")).unwrap();
    std::os::unix::fs::symlink(outside.path(), root.join("plain")).unwrap();
    assert!(tree.open_file(1).is_err());
    fs::remove_file(root.join("plain")).unwrap();
    nix::unistd::mkfifo(&root.join("plain"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(tree.open_file(1).is_err());
}

#[test]
fn files_that_change_keep_their_length_on_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("FILE");
    fs::write(&path, [1; 3000]).unwrap();
    let tree = Tree::scan(directory.path()).unwrap();
    let volume = Volume::new(&tree, Geometry::new(true, None), b"TEST VOLUME").unwrap();
    let disk = Vvfat {
        directory: directory.path().to_owned(),
        tree: Arc::new(tree),
        volume,
        files: Mutex::default(),
    };
    let executor = Executor::new(&executor::Config::default()).unwrap();
    executor.block_on(async move {
        for (content, expected) in [
            (vec![2; 9000], vec![2; 3000]),
            (vec![3; 10], [vec![3; 10], vec![0; 2990]].concat()),
        ] {
            fs::write(&path, content).unwrap();
            let buffer = Buffer::zeroed(4096);
            disk.read_file((1, 0), buffer.clone()).await.unwrap();
            let read = buffer.into_heap();
            assert_eq!(read[..3000], expected);
            assert!(read[3000..].iter().all(|byte| *byte == 0));
        }
    });
}

#[test]
fn names_say_what_the_options_say() {
    let parsed = |name| Value::Object(parse(name));
    let expected = json!({"dir": "/x:y", "fat-type": 32, "floppy": true, "rw": false});
    assert_eq!(parsed("fat:floppy:32:/x:y"), expected);
    assert_eq!(parsed("fat:32:floppy:/x:y"), expected);
    let expected = json!({"dir": "rw", "fat-type": 0, "floppy": false, "rw": true});
    assert_eq!(parsed("fat:rw:rw"), expected);
}
