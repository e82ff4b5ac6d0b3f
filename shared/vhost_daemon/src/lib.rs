//! Placeholder root of `vhost_daemon`.
