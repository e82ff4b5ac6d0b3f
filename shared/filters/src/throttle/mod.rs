//! `throttle`: requests wait for the limits of a group.
//!
//! Options: `file`; `throttle-group`, the id of a `throttle-group` object. Reads count as reads;
//! writes, writes of zeroes and discards as writes; flushes do not count. Limits of a group are for all of
//! its nodes together.
//!
//! A drained node lets everything go ahead that waits, or the drain would take as long as the limits
//! say. Without limits a request costs one load.

mod buckets;
mod group;
mod limits;
#[cfg(test)]
mod tests;

pub use group::ThrottleGroup;
pub use limits::{Direction, NAMES, ThrottleLimits};

use crate::filter::{Filter, FilterNode};
use block::error::Result;
use block::open::{ChildRole, DriverEntry};
use block::{
    Buffer, ByteRange, Driver, Edge, Error, ErrorKind, IoFuture, OpenRequest, WriteFlags, ZeroFlags,
};
use group::Member;

/// The table line of `throttle`.
pub const ENTRY: DriverEntry = DriverEntry::new("throttle", |request| Box::pin(open(request)))
    .with_strong_options(&["throttle-group"]);

/// The filter.
struct Throttle {
    file: Edge,
    member: Member,
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>> {
    let file = request.required_child("file", ChildRole::Filtered).await?;
    let id = request
        .take_str("throttle-group")?
        .ok_or_else(|| request.missing_or("throttle-group", "Please specify a throttle group"))?;
    let group = request.object::<ThrottleGroup>(&id)?.ok_or_else(|| {
        let message = format!("Throttle group '{id}' does not exist");
        Error::new(ErrorKind::NotFound, message)
    })?;
    let member = Member::new(group);
    Ok(Box::new(FilterNode(Throttle { file, member })))
}

impl Throttle {
    fn limited<'a>(
        &'a self,
        (direction, bytes): (Direction, u64),
        request: impl FnOnce() -> IoFuture<'a> + 'a,
    ) -> IoFuture<'a> {
        if self.member.try_admit(direction, bytes) {
            return request();
        }
        IoFuture::boxed(async move {
            self.member.admit(direction, bytes).await;
            request().await
        })
    }
}

impl Filter for Throttle {
    fn name(&self) -> &'static str {
        "throttle"
    }
    fn edge(&self) -> &Edge {
        &self.file
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        let cost = (Direction::Read, buffer.len() as u64);
        self.limited(cost, move || self.child().read(offset, buffer))
    }
    fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        let cost = (Direction::Write, buffer.len() as u64);
        self.limited(cost, move || self.child().write(offset, buffer, flags))
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        let cost = (Direction::Write, range.length);
        self.limited(cost, move || self.child().write_zeroes(range, flags))
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        let cost = (Direction::Write, range.length);
        self.limited(cost, move || self.child().discard(range))
    }
    fn drain_begin(&self) {
        self.member.hurry();
    }
    fn drain_end(&self) {
        self.member.relax();
    }
}
