//! Placeholder root of `harness`.
