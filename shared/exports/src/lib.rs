//! Placeholder root of `exports`.
