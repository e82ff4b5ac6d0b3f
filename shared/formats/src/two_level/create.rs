//! New images: nothing but a header, an empty L1 table and the name of a backing file.

use crate::bytes::{write_bytes, zero_file};
use block::{ByteRange, Edge, Error, ZeroFlags};

const SECTOR: u64 = 512;

/// What a new image consists of.
pub(crate) struct NewImage<'a> {
    /// The L1 table, behind which the file ends.
    pub(crate) l1: ByteRange,
    /// A name, and the offset that it is stored at.
    pub(crate) name: Option<(u64, &'a str)>,
    /// What goes to the start, when all else is durable.
    pub(crate) header: &'a [u8],
}

impl NewImage<'_> {
    /// Writes it to a file, durably.
    ///
    /// # Errors
    /// The file's.
    pub(crate) async fn write(&self, file: &Edge) -> Result<(), Error> {
        let failed = |errno| Error::io("Could not write the new image", errno);
        let (node, l1) = (file.node(), self.l1);
        if node.grows() {
            zero_file(file, l1.offset + l1.length.next_multiple_of(SECTOR)).await?;
        } else {
            let zeroed = node.write_zeroes(l1, ZeroFlags::default()).await;
            zeroed.map_err(failed)?;
        }
        if let Some((offset, name)) = self.name {
            let written = write_bytes(file, offset, name.as_bytes()).await;
            written.map_err(failed)?;
        }
        node.flush().await.map_err(failed)?;
        let written = write_bytes(file, 0, self.header).await;
        written.map_err(failed)?;
        node.flush().await.map_err(failed)
    }
}
