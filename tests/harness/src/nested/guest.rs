//! The guest itself: a Debian kernel and a small initramfs, for whatever VMM boots it.

use std::path::Path;

use anyhow::Result;

use super::{Kernel, Tree};

/// What the guest's kernel needs to see a virtio disk, a power button, and nothing else. `virtio_ring` loads before `virtio`.
const GUEST_MODULES: [&str; 6] = [
    "virtio_ring",
    "virtio",
    "virtio_pci",
    "virtio_blk",
    "button",
    "evdev",
];

/// Writes the guest's initramfs to `path`: busybox, the virtio modules of `kernel`, and `programs`.
///
/// `run=WORDS` on the kernel command line (commas between the words) says what to run; without it the console gets a shell. The
/// guest powers off afterwards.
///
/// # Errors
/// A program or module is missing, or `path` cannot be written.
pub fn guest_initramfs(kernel: &Kernel, programs: &[&Path], path: &Path) -> Result<()> {
    let mut tree = Tree::with_busybox()?;
    tree.text("/init", include_str!("../../../guest/init"));
    tree.modules(&kernel.modules(&GUEST_MODULES)?)?;
    for program in programs {
        tree.program(program)?;
    }
    tree.write_initramfs(path)
}
