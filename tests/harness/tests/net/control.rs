//! Command line, QMP and metrics of the network daemon, from outside.

use std::io::{IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::net::Options;
use harness::net::rig::{NetRig, Plan};
use harness::process::workspace_binary;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};

use super::traffic::Traffic;

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn start_up_errors_name_the_option_and_the_cause() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("s").display().to_string();
    let port = format!("--port=id=p,netdev=n,socket={socket}");
    let missing = format!("--port=id=p,netdev=n,socket={socket}/no");
    let null = "--netdev=null,id=n";
    for (arguments, expected) in [
        (&["--zz"][..], "unrecognized option '--zz'"),
        (&["--netdev"], "option '--netdev' requires an argument"),
        (
            &["--netdev", "zz,id=n"],
            "--netdev zz,id=n: Parameter 'type' does not accept value 'zz'",
        ),
        (&[&port], "Device 'n' not found"),
        (&[null, &port, &port], "Duplicate ID 'p' for port"),
        (&[null, &missing], "s/no: Not a directory"),
        (
            &["--metrics", "0.0.0.0:0"],
            "--metrics 0.0.0.0:0: 0.0.0.0:0 is not a loopback address",
        ),
        (
            &["--netdev", "{\"type\": \"null\"}"],
            "Parameter 'id' is missing",
        ),
        (&["--sandbox", "x"], "--sandbox x: expected 'on'"),
    ] {
        // The first socket has to be there for the last but one to be below no directory.
        std::fs::write(&socket, "")?;
        if !arguments.contains(&missing.as_str()) {
            std::fs::remove_file(&socket)?;
        }
        let output = Command::new(workspace_binary("outboard-netd")?)
            .args(arguments)
            .output()?;
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{arguments:?}: {told}");
        ensure!(told.contains(expected), "{arguments:?}: {told}");
        ensure!(told.contains("outboard-netd: "), "{arguments:?}: {told}");
    }
    Ok(())
}

fn port(rig: &NetRig, id: &str) -> Result<Value> {
    let ports = rig.monitor()?.execute("query-ports", json!({}))?;
    let ports = ports.as_array().context("a list of ports")?;
    let found = ports.iter().find(|port| port["id"] == id);
    found.cloned().with_context(|| format!("no port {id}"))
}

#[test]
fn a_port_tells_what_passes_and_who_is_there() -> Result<()> {
    let rig = NetRig::start(&Plan::one("echo"))?;
    let mut monitor = rig.monitor()?;
    let mut device = rig.connect(0, Options::default())?;
    monitor.event("PORT_CONNECTED")?;
    let pair = &mut device.pairs[0];
    Traffic::new(300, &[60, 1514]).carried(&mut pair.tx, &mut pair.rx, LIMIT)?;
    drop(monitor);
    let state = port(&rig, "p0")?;
    ensure!(state["tx"]["frames"] == 300, "{state:#}");
    ensure!(state["rx"]["bytes"] == 150 * (60 + 1514), "{state:#}");
    ensure!(state["connected"] == true, "{state:#}");
    let features = state["features"].as_array().context("features")?;
    ensure!(features.contains(&json!("mrg_rxbuf")), "{state:#}");
    let mut monitor = rig.monitor()?;
    monitor.execute("set_link", json!({"name": "p0", "up": false}))?;
    device.front_end.config_change(LIMIT)?;
    device.front_end.disconnect();
    monitor.event("PORT_DISCONNECTED")?;
    drop(monitor);
    ensure!(port(&rig, "p0")?["link"] == "down");
    Ok(())
}

#[test]
fn a_rate_limit_is_seen_from_outside_and_changes_live() -> Result<()> {
    let plan = Plan::one("echo").with("rate-tx.packets=500,rate-tx.packets-burst=50");
    let rig = NetRig::start(&plan)?;
    let mut device = rig.connect(0, Options::default())?;
    let pair = &mut device.pairs[0];
    let mut timed = || -> Result<Duration> {
        let start = Instant::now();
        Traffic::new(450, &[60]).carried(&mut pair.tx, &mut pair.rx, LIMIT)?;
        Ok(start.elapsed())
    };
    // 400 frames beyond the burst, of which one batch may be owed.
    let limited = timed()?;
    ensure!(limited > Duration::from_millis(700), "{limited:?}");
    let mut monitor = rig.monitor()?;
    monitor.execute("set-port-rate", json!({"id": "p0", "rate-tx": 0}))?;
    let free = timed()?;
    ensure!(free < limited / 2, "{free:?} after {limited:?}");
    Ok(())
}

#[test]
fn ports_come_and_go_while_others_carry_traffic() -> Result<()> {
    let rig = NetRig::start(&Plan::one("echo"))?;
    let mut device = rig.connect(0, Options::default())?;
    let mut monitor = rig.monitor()?;
    let socket = rig.socket(7).display().to_string();
    std::thread::scope(|scope| {
        let traffic = scope.spawn(move || {
            let pair = &mut device.pairs[0];
            Traffic::new(3000, &[60, 800]).carried(&mut pair.tx, &mut pair.rx, LIMIT)
        });
        for round in 0..10 {
            let netdev = json!({"type": "null", "id": "extra"});
            monitor.execute("netdev_add", netdev)?;
            let port = json!({"id": "p7", "netdev": "extra", "socket": socket, "queues": 2});
            monitor.execute("port-add", port)?;
            let guest = rig.connect(7, Options::default().pairs(2))?;
            let used = monitor.execute("netdev_del", json!({"id": "extra"}));
            ensure!(used.is_err(), "round {round}: a netdev in use was removed");
            monitor.execute("port-del", json!({"id": "p7"}))?;
            guest.front_end.hung_up(LIMIT)?;
            monitor.execute("netdev_del", json!({"id": "extra"}))?;
            ensure!(!rig.socket(7).exists());
        }
        traffic.join().expect("the traffic's thread")
    })?;
    // The monitor serves one client at a time.
    drop(monitor);
    ensure!(port(&rig, "p0")?["tx"]["dropped"] == 0);
    Ok(())
}

fn http(socket: &Path, request: &[u8]) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    // A peer that has seen enough may close before everything is sent.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[test]
fn metrics_are_scraped_and_strange_clients_survived() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("metrics");
    let plan = Plan::one("echo").arguments(&format!("--metrics {}", socket.display()));
    let rig = NetRig::start(&plan)?;
    let mut device = rig.connect(0, Options::default())?;
    let pair = &mut device.pairs[0];
    Traffic::new(100, &[60]).carried(&mut pair.tx, &mut pair.rx, LIMIT)?;
    // Clients that say nothing hold nobody up.
    let silent: Vec<_> = (0..8)
        .map(|_| UnixStream::connect(&socket))
        .collect::<Result<_, _>>()?;
    let long = [b"GET / HTTP/1.1\r\nX: ".as_slice(), &[b'x'; 20 << 10]].concat();
    for (request, expected) in [
        (&b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"[..], "200 OK"),
        (b"GET /etc/passwd HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", "400 Bad Request"),
        (&long, "431 Request Header Fields Too Large"),
    ] {
        let answer = http(&socket, request)?;
        ensure!(
            answer.starts_with(&format!("HTTP/1.1 {expected}\r\n")),
            "{expected}: {answer}"
        );
    }
    let answer = http(&socket, b"GET /metrics HTTP/1.0\r\n\r\n")?;
    for line in [
        r#"outboard_port_frames_total{port="p0",pair="0",direction="tx"} 100"#,
        r#"outboard_port_bytes_total{port="p0",pair="0",direction="rx"} 6000"#,
        r#"outboard_port_connected{port="p0",netdev="n0"} 1"#,
    ] {
        ensure!(answer.lines().any(|known| known == line), "{answer}");
    }
    drop(silent);
    Ok(())
}

#[test]
fn garbage_at_the_monitor_is_answered_and_survived() -> Result<()> {
    let rig = NetRig::start(&Plan::one("null"))?;
    for input in [
        b"\0\xff\xfe{{{{".as_slice(),
        b"{\"execute\": \"port-add\", \"arguments\": []}",
        &[b'['; 4096],
    ] {
        let mut stream = UnixStream::connect(rig.directory().join("qmp.sock"))?;
        stream.write_all(input)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.contains("\"error\""), "{answer}");
    }
    let mut monitor = rig.monitor()?;
    for (command, arguments) in [
        ("port-add", json!({"id": "x", "netdev": "n0", "socket": 5})),
        (
            "port-add",
            json!({"id": "x", "netdev": "n0", "socket": "/", "queues": 70000}),
        ),
        (
            "set-port-rate",
            json!({"id": "p0", "rate-rx": {"bytes": -1}}),
        ),
        (
            "set-port-guard",
            json!({"id": "p0", "guard": {"ipv4": ["1.2.3.4/99"]}}),
        ),
        (
            "capture-start",
            json!({"id": "p0", "file": "/proc/self/mem"}),
        ),
        ("netdev_add", json!({"type": "tap", "id": "t", "fd": "0"})),
    ] {
        ensure!(monitor.execute(command, arguments).is_err(), "{command}");
    }
    monitor.execute("query-status", json!({}))?;
    Ok(())
}

#[test]
fn a_serving_daemon_takes_sockets_by_descriptor_and_is_restricted() -> Result<()> {
    let rig = NetRig::start(&Plan::one("echo"))?;
    let mut stream = UnixStream::connect(rig.directory().join("qmp.sock"))?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut reader = std::io::BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    std::io::BufRead::read_line(&mut reader, &mut line)?;
    let path = rig.directory().join("passed");
    let listener = UnixListener::bind(&path)?;
    stream.write_all(b"{\"execute\": \"qmp_capabilities\"}")?;
    let getfd = b"{\"execute\": \"getfd\", \"arguments\": {\"fdname\": \"mine\"}}";
    let fds = [listener.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    let data = [IoSlice::new(getfd)];
    sendmsg::<()>(stream.as_raw_fd(), &data, &control, MsgFlags::empty(), None)?;
    stream.write_all(
        b"{\"execute\": \"port-add\", \"arguments\": {\"id\": \"p9\", \"netdev\": \"n0\", \"socket\": \"fd:mine\"}}",
    )?;
    for _ in 0..3 {
        line.clear();
        std::io::BufRead::read_line(&mut reader, &mut line)?;
        ensure!(line.contains("\"return\""), "{line}");
    }
    drop((stream, reader));
    let mut device = harness::net::NetDevice::connect(
        harness::driver::Endpoint::Connect(path),
        Options::default(),
    )?;
    let pair = &mut device.pairs[0];
    Traffic::new(100, &[60]).carried(&mut pair.tx, &mut pair.rx, LIMIT)?;
    // A thread that exists, one of a port that came later, and the control thread.
    let mut threads = 0;
    for task in std::fs::read_dir(format!("/proc/{}/task", rig.daemon.pid()))? {
        let task = task?.path();
        let status = std::fs::read_to_string(task.join("status"))?;
        let name = std::fs::read_to_string(task.join("comm"))?;
        if name.starts_with("iou-") {
            // The kernel's own.
            continue;
        }
        threads += 1;
        ensure!(status.contains("Seccomp:\t2"), "{name}: {status}");
        ensure!(status.contains("CapEff:\t0000000000000000"), "{name}");
    }
    ensure!(threads >= 3, "{threads} threads");
    Ok(())
}

#[test]
fn an_idle_daemon_uses_no_cpu() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let metrics = directory.path().join("metrics");
    let plan = Plan::one("echo").arguments(&format!("--metrics {}", metrics.display()));
    let rig = NetRig::start(&plan)?;
    let mut device = rig.connect(0, Options::default())?;
    let pair = &mut device.pairs[0];
    Traffic::new(500, &[60]).carried(&mut pair.tx, &mut pair.rx, LIMIT)?;
    let window = Duration::from_secs(1);
    let settling = Duration::from_millis(50);
    let used = rig.daemon.cpu_time_within(settling, window)?;
    ensure!(used < window / 200, "{used:?} of CPU in {window:?}");
    Ok(())
}
