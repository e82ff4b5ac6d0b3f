//! Key slots that change while a load runs.

use std::process::Command;
use std::rc::Rc;

use block::create::Target;
use block::{Buffer, Permissions, Root, RootHandle, WriteFlags};
use qmp::{Value, json};

use crate::Engine;
use crate::tests::{engine, on_executor, run};

const LENGTH: u64 = 1 << 20;

async fn ok(engine: &Rc<Engine>, command: &str, arguments: Value) -> Value {
    run(engine, command, arguments).await.unwrap()
}

async fn with_secrets() -> Rc<Engine> {
    let engine = engine();
    for (id, data) in [("old", "first word"), ("new", "second word")] {
        let secret = json!({"qom-type": "secret", "id": id, "data": data});
        ok(&engine, "object-add", secret).await;
    }
    engine
}

async fn image(engine: &Engine, driver: &str, path: &str) {
    let mut members = json!({"key-secret": "old", "iter-time": 10});
    if driver == "qcow2" {
        members["format"] = json!("luks");
        members = json!({ "encrypt": members });
    }
    members["size"] = json!(LENGTH);
    let Value::Object(members) = members else {
        unreachable!()
    };
    let target = Target::Name(path.to_owned());
    engine.graph.create(driver, target, members).await.unwrap();
}

/// Writes until the job `j` has concluded; how many writes that were.
async fn load(engine: &Rc<Engine>, handle: &RootHandle) -> u64 {
    for writes in 0.. {
        let buffer = Buffer::zeroed(4096);
        buffer.fill(7);
        let offset = writes * 4096 % LENGTH;
        let written = handle.write(offset, buffer, WriteFlags::default()).await;
        written.unwrap();
        let jobs = ok(engine, "query-jobs", json!({})).await;
        if jobs[0]["status"] == "concluded" {
            assert_eq!(jobs[0].get("error"), None, "{jobs}");
            return writes + 1;
        }
    }
    unreachable!("a job ends")
}

fn peer_reads(options: &str) {
    let read = Command::new("qemu-io")
        .args(["--object", "secret,id=s,data=second word"])
        .args(["--image-opts", options, "-c", "read -P 7 0 4096"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&read.stdout);
    assert!(read.status.success(), "{text}");
    assert!(text.contains("read 4096/4096"), "{text}");
}

#[test]
fn a_key_added_under_load_opens_the_image() {
    let directory = tempfile::tempdir().unwrap();
    for (driver, key, node_prefix) in [("luks", "", ""), ("qcow2", "encrypt", "encrypt.")] {
        let path = directory.path().join(driver).display().to_string();
        on_executor(async {
            let engine = with_secrets().await;
            image(&engine, driver, &path).await;
            let file = json!({"driver": "file", "filename": path});
            let mut node = json!({"driver": driver, "node-name": "n", "file": file});
            let mut change =
                json!({"state": "active", "new-secret": "new", "iter-time": 10, "keyslot": 3});
            match key {
                "" => node["key-secret"] = json!("old"),
                _ => {
                    node[key] = json!({"format": "luks", "key-secret": "old"});
                    change["format"] = json!("luks");
                    change = json!({ key: change });
                }
            }
            change["driver"] = json!(driver);
            ok(&engine, "blockdev-add", node).await;
            let known = engine.graph.node("n").unwrap();
            let root = Root::new("", &known, Permissions::READ_WRITE, Permissions::ALL).unwrap();
            drop(known);
            let amend = json!({"job-id": "j", "node-name": "n", "options": change});
            ok(&engine, "x-blockdev-amend", amend.clone()).await;
            let handle = root.attach();
            assert!(load(&engine, &handle).await > 0);
            let held = run(&engine, "blockdev-del", json!({"node-name": "n"})).await;
            assert_eq!(held.unwrap_err(), "Node n is in use");
            ok(&engine, "job-dismiss", json!({"id": "j"})).await;
            ok(&engine, "x-blockdev-amend", amend).await;
            let again = ok(&engine, "query-jobs", json!({})).await;
            assert_eq!(
                again[0]["error"],
                "Refusing to overwrite active keyslot 3 - please erase it first"
            );
            drop((handle, root));
            engine.shut_down().await.unwrap();
        });
        peer_reads(&format!(
            "driver={driver},{node_prefix}key-secret=s,file.driver=file,file.filename={path}"
        ));
    }
}
