//! Reads and writes of metadata, as byte strings. Bytes behind the end of the file are zeroes.

use block::{Buffer, Edge, Errno, Error, Resize, WriteFlags};

/// `length` bytes at `offset` of a child.
pub(crate) async fn read_bytes(file: &Edge, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
    let buffer = Buffer::zeroed(length);
    file.node().read(offset, buffer.clone()).await?;
    Ok(buffer.into_heap().to_vec())
}

/// Writes `bytes` at `offset` of a child.
pub(crate) async fn write_bytes(file: &Edge, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
    let buffer = Buffer::zeroed(bytes.len());
    buffer.copy_from_slice(bytes);
    let node = file.node();
    node.write(offset, buffer, WriteFlags::default()).await
}

/// Makes a file nothing but `length` zero bytes, whatever it held.
pub(crate) async fn zero_file(file: &Edge, length: u64) -> Result<(), Error> {
    for length in [0, length] {
        file.node().resize(Resize::to(length)).await?;
    }
    Ok(())
}
