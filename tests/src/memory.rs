//! Taking a process's memory away, so that the kernel's OOM killer ends it: in a control group of its own with no room.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::command;

/// How long it may take until the process wants a page more.
const LIMIT: Duration = Duration::from_secs(20);

/// Lets the kernel kill a process for want of memory and waits until it has.
pub fn take_away(pid: u32) -> Result<()> {
    let group = Group::make(&format!("kubectl-vip-lab-{pid}"))?;
    // The limit first: a kernel with control groups of version 1 refuses one below what is in use and can't be freed.
    fs::write(group.folder.join(group.limit), "0").context("can't limit its memory")?;
    fs::write(group.folder.join("cgroup.procs"), pid.to_string())?;
    command::until(&format!("the kernel to kill {pid} for want of memory"), LIMIT, || {
        Ok((group.kills()? > 0).then_some(()))
    })
}

/// A control group of either version.
struct Group {
    folder: PathBuf,
    limit: &'static str,
    events: &'static str,
}

impl Group {
    fn make(name: &str) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let this = match root.join("cgroup.controllers").exists() {
            true => {
                let _ = fs::write(root.join("cgroup.subtree_control"), "+memory");
                Self { folder: root.join(name), limit: "memory.max", events: "memory.events" }
            }
            false => Self {
                folder: root.join("memory").join(name),
                limit: "memory.limit_in_bytes",
                events: "memory.oom_control",
            },
        };
        fs::create_dir(&this.folder)
            .with_context(|| format!("no control groups for memory at {}", root.display()))?;
        Ok(this)
    }

    fn kills(&self) -> Result<u64> {
        let events = fs::read_to_string(self.folder.join(self.events))?;
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(kills.context("the kernel counts no kills")?.trim().parse()?)
    }
}

impl Drop for Group {
    /// A group with a process that has not ended yet stays for a moment.
    fn drop(&mut self) {
        let _ = command::until("an empty control group", Duration::from_secs(2), || {
            Ok(fs::remove_dir(&self.folder).is_ok().then_some(()))
        });
    }
}
