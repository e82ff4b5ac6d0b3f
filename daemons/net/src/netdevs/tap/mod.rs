//! `type=tap` and `type=macvtap`: interfaces of the host whose other end is the guest.
//!
//! ```text
//!   Tap (control thread) ── attach ──> Lease of a descriptor ──> TapQueue (queue thread)
//!     pool of descriptors   <── dropped ──┘
//! ```
//!
//! Descriptors are opened with the back-end, `queues=` of them, and more when a port has more queue pairs and the daemon still
//! may open some. One that no guest reads is taken out of the interface, so that the kernel gives it no flow; that needs
//! an interface with several queues, which one made here is unless `queues=1` says otherwise.

mod batch;
mod device;
mod queue;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use self::device::Device;
pub use self::device::SERVING_IOCTLS;
use self::queue::TapQueue;
use super::Context;
use super::busy::while_busy;
use super::interface::{InterfaceName, Interfaces};
use super::lease::{Pool, Wanted};
use crate::link::Offloads;
use crate::netdev::{Attachment, Netdev, QueueMaker};

/// Queues that one interface can have (`MAX_TAP_QUEUES`).
const MAX_QUEUES: u16 = 256;

/// Options of `type=tap`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct TapOptions {
    /// The interface. Created when it does not exist, and removed with the daemon then; a name with `%d`, or none, lets the
    /// kernel number it.
    pub ifname: Option<String>,
    /// A descriptor of an interface instead: its number or name.
    pub fd: Option<String>,
    /// Several of them, with colons between.
    pub fds: Option<String>,
    /// Queues to open at once. Absent: one, and others when a port wants them.
    pub queues: Option<u16>,
    /// A bridge to put the interface in.
    pub br: Option<String>,
    /// The interface's MTU in bytes.
    pub mtu: Option<u32>,
    /// Whether to bring the interface up. Absent: when it is made here.
    pub up: Option<bool>,
    /// Limit of bytes that were sent and not taken in.
    pub sndbuf: Option<u64>,
    /// `no`: scripts are not run.
    pub script: Option<String>,
    /// `no`: scripts are not run.
    pub downscript: Option<String>,
}

/// Options of `type=macvtap`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct MacvtapOptions {
    /// A macvtap interface that exists.
    pub ifname: Option<String>,
    /// A descriptor of one instead: its number or name.
    pub fd: Option<String>,
    /// Several of them, with colons between.
    pub fds: Option<String>,
    /// Queues to open at once. Absent: one, and others when a port wants them.
    pub queues: Option<u16>,
}

/// Where more descriptors come from.
#[derive(Debug)]
enum Source {
    Tap(String),
    Macvtap(u32),
    /// Nowhere: there are as many as were given, or as the interface can have.
    None,
}

/// The back-end.
#[derive(Debug)]
pub struct Tap {
    kind: &'static str,
    name: String,
    source: Source,
    max_queues: u16,
    has_header: bool,
    offloads: Offloads,
    /// Descriptors that no queue uses.
    pool: Pool<Device>,
}

impl Tap {
    /// Opens a tap interface.
    ///
    /// # Errors
    /// Options that exclude each other; what the host refuses, with what to do about it.
    pub fn open(options: &TapOptions, context: &Context<'_>) -> Result<Tap> {
        let script = |script: &Option<String>| script.as_deref().is_some_and(|name| name != "no");
        if script(&options.script) || script(&options.downscript) {
            bail!("scripts are not run; 'br', 'mtu' and 'up' set the interface up");
        }
        let fds = descriptors(options.fd.as_deref(), options.fds.as_deref(), context)?;
        let tap = if fds.is_empty() {
            Self::open_named(options)?
        } else {
            ensure!(
                options.ifname.is_none() && options.queues.is_none(),
                "'ifname' and 'queues' do not go with 'fd' and 'fds'"
            );
            Self::inherited("tap", fds)?
        };
        if let Some(bytes) = options.sndbuf {
            let bytes = i32::try_from(bytes).context("'sndbuf' is too large")?;
            let set = tap
                .pool
                .for_each_free(|device| device.set_send_buffer(bytes));
            set.context("cannot set 'sndbuf'")?;
        }
        tap.rest()?;
        Ok(tap)
    }

    fn open_named(options: &TapOptions) -> Result<Tap> {
        let name = options.ifname.as_deref().unwrap_or_default();
        let wanted = wanted_queues(options.queues)?;
        let existed = InterfaceName::new(name).is_ok_and(|name| name.index().is_some());
        let first = match options.queues {
            Some(1) => open_tap(name, false),
            Some(_) => open_tap(name, true),
            None => match open_tap(name, true) {
                // It exists and has one queue only.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => open_tap(name, false),
                first => first,
            },
        };
        let first = first.map_err(|error| explain(name, existed, wanted > 1, error))?;
        let name = first.name().to_owned();
        let mut tap = Tap::new("tap", Source::Tap(name.clone()), vec![first])?;
        tap.open_more(wanted)
            .with_context(|| format!("cannot open {wanted} queues of '{name}'"))?;
        let name = InterfaceName::new(&name)?;
        let interfaces = Interfaces::open()?;
        if let Some(mtu) = options.mtu {
            let set = interfaces.set_mtu(&name, mtu);
            set.with_context(|| format!("cannot set the MTU of '{name}' to {mtu}"))?;
        }
        if let Some(bridge) = &options.br {
            let bridge = InterfaceName::new(bridge)?;
            let added = interfaces.add_to_bridge(&name, &bridge);
            added.with_context(|| format!("cannot put '{name}' in bridge '{bridge}'"))?;
        }
        if let Some(up) = options.up.or((!existed).then_some(true)) {
            let state = if up { "up" } else { "down" };
            let set = interfaces.set_up(&name, up);
            set.with_context(|| format!("cannot bring '{name}' {state}"))?;
        }
        Ok(tap)
    }

    /// Opens a macvtap interface.
    ///
    /// # Errors
    /// As [`Tap::open`].
    pub fn open_macvtap(options: &MacvtapOptions, context: &Context<'_>) -> Result<Tap> {
        let fds = descriptors(options.fd.as_deref(), options.fds.as_deref(), context)?;
        let tap = match &options.ifname {
            Some(name) => {
                ensure!(fds.is_empty(), "'ifname' does not go with 'fd' and 'fds'");
                let name = InterfaceName::new(name)?;
                let index = name.index().with_context(|| {
                    format!(
                        "there is no interface '{name}'; make it with: \
                         ip link add link PARENT name {name} type macvtap mode bridge"
                    )
                })?;
                let device = Device::macvtap(index)
                    .with_context(|| format!("cannot use '{name}' as a macvtap interface"))?;
                let mut tap = Tap::new("macvtap", Source::Macvtap(index), vec![device])?;
                let wanted = wanted_queues(options.queues)?;
                tap.open_more(wanted)
                    .with_context(|| format!("cannot open {wanted} queues of '{name}'"))?;
                tap
            }
            None => {
                ensure!(!fds.is_empty(), "one of 'ifname', 'fd' and 'fds' is needed");
                ensure!(
                    options.queues.is_none(),
                    "'queues' does not go with 'fd' and 'fds'"
                );
                Self::inherited("macvtap", fds)?
            }
        };
        tap.rest()?;
        Ok(tap)
    }

    fn inherited(kind: &'static str, fds: Vec<OwnedFd>) -> Result<Tap> {
        let devices: io::Result<Vec<_>> = fds.into_iter().map(Device::inherited).collect();
        let devices = devices?;
        let name = devices[0].name();
        ensure!(
            devices.iter().all(|device| device.name() == name),
            "the descriptors belong to different interfaces"
        );
        ensure!(
            devices.len() == 1 || devices.iter().all(Device::is_multi_queue),
            "the descriptors of '{name}' were not opened for several queues (IFF_MULTI_QUEUE)"
        );
        Tap::new(kind, Source::None, devices)
    }

    fn new(kind: &'static str, source: Source, devices: Vec<Device>) -> Result<Tap> {
        let first = &devices[0];
        let offloads = first.probe_offloads().context("cannot probe offloads")?;
        let (source, max_queues) = match source {
            Source::None => (
                Source::None,
                devices.len().min(usize::from(MAX_QUEUES)) as u16,
            ),
            source if first.is_multi_queue() => (source, MAX_QUEUES),
            _ => (Source::None, 1),
        };
        Ok(Tap {
            kind,
            name: first.name().to_owned(),
            source,
            max_queues,
            has_header: first.has_header(),
            offloads,
            pool: Pool::new(devices),
        })
    }

    /// Opens queues until there are `wanted`.
    fn open_more(&mut self, wanted: u16) -> io::Result<()> {
        self.pool.grow_to(wanted, || self.source.open())
    }

    /// Takes the queues out of the interface until a guest reads them.
    fn rest(&self) -> io::Result<()> {
        self.pool
            .for_each_free(|device| match device.is_multi_queue() {
                true => device.set_attached(false),
                false => Ok(()),
            })
    }
}

impl Source {
    fn open(&self) -> io::Result<Device> {
        match self {
            Source::Tap(name) => Device::tap(name, true),
            Source::Macvtap(index) => Device::macvtap(*index),
            Source::None => Err(io::Error::other("there are no more queues")),
        }
    }
}

/// Opens a tap interface.
fn open_tap(name: &str, multi_queue: bool) -> io::Result<Device> {
    let is_busy = |error: &io::Error| error.raw_os_error() == Some(libc::EBUSY);
    while_busy(is_busy, || Device::tap(name, multi_queue))
}

fn wanted_queues(queues: Option<u16>) -> Result<u16> {
    let queues = queues.unwrap_or(1);
    ensure!(
        (1..=MAX_QUEUES).contains(&queues),
        "'queues' has to be 1 to {MAX_QUEUES}, not {queues}"
    );
    Ok(queues)
}

fn descriptors(fd: Option<&str>, fds: Option<&str>, context: &Context<'_>) -> Result<Vec<OwnedFd>> {
    ensure!(fd.is_none() || fds.is_none(), "'fd' does not go with 'fds'");
    let names = fd
        .into_iter()
        .chain(fds.into_iter().flat_map(|fds| fds.split(':')));
    let open = |name: &str| {
        let what = || format!("cannot use descriptor '{name}'");
        (context.descriptor)(name).with_context(what)
    };
    names.map(open).collect()
}

/// What to do when a tap interface cannot be had.
fn explain(name: &str, existed: bool, several: bool, error: io::Error) -> anyhow::Error {
    let shown = if name.is_empty() { "tap%d" } else { name };
    let queues = if several { " multi_queue" } else { "" };
    let advice = match error.raw_os_error() {
        Some(libc::EPERM) if existed => format!(
            "it belongs to another user; make it with: ip tuntap add dev {shown} mode tap user USER{queues} vnet_hdr"
        ),
        Some(libc::EPERM) => format!(
            "that needs CAP_NET_ADMIN, or an interface made before with: ip tuntap add dev {shown} mode tap user USER{queues} vnet_hdr"
        ),
        Some(libc::EBUSY) => "another process has it open".to_owned(),
        Some(libc::EINVAL) if existed && several => format!(
            "it is no tap interface, or one for a single queue; make it with: ip tuntap add dev {shown} mode tap{queues} vnet_hdr"
        ),
        Some(libc::EINVAL) if existed => "it is no tap interface".to_owned(),
        _ => {
            return anyhow::Error::new(error)
                .context(format!("cannot open tap interface '{shown}'"));
        }
    };
    anyhow::Error::new(error).context(format!("cannot open tap interface '{shown}': {advice}"))
}

impl Netdev for Tap {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn max_queues(&self) -> Option<u16> {
        Some(self.max_queues)
    }

    fn host_offloads(&self) -> Offloads {
        self.offloads
    }

    fn guest_offloads(&self) -> Offloads {
        self.offloads
    }

    fn attach(&self, port: &Attachment, index: u16) -> io::Result<QueueMaker> {
        let name = &self.name;
        let more = || {
            let opened = self.source.open().and_then(|device| {
                device.set_attached(false)?;
                Ok(device)
            });
            opened.map_err(|error| {
                let what = format!("cannot open queue {index} of '{name}': {error} ('queues=' opens them at the start)");
                io::Error::new(error.kind(), what)
            })
        };
        let what = format!("interface '{name}'");
        let lease = self.pool.lend(&port.port, (&what, Wanted::Any), more)?;
        let offloads = self.offloads;
        Ok(Box::new(move || {
            Ok(Rc::new(TapQueue::new(lease, offloads)))
        }))
    }

    fn details(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut details = serde_json::Map::new();
        details.insert("ifname".to_owned(), self.name.clone().into());
        details.insert("vnet-hdr".to_owned(), self.has_header.into());
        details.insert("uso".to_owned(), self.offloads.uso4.into());
        details
    }
}
