//! Placeholder root of `executor`.
