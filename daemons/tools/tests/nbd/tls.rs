//! TLS: our server and client with the peer's, by certificates and by shared keys.

use crate::{IO, OWN, PEER, Place, Server, output};
use std::fs;
use std::process::Command;

impl Place {
    /// A certificate authority `ca`, and certificates for a server at `localhost` and a client, as QEMU names the files.
    fn certificates(&self) -> String {
        let dir = self.path("tls");
        fs::create_dir(&dir).expect("a directory");
        let file = |name: &str| format!("{dir}/{name}.pem");
        let key = [
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
        ];
        let (ca_key, ca_cert) = (file("ca-key"), file("ca-cert"));
        let make = |more: &[&str]| {
            output(
                "openssl",
                &[&["req", "-x509", "-days", "2", "-batch"], &key[..], more].concat(),
            )
        };
        make(&["-subj", "/CN=ca", "-keyout", &ca_key, "-out", &ca_cert]);
        for (name, subject, usage) in [
            ("server", "/CN=localhost", "serverAuth"),
            ("client", "/C=NL/O=two, three/CN=client", "clientAuth"),
        ] {
            make(&[
                "-CA",
                &ca_cert,
                "-CAkey",
                &ca_key,
                "-subj",
                subject,
                "-addext",
                "basicConstraints=critical,CA:FALSE",
                "-addext",
                "subjectAltName=DNS:localhost,IP:127.0.0.1",
                "-addext",
                &format!("extendedKeyUsage={usage}"),
                "-keyout",
                &file(&format!("{name}-key")),
                "-out",
                &file(&format!("{name}-cert")),
            ]);
        }
        dir
    }
}

/// `-L` by a program with TLS objects: exit code and all that it printed.
fn list_with(program: &str, server: &Server, more: &[&str]) -> (bool, String) {
    let socket = server.socket.display().to_string();
    let all = [&["-L", "-k", &socket, "--tls-creds=tls0"], more].concat();
    let output = Command::new(program).args(all).output().expect("it runs");
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[test]
fn certificates_secure_both_sides_with_the_peers_too() {
    let place = Place::new();
    let dir = place.certificates();
    let server = format!("tls-creds-x509,id=tls0,endpoint=server,dir={dir}");
    let client = format!("tls-creds-x509,id=tls0,endpoint=client,dir={dir}");
    let arguments = [
        "-t",
        "-e",
        "0",
        "-f",
        "qcow2",
        "--object",
        &server,
        "--tls-creds=tls0",
    ];
    for program in [OWN, PEER] {
        let served = place.serve(program, &arguments);
        for client_program in [OWN, PEER] {
            let named = ["--object", &client, "--tls-hostname=localhost"];
            let (good, text) = list_with(client_program, &served, &named);
            assert!(
                good && text.contains("exports available: 1"),
                "{program}: {text}"
            );
            let other = ["--object", &client, "--tls-hostname=example.org"];
            let (good, text) = list_with(client_program, &served, &other);
            assert!(!good, "{text}");
            assert!(
                text.contains("Certificate does not match the hostname example.org"),
                "{text}"
            );
            let (good, text) = list_with(client_program, &served, &["--object", &client]);
            assert!(
                !good && text.contains("No hostname for certificate validation"),
                "{text}"
            );
        }
        // Without TLS nothing is told.
        let socket = served.socket.display().to_string();
        let plain = Command::new(OWN)
            .args(["-L", "-k", &socket])
            .output()
            .expect("it runs");
        let text = String::from_utf8_lossy(&plain.stderr).into_owned();
        assert!(
            text.contains("TLS negotiation required before option 3 (list)"),
            "{text}"
        );
        assert!(text.contains("Did you forget a valid tls-creds?"), "{text}");
    }
    let served = place.serve(OWN, &arguments);
    let (good, text) = io_with("qemu-io", (&served, &client), ",tls-hostname=localhost");
    assert!(good, "{text}");
}

#[test]
fn only_the_names_that_are_authorized_come_in() {
    let place = Place::new();
    let dir = place.certificates();
    let server = format!("tls-creds-x509,id=tls0,endpoint=server,dir={dir}");
    let client = format!("tls-creds-x509,id=tls0,endpoint=client,dir={dir}");
    let rules = place.path("rules");
    let list = r#"{"rules": [{"match": "*,C=NL", "policy": "allow", "format": "glob"}]}"#;
    fs::write(&rules, list).expect("a file");
    let file = format!("authz-list-file,id=z,filename={rules}");
    let exact = r"authz-simple,id=z,identity=CN=client,,O=two\,, three,,C=NL";
    for (object, good) in [
        ("authz-simple,id=z,identity=CN=other", false),
        (exact, true),
        (
            "authz-list,id=z,rules.0.match=CN=cl*,rules.0.policy=allow,rules.0.format=glob",
            true,
        ),
        ("authz-list,id=z", false),
        (&file, true),
    ] {
        let arguments = [
            "-t",
            "-f",
            "qcow2",
            "--object",
            &server,
            "--tls-creds=tls0",
            "--object",
            object,
            "--tls-authz=z",
        ];
        let served = place.serve(OWN, &arguments);
        let named = ["--object", &client, "--tls-hostname=localhost"];
        let (came_in, text) = list_with(PEER, &served, &named);
        assert_eq!(came_in, good, "{object}: {text}");
    }
}

#[test]
fn pre_shared_keys_and_anonymous_tls_work_with_the_peers() {
    let place = Place::new();
    let (dir, wrong) = (place.path("psk"), place.path("wrong"));
    for (dir, key) in [(&dir, "00112233445566778899aabbccddeeff"), (&wrong, "ff")] {
        fs::create_dir(dir).expect("a directory");
        fs::write(format!("{dir}/keys.psk"), format!("qemu:{key}\n")).expect("a file");
    }
    let object = |kind: &str, side: &str, dir: &str| {
        format!("tls-creds-{kind},id=tls0,endpoint={side}{dir}")
    };
    let (keys, other) = (format!(",dir={dir}"), format!(",dir={wrong}"));
    for (kind, extra) in [("psk", &*keys), ("anon", "")] {
        let server = object(kind, "server", extra);
        let client = object(kind, "client", extra);
        for program in [OWN, PEER] {
            let arguments = ["-t", "-f", "qcow2", "--object", &server, "--tls-creds=tls0"];
            let served = place.serve(program, &arguments);
            for client_program in [OWN, PEER] {
                let (good, text) = list_with(client_program, &served, &["--object", &client]);
                assert!(good, "{kind}, {program}, {client_program}: {text}");
            }
            if kind == "psk" {
                let stranger = object(kind, "client", &other);
                let (good, text) = list_with(OWN, &served, &["--object", &stranger]);
                assert!(!good, "{text}");
            }
        }
    }
}

/// What a program that runs qemu-io's commands says about the export of `server` over TLS.
fn io_with(program: &str, (server, object): (&Server, &str), more: &str) -> (bool, String) {
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},tls-creds=tls0{more}",
        server.socket.display()
    );
    let commands = [
        "-c",
        "write -P 8 3M 3M",
        "-c",
        "read -P 8 3M 3M",
        "-c",
        "read -P 0x11 1M 1M",
        "-c",
        "read -P 0 6M 2M",
    ];
    let output = Command::new(program)
        .args(["--object", object, "--image-opts", &options])
        .args(commands)
        .output()
        .expect("it runs");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (output.status.success() && !text.contains("failed"), text)
}

#[test]
fn a_disk_over_tls_holds_what_was_written_when_its_server_proves_itself() {
    let place = Place::new();
    let dir = place.certificates();
    let server = format!("tls-creds-x509,id=tls0,endpoint=server,dir={dir}");
    let client = format!("tls-creds-x509,id=tls0,endpoint=client,dir={dir}");
    let arguments = ["-t", "-f", "qcow2", "--object", &server, "--tls-creds=tls0"];
    for program in [OWN, PEER] {
        let served = place.serve(program, &arguments);
        let (good, text) = io_with(IO, (&served, &client), ",tls-hostname=localhost");
        assert!(good, "{program}: {text}");
        for (more, reason) in [
            (
                ",tls-hostname=example.org",
                "Certificate does not match the hostname example.org",
            ),
            ("", "No hostname for certificate validation"),
        ] {
            let (good, text) = io_with(IO, (&served, &client), more);
            assert!(!good && text.contains(reason), "{program}: {text}");
        }
    }
}

#[test]
fn a_shared_key_opens_a_disk_and_another_key_does_not() {
    let place = Place::new();
    let [right, wrong] =
        [("psk", "00112233445566778899aabbccddeeff"), ("other", "ff")].map(|(name, key)| {
            let dir = place.path(name);
            fs::create_dir(&dir).expect("a directory");
            fs::write(format!("{dir}/keys.psk"), format!("qemu:{key}\n")).expect("a file");
            dir
        });
    let object = |side: &str, dir: &str| format!("tls-creds-psk,id=tls0,endpoint={side},dir={dir}");
    let server = object("server", &right);
    let arguments = ["-t", "-f", "qcow2", "--object", &server, "--tls-creds=tls0"];
    for program in [OWN, PEER] {
        let served = place.serve(program, &arguments);
        let (good, text) = io_with(IO, (&served, &object("client", &right)), "");
        assert!(good, "{program}: {text}");
        let (good, text) = io_with(IO, (&served, &object("client", &wrong)), "");
        assert!(!good && text.contains("TLS handshake failed"), "{text}");
    }
}

#[test]
fn tls_that_cannot_be_had_is_told_in_the_words_of_the_peer() {
    let place = Place::new();
    let dir = place.path("psk");
    fs::create_dir(&dir).expect("a directory");
    fs::write(format!("{dir}/keys.psk"), "qemu:00112233445566778899\n").expect("a file");
    let object = |side: &str| format!("tls-creds-psk,id=tls0,endpoint={side},dir={dir}");
    let plain = place.serve(PEER, &["-t", "-f", "qcow2"]);
    for (object, more) in [
        (object("client"), ""),
        (object("server"), ""),
        (object("client"), ",tls-creds=nothing"),
    ] {
        let [ours, theirs] = [IO, "qemu-io"].map(|program| {
            let (good, text) = io_with(program, (&plain, &object), more);
            assert!(!good, "{text}");
            text.replace("outboard-io", "qemu-io")
        });
        assert_eq!(ours, theirs);
    }
}
