//! One virtqueue of a virtio-blk device, for use by one thread.
//!
//! Builds requests in guest memory and checks what comes back: the status byte is preset to 0xff,
//! read buffers to a pattern, the unused bytes between segments to another; the used length must be
//! exact; the memory of a completed request is filled with a third pattern, and must still have it when
//! the next request takes it; every wait is bounded. A queue knows nothing of the connection: while a dead back-end is
//! replaced the owner keeps submitting and waiting, as a guest does.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::either_ring::Ring;
use super::memory::Area;
use super::pool::{DataPool, Lease};
use super::request::{Completion, LANES, Layout, Operation, Request, STATUS_OK};
use super::ring::Buffer;

const STATUS_PRESET: u8 = 0xff;
const READ_POISON: u8 = 0xdb;
const GUARD: u8 = 0xc7;
/// Memory that belongs to no request.
const IDLE: u8 = 0x1e;
const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;
/// Ranges that fit into one discard or write-zeroes request.
pub const MAX_RANGES: usize = 32;
const STATUS_AT: usize = HEADER_BYTES + MAX_RANGES * RANGE_BYTES;
/// Bytes of control memory per slot, besides the indirect table.
pub(crate) const SLOT_BYTES: usize = STATUS_AT + 16;

/// How completions are awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Busy polling with interrupts suppressed.
    Poll,
    /// Sleeping on the call eventfd.
    Interrupt,
}

/// Memory and behaviour of one queue.
#[derive(Debug)]
pub(crate) struct QueueParts {
    pub(crate) index: usize,
    pub(crate) ring: Ring,
    pub(crate) kick: Arc<EventFd>,
    pub(crate) call: Arc<EventFd>,
    pub(crate) slots: Vec<SlotMemory>,
    pub(crate) pool: Arc<DataPool>,
    pub(crate) lane_bytes: usize,
    pub(crate) indirect: bool,
    pub(crate) wait: Wait,
    pub(crate) timeout: Duration,
}

/// Control memory of one request.
#[derive(Debug)]
pub(crate) struct SlotMemory {
    pub(crate) control: Area,
    pub(crate) table: Area,
}

#[derive(Debug)]
struct Outstanding {
    slot: usize,
    token: u64,
    request: Request,
    lanes: Vec<(Area, Lease)>,
    submitted: Instant,
}

/// The first bytes of an area that no request uses.
#[derive(Debug)]
struct IdleArea {
    area: Area,
    bytes: usize,
}

/// One virtqueue.
#[derive(Debug)]
pub struct Queue {
    parts: QueueParts,
    /// The one idle for longest is next: time for the device to write where it must not.
    free_slots: VecDeque<usize>,
    /// By slot: memory of its last request, idle since.
    idle: Vec<Vec<IdleArea>>,
    outstanding: HashMap<u16, Outstanding>,
    last_progress: Instant,
}

impl Queue {
    pub(crate) fn new(parts: QueueParts) -> Self {
        let free_slots = (0..parts.slots.len()).collect();
        let idle = parts.slots.iter().map(|_| Vec::new()).collect();
        if parts.wait == Wait::Poll {
            parts.ring.suppress_interrupts();
        }
        Self {
            parts,
            free_slots,
            idle,
            outstanding: HashMap::new(),
            last_progress: Instant::now(),
        }
    }

    /// Index of the virtqueue.
    pub fn index(&self) -> usize {
        self.parts.index
    }

    /// Requests that are not back yet.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// True when one more request of `segments` data segments fits now.
    pub fn has_room(&self, segments: usize) -> bool {
        let descriptors = if self.parts.indirect { 1 } else { segments + 2 };
        !self.free_slots.is_empty() && self.parts.ring.has_room(descriptors)
    }

    /// Queues a request that [`Queue::kick`] will show to the device; `token` comes back with its
    /// completion, `data` is what a write writes.
    ///
    /// # Errors
    /// When there is no room, or the request does not fit the queue's memory.
    pub fn submit(&mut self, request: Request, data: &[u8], token: u64) -> Result<()> {
        ensure!(
            self.has_room(request.layout.segments.len()),
            "queue is full"
        );
        ensure!(request.more_ranges.len() < MAX_RANGES, "too many ranges");
        let slot = self.free_slots.pop_front().context("a slot is free")?;
        self.check_idle(slot)?;
        let lanes = self.lease_lanes(slot, &request.layout)?;
        fill_lanes(&lanes, &request, data)?;
        let buffers = self.build_chain(slot, &request, &lanes);
        let table = self.parts.indirect.then_some(&self.parts.slots[slot].table);
        let head = self.parts.ring.push(&buffers, table)?;
        if self.outstanding.is_empty() {
            self.last_progress = Instant::now();
        }
        let submitted = Instant::now();
        self.outstanding.insert(
            head,
            Outstanding {
                slot,
                token,
                request,
                lanes,
                submitted,
            },
        );
        Ok(())
    }

    /// Shows queued requests to the device and kicks it when it asks for that.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    pub fn kick(&mut self) -> Result<()> {
        if self.parts.ring.publish() {
            self.parts.kick.write(1).context("kick")?;
        }
        Ok(())
    }

    /// A completion that is there already.
    ///
    /// # Errors
    /// When the device broke the protocol.
    pub fn try_completion(&mut self) -> Result<Option<Completion>> {
        let popped = self
            .parts
            .ring
            .pop()
            .with_context(|| format!("queue {}", self.index()))?;
        let Some((head, written)) = popped else {
            return Ok(None);
        };
        let done = self
            .outstanding
            .remove(&head)
            .context("completion of an unknown request")?;
        self.last_progress = Instant::now();
        let (slot, status) = (done.slot, self.status_of(done.slot));
        let (completion, idle) =
            finish(done, status, written).with_context(|| format!("queue {}", self.index()))?;
        self.idle[slot] = idle;
        self.free_slots.push_back(slot);
        Ok(Some(completion))
    }

    /// The next completion.
    ///
    /// # Errors
    /// When the device broke the protocol or gives no sign of life within the queue's timeout.
    pub fn completion(&mut self) -> Result<Completion> {
        self.kick()?;
        loop {
            if let Some(done) = self.try_completion()? {
                return Ok(done);
            }
            ensure!(
                !self.outstanding.is_empty(),
                "waiting on queue {} with nothing outstanding",
                self.index()
            );
            let silent = self.last_progress.elapsed();
            if silent > self.parts.timeout {
                bail!(
                    "queue {}: no completion for {silent:?}, outstanding: {:?}",
                    self.index(),
                    self.outstanding
                        .values()
                        .map(|o| (o.request.operation, o.request.range))
                        .collect::<Vec<_>>()
                );
            }
            self.wait(self.parts.timeout - silent)?;
        }
    }

    /// Submits one request and waits for it; other completions must not be outstanding.
    ///
    /// # Errors
    /// As [`Queue::submit`] and [`Queue::completion`].
    pub fn run(&mut self, request: Request, data: &[u8]) -> Result<Completion> {
        ensure!(
            self.outstanding.is_empty(),
            "run() on a queue with outstanding requests"
        );
        self.submit(request, data, 0)?;
        self.completion()
    }

    /// Forgets everything outstanding and zeroes the ring: the driver's part of a device reset. Only
    /// when the back-end has stopped the ring.
    pub fn reset(&mut self) {
        self.outstanding.clear();
        self.free_slots = (0..self.parts.slots.len()).collect();
        self.idle.iter_mut().for_each(Vec::clear);
        self.parts.ring.reset();
        if self.parts.wait == Wait::Poll {
            self.parts.ring.suppress_interrupts();
        }
    }

    fn wait(&mut self, limit: Duration) -> Result<()> {
        if self.parts.wait == Wait::Poll {
            std::thread::yield_now();
            return Ok(());
        }
        if !self.parts.ring.want_interrupt() {
            let mut fds = [PollFd::new(self.parts.call.as_fd(), PollFlags::POLLIN)];
            let limit = PollTimeout::try_from(limit.min(Duration::from_secs(30)))?;
            match poll(&mut fds, limit) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => drop(self.parts.call.read().context("call eventfd")?),
                Err(error) => return Err(error).context("poll of the call eventfd"),
            }
        }
        Ok(())
    }

    /// Nobody may have written to what slot `slot` used last since it completed.
    fn check_idle(&mut self, slot: usize) -> Result<()> {
        for IdleArea { area, bytes } in self.idle[slot].drain(..) {
            let mut image = vec![0; bytes];
            area.read(0, &mut image);
            if let Some(at) = image.iter().position(|&byte| byte != IDLE) {
                let gpa = area.gpa(at);
                bail!("guest memory at {gpa:#x} was written after its request had completed");
            }
        }
        Ok(())
    }

    fn lease_lanes(&self, slot: usize, layout: &Layout) -> Result<Vec<(Area, Lease)>> {
        if layout.segments.is_empty() {
            return Ok(Vec::new());
        }
        let bytes = self.parts.lane_bytes;
        let slots = self.parts.slots.len();
        (0..LANES)
            .map(|lane| {
                ensure!(
                    layout.lane_end(lane) <= bytes,
                    "layout needs more than {bytes} bytes"
                );
                let lease = self.parts.pool.lease(slot + lane);
                let offset = ((self.parts.index * slots + slot) * LANES + lane) * bytes;
                Ok((
                    Area {
                        region: lease.region().clone(),
                        offset,
                        bytes,
                    },
                    lease,
                ))
            })
            .collect()
    }

    fn build_chain(&self, slot: usize, request: &Request, lanes: &[(Area, Lease)]) -> Vec<Buffer> {
        let control = &self.parts.slots[slot].control;
        let ranged = ranges_of(request);
        let sector = if ranged.is_empty() {
            request.range.first
        } else {
            0
        };
        let mut header = [0; HEADER_BYTES];
        header[0..4].copy_from_slice(&request.operation.wire_type().to_le_bytes());
        header[8..16].copy_from_slice(&sector.to_le_bytes());
        control.write(0, &header);
        control.write(HEADER_BYTES, &ranged);
        control.write(STATUS_AT, &[STATUS_PRESET]);
        let mut chain = vec![Buffer {
            gpa: control.gpa(0),
            bytes: HEADER_BYTES as u32,
            writable: false,
        }];
        if !ranged.is_empty() {
            let gpa = control.gpa(HEADER_BYTES);
            chain.push(Buffer {
                gpa,
                bytes: ranged.len() as u32,
                writable: false,
            });
        }
        let writable = request.operation.device_writes_data();
        chain.extend(request.layout.segments.iter().map(|segment| Buffer {
            gpa: lanes[segment.lane].0.gpa(segment.offset),
            bytes: segment.bytes as u32,
            writable,
        }));
        chain.push(Buffer {
            gpa: control.gpa(STATUS_AT),
            bytes: 1,
            writable: true,
        });
        chain
    }

    fn status_of(&self, slot: usize) -> u8 {
        let mut status = [0];
        self.parts.slots[slot].control.read(STATUS_AT, &mut status);
        status[0]
    }
}

/// Encoded `virtio_blk_discard_write_zeroes` entries; empty for other requests.
fn ranges_of(request: &Request) -> Vec<u8> {
    let flags = match request.operation {
        Operation::WriteZeroesUnmap => 1u32,
        Operation::WriteZeroes | Operation::Discard => 0,
        _ => return Vec::new(),
    };
    let mut bytes = Vec::new();
    for range in [request.range].iter().chain(&request.more_ranges) {
        bytes.extend_from_slice(&range.first.to_le_bytes());
        bytes.extend_from_slice(&(range.count as u32).to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
    }
    bytes
}

fn fill_lanes(lanes: &[(Area, Lease)], request: &Request, data: &[u8]) -> Result<()> {
    let layout = &request.layout;
    for (lane, (area, _)) in lanes.iter().enumerate() {
        area.write(0, &vec![GUARD; layout.lane_end(lane)]);
    }
    let write = request.operation == Operation::Write;
    ensure!(
        !write || data.len() == layout.bytes(),
        "data and layout differ in size"
    );
    let mut at = 0;
    for segment in &layout.segments {
        let area = &lanes[segment.lane].0;
        if write {
            area.write(segment.offset, &data[at..at + segment.bytes]);
        } else {
            area.write(segment.offset, &vec![READ_POISON; segment.bytes]);
        }
        at += segment.bytes;
    }
    Ok(())
}

/// Judges a completion; its lanes are idle from then on.
fn finish(done: Outstanding, status: u8, written: u32) -> Result<(Completion, Vec<IdleArea>)> {
    let Outstanding {
        token,
        request,
        lanes,
        submitted,
        ..
    } = done;
    let what = format!("{:?} of {:?}", request.operation, request.range);
    ensure!(
        status != STATUS_PRESET,
        "{what}: completed without a status"
    );
    let writes = request.operation.device_writes_data();
    let full = if writes {
        request.layout.bytes() as u32 + 1
    } else {
        1
    };
    ensure!(
        written == full || (status != STATUS_OK && (1..=full).contains(&written)),
        "{what}: status {status}, used length {written} instead of {full}"
    );
    let images: Vec<Vec<u8>> = lanes
        .iter()
        .enumerate()
        .map(|(lane, (area, _))| {
            let mut image = vec![0; request.layout.lane_end(lane)];
            area.read(0, &mut image);
            image
        })
        .collect();
    check_guards(&images, &request.layout).context(what)?;
    let mut data = Vec::new();
    if writes {
        data.reserve(request.layout.bytes());
        for segment in &request.layout.segments {
            data.extend_from_slice(
                &images[segment.lane][segment.offset..segment.offset + segment.bytes],
            );
        }
    }
    let completion = Completion {
        token,
        operation: request.operation,
        range: request.range,
        status,
        data,
        submitted,
    };
    Ok((completion, lay_idle(lanes, &images)))
}

/// Fills the lanes of a completed request, whose content was `images`.
fn lay_idle(lanes: Vec<(Area, Lease)>, images: &[Vec<u8>]) -> Vec<IdleArea> {
    let lanes = lanes.into_iter().zip(images);
    let idle = lanes.map(|((area, _lease), image)| {
        area.write(0, &vec![IDLE; image.len()]);
        IdleArea {
            area,
            bytes: image.len(),
        }
    });
    idle.collect()
}

fn check_guards(images: &[Vec<u8>], layout: &Layout) -> Result<()> {
    let mut cursor = [0usize; LANES];
    for segment in &layout.segments {
        let gap = &images[segment.lane][cursor[segment.lane]..segment.offset];
        ensure!(
            gap.iter().all(|&byte| byte == GUARD),
            "bytes before the segment at {} of lane {} were overwritten",
            segment.offset,
            segment.lane
        );
        cursor[segment.lane] = segment.offset + segment.bytes;
    }
    Ok(())
}
