//! `--help` and `--version`.

use tools::failure::program;
use tools::output;

const USAGE: &str = "\
Exercises disk images: runs commands that read, write and change one.

  --object OBJECTDEF   define an object, such as a secret: secret,id=NAME,file=PATH
  --image-opts         the file is given as options, key=value,...
  -c, --cmd STRING     run this command; may be given several times
  -f, --format FMT     the format of the file; found out from its content when absent
  -r, --read-only      only for reading
  -s, --snapshot       changes go to a temporary file
  -n, --nocache        without the host's page cache, as -t none
  -C, --copy-on-read   keep what is read from a backing file
  -m, --misalign       accepted for compatibility
  -k, --native-aio     as -i native
  -i, --aio=MODE       threads, native or io_uring; all are done by io_uring
  -t, --cache=MODE     none, writeback, writethrough, directsync or unsafe
  -d, --discard=MODE   ignore or unmap
  -T, --trace ARG      accepted for compatibility
  -U, --force-share    open the file though another process uses it
  --allow-dir DIR      files below DIR may be opened when an image names them
  -h, --help           display this help and exit
  -V, --version        output version information and exit

See '-c help' for the commands. Without -c they are read from standard input.
";

/// Prints how the program is called.
pub(crate) fn show() -> u8 {
    output::line(&format!(
        "Usage: {} [OPTIONS]... [-c STRING]... [file]",
        program()
    ));
    output::print(USAGE);
    output::flush();
    0
}

/// Prints the version.
pub(crate) fn version() -> u8 {
    output::line(&format!(
        "{} version {}",
        program(),
        env!("CARGO_PKG_VERSION")
    ));
    output::flush();
    0
}
