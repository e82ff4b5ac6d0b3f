//! Machine state: data behind the disk, moved as the disk's is.
//!
//! ```text
//!   read    offset of the state → offset behind the disk → pieces, as of a read of the disk
//!   write   the same, after the format has made room in its tables
//! ```
//!
//! Promises: an offset that cannot be counted is `EFBIG`, a format without such an area `EOPNOTSUPP`.
//! Must not know: where a format begins the area, which is [`Format::machine_state`].

use super::{FormatNode, Memory};
use crate::debug::Event;
use crate::driver::BoxFuture;
use crate::format::Format;
use crate::machine_state::MachineState;
use executor::{Buffer, Errno};

impl<F: Format> FormatNode<F> {
    /// Where bytes of the machine state are, and where they end.
    fn state_place(&self, offset: u64, length: usize) -> Result<(u64, u64), Errno> {
        let start = self.format.machine_state().ok_or(Errno::EOPNOTSUPP)?;
        let at = start.checked_add(offset).ok_or(Errno::EFBIG)?;
        let end = at.checked_add(length as u64).ok_or(Errno::EFBIG)?;
        Ok((at, end))
    }

    async fn read_state(&self, offset: u64, buffer: Buffer) -> Result<(), Errno> {
        let (at, _) = self.state_place(offset, buffer.len())?;
        self.format.file().node().event(Event::VmstateLoad).await;
        self.read_pieces(at, (buffer, Memory::Anything)).await
    }

    async fn write_state(&self, offset: u64, buffer: Buffer) -> Result<(), Errno> {
        let (at, end) = self.state_place(offset, buffer.len())?;
        self.format.file().node().event(Event::VmstateSave).await;
        self.format.reserve_machine_state(end).await?;
        self.write_pieces(at, buffer).await
    }
}

impl<F: Format> MachineState for FormatNode<F> {
    fn offset(&self) -> u64 {
        self.format.machine_state().unwrap_or_default()
    }
    fn read(&self, offset: u64, buffer: Buffer) -> BoxFuture<'_, Result<(), Errno>> {
        Box::pin(self.read_state(offset, buffer))
    }
    fn write(&self, offset: u64, buffer: Buffer) -> BoxFuture<'_, Result<(), Errno>> {
        Box::pin(self.write_state(offset, buffer))
    }
}
