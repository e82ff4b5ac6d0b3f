//! Test harness: what drives and judges the daemons from outside.
//!
//! - [`driver`]: an in-process virtio-blk driver over a memfd; no VM needed.
//! - [`oracle`]: knows what every sector may hold and judges reads.
//! - [`load`]: random verified requests on a queue; [`progress`] lets others wait for them.
//! - [`process`], [`qmp_client`], [`peer`]: daemons, their monitors, and QEMU's tools.
//! - [`rig`]: a disk image with its daemon; [`supervisor`] interrupts it under load.
//! - [`ramdisk`]: an independent back-end that the driver itself is tested against.
//! - [`fuzz_frontend`]: a front-end that means harm.
//! - [`nested`]: a machine with a working KVM in software; [`scene`]: a real guest, its VMM and its daemons.
//! - [`transfer`]: bytes over TCP that both ends check.
//! - [`conformance`]: what every driver and format must pass, on the simulated world.
//! - [`net`]: an in-process virtio-net driver, the network daemon, and its peers.
//! - [`web_server`]: a web server with bad habits.
//! - [`wire`]: vhost-user messages as bytes.

pub mod conformance;
pub mod driver;
pub mod fuzz_frontend;
pub mod load;
pub mod nested;
pub mod net;
pub mod oracle;
pub mod peer;
pub mod process;
pub mod progress;
pub mod qmp_client;
pub mod ramdisk;
pub mod rig;
pub mod scene;
pub mod supervisor;
pub mod transfer;
pub mod web_server;
pub mod wire;
