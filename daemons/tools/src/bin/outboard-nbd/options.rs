//! The command line.

use crate::address::Address;
use std::path::PathBuf;
use tools::failure::{Failure, report};
use tools::getopt::{self, Opt, Parsed};
use tools::image::{Cache, Notation};
use tools::size;

/// The port of NBD.
pub(crate) const DEFAULT_PORT: u16 = 10809;

/// What to do.
pub(crate) enum Command {
    Help,
    Version,
    ObjectHelp(String),
    List(Box<ListOptions>),
    Serve(Box<ServeOptions>),
    Disconnect(String),
}

/// What TLS takes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tls {
    /// `--tls-creds`
    pub(crate) creds: Option<String>,
    /// `--tls-authz`
    pub(crate) authz: Option<String>,
    /// `--tls-hostname`
    pub(crate) hostname: Option<String>,
}

/// `-L`
#[derive(Debug)]
pub(crate) struct ListOptions {
    pub(crate) address: Address,
    pub(crate) objects: Vec<String>,
    pub(crate) tls: Tls,
}

/// Serving.
#[derive(Debug)]
pub(crate) struct ServeOptions {
    pub(crate) address: Address,
    pub(crate) objects: Vec<String>,
    pub(crate) tls: Tls,
    /// `-c`
    pub(crate) device: Option<String>,
    /// The image, and how it is opened.
    pub(crate) image: ImageOptions,
    /// `-x`
    pub(crate) export_name: String,
    /// `-D`
    pub(crate) description: Option<String>,
    /// `-A`
    pub(crate) allocation_depth: bool,
    /// `-B`
    pub(crate) bitmaps: Vec<String>,
    /// `-e`; 0 is any number.
    pub(crate) shared: u32,
    /// `-t`
    pub(crate) persistent: bool,
    /// `--fork`
    pub(crate) fork: bool,
    /// `--pid-file`
    pub(crate) pid_file: Option<PathBuf>,
    /// `--selinux-label`
    pub(crate) selinux_label: Option<String>,
    /// `--handshake-limit` in seconds; 0 is none.
    pub(crate) handshake_limit: Option<u64>,
}

/// The image, and how it is opened.
#[derive(Debug, Default)]
pub(crate) struct ImageOptions {
    pub(crate) name: String,
    /// `-f`
    pub(crate) format: Option<String>,
    /// `--image-opts`
    pub(crate) notation: Notation,
    /// `-r`
    pub(crate) read_only: bool,
    /// `-s`
    pub(crate) temporary_overlay: bool,
    /// `-l`
    pub(crate) snapshot: Option<String>,
    /// `-o`, in bytes
    pub(crate) offset: u64,
    /// `--cache`
    pub(crate) cache: Cache,
    /// `--aio`
    pub(crate) aio: Option<String>,
    /// `--discard`; on by default.
    pub(crate) discard: String,
    /// `--detect-zeroes`
    pub(crate) detect_zeroes: String,
    /// `--allow-dir`
    pub(crate) allowed_dirs: Vec<PathBuf>,
}

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::flag(&["V", "version"]),
    Opt::value(&["b", "bind"]),
    Opt::value(&["p", "port"]),
    Opt::value(&["k", "socket"]),
    Opt::value(&["o", "offset"]),
    Opt::flag(&["r", "read-only"]),
    Opt::flag(&["P", "partition"]),
    Opt::value(&["B", "bitmap"]),
    Opt::value(&["c", "connect"]),
    Opt::value(&["d", "disconnect"]),
    Opt::flag(&["A", "allocation-depth"]),
    Opt::flag(&["L", "list"]),
    Opt::flag(&["s", "snapshot"]),
    Opt::value(&["l", "load-snapshot"]),
    Opt::flag(&["n", "nocache"]),
    Opt::value(&["cache"]),
    Opt::value(&["aio"]),
    Opt::value(&["discard"]),
    Opt::value(&["detect-zeroes"]),
    Opt::value(&["e", "shared"]),
    Opt::value(&["f", "format"]),
    Opt::flag(&["t", "persistent"]),
    Opt::flag(&["v", "verbose"]),
    Opt::value(&["object"]),
    Opt::value(&["x", "export-name"]),
    Opt::value(&["D", "description"]),
    Opt::value(&["tls-creds"]),
    Opt::value(&["tls-hostname"]),
    Opt::value(&["tls-authz"]),
    Opt::flag(&["image-opts"]),
    Opt::value(&["T", "trace"]),
    Opt::flag(&["fork"]),
    Opt::value(&["pid-file"]),
    Opt::value(&["selinux-label"]),
    Opt::value(&["handshake-limit"]),
    Opt::value(&["allow-dir"]),
];

/// Everything that options say, before it is known what it is for.
#[derive(Default)]
struct Given {
    bind: Option<String>,
    port: Option<String>,
    socket: Option<PathBuf>,
    list: bool,
    disconnect: Option<String>,
    cache_given: bool,
    per_device: bool,
    serve: Option<ServeOptions>,
}

/// Reads the arguments.
pub(crate) fn parse(arguments: Vec<String>) -> Result<Command, Failure> {
    let Parsed { options, operands } = getopt::parse(arguments, OPTIONS)?;
    let mut given = Given::default();
    let mut serve = default_serve();
    for (name, value) in options {
        match name {
            "h" => return Ok(Command::Help),
            "V" => return Ok(Command::Version),
            "object" => match engine::objects::help(&value) {
                Some(text) => return Ok(Command::ObjectHelp(text)),
                None => serve.objects.push(value),
            },
            _ => take(&mut given, &mut serve, (name, value))?,
        }
    }
    given.serve = Some(serve);
    decide(given, operands)
}

fn default_serve() -> ServeOptions {
    ServeOptions {
        address: Address::default(),
        objects: Vec::new(),
        tls: Tls::default(),
        device: None,
        image: ImageOptions {
            discard: "unmap".to_owned(),
            detect_zeroes: "off".to_owned(),
            ..ImageOptions::default()
        },
        export_name: String::new(),
        description: None,
        allocation_depth: false,
        bitmaps: Vec::new(),
        shared: 1,
        persistent: false,
        fork: false,
        pid_file: None,
        selinux_label: None,
        handshake_limit: None,
    }
}

/// One option.
fn take(
    given: &mut Given,
    serve: &mut ServeOptions,
    (name, value): (&'static str, String),
) -> Result<(), Failure> {
    match name {
        "b" => given.bind = Some(value),
        "p" => given.port = Some(value),
        "k" => given.socket = Some(socket_path(value)?),
        "L" => given.list = true,
        "d" => given.disconnect = Some(value),
        "tls-creds" => serve.tls.creds = Some(value),
        "tls-authz" => serve.tls.authz = Some(value),
        "tls-hostname" => serve.tls.hostname = Some(value),
        "T" | "v" => {}
        "n" | "cache" | "aio" | "discard" | "detect-zeroes" | "f" | "image-opts" | "r" | "s"
        | "l" | "o" | "allow-dir" => {
            given.per_device |= ["r", "s", "l", "o"].contains(&name);
            take_image(&mut given.cache_given, &mut serve.image, (name, value))?;
        }
        "handshake-limit" => {
            let seconds = value.parse();
            let invalid = |_| Failure::message(format!("Invalid handshake limit '{value}'"));
            serve.handshake_limit = Some(seconds.map_err(invalid)?);
        }
        "fork" => serve.fork = true,
        "pid-file" => serve.pid_file = Some(value.into()),
        "selinux-label" => serve.selinux_label = Some(value),
        "P" => {
            let message = "The -P option is gone: use a raw node with offset and size instead";
            return Err(Failure::message(message));
        }
        _ => {
            given.per_device = true;
            take_export(serve, (name, value))?;
        }
    }
    Ok(())
}

fn take_export(
    serve: &mut ServeOptions,
    (name, value): (&'static str, String),
) -> Result<(), Failure> {
    match name {
        "B" => serve.bitmaps.push(value),
        "c" => serve.device = Some(value),
        "A" => serve.allocation_depth = true,
        "x" => serve.export_name = checked("export name", value)?,
        "D" => serve.description = Some(checked("export description", value)?),
        "t" => serve.persistent = true,
        "e" => {
            let invalid = |_| Failure::message(format!("Invalid shared device number '{value}'"));
            serve.shared = value.parse().map_err(invalid)?;
        }
        other => unreachable!("option '{other}' is in the table"),
    }
    Ok(())
}

fn checked(what: &str, value: String) -> Result<String, Failure> {
    match value.len() > nbd::limits::MAX_STRING {
        true => Err(Failure::message(format!("{what} '{value}' too long"))),
        false => Ok(value),
    }
}

fn take_image(
    cache_given: &mut bool,
    image: &mut ImageOptions,
    (name, value): (&'static str, String),
) -> Result<(), Failure> {
    match name {
        "n" | "cache" => {
            if std::mem::replace(cache_given, true) {
                let message = "-n and --cache can only be specified once";
                return Err(Failure::message(message));
            }
            let mode = if name == "n" { "none" } else { &value };
            image.cache = Cache::parse(mode)
                .map_err(|_| Failure::message(format!("Invalid cache mode `{value}'")))?;
        }
        "aio" => {
            if image.aio.is_some() {
                return Err(Failure::message("--aio can only be specified once"));
            }
            if !["native", "threads", "io_uring"].contains(&&*value) {
                return Err(Failure::message(format!("Invalid aio mode '{value}'")));
            }
            image.aio = Some(value);
        }
        "discard" => {
            image.discard = match &*value {
                "ignore" | "off" => "ignore".to_owned(),
                "unmap" | "on" => "unmap".to_owned(),
                _ => return Err(Failure::message(format!("Invalid discard mode `{value}'"))),
            }
        }
        "detect-zeroes" => {
            if !["off", "on", "unmap"].contains(&&*value) {
                return Err(Failure::message(format!(
                    "Failed to parse detect_zeroes mode: invalid parameter value: {value}"
                )));
            }
            image.detect_zeroes = value;
        }
        "f" => image.format = Some(value),
        "image-opts" => image.notation = Notation::Options,
        "r" => image.read_only = true,
        "s" => image.temporary_overlay = true,
        "l" => {
            image.snapshot = Some(value);
            image.read_only = true;
        }
        "o" => {
            let parsed = size::parse(&value);
            let invalid = |_| Failure::message(format!("Invalid offset '{value}'"));
            image.offset = parsed.map_err(invalid)?;
        }
        "allow-dir" => image.allowed_dirs.push(value.into()),
        other => unreachable!("option '{other}' is in the table"),
    }
    Ok(())
}

fn socket_path(value: String) -> Result<PathBuf, Failure> {
    if value.starts_with('/') {
        return Ok(value.into());
    }
    Err(Failure::message("socket path must be absolute"))
}

/// What all options together ask for.
fn decide(given: Given, mut operands: Vec<String>) -> Result<Command, Failure> {
    let Some(mut serve) = given.serve else {
        return Err(Failure::Silent(1));
    };
    let address = Address::new(given.socket, given.bind, given.port.as_deref())?;
    if let Some(device) = given.disconnect {
        if !operands.is_empty() {
            return Err(bad_count());
        }
        return Ok(Command::Disconnect(device));
    }
    if given.list {
        if !operands.is_empty() {
            return Err(Failure::message(
                "List mode is incompatible with a file name",
            ));
        }
        if given.per_device {
            let message = "List mode is incompatible with per-device settings";
            return Err(Failure::message(message));
        }
        if serve.fork {
            return Err(Failure::message("List mode is incompatible with forking"));
        }
        return Ok(Command::List(Box::new(ListOptions {
            address,
            objects: serve.objects,
            tls: serve.tls,
        })));
    }
    if operands.len() != 1 {
        return Err(bad_count());
    }
    check_tls(&serve, &address)?;
    serve.image.name = operands.remove(0);
    serve.address = match (&serve.device, address.is_given()) {
        // The kernel is handed a socket of its own; nobody needs to find it.
        (Some(device), false) => Address::for_device(device),
        _ => address,
    };
    // The kernel's client goes on until it is disconnected, in the background.
    serve.fork |= serve.device.is_some();
    Ok(Command::Serve(Box::new(serve)))
}

fn check_tls(serve: &ServeOptions, address: &Address) -> Result<(), Failure> {
    let tls = &serve.tls;
    if tls.creds.is_none() && tls.authz.is_some() {
        return Err(Failure::message(
            "--tls-authz is not permitted without --tls-creds",
        ));
    }
    if tls.hostname.is_some() {
        return Err(Failure::message(
            "TLS hostname is only supported with export list",
        ));
    }
    if tls.creds.is_some() && serve.device.is_some() {
        return Err(Failure::message(
            "TLS is not supported when connecting to a device",
        ));
    }
    let _ = address;
    Ok(())
}

fn bad_count() -> Failure {
    report("Invalid number of arguments");
    eprintln!(
        "Try `{} --help' for more information.",
        tools::failure::program()
    );
    Failure::Silent(1)
}
