//! Placeholder root of `qmp`.
