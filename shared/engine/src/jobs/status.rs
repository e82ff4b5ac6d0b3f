//! The states of a job and what users may do in each, as QEMU's job API has them.
//!
//! ```text
//!   created ──► running ◄──► paused          waiting ──► pending ──► concluded ──► null
//!                  │  └──────────────────────► ▲
//!                  └──► ready ◄──► standby     │       any of these before concluded:
//!                         └────────────────────┘       ──► aborting ──► concluded ──► null
//! ```

use qmp::{Error, Result};
use serde::Serialize;

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// Made, not begun.
    Created,
    /// Working.
    Running,
    /// Would be working.
    Paused,
    /// Caught up; waits for `job-complete`.
    Ready,
    /// Would be ready.
    Standby,
    /// Its work is done; waits for the other jobs of its group.
    Waiting,
    /// Waits for `job-finalize`.
    Pending,
    /// Failed or cancelled, and about to end.
    Aborting,
    /// Over; waits for `job-dismiss`.
    Concluded,
    /// Gone.
    Null,
}

/// What users do to jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// `job-cancel`
    Cancel,
    /// `job-pause`
    Pause,
    /// `job-resume`
    Resume,
    /// `block-job-set-speed`
    SetSpeed,
    /// `job-complete`
    Complete,
    /// `job-finalize`
    Finalize,
    /// `job-dismiss`
    Dismiss,
}

impl Status {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Whether a job may go from here to `next`.
    pub fn may_become(self, next: Self) -> bool {
        use Status::{
            Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting,
        };
        let allowed: &[Status] = match self {
            Created => &[Running, Paused, Aborting, Null],
            Running => &[Paused, Ready, Waiting, Aborting],
            Paused => &[Running],
            Ready => &[Standby, Waiting, Aborting],
            Standby => &[Ready],
            Waiting => &[Pending, Aborting],
            Pending => &[Aborting, Concluded],
            Aborting => &[Aborting, Concluded],
            Concluded => &[Null],
            Null => &[],
        };
        allowed.contains(&next)
    }

    fn allows(self, verb: Verb) -> bool {
        use Status::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        match verb {
            Verb::Cancel => matches!(
                self,
                Created | Running | Paused | Ready | Standby | Waiting | Pending
            ),
            Verb::Pause | Verb::Resume | Verb::SetSpeed => {
                matches!(self, Created | Running | Paused | Ready | Standby)
            }
            Verb::Complete => self == Ready,
            Verb::Finalize => self == Pending,
            Verb::Dismiss => self == Concluded,
        }
    }

    /// Refuses `verb` for the job `id` when it makes no sense now.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn check(self, verb: Verb, id: &str) -> Result<()> {
        if self.allows(verb) {
            return Ok(());
        }
        let (state, verb) = (self.name(), verb.name());
        Err(Error::generic(format!(
            "Job '{id}' in state '{state}' cannot accept command verb '{verb}'"
        )))
    }
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
        }
    }
}
