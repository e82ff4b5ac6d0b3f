//! Encrypted images: QEMU's tools both ways, wrong passwords, and what crash tests need of them.

use super::cases::Method;
use super::change;
use super::peers::{Files, has_qemu, on_host, qemu, work, work_here};
use super::rig::{self, Disk, Setup, password};
use crate::luks;
use crate::qcow2::crypto::{Crypto, amend_keys};
use crate::qcow2::header::CryptMethod;
use crate::qcow2::open::read_header;
use crate::qcow2::{CreateOptions, Encryption};
use block::{ByteRange, Errno, NewSnapshot, Preallocation, Resize, SectorCipher, Tweak, ZeroFlags};
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

/// The name of an external data file.
const DATA: &str = "a.data";

/// With the external data file, where the image has one.
fn setup_of(files: &Files) -> Setup {
    let data = files.path(DATA);
    Setup {
        data_file: data.exists().then_some(data),
        ..setup()
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
        format!("{luks},data_file={DATA},cluster_size=2k"),
        format!("encrypt.format=aes,encrypt.key-secret=s,data_file={DATA},data_file_raw=on"),
        format!("encrypt.format=aes,encrypt.key-secret=s,data_file={DATA},extended_l2=on"),
    ]
    .iter()
    .enumerate()
    {
        println!("{options}");
        let files = Files::new();
        let (image, size) = (files.text("a.qcow2"), SIZE.to_string());
        let options = &options.replace(DATA, &files.text(DATA));
        let create = [
            "create", "-q", "--object", SECRET, "-f", "qcow2", "-o", options,
        ];
        qemu("qemu-img", &[&create[..], &[&image, &size]].concat());
        let by_name = options_of(&files, "a.qcow2");
        let write = "write -P 0x5a 100k 300k";
        let io = ["--object", SECRET, "--image-opts", "-c", write, &by_name];
        qemu("qemu-io", &io);
        // A raw data file is all mapped from the start: nothing else is zeroes through the cipher.
        let mut right = content_by_qemu(&files, "a.qcow2");
        on_host(async {
            let setup = setup_of(&files);
            let disk = Disk::open(&files.path("a.qcow2"), setup).await.unwrap();
            assert!(right[100 << 10..400 << 10].iter().all(|byte| *byte == 0x5a));
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
        let content = work(&files.path("a.qcow2"), setup_of(&files), seed as u64);
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
    let luks = || Encryption::Luks(quick_luks(), key());
    for (seed, (encryption, cluster_size, has_data_file)) in [
        (luks(), 65536, false),
        (luks(), 512, false),
        (luks(), 2048, true),
        (Encryption::Aes(key()), 4096, false),
        (Encryption::Aes(key()), 4096, true),
    ]
    .into_iter()
    .enumerate()
    {
        println!("{encryption:?} {cluster_size} {has_data_file}");
        let files = Files::new();
        let path = files.path("a.qcow2");
        let options = CreateOptions {
            cluster_size,
            encryption: Some(encryption),
            ..CreateOptions::new(SIZE)
        };
        let content = on_host(async {
            match has_data_file {
                true => rig::make_with_data(&path, &files.path(DATA), options).await,
                false => rig::make(&path, &options).await,
            }
            work_here(&path, setup_of(&files), seed as u64 + 50).await
        });
        check(&files, "a.qcow2");
        assert!(content == content_by_qemu(&files, "a.qcow2"));
        let info = qemu(
            "qemu-img",
            &["info", "--output=json", &files.text("a.qcow2")],
        );
        assert!(info.contains("\"encrypted\": true"), "{info}");
        on_host(async {
            let keyless = Setup {
                password: None,
                ..setup_of(&files)
            };
            let refused = Disk::open(&path, keyless).await;
            let message = refused.err().map(|error| error.message);
            let expected = "Parameter 'encrypt.key-secret' is required for cipher";
            assert_eq!(message.as_deref(), Some(expected));
            let disk = Disk::open(&path, setup_of(&files)).await.unwrap();
            let cluster = vec![0; cluster_size as usize];
            let compressed = disk.write_compressed(0, &cluster);
            assert_eq!(compressed.await, Err(Errno::EOPNOTSUPP));
            disk.close().await.unwrap();
        });
    }
}

#[test]
fn version_2_shows_the_zeroes_of_version_3_through_the_cipher() {
    if !has_qemu() {
        return;
    }
    let luks = Encryption::Luks(quick_luks(), password(PASSWORD));
    for encryption in [luks, Encryption::Aes(password(PASSWORD))] {
        let files = Files::new();
        let path = files.path("a.qcow2");
        let options = CreateOptions {
            cluster_size: 4096,
            encryption: Some(encryption),
            ..CreateOptions::new(SIZE)
        };
        let (content, taken) = on_host(async {
            rig::make(&path, &options).await;
            let disk = Disk::open(&path, setup()).await.unwrap();
            disk.write(0, &[7; 256 << 10]).await.unwrap();
            let zero = async |start: u64| {
                let range = ByteRange::new(start, 32 << 10);
                let zeroed = disk.root.write_zeroes(range, ZeroFlags::default());
                zeroed.await.unwrap();
            };
            zero(64 << 10).await;
            // A snapshot's own table has zero clusters, too.
            let new = NewSnapshot::now("one");
            let taken = disk.snapshots().create(new).await.unwrap();
            zero(128 << 10).await;
            disk.write(64 << 10, &[9; 4096]).await.unwrap();
            let content = disk.read_all().await.unwrap();
            disk.close().await.unwrap();
            change::amend(&path, Some(PASSWORD), serde_json::json!({"version": "v2"}))
                .await
                .unwrap();
            (content, taken.id)
        });
        check(&files, "a.qcow2");
        assert!(content == content_by_qemu(&files, "a.qcow2"));
        let snapshot = on_host(async {
            let disk = Disk::open(&path, setup()).await.unwrap();
            assert!(disk.read_all().await.unwrap() == content);
            disk.snapshots().apply(&taken).await.unwrap();
            let snapshot = disk.read_all().await.unwrap();
            disk.close().await.unwrap();
            snapshot
        });
        let mut right = vec![0; SIZE as usize];
        right[..256 << 10].fill(7);
        right[64 << 10..96 << 10].fill(0);
        assert!(snapshot == right);
    }
}

/// QEMU's tool changes the key slots of an image, which `geheim` opens.
fn amend_by_qemu(files: &Files, changes: &str) {
    let image = options_of(files, "a.qcow2");
    let other = "secret,id=other,data=anders";
    let amend = [
        "amend",
        "--object",
        SECRET,
        "--object",
        other,
        "--image-opts",
    ];
    qemu("qemu-img", &[&amend[..], &["-o", changes, &image]].concat());
}

#[test]
fn luks_images_with_small_clusters_are_amended() {
    if !has_qemu() {
        return;
    }
    for cluster_size in [512, 1024, 2048] {
        println!("{cluster_size}");
        let files = Files::new();
        let path = files.path("a.qcow2");
        let options = CreateOptions {
            cluster_size,
            ..CreateOptions::new(SIZE)
        };
        let options = CreateOptions {
            encryption: Some(encryption(Method::Luks)),
            ..options
        };
        let mut content = on_host(async {
            rig::make(&path, &options).await;
            work_here(&path, setup(), cluster_size).await
        });
        for members in [
            serde_json::json!({"refcount-bits": 64}),
            serde_json::json!({"lazy-refcounts": true, "size": SIZE + 4096}),
            serde_json::json!({"refcount-bits": 16, "size": SIZE / 2, "lazy-refcounts": false}),
            serde_json::json!({"version": "v2"}),
            serde_json::json!({"version": "v3", "refcount-bits": 8}),
        ] {
            println!("{members}");
            let size = members["size"].as_u64().map(|size| size as usize);
            on_host(change::amend(&path, Some(PASSWORD), members)).unwrap();
            content.resize(size.unwrap_or(content.len()), 0);
            check(&files, "a.qcow2");
            assert!(content == content_by_qemu(&files, "a.qcow2"));
        }
        // A key that is added here opens the image there, and the other way round.
        on_host(amend_keys_here(
            &path,
            luks::Amend::Add {
                password: password("anders"),
                slot: Some(7),
                iter_time: Some(Duration::from_millis(5)),
                force: false,
            },
        ));
        amend_by_qemu(&files, "encrypt.state=inactive,encrypt.old-secret=s");
        let with_other = |text| Setup {
            password: Some(text),
            ..Setup::default()
        };
        let at = &path;
        let opens = |text| {
            on_host(async move {
                let disk = Disk::open(at, with_other(text)).await;
                let Ok(disk) = disk else { return None };
                let content = disk.read_all().await.unwrap();
                disk.close().await.unwrap();
                Some(content)
            })
        };
        assert!(opens(PASSWORD).is_none());
        assert!(opens("anders") == Some(content));
    }
}

/// Changes the key slots of a closed image.
async fn amend_keys_here(path: &Path, amend: luks::Amend) {
    let file = rig::image_edge(path);
    let header = read_header(&file).await.unwrap();
    let crypto = Crypto::open(&file, &header, &password(PASSWORD)).await;
    let crypto = crypto.unwrap();
    amend_keys((&file, &header), crypto.as_ref(), amend)
        .await
        .unwrap();
}

#[test]
fn preallocated_clusters_of_an_encrypted_disk_read_as_zeroes() {
    if !has_qemu() {
        return;
    }
    for preallocation in [
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ] {
        let files = Files::new();
        let path = files.path("a.qcow2");
        let options = CreateOptions {
            encryption: Some(Encryption::Aes(password(PASSWORD))),
            preallocation,
            ..CreateOptions::new(SIZE)
        };
        on_host(async {
            rig::make(&path, &options).await;
            let disk = Disk::open(&path, setup()).await.unwrap();
            let resize = Resize {
                length: SIZE + (1 << 20),
                preallocation,
            };
            disk.node.resize(resize).await.unwrap();
            disk.write(100, &[7; 100]).await.unwrap();
            disk.close().await.unwrap();
        });
        check(&files, "a.qcow2");
        let mut right = vec![0; SIZE as usize + (1 << 20)];
        right[100..200].fill(7);
        assert!(content_by_qemu(&files, "a.qcow2") == right);
        let clusters = right.len() / 65536;
        let bytes = std::fs::metadata(&path).unwrap().len() as usize;
        assert!(bytes >= clusters * 65536, "{preallocation:?}: {bytes}");
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
