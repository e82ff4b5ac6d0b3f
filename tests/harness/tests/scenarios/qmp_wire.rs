//! QMP and the command line, word by word against qemu-storage-daemon.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::process::{Launch, Program};
use serde_json::{Value, json};

const BOTH: [Program; 2] = [Program::OutboardBlkd, Program::QemuStorageDaemon];
const PATIENCE: Duration = Duration::from_secs(20);

/// What one daemon answers to each of `inputs`, one client for all.
fn answers(program: Program, inputs: &[Vec<u8>]) -> Result<Vec<Vec<Value>>> {
    let directory = tempfile::Builder::new().prefix("outboard-qmp-").tempdir()?;
    let socket = directory.path().join("qmp.sock");
    let arguments = [
        "--chardev".to_owned(),
        format!("socket,id=m,path={},server=on,wait=off", socket.display()),
        "--monitor".to_owned(),
        "chardev=m".to_owned(),
    ];
    let _daemon = Launch::new(program, arguments.into(), directory.path()).start()?;
    let stream = UnixStream::connect(&socket).context("the monitor's socket")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut greeting = String::new();
    reader.read_line(&mut greeting)?;
    ensure!(greeting.ends_with("\r\n"), "{greeting:?}");
    let mut all = Vec::new();
    for (number, input) in inputs.iter().enumerate() {
        (&stream).write_all(input)?;
        // The mark's own answer says that everything before it has been answered.
        let mark = json!({"execute": "query-block-exports", "id": format!("mark {number}")});
        (&stream).write_all(mark.to_string().as_bytes())?;
        all.push(until_mark(&mut reader, &mark["id"])?);
    }
    Ok(all)
}

fn until_mark(reader: &mut impl BufRead, mark: &Value) -> Result<Vec<Value>> {
    let mut replies = Vec::new();
    loop {
        let mut line = String::new();
        ensure!(
            reader.read_line(&mut line)? > 0,
            "the daemon closed the monitor"
        );
        let reply: Value = serde_json::from_str(&line).context(line)?;
        if reply.get("id") == Some(mark) {
            return Ok(replies);
        }
        replies.push(reply);
    }
}

fn same_answers(inputs: &[Vec<u8>]) -> Result<()> {
    let [ours, theirs] = BOTH;
    let (ours, theirs) = (answers(ours, inputs)?, answers(theirs, inputs)?);
    let pairs = inputs.iter().zip(ours.iter().zip(&theirs));
    let differences = pairs.filter(|(_, (ours, theirs))| ours != theirs);
    let shown: Vec<_> = differences
        .map(|(input, (ours, theirs))| {
            let input = String::from_utf8_lossy(input);
            format!(
                "to {input}\nours   {}\ntheirs {}",
                json!(ours),
                json!(theirs)
            )
        })
        .collect();
    ensure!(shown.is_empty(), "{}", shown.join("\n"));
    Ok(())
}

fn command(name: &str, arguments: Value) -> Vec<u8> {
    let command = json!({"execute": name, "arguments": arguments});
    command.to_string().into_bytes()
}

fn negotiated(rest: impl IntoIterator<Item = Vec<u8>>) -> Vec<Vec<u8>> {
    let first = br#"{"execute": "qmp_capabilities"}"#.to_vec();
    std::iter::once(first).chain(rest).collect()
}

#[test]
fn malformed_input_and_envelopes_are_answered_as_the_peer_does() -> Result<()> {
    let texts: &[&[u8]] = &[
        b"{\"execute\":\"nope\",\"id\":5}",
        b"{'execute':'nope','id':'a\\'b'}",
        b"[1]",
        b"\"x\"",
        b"5\n",
        b"{\"execute\":5}",
        b"{\"execute\":\"query-block-exports\",\"foo\":1}",
        b"{\"id\":1}",
        b"{\"execute\":\"query-block-exports\",\"arguments\":5}",
        b"{\"execute\":\"query-block-exports\",\"arguments\":{\"a\":5}}",
        b"{\"exec-oob\":\"query-block-exports\"}",
        b"{\"execute\":\"query-block-exports\",\"id\":{\"x\":[1,2.5,null,true]}}",
        b"{\"execute\":\"query-block-exports\",\"id\":18446744073709551615}",
        b"{\"execute\":\"query-block-exports\",\"id\":\"\xc3\xa4\xf0\x9f\x98\x80\\u00e4\\t\"}",
        b"{\"execute\": qq}",
        b"}\n",
        b"{ ]",
        b"[}",
        b"\xff\n",
        b"{\"a\":1,}",
        b"{\"a\":\"\x01\"}",
        b"{\"a\":1,\"a\":2}",
        b"{\"a\":%d}",
        b"{\"a\":\"\\q\"}",
        b"{\"a\" 1}",
        b"{5:1}",
        b"[1 2]",
        b"{\"a\":1 \"b\":2}",
        b"{\"a\":01}",
        b"{\"a\":+1}",
        b"{\"a\":0x5}",
        b"{\"a\":\"\\ud83dx\"}",
        b"{\"execute\":\"qmp_capabilities\"}",
    ];
    same_answers(&negotiated(texts.iter().map(|text| text.to_vec())))
}

#[test]
fn negotiation_is_answered_as_the_peer_does() -> Result<()> {
    let [ours, theirs] = BOTH.map(|program| {
        // The mark needs a negotiated session, so this ends with one.
        let input =
            br#"{"execute":"query-version"}{"execute":"qmp_capabilities","arguments":{"e":1}}
            {"execute":"qmp_capabilities","arguments":{"enable":5}}
            {"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}
            {"exec-oob":"query-block-exports","id":1}
            {"exec-oob":"query-block-exports","execute":"query-block-exports","id":1}"#;
        answers(program, &[input.to_vec()])
    });
    let (ours, theirs) = (ours?, theirs?);
    ensure!(ours == theirs, "ours   {ours:?}\ntheirs {theirs:?}");
    Ok(())
}

#[test]
fn commands_fail_in_the_words_of_the_peer() -> Result<()> {
    let unix = json!({"type": "unix", "path": "/nonexistent/dir/sock"});
    let export = |extra: Value| {
        let mut all = json!({"type": "vhost-user-blk", "id": "x", "node-name": "r"});
        for (key, value) in extra.as_object().into_iter().flatten() {
            all[key] = value.clone();
        }
        command("block-export-add", all)
    };
    same_answers(&negotiated([
        command(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "n", "size": 1 << 20}),
        ),
        command(
            "blockdev-add",
            json!({"driver": "raw", "node-name": "r", "file": "n"}),
        ),
        command(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "n"}),
        ),
        command(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "0n"}),
        ),
        command(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "n".repeat(32)}),
        ),
        command("blockdev-add", json!({"driver": "null-co"})),
        command("blockdev-add", json!({"driver": "foo"})),
        command("blockdev-add", json!({"node-name": "foo"})),
        command("blockdev-add", json!({"driver": "file", "node-name": "f"})),
        command(
            "blockdev-add",
            json!({"driver": "raw", "node-name": "f", "file": "nope"}),
        ),
        command(
            "blockdev-add",
            json!({"driver": "raw", "node-name": "f", "file": {"driver": "file"}}),
        ),
        command("blockdev-del", json!({"node-name": "n"})),
        command("blockdev-del", json!({"node-name": "nobody"})),
        command("blockdev-del", json!({})),
        command("blockdev-del", json!({"node-name": 5})),
        command("blockdev-del", json!({"node-name": "x", "b": 1})),
        command("block_resize", json!({"node-name": "r", "size": 1 << 21})),
        command("block_resize", json!({"size": 1 << 21})),
        command("block_resize", json!({"size": -5, "node-name": "r"})),
        command("block_resize", json!({"size": 5, "device": "zz"})),
        command("object-add", json!({"qom-type": "iothread", "id": "io0"})),
        command("object-add", json!({"qom-type": "iothread", "id": "io0"})),
        command("object-add", json!({"qom-type": "foo", "id": "io1"})),
        command("object-add", json!({"id": "io1"})),
        command("object-add", json!({"qom-type": "iothread", "id": "0o"})),
        command(
            "object-add",
            json!({"qom-type": "iothread", "id": "i1", "poll-max-ns": -1}),
        ),
        command(
            "object-add",
            json!({"qom-type": "iothread", "id": "i2", "zz": 1}),
        ),
        command("object-del", json!({"id": "io0"})),
        command("object-del", json!({"id": "io0"})),
        export(json!({})),
        export(json!({"type": "foo"})),
        export(json!({"addr": 5})),
        export(json!({"addr": {}})),
        export(json!({"addr": {"type": "unix"}})),
        export(json!({"addr": {"type": "unix", "path": 5}})),
        export(json!({"addr": {"type": "unix", "path": "x", "zz": 1}})),
        export(json!({"addr": unix, "num-queues": "x"})),
        export(json!({"addr": unix, "num-queues": -1})),
        export(json!({"addr": unix, "num-queues": 70000})),
        export(json!({"addr": unix, "num-queues": 0})),
        export(json!({"addr": unix, "writable": "on"})),
        export(json!({"addr": unix, "iothread": "zz"})),
        export(json!({"addr": unix, "node-name": "nobody"})),
        export(json!({"addr": unix, "id": "/x"})),
        export(json!({"addr": unix, "logical-block-size": 1000})),
        export(json!({"addr": unix})),
        command("block-export-del", json!({"id": "nobody"})),
        command("block-export-del", json!({"id": "x", "mode": "foo"})),
        command("blockdev-del", json!({"node-name": "r"})),
        command("blockdev-del", json!({"node-name": "n"})),
    ]))
}

#[test]
fn graph_changes_jobs_and_devices_are_answered_as_the_peer_does() -> Result<()> {
    let commands = include_str!("qmp_commands.txt").lines();
    let commands = commands.filter(|line| !line.is_empty() && !line.starts_with('#'));
    let inputs = commands.map(|line| {
        let (name, arguments) = line.split_once(' ').unwrap_or((line, "{}"));
        Ok(command(name, serde_json::from_str(arguments)?))
    });
    let inputs: Result<Vec<_>> = inputs.collect();
    same_answers(&negotiated(inputs?))
}

/// What a daemon says about a command line that it refuses, without its name.
fn refusal(program: Program, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program.path()?);
    let ended = command.args(arguments).stdin(Stdio::null()).output()?;
    ensure!(
        ended.status.code() == Some(1),
        "{arguments:?}: {}",
        ended.status
    );
    let stderr = String::from_utf8(ended.stderr)?;
    let lines = stderr.lines().filter_map(|line| line.split_once(": "));
    // Lines of a log have more words before the first colon.
    let mut messages = lines.filter(|(name, _)| name.ends_with("daemon") || name.ends_with("blkd"));
    let (_, message) = messages.next().context(stderr.clone())?;
    Ok(message.to_owned())
}

#[test]
fn command_lines_are_refused_in_the_words_of_the_peer() -> Result<()> {
    let null = "null-co,node-name=n,size=1048576";
    let cases: &[&[&str]] = &[
        &["--zz"],
        &["foo"],
        &["--blockdev", "null-co,size"],
        &["--blockdev", "=x"],
        &["--blockdev", "a=1,a.b=2"],
        &["--blockdev", "a.0=1,a.2=3"],
        &["--blockdev", "a..b=3"],
        &["--blockdev", "foo"],
        &["--blockdev", ""],
        &["--blockdev", "null-co,node-name=n,read-only=maybe"],
        &["--blockdev", "null-co,node-name=n,zz=1"],
        &["--blockdev", "raw,node-name=n,file=nobody"],
        &["--blockdev", "{\"driver\": \"null-co\", \"node-name\": 5}"],
        &["--blockdev", "file,node-name=f,filename=/nonexistent"],
        &["--object", "iothread"],
        &["--object", "iothread,id=a,poll-max-ns=x"],
        &["--export", "foo"],
        &["--export", "nbd"],
        &["--export", "help"],
        &["--nbd-server", "foo"],
        &["--chardev", "null,id=a", "--monitor", "a,mode=readline"],
        &["--monitor", "zz"],
        &["--chardev", "zz,id=a"],
        &["--chardev", "socket,path=/nonexistent/s,server=on,wait=off"],
        &["--export", "vhost-user-blk,id=x,node-name=n,addr=5"],
        &["--blockdev", null, "--blockdev", null],
    ];
    let mut differences = Vec::new();
    for arguments in cases {
        let [ours, theirs] = BOTH.map(|program| refusal(program, arguments));
        let (ours, theirs) = (ours?, theirs?);
        if ours != theirs {
            differences.push(format!("{arguments:?}\nours   {ours}\ntheirs {theirs}"));
        }
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

/// A field of every thread of a process.
fn of_every_thread(pid: u32, field: &str) -> Result<Vec<String>> {
    let mut values = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let value = status.lines().find_map(|line| line.strip_prefix(field));
        values.push(value.context("no such field")?.trim().to_owned());
    }
    Ok(values)
}

fn sandboxed(directory: &Path) -> Result<()> {
    let allowed = directory.join("allowed");
    std::fs::create_dir(&allowed)?;
    for image in [directory.join("outside.img"), allowed.join("inside.img")] {
        std::fs::File::create(image)?.set_len(1 << 20)?;
    }
    let socket = directory.join("qmp.sock");
    let arguments = [
        "--object".to_owned(),
        "iothread,id=before".to_owned(),
        "--chardev".to_owned(),
        format!("socket,id=m,path={},server=on,wait=off", socket.display()),
        "--monitor".to_owned(),
        "m".to_owned(),
        "--allow-dir".to_owned(),
        allowed.display().to_string(),
    ];
    let daemon = Launch::new(Program::OutboardBlkd, arguments.into(), directory).start()?;
    let mut monitor = harness::qmp_client::QmpClient::connect(&socket)?;
    monitor.execute("object-add", json!({"qom-type": "iothread", "id": "after"}))?;
    let threads = of_every_thread(daemon.pid(), "Name:")?;
    for name in ["before", "after"] {
        ensure!(threads.iter().any(|known| known == name), "{threads:?}");
    }
    for (field, expected) in [
        ("Seccomp:", "2"),
        ("NoNewPrivs:", "1"),
        ("CapEff:", "0000000000000000"),
        ("CapPrm:", "0000000000000000"),
        ("CapBnd:", "0000000000000000"),
    ] {
        let values = of_every_thread(daemon.pid(), field)?;
        let restricted = values.iter().all(|value| value == expected);
        // The bounding set of a plain user cannot be changed, and does nothing.
        let plain_user = field == "CapBnd:" && !nix::unistd::geteuid().is_root();
        ensure!(restricted || plain_user, "{field} {values:?}");
    }
    let mut open = |name: &str, path: &Path| {
        let filename = path.display().to_string();
        let node = json!({"driver": "file", "node-name": name, "filename": filename});
        monitor.execute("blockdev-add", node)
    };
    open("inside", &allowed.join("inside.img"))?;
    if daemon.stderr().contains("no Landlock") {
        println!("skipped: this kernel does not restrict paths");
        return Ok(());
    }
    let refused = open("outside", &directory.join("outside.img"));
    let error = refused.err().context("a path outside was opened")?;
    ensure!(
        format!("{error:#}").contains("Permission denied"),
        "{error:#}"
    );
    Ok(())
}

#[test]
fn every_thread_is_sandboxed_and_only_allowed_directories_open() -> Result<()> {
    let directory = tempfile::Builder::new()
        .prefix("outboard-sandbox-")
        .tempdir()?;
    sandboxed(directory.path())
}
