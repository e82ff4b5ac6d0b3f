//! The commands on a real executor, without guests.

use super::*;
use executor::{Config, Executor};
use qmp::{json, keyval};
use service::Start;

/// Hears every event.
#[derive(Default)]
struct Heard {
    names: RefCell<Vec<&'static str>>,
    changed: Latch,
}

impl EventSink for Heard {
    fn event(&self, event: &Event) {
        self.names.borrow_mut().push(event.name());
        self.changed.set();
    }
}

fn run(test: impl AsyncFnOnce(Rc<Netd>, &std::path::Path)) {
    let directory = tempfile::tempdir().unwrap();
    let executor = Executor::new(&Config::default()).unwrap();
    executor.block_on(async {
        let options = Options::default();
        let version = Version::announced("test");
        let netd = Netd::new(
            &options,
            Start {
                fds: NamedFds::default(),
                version,
                chardevs: Rc::default(),
            },
        )
        .unwrap();
        test(Rc::clone(&netd), directory.path()).await;
        netd.shut_down().await.unwrap();
    });
}

async fn ask(netd: &Rc<Netd>, command: &str, arguments: &str) -> qmp::Result<Value> {
    let arguments = keyval::parse(arguments, Some("id")).unwrap();
    let mut fds = VecDeque::new();
    netd.command(command, arguments, &mut fds).await
}

async fn ok(netd: &Rc<Netd>, command: &str, arguments: &str) -> Value {
    let answer = ask(netd, command, arguments).await;
    answer.unwrap_or_else(|error| panic!("{command} {arguments}: {error}"))
}

async fn refused(netd: &Rc<Netd>, command: &str, arguments: &str) -> String {
    let answer = ask(netd, command, arguments).await;
    answer.expect_err(command).to_string()
}

#[test]
fn what_is_in_use_is_not_deleted() {
    run(async |netd, at| {
        let socket = at.join("s").display().to_string();
        ok(&netd, "object-add", "io,qom-type=iothread").await;
        ok(&netd, "group-add", "g,bytes=1M").await;
        ok(&netd, "netdev_add", "n,type=null").await;
        let port = format!("p,socket={socket},netdev=n,iothread=io,rate-tx.group=g");
        ok(&netd, "port-add", &port).await;
        for (command, id, expected) in [
            (
                "object-del",
                "io",
                "object 'io' is in use, can not be deleted",
            ),
            ("group-del", "g", "group 'g' is in use by port 'p'"),
            ("netdev_del", "n", "netdev 'n' is in use by port 'p'"),
        ] {
            assert_eq!(refused(&netd, command, id).await, expected);
        }
        assert!(at.join("s").exists());
        ok(&netd, "port-del", "p").await;
        assert!(!at.join("s").exists());
        for (command, id) in [
            ("netdev_del", "n"),
            ("group-del", "g"),
            ("object-del", "io"),
        ] {
            ok(&netd, command, id).await;
            let again = refused(&netd, command, id).await;
            assert!(again.ends_with("not found"), "{again}");
        }
    });
}

#[test]
fn an_uplink_is_in_use_by_its_switch() {
    run(async |netd, _at| {
        ok(&netd, "netdev_add", "up,type=null").await;
        ok(&netd, "netdev_add", "sw,type=switch,uplink=up").await;
        let expected = "netdev 'up' is in use by netdev 'sw'";
        assert_eq!(refused(&netd, "netdev_del", "up").await, expected);
        ok(&netd, "netdev_del", "sw").await;
        ok(&netd, "netdev_del", "up").await;
    });
}

#[test]
fn errors_name_what_is_wrong_and_leave_nothing_behind() {
    run(async |netd, at| {
        let socket = at.join("s").display().to_string();
        ok(&netd, "netdev_add", "n,type=echo").await;
        for (command, arguments, expected) in [
            (
                "netdev_add",
                "n,type=null",
                "Duplicate ID 'n' for netdev".into(),
            ),
            ("netdev_add", "m", "Parameter 'type' is missing".into()),
            (
                "netdev_add",
                "m,type=zz",
                "Parameter 'type' does not accept value 'zz'".into(),
            ),
            (
                "netdev_add",
                "m,type=null,zz=1",
                "Parameter 'zz' is unexpected".into(),
            ),
            ("netdev_del", "m", "Device 'm' not found".into()),
            (
                "port-add",
                &*format!("p,socket={socket},netdev=m"),
                "Device 'm' not found".into(),
            ),
            (
                "port-add",
                &*format!("p,socket={socket},netdev=n,iothread=io"),
                "iothread \"io\" not found".into(),
            ),
            (
                "port-add",
                &*format!("p,socket={socket},netdev=n,rate-rx.group=g"),
                "group 'g' not found".into(),
            ),
            (
                "port-add",
                "p,socket=fd:zz,netdev=n",
                "No file descriptor named 'zz' was passed".into(),
            ),
            ("set_link", "name=p,up=on", "Device 'p' not found".into()),
            ("port-del", "p", "Device 'p' not found".into()),
            ("capture-stop", "p", "Device 'p' not found".into()),
            ("set-group-rate", "g,bytes=1", "group 'g' not found".into()),
            (
                "group-add",
                "g,bytes-burst=1",
                "'bytes-burst' needs a rate of bytes".to_owned(),
            ),
            (
                "getfd",
                "fdname=x",
                "No file descriptor supplied via SCM_RIGHTS".into(),
            ),
        ] {
            let told = refused(&netd, command, arguments).await;
            assert_eq!(told, expected, "{command} {arguments}");
        }
        let missing = format!("p,socket={}/no/s,netdev=n", at.display());
        let told = refused(&netd, "port-add", &missing).await;
        assert!(
            told.contains("no/s") && told.contains("No such file"),
            "{told}"
        );
        assert_eq!(ok(&netd, "query-ports", "").await, json!([]));
        let port = format!("p,socket={socket},netdev=n");
        ok(&netd, "port-add", &port).await;
        let told = refused(&netd, "port-add", &port).await;
        assert_eq!(told, "Duplicate ID 'p' for port");
    });
}

#[test]
fn a_port_tells_what_it_is() {
    run(async |netd, at| {
        let socket = at.join("s").display().to_string();
        ok(&netd, "netdev_add", "n,type=null").await;
        let port = format!(
            "p,socket={socket},netdev=n,queues=2,mac=52:54:00:00:00:07,mtu=1400,link=off,rate-rx=1M,guard=on"
        );
        ok(&netd, "port-add", &port).await;
        let ports = ok(&netd, "query-ports", "").await;
        let port = &ports[0];
        for (member, expected) in [
            ("id", json!("p")),
            ("netdev", json!("n")),
            ("netdev-type", json!("null")),
            ("socket", json!(socket)),
            ("server", json!(true)),
            ("queues", json!(2)),
            ("connected", json!(false)),
            ("link", json!("down")),
            ("mac", json!("52:54:00:00:00:07")),
            ("mtu", json!(1400)),
            ("rings", json!([])),
        ] {
            assert_eq!(port[member], expected, "{member}");
        }
        assert_eq!(port["rate-rx"]["bytes"], json!(1 << 20));
        assert_eq!(port["tx"]["frames"], json!(0));
        assert_eq!(port["pairs"].as_array().unwrap().len(), 2);
        assert!(port["guard"].is_object());
        ok(&netd, "set_link", "name=n,up=on").await;
        ok(&netd, "set-port-rate", "p,rate-rx=0,rate-tx.packets=5").await;
        ok(&netd, "set-port-guard", "p,guard=off").await;
        let ports = ok(&netd, "query-ports", "").await;
        assert_eq!(ports[0]["link"], json!("up"));
        assert_eq!(ports[0]["rate-tx"]["packets"], json!(5));
        assert!(ports[0].get("guard").is_none());
        let netdevs = ok(&netd, "query-netdevs", "").await;
        assert_eq!(netdevs[0]["ports"], json!(["p"]));
        let numbers = netd.numbers();
        assert!(numbers[0].link && numbers[0].pairs.len() == 2);
    });
}

#[test]
fn switches_tell_their_stations_and_keep_their_uplinks() {
    run(async |netd, at| {
        ok(&netd, "netdev_add", "up,type=null").await;
        ok(&netd, "netdev_add", "s,type=switch,uplink=up,trunk=10:20").await;
        let socket = at.join("s").display().to_string();
        ok(
            &netd,
            "port-add",
            &format!("p,socket={socket},netdev=s,vlan=10"),
        )
        .await;
        let expected = json!([{ "id": "s", "stations": [] }]);
        assert_eq!(ok(&netd, "query-switch", "").await, expected);
        assert_eq!(ok(&netd, "query-switch", "id=s").await, expected);
        let told = refused(&netd, "query-switch", "id=up").await;
        assert_eq!(told, "netdev 'up' is not a switch");
        refused(&netd, "netdev_del", "up").await;
        let netdevs = ok(&netd, "query-netdevs", "").await;
        let switch = netdevs.as_array().unwrap().iter().find(|n| n["id"] == "s");
        assert!(
            switch
                .unwrap()
                .to_string()
                .contains(r#""uplink-running":true"#)
        );
    });
}

#[test]
fn limits_come_change_and_go_under_a_port() {
    run(async |netd, at| {
        let socket = at.join("s").display().to_string();
        ok(&netd, "netdev_add", "n,type=null").await;
        ok(&netd, "group-add", "g,packets=10").await;
        ok(&netd, "port-add", &format!("p,socket={socket},netdev=n")).await;
        let limits = || netd.ports.borrow()[0].hooks().rx_limits.get();
        assert!(limits().is_none());
        ok(&netd, "set-port-rate", "p,rate-rx=1M").await;
        let first = limits().unwrap();
        ok(&netd, "set-port-rate", "p,rate-rx=2M").await;
        assert!(std::sync::Arc::ptr_eq(&first, &limits().unwrap()));
        assert_eq!(first.rate().bytes, Some(2 << 20));
        ok(&netd, "set-port-rate", "p,rate-rx.group=g").await;
        assert!(!std::sync::Arc::ptr_eq(&first, &limits().unwrap()));
        // Whoever still waits at the old ones is let go.
        assert!(!first.rate().is_limited());
        let told = refused(&netd, "set-port-rate", "p,rate-tx=1,rate-rx.group=zz").await;
        assert_eq!(told, "group 'zz' not found");
        ok(&netd, "set-group-rate", "g,packets=20").await;
        let groups = ok(&netd, "query-groups", "").await;
        assert_eq!(groups[0]["rate"]["packets"], json!(20));
        assert_eq!(groups[0]["ports"], json!(["p"]));
        ok(&netd, "set-port-rate", "p,rate-rx=0").await;
        assert!(limits().is_none());
    });
}

#[test]
fn a_capture_starts_once_and_ends_with_its_port() {
    run(async |netd, at| {
        let (socket, file) = (at.join("s"), at.join("c.pcapng"));
        ok(&netd, "netdev_add", "n,type=null").await;
        let port = format!("p,socket={},netdev=n", socket.display());
        ok(&netd, "port-add", &port).await;
        let capture = format!("p,file={}", file.display());
        ok(&netd, "capture-start", &capture).await;
        let again = refused(&netd, "capture-start", &capture).await;
        assert!(again.contains("running already"), "{again}");
        let ports = ok(&netd, "query-ports", "").await;
        assert_eq!(ports[0]["capture"]["lost"], json!(0));
        let stopped = ok(&netd, "capture-stop", "p").await;
        assert_eq!(stopped["frames"], json!(0));
        let none = refused(&netd, "capture-stop", "p").await;
        assert_eq!(none, "port 'p' has no capture");
        ok(&netd, "capture-start", &capture).await;
        ok(&netd, "port-del", "p").await;
        assert!(std::fs::metadata(&file).unwrap().len() > 0);
    });
}

#[test]
fn back_ends_that_talk_of_peers_make_events() {
    run(async |netd, at| {
        let heard = Rc::new(Heard::default());
        let sink: Rc<dyn EventSink> = heard.clone();
        Server::subscribe(&*netd, &sink);
        let path = at.join("peer").display().to_string();
        let netdev = format!("n,type=stream,server=on,addr.type=unix,addr.path={path}");
        ok(&netd, "netdev_add", &netdev).await;
        let port = format!("p,socket={},netdev=n", at.join("s").display());
        ok(&netd, "port-add", &port).await;
        let peer = executor::net::Stream::connect_unix(std::path::Path::new(&path));
        let peer = peer.await.unwrap();
        let limit = std::time::Duration::from_secs(60);
        let told = executor::time::timeout(limit, heard.changed.wait()).await;
        assert!(told.is_some(), "no event");
        assert_eq!(*heard.names.borrow(), ["NETDEV_STREAM_CONNECTED"]);
        drop(peer);
    });
}
