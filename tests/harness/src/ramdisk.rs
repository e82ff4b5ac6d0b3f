//! A vhost-user-blk back-end on rust-vmm's `vhost-user-backend` and `virtio-queue`.
//!
//! It exists to test the driver: an implementation of rings and messages that shares no line with
//! ours. It holds its data in RAM, serves one connection, and lacks what those crates lack (inflight
//! region, config-change messages, STATUS).

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::driver::features::{CONFIG_BYTES, bits};
use crate::driver::{ID_BYTES, SECTOR_BYTES, STATUS_IOERR, STATUS_OK, STATUS_UNSUPPORTED};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

const QUEUE_SIZE: usize = 1024;
const MAX_SEGMENTS: u32 = 1022;

/// What a `GetId` request returns.
pub const SERIAL: &[u8] = b"ram-disk";

/// A running back-end; ends with its connection.
#[derive(Debug)]
pub struct RamDisk {
    thread: Option<JoinHandle<Result<()>>>,
}

impl RamDisk {
    /// Listens on `socket` and serves one connection to a disk of `bytes` zeroes.
    ///
    /// # Errors
    /// When the socket or the daemon cannot be made.
    pub fn serve(socket: &Path, bytes: usize, queues: usize) -> Result<Self> {
        let mut listener = Listener::new(socket, true).context("listener")?;
        let memory = Memory::new(GuestMemoryMmap::new());
        let backend = Arc::new(Backend {
            data: Mutex::new(vec![0; bytes]),
            memory: memory.clone(),
            queues,
        });
        let mut daemon = VhostUserDaemon::new("ramdisk".into(), backend, memory)
            .map_err(|error| anyhow::anyhow!("daemon: {error}"))?;
        let thread = std::thread::spawn(move || {
            daemon
                .start(&mut listener)
                .map_err(|error| anyhow::anyhow!("start: {error}"))?;
            // The front-end leaving in the middle of a message is no concern of the disk's.
            let _ = daemon.wait();
            daemon
                .get_epoll_handlers()
                .iter()
                .for_each(|handler| handler.send_exit_event());
            Ok(())
        });
        Ok(Self {
            thread: Some(thread),
        })
    }

    /// Waits for the end of the connection.
    ///
    /// # Errors
    /// What the daemon failed with.
    pub fn join(mut self) -> Result<()> {
        let thread = self.thread.take().context("joined once")?;
        thread.join().expect("the back-end does not panic")
    }
}

struct Backend {
    data: Mutex<Vec<u8>>,
    memory: Memory,
    queues: usize,
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        self.queues
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        bits::SEG_MAX
            | bits::FLUSH
            | bits::MQ
            | bits::DISCARD
            | bits::WRITE_ZEROES
            | bits::RING_INDIRECT_DESC
            | bits::RING_EVENT_IDX
            | bits::PROTOCOL_FEATURES
            | bits::VERSION_1
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        Ok(())
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let data = self.data.lock().unwrap_or_else(PoisonError::into_inner);
        let mut config = [0; CONFIG_BYTES];
        config[0..8].copy_from_slice(&((data.len() / SECTOR_BYTES) as u64).to_le_bytes());
        config[12..16].copy_from_slice(&MAX_SEGMENTS.to_le_bytes());
        config[34..36].copy_from_slice(&(self.queues as u16).to_le_bytes());
        for limit in [36, 48] {
            config[limit..limit + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            config[limit + 4..limit + 8].copy_from_slice(&1u32.to_le_bytes());
        }
        let start = (offset as usize).min(CONFIG_BYTES);
        let end = start.saturating_add(size as usize).min(CONFIG_BYTES);
        config[start..end].to_vec()
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        event: u16,
        _set: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        let Some(vring) = vrings.get(usize::from(event)) else {
            return Ok(());
        };
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            self.serve_ring(vring)?;
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}

impl Backend {
    fn serve_ring(&self, vring: &VringMutex) -> io::Result<()> {
        let chains: Vec<Chain> = {
            let mut state = vring.get_mut();
            let iterator = state.get_queue_mut().iter(self.memory.memory());
            iterator.map_err(io::Error::other)?.collect()
        };
        for chain in chains {
            let head = chain.head_index();
            let written = self.serve_chain(chain)?;
            vring.add_used(head, written).map_err(io::Error::other)?;
            if vring.needs_notification().map_err(io::Error::other)? {
                vring.signal_used_queue()?;
            }
        }
        Ok(())
    }

    fn serve_chain(&self, chain: Chain) -> io::Result<u32> {
        let memory = self.memory.memory();
        let mut reader = chain.clone().reader(&memory).map_err(io::Error::other)?;
        let mut writer = chain.writer(&memory).map_err(io::Error::other)?;
        let mut header = [0; 16];
        reader.read_exact(&mut header)?;
        let kind = crate::wire::read_u32(&header, 0);
        let start = crate::wire::read_u64(&header, 8) as usize * SECTOR_BYTES;
        let room = writer.available_bytes().saturating_sub(1);
        let mut data = self.data.lock().unwrap_or_else(PoisonError::into_inner);
        let status = match kind {
            0 => match data.get(start..start + room) {
                Some(source) => writer.write_all(source).map(|()| STATUS_OK)?,
                None => STATUS_IOERR,
            },
            1 => match data.get_mut(start..start + reader.available_bytes()) {
                Some(target) => reader.read_exact(target).map(|()| STATUS_OK)?,
                None => STATUS_IOERR,
            },
            4 | 11 => STATUS_OK,
            8 => {
                let mut id = [0; ID_BYTES];
                id[..SERIAL.len()].copy_from_slice(SERIAL);
                writer.write_all(&id[..room.min(ID_BYTES)])?;
                STATUS_OK
            }
            13 => {
                let mut range = [0; 16];
                reader.read_exact(&mut range)?;
                let first = crate::wire::read_u64(&range, 0) as usize * SECTOR_BYTES;
                let bytes = crate::wire::read_u32(&range, 8) as usize * SECTOR_BYTES;
                match data.get_mut(first..first + bytes) {
                    Some(target) => {
                        target.fill(0);
                        STATUS_OK
                    }
                    None => STATUS_IOERR,
                }
            }
            _ => STATUS_UNSUPPORTED,
        };
        if writer.available_bytes() > 1 {
            let padding = vec![0; writer.available_bytes() - 1];
            writer.write_all(&padding)?;
        }
        writer.write_all(&[status])?;
        Ok(writer.bytes_written() as u32)
    }
}
