//! A PCI root with one bus: configuration space ([`config`]), message interrupts ([`msix`]), the bus itself ([`root`]).

pub(crate) mod config;
pub(crate) mod msix;
pub(crate) mod root;

/// An access that cannot be served until a device's back-end has come up. The CPU tries it again after
/// [`crate::cpu::vcpu::Gate::device_changed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotReady;
