//! The first process of the machine: mounts what every Linux has, runs one program, and buries all orphans.

use std::{env, fs, process::Command};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::wait::wait,
    unistd::sethostname,
};

use crate::command;

/// Runs the program whose arguments these are, until it ends.
pub(super) fn run(arguments: &[String]) -> Result<()> {
    const NONE: Option<&str> = None;
    for (kind, folder, data) in [
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("devtmpfs", "/dev", ""),
        ("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", ""),
        ("tmpfs", "/run", "mode=755"),
        ("cgroup2", "/sys/fs/cgroup", ""),
    ] {
        fs::create_dir_all(folder).with_context(|| format!("can't make {folder}"))?;
        mount(Some(kind), folder, Some(kind), MsFlags::empty(), Some(data))
            .with_context(|| format!("can't mount {folder}"))?;
    }
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SHARED, NONE)?;
    sethostname("machine")?;
    let mut child = Command::new(env::current_exe()?);
    child.args(arguments).env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    let child = command::spawn(&mut child)?.id();
    loop {
        match wait() {
            Ok(status) if status.pid().is_some_and(|pid| pid.as_raw().cast_unsigned() == child) => {
                bail!("the machine's program has ended: {status:?}")
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("can't wait"),
        }
    }
}
