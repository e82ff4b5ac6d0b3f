//! The options of a port.

use std::path::PathBuf;

use qmp::{Arguments, Error, Result, Value};
use serde::Deserialize;

use crate::frame::MacAddress;
use crate::guard::{Guard, GuardOptions};
use crate::limit::RateOptions;
use crate::netdev::VlanMode;
use crate::port::{Offer, PortOptions};

/// Most iothreads of one port.
const MAX_IOTHREADS: usize = 127;

/// Everything that a `--port` option says.
pub struct PortArguments {
    /// What the port itself is told.
    pub options: PortOptions,
    /// Where its front-end is met.
    pub address: SocketAddress,
    /// The id of its back-end.
    pub netdev: String,
    /// The ids of its threads.
    pub iothreads: Vec<String>,
    /// The rate of what the guest receives.
    pub rate_rx: RateSetting,
    /// The rate of what the guest sends.
    pub rate_tx: RateSetting,
    /// What the guest may claim to be.
    pub guard: Option<GuardOptions>,
    /// Whether the cable is plugged in at the start.
    pub link: bool,
}

/// Where the front-end of a port is met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketAddress {
    /// Listens at a path.
    Listen(PathBuf),
    /// Connects to a path.
    Connect(PathBuf),
    /// Listens on a descriptor: a number or a name.
    Fd(String),
}

/// A rate, and the group that it is shared with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RateSetting {
    /// The port's own.
    pub rate: RateOptions,
    /// The id of a group.
    pub group: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Words {
    id: String,
    netdev: String,
    socket: String,
    #[serde(default = "yes")]
    server: bool,
    queues: Option<u16>,
    queue_size: Option<u16>,
    mac: Option<MacAddress>,
    mtu: Option<u16>,
    vlan: Option<u16>,
    trunk: Option<String>,
    native: Option<u16>,
    #[serde(default)]
    isolated: bool,
    #[serde(default = "yes")]
    link: bool,
    #[serde(default = "yes")]
    csum: bool,
    #[serde(default = "yes")]
    gso: bool,
    #[serde(default = "yes")]
    mrg_rxbuf: bool,
    #[serde(default = "yes")]
    packed: bool,
    #[serde(default = "yes")]
    in_order: bool,
    #[serde(default = "yes")]
    ctrl_vq: bool,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
struct GroupWord {
    group: Option<String>,
}

impl PortArguments {
    /// Takes the arguments of a port apart.
    ///
    /// # Errors
    /// Names the parameter that is missing, unknown or out of range.
    pub fn parse(mut arguments: Arguments) -> Result<PortArguments> {
        let iothreads = take_list(&mut arguments, "iothread", MAX_IOTHREADS)?;
        let rate_rx = take_rate(&mut arguments, "rate-rx")?.unwrap_or_default();
        let rate_tx = take_rate(&mut arguments, "rate-tx")?.unwrap_or_default();
        let guard = take_guard(&mut arguments)?;
        let words: Words = arguments.parse()?;
        if !qmp::is_identifier(&words.id) {
            return Err(Error::parameter_expects("id", "an identifier"));
        }
        let address = match (words.socket.strip_prefix("fd:"), words.server) {
            (Some(name), true) => SocketAddress::Fd(name.to_owned()),
            (Some(_), false) => {
                return Err(Error::parameter_expects("server", "'on' with socket=fd:"));
            }
            (None, true) => SocketAddress::Listen(words.socket.into()),
            (None, false) => SocketAddress::Connect(words.socket.into()),
        };
        let mut options = PortOptions::new(&words.id, MacAddress::default());
        options.mac = words.mac.unwrap_or_else(|| default_mac(&words.id));
        options.mtu = words.mtu;
        options.queues = words.queues.unwrap_or(options.queues);
        options.queue_size_max = words.queue_size.unwrap_or(options.queue_size_max);
        let vlan = VlanMode::from_options(words.vlan, words.trunk.as_deref(), words.native);
        options.vlan = vlan.map_err(|error| Error::generic(error.to_string()))?;
        options.isolated = words.isolated;
        options.offer = Offer {
            csum: words.csum,
            gso: words.gso,
            mrg_rxbuf: words.mrg_rxbuf,
            packed: words.packed,
            in_order: words.in_order,
            ctrl_vq: words.ctrl_vq,
        };
        let checked = options.check();
        checked.map_err(|error| Error::generic(error.to_string()))?;
        Ok(PortArguments {
            options,
            address,
            netdev: words.netdev,
            iothreads,
            rate_rx,
            rate_tx,
            guard,
            link: words.link,
        })
    }
}

/// A rate: bytes per second as one value, or an object; `None` when it is absent.
///
/// # Errors
/// Names what makes no sense.
pub fn take_rate(arguments: &mut Arguments, key: &str) -> Result<Option<RateSetting>> {
    let path = arguments.path_of(key);
    let mut nested = match arguments.get(key) {
        None => return Ok(None),
        Some(Value::Object(_)) => match arguments.take_object(key)? {
            Some(nested) => nested,
            None => return Ok(None),
        },
        Some(_) => {
            let bytes = arguments.take_value(key).unwrap_or_default();
            let members = qmp::Map::from_iter([("bytes".to_owned(), bytes)]);
            Arguments::new(members, arguments.syntax())
        }
    };
    let rate: RateOptions = nested.take()?;
    let GroupWord { group } = nested.parse()?;
    let checked = rate.check();
    checked.map_err(|error| Error::generic(format!("Parameter '{path}': {error}")))?;
    Ok(Some(RateSetting { rate, group }))
}

/// `guard=on` for the rules that follow from nothing else, `off`, or an object of rules.
///
/// # Errors
/// Names what makes no sense.
pub fn take_guard(arguments: &mut Arguments) -> Result<Option<GuardOptions>> {
    let options = match arguments.get("guard") {
        None => return Ok(None),
        Some(Value::Object(_)) => match arguments.take_object("guard")? {
            Some(rules) => rules.parse()?,
            None => return Ok(None),
        },
        Some(_) => {
            #[derive(Deserialize)]
            struct Word {
                guard: bool,
            }
            match arguments.take::<Word>()?.guard {
                true => GuardOptions::default(),
                false => return Ok(None),
            }
        }
    };
    // Found before anything is opened.
    let guard = Guard::new(options.clone());
    guard.map_err(|error| Error::generic(format!("Parameter 'guard': {error}")))?;
    Ok(Some(options))
}

/// One string, or a list of them.
fn take_list(arguments: &mut Arguments, key: &str, most: usize) -> Result<Vec<String>> {
    let path = arguments.path_of(key);
    let wrong = || Error::parameter_type(&path, "a string or a list of strings");
    let list = match arguments.take_value(key) {
        None => return Ok(Vec::new()),
        Some(Value::String(one)) => return Ok(vec![one]),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(wrong()),
    };
    if list.len() > most {
        let what = format!("at most {most} items");
        return Err(Error::parameter_expects(path, &what));
    }
    let items = list.into_iter().map(|item| match item {
        Value::String(item) => Ok(item),
        _ => Err(wrong()),
    });
    items.collect()
}

/// The address of a port that was given none: the same after a restart, different for other ports and on other machines.
pub fn default_mac(id: &str) -> MacAddress {
    let machine = std::fs::read("/etc/machine-id");
    let machine = machine.or_else(|_| std::fs::read("/proc/sys/kernel/hostname"));
    mac_of(&[&machine.unwrap_or_default(), id.as_bytes()])
}

/// A locally administered address from FNV-1a of `parts`.
fn mac_of(parts: &[&[u8]]) -> MacAddress {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for part in parts {
        for byte in part.iter().chain(&[0xff]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    let [a, b, c, d, e, ..] = hash.to_be_bytes();
    MacAddress([0x02, a, b, c, d, e])
}

#[cfg(test)]
mod tests {
    use super::*;
    use qmp::keyval;

    fn parse(text: &str) -> Result<PortArguments> {
        PortArguments::parse(keyval::parse(text, Some("id"))?)
    }

    fn wrong(text: &str) -> String {
        match parse(text) {
            Ok(_) => panic!("{text} was taken"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_port_is_read_from_key_value_and_from_json_alike() {
        let spellings = [
            "p0,socket=/s,netdev=n,queues=2,mac=52:54:00:00:00:01,mtu=9000,rate-rx=10M,\
             rate-tx.packets=1000,rate-tx.group=g,iothread.0=a,iothread.1=b,csum=off,trunk=20:10",
            r#"{"id": "p0", "socket": "/s", "netdev": "n", "queues": 2, "mac": "52:54:00:00:00:01",
             "mtu": 9000, "rate-rx": 10485760, "rate-tx": {"packets": 1000, "group": "g"},
             "iothread": ["a", "b"], "csum": false, "trunk": "10:20"}"#,
        ];
        for spelling in spellings {
            let port = parse(spelling).unwrap();
            assert_eq!(port.options.queues, 2);
            assert_eq!(port.options.mtu, Some(9000));
            assert_eq!(port.options.mac.to_string(), "52:54:00:00:00:01");
            assert!(!port.options.offer.csum && port.options.offer.gso && port.link);
            assert_eq!(port.rate_rx.rate.bytes, Some(10 << 20));
            assert_eq!(port.rate_tx.rate.packets, Some(1000));
            assert_eq!(port.rate_tx.group.as_deref(), Some("g"));
            assert_eq!(port.iothreads, ["a", "b"]);
            assert_eq!(port.address, SocketAddress::Listen("/s".into()));
            let vlans = vec![10, 20];
            assert_eq!(
                port.options.vlan,
                VlanMode::Trunk {
                    vlans,
                    native: None
                }
            );
        }
        let fd = parse("p0,socket=fd:vhost,netdev=n,guard=on,vlan=7").unwrap();
        assert_eq!(fd.address, SocketAddress::Fd("vhost".into()));
        assert_eq!(fd.guard, Some(GuardOptions::default()));
        assert_eq!(fd.options.vlan, VlanMode::Access(7));
        let connect = parse("p0,socket=/s,server=off,netdev=n").unwrap();
        assert_eq!(connect.address, SocketAddress::Connect("/s".into()));
    }

    #[test]
    fn mistakes_name_the_parameter() {
        for (text, expected) in [
            ("p0,netdev=n", "Parameter 'socket' is missing"),
            (
                "0,socket=/s,netdev=n",
                "Parameter 'id' expects an identifier",
            ),
            ("p0,socket=/s,netdev=n,zz=1", "Parameter 'zz' is unexpected"),
            (
                "p0,socket=/s,netdev=n,queues=0",
                "port 'p0': queues=0 is not between 1 and 127",
            ),
            (
                "p0,socket=/s,netdev=n,rate-rx.bytes-burst=1",
                "Parameter 'rate-rx': 'bytes-burst' needs a rate of bytes",
            ),
            (
                "p0,socket=/s,netdev=n,rate-rx.byte=1",
                "Parameter 'rate-rx.byte' is unexpected",
            ),
            (
                "p0,socket=fd:x,server=off,netdev=n",
                "Parameter 'server' expects 'on' with socket=fd:",
            ),
        ] {
            assert_eq!(wrong(text), expected, "{text}");
        }
    }

    #[test]
    fn an_address_of_ones_own_making_is_stable_and_local() {
        let mac = default_mac("p0");
        assert_eq!(mac, default_mac("p0"));
        assert_ne!(mac, default_mac("p1"));
        assert_eq!(mac.0[0], 0x02);
        assert_ne!(mac_of(&[b"a", b"b"]), mac_of(&[b"ab", b""]));
    }
}
