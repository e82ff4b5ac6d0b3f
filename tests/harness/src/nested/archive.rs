//! The `newc` cpio format, as the kernel's initramfs unpacker reads it (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Written here rather than by cpio(1), because device nodes then need no root, and the result depends on nothing but its input.

use std::io::{self, Write};

/// The header in front of each entry: the fields of it that vary here.
pub(super) struct Header<'a> {
    /// Path without a leading slash.
    pub(super) name: &'a str,
    /// File type and permission bits, as in `st_mode`.
    pub(super) mode: u32,
    /// Length of the content in bytes.
    pub(super) length: u32,
    /// Major and minor number; zero for what is not a device node.
    pub(super) device: (u32, u32),
}

/// Writes entries one after the other; [`Archive::finish`] writes the trailer without which the kernel reports a broken archive.
pub(super) struct Archive<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    /// Writes one entry; `content` is as long as the header says.
    pub(super) fn entry(&mut self, header: &Header<'_>, content: &[u8]) -> io::Result<()> {
        debug_assert_eq!(header.length as usize, content.len());
        self.inode += 1;
        let name_length = header.name.len() as u32 + 1;
        let fields = [
            self.inode,
            header.mode,
            0, // uid
            0, // gid
            1, // links
            0, // mtime
            header.length,
            0, // major and minor of the device that holds the file
            0,
            header.device.0,
            header.device.1,
            name_length,
            0, // check, unused in this variant
        ];
        write!(self.out, "070701")?;
        for field in fields {
            write!(self.out, "{field:08X}")?;
        }
        write!(self.out, "{}\0", header.name)?;
        self.pad(6 + 8 * 13 + name_length)?;
        self.out.write_all(content)?;
        self.pad(header.length)
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        let trailer = Header {
            name: "TRAILER!!!",
            mode: 0,
            length: 0,
            device: (0, 0),
        };
        self.entry(&trailer, &[])?;
        self.out.flush()
    }

    /// Header with name, and content, each end on a multiple of four bytes.
    fn pad(&mut self, written: u32) -> io::Result<()> {
        let missing = written.wrapping_neg() % 4;
        self.out.write_all(&[0; 3][..missing as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_start_on_multiples_of_four() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        for content in [&b"x"[..], b"four", b"fiver"] {
            let length = content.len() as u32;
            let header = Header {
                name: "name",
                mode: 0o100644,
                length,
                device: (0, 0),
            };
            archive.entry(&header, content).unwrap();
        }
        archive.finish().unwrap();
        let starts: Vec<_> = bytes
            .windows(6)
            .enumerate()
            .filter(|(_, w)| *w == b"070701")
            .map(|(i, _)| i)
            .collect();
        assert_eq!(starts.len(), 4);
        assert!(starts.iter().all(|start| start % 4 == 0), "{starts:?}");
    }
}
