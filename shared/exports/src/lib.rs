//! Ways to offer a node to the outside: vhost-user-blk, NBD.
//!
//! An export holds a root on its node, so the graph knows who uses it; it owns its sockets and
//! threads of control. Must not know: the command line, QMP, which drivers exist.

pub mod nbd;
pub mod vhost_user_blk;

pub use vhost_user_blk::{VhostUserBlk, VhostUserBlkOptions};
