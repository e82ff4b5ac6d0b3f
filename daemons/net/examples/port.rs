//! One port on a measuring back-end, without the rest of the daemon: `port null|echo SOCKET`.
//!
//! What remains of a frame's cost here is the port's own.

use std::rc::Rc;

use executor::{Config, Executor, Handle};
use netd::frame::MacAddress;
use netd::netdevs::{Context, NetdevOptions, open};
use netd::port::{Port, PortHooks, PortOptions};
use vhost_daemon::Address;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(kind), Some(socket)) = (arguments.next(), arguments.next()) else {
        anyhow::bail!("usage: port null|echo SOCKET");
    };
    let netdev: NetdevOptions = qmp::keyval::parse(&kind, Some("type"))?.parse()?;
    let executor = Executor::new(&Config::default())?;
    executor.block_on(async {
        let context = Context {
            id: "n0",
            descriptor: &|name| anyhow::bail!("there is no descriptor '{name}'"),
            thread: &|_| Ok(Handle::current()),
            notice: Rc::new(|_| ()),
        };
        let netdev = open(&netdev, &context)?;
        let options = PortOptions::new("p0", MacAddress([0x52, 0x54, 0, 0, 0, 1]));
        let hooks = PortHooks::new(options.queues);
        let address = Address::Listen(socket.into());
        let _port = Port::start(options, Rc::clone(&netdev), address, vec![], hooks).await?;
        std::future::pending::<anyhow::Result<()>>().await
    })
}
