//! Placeholder root of `harness`.

pub mod nested;
