//! A long-lived process of a lab: in the lab's namespace, with a log file and a pid file, found again by later runs.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use std::os::unix::process::CommandExt;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::{
    interrupt,
    netns::{Netns, signal},
};

/// A process known by its name, whoever started it.
pub(crate) struct Daemon<'a> {
    pub(crate) netns: &'a Netns,
    /// The lab's folder.
    pub(crate) folder: &'a Path,
    pub(crate) name: &'a str,
}

impl Daemon<'_> {
    /// Starts it in a process group of its own, so that Ctrl-C reaches only us. The log is appended to.
    pub(crate) fn start(&self, command: &mut Command) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.log())?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let _gate = interrupt::gate();
        let child = self.netns.spawn(command)?;
        fs::write(self.pid_file(), child.id().to_string())
            .with_context(|| format!("can't write {}", self.pid_file().display()))
    }

    /// Its log.
    pub(crate) fn log(&self) -> PathBuf {
        self.folder.join("logs").join(format!("{}.log", self.name))
    }

    /// The running process, if it runs, and only if it is in the lab's namespace.
    pub(crate) fn pid(&self) -> Option<u32> {
        let pid = fs::read_to_string(self.pid_file()).ok()?.trim().parse().ok()?;
        self.netns.contains(pid).then_some(pid)
    }

    /// Sends a signal to it.
    pub(crate) fn signal(&self, which: Signal) -> Result<()> {
        let pid = self.pid().with_context(|| format!("{} is not running", self.name))?;
        signal(pid, which);
        Ok(())
    }

    /// Kills it and waits until it is gone. Fine when it does not run.
    pub(crate) fn kill(&self) -> Result<()> {
        let Some(pid) = self.pid() else { return Ok(()) };
        signal(pid, Signal::SIGKILL);
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.netns.contains(pid) {
            if Instant::now() > deadline {
                bail!("{} (process {pid}) does not end", self.name);
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn pid_file(&self) -> PathBuf {
        self.folder.join("run").join(format!("{}.pid", self.name))
    }
}

/// The last lines of a file, for an error message.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).map(|data| String::from_utf8_lossy(&data).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
