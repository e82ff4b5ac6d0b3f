//! Who wins.

use crate::together::first_difference;
use block::{Buffer, ByteRange, Errno};

/// The most common of several errors, the first of equals; `None` of none.
pub(super) fn most_common(errors: &[Errno]) -> Option<Errno> {
    let count = |errno: &Errno| errors.iter().filter(|other| *other == errno).count();
    let mut best: Option<(usize, Errno)> = None;
    for errno in errors {
        let votes = count(errno);
        if best.is_none_or(|(most, _)| votes > most) {
            best = Some((votes, *errno));
        }
    }
    best.map(|(_, errno)| errno)
}

/// Which of the `voters`, indices of `copies`, are the most that hold the same; the first of equals.
pub(super) fn largest_camp(voters: &[usize], copies: &[Buffer]) -> Vec<usize> {
    let mut camps: Vec<Vec<usize>> = Vec::new();
    for &voter in voters {
        let same = |camp: &Vec<usize>| first_difference(&copies[camp[0]], &copies[voter]).is_none();
        match camps.iter().position(same) {
            Some(camp) => camps[camp].push(voter),
            None => camps.push(vec![voter]),
        }
    }
    let mut largest = Vec::new();
    for camp in camps {
        if camp.len() > largest.len() {
            largest = camp;
        }
    }
    largest
}

/// Ends the process when two copies differ.
pub(super) fn insist_equal(copies: &[Buffer], range: ByteRange) {
    if let Some(message) = mismatch(copies, range) {
        eprintln!("{message}");
        std::process::exit(1);
    }
}

fn mismatch(copies: &[Buffer], ByteRange { offset, length }: ByteRange) -> Option<String> {
    let different = copies
        .windows(2)
        .find_map(|pair| first_difference(&pair[0], &pair[1]))?;
    let at = offset + different as u64;
    Some(format!(
        "quorum: offset={offset} bytes={length} contents mismatch at offset {at}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::together::private;

    fn copies(bytes: &[u8]) -> Vec<Buffer> {
        let copy = |byte: &u8| {
            let copy = private(16);
            copy.slice(9..16).fill(*byte);
            copy
        };
        bytes.iter().map(copy).collect()
    }

    #[test]
    fn the_largest_camp_wins_and_of_equals_the_first() {
        assert_eq!(largest_camp(&[0, 1, 2], &copies(&[1, 2, 2])), [1, 2]);
        assert_eq!(largest_camp(&[0, 2], &copies(&[1, 2, 2])), [0]);
        assert_eq!(largest_camp(&[0, 1, 2, 3], &copies(&[5, 6, 6, 5])), [0, 3]);
        assert!(largest_camp(&[], &copies(&[])).is_empty());
    }

    #[test]
    fn the_most_common_error_is_told() {
        let errors = [Errno::EIO, Errno::ENOSPC, Errno::ENOSPC];
        assert_eq!(most_common(&errors), Some(Errno::ENOSPC));
        assert_eq!(most_common(&errors[..2]), Some(Errno::EIO));
        assert_eq!(most_common(&[]), None);
    }

    #[test]
    fn a_difference_is_named_as_the_peer_names_it() {
        assert_eq!(mismatch(&copies(&[1, 1]), ByteRange::new(0, 16)), None);
        assert_eq!(
            mismatch(&copies(&[1, 2]), ByteRange::new(512, 16)).unwrap(),
            "quorum: offset=512 bytes=16 contents mismatch at offset 521"
        );
    }
}
