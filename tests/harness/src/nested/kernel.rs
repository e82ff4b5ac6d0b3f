//! The Debian cloud kernel that is installed on this machine, and its modules in the order in which they load.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// An installed kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    image: PathBuf,
    modules: PathBuf,
    /// Module name -> path under `modules`, and the paths of what it needs.
    dependencies: HashMap<String, (PathBuf, Vec<PathBuf>)>,
    /// Names of what could be a module but is part of the image.
    built_in: HashSet<String>,
}

impl Kernel {
    /// The newest installed cloud kernel (package `linux-image-cloud-amd64`).
    ///
    /// # Errors
    /// There is none, or its module list cannot be read.
    pub fn installed() -> Result<Self> {
        let mut images: Vec<PathBuf> = fs::read_dir("/boot")
            .context("list /boot")?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with("vmlinuz-") && name.ends_with("-cloud-amd64")
            })
            .collect();
        images.sort_by_key(|path| version_key(path));
        let Some(image) = images.pop() else {
            bail!("no cloud kernel in /boot: run scripts/setup");
        };
        let name = image
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let modules = Path::new("/lib/modules").join(name.trim_start_matches("vmlinuz-"));
        let read = |list: &str| {
            let path = modules.join(list);
            fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
        };
        let dependencies = parse_dependencies(&read("modules.dep")?);
        let built_in = read("modules.builtin")?
            .lines()
            .filter_map(module_name)
            .collect();
        Ok(Self {
            image,
            modules,
            dependencies,
            built_in,
        })
    }

    /// The bzImage.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// The files of the named modules and of all that they need, in an order in which `insmod` takes them. What is built in has
    /// no file.
    ///
    /// # Errors
    /// The kernel has no such module.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut ordered: Vec<PathBuf> = Vec::new();
        for name in names.iter().filter(|name| !self.built_in.contains(**name)) {
            let (path, needs) = self
                .dependencies
                .get(*name)
                .with_context(|| format!("kernel {} has no module {name}", self.image.display()))?;
            // modules.dep names the direct user first: what loads first comes last.
            for file in needs.iter().rev().chain([path]) {
                let file = self.modules.join(file);
                if !ordered.contains(&file) {
                    ordered.push(file);
                }
            }
        }
        Ok(ordered)
    }
}

/// Orders `6.1.0-9` before `6.1.0-56`.
fn version_key(path: &Path) -> Vec<u64> {
    let name = path.to_string_lossy();
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

/// `kernel/arch/x86/kvm/kvm-amd.ko` -> `kvm_amd`.
fn module_name(path: &str) -> Option<String> {
    Some(
        path.rsplit('/')
            .next()?
            .split('.')
            .next()?
            .replace('-', "_"),
    )
}

fn parse_dependencies(text: &str) -> HashMap<String, (PathBuf, Vec<PathBuf>)> {
    text.lines()
        .filter_map(|line| {
            let (path, needs) = line.split_once(':')?;
            Some((
                module_name(path)?,
                (
                    path.into(),
                    needs.split_whitespace().map(PathBuf::from).collect(),
                ),
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_load_after_what_they_need() {
        let text = "a/blk.ko: a/virtio.ko a/ring.ko\na/ring.ko:\na/virtio.ko: a/ring.ko\n";
        let kernel = Kernel {
            image: "/boot/vmlinuz".into(),
            modules: "/m".into(),
            dependencies: parse_dependencies(text),
            built_in: HashSet::from(["ccp".to_owned()]),
        };
        let order: Vec<PathBuf> = ["/m/a/ring.ko", "/m/a/virtio.ko", "/m/a/blk.ko"]
            .map(PathBuf::from)
            .into();
        assert_eq!(kernel.modules(&["blk", "ccp", "virtio"]).unwrap(), order);
        assert!(kernel.modules(&["absent"]).is_err());
    }

    #[test]
    fn newer_kernels_sort_last() {
        let key = |name: &str| version_key(Path::new(name));
        assert!(key("vmlinuz-6.1.0-9-cloud-amd64") < key("vmlinuz-6.1.0-56-cloud-amd64"));
    }
}
