//! `blkdebug`: fails and stops requests at chosen points, and pretends to have other limits.
//!
//! Options: `image`, the child (`filename` is its name); `config`, a file of rules ([`config`]); `inject-error` and `set-state`,
//! lists of rules; `align`, `max-transfer`, `opt-write-zero`, `max-write-zero`, `opt-discard`,
//! `max-discard` in bytes; `take-child-perms` and `unshare-child-perms`, lists of permissions.
//!
//! ```text
//!   event ──► rules of that event, in the current state ──► errors armed · next state · stop here
//!   request ──► armed error for this kind and place? ──yes──► fails
//!                  │no
//!                  ▼ child
//! ```
//!
//! Owns: the rules and their state machine, and stopped requests. Promises: an error stays armed until
//! an event arms others, or it was to happen once. Must not know: what causes the events.

mod config;
mod limits;
mod options;
mod rules;
mod suspend;

use crate::filter::{Filter, FilterNode};
use block::debug::{Debugger, Event, Watcher};
use block::error::Result;
use block::naming::{Protocol, Reach};
use block::open::{ChildRole, DriverEntry};
use block::{
    BoxFuture, Buffer, ByteRange, Driver, Edge, Errno, IoFuture, Limits, OpenRequest, StatusExtent,
    WriteFlags, ZeroFlags,
};
use limits::Sizes;
use rules::{Kind, Rules, Verdict};
use std::sync::{Mutex, MutexGuard, PoisonError};
use suspend::Suspended;

/// The table line of `blkdebug`.
pub const ENTRY: DriverEntry = DriverEntry::new("blkdebug", |request| Box::pin(open(request)))
    .with_protocol(Protocol {
        prefixes: &["blkdebug"],
        parse: options::parse_filename,
        // The file of rules is the user's alone.
        reach: Reach::Nothing,
    })
    .with_strong_options(&["config", "inject-error.", "set-state."]);

/// The filter.
struct BlkDebug {
    image: Edge,
    rules: Mutex<Rules>,
    suspended: Suspended,
    sizes: Sizes,
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>> {
    let mut rules = Rules::default();
    options::take_rules(request, &mut rules)?;
    options::take_filename(request)?;
    let beyond = options::take_permissions(request)?;
    let image = request
        .required_child_beyond("image", ChildRole::Filtered, beyond)
        .await?;
    let sizes = Sizes::take(request)?;
    let filter = BlkDebug {
        image,
        rules: Mutex::new(rules),
        suspended: Suspended::default(),
        sizes,
    };
    filter.event(Event::None).await;
    Ok(Box::new(FilterNode(filter)))
}

impl BlkDebug {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The error that a request meets, now or after a while.
    fn fate(&self, kind: Kind, range: ByteRange) -> Option<IoFuture<'static>> {
        match self.rules().check(kind, range) {
            Verdict::Pass => None,
            Verdict::FailNow(errno) => Some(IoFuture::error(errno)),
            Verdict::FailLater(errno) => Some(IoFuture::boxed(async move {
                executor::time::yield_now().await;
                Err(errno)
            })),
        }
    }
}

/// Where the requests of nothing are.
const NOWHERE: ByteRange = ByteRange::new(0, 0);

impl Filter for BlkDebug {
    fn name(&self) -> &'static str {
        "blkdebug"
    }
    fn edge(&self) -> &Edge {
        &self.image
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        vec![("image", &self.image)]
    }
    fn limits(&self) -> Limits {
        self.sizes.limits(self.child().driver().limits())
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        match self.fate(Kind::Read, range) {
            Some(error) => error,
            None => self.child().read(offset, buffer),
        }
    }
    fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        match self.fate(Kind::Write, range) {
            Some(error) => error,
            None => self.child().write(offset, buffer, flags),
        }
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        IoFuture::boxed(async move {
            for part in self.sizes.zero_parts(range) {
                if !part.aligned {
                    if flags.no_fallback {
                        return Err(Errno::EOPNOTSUPP);
                    }
                    let zeroes = Buffer::zeroed(part.range.length as usize);
                    self.write(part.range.offset, zeroes, WriteFlags::default())
                        .await?;
                    continue;
                }
                if let Some(error) = self.fate(Kind::WriteZeroes, part.range) {
                    error.await?;
                }
                self.child().write_zeroes(part.range, flags).await?;
            }
            Ok(())
        })
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        IoFuture::boxed(async move {
            for part in self.sizes.discard_parts(range) {
                if let Some(error) = self.fate(Kind::Discard, part.range) {
                    error.await?;
                }
                self.child().discard(part.range).await?;
            }
            Ok(())
        })
    }
    fn flush(&self) -> IoFuture<'_> {
        match self.fate(Kind::Flush, NOWHERE) {
            Some(error) => error,
            None => self.child().flush(),
        }
    }
    fn block_status(
        &self,
        range: ByteRange,
    ) -> BoxFuture<'_, std::result::Result<StatusExtent, Errno>> {
        Box::pin(async move {
            if let Some(error) = self.fate(Kind::BlockStatus, range) {
                error.await?;
            }
            self.child().block_status(range).await
        })
    }
    fn debugger(&self) -> Option<&dyn Debugger> {
        Some(self)
    }
}

impl Debugger for BlkDebug {
    fn event(&self, event: Event) -> BoxFuture<'_, ()> {
        let stops = self.rules().happen(event);
        Box::pin(async move {
            for tag in stops {
                self.suspended.stop(tag).await;
            }
        })
    }
    fn set_breakpoint(&self, event: Event, tag: &str) {
        self.rules().add_stop(event, tag);
    }
    fn remove_breakpoint(&self, tag: &str) -> std::result::Result<(), Errno> {
        let removed = self.rules().remove_stops(tag);
        let released = self.suspended.resume_all(tag);
        match removed || released {
            true => Ok(()),
            false => Err(Errno::ENOENT),
        }
    }
    fn resume(&self, tag: &str) -> std::result::Result<(), Errno> {
        match self.suspended.resume(tag) {
            true => Ok(()),
            false => Err(Errno::ENOENT),
        }
    }
    fn until_suspended<'a>(&'a self, tag: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(self.suspended.until(tag))
    }
    fn watch(&self, watcher: Watcher) {
        self.suspended.watch(watcher);
    }
}
