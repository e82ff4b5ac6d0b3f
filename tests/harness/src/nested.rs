//! A virtual machine with a working `/dev/kvm`, on any machine.
//!
//! outboard's VMM needs KVM, and many build machines have none. QEMU's software emulation offers AMD's virtualisation
//! extension to its guest, so a Debian kernel in it runs `kvm-amd` for real:
//!
//! ```text
//! this machine ── NestedVm: QEMU, -accel tcg ── Debian kernel, /dev/kvm, the built binaries
//!                                                 └── outboard-vmm or QEMU on KVM ── Debian kernel: the guest
//! ```
//!
//! What runs inside is packed into an initramfs: programs with the shared libraries that they ask for, busybox, kernel
//! modules, and plain files. A shell script is the VM's only job; each line that it prints comes back while it runs, and its
//! exit status ends the run. Nothing here needs root, a network, or a disk image.
//!
//! The module knows nothing about what is being tested: scenarios live above it.

mod archive;
mod guest;
mod kernel;
mod outcome;
mod process;
mod tree;
mod vm;

pub use guest::{GuestContents, guest_initramfs};
pub use kernel::Kernel;
pub use outcome::Outcome;
pub(crate) use process::{Owned, die_with_parent, lines_of};
pub use tree::Tree;
pub use vm::NestedVm;
