//! The files of an initramfs, collected before they are written.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::archive::{Archive, Header};

/// A file tree; paths are absolute, parent directories come by themselves.
#[derive(Debug, Clone, Default)]
pub struct Tree {
    entries: BTreeMap<PathBuf, Entry>,
}

#[derive(Debug, Clone)]
enum Entry {
    Directory,
    /// A character device.
    Device(u32, u32),
    Text(String),
    Copy(PathBuf),
}

impl Tree {
    /// Directories and nodes that any kernel needs for its first process, and busybox as `/bin/sh`.
    ///
    /// # Errors
    /// busybox is not installed, or is not a static binary.
    pub fn with_busybox() -> Result<Self> {
        let mut tree = Self::default();
        for directory in [
            "/bin", "/dev", "/proc", "/sys", "/tmp", "/run", "/mnt", "/modules",
        ] {
            tree.directory(directory);
        }
        tree.insert("/dev/console", Entry::Device(5, 1));
        let busybox = Path::new("/bin/busybox");
        ensure!(
            shared_libraries(busybox)?.is_empty(),
            "/bin/busybox is not busybox-static"
        );
        tree.copy(busybox, "/bin/busybox")?;
        tree.copy(busybox, "/bin/sh")?;
        Ok(tree)
    }

    /// An empty directory.
    pub fn directory(&mut self, path: impl AsRef<Path>) {
        self.insert(path, Entry::Directory);
    }

    /// A file with the given content, executable.
    pub fn text(&mut self, path: impl AsRef<Path>, text: impl Into<String>) {
        self.insert(path, Entry::Text(text.into()));
    }

    /// A copy of a file of this machine.
    ///
    /// # Errors
    /// `source` is not a readable file.
    pub fn copy(&mut self, source: impl AsRef<Path>, path: impl AsRef<Path>) -> Result<()> {
        let source = source.as_ref();
        ensure!(source.is_file(), "{} is not a file", source.display());
        self.insert(path, Entry::Copy(source.into()));
        Ok(())
    }

    /// A program of this machine, put into `/bin` under its own name, with the shared libraries that it asks for.
    ///
    /// # Errors
    /// The program is not there, or one of its libraries is not.
    pub fn program(&mut self, source: impl AsRef<Path>) -> Result<()> {
        let name = source
            .as_ref()
            .file_name()
            .context("a program has a file name")?;
        self.program_as(&source, Path::new("/bin").join(name))
    }

    /// A program of this machine under another path, with the shared libraries that it asks for.
    ///
    /// # Errors
    /// As for [`Tree::program`].
    pub fn program_as(&mut self, source: impl AsRef<Path>, path: impl AsRef<Path>) -> Result<()> {
        for library in shared_libraries(source.as_ref())? {
            self.copy(&library, &library)?;
        }
        self.copy(source, path)
    }

    /// Kernel modules, in loading order, as `/modules/NN-name.ko`.
    ///
    /// # Errors
    /// One of them is not there.
    pub fn modules(&mut self, files: &[PathBuf]) -> Result<()> {
        for (index, file) in files.iter().enumerate() {
            let name = file
                .file_name()
                .context("a module has a file name")?
                .to_string_lossy();
            self.copy(file, format!("/modules/{index:02}-{name}"))?;
        }
        Ok(())
    }

    /// Writes the tree as an uncompressed initramfs (unpacking is what costs time in an emulated machine).
    ///
    /// # Errors
    /// A source cannot be read, is larger than the format can say, or `path` cannot be written.
    pub fn write_initramfs(&self, path: &Path) -> Result<()> {
        let out = File::create(path).with_context(|| format!("create {}", path.display()))?;
        let mut archive = Archive::new(BufWriter::with_capacity(1 << 20, out));
        for (name, entry) in &self.entries {
            let name = name.to_string_lossy();
            let (mode, device, content) = match entry {
                Entry::Directory => (0o040755, (0, 0), Vec::new()),
                Entry::Device(major, minor) => (0o020600, (*major, *minor), Vec::new()),
                Entry::Text(text) => (0o100755, (0, 0), text.clone().into_bytes()),
                Entry::Copy(source) => {
                    let content = fs::read(source);
                    let content = content.with_context(|| format!("read {}", source.display()))?;
                    (0o100755, (0, 0), content)
                }
            };
            let length = u32::try_from(content.len());
            let length = length.with_context(|| format!("{name} is too large for an initramfs"))?;
            let header = Header {
                name: name.trim_start_matches('/'),
                mode,
                length,
                device,
            };
            archive
                .entry(&header, &content)
                .context("write initramfs")?;
        }
        archive.finish().context("write initramfs")
    }

    fn insert(&mut self, path: impl AsRef<Path>, entry: Entry) {
        let path = path.as_ref();
        for parent in path
            .ancestors()
            .skip(1)
            .filter(|parent| *parent != Path::new("/"))
        {
            self.entries
                .entry(parent.into())
                .or_insert(Entry::Directory);
        }
        self.entries.insert(path.into(), entry);
    }
}

/// The absolute paths of the shared libraries and the loader of `program`, as the dynamic linker finds them; none for a static one.
fn shared_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    if text.contains("statically linked") || errors.contains("not a dynamic executable") {
        return Ok(Vec::new());
    }
    ensure!(
        output.status.success(),
        "ldd {}: {}",
        program.display(),
        errors.trim()
    );
    let mut libraries = Vec::new();
    for line in text.lines() {
        if line.contains("not found") {
            bail!("{} lacks a library: {}", program.display(), line.trim());
        }
        libraries.extend(
            line.split_whitespace()
                .find(|word| word.starts_with('/'))
                .map(PathBuf::from),
        );
    }
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_brings_its_loader_and_libraries() {
        let mut tree = Tree::default();
        tree.program(std::env::current_exe().unwrap()).unwrap();
        let names: Vec<_> = tree
            .entries
            .keys()
            .map(|path| path.to_string_lossy())
            .collect();
        assert!(
            names.iter().any(|name| name.contains("/ld-linux")),
            "{names:?}"
        );
        assert!(
            names.iter().any(|name| name.contains("/libc.so")),
            "{names:?}"
        );
    }

    #[test]
    fn parents_are_there_before_their_children() {
        let mut tree = Tree::default();
        tree.text("/a/b/c", "content");
        let paths: Vec<_> = tree
            .entries
            .keys()
            .map(|path| path.to_str().unwrap())
            .collect();
        assert_eq!(paths, ["/a", "/a/b", "/a/b/c"]);
    }
}
