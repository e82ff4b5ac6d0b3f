//! The syscalls of a serving network daemon beside those of every daemon.

use vhost_daemon::sandbox::Syscalls;

use crate::netdevs::tap;

/// What back-ends, capture and metrics make.
pub(super) const SYSCALLS: Syscalls = Syscalls {
    plain: &[
        // Frames of a tap and of stream sockets.
        libc::SYS_readv,
        libc::SYS_writev,
        // Frames of packet and datagram sockets, in bursts.
        libc::SYS_sendmsg,
        libc::SYS_recvmsg,
        libc::SYS_sendmmsg,
        libc::SYS_recvmmsg,
        libc::SYS_recvfrom,
        // Waiting frames and errors of sockets that are handed over while the daemon serves.
        libc::SYS_getsockopt,
        libc::SYS_setsockopt,
        libc::SYS_getsockname,
        libc::SYS_getpeername,
        // The process that keeps passt is waited for when its back-end goes.
        libc::SYS_wait4,
        libc::SYS_waitid,
    ],
    ioctls: &IOCTLS,
};

/// Those of a queue that serves, and those that set up a descriptor of a tap that is handed over by then.
const IOCTLS: [u64; 6] = [
    tap::SERVING_IOCTLS[0],
    tap::SERVING_IOCTLS[1],
    libc::TUNGETIFF,
    libc::TUNSETVNETHDRSZ,
    libc::TUNSETVNETLE,
    libc::TUNSETSNDBUF,
];
