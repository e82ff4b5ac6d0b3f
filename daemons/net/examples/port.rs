//! Ports on one back-end, without the rest of the daemon: `port null|echo SOCKET`, `port switch SOCKET SOCKET...`.
//!
//! What remains of a frame's cost on a measuring back-end is the port's own.

use std::rc::Rc;

use anyhow::Context as _;
use executor::{Config, Executor, Handle};
use netd::frame::MacAddress;
use netd::netdevs::{Context, NetdevOptions, open};
use netd::port::{Port, PortHooks, PortOptions};
use vhost_daemon::Address;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: port null|echo|switch[,OPTIONS...] SOCKET...";
    let kind = arguments.next().context(usage)?;
    let sockets: Vec<String> = arguments.collect();
    anyhow::ensure!(!sockets.is_empty(), usage);
    let netdev: NetdevOptions = qmp::keyval::parse(&kind, Some("type"))?.parse()?;
    let executor = Executor::new(&Config::default())?;
    executor.block_on(async {
        let context = Context {
            id: "n0",
            descriptor: &|name| anyhow::bail!("there is no descriptor '{name}'"),
            thread: &|_| Ok(Handle::current()),
            netdev: &|name| anyhow::bail!("there is no netdev '{name}'"),
            notice: Rc::new(|_| ()),
        };
        let netdev = open(&netdev, &context)?;
        let mut ports = Vec::new();
        for (number, socket) in (1..).zip(sockets) {
            let mac = MacAddress([0x52, 0x54, 0, 0, 0, number]);
            let options = PortOptions::new(&format!("p{number}"), mac);
            let hooks = PortHooks::new(options.queues);
            let address = Address::Listen(socket.into());
            ports.push(Port::start(options, Rc::clone(&netdev), address, vec![], hooks).await?);
        }
        std::future::pending::<anyhow::Result<()>>().await
    })
}
