//! Placeholder root of `block`.
