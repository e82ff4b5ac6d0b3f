use std::cell::RefCell;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::rc::Rc;

use super::*;
use crate::link::NetQueue;
use crate::netdev::{Notice, PeerAddress};
use crate::netdevs::test_support::*;

/// What makes this test program a keeper.
const KEEPER: &str = "OUTBOARD_TEST_KEEPER";

/// Not a test of its own: the keeper of the others.
#[test]
fn keeper_process() {
    use std::os::fd::AsFd;
    if std::env::var_os(KEEPER).is_none() {
        return;
    }
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let at = arguments
        .iter()
        .position(|argument| argument == "--")
        .unwrap();
    let code = keeper::run(io::stdin().as_fd(), &arguments[at + 1..]);
    std::process::exit(if code == std::process::ExitCode::SUCCESS {
        0
    } else {
        1
    });
}

/// Opens the back-end with this test program as the keeper.
fn open_passt(program: &str, args: &[&str], notice: Rc<dyn Fn(Notice)>) -> Result<Passt> {
    let mut keeper = Command::new(std::env::current_exe().unwrap());
    keeper.args([
        "--exact",
        "netdevs::passt::tests::keeper_process",
        "--nocapture",
    ]);
    // What follows is not for the test program: it would take it for names of tests.
    keeper.arg("--").env(KEEPER, "1");
    let options = PasstOptions {
        path: Some(program.to_owned()),
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
    };
    with_context(Vec::new(), notice, |context| {
        Passt::open_with(keeper, &options, context)
    })
}

/// A script that takes passt's place: after `before`, it sends `text` in a frame, and then does `after`.
fn script(directory: &Path, before: &str, text: &str, after: &str) -> String {
    let path = directory.join("fake-passt");
    let lines = format!(
        "#!/bin/sh\n{before}\n\
         printf '\\000\\000\\000\\116abcdefABCDEF\\010\\000%-64s' \"{text}\" >&$3\n{after}\n"
    );
    std::fs::write(&path, lines).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

/// What the scripts have sent, once they are `count`.
async fn texts(queue: &dyn NetQueue, sink: &TestSink, count: usize) -> Vec<String> {
    receive_until(queue, sink, |sink| sink.frames.borrow().len() == count).await;
    let text = |bytes: &Vec<u8>| String::from_utf8_lossy(&bytes[14..]).trim().to_owned();
    sink.bytes().iter().map(text).collect()
}

/// A connected queue.
fn guest(passt: &Passt) -> (Rc<dyn NetQueue>, Rc<TestSink>) {
    let queue = queue(passt, 0);
    let sink = TestSink::new(100);
    queue.connect(sink.clone());
    (queue, sink)
}

fn is_running(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

fn silent() -> Rc<dyn Fn(Notice)> {
    Rc::new(|_| {})
}

#[test]
fn a_program_that_ends_is_started_again_and_its_socket_is_the_new_peer() {
    on_executor(async {
        let directory = tempfile::tempdir().unwrap();
        let program = script(directory.path(), "", "$$", "exec sleep 1000");
        let notices = Rc::new(RefCell::new(Vec::new()));
        let heard = Rc::clone(&notices);
        let hear = Rc::new(move |notice| heard.borrow_mut().push(notice));
        let passt = open_passt(&program, &[], hear).unwrap();
        let (queue, sink) = guest(&passt);
        let mut last = 0;
        for round in 1..=3 {
            last = texts(&*queue, &sink, round).await[round - 1]
                .parse()
                .unwrap();
            if round < 3 {
                let pid = nix::unistd::Pid::from_raw(last);
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
            }
        }
        executor::time::yield_now().await;
        // A socket pair's ends have no names.
        let there = Notice::Connected(PeerAddress::Unix {
            path: String::new(),
        });
        let expected = [
            there.clone(),
            Notice::Disconnected,
            there.clone(),
            Notice::Disconnected,
            there,
        ];
        assert_eq!(*notices.borrow(), expected);
        assert!(is_running(last));
        drop(queue);
        drop(passt);
        assert!(!is_running(last), "the program ends with its back-end");
    });
}

#[test]
fn a_program_that_is_not_there_is_an_error() {
    on_executor(async {
        let error = open_passt("/nonexistent/passt", &[], silent())
            .err()
            .unwrap();
        assert!(
            format!("{error:#}").contains("cannot start '/nonexistent/passt': No such file"),
            "{error:#}"
        );
    });
}

#[test]
fn a_program_that_does_not_mind_sigterm_is_killed() {
    on_executor(async {
        let directory = tempfile::tempdir().unwrap();
        let forever = "while :; do sleep 1; done";
        let program = script(directory.path(), "trap '' TERM", "$$", forever);
        let passt = open_passt(&program, &[], silent()).unwrap();
        let (queue, sink) = guest(&passt);
        let pid = texts(&*queue, &sink, 1).await[0].parse().unwrap();
        assert!(is_running(pid));
        drop(passt);
        assert!(!is_running(pid));
    });
}

#[test]
fn the_programs_arguments_follow_ours() {
    on_executor(async {
        let directory = tempfile::tempdir().unwrap();
        let program = script(directory.path(), "", "$1 $2 $4 $5", "exec sleep 1000");
        let passt = open_passt(&program, &["--tcp-ports", "2222:22"], silent()).unwrap();
        let (queue, sink) = guest(&passt);
        let words = texts(&*queue, &sink, 1).await;
        assert_eq!(words, ["--foreground --fd --tcp-ports 2222:22"]);
    });
}

#[test]
fn passt_itself_answers_a_guest() {
    in_namespace(|| async {
        run([
            "ip", "link", "add", "ob-pa0", "type", "veth", "peer", "name", "ob-pa1",
        ]);
        run(["ip", "addr", "add", "10.9.0.2/24", "dev", "ob-pa0"]);
        run(["ip", "link", "set", "ob-pa0", "up"]);
        run(["ip", "link", "set", "ob-pa1", "up"]);
        run(["ip", "route", "add", "default", "via", "10.9.0.1"]);
        let passt = match open_passt("passt", &["--ipv4-only"], silent()) {
            Ok(passt) => passt,
            Err(error) => {
                println!("skipped: {error:#} (scripts/setup installs passt)");
                return;
            }
        };
        let (queue, sink) = guest(&passt);
        while passt.details()["connected"] != true {
            queue.receive(1).unwrap();
            executor::time::yield_now().await;
        }
        // Who has 10.9.0.1?
        let mac = [0x52, 0x54, 0, 0, 0, 1];
        let mut request = [[0xff; 6], mac].concat();
        request.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        request.extend(mac);
        request.extend([10, 9, 0, 2, 0, 0, 0, 0, 0, 0, 10, 9, 0, 1]);
        request.resize(60, 0);
        send(&*queue, &request);
        let reply = |bytes: &Vec<u8>| bytes[12..14] == [8, 6] && bytes[20..22] == [0, 2];
        receive_until(&*queue, &sink, |sink| sink.bytes().iter().any(reply)).await;
    });
}
