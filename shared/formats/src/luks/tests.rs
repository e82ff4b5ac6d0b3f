//! QEMU's tools as oracle, both ways; headers that lie; key slots.

use super::header::{LENGTH, STRIPES};
use super::*;
use crate::qcow2::tests::peers::{Files, has_qemu, on_host, qemu};
use crate::qcow2::tests::rig;
use block::cipher::Tweak;
use block::open::ChildRole;
use block::{Edge, Error, SectorCipher};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

fn password(text: &str) -> Password {
    Arc::new(Zeroizing::new(text.as_bytes().to_vec()))
}

fn edge(path: &Path) -> Edge {
    rig::edge(&rig::leaf(path), "file", ChildRole::Image)
}

fn spec(algorithm: &str, mode: &str, iv: IvKind) -> Spec {
    Spec {
        algorithm: Algorithm::from_option(algorithm).unwrap(),
        mode: Mode::from_name(mode).unwrap(),
        iv,
    }
}

fn options(cipher: Spec, hash: Hash) -> CreateOptions {
    CreateOptions {
        cipher,
        hash,
        iter_time: Duration::from_millis(1),
    }
}

/// Ciphers, as options and as QEMU's `-o`.
fn shapes() -> Vec<(CreateOptions, String)> {
    let shapes = [
        ("aes-256", "xts", IvKind::Plain64, Hash::Sha256),
        ("aes-128", "xts", IvKind::Plain, Hash::Sha1),
        ("aes-128", "cbc", IvKind::Plain64, Hash::Sha512),
        (
            "aes-256",
            "cbc",
            IvKind::Essiv(Hash::Sha256),
            Hash::Ripemd160,
        ),
        ("serpent-256", "xts", IvKind::Plain64, Hash::Sha256),
        ("twofish-128", "cbc", IvKind::Plain, Hash::Sha224),
        ("aes-128", "ecb", IvKind::Plain, Hash::Sha384),
        ("aes-256", "ctr", IvKind::Plain64, Hash::Md5),
        ("twofish-256", "ctr", IvKind::Plain, Hash::Sha256),
        ("serpent-256", "cbc", IvKind::Essiv(Hash::Md5), Hash::Sha1),
    ];
    let with_text = shapes.map(|(algorithm, mode, iv, hash)| {
        let iv_hash = match iv {
            IvKind::Essiv(hash) => format!(",ivgen-hash-alg={}", hash.name()),
            _ => String::new(),
        };
        let text = format!(
            "key-secret=s,iter-time=1,cipher-alg={algorithm},cipher-mode={mode},ivgen-alg={}{iv_hash},hash-alg={}",
            iv.name(),
            hash.name()
        );
        (options(spec(algorithm, mode, iv), hash), text)
    });
    with_text.to_vec()
}

const SECRET: &str = "secret,id=s,data=geheim";
const SIZE: usize = 96 << 10;

fn content(seed: usize) -> Vec<u8> {
    (0..SIZE)
        .map(|at| (at / 100 + seed + at % 7) as u8)
        .collect()
}

#[test]
fn what_qemu_encrypted_is_decrypted() {
    if !has_qemu() {
        return;
    }
    // QEMU measures key derivation by ticks, again and again on a busy machine: two are enough.
    for (seed, (options, text)) in shapes().into_iter().enumerate().step_by(8) {
        println!("{text}");
        let files = Files::new();
        std::fs::write(files.path("plain"), content(seed)).unwrap();
        let (plain, image) = (files.text("plain"), files.text("luks"));
        let convert = ["convert", "--object", SECRET, "-f", "raw", "-O", "luks"];
        qemu(
            "qemu-img",
            &[&convert[..], &["-o", &text, &plain, &image]].concat(),
        );
        let volume = on_host(async {
            let file = edge(&files.path("luks"));
            let location = Location {
                file: &file,
                offset: 0,
            };
            let wrong = Volume::open(location, &password("falsch")).await;
            let wrong = wrong.err().map(|error: Error| error.message);
            assert_eq!(
                wrong.as_deref(),
                Some("Invalid password, cannot unlock any keyslot")
            );
            Volume::open(location, &password("geheim")).await.unwrap()
        });
        assert_eq!(volume.header.cipher, options.cipher);
        assert_eq!(volume.header.hash, options.hash);
        let bytes = std::fs::read(files.path("luks")).unwrap();
        let mut payload = bytes[volume.header.payload_offset() as usize..].to_vec();
        volume.cipher(Tweak::HostOffset).decrypt(0, &mut payload);
        assert!(payload == content(seed));
    }
}

#[test]
fn what_is_encrypted_here_is_decrypted_by_qemu() {
    if !has_qemu() {
        return;
    }
    // Every cipher and mode once: each key is derived without optimisation.
    for (seed, (options, text)) in shapes().into_iter().enumerate().skip(1).step_by(3) {
        println!("{text}");
        let files = Files::new();
        let path = files.path("luks");
        let volume = on_host(async {
            let file = edge(&path);
            let location = Location {
                file: &file,
                offset: 0,
            };
            let password = password("geheim");
            let created = Volume::create(location, &options, &password);
            created.await.unwrap()
        });
        let mut payload = content(seed);
        volume.cipher(Tweak::HostOffset).encrypt(0, &mut payload);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.resize(volume.header.payload_offset() as usize, 0);
        bytes.extend(payload);
        std::fs::write(&path, bytes).unwrap();
        let image = format!("driver=luks,key-secret=s,file.filename={}", path.display());
        let plain = files.text("plain");
        let convert = [
            "convert",
            "--object",
            SECRET,
            "--image-opts",
            "-O",
            "raw",
            &image,
            &plain,
        ];
        qemu("qemu-img", &convert);
        assert!(std::fs::read(plain).unwrap() == content(seed));
    }
}

/// Runs cryptsetup with `files/key` as password, which needs neither the kernel's device mapper nor rights; what it
/// says, and whether it succeeded.
fn cryptsetup(files: &Files, arguments: &[&str]) -> (String, bool) {
    let output = Command::new("cryptsetup")
        .args(["--batch-mode", "--key-file", &files.text("key")])
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    (out + &error, output.status.success())
}

#[test]
fn cryptsetup_opens_what_is_made_here_and_the_other_way_round() {
    if Command::new("cryptsetup")
        .arg("--version")
        .output()
        .is_err()
    {
        println!("skipped: cryptsetup is not installed");
        return;
    }
    let ciphers = [
        (
            spec("aes-256", "xts", IvKind::Plain64),
            Hash::Sha256,
            "aes-xts-plain64",
            "512",
        ),
        (
            spec("aes-128", "cbc", IvKind::Essiv(Hash::Sha256)),
            Hash::Sha1,
            "aes-cbc-essiv:sha256",
            "128",
        ),
    ];
    for (cipher, hash, name, bits) in ciphers {
        println!("{name}");
        let files = Files::new();
        for (name, key) in [("key", "geheim"), ("other", "two")] {
            std::fs::write(files.path(name), key).unwrap();
        }
        // Theirs, with a second key.
        let theirs = files.text("theirs");
        std::fs::write(&theirs, vec![0; 4 << 20]).unwrap();
        let format = [
            "luksFormat",
            "--type",
            "luks1",
            "--pbkdf-force-iterations",
            "1000",
            "--cipher",
            name,
            "--key-size",
            bits,
            "--hash",
            hash.name(),
            &theirs,
        ];
        let (said, made) = cryptsetup(&files, &format);
        assert!(made, "{said}");
        let other = files.text("other");
        let add = [
            "luksAddKey",
            "--pbkdf-force-iterations",
            "1000",
            &theirs,
            &other,
        ];
        let (said, added) = cryptsetup(&files, &add);
        assert!(added, "{said}");
        // Ours, with a second key.
        let ours = files.text("ours");
        on_host(async {
            let file = edge(Path::new(&theirs));
            let location = Location {
                file: &file,
                offset: 0,
            };
            let keys = ["geheim", "two"].map(password);
            for key in &keys {
                let volume = Volume::open(location, key).await.unwrap();
                assert_eq!((volume.header.cipher, volume.header.hash), (cipher, hash));
            }
            assert!(Volume::open(location, &password("falsch")).await.is_err());
            let file = edge(Path::new(&ours));
            let location = Location {
                file: &file,
                offset: 0,
            };
            let made = Volume::create(location, &options(cipher, hash), &keys[1]).await;
            let add = Amend::Add {
                password: keys[0].clone(),
                slot: Some(4),
                iter_time: Some(Duration::from_millis(1)),
                force: false,
            };
            made.unwrap().amend(location, add).await.unwrap();
        });
        let length = std::fs::metadata(&ours).unwrap().len();
        let file = std::fs::OpenOptions::new().write(true).open(&ours).unwrap();
        // It has no volume without a payload.
        file.set_len(length + (1 << 20)).unwrap();
        let (said, dumped) = cryptsetup(&files, &["luksDump", &ours]);
        assert!(dumped, "{said}");
        let mode = name.split_once('-').unwrap().1;
        for line in [
            format!("Cipher mode:   \t{mode}"),
            format!("MK bits:       \t{bits}"),
        ] {
            assert!(said.contains(&line), "{said}");
        }
        for slot in ["0", "4"] {
            std::fs::write(
                files.path("key"),
                if slot == "4" { "geheim" } else { "two" },
            )
            .unwrap();
            let test = ["open", "--test-passphrase", "--key-slot", slot, &ours];
            let (said, opened) = cryptsetup(&files, &test);
            assert!(opened, "slot {slot}: {said}");
        }
        std::fs::write(files.path("key"), "falsch").unwrap();
        assert!(!cryptsetup(&files, &["open", "--test-passphrase", &ours]).1);
    }
}

#[test]
fn key_slots_come_and_go_and_the_last_one_stays() {
    let files = Files::new();
    on_host(async {
        let file = edge(&files.path("luks"));
        let location = Location {
            file: &file,
            offset: 4096,
        };
        let quick = CreateOptions {
            iter_time: Duration::from_millis(1),
            ..CreateOptions::default()
        };
        let (one, two) = (password("one"), password("two"));
        let mut volume = Volume::create(location, &quick, &one).await.unwrap();
        let erase_one = || {
            Amend::Erase(Select {
                password: Some(password("one")),
                ..Select::default()
            })
        };
        let refused = volume.amend(location, erase_one()).await.unwrap_err();
        assert!(
            refused.message.contains("All the active keyslots match"),
            "{refused}"
        );
        let add = |slot| Amend::Add {
            password: password("two"),
            slot,
            iter_time: Some(Duration::from_millis(1)),
            force: false,
        };
        volume.amend(location, add(Some(5))).await.unwrap();
        let refused = volume.amend(location, add(Some(5))).await.unwrap_err();
        assert!(
            refused
                .message
                .contains("Refusing to overwrite active keyslot 5")
        );
        let forced = Amend::Add {
            password: password("three"),
            slot: Some(5),
            iter_time: Some(Duration::from_millis(1)),
            force: true,
        };
        volume.amend(location, forced).await.unwrap();
        assert!(Volume::open(location, &two).await.is_err());
        let back = Amend::Add {
            password: password("two"),
            slot: Some(5),
            iter_time: Some(Duration::from_millis(1)),
            force: true,
        };
        volume.amend(location, back).await.unwrap();
        let refused = volume.amend(location, add(Some(8))).await.unwrap_err();
        assert_eq!(
            refused.message,
            "Invalid keyslot 8 specified, must be between 0 and 7"
        );
        let key = Volume::open(location, &two).await.unwrap().key;
        assert_eq!(*key, *volume.key);
        volume.amend(location, erase_one()).await.unwrap();
        assert!(Volume::open(location, &one).await.is_err());
        assert!(Volume::open(location, &two).await.is_ok());
        let last = Select {
            slot: Some(5),
            ..Select::default()
        };
        let refused = volume
            .amend(location, Amend::Erase(last))
            .await
            .unwrap_err();
        assert!(
            refused.message.contains("the only active keyslot 5"),
            "{refused}"
        );
    });
}

#[test]
fn headers_that_lie_are_refused() {
    let header = Header::new(CreateOptions::default().cipher, Hash::Sha256, String::new());
    let mut good = header.clone();
    good.digest_iterations = 1000;
    good.slots[0].active = true;
    good.slots[0].iterations = 1000;
    let bytes = good.to_bytes();
    assert_eq!(Header::parse(&bytes).unwrap(), good);
    let with = |at: usize, field: &[u8]| {
        let mut bad = bytes;
        bad[at..at + field.len()].copy_from_slice(field);
        Header::parse(&bad).map(drop).unwrap_err().message
    };
    let word = |value: u32| value.to_be_bytes();
    for (at, field, message) in [
        (0, &b"LUKX"[..], "Volume is not in LUKS format"),
        (6, &[0, 2], "LUKS version 2 is not supported"),
        (
            8,
            &[b'x'; 32],
            "LUKS header cipher name is not NUL terminated",
        ),
        (40, b"xts-plain64:\0", "Hash algorithm '' not supported"),
        (40, b"xts-essiv:md5\0", ""),
        (
            40,
            b"xts-essiv:sha1\0",
            "No AES cipher with key size 20 available",
        ),
        (
            40,
            b"xts-essiv\0",
            "Missing IV generator hash specification",
        ),
        (40, b"cbc\0", "Unexpected cipher mode string format 'cbc'"),
        (40, b"gcm-plain\0", "Cipher mode 'gcm' not supported"),
        (40, b"xts-random\0", "IV generator 'random' not supported"),
        (
            72,
            b"whirlpool\0",
            "Hash algorithm 'whirlpool' not supported",
        ),
        (104, &word(1), "LUKS payload is overlapping with the header"),
        (
            104,
            &word(4000),
            "Keyslot 7 is overlapping with the encrypted payload",
        ),
        (
            108,
            &word(0),
            "Algorithm 'aes' with key size 0 bytes not supported",
        ),
        (
            108,
            &word(u32::MAX),
            "Algorithm 'aes' with key size 2147483647 bytes not supported",
        ),
        (164, &word(0), "LUKS key iteration count is zero"),
        (
            164,
            &word(u32::MAX),
            "LUKS key iteration count 4294967295 is too large",
        ),
        (
            208,
            &word(7),
            "Keyslot 0 state (active/disable) is corrupted",
        ),
        (212, &word(0), "Keyslot 0 iteration count is zero"),
        (
            212,
            &word(u32::MAX),
            "Keyslot 0 iteration count 4294967295 is too large",
        ),
        (
            248,
            &word(0),
            "Keyslot 0 is overlapping with the LUKS header",
        ),
        (
            248,
            &word(u32::MAX),
            "Keyslot 0 is overlapping with the encrypted payload",
        ),
        (
            248 + 48,
            &word(9),
            "Keyslots 0 and 1 are overlapping in the header",
        ),
        (
            252,
            &word(STRIPES + 1),
            "Keyslot 0 is corrupted (stripes 4001 != 4000)",
        ),
    ] {
        match message {
            // Odd, and all the same a volume.
            "" => {
                let mut odd = bytes;
                odd[at..at + field.len()].copy_from_slice(field);
                assert!(Header::parse(&odd).is_ok());
            }
            message => assert_eq!(with(at, field), message),
        }
    }
    assert!(Header::parse(&bytes[..LENGTH - 1]).is_err());
}

#[test]
fn more_rounds_than_a_header_may_say_are_refused_before_anything_is_written() {
    let files = Files::new();
    let path = files.path("luks");
    on_host(async {
        let file = edge(&path);
        let location = Location {
            file: &file,
            offset: 0,
        };
        let options = CreateOptions {
            iter_time: Duration::from_secs(10_000_000),
            ..CreateOptions::default()
        };
        let refused = Volume::create(location, &options, &password("geheim")).await;
        let message = refused.map(drop).unwrap_err().message;
        assert!(message.ends_with(" larger than 1073741824"), "{message}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    });
}

#[test]
fn random_headers_neither_panic_nor_pass_the_caps() {
    use rand::{Rng, SeedableRng};
    let mut header = Header::new(CreateOptions::default().cipher, Hash::Sha1, String::new());
    header.digest_iterations = 1;
    for seed in 0..3000 {
        let mut random = rand::rngs::SmallRng::seed_from_u64(seed);
        let mut bytes = header.to_bytes();
        for _ in 0..random.random_range(1..6) {
            bytes[random.random_range(6..LENGTH)] = random.random();
        }
        if let Ok(parsed) = Header::parse(&bytes) {
            assert!(parsed.cipher.key_bytes() <= 64, "seed {seed}");
            let end = |slot: &Slot| slot.offset() + parsed.material_bytes() as u64;
            assert!(
                parsed
                    .slots
                    .iter()
                    .all(|slot| end(slot) <= parsed.payload_offset())
            );
        }
    }
}

#[test]
fn xts_agrees_with_the_standard() {
    // IEEE 1619-2007, annex B, vector 4: AES-128, data unit 0.
    let key: Vec<u8> = [
        0x2718281828459045_u64,
        0x2353602874713526,
        0x3141592653589793,
        0x2384626433832795,
    ]
    .iter()
    .flat_map(|word| word.to_be_bytes())
    .collect();
    let cipher = spec("aes-128", "xts", IvKind::Plain64).keyed(&key, Tweak::HostOffset);
    let cipher = cipher.unwrap();
    let plain: Vec<u8> = (0..512).map(|at| at as u8).collect();
    let mut sector = plain.clone();
    cipher.encrypt(0, &mut sector);
    let first = [0x27_u8, 0xa7, 0x47, 0x9b, 0xef, 0xa1, 0xd4, 0x76];
    assert_eq!(sector[..8], first);
    cipher.decrypt(0, &mut sector);
    assert_eq!(sector, plain);
}

#[test]
fn sectors_one_by_one_are_as_all_at_once() {
    for (algorithm, mode, iv) in [
        ("aes-256", "xts", IvKind::Plain64),
        ("aes-256", "cbc", IvKind::Essiv(Hash::Sha256)),
        ("twofish-256", "xts", IvKind::Plain),
    ] {
        let spec = spec(algorithm, mode, iv);
        let key: Vec<u8> = (0..spec.key_bytes() as u8).collect();
        let cipher = spec.keyed(&key, Tweak::HostOffset).unwrap();
        let offset = 7 * 512;
        let plain: Vec<u8> = (0..19 * 512).map(|at| (at % 253) as u8).collect();
        let mut together = plain.clone();
        cipher.encrypt(offset, &mut together);
        let mut apart = plain.clone();
        for (number, sector) in apart.chunks_mut(512).enumerate() {
            cipher.encrypt(offset + number as u64 * 512, sector);
        }
        assert!(together == apart);
        cipher.decrypt(offset, &mut together);
        assert!(together == plain);
    }
}
