//! The vhost-user wire format, back-end side: bytes in, typed [`Message`]s out.
//!
//! Owns framing, payload sizes and the number of descriptors each message carries (QEMU's
//! `docs/interop/vhost-user.rst`). A [`Message`] that parsed is well formed; whether it makes
//! sense now is the session's business. Descriptors of a refused message are closed by drop.
//!
//! Must not know: sockets, memory maps, rings.

use std::os::fd::OwnedFd;

use vhost::vhost_user::message::{
    FrontendReq, MAX_MSG_SIZE, VhostUserConfig, VhostUserHeaderFlag, VhostUserInflight,
    VhostUserLog, VhostUserMemory, VhostUserMemoryRegion, VhostUserMsgValidator,
    VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState,
};
use vm_memory::ByteValued;

/// Length of a message header in bytes: request, flags, payload size.
pub const HEADER_LEN: usize = 12;
/// Longest payload accepted, in bytes.
pub const MAX_PAYLOAD: usize = MAX_MSG_SIZE;
/// Most descriptors that one message may carry.
pub const MAX_FDS: usize = 32;
/// The only protocol version.
const VERSION: u32 = 1;
/// Ring index in the payload of the kick, call and error messages.
const VRING_INDEX_MASK: u64 = 0xff;
/// Set in those payloads when no descriptor comes along.
const VRING_NO_FD: u64 = 0x100;
/// `struct VhostUserInflight` without its trailing padding, which some front-ends leave out.
const INFLIGHT_LEN: usize = 20;

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The header's version bits.
    #[error("protocol version {0}, only {VERSION} is known")]
    Version(u32),
    /// A reply where a request belongs.
    #[error("a reply where a request was expected (request {0})")]
    UnexpectedReply(u32),
    /// The payload exceeds [`MAX_PAYLOAD`].
    #[error("payload of {size} bytes for request {request}, the limit is {MAX_PAYLOAD}")]
    TooLong {
        /// Request number.
        request: u32,
        /// Payload length in bytes.
        size: u32,
    },
    /// A request number that no text defines or that this back-end never offers.
    #[error("request {0} is not supported")]
    Unsupported(u32),
    /// A payload length that does not fit the request.
    #[error("{request:?} with a payload of {size} bytes")]
    PayloadSize {
        /// The request.
        request: FrontendReq,
        /// Payload length in bytes.
        size: usize,
    },
    /// Values in the payload that can never be right.
    #[error("{0:?} with an invalid payload")]
    Payload(FrontendReq),
    /// More or fewer descriptors than the request carries.
    #[error("{request:?} with {found} file descriptors, expected {expected}")]
    FdCount {
        /// The request.
        request: FrontendReq,
        /// Descriptors that came.
        found: usize,
        /// Descriptors that belong to it.
        expected: usize,
    },
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Request number as sent.
    pub request: u32,
    /// The front-end wants an acknowledgement (counts only once REPLY_ACK is negotiated).
    pub need_reply: bool,
    /// Payload length in bytes, at most [`MAX_PAYLOAD`].
    pub size: usize,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// [`WireError::Version`], [`WireError::UnexpectedReply`], [`WireError::TooLong`]: the stream
    /// cannot be followed any further.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Header, WireError> {
        let word = |at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let (request, flags, size) = (word(0), word(4), word(8));
        let version = flags & VhostUserHeaderFlag::VERSION.bits();
        if version != VERSION {
            return Err(WireError::Version(version));
        }
        if flags & VhostUserHeaderFlag::REPLY.bits() != 0 {
            return Err(WireError::UnexpectedReply(request));
        }
        if size as usize > MAX_PAYLOAD {
            return Err(WireError::TooLong { request, size });
        }
        Ok(Header {
            request,
            need_reply: flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0,
            size: size as usize,
        })
    }
}

/// One memory region as the front-end describes it. No sum of its fields overflows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// First guest-physical address.
    pub guest_addr: u64,
    /// Length in bytes, never 0.
    pub size: u64,
    /// First address in the front-end's own address space; ring addresses are given in it.
    pub user_addr: u64,
    /// Offset of the region in its descriptor, in bytes.
    pub mmap_offset: u64,
}

/// Where a ring's three parts are, in the front-end's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table, or the ring of a packed one, aligned to 16.
    pub descriptors: u64,
    /// Available ring, aligned to 2; of a packed ring the driver's event structure.
    pub available: u64,
    /// Used ring, aligned to 4; of a packed ring the device's event structure.
    pub used: u64,
}

/// Where a dirty log is in its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogSpec {
    /// Length in bytes.
    pub mmap_size: u64,
    /// Offset in the descriptor, in bytes.
    pub mmap_offset: u64,
}

/// What an inflight region looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightSpec {
    /// Length in bytes.
    pub mmap_size: u64,
    /// Offset in its descriptor, in bytes.
    pub mmap_offset: u64,
    /// Rings covered.
    pub num_queues: u16,
    /// Descriptors per ring.
    pub queue_size: u16,
}

/// Part of the device's configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigRange {
    /// First byte.
    pub offset: u32,
    /// Length in bytes, never 0; the end is at most 4096.
    pub size: u32,
    /// Flags as sent.
    pub flags: u32,
}

/// A well-formed request with the descriptors that belong to it.
#[expect(missing_docs, reason = "variants carry the names of the protocol text")]
#[derive(Debug)]
pub enum Message {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<(RegionSpec, OwnedFd)>),
    SetVringNum {
        index: u16,
        size: u32,
    },
    SetVringAddr {
        index: u16,
        addresses: RingAddresses,
        /// The guest address to log writes of the used ring at, when they are to be.
        log: Option<u64>,
    },
    SetLogBase(LogSpec, OwnedFd),
    SetVringBase {
        index: u16,
        base: u32,
    },
    GetVringBase {
        index: u16,
    },
    SetVringKick {
        index: u16,
        fd: Option<OwnedFd>,
    },
    SetVringCall {
        index: u16,
        fd: Option<OwnedFd>,
    },
    SetVringErr {
        index: u16,
        fd: Option<OwnedFd>,
    },
    SetVringEnable {
        index: u16,
        enable: bool,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetBackendReqFd(OwnedFd),
    GetConfig(ConfigRange),
    SetConfig(ConfigRange, Vec<u8>),
    GetInflightFd(InflightSpec),
    SetInflightFd(InflightSpec, OwnedFd),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionSpec, OwnedFd),
    RemMemReg(RegionSpec),
    SetStatus(u64),
    GetStatus,
    SendRarp([u8; 6]),
    NetSetMtu(u64),
}

/// Payload and descriptors of one request, consumed field by field.
struct Parts<'a> {
    request: FrontendReq,
    payload: &'a [u8],
    fds: Vec<OwnedFd>,
}

impl Parts<'_> {
    fn size_error(&self) -> WireError {
        WireError::PayloadSize {
            request: self.request,
            size: self.payload.len(),
        }
    }

    /// Checks that the payload is empty and no descriptor came.
    fn empty(self, message: Message) -> Result<Message, WireError> {
        self.expect_fds(0)?;
        if self.payload.is_empty() {
            Ok(message)
        } else {
            Err(self.size_error())
        }
    }

    fn expect_fds(&self, expected: usize) -> Result<(), WireError> {
        if self.fds.len() == expected {
            Ok(())
        } else {
            Err(WireError::FdCount {
                request: self.request,
                found: self.fds.len(),
                expected,
            })
        }
    }

    fn one_fd(mut self) -> Result<OwnedFd, WireError> {
        self.expect_fds(1)?;
        Ok(self.fds.pop().expect("one descriptor was counted"))
    }

    /// The whole payload as one plain structure, checked by the structure's own rules.
    fn plain<T: ByteValued + Default + VhostUserMsgValidator>(&self) -> Result<T, WireError> {
        let value: T = self.raw(0)?;
        if self.payload.len() != size_of::<T>() {
            return Err(self.size_error());
        }
        if !value.is_valid() {
            return Err(WireError::Payload(self.request));
        }
        Ok(value)
    }

    /// A plain structure at byte `at` of the payload.
    fn raw<T: ByteValued + Default>(&self, at: usize) -> Result<T, WireError> {
        let bytes = self.payload.get(at..at + size_of::<T>());
        let mut value = T::default();
        value
            .as_mut_slice()
            .copy_from_slice(bytes.ok_or_else(|| self.size_error())?);
        Ok(value)
    }

    fn number(&self) -> Result<u64, WireError> {
        self.expect_fds(0)?;
        let bytes = self.payload.try_into().map_err(|_| self.size_error())?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn vring_state(&self) -> Result<(u16, u32), WireError> {
        self.expect_fds(0)?;
        let state: VhostUserVringState = self.plain()?;
        let index = u16::try_from(state.index).map_err(|_| WireError::Payload(self.request))?;
        Ok((index, state.num))
    }

    fn vring_fd(mut self) -> Result<(u16, Option<OwnedFd>), WireError> {
        let bytes = self.payload.try_into().map_err(|_| self.size_error())?;
        let value = u64::from_ne_bytes(bytes);
        if value & !(VRING_INDEX_MASK | VRING_NO_FD) != 0 {
            return Err(WireError::Payload(self.request));
        }
        self.expect_fds(usize::from(value & VRING_NO_FD == 0))?;
        Ok(((value & VRING_INDEX_MASK) as u16, self.fds.pop()))
    }

    fn region(&self, at: usize) -> Result<RegionSpec, WireError> {
        let region: VhostUserMemoryRegion = self.raw(at)?;
        if !region.is_valid() {
            return Err(WireError::Payload(self.request));
        }
        Ok(RegionSpec {
            guest_addr: region.guest_phys_addr,
            size: region.memory_size,
            user_addr: region.user_addr,
            mmap_offset: region.mmap_offset,
        })
    }

    /// The region of ADD_MEM_REG and REM_MEM_REG: 8 bytes of padding come first.
    fn single_region(&self) -> Result<RegionSpec, WireError> {
        if self.payload.len() != 8 + size_of::<VhostUserMemoryRegion>() {
            return Err(self.size_error());
        }
        self.region(8)
    }

    fn mem_table(self) -> Result<Message, WireError> {
        let head: VhostUserMemory = self.raw(0)?;
        let count = head.num_regions as usize;
        if count > MAX_FDS {
            return Err(WireError::Payload(self.request));
        }
        let region_len = size_of::<VhostUserMemoryRegion>();
        if self.payload.len() != size_of::<VhostUserMemory>() + count * region_len {
            return Err(self.size_error());
        }
        self.expect_fds(count)?;
        let specs = (0..count)
            .map(|i| self.region(size_of::<VhostUserMemory>() + i * region_len))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Message::SetMemTable(
            specs.into_iter().zip(self.fds).collect(),
        ))
    }

    fn vring_addr(self) -> Result<Message, WireError> {
        self.expect_fds(0)?;
        let addr: VhostUserVringAddr = self.plain()?;
        let logged = addr.flags & VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits() != 0;
        Ok(Message::SetVringAddr {
            log: logged.then_some(addr.log),
            index: u16::try_from(addr.index).map_err(|_| WireError::Payload(self.request))?,
            addresses: RingAddresses {
                descriptors: addr.descriptor,
                available: addr.available,
                used: addr.used,
            },
        })
    }

    fn log_base(self) -> Result<Message, WireError> {
        let log: VhostUserLog = self.plain()?;
        let spec = LogSpec {
            mmap_size: log.mmap_size,
            mmap_offset: log.mmap_offset,
        };
        self.one_fd().map(|fd| Message::SetLogBase(spec, fd))
    }

    fn config_range(&self) -> Result<ConfigRange, WireError> {
        self.expect_fds(0)?;
        let config: VhostUserConfig = self.raw(0)?;
        if !config.is_valid() {
            return Err(WireError::Payload(self.request));
        }
        if self.payload.len() != size_of::<VhostUserConfig>() + config.size as usize {
            return Err(self.size_error());
        }
        Ok(ConfigRange {
            offset: config.offset,
            size: config.size,
            flags: config.flags,
        })
    }

    fn inflight(&self) -> Result<InflightSpec, WireError> {
        let mut padded = [0u8; size_of::<VhostUserInflight>()];
        match self.payload.len() {
            INFLIGHT_LEN | 24 => {
                padded[..INFLIGHT_LEN].copy_from_slice(&self.payload[..INFLIGHT_LEN]);
            }
            _ => return Err(self.size_error()),
        }
        let padded = Parts {
            request: self.request,
            payload: &padded,
            fds: Vec::new(),
        };
        let inflight: VhostUserInflight = padded.plain()?;
        Ok(InflightSpec {
            mmap_size: inflight.mmap_size,
            mmap_offset: inflight.mmap_offset,
            num_queues: inflight.num_queues,
            queue_size: inflight.queue_size,
        })
    }
}

impl Message {
    /// Makes a message of a header's request number, its payload and its descriptors.
    ///
    /// # Errors
    /// Any [`WireError`] that is about one request; the stream stays in step.
    pub fn parse(request: u32, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Message, WireError> {
        use FrontendReq as Req;
        let code = Req::try_from(request).map_err(|()| WireError::Unsupported(request))?;
        let parts = Parts {
            request: code,
            payload,
            fds,
        };
        match code {
            Req::GET_FEATURES => parts.empty(Message::GetFeatures),
            Req::SET_FEATURES => parts.number().map(Message::SetFeatures),
            Req::SET_OWNER => parts.empty(Message::SetOwner),
            Req::RESET_OWNER => parts.empty(Message::ResetOwner),
            Req::GET_PROTOCOL_FEATURES => parts.empty(Message::GetProtocolFeatures),
            Req::SET_PROTOCOL_FEATURES => parts.number().map(Message::SetProtocolFeatures),
            Req::GET_QUEUE_NUM => parts.empty(Message::GetQueueNum),
            Req::GET_MAX_MEM_SLOTS => parts.empty(Message::GetMaxMemSlots),
            Req::RESET_DEVICE => parts.empty(Message::ResetDevice),
            Req::GET_STATUS => parts.empty(Message::GetStatus),
            Req::SET_STATUS => parts.number().map(Message::SetStatus),
            Req::NET_SET_MTU => parts.number().map(Message::NetSetMtu),
            Req::SEND_RARP => parts.number().map(|number| {
                // The first six bytes of the payload; the other two mean nothing.
                let [a, b, c, d, e, f, ..] = number.to_ne_bytes();
                Message::SendRarp([a, b, c, d, e, f])
            }),
            Req::SET_BACKEND_REQ_FD => parts.one_fd().map(Message::SetBackendReqFd),
            Req::SET_LOG_BASE => parts.log_base(),
            Req::SET_MEM_TABLE | Req::ADD_MEM_REG | Req::REM_MEM_REG => Self::memory(parts),
            Req::GET_CONFIG => parts.config_range().map(Message::GetConfig),
            Req::SET_CONFIG => parts.config_range().map(|range| {
                let data = payload[size_of::<VhostUserConfig>()..].to_vec();
                Message::SetConfig(range, data)
            }),
            Req::GET_INFLIGHT_FD => {
                parts.expect_fds(0)?;
                parts.inflight().map(Message::GetInflightFd)
            }
            Req::SET_INFLIGHT_FD => {
                let spec = parts.inflight()?;
                parts.one_fd().map(|fd| Message::SetInflightFd(spec, fd))
            }
            _ => Self::vring(parts),
        }
    }

    fn memory(parts: Parts<'_>) -> Result<Message, WireError> {
        match parts.request {
            FrontendReq::SET_MEM_TABLE => parts.mem_table(),
            FrontendReq::ADD_MEM_REG => {
                let spec = parts.single_region()?;
                parts.one_fd().map(|fd| Message::AddMemReg(spec, fd))
            }
            _ => {
                // Old front-ends pass the region's descriptor here too; it is closed.
                if parts.fds.len() > 1 {
                    parts.expect_fds(0)?;
                }
                parts.single_region().map(Message::RemMemReg)
            }
        }
    }

    fn vring(parts: Parts<'_>) -> Result<Message, WireError> {
        use FrontendReq as Req;
        Ok(match parts.request {
            Req::SET_VRING_NUM => {
                let (index, size) = parts.vring_state()?;
                Message::SetVringNum { index, size }
            }
            Req::SET_VRING_ADDR => return parts.vring_addr(),
            Req::SET_VRING_BASE => {
                let (index, base) = parts.vring_state()?;
                Message::SetVringBase { index, base }
            }
            Req::GET_VRING_BASE => {
                let (index, _) = parts.vring_state()?;
                Message::GetVringBase { index }
            }
            Req::SET_VRING_ENABLE => {
                let (index, num) = parts.vring_state()?;
                if num > 1 {
                    return Err(WireError::Payload(parts.request));
                }
                let enable = num == 1;
                Message::SetVringEnable { index, enable }
            }
            Req::SET_VRING_KICK => {
                let (index, fd) = parts.vring_fd()?;
                Message::SetVringKick { index, fd }
            }
            Req::SET_VRING_CALL => {
                let (index, fd) = parts.vring_fd()?;
                Message::SetVringCall { index, fd }
            }
            Req::SET_VRING_ERR => {
                let (index, fd) = parts.vring_fd()?;
                Message::SetVringErr { index, fd }
            }
            other => return Err(WireError::Unsupported(other.into())),
        })
    }
}

/// A reply to `request` as bytes.
pub fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    frame(
        request,
        VERSION | VhostUserHeaderFlag::REPLY.bits(),
        payload,
    )
}

/// A request of the back-end's own as bytes, wanting no answer.
pub fn backend_request(request: vhost::vhost_user::message::BackendReq) -> Vec<u8> {
    frame(request.into(), VERSION, &[])
}

fn frame(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    for word in [request, flags, payload.len() as u32] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// Payload of a GET_INFLIGHT_FD reply.
pub fn inflight_payload(spec: &InflightSpec) -> Vec<u8> {
    VhostUserInflight::new(
        spec.mmap_size,
        spec.mmap_offset,
        spec.num_queues,
        spec.queue_size,
    )
    .as_slice()
    .to_vec()
}

/// Payload of a GET_CONFIG reply.
pub fn config_payload(range: &ConfigRange, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of::<VhostUserConfig>() + data.len());
    for word in [range.offset, range.size, range.flags] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(data);
    bytes
}

/// Payload that carries one ring's index and a number.
pub fn vring_state_payload(index: u16, num: u32) -> Vec<u8> {
    VhostUserVringState::new(u32::from(index), num)
        .as_slice()
        .to_vec()
}
