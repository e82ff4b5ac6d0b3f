//! Placeholder root of `protocols`.
