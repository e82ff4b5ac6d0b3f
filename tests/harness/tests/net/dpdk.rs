//! DPDK's virtio-user driver as the guest.

use anyhow::{Context, Result, ensure};
use harness::net::rig::{NetRig, Plan};
use harness::net::testpmd::{Setup, Testpmd};

/// Frames that have to pass in each shape.
const FRAMES: u64 = 20_000;

const SHAPES: [&str; 6] = [
    "",
    "packed_vq=1",
    "mrg_rxbuf=0",
    "in_order=0",
    "packed_vq=1,mrg_rxbuf=0,in_order=0",
    "mrg_rxbuf=0,in_order=0",
];

fn echoes(queues: u16, arguments: &str) -> Result<()> {
    let rig = NetRig::start(&Plan::one("type=echo").with(&format!("queues={queues}")))?;
    let setup = Setup::front_end(&rig.socket(0), "io", queues, arguments);
    let mut testpmd = Testpmd::start(&setup, None)?;
    // Fewer than a ring holds, so that none is dropped: they circulate.
    testpmd.forward_bursts(2)?;
    let counters = testpmd.wait_for(|c| c.rx_frames >= FRAMES)?;
    ensure!(counters.rx_bytes / counters.rx_frames == 64, "{counters:?}");
    let text = testpmd.stop()?;
    let dropped = text
        .lines()
        .filter(|line| line.contains("TX-dropped: 0 "))
        .count();
    ensure!(dropped > 0, "{text}");
    Ok(())
}

#[test]
fn dpdk_gets_its_frames_back() -> Result<()> {
    for arguments in SHAPES {
        echoes(1, arguments).with_context(|| format!("virtio-user with {arguments:?}"))?;
    }
    Ok(())
}

#[test]
fn dpdk_gets_its_frames_back_on_two_queues() -> Result<()> {
    for arguments in ["", "packed_vq=1"] {
        echoes(2, arguments).with_context(|| format!("virtio-user with {arguments:?}"))?;
    }
    Ok(())
}

#[test]
fn dpdk_sends_into_null() -> Result<()> {
    for arguments in SHAPES {
        let rig = NetRig::start(&Plan::one("type=null"))?;
        let setup = Setup::front_end(&rig.socket(0), "txonly", 1, arguments);
        let mut testpmd = Testpmd::start(&setup, None)?;
        testpmd.forward()?;
        testpmd
            .wait_for(|c| c.tx_frames >= FRAMES)
            .with_context(|| format!("virtio-user with {arguments:?}"))?;
    }
    Ok(())
}
