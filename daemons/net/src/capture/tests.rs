use std::path::Path;
use std::process::Command;

use super::writer::path_of;
use super::*;
use crate::frame::VnetHeader;

/// A broadcast frame of `len` bytes that tcpdump knows nothing of.
fn frame_bytes(seed: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xff; 6];
    bytes.extend([2, 0, 0, 0, 0, seed, 0x88, 0xb5]);
    bytes.resize(len, seed);
    bytes
}

fn record(capture: &Capture, direction: Direction, bytes: &[u8]) {
    capture.frame(direction, &Frame::new(VnetHeader::default(), bytes));
}

fn options(file: &Path) -> CaptureOptions {
    CaptureOptions {
        file: file.to_owned(),
        ..CaptureOptions::default()
    }
}

/// What tcpdump reads: (source's last byte, length) of each frame. `None` where there is no tcpdump.
fn read(path: &Path) -> Option<Vec<(u8, usize)>> {
    let tcpdump = Command::new("tcpdump")
        .args(["-nn", "-e", "-tt", "-r"])
        .arg(path)
        .output();
    let output = match tcpdump {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: tcpdump (scripts/setup installs it): {error}");
            return None;
        }
    };
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{complaint}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().filter(|line| line.contains(" > "));
    let parsed = lines.map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let arrow = words.iter().position(|word| *word == ">").unwrap();
        let source = u8::from_str_radix(words[arrow - 1].rsplit(':').next().unwrap(), 16).unwrap();
        let at = words.iter().position(|word| *word == "length").unwrap();
        let len = words[at + 1].trim_end_matches(':').parse().unwrap();
        (source, len)
    });
    Some(parsed.collect())
}

/// Blocks of a file: (type, body), judged by their lengths.
fn blocks(path: &Path) -> Vec<(u32, Vec<u8>)> {
    let bytes = std::fs::read(path).unwrap();
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut blocks = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let len = word(at + 4) as usize;
        assert_eq!((len % 4, word(at + len - 4) as usize), (0, len), "at {at}");
        blocks.push((word(at), bytes[at + 8..at + len - 4].to_vec()));
        at += len;
    }
    blocks
}

/// Option `code` of 8 bytes in the options of a block's body.
fn option_u64(options: &[u8], code: u16) -> Option<u64> {
    let half = |at: usize| u16::from_ne_bytes(options[at..at + 2].try_into().unwrap());
    let mut at = 0;
    while at + 4 <= options.len() && half(at) != 0 {
        let len = usize::from(half(at + 2));
        if half(at) == code {
            return Some(u64::from_ne_bytes(
                options[at + 4..at + 12].try_into().unwrap(),
            ));
        }
        at += 4 + len.next_multiple_of(4);
    }
    None
}

#[test]
fn tcpdump_reads_what_was_recorded() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cap.pcapng");
    let capture = Capture::default();
    assert!(!capture.is_active());
    record(&capture, Direction::Rx, &frame_bytes(9, 60));
    capture.start(&options(&file), "p0").unwrap();
    assert!(capture.is_active());
    let again = capture.start(&options(&file), "p0").unwrap_err();
    assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    let other = capture.clone();
    for (seed, len) in [(1, 60), (2, 61), (3, 1514), (4, 14)] {
        record(&capture, Direction::Rx, &frame_bytes(seed, len));
        record(&other, Direction::Tx, &frame_bytes(seed + 0x10, len + 1));
    }
    let state = other.stop().unwrap();
    assert_eq!((state.written, state.lost, state.full), (8, 0, false));
    assert_eq!(
        (other.stop(), capture.state(), capture.is_active()),
        (None, None, false)
    );
    record(&capture, Direction::Rx, &frame_bytes(9, 60));
    let Some(frames) = read(&file) else { return };
    let (rx, tx): (Vec<_>, Vec<_>) = frames.into_iter().partition(|(source, _)| *source < 0x10);
    assert_eq!(rx, [(1, 60), (2, 61), (3, 1514), (4, 14)]);
    assert_eq!(tx, [(0x11, 61), (0x12, 62), (0x13, 1515), (0x14, 15)]);
    // Directions, which tcpdump does not show: option 2 behind the frame, whose last byte of its source is at 31.
    for (_, body) in blocks(&file).iter().filter(|(kind, _)| *kind == 6) {
        let kept = u32::from_ne_bytes(body[12..16].try_into().unwrap()) as usize;
        let options = &body[20 + kept.next_multiple_of(4)..];
        let inbound = body[31] < 0x10;
        assert_eq!(
            options[..8],
            [2, 0, 4, 0, if inbound { 1 } else { 2 }, 0, 0, 0]
        );
    }
}

#[test]
fn only_what_passes_the_filter_is_recorded_and_only_its_beginning() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cap.pcapng");
    let capture = Capture::default();
    let options = CaptureOptions {
        snaplen: Some(50),
        direction: Directions::Tx,
        min_size: Some(60),
        max_size: Some(100),
        ..options(&file)
    };
    capture.start(&options, "p0").unwrap();
    for len in [59, 60, 100, 101] {
        record(&capture, Direction::Rx, &frame_bytes(1, len));
        record(&capture, Direction::Tx, &frame_bytes(2, len));
    }
    assert_eq!(capture.stop().unwrap().written, 2);
    let packets = blocks(&file);
    let packets: Vec<_> = packets.iter().filter(|(kind, _)| *kind == 6).collect();
    let word = |body: &[u8], at: usize| u32::from_ne_bytes(body[at..at + 4].try_into().unwrap());
    let lens: Vec<_> = packets
        .iter()
        .map(|(_, body)| (word(body, 12), word(body, 16)))
        .collect();
    assert_eq!(lens, [(50, 60), (50, 100)]);
    assert_eq!(packets[0].1[20..70], frame_bytes(2, 60)[..50]);
}

#[test]
fn a_ring_keeps_the_newest_frames_in_files_of_limited_size() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cap.pcapng");
    let capture = Capture::default();
    let options = CaptureOptions {
        size: Some(SMALLEST_FILE),
        files: Some(3),
        buffer: Some(64 << 20),
        ..options(&file)
    };
    capture.start(&options, "p0").unwrap();
    let count = 1000;
    for seed in 0..count {
        record(&capture, Direction::Rx, &frame_bytes(seed as u8, 1500));
    }
    let state = capture.stop().unwrap();
    assert_eq!((state.written, state.lost), (count, 0));
    assert!(!file.exists());
    let mut kept = 0;
    for index in 0..3 {
        let path = path_of(&file, index, 3);
        assert_eq!(path, directory.path().join(format!("cap.{index}.pcapng")));
        assert!(path.metadata().unwrap().len() <= SMALLEST_FILE);
        let blocks = blocks(&path);
        let kinds: Vec<u32> = blocks.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds[..2], [0x0a0d_0d0a, 1]);
        assert_eq!(kinds.last(), Some(&5), "a file ends with statistics");
        kept += kinds.iter().filter(|kind| **kind == 6).count();
        let Some(frames) = read(&path) else { return };
        let in_order = frames
            .windows(2)
            .all(|pair| pair[1].0 == pair[0].0.wrapping_add(1));
        assert!(in_order, "{frames:?}");
    }
    assert!((150..300).contains(&kept), "{kept} frames in three files");
}

#[test]
fn one_file_of_limited_size_ends_when_it_is_full() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cap.pcapng");
    let capture = Capture::default();
    let options = CaptureOptions {
        size: Some(SMALLEST_FILE),
        ..options(&file)
    };
    capture.start(&options, "p0").unwrap();
    for _ in 0..200 {
        record(&capture, Direction::Rx, &frame_bytes(1, 1500));
    }
    let state = capture.stop().unwrap();
    assert!(state.full && state.written > 50, "{state:?}");
    assert_eq!(state.written + state.lost, 200);
    assert!(file.metadata().unwrap().len() <= SMALLEST_FILE);
    let blocks = blocks(&file);
    let (kind, body) = blocks.last().unwrap();
    assert_eq!(*kind, 5);
    assert_eq!(option_u64(&body[12..], 4), Some(200));
    assert_eq!(option_u64(&body[12..], 5), Some(state.lost));
}

#[test]
fn frames_beyond_the_buffer_are_lost_and_counted_in_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cap.pcapng");
    let filter = Filter {
        directions: Directions::Both,
        min_len: 0,
        max_len: usize::MAX,
    };
    // No writer runs until everything is recorded.
    let session = Arc::new(Session::new(filter, 65_536, 10_000));
    let lane = session.add_lane();
    let bytes = frame_bytes(1, 1000);
    let frame = Frame::new(VnetHeader::default(), &bytes);
    let flood = || (0..20).for_each(|_| session.record(&lane, Direction::Rx, &frame));
    flood();
    let lost = session.lost();
    assert!((10..20).contains(&lost), "{lost}");
    let mut batches = Vec::new();
    assert_eq!(session.collect(&mut batches) as u64, 20 - lost);
    session.record(&lane, Direction::Rx, &frame);
    let files = Files::open(&file, 1, u64::MAX, "p0", 65_536).unwrap();
    session.stop();
    writer::write_all(&session, files);
    let blocks = blocks(&file);
    let packets: Vec<_> = blocks.iter().filter(|(kind, _)| *kind == 6).collect();
    assert_eq!(packets.len(), 1);
    assert_eq!(option_u64(&packets[0].1[20 + 1000..], 4), Some(lost));
    let statistics = &blocks.last().unwrap().1;
    assert_eq!(option_u64(&statistics[12..], 5), Some(lost));
}

#[test]
fn threads_record_side_by_side_and_nothing_is_miscounted() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cap.pcapng");
    let capture = Capture::default();
    let options = CaptureOptions {
        buffer: Some(*BUFFERS.start()),
        ..options(&file)
    };
    capture.start(&options, "p0").unwrap();
    let threads: Vec<_> = (0..3)
        .map(|seed| {
            let capture = capture.clone();
            thread::spawn(move || {
                (0..5000).for_each(|_| record(&capture, Direction::Tx, &frame_bytes(seed, 100)));
            })
        })
        .collect();
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    let state = capture.stop().unwrap();
    assert_eq!(state.written + state.lost, 15_000);
    let blocks = blocks(&file);
    let packets = blocks.iter().filter(|(kind, _)| *kind == 6).count();
    assert_eq!(packets as u64, state.written);
    let statistics = &blocks.last().unwrap().1;
    assert_eq!(option_u64(&statistics[12..], 4), Some(15_000));
}

#[test]
fn a_disk_that_is_full_ends_the_capture_and_nothing_else() {
    let capture = Capture::default();
    // The beginning of the file is written at once.
    let error = capture
        .start(&options(Path::new("/dev/full")), "p0")
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert!(!capture.is_active());
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let filter = Filter {
        directions: Directions::Both,
        min_len: 0,
        max_len: usize::MAX,
    };
    let session = Arc::new(Session::new(filter, 65_536, 1 << 20));
    let lane = session.add_lane();
    let bytes = frame_bytes(1, 60);
    let frame = Frame::new(VnetHeader::default(), &bytes);
    session.record(&lane, Direction::Rx, &frame);
    writer::write_all(&session, Files::on(full));
    assert!(
        session
            .error()
            .is_some_and(|error| error.contains("No space left"))
    );
    session.record(&lane, Direction::Rx, &frame);
    assert_eq!(session.lost(), 1);
}

#[test]
fn options_out_of_range_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cap.pcapng");
    let good = options(&file);
    let missing = options(&directory.path().join("none/cap.pcapng"));
    for (options, why) in [
        (CaptureOptions::default(), "'file' has to name a file"),
        (missing, "cannot create"),
        (
            CaptureOptions {
                files: Some(0),
                ..good.clone()
            },
            "'files' has to be 1 to 256, not 0",
        ),
        (
            CaptureOptions {
                files: Some(2),
                ..good.clone()
            },
            "'files' needs 'size'",
        ),
        (
            CaptureOptions {
                size: Some(1),
                ..good.clone()
            },
            "'size' has to be at least 131072, not 1",
        ),
        (
            CaptureOptions {
                snaplen: Some(0),
                ..good.clone()
            },
            "'snaplen' has to be 1 to",
        ),
        (
            CaptureOptions {
                buffer: Some(1),
                ..good.clone()
            },
            "'buffer' has to be",
        ),
        (
            CaptureOptions {
                min_size: Some(2),
                max_size: Some(1),
                ..good.clone()
            },
            "'min-size' is larger",
        ),
    ] {
        let error = Capture::default().start(&options, "p0").unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
    let parsed: CaptureOptions =
        qmp::keyval::parse("file=/x,direction=tx,size=1M,min-size=60", None)
            .unwrap()
            .parse()
            .unwrap();
    assert_eq!(
        (parsed.size, parsed.direction),
        (Some(1 << 20), Directions::Tx)
    );
}
