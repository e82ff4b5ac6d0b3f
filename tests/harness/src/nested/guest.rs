//! The guest itself: a Debian kernel and a small initramfs, for whatever VMM boots it.

use std::path::{Path, PathBuf};

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

/// What goes into a guest's initramfs, beside busybox and the modules for a disk.
#[derive(Debug, Clone, Default)]
pub struct GuestContents {
    /// Programs, with the shared libraries that they ask for.
    pub programs: Vec<PathBuf>,
    /// Kernel modules, with those that they need.
    pub modules: Vec<&'static str>,
}

/// Writes the guest's initramfs to `path`.
///
/// `run=WORDS` on the kernel command line (commas between the words) says what to run; without it the console gets a shell. The
/// guest powers off afterwards.
///
/// # Errors
/// A program or module is missing, or `path` cannot be written.
pub fn guest_initramfs(kernel: &Kernel, contents: &GuestContents, path: &Path) -> Result<()> {
    let mut tree = Tree::with_busybox()?;
    tree.text("/init", include_str!("../../../guest/init"));
    let modules = [&GUEST_MODULES[..], &contents.modules].concat();
    tree.modules(&kernel.modules(&modules)?)?;
    for program in &contents.programs {
        tree.program(program)?;
    }
    tree.write_initramfs(path)
}
