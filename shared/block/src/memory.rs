//! A driver in memory for the tests of this crate: with limits, delays, failures and a record of
//! its calls.

use crate::driver::{
    BlockStatus, BoxFuture, ByteRange, Driver, IoFuture, Limits, Resize, StatusExtent, WriteFlags,
    ZeroFlags,
};
use crate::edge::Edge;
use crate::redo_log::ImageIdentity;
use executor::{Buffer, Errno};
use serde_json::{Map, Value};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What the driver was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Read(u64, u64),
    Write(u64, u64),
    WriteZeroes(u64, u64),
    Discard(u64, u64),
    Flush,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    calls: Vec<Call>,
    /// Results of the next calls; success when there are none left.
    results: VecDeque<Result<(), Errno>>,
}

/// A disk in memory; clones share it.
#[derive(Clone, Default)]
pub(crate) struct Memory {
    state: Arc<Mutex<State>>,
    pub(crate) limits: Limits,
    pub(crate) grows: bool,
    /// Zeroes are written by metadata.
    pub(crate) zeroes: bool,
    /// Each call takes this long.
    pub(crate) delay: Duration,
}

impl Memory {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let memory = Self::default();
        memory.state.lock().unwrap().bytes = bytes;
        memory
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.state.lock().unwrap().bytes.clone()
    }

    /// The calls since the last time.
    pub(crate) fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.state.lock().unwrap().calls)
    }

    /// Lets a call succeed or fail, after those arranged before.
    pub(crate) fn arrange(&self, result: Result<(), Errno>) {
        self.state.lock().unwrap().results.push_back(result);
    }

    fn call(&self, call: Call, act: impl FnOnce(&mut Vec<u8>) + 'static) -> IoFuture<'_> {
        let result = {
            let mut state = self.state.lock().unwrap();
            state.calls.push(call);
            state.results.pop_front().unwrap_or(Ok(()))
        };
        let state = Arc::clone(&self.state);
        let act = move || {
            if result.is_ok() {
                act(&mut state.lock().unwrap().bytes);
            }
            result
        };
        if self.delay.is_zero() {
            return IoFuture::Ready(act());
        }
        IoFuture::boxed(async move {
            executor::time::sleep(self.delay).await;
            act()
        })
    }

    fn check(&self, offset: u64, length: u64) {
        let mask = u64::from(self.limits.request_alignment) - 1;
        assert_eq!((offset | length) & mask, 0, "unaligned: {offset} {length}");
    }
}

fn span(offset: u64, length: u64) -> std::ops::Range<usize> {
    offset as usize..(offset + length) as usize
}

fn reach(bytes: &mut Vec<u8>, end: usize) {
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
}

impl Driver for Memory {
    fn driver_name(&self) -> &'static str {
        "memory"
    }
    fn length(&self) -> u64 {
        self.state.lock().unwrap().bytes.len() as u64
    }
    fn limits(&self) -> Limits {
        self.limits
    }
    fn grows(&self) -> bool {
        self.grows
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        let length = buffer.len() as u64;
        self.check(offset, length);
        assert!(buffer.is_aligned(self.limits.memory_alignment as usize));
        self.call(Call::Read(offset, length), move |bytes| {
            let mut copy = bytes.clone();
            reach(&mut copy, (offset + length) as usize);
            buffer.copy_from_slice(&copy[span(offset, length)]);
        })
    }
    fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        assert!(!flags.fua, "the node flushes");
        let length = buffer.len() as u64;
        self.check(offset, length);
        assert!(buffer.is_aligned(self.limits.memory_alignment as usize));
        let max = self.limits.max_transfer;
        assert!(
            max == 0 || length <= u64::from(max),
            "{length} bytes at once"
        );
        self.call(Call::Write(offset, length), move |bytes| {
            reach(bytes, (offset + length) as usize);
            buffer.copy_to_slice(&mut bytes[span(offset, length)]);
        })
    }
    fn write_zeroes(&self, range: ByteRange, _flags: ZeroFlags) -> IoFuture<'_> {
        let ByteRange { offset, length } = range;
        self.check(offset, length);
        if !self.zeroes {
            return IoFuture::error(Errno::EOPNOTSUPP);
        }
        self.call(Call::WriteZeroes(offset, length), move |bytes| {
            reach(bytes, (offset + length) as usize);
            bytes[span(offset, length)].fill(0);
        })
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        self.check(range.offset, range.length);
        self.call(Call::Discard(range.offset, range.length), |_| {})
    }
    fn flush(&self) -> IoFuture<'_> {
        self.call(Call::Flush, |_| {})
    }
    fn block_status(&self, range: ByteRange) -> BoxFuture<'_, Result<StatusExtent, Errno>> {
        // Runs of zero bytes are holes.
        let (length, zero) = {
            let state = self.state.lock().unwrap();
            let bytes = &state.bytes[span(range.offset, range.length)];
            let zero = bytes[0] == 0;
            let run = bytes.iter().take_while(|byte| (**byte == 0) == zero);
            let length = run.count() as u64;
            // Random bytes may be zero, too.
            (length, zero && length >= 64)
        };
        let status = BlockStatus {
            data: !zero,
            zero,
            allocated: true,
            ..BlockStatus::default()
        };
        Box::pin(async move { Ok(StatusExtent { length, status }) })
    }
    fn resize(&self, resize: Resize) -> BoxFuture<'_, Result<(), crate::Error>> {
        let mut state = self.state.lock().unwrap();
        state.bytes.resize(resize.length as usize, 0);
        Box::pin(async { Ok(()) })
    }
    fn close(&self) -> BoxFuture<'_, Result<(), Errno>> {
        Box::pin(async { Ok(()) })
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        Vec::new()
    }
    fn describe(&self) -> Map<String, Value> {
        Map::new()
    }
    fn filename(&self) -> String {
        String::new()
    }
    fn identity(&self) -> Option<ImageIdentity> {
        None
    }
}
