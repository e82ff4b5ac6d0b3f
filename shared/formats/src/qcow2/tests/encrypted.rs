//! Encrypted images: QEMU's tools both ways, wrong passwords, and what crash tests need of them.

use super::cases::Method;
use super::peers::{Files, has_qemu, on_host, qemu, work, work_here};
use super::rig::{self, Disk, Setup, password};
use crate::luks;
use crate::qcow2::header::CryptMethod;
use crate::qcow2::open::read_header;
use crate::qcow2::{CreateOptions, Encryption};
use block::{ByteRange, Errno, SectorCipher, Tweak, ZeroFlags};
use std::path::Path;
use std::time::Duration;

const SIZE: u64 = 3 << 20;
pub(super) const PASSWORD: &str = "geheim";
const SECRET: &str = "secret,id=s,data=geheim";

fn setup() -> Setup {
    Setup {
        password: Some(PASSWORD),
        ..Setup::default()
    }
}

fn options_of(files: &Files, name: &str) -> String {
    format!(
        "driver=qcow2,encrypt.key-secret=s,file.filename={}",
        files.text(name)
    )
}

fn check(files: &Files, name: &str) {
    let image = options_of(files, name);
    qemu(
        "qemu-img",
        &["check", "-q", "--object", SECRET, "--image-opts", &image],
    );
}

/// The disk as QEMU reads it.
fn content_by_qemu(files: &Files, name: &str) -> Vec<u8> {
    let (image, raw) = (options_of(files, name), files.text("content.raw"));
    let convert = [
        "convert",
        "--object",
        SECRET,
        "--image-opts",
        "-O",
        "raw",
        &image,
        &raw,
    ];
    qemu("qemu-img", &convert);
    std::fs::read(raw).unwrap()
}

#[test]
fn images_that_qemu_encrypted_are_read_and_written() {
    if !has_qemu() {
        return;
    }
    let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    for (seed, options) in [
        format!("{luks},cluster_size=4k"),
        format!(
            "{luks},encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256"
        ),
        "encrypt.format=aes,encrypt.key-secret=s,cluster_size=512".to_owned(),
        format!("{luks},compat=0.10"),
    ]
    .iter()
    .enumerate()
    {
        println!("{options}");
        let files = Files::new();
        let (image, size) = (files.text("a.qcow2"), SIZE.to_string());
        let create = [
            "create", "-q", "--object", SECRET, "-f", "qcow2", "-o", options,
        ];
        qemu("qemu-img", &[&create[..], &[&image, &size]].concat());
        let by_name = options_of(&files, "a.qcow2");
        let write = "write -P 0x5a 100k 300k";
        let io = ["--object", SECRET, "--image-opts", "-c", write, &by_name];
        qemu("qemu-io", &io);
        on_host(async {
            let disk = Disk::open(&files.path("a.qcow2"), setup()).await.unwrap();
            let mut right = vec![0; SIZE as usize];
            right[100 << 10..400 << 10].fill(0x5a);
            assert!(disk.read_all().await.unwrap() == right);
            // Not whole sectors, at both ends.
            disk.write(1001, &[7; 3000]).await.unwrap();
            right[1001..4001].fill(7);
            assert!(disk.read(1000, 3002).await.unwrap() == right[1000..4002]);
            let zeroes = ByteRange::new(0, 8192);
            let zeroed = disk.root.write_zeroes(zeroes, ZeroFlags::default());
            zeroed.await.unwrap();
            disk.close().await.unwrap();
        });
        let content = work(&files.path("a.qcow2"), setup(), seed as u64);
        check(&files, "a.qcow2");
        assert!(content == content_by_qemu(&files, "a.qcow2"));
    }
}

fn quick_luks() -> luks::CreateOptions {
    luks::CreateOptions {
        iter_time: Duration::from_millis(5),
        ..luks::CreateOptions::default()
    }
}

#[test]
fn images_that_are_encrypted_here_are_read_by_qemu() {
    if !has_qemu() {
        return;
    }
    let key = || password(PASSWORD);
    for (seed, (encryption, cluster_size)) in [
        (Encryption::Luks(quick_luks(), key()), 65536),
        (Encryption::Luks(quick_luks(), key()), 512),
        (Encryption::Aes(key()), 4096),
    ]
    .into_iter()
    .enumerate()
    {
        println!("{encryption:?} {cluster_size}");
        let files = Files::new();
        let path = files.path("a.qcow2");
        let options = CreateOptions {
            cluster_size,
            encryption: Some(encryption),
            ..CreateOptions::new(SIZE)
        };
        let content = on_host(async {
            rig::make(&path, &options).await;
            work_here(&path, setup(), seed as u64 + 50).await
        });
        check(&files, "a.qcow2");
        assert!(content == content_by_qemu(&files, "a.qcow2"));
        let info = qemu(
            "qemu-img",
            &["info", "--output=json", &files.text("a.qcow2")],
        );
        assert!(info.contains("\"encrypted\": true"), "{info}");
        on_host(async {
            let refused = Disk::open(&path, Setup::default()).await;
            let message = refused.err().map(|error| error.message);
            let expected = "Parameter 'encrypt.key-secret' is required for cipher";
            assert_eq!(message.as_deref(), Some(expected));
            let disk = Disk::open(&path, setup()).await.unwrap();
            let cluster = vec![0; cluster_size as usize];
            let compressed = disk.write_compressed(0, &cluster);
            assert_eq!(compressed.await, Err(Errno::EOPNOTSUPP));
            disk.close().await.unwrap();
        });
    }
}

/// How crash tests encrypt: with the shortest header that LUKS has.
pub(super) fn encryption(method: Method) -> Encryption {
    let key = password(PASSWORD);
    match method {
        Method::Aes => Encryption::Aes(key),
        Method::Luks => {
            let mut options = quick_luks();
            options.cipher = luks::Spec {
                algorithm: luks::Algorithm::Aes128,
                mode: luks::Mode::Cbc,
                iv: luks::IvKind::Plain64,
            };
            Encryption::Luks(options, key)
        }
    }
}

/// What an encrypted image's data can be read with.
pub(super) async fn cipher(path: &Path) -> Box<dyn SectorCipher> {
    let file = rig::image_edge(path);
    let header = read_header(&file).await.unwrap();
    match header.crypt {
        CryptMethod::Luks { offset, .. } => {
            let location = luks::Location {
                file: &file,
                offset,
            };
            let volume = luks::Volume::open(location, &password(PASSWORD)).await;
            Box::new(volume.unwrap().cipher(Tweak::HostOffset))
        }
        _ => Box::new(luks::legacy_aes(PASSWORD.as_bytes())),
    }
}
