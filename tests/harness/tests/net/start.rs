//! How the daemon is started by others: socket activation, and as a daemon of its own with a pid file.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use harness::driver::Endpoint;
use harness::net::{NetDevice, Options};
use harness::process::{Launch, PATIENCE, Program, workspace_binary};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getsid};

use crate::echo::LIMIT;
use crate::traffic::Traffic;

/// What the socket unit that is shipped calls its socket.
fn name_in_socket_unit() -> Result<String> {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../daemons/net/systemd/outboard-netd@.socket");
    let text = fs::read_to_string(&unit).with_context(|| unit.display().to_string())?;
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("FileDescriptorName="));
    Ok(name.context("a socket without a name")?.to_owned())
}

#[test]
fn front_ends_of_an_activated_daemon_wait_for_its_successor() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("vhost.sock");
    let name = name_in_socket_unit()?;
    let line = format!("--netdev echo,id=n0 --port p0,netdev=n0,socket=fd:{name}");
    let arguments = line.split(' ').map(str::to_owned).collect();
    let launch = Launch::new(Program::OutboardNetd, arguments, directory.path())
        .with_named_listener(&name, UnixListener::bind(&path)?);
    let mut daemon = launch.start()?;
    let mut device = NetDevice::connect(Endpoint::Connect(path.clone()), Options::default())?;
    let traffic = Traffic::new(200, &[60, 1514]);
    traffic.echoed(&mut device.pairs[0], LIMIT)?;
    daemon.kill()?;
    std::thread::scope(|scope| {
        // The socket is there all the time, so this connects to no daemon yet and is answered by the next one.
        let reconnecting = scope.spawn(|| device.reconnect());
        daemon = launch.start()?;
        reconnecting.join().expect("the front-end's thread")
    })?;
    traffic.echoed(&mut device.pairs[0], LIMIT)?;
    ensure!(daemon.stop()?.success(), "{}", daemon.stderr());
    ensure!(path.exists(), "the socket is the service manager's");
    Ok(())
}

/// A process that is nobody's child here. Killed when dropped.
struct Background(Pid);

impl Drop for Background {
    fn drop(&mut self) {
        // One that has ended is what the test wants.
        let _ = kill(self.0, Signal::SIGKILL);
    }
}

/// Waits until `path` is not there any more.
fn removed(path: &Path, watch: &Inotify) -> Result<()> {
    while path.exists() {
        let mut fds = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::try_from(PATIENCE)?)?;
        ensure!(ready > 0, "{} is still there", path.display());
        watch.read_events()?;
    }
    Ok(())
}

#[test]
fn a_daemon_in_the_background_listens_once_its_starter_returns() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let [socket, pidfile] = ["p0.sock", "netd.pid"].map(|name| directory.path().join(name));
    // Relative to the directory that the daemon leaves.
    let start = || -> Result<_> {
        let line =
            "--daemonize --pidfile netd.pid --netdev echo,id=n0 --port p0,netdev=n0,socket=p0.sock";
        let mut command = Command::new(workspace_binary("outboard-netd")?);
        command.args(line.split(' ')).current_dir(directory.path());
        // This waits until nobody holds the pipes, so the daemon has to let go of them.
        Ok(command.output()?)
    };
    let started = start()?;
    let told = String::from_utf8_lossy(&started.stderr);
    ensure!(started.status.success(), "{}: {told}", started.status);
    let text = fs::read_to_string(&pidfile)?;
    let pid = text.strip_suffix('\n').context("a line")?.parse()?;
    let background = Background(Pid::from_raw(pid));
    let program = fs::read_link(format!("/proc/{pid}/exe"))?;
    ensure!(program == workspace_binary("outboard-netd")?.canonicalize()?);
    ensure!(fs::read_link(format!("/proc/{pid}/cwd"))? == Path::new("/"));
    ensure!(
        getsid(Some(background.0))? == background.0,
        "no session of its own"
    );
    drop(UnixStream::connect(&socket).context("the socket is not listened at")?);
    let mut device = NetDevice::connect(Endpoint::Connect(socket.clone()), Options::default())?;
    Traffic::new(200, &[60, 1514]).echoed(&mut device.pairs[0], LIMIT)?;
    let second = start()?;
    let told = String::from_utf8_lossy(&second.stderr);
    ensure!(
        !second.status.success(),
        "a second daemon has the same pid file"
    );
    ensure!(
        fs::read_to_string(&pidfile)? == text,
        "the pid file is another's: {told}"
    );
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    watch.add_watch(directory.path(), AddWatchFlags::IN_DELETE)?;
    kill(background.0, Signal::SIGTERM)?;
    removed(&pidfile, &watch)?;
    ensure!(!socket.exists(), "the port's socket is left");
    Ok(())
}
