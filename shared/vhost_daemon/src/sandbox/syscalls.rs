//! The syscalls that a serving daemon makes, each with why.
//!
//! Two filters: the first makes `clone3` look absent, because its flags are in memory that a
//! filter cannot read, so that libc falls back to `clone`; the second allows what is listed. The
//! kernel takes the strictest answer of both.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::{Error, Mode, Policy};

/// Allowed whatever the arguments.
const PLAIN: &[libc::c_long] = &[
    // The ring; a thread added later makes its own.
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_register,
    // Files: transfers that the page cache answers, sizes, locks, seals. The rest is the ring's.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_statx,
    libc::SYS_fcntl,
    libc::SYS_close,
    // Paths, as far as Landlock lets them through.
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_getdents64,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(not(target_arch = "x86_64"))]
    libc::SYS_unlinkat,
    // Sockets, of the unix family. Accepting, connecting and transfers are the ring's; the service
    // manager hears by sendto, and binding tries whether a stale socket still has a listener.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_connect,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    // Whether the process that a socket's listener belonged to has ended.
    libc::SYS_pidfd_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(not(target_arch = "x86_64"))]
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_memfd_create,
    // Memory and threads.
    libc::SYS_munmap,
    libc::SYS_madvise,
    // Which pages of a mapped disk image are there.
    libc::SYS_mincore,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_membarrier,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    // A new thread asks who it is, and for its attributes.
    libc::SYS_gettid,
    libc::SYS_sched_getaffinity,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_getrandom,
    // Only where the vDSO has no clock source that user space can read.
    libc::SYS_clock_gettime,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// ioctls on block devices and descriptors.
const IOCTLS: &[u64] = &[
    libc::FIONBIO,
    // BLKDISCARD, BLKZEROOUT, BLKGETSIZE64, BLKSSZGET, BLKPBSZGET
    0x1277,
    0x127f,
    0x8008_1272,
    0x1268,
    0x127b,
];

/// The programs to load, in order.
pub(super) fn filters(mode: Mode, policy: &Policy) -> Result<Vec<BpfProgram>, Error> {
    let refusal = match mode {
        Mode::Strict => SeccompAction::KillProcess,
        Mode::On | Mode::Off => SeccompAction::Errno(libc::EPERM as u32),
    };
    let hide_clone3 = program(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    let allow_list = program(rules(policy)?, refusal, SeccompAction::Allow)?;
    Ok(vec![hide_clone3, allow_list])
}

fn program(
    rules: BTreeMap<libc::c_long, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, Error> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(rules, otherwise, matched, arch)?;
    Ok(BpfProgram::try_from(filter)?)
}

/// Every allowed syscall with its conditions; an empty list allows all arguments.
fn rules(policy: &Policy) -> Result<BTreeMap<libc::c_long, Vec<SeccompRule>>, Error> {
    let mut rules: BTreeMap<_, _> = PLAIN
        .iter()
        .chain(policy.syscalls.plain)
        .map(|number| (*number, Vec::new()))
        .collect();
    rules.insert(libc::SYS_clone3, Vec::new());
    // A thread, never a process.
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![masked(0, thread, thread)?]);
    // Times of an open descriptor, without a path.
    let pathless = SeccompCondition::new(1, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    rules.insert(libc::SYS_utimensat, vec![SeccompRule::new(vec![pathless])?]);
    let exec = libc::PROT_EXEC as u64;
    rules.insert(libc::SYS_mmap, vec![masked(2, exec, 0)?]);
    rules.insert(libc::SYS_mprotect, vec![masked(2, exec, 0)?]);
    rules.insert(libc::SYS_socket, sockets(!policy.tcp_peers.is_empty())?);
    rules.insert(libc::SYS_prctl, vec![equal(0, libc::PR_SET_NAME as u64)?]);
    // The handler for truncated guest memory, and the default action of a fault that is none:
    // without it a crash would repeat for ever.
    let faults = [libc::SIGBUS, libc::SIGSEGV].map(|signal| equal(0, signal as u64));
    let faults: Result<_, Error> = faults.into_iter().collect();
    rules.insert(libc::SYS_rt_sigaction, faults?);
    let ioctls: Result<_, Error> = IOCTLS
        .iter()
        .chain(policy.syscalls.ioctls)
        .map(|request| equal(1, *request))
        .collect();
    rules.insert(libc::SYS_ioctl, ioctls?);
    Ok(rules)
}

/// Sockets of the unix family, and `tcp`'s if wanted.
fn sockets(tcp: bool) -> Result<Vec<SeccompRule>, Error> {
    let mut rules = vec![equal(0, libc::AF_UNIX as u64)?];
    if tcp {
        // The type's other bits are flags.
        let kind = SeccompCmpOp::MaskedEq(0xf);
        for family in [libc::AF_INET, libc::AF_INET6] {
            rules.push(SeccompRule::new(vec![
                condition(0, SeccompCmpOp::Eq, family as u64)?,
                condition(1, kind.clone(), libc::SOCK_STREAM as u64)?,
            ])?);
        }
    }
    Ok(rules)
}

fn equal(argument: u8, value: u64) -> Result<SeccompRule, Error> {
    rule(argument, SeccompCmpOp::Eq, value)
}

/// The bits of `mask` in an argument are those of `value`.
fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, Error> {
    rule(argument, SeccompCmpOp::MaskedEq(mask), value)
}

fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, Error> {
    Ok(SeccompRule::new(vec![condition(
        argument, operator, value,
    )?])?)
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition, Error> {
    let width = SeccompCmpArgLen::Dword;
    Ok(SeccompCondition::new(argument, width, operator, value)?)
}

/// Number of syscalls that get through, with whatever arguments.
#[cfg(test)]
pub(super) fn count() -> usize {
    let rules = rules(&Policy::default()).expect("the rules are constant");
    rules
        .keys()
        .filter(|number| **number != libc::SYS_clone3)
        .count()
}
