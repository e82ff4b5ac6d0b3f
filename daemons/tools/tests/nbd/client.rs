//! Our client: options that only it has use for.

use crate::{IMG, OWN, PEER, Place, output};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

/// The options of an export on a socket.
fn options(socket: &str, more: &str) -> String {
    format!("driver=nbd,server.type=unix,server.path={socket}{more}")
}

#[test]
fn marks_of_other_contexts_are_shown_as_the_peer_shows_them() {
    let place = Place::new();
    let image = place.path("a.qcow2");
    for name in ["b", "c"] {
        output(
            "qemu-img",
            &["bitmap", "--add", "-f", "qcow2", &image, name],
        );
    }
    output("qemu-io", &["-f", "qcow2", "-c", "write 2M 128k", &image]);
    for program in [OWN, PEER] {
        let server = place.serve(
            program,
            &["-t", "-r", "-f", "qcow2", "-A", "-B", "b", "-B", "c"],
        );
        let socket = server.socket.display().to_string();
        for context in [
            "qemu:dirty-bitmap:b",
            "qemu:dirty-bitmap:c",
            "qemu:allocation-depth",
        ] {
            let options = options(&socket, &format!(",x-dirty-bitmap={context}"));
            let [ours, theirs] = [IMG, "qemu-img"]
                .map(|img| output(img, &["map", "--output=json", "--image-opts", &options]));
            assert_eq!(ours, theirs, "{program}, {context}");
            assert!(ours.contains("\"present\": "), "{ours}");
        }
        let missing = options(&socket, ",x-dirty-bitmap=qemu:dirty-bitmap:none");
        let failed = Command::new(IMG)
            .args(["map", "--image-opts", &missing])
            .output()
            .expect("it runs");
        let text = String::from_utf8_lossy(&failed.stderr).into_owned();
        let expected = "requested x-dirty-bitmap qemu:dirty-bitmap:none not found";
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn opening_waits_for_a_server_as_long_as_it_is_told_to() {
    let place = Place::new();
    let (socket, image) = (place.path("socket"), place.path("a.qcow2"));
    let options = options(&socket, ",open-timeout=60");
    // Sends the first client away, so that it is known to have tried.
    let busy = UnixListener::bind(&socket).expect("a socket");
    let client = Command::new(IMG)
        .args(["info", "--output=json", "--image-opts", &options])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it runs");
    drop(busy.accept().expect("a client"));
    drop(busy);
    std::fs::remove_file(&socket).expect("the socket");
    assert!(std::fs::exists(&image).expect("the image"));
    let _server = place.serve(OWN, &["-t", "-r", "-f", "qcow2"]);
    let done = client.wait_with_output().expect("it ends");
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{text}");
    assert!(text.contains("\"virtual-size\": 8388608"), "{text}");
}
