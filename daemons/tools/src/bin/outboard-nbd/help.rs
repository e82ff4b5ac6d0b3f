//! `--help` and `--version`.

use std::io::Write;
use tools::failure::program;

const HELP: &str = "\
Serves a disk image over NBD (Network Block Device), or lists what a server offers.

  -h, --help                display this help and exit
  -V, --version             output version information and exit

Connection
  -p, --port=PORT           port to listen on, or to ask (10809)
  -b, --bind=IFACE          address to listen on, or host to ask (0.0.0.0)
  -k, --socket=PATH         unix socket to listen on, or to ask
  -e, --shared=NUM          clients at a time (1); 0 for any number
  -t, --persistent          go on when the last client has left
  -v, --verbose             accepted for compatibility
  -x, --export-name=NAME    name of the export (empty)
  -D, --description=TEXT    description of the export
      --handshake-limit=N   seconds that a client may negotiate (10); 0 for any

Part of the image
  -o, --offset=OFFSET       where the export begins in the image
  -A, --allocation-depth    tell how deep in the backing chain data is
  -B, --bitmap=NAME         tell what a persistent dirty bitmap records

General
  -L, --list                list the exports of another server
  --object type,id=ID,...   define an object; 'help' lists types
  --tls-creds=ID            TLS with the credentials of an --object
  --tls-hostname=NAME       name that the server's certificate must have (-L)
  --tls-authz=ID            clients that an --object lets in
  -T, --trace ...           accepted for compatibility
  --fork                    go into the background once the server listens
  --pid-file=PATH           write the server's process id to a file
  --selinux-label=LABEL     SELinux context of the listening socket

Kernel client
  -c, --connect=DEV         connect the image to the kernel's device DEV
  -d, --disconnect=DEV      disconnect DEV

Image
  -f, --format=FORMAT       format; found out from the content when absent
  -r, --read-only           clients cannot write
  -s, --snapshot            writes go to a temporary overlay
  -l, --load-snapshot=SNAP  show an internal snapshot, read-only: its id or name,
                            or 'snapshot.id=ID,snapshot.name=NAME'
  -n, --nocache             the same as --cache=none
      --cache=MODE          none, writeback (default), writethrough, directsync, unsafe
      --aio=MODE            native, io_uring, threads: the same here, io_uring
      --discard=MODE        ignore, unmap (default)
      --detect-zeroes=MODE  off (default), on, unmap
      --image-opts          FILE is options: driver=...,file.filename=...
      --allow-dir=DIR       names inside images may open files below DIR
";

/// Prints the manual's short form.
pub(crate) fn show() -> u8 {
    let program = program();
    print(&format!(
        "Usage: {program} [OPTIONS] FILE\n  or:  {program} -L [OPTIONS]\n{HELP}"
    ))
}

/// Prints the version.
pub(crate) fn version() -> u8 {
    print(&format!(
        "{} version {}\n",
        program(),
        env!("CARGO_PKG_VERSION")
    ))
}

/// Prints a text; who does not want to read it has closed the pipe.
pub(crate) fn print(text: &str) -> u8 {
    let _ = std::io::stdout().write_all(text.as_bytes());
    0
}
