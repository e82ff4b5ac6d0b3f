//! `type=switch`: an Ethernet switch for the ports of this process, with an uplink to any other back-end.
//!
//! ```text
//!   port a ── pair 0, 1 ──┐                       ┌── learning table, bounded
//!   port b ── pair 0 ─────┼── Plane, one thread ──┼── VLANs: access, trunk, transparent
//!   uplink: tap, ... ─────┘                       └── isolation, limits of frames to all
//! ```
//!
//! All queue pairs of its ports and its uplink live on the switch's thread, so nothing is locked and a frame is copied once,
//! from the sending guest's memory to the receiving one's. A receiver that does less than a frame needs gets it finished
//! ([`crate::offload`]). No port waits for another: what a receiver does not take waits in a bounded backlog, or is lost.
//!
//! A guest's own address is fixed to its port as long as the guest is there: no other port can draw its frames. What else is
//! behind a port is learnt, up to a limit.

mod flow;
mod forward;
mod member;
mod outlet;
mod plane;
mod stats;
mod table;
#[cfg(test)]
mod tests;
mod uplink;
mod vlan;

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::pending;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, ensure};
use executor::Handle;
use serde::{Deserialize, Serialize};

use crate::frame::{Frame, MacAddress};
use crate::link::{DropReason, LocalFuture, NetQueue, Offloads, Received, Sink};
use crate::netdev::{Attachment, Netdev, QueueMaker, VlanMode};

use super::Context;
use member::{Description, Kind};
use outlet::{Outlet, Target};
use plane::{Plane, Settings};
use stats::Stats;
use table::MemberId;

/// Largest table.
const MAX_TABLE_SIZE: u32 = 1 << 20;
/// Largest backlog of a receiver in bytes.
const MAX_BACKLOG: u64 = 1 << 30;
/// Longest ageing time in seconds (IEEE 802.1Q table 8-6).
const MAX_AGEING: u32 = 1_000_000;

/// What happens to a frame for a station that is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unknown {
    /// It goes to all.
    #[default]
    Flood,
    /// It goes to the uplink; from there, nowhere. Guests do not see each other's.
    Uplink,
    /// It goes nowhere.
    Drop,
}

/// Options of `type=switch`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct SwitchOptions {
    /// The back-end that leads outside, by its id. Its first queue is the switch's.
    pub uplink: Option<String>,
    /// The `iothread` that the switch lives on; by default one of its own.
    pub iothread: Option<String>,
    /// Access VLAN of the uplink.
    pub vlan: Option<u16>,
    /// VLANs of the uplink as a trunk: `10:20:30-39`, or `all`.
    pub trunk: Option<String>,
    /// VLAN of untagged frames on such a trunk.
    pub native: Option<u16>,
    /// Stations that are known at a time.
    pub table_size: u32,
    /// Stations behind one port.
    pub port_limit: u32,
    /// Seconds without a word after which a station is forgotten.
    pub ageing: u32,
    /// Stations that may move to a port in a second.
    pub move_rate: u32,
    /// Frames to all (broadcast, multicast, unknown stations) that a port may send in a second; 0: any number.
    pub flood_rate: u64,
    /// What happens to frames for stations that are not known.
    pub unknown: Unknown,
    /// Bytes that wait for a receiver.
    pub backlog: u64,
}

impl Default for SwitchOptions {
    fn default() -> Self {
        SwitchOptions {
            uplink: None,
            iothread: None,
            vlan: None,
            trunk: None,
            native: None,
            table_size: 4096,
            port_limit: 256,
            ageing: 300,
            move_rate: 16,
            flood_rate: 0,
            unknown: Unknown::Flood,
            backlog: 1 << 20,
        }
    }
}

impl SwitchOptions {
    fn settings(&self) -> anyhow::Result<Settings> {
        let SwitchOptions {
            table_size,
            ageing,
            backlog,
            port_limit,
            move_rate,
            ..
        } = *self;
        ensure!(
            (16..=MAX_TABLE_SIZE).contains(&table_size),
            "table-size={table_size} is not between 16 and {MAX_TABLE_SIZE}"
        );
        ensure!(
            (1..=MAX_AGEING).contains(&ageing),
            "ageing={ageing} is not between 1 and {MAX_AGEING}"
        );
        ensure!(
            backlog <= MAX_BACKLOG,
            "backlog={backlog} is above {MAX_BACKLOG}"
        );
        ensure!(port_limit > 0, "port-limit=0 leaves no port any station");
        ensure!(move_rate > 0, "move-rate=0 lets no station move");
        let port = member::Bounds {
            entries: port_limit,
            moves: move_rate.into(),
            floods: self.flood_rate,
        };
        Ok(Settings {
            table: table::Bounds {
                entries: table_size as usize,
                ageing,
            },
            port,
            // A quarter of the table stays for what is inside.
            uplink: member::Bounds {
                entries: table_size / 4 * 3,
                moves: move_rate.into(),
                floods: 0,
            },
            backlog: usize::try_from(backlog)?,
            unknown: self.unknown,
        })
    }
}

/// A station that a switch knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Station {
    /// Its VLAN; 0 without one.
    pub vlan: u16,
    /// Its address.
    pub mac: MacAddress,
    /// The port, or the uplink's back-end, that it is behind.
    pub member: String,
    /// Whether it is the port's own address.
    pub fixed: bool,
    /// Seconds since it was heard of.
    pub age: u32,
}

thread_local! {
    /// The switches of this thread by their numbers.
    static PLANES: RefCell<HashMap<u64, Rc<Plane>>> = RefCell::default();
}

/// Numbers switches.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// What reaches a switch from any thread.
#[derive(Clone)]
struct Access {
    number: u64,
    settings: Settings,
    stats: Arc<Stats>,
}

impl Access {
    fn stats(&self) -> Arc<Stats> {
        Arc::clone(&self.stats)
    }

    /// The switch, on its thread.
    fn plane(&self) -> Rc<Plane> {
        PLANES.with_borrow_mut(|planes| {
            let make = || Plane::new(&self.settings, Arc::clone(&self.stats));
            Rc::clone(planes.entry(self.number).or_insert_with(make))
        })
    }
}

/// The back-end.
pub struct Switch {
    access: Access,
    thread: Handle,
    uplink: Option<uplink::Uplink>,
}

impl Switch {
    /// Opens it, and its uplink.
    ///
    /// # Errors
    /// Options out of range, an uplink that is not there, lives elsewhere or cannot be opened.
    pub fn open(options: &SwitchOptions, context: &Context<'_>) -> anyhow::Result<Switch> {
        let settings = options.settings()?;
        let vlan = VlanMode::from_options(options.vlan, options.trunk.as_deref(), options.native)?;
        ensure!(
            options.uplink.is_some() || vlan == VlanMode::Transparent,
            "'vlan', 'trunk' and 'native' are the uplink's, and there is none"
        );
        let thread = (context.thread)(options.iothread.as_deref())?;
        let access = Access {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            settings,
            stats: Arc::default(),
        };
        let uplink = match &options.uplink {
            None => None,
            Some(id) => {
                let netdev = (context.netdev)(id)?;
                let description = Description {
                    name: id.clone(),
                    kind: Kind::Uplink,
                    mac: None,
                    vlan,
                    is_isolated: false,
                };
                let opened = uplink::Uplink::open(description, netdev, &access, &thread);
                Some(opened.with_context(|| format!("cannot use '{id}' as the uplink"))?)
            }
        };
        Ok(Switch {
            access,
            thread,
            uplink,
        })
    }

    /// The back-end that it uses as its uplink.
    pub fn uplink(&self) -> Option<&str> {
        self.uplink.as_ref().map(uplink::Uplink::id)
    }

    /// The stations that it knows, by VLAN and address.
    pub async fn stations(&self) -> Vec<Station> {
        let access = self.access.clone();
        let answer = self
            .thread
            .call(move || async move { access.plane().stations() });
        answer.await.unwrap_or_default()
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let number = self.access.number;
        // Not when the thread has ended: its planes went with it.
        self.thread.spawn(move || async move {
            let plane = PLANES.with_borrow_mut(|planes| planes.remove(&number));
            if let Some(plane) = plane {
                plane.end();
            }
        });
    }
}

impl Netdev for Switch {
    fn kind(&self) -> &'static str {
        "switch"
    }

    fn max_queues(&self) -> Option<u16> {
        None
    }

    fn host_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn guest_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn thread(&self) -> Option<Handle> {
        Some(self.thread.clone())
    }

    fn attach(&self, port: &Attachment, _index: u16) -> io::Result<QueueMaker> {
        let description = Description {
            name: port.port.clone(),
            kind: Kind::Port,
            mac: Some(port.mac),
            vlan: port.vlan.clone(),
            is_isolated: port.isolated,
        };
        let access = self.access.clone();
        Ok(Box::new(move || {
            let plane = access.plane();
            let member = plane.attach(&description)?;
            Ok(Rc::new(SwitchQueue {
                plane,
                member,
                outlet: RefCell::default(),
            }))
        }))
    }

    fn details(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut details = self.access.stats.report();
        if let Some(uplink) = &self.uplink {
            details.insert("uplink".to_owned(), uplink.id().into());
            details.insert("uplink-running".to_owned(), uplink.is_running().into());
        }
        details
    }

    fn switch(&self) -> Option<&Switch> {
        Some(self)
    }
}

/// A port's queue pair at the switch.
struct SwitchQueue {
    plane: Rc<Plane>,
    member: MemberId,
    outlet: RefCell<Option<Rc<Outlet>>>,
}

impl NetQueue for SwitchQueue {
    fn connect(&self, sink: Rc<dyn Sink>) {
        self.disconnect();
        let outlet = self.plane.open(self.member, Target::Sink(sink));
        self.outlet.replace(Some(outlet));
    }

    fn disconnect(&self) {
        if let Some(outlet) = self.outlet.take() {
            self.plane.close(self.member, &outlet);
        }
    }

    fn transmit(&self, frames: &[Frame<'_>], dropped: &mut dyn FnMut(DropReason)) -> usize {
        self.plane.forward(self.member, frames, dropped);
        frames.len()
    }

    fn flush(&self) {
        self.plane.flush();
    }

    fn writable(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }

    fn receive(&self, _budget: usize) -> io::Result<Received> {
        Ok(Received::Drained)
    }

    fn readable(&self) -> LocalFuture<'_, ()> {
        Box::pin(pending())
    }

    fn set_guest_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        // What the guest does is asked of its sink, frame by frame.
        Ok(())
    }
}

impl Drop for SwitchQueue {
    fn drop(&mut self) {
        self.disconnect();
        self.plane.detach(self.member);
    }
}
