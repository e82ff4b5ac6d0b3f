//! Network back-ends as the control thread sees them.

use std::io;
use std::rc::Rc;

use executor::Handle;

use crate::frame::MacAddress;
use crate::link::{NetQueue, Offloads};

/// Makes a queue on the thread that it is to live on.
pub type QueueMaker = Box<dyn FnOnce() -> io::Result<Rc<dyn NetQueue>> + Send>;

/// What a back-end has to know of a port that attaches to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The port's id.
    pub port: String,
    /// The guest's address.
    pub mac: MacAddress,
    /// Queue pairs of the port.
    pub queues: u16,
    /// How a switch treats it.
    pub vlan: VlanMode,
    /// Whether other isolated ports of a switch neither hear it nor are heard by it.
    pub isolated: bool,
}

/// Which VLANs a port of a switch is a member of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum VlanMode {
    /// Tags are not looked at.
    #[default]
    Transparent,
    /// Untagged at the port, this VLAN (1 to 4094) inside of the switch.
    Access(u16),
    /// Tagged with one of these; untagged frames belong to `native`, or are dropped when it is `None`.
    Trunk {
        /// Members, sorted; empty: all.
        vlans: Vec<u16>,
        /// VLAN of untagged frames.
        native: Option<u16>,
    },
}

/// What happened to a back-end, for the events of QMP. Repeating one tells nothing new.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A peer is there; its address as a person would write it.
    Connected(String),
    /// The peer has gone.
    Disconnected,
}

/// A network back-end. Lives on the control thread.
pub trait Netdev {
    /// `type=` on the command line.
    fn kind(&self) -> &'static str;

    /// Most queue pairs that a port can have; `None`: any number.
    fn max_queues(&self) -> Option<u16>;

    /// What the network can do by itself with frames from a guest (the `HOST_*` features).
    fn host_offloads(&self) -> Offloads;

    /// What it may leave for the guest to do (the `GUEST_*` features).
    fn guest_offloads(&self) -> Offloads;

    /// The thread on which all queues have to be; `None`: any, each its own.
    fn thread(&self) -> Option<Handle> {
        None
    }

    /// Opens queue pair `index` of a port. The queue detaches when it is dropped.
    ///
    /// # Errors
    /// Names what could not be opened.
    fn attach(&self, port: &Attachment, index: u16) -> io::Result<QueueMaker>;

    /// What it can tell of itself in `query-netdevs`, beyond what every back-end has.
    fn details(&self) -> serde_json::Map<String, serde_json::Value> {
        serde_json::Map::new()
    }
}
