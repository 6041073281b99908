//! Installs what the lab needs on a Debian machine, and says in one sentence what is missing.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::unistd::Uid;

use crate::{binaries, command, keepalived, kernel, paths};

/// A program and the Debian package that has it.
const PROGRAMS: [(&str, &str); 23] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("ipvsadm", "ipvsadm"),
    ("keepalived", "keepalived"),
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("buildah", "buildah"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("modprobe", "kmod"),
    ("busybox", "busybox-static"),
    ("xz", "xz-utils"),
    ("tcpdump", "tcpdump"),
    ("conntrack", "conntrack"),
    ("ping", "iputils-ping"),
    ("arping", "iputils-arping"),
    ("nsenter", "util-linux"),
    ("pgrep", "procps"),
    ("curl", "curl"),
    ("python3", "python3"),
    ("cc", "gcc"),
    ("make", "make"),
    ("/usr/include/stdio.h", "libc6-dev"),
];

const LONG: Duration = Duration::from_secs(900);

/// Installs everything that is missing: packages, the machine's kernel, a newer keepalived, Kubernetes.
pub fn install() -> Result<()> {
    packages()?;
    machine_kernel()?;
    // Two tests need it, and they say so: a cluster does not.
    if let Err(error) = keepalived::build() {
        eprintln!("keepalived is not built: {error:#}");
    }
    binaries::build()
}

/// Fails with one sentence when something that only [`install`] brings is missing.
pub fn check() -> Result<()> {
    let missing = missing_packages();
    if !missing.is_empty() {
        bail!("not installed: {}: run `make setup`", missing.join(", "));
    }
    Ok(())
}

fn missing_packages() -> Vec<&'static str> {
    let missing = PROGRAMS.iter().filter(|(program, _)| !is_there(program));
    missing.map(|(_, package)| *package).collect()
}

fn is_there(program: &str) -> bool {
    match program.starts_with('/') {
        true => Path::new(program).exists(),
        false => {
            let path = std::env::var("PATH").unwrap_or_default();
            path.split(':')
                .chain(["/usr/sbin", "/sbin"])
                .any(|folder| Path::new(folder).join(program).exists())
        }
    }
}

fn packages() -> Result<()> {
    let missing = missing_packages();
    if missing.is_empty() {
        return Ok(());
    }
    if !is_there("apt-get") {
        bail!("this machine is not a Debian: install {} by hand", missing.join(", "));
    }
    println!("installing {}", missing.join(" "));
    let install = || {
        let mut apt = as_root("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive");
        apt.args(["install", "-y", "-q", "--no-install-recommends"]).args(&missing);
        command::run(&mut apt, LONG)?.ok()
    };
    if install().is_err() {
        update()?;
        install()?;
    }
    Ok(())
}

fn update() -> Result<()> {
    println!("fetching the lists of packages");
    command::run(as_root("apt-get").args(["update", "-q"]), LONG)?.ok()?;
    Ok(())
}

/// The newest signed generic kernel, unpacked and not installed: nothing here should boot from it.
fn machine_kernel() -> Result<()> {
    if kernel::find().is_ok() {
        return Ok(());
    }
    let package = match newest_kernel()? {
        Some(package) => package,
        None => {
            update()?;
            newest_kernel()?.context("no package linux-image-amd64 in the package lists")?
        }
    };
    println!("unpacking {package}, the kernel of the lab's machine");
    let folder = paths::cache().join("kernel");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    let download = || {
        command::run(Command::new("apt-get").current_dir(&folder).args(["download", &package]), LONG)?.ok()
    };
    if download().is_err() {
        update()?;
        download()?;
    }
    let file = fs::read_dir(&folder)?.flatten().map(|entry| entry.path());
    let file = file.into_iter().find(|path| path.extension().is_some_and(|end| end == "deb"));
    let file = file.with_context(|| format!("{package} was not downloaded"))?;
    let tree = folder.join("tree");
    command::run(Command::new("dpkg").arg("-x").arg(&file).arg(&tree), LONG)?.ok()?;
    command::run(as_root("mkdir").args(["-p", "/boot", "/lib/modules"]), LONG)?.ok()?;
    command::run(
        as_root("cp").args(["-a", "-t", "/lib/modules"]).args(children(&tree.join("lib/modules"))?),
        LONG,
    )?
    .ok()?;
    command::run(as_root("cp").args(["-a", "-t", "/boot"]).args(children(&tree.join("boot"))?), LONG)?
        .ok()?;
    for release in children(&tree.join("lib/modules"))? {
        command::run(as_root("depmod").args(release.file_name()), LONG)?.ok()?;
    }
    fs::remove_dir_all(&folder)?;
    Ok(())
}

/// The package that the distribution's kernel meta-package stands for.
fn newest_kernel() -> Result<Option<String>> {
    let depends = command::words(&["apt-cache", "depends", "linux-image-amd64"])?.stdout;
    let mut packages = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(packages.find(|package| package.starts_with("linux-image-")).map(str::to_owned))
}

fn children(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("no {}", folder.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

fn as_root(program: &str) -> Command {
    if Uid::effective().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.args(["-E", program]);
    command
}
