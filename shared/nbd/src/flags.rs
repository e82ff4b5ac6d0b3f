//! The flags of exports and of commands.

macro_rules! flag_set {
    ($(#[$doc:meta])* $name:ident { $($(#[$flag_doc:meta])* $flag:ident = $bit:literal;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct $name(u16);

        impl $name {
            $($(#[$flag_doc])* pub const $flag: Self = Self(1 << $bit);)*

            /// No flag.
            pub const fn empty() -> Self {
                Self(0)
            }

            /// The flags of a wire value, known or not.
            pub const fn from_bits(bits: u16) -> Self {
                Self(bits)
            }

            /// The wire value.
            pub const fn bits(self) -> u16 {
                self.0
            }

            /// Whether all of `flags` are set.
            pub const fn contains(self, flags: Self) -> bool {
                self.0 & flags.0 == flags.0
            }

            /// These and `flags`.
            #[must_use]
            pub const fn with(self, flags: Self) -> Self {
                Self(self.0 | flags.0)
            }

            /// These without `flags`.
            #[must_use]
            pub const fn without(self, flags: Self) -> Self {
                Self(self.0 & !flags.0)
            }

            /// Whether there is no flag.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }
        }
    };
}

flag_set! {
    /// What an export can do ("transmission flags").
    ExportFlags {
        /// Always set.
        HAS_FLAGS = 0;
        /// Writes fail.
        READ_ONLY = 1;
        /// `FLUSH` works.
        SEND_FLUSH = 2;
        /// [`CommandFlags::FUA`] works.
        SEND_FUA = 3;
        /// A disk that turns.
        ROTATIONAL = 4;
        /// `TRIM` works.
        SEND_TRIM = 5;
        /// `WRITE_ZEROES` and [`CommandFlags::NO_HOLE`] work.
        SEND_WRITE_ZEROES = 6;
        /// [`CommandFlags::DF`] works.
        SEND_DF = 7;
        /// What is flushed on one connection is flushed for all.
        CAN_MULTI_CONN = 8;
        /// An experimental extension.
        SEND_RESIZE = 9;
        /// `CACHE` works.
        SEND_CACHE = 10;
        /// [`CommandFlags::FAST_ZERO`] works.
        SEND_FAST_ZERO = 11;
        /// [`CommandFlags::PAYLOAD_LEN`] works with `BLOCK_STATUS`.
        BLOCK_STATUS_PAYLOAD = 12;
    }
}

flag_set! {
    /// What a request asks for besides its command.
    CommandFlags {
        /// The data is on stable storage before the reply.
        FUA = 0;
        /// Zeroes are written so that the space stays allocated.
        NO_HOLE = 1;
        /// The answer to a read is one chunk.
        DF = 2;
        /// One extent for each context is enough.
        REQ_ONE = 3;
        /// Zeroes are written only if that is faster than a plain write.
        FAST_ZERO = 4;
        /// The length is that of a payload behind the header.
        PAYLOAD_LEN = 5;
    }
}
