//! What the back-end process cost, from `/proc`.

use std::fs;

/// Counters of a process and its threads.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// Time on a CPU in nanoseconds, all live threads, kernel helpers of io_uring included.
    pub(crate) cpu_ns: u64,
    /// Times a thread went to sleep.
    pub(crate) sleeps: u64,
    /// Resident memory in KiB.
    pub(crate) resident_kib: u64,
    /// What of it is the process' own, in KiB: mapped files and guest memory do not count.
    pub(crate) anonymous_kib: u64,
    /// Threads.
    pub(crate) threads: u64,
}

impl Usage {
    /// The usage of process `pid`; zeroes when there is none.
    pub(crate) fn of(pid: u32) -> Self {
        let mut usage = Self::default();
        for task in fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let on_cpu = read("schedstat")
                .split(' ')
                .next()
                .and_then(|ns| ns.parse::<u64>().ok());
            usage.cpu_ns += on_cpu.unwrap_or(0);
            usage.sleeps += field(&read("status"), "voluntary_ctxt_switches:");
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        usage.resident_kib = field(&status, "VmRSS:");
        usage.anonymous_kib = field(&status, "RssAnon:");
        usage.threads = field(&status, "Threads:");
        usage
    }
}

fn field(status: &str, name: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}
