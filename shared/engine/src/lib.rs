//! Placeholder root of `engine`.
