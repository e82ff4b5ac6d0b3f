//! The driver against DPDK's back-end: what it takes for right is what others do, too.

use std::time::Duration;

use anyhow::{Context, Result};
use harness::driver::Endpoint;
use harness::net::features::{bits, ring_bits};
use harness::net::testpmd::{Setup, Testpmd};
use harness::net::{NetDevice, Options};

use crate::traffic::Traffic;

const LIMIT: Duration = Duration::from_secs(30);

/// Frames that DPDK's back-end takes without more configuration: up to the usual MTU.
const LENGTHS: [usize; 6] = [60, 64, 65, 590, 1500, 1514];

#[test]
fn dpdk_understands_the_driver() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let sockets = ["a.sock", "b.sock"].map(|name| directory.path().join(name));
    let mut testpmd = Testpmd::start(&Setup::wire([&sockets[0], &sockets[1]]), None)?;
    let all = Options::default();
    let shapes = [
        ("split", all.clone()),
        ("packed", all.clone().packed()),
        ("whole buffers", all.clone().without(bits::MRG_RXBUF)),
        ("out of order", all.clone().without(ring_bits::IN_ORDER)),
        (
            "packed, no indirect tables",
            all.clone().packed().without(ring_bits::RING_INDIRECT_DESC),
        ),
        ("flags", all.without(ring_bits::RING_EVENT_IDX)),
    ];
    for (name, options) in shapes {
        let connect = |at: usize| {
            let endpoint = Endpoint::Connect(sockets[at].clone());
            NetDevice::connect(endpoint, options.clone())
        };
        let (mut here, mut there) = (connect(0)?, connect(1)?);
        // Frames are dropped until testpmd has seen both links, so it starts after them.
        testpmd.forward()?;
        let mut traffic = Traffic::new(500, &LENGTHS);
        traffic.cuts = vec![vec![], vec![12], vec![12, 20], vec![26]];
        let (one, other) = (&mut here.pairs[0], &mut there.pairs[0]);
        traffic
            .carried(&mut one.tx, &mut other.rx, LIMIT)
            .and_then(|()| traffic.carried(&mut other.tx, &mut one.rx, LIMIT))
            .with_context(|| format!("{name}: {:?}", [0, 1].map(|port| testpmd.counters(port))))?;
        testpmd.stop()?;
    }
    Ok(())
}
