//! A disk image, the daemon that serves it, and what is needed to start both again.
//!
//! [`Disk`] says what is wanted and turns it into a command line that outboard-blkd and
//! qemu-storage-daemon both understand; [`Rig`] is one running instance in a temporary directory.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::driver::{Endpoint, FrontEnd, Options, Queue};
use crate::oracle::{Initial, Oracle};
use crate::process::{Daemon, Launch, Program};
use crate::qmp_client::QmpClient;
use crate::{load, peer};

/// Image formats that are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Raw file.
    Raw,
    /// qcow2, version 3, default cluster size.
    Qcow2,
    /// qcow2 on top of a raw base image of half the size, with small clusters.
    Qcow2Overlay,
    /// Another format, by its driver's name, default options.
    Other(&'static str),
}

impl Format {
    /// The driver's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 | Self::Qcow2Overlay => "qcow2",
            Self::Other(name) => name,
        }
    }

    /// QEMU's tools can check such images.
    fn has_check(self) -> bool {
        !matches!(self.name(), "raw" | "qcow" | "vpc")
    }
}

/// Who connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meeting {
    /// The daemon listens on a path that it creates.
    DaemonListens,
    /// The daemon listens on a socket that it inherits, as from systemd.
    Activated,
    /// We listen, the daemon connects and reconnects.
    DaemonConnects,
}

/// What a guest may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read and write.
    Writable,
    /// Read only.
    ReadOnly,
}

/// Where a disk's images are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the directory for temporary files, mostly on a disk.
    Temporary,
    /// On tmpfs, where the daemon maps them.
    Memory,
}

/// The disk that a scenario wants.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Which daemon serves it.
    pub program: Program,
    /// Image format.
    pub format: Format,
    /// Virtual size in bytes.
    pub bytes: u64,
    /// Where the images are.
    pub place: Place,
    /// Virtqueues.
    pub queues: usize,
    /// `iothread` objects that the queues are spread over; the default thread when 0.
    pub iothreads: usize,
    /// Guest access.
    pub access: Access,
    /// Serial number, where the program has such an option.
    pub serial: Option<String>,
    /// Who connects.
    pub meeting: Meeting,
    /// A second export, of a null device, on `second.sock`.
    pub second_export: bool,
}

impl Disk {
    /// A writable 64 MiB disk with one queue.
    pub fn new(program: Program, format: Format) -> Self {
        Self {
            program,
            format,
            bytes: 64 << 20,
            place: Place::Temporary,
            queues: 1,
            iothreads: 1,
            access: Access::Writable,
            serial: None,
            meeting: Meeting::DaemonListens,
            second_export: false,
        }
    }

    /// With that many queues and iothreads.
    #[must_use]
    pub fn queues(mut self, queues: usize, iothreads: usize) -> Self {
        (self.queues, self.iothreads) = (queues, iothreads);
        self
    }

    fn arguments(&self, paths: &Paths) -> Vec<String> {
        let show = |path: &Path| path.display().to_string();
        let read_only = self.access == Access::ReadOnly;
        let mut arguments = vec![
            "--chardev".to_owned(),
            format!("socket,id=m,path={},server=on,wait=off", show(&paths.qmp)),
            "--monitor".to_owned(),
            "chardev=m".to_owned(),
        ];
        for index in 0..self.iothreads {
            arguments.extend(["--object".to_owned(), format!("iothread,id=io{index}")]);
        }
        let file = format!(
            "driver=file,node-name=f,filename={},discard=unmap,read-only={}",
            show(&paths.image),
            on_off(read_only)
        );
        let top = format!(
            "driver={},node-name=n,file=f,discard=unmap,read-only={}",
            self.format.name(),
            on_off(read_only)
        );
        arguments.extend(["--blockdev".to_owned(), file]);
        if self.format == Format::Qcow2Overlay {
            let base = format!(
                "driver=file,node-name=bf,filename={},read-only=on",
                show(&paths.base)
            );
            let format = "driver=raw,node-name=b,file=bf,read-only=on".to_owned();
            arguments.extend([
                "--blockdev".to_owned(),
                base,
                "--blockdev".to_owned(),
                format,
            ]);
            arguments.extend(["--blockdev".to_owned(), format!("{top},backing=b")]);
        } else {
            arguments.extend(["--blockdev".to_owned(), top]);
        }
        arguments.extend(["--export".to_owned(), self.export(paths)]);
        if self.second_export {
            let null = "driver=null-co,node-name=z,size=1048576,read-zeroes=on".to_owned();
            let export = format!(
                "type=vhost-user-blk,id=e2,node-name=z,addr.type=unix,addr.path={}",
                show(&paths.second)
            );
            arguments.extend(["--blockdev".to_owned(), null, "--export".to_owned(), export]);
        }
        arguments
    }

    fn export(&self, paths: &Paths) -> String {
        let address = match self.meeting {
            Meeting::DaemonListens => {
                format!("addr.type=unix,addr.path={}", paths.socket.display())
            }
            Meeting::Activated => "addr.type=fd,addr.str=3".to_owned(),
            Meeting::DaemonConnects => {
                format!(
                    "addr.type=unix,addr.path={},server=off",
                    paths.socket.display()
                )
            }
        };
        let writable = on_off(self.access == Access::Writable);
        let mut export = format!(
            "type=vhost-user-blk,id=e,node-name=n,{address},writable={writable},num-queues={}",
            self.queues
        );
        match self.iothreads {
            0 => {}
            1 => export.push_str(",iothread=io0"),
            count => (0..count).for_each(|i| export.push_str(&format!(",iothread.{i}=io{i}"))),
        }
        if let Some(serial) = &self.serial {
            export.push_str(&format!(",serial={serial}"));
        }
        export
    }
}

/// Where a rig's files are.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The image that the guest sees.
    pub image: PathBuf,
    /// The base image of an overlay.
    pub base: PathBuf,
    /// vhost-user socket.
    pub socket: PathBuf,
    /// vhost-user socket of the second export.
    pub second: PathBuf,
    /// Monitor socket.
    pub qmp: PathBuf,
}

/// A daemon serving a disk.
#[derive(Debug)]
pub struct Rig {
    /// The disk's description.
    pub disk: Disk,
    /// What the disk should hold.
    pub oracle: Arc<Oracle>,
    /// Where things are.
    pub paths: Paths,
    /// The daemon.
    pub daemon: Daemon,
    launch: Launch,
    listener: Option<UnixListener>,
    directory: TempDir,
}

impl Rig {
    /// Makes the image, all zero, and starts the daemon.
    ///
    /// # Errors
    /// When a tool or the daemon fails.
    pub fn start(disk: Disk) -> Result<Self> {
        Self::start_prepared(disk, |_| Ok(()))
    }

    /// As [`Rig::start`], after `prepare` did something to the new image.
    ///
    /// # Errors
    /// When a tool, `prepare` or the daemon fails.
    pub fn start_prepared(disk: Disk, prepare: impl FnOnce(&Paths) -> Result<()>) -> Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("outboard-test-");
        let directory = match disk.place {
            Place::Temporary => builder.tempdir()?,
            Place::Memory => builder.tempdir_in("/dev/shm")?,
        };
        let at = |name: &str| directory.path().join(name);
        let paths = Paths {
            image: at("disk.img"),
            base: at("base.img"),
            socket: at("vhost.sock"),
            second: at("second.sock"),
            qmp: at("qmp.sock"),
        };
        create_image(&disk, &paths)?;
        prepare(&paths)?;
        let mut launch = Launch::new(disk.program, disk.arguments(&paths), directory.path());
        let listener = match disk.meeting {
            Meeting::DaemonListens => None,
            Meeting::Activated | Meeting::DaemonConnects => {
                Some(UnixListener::bind(&paths.socket).context("listening for the daemon")?)
            }
        };
        if let (Meeting::Activated, Some(listener)) = (disk.meeting, &listener) {
            launch = launch.with_listener(listener.try_clone()?);
        }
        let daemon = launch.start()?;
        let oracle = Arc::new(Oracle::new(disk.bytes / 512, Initial::Zero));
        Ok(Self {
            disk,
            oracle,
            paths,
            daemon,
            launch,
            listener,
            directory,
        })
    }

    /// Where the front-end meets the daemon.
    ///
    /// # Errors
    /// When the listening socket cannot be duplicated.
    pub fn endpoint(&self) -> Result<Endpoint> {
        Ok(match (&self.disk.meeting, &self.listener) {
            (Meeting::DaemonConnects, Some(listener)) => Endpoint::Accept(listener.try_clone()?),
            _ => Endpoint::Connect(self.paths.socket.clone()),
        })
    }

    /// A driver on the disk, with as many queues as the disk has.
    ///
    /// # Errors
    /// When the daemon does not cooperate.
    pub fn connect(&self, options: Options) -> Result<(FrontEnd, Vec<Queue>)> {
        let options = Options {
            queues: self.disk.queues,
            ..options
        };
        FrontEnd::connect(self.endpoint()?, options)
    }

    /// A driver on the second export.
    ///
    /// # Errors
    /// When the daemon does not cooperate.
    pub fn connect_second(&self) -> Result<(FrontEnd, Vec<Queue>)> {
        let endpoint = Endpoint::Connect(self.paths.second.clone());
        FrontEnd::connect(endpoint, Options::default())
    }

    /// The daemon's monitor.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn monitor(&self) -> Result<QmpClient> {
        QmpClient::connect(&self.paths.qmp)
    }

    /// Kills the daemon with SIGKILL and starts it again with the same command line.
    ///
    /// # Errors
    /// When it had ended before, or does not come up.
    pub fn kill_and_restart(&mut self) -> Result<()> {
        self.daemon.kill()?;
        self.restart()
    }

    /// Starts the daemon, which has ended, with the same command line.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon = self.launch.start()?;
        Ok(())
    }

    /// Reads everything back, disconnects, ends the daemon with SIGTERM, and has QEMU's tools judge
    /// the image: no error, no leak, and the bytes that the oracle expects.
    ///
    /// # Errors
    /// At the first disagreement.
    pub fn finish(self, front_end: FrontEnd, mut queues: Vec<Queue>) -> Result<()> {
        load::verify_all(&mut queues[0], &self.oracle)?;
        drop(front_end);
        self.finish_offline(Leaks::Refused)
    }

    /// As [`Rig::finish`] without reading through the driver; `leaks` says whether clusters that
    /// nothing refers to are acceptable.
    ///
    /// # Errors
    /// At the first disagreement.
    pub fn finish_offline(mut self, leaks: Leaks) -> Result<()> {
        let log = self.daemon.stderr();
        let status = self.daemon.stop()?;
        ensure!(
            status.success(),
            "SIGTERM ended the daemon with {status}\n{log}"
        );
        let expected = self.directory.path().join("expected.raw");
        self.oracle.write_raw(&expected)?;
        let format = self.disk.format.name();
        if self.disk.format.has_check() {
            match leaks {
                Leaks::Refused => peer::check(format, &self.paths.image)?,
                Leaks::Allowed => peer::check_allowing_leaks(format, &self.paths.image)?,
            }
        }
        peer::compare((format, &self.paths.image), ("raw", &expected))
    }
}

/// Whether leaked clusters are acceptable at the end of a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaks {
    /// After kills.
    Allowed,
    /// After an orderly life.
    Refused,
}

fn create_image(disk: &Disk, paths: &Paths) -> Result<()> {
    match disk.format {
        Format::Raw | Format::Qcow2 => {
            peer::create(disk.format.name(), &paths.image, disk.bytes, "")
        }
        // Otherwise the disk has the length of some geometry.
        Format::Other("vpc") => peer::create("vpc", &paths.image, disk.bytes, "force_size=on"),
        Format::Other(name) => peer::create(name, &paths.image, disk.bytes, ""),
        Format::Qcow2Overlay => {
            peer::create("raw", &paths.base, disk.bytes / 2, "")?;
            let options = format!(
                "cluster_size=4k,backing_file={},backing_fmt=raw",
                paths.base.display()
            );
            peer::create("qcow2", &paths.image, disk.bytes, &options)
        }
    }
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}
