//! What a daemon gives up once it serves: capabilities, paths, syscalls.
//!
//! ```text
//!   Sandbox::prepare ── opens the allowed directories, compiles the filter (control thread)
//!        │ clone per thread
//!        ▼
//!   Sandbox::enter ── capabilities → no_new_privs → Landlock → seccomp   (calling thread)
//! ```
//!
//! The kernel restricts threads, not processes: every thread that exists enters, threads made
//! later inherit from the one that makes them. Files and sockets that are open stay usable; what
//! can be opened later lies beneath [`Policy`]'s directories.
//!
//! | refused | by |
//! |---|---|
//! | opening, creating, removing outside of the policy's directories | Landlock |
//! | TCP, but connecting to the policy's ports, and abstract unix sockets | Landlock |
//! | socket families other than unix, and TCP's where there are such ports | seccomp |
//! | executable memory, new processes, every syscall not in [`syscalls`] | seccomp |
//! | anything that needs a capability | empty capability sets |
//!
//! Must not know: which daemon it is in.

mod syscalls;

use std::path::PathBuf;
use std::sync::Arc;

use caps::CapSet;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, NetPort, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};
use seccompiler::BpfProgram;

/// The newest Landlock that is used, when the kernel has it.
const LANDLOCK_ABI: ABI = ABI::V6;

/// How much of a sandbox there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// None, for debugging.
    Off,
    /// As much as the kernel offers, with a warning about what it lacks. A refused syscall fails
    /// with `EPERM`.
    #[default]
    On,
    /// All of it, or the daemon does not start. A refused syscall kills the process.
    Strict,
}

/// What stays reachable by path, and by syscall beyond what every daemon needs.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Directories whose files may be opened, created and removed.
    pub file_dirs: Vec<PathBuf>,
    /// Directories whose files may be opened for reading.
    pub read_dirs: Vec<PathBuf>,
    /// Directories in which sockets may be made, and sockets and plain files removed.
    pub socket_dirs: Vec<PathBuf>,
    /// TCP ports of peers that may be connected to, at whatever address.
    pub tcp_peers: Vec<u16>,
    /// Syscalls of this daemon.
    pub syscalls: Syscalls,
}

/// Syscalls that a daemon makes beside those of every daemon ([`syscalls`]).
#[derive(Clone, Copy, Debug, Default)]
pub struct Syscalls {
    /// Numbers, allowed whatever the arguments.
    pub plain: &'static [libc::c_long],
    /// Requests of `ioctl`.
    pub ioctls: &'static [u64],
}

/// Why a sandbox cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A directory of the policy cannot be opened.
    #[error("cannot open directory '{}'", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Capabilities stay.
    #[error("cannot drop capabilities")]
    Capabilities(#[from] caps::errors::CapsError),
    /// The kernel refuses a ruleset.
    #[error("cannot restrict paths (Landlock)")]
    Landlock(#[from] landlock::RulesetError),
    /// The kernel has no Landlock, or too little of it.
    #[error("this kernel cannot restrict paths (Landlock is {0})")]
    NoLandlock(&'static str),
    /// The kernel refuses the filter.
    #[error("cannot restrict syscalls (seccomp)")]
    Seccomp(#[from] seccompiler::Error),
    /// The filter is malformed.
    #[error("cannot build the syscall filter")]
    Filter(#[from] seccompiler::BackendError),
    /// A ruleset cannot be duplicated for one more thread.
    #[error("cannot duplicate the ruleset")]
    Ruleset(#[source] std::io::Error),
}

/// A prepared sandbox. Clones are cheap; each thread enters one.
#[derive(Clone)]
pub struct Sandbox {
    mode: Mode,
    ruleset: Arc<RulesetCreated>,
    filters: Arc<[BpfProgram]>,
}

/// What a thread lost by entering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paths {
    /// All that this version knows to restrict.
    Restricted,
    /// An older kernel's part of it.
    PartlyRestricted,
    /// Nothing: the kernel has no Landlock.
    Unrestricted,
}

impl Sandbox {
    /// Prepares what `policy` asks; `None` when `mode` is [`Mode::Off`].
    ///
    /// # Errors
    /// A directory that cannot be opened; with [`Mode::Strict`] a kernel without Landlock.
    pub fn prepare(mode: Mode, policy: &Policy) -> Result<Option<Self>, Error> {
        if mode == Mode::Off {
            return Ok(None);
        }
        let filters = syscalls::filters(mode, policy)?;
        Ok(Some(Self {
            mode,
            ruleset: Arc::new(ruleset(policy)?),
            filters: filters.into(),
        }))
    }

    /// Restricts the calling thread, for good. Says what happened to paths.
    pub fn enter(&self) -> Result<Paths, Error> {
        drop_capabilities()?;
        let ruleset = self.ruleset.try_clone().map_err(Error::Ruleset)?;
        let status = ruleset.restrict_self()?;
        let paths = match status.ruleset {
            RulesetStatus::FullyEnforced => Paths::Restricted,
            RulesetStatus::PartiallyEnforced => Paths::PartlyRestricted,
            RulesetStatus::NotEnforced => Paths::Unrestricted,
        };
        if self.mode == Mode::Strict {
            match paths {
                Paths::Restricted => {}
                Paths::PartlyRestricted => return Err(Error::NoLandlock("too old")),
                Paths::Unrestricted => return Err(Error::NoLandlock("absent or disabled")),
            }
        }
        for filter in self.filters.iter() {
            seccompiler::apply_filter(filter)?;
        }
        Ok(paths)
    }
}

/// Empties every set, so that neither this thread nor a program it could become has any.
fn drop_capabilities() -> Result<(), Error> {
    for capability in caps::runtime::thread_all_supported() {
        // Shrinking the bounding set needs a capability that a plain user does not have, and
        // without any capability the set has no effect under no_new_privs.
        if caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP)? {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    for set in [
        CapSet::Ambient,
        CapSet::Effective,
        CapSet::Permitted,
        CapSet::Inheritable,
    ] {
        caps::clear(None, set)?;
    }
    Ok(())
}

fn ruleset(policy: &Policy) -> Result<RulesetCreated, Error> {
    let files = AccessFs::from_all(LANDLOCK_ABI) & !AccessFs::Execute;
    let sockets = AccessFs::MakeSock | AccessFs::RemoveFile | AccessFs::ReadDir;
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK_ABI))?
        .handle_access(AccessNet::from_all(LANDLOCK_ABI))?
        .scope(Scope::AbstractUnixSocket)?
        .create()?;
    let files = policy.file_dirs.iter().map(|path| (path, files));
    let sockets = policy.socket_dirs.iter().map(|path| (path, sockets));
    let reading = AccessFs::ReadFile | AccessFs::ReadDir;
    let reading = policy.read_dirs.iter().map(|path| (path, reading));
    for (path, access) in files.chain(reading).chain(sockets) {
        let directory = PathFd::new(path).map_err(|source| Error::Directory {
            path: path.clone(),
            source: Box::new(source),
        })?;
        ruleset = ruleset.add_rule(PathBeneath::new(directory, access))?;
    }
    for port in &policy.tcp_peers {
        ruleset = ruleset.add_rule(NetPort::new(*port, AccessNet::ConnectTcp))?;
    }
    Ok(ruleset)
}

#[cfg(test)]
mod tests;
