//! Placeholder root of `formats`.
