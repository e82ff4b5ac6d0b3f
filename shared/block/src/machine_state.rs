//! Saved machine state: the area that some formats keep behind the disk for a virtual machine's memory.

use crate::driver::BoxFuture;
use executor::{Buffer, Errno};

/// The machine state that an image holds.
pub trait MachineState {
    /// Where it begins, counted as the disk is, in bytes.
    fn offset(&self) -> u64;
    /// Fills `buffer` from `offset` of the state.
    fn read(&self, offset: u64, buffer: Buffer) -> BoxFuture<'_, Result<(), Errno>>;
    /// Writes `buffer` at `offset` of the state.
    fn write(&self, offset: u64, buffer: Buffer) -> BoxFuture<'_, Result<(), Errno>>;
}
