//! The network daemon as its users see it, and the driver that judges it against DPDK's back-end.
//!
//! One binary, because linking dominates build time. A scenario's name states what holds. What needs a network namespace or a
//! tap says so where this machine does not give it.

mod changes;
mod control;
mod dgram;
mod disabled;
mod dpdk;
mod driver;
mod echo;
mod groups;
mod guests;
mod hostile;
mod kill;
mod packet;
mod passt;
mod qemu;
mod start;
mod stream;
mod tap;
mod traffic;

/// What is inside, or the end of the test with the reason why it cannot run here.
macro_rules! or_skip {
    ($made:expr) => {
        match $made {
            Ok(made) => made,
            Err(reason) => {
                println!("skipped: {reason}");
                return Ok(());
            }
        }
    };
}
pub(crate) use or_skip;
