//! System call filters, one per kind of thread: what a thread needs after start-up, and nothing else.
//!
//! The main thread's filter is installed last and contains the other two, because a reset starts CPU threads from it. A system call
//! that is not listed kills the process. `--sandbox off` leaves all of them out.

#![expect(unsafe_code, reason = "the C library's allocator is set up")]

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// Kinds of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ThreadKind {
    /// Runs a virtual CPU.
    Cpu,
    /// Talks to one back-end.
    Device,
    /// Serves QMP and the console, resets the machine.
    Main,
}

/// Whether threads are confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sandbox {
    /// Each thread installs its filter.
    On,
    /// No filters.
    Off,
}

impl Sandbox {
    /// Prepares the process, before there are threads.
    pub(crate) fn prepare(self) {
        const ARENAS: libc::c_int = 2;
        // Left alone, glibc opens a file in /sys to count CPUs when many threads allocate, which no filter allows.
        // SAFETY: no other thread exists yet, and the call only stores a number.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
    }

    /// Confines the calling thread for good.
    ///
    /// # Panics
    /// The kernel refuses the filter: running on without it would be worse.
    pub(crate) fn enter(self, kind: ThreadKind) {
        if self == Self::Off {
            return;
        }
        if let Err(error) = install(kind) {
            panic!("--sandbox on: {error:#}");
        }
    }
}

/// Memory, locks, time, signals and the end: what Rust's runtime and allocator need in any thread.
const RUNTIME: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// KVM_RUN, interrupt routing and doorbells; serial output to a socket.
const CPU: &[i64] = &[libc::SYS_ioctl, libc::SYS_sendto];

/// Sockets and the watch on their directory.
const DEVICE: &[i64] = &[
    libc::SYS_connect,
    libc::SYS_fcntl,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_socket,
    libc::SYS_socketpair,
];

/// Clients, reloading the kernel, new CPU threads, the terminal and the end of sockets.
const MAIN: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_prctl,
    libc::SYS_recvfrom,
    libc::SYS_seccomp,
    libc::SYS_setsockopt,
    libc::SYS_statx,
    libc::SYS_unlink,
];

fn install(kind: ThreadKind) -> Result<()> {
    let filter = compile(kind)?;
    seccompiler::apply_filter(&filter).context("system call filter")
}

fn compile(kind: ThreadKind) -> Result<BpfProgram> {
    let lists: &[&[i64]] = match kind {
        ThreadKind::Cpu => &[RUNTIME, CPU],
        ThreadKind::Device => &[RUNTIME, DEVICE],
        ThreadKind::Main => &[RUNTIME, CPU, DEVICE, MAIN],
    };
    let rules: BTreeMap<i64, Vec<_>> = lists
        .iter()
        .copied()
        .flatten()
        .map(|call| (*call, Vec::new()))
        .collect();
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .context("system call filter")?;
    filter.try_into().context("system call filter")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_filter_compiles_and_the_kernel_takes_it() {
        for kind in [ThreadKind::Cpu, ThreadKind::Device, ThreadKind::Main] {
            assert!(!compile(kind).unwrap().is_empty());
        }
        std::thread::spawn(|| Sandbox::On.enter(ThreadKind::Device))
            .join()
            .unwrap();
    }
}
