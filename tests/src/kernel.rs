//! The kernel of the virtual machine: a distribution's generic one, because it has IPVS as a module.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

/// The newest installed kernel that has IPVS and the 9p file system, or the one that `LAB_KERNEL` names.
pub fn find() -> Result<PathBuf> {
    if let Some(path) = env::var_os("LAB_KERNEL").map(PathBuf::from) {
        if !path.exists() {
            bail!("LAB_KERNEL names {}, which does not exist", path.display());
        }
        return Ok(path);
    }
    let mut found: Vec<String> = fs::read_dir("/boot")
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    found.retain(|file| file.strip_prefix("vmlinuz-").is_some_and(suits));
    found.sort_by_key(|file| numbers(file));
    let file = found.pop().context("no kernel with IPVS in /boot for the lab's machine: run `make setup`")?;
    Ok(Path::new("/boot").join(file))
}

/// Whether this machine's own kernel has IPVS, as `LAB_VM=no` needs.
pub fn own_has_ipvs() -> bool {
    Path::new("/proc/net/ip_vs").exists()
        || release().is_some_and(|release| has(&release, "net/netfilter/ipvs/ip_vs.ko"))
}

/// Orders releases such as `6.1.0-9-amd64` and `6.1.0-56-amd64`.
pub(crate) fn numbers(text: &str) -> Vec<u32> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

fn suits(release: &str) -> bool {
    has(release, "net/netfilter/ipvs/ip_vs.ko") && has(release, "fs/9p/9p.ko")
}

fn has(release: &str, module: &str) -> bool {
    let path = format!("/lib/modules/{release}/kernel/{module}");
    ["", ".xz", ".zst", ".gz"].iter().any(|suffix| Path::new(&format!("{path}{suffix}")).exists())
}

fn release() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newer_kernel_is_the_greater() {
        assert!(numbers("vmlinuz-6.1.0-56-amd64") > numbers("vmlinuz-6.1.0-9-amd64"));
    }
}
