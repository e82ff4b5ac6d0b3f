//! Reading a compressed cluster.

use super::Packed;
use crate::qcow2::Qcow2;
use block::Event;
use executor::workers::offload;
use executor::{Buffer, Errno, HeapBuffer};
use std::sync::Arc;

impl Qcow2 {
    /// Fills `buffer` from a compressed cluster; `offset` is the guest's.
    pub(in super::super) async fn read_compressed(
        &self,
        offset: u64,
        descriptor: u64,
        buffer: Buffer,
    ) -> Result<(), Errno> {
        let start = (offset & (self.geometry.cluster_size() - 1)) as usize;
        let copy = |cluster: &HeapBuffer| match cluster.get(start..start + buffer.len()) {
            Some(bytes) => {
                buffer.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(Errno::EIO),
        };
        if let Some(cluster) = self.inflated.get(descriptor) {
            return copy(&cluster);
        }
        let _busy = self.inflated.busy.lock(descriptor..descriptor + 1).await;
        // Whoever was here before has inflated it.
        if let Some(cluster) = self.inflated.get(descriptor) {
            return copy(&cluster);
        }
        let generation = self.inflated.generation();
        let cluster = Arc::new(self.inflate(offset, descriptor).await?);
        let copied = copy(&cluster);
        self.inflated.put(descriptor, cluster, generation);
        copied
    }

    async fn inflate(&self, offset: u64, descriptor: u64) -> Result<HeapBuffer, Errno> {
        let packed = Packed::from_descriptor(descriptor, &self.geometry);
        let node = self.file.node();
        let fault = |what: &str| {
            let file = node.name();
            tracing::warn!(
                file,
                "qcow2: {what} at guest offset {offset:#x} ({packed:x?})"
            );
            Errno::EIO
        };
        // The last sector may reach beyond the end of the file.
        let held = node.length().saturating_sub(packed.offset);
        let length = packed.length.min(held) as usize;
        if length == 0 {
            return Err(fault("compressed cluster beyond the end of the file"));
        }
        let memory = self.inflated.memory();
        let whole = match length <= memory.len() {
            true => memory.into_buffer(),
            false => Buffer::zeroed(length),
        };
        self.event(Event::ReadCompressed).await;
        let read = node.read(packed.offset, whole.slice(0..length));
        read.await?;
        let bytes = whole.into_heap();
        let (codec, plain) = (self.header.codec, self.inflated.memory());
        let plain_len = plain.len();
        let work = move || {
            let mut plain = plain;
            let result = codec.decode(&bytes[..length], &mut plain);
            (result, bytes, plain)
        };
        let (result, bytes, plain) = match plain_len <= codec.decoded_inline() {
            true => work(),
            false => offload(work).await,
        };
        self.inflated.give_back(bytes);
        match result {
            Ok(()) => Ok(plain),
            Err(_) => {
                self.inflated.give_back(plain);
                Err(fault("cannot decompress the cluster"))
            }
        }
    }
}
