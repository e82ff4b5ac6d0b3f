//! Error numbers of the host, and its words for them.

pub use nix::errno::Errno;

/// What the host calls an error number ("Input/output error"): `strerror`, the same for every message.
pub fn reason(errno: Errno) -> String {
    let text = std::io::Error::from_raw_os_error(errno as i32).to_string();
    match text.rsplit_once(" (os error") {
        Some((words, _)) => words.to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_the_hosts_words_alone() {
        assert_eq!(reason(Errno::EIO), "Input/output error");
        assert_eq!(reason(Errno::EOPNOTSUPP), "Operation not supported");
        assert_eq!(reason(Errno::ENOSPC), "No space left on device");
    }
}
