//! What a peer got wrong, and the error numbers of the wire.

/// The peer sent something that the protocol does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A magic number is not what it must be: the peer does not speak NBD, or the stream lost its step.
    #[error("bad magic {found:#x} in {what}")]
    BadMagic {
        /// The message.
        what: &'static str,
        /// What was there.
        found: u64,
    },
    /// A message ended before its last field.
    #[error("{what} is too short")]
    Short {
        /// The message.
        what: &'static str,
    },
    /// A message goes on behind its last field.
    #[error("{what} is longer than its fields")]
    Long {
        /// The message.
        what: &'static str,
    },
    /// A string is longer than the protocol allows.
    #[error("{what} holds a string of more than 4096 bytes")]
    LongString {
        /// The message.
        what: &'static str,
    },
    /// A string is not UTF-8, or has a NUL.
    #[error("{what} holds a string that is no text")]
    BadString {
        /// The message.
        what: &'static str,
    },
    /// A message announces more than its receiver takes.
    #[error("{what} of {length} bytes is too large")]
    TooLarge {
        /// The message.
        what: &'static str,
        /// The length that it announces.
        length: u64,
    },
    /// A field has a value that the protocol does not allow there.
    #[error("{what} has the invalid value {value:#x}")]
    BadValue {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
}

/// An error number as the wire has it. The numbers are those of Linux, but only these exist; zero is success and not here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of errno(3)")]
#[repr(u32)]
pub enum WireErrno {
    Eperm = 1,
    Eio = 5,
    Enomem = 12,
    Einval = 22,
    Enospc = 28,
    Eoverflow = 75,
    Enotsup = 95,
    Eshutdown = 108,
}

impl WireErrno {
    const ALL: [Self; 8] = [
        Self::Eperm,
        Self::Eio,
        Self::Enomem,
        Self::Einval,
        Self::Enospc,
        Self::Eoverflow,
        Self::Enotsup,
        Self::Eshutdown,
    ];

    /// The error of a Linux errno. `EDQUOT`, `EFBIG` are `ENOSPC`; `EROFS` is `EPERM`; what the wire has no number for is `EINVAL`,
    /// as in QEMU, except that errors of a device (`ENXIO`, `ENODEV`, `EREMOTEIO`, `EILSEQ`, `ETIMEDOUT`) are `EIO`.
    pub fn from_errno(errno: i32) -> Self {
        const EROFS: i32 = 30;
        const EFBIG: i32 = 27;
        const EDQUOT: i32 = 122;
        match errno {
            EROFS => Self::Eperm,
            EFBIG | EDQUOT => Self::Enospc,
            6 | 19 | 84 | 110 | 121 => Self::Eio,
            _ => Self::ALL
                .into_iter()
                .find(|known| *known as i32 == errno)
                .unwrap_or(Self::Einval),
        }
    }

    /// The Linux errno.
    pub fn to_errno(self) -> i32 {
        self as i32
    }

    /// Decodes the error field of a reply; `None` is success. An error that the wire does not define is `EINVAL`.
    pub fn decode(value: u32) -> Option<Self> {
        if value == 0 {
            return None;
        }
        let known = Self::ALL.into_iter().find(|known| *known as u32 == value);
        Some(known.unwrap_or(Self::Einval))
    }

    /// The error field of a reply.
    pub fn encode(error: Option<Self>) -> u32 {
        error.map_or(0, |error| error as u32)
    }
}
