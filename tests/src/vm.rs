//! The machine of a lab: a virtual one whose kernel has IPVS, its root the file tree of the host.

mod boot;

use std::{env, net::SocketAddr, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, bail};

use crate::{
    command::{self, Output},
    daemon::{Daemon, tail},
    exec::{self, Request},
    guest, kernel,
    lan::MACHINE,
    netns::Netns,
};

/// The machine of the lab in a folder.
pub(crate) struct Vm<'a> {
    pub(crate) netns: &'a Netns,
    pub(crate) folder: &'a Path,
}

/// Whether the nodes run on this machine's own kernel, without a virtual machine (`LAB_VM=no`).
pub(crate) fn own_kernel() -> Result<bool> {
    match env::var("LAB_VM").as_deref() {
        Ok("no") if kernel::own_has_ipvs() => Ok(true),
        Ok("no") => bail!(
            "LAB_VM=no needs IPVS in this machine's kernel, and it has none: run the lab without LAB_VM"
        ),
        _ => Ok(false),
    }
}

impl Vm<'_> {
    /// Boots it; does not wait.
    pub(crate) fn start(&self, nodes: bool) -> Result<()> {
        let program = self.folder.join("lab");
        let mut guest = format!("{} guest --folder {}", program.display(), self.folder.display());
        if nodes {
            guest += " --nodes";
        }
        if own_kernel()? {
            let mut command = Command::new("unshare");
            command.args([
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "--propagation",
                "private",
            ]);
            command.args(guest.split(' ')).arg("--own-kernel");
            return self.daemon().start(&mut command);
        }
        let (files, logs) = (self.folder.join("shared"), self.folder.join("logs"));
        let shared =
            [boot::Shared { tag: "shared", path: &files }, boot::Shared { tag: "logs", path: &logs }];
        let init = format!(
            "{} guest-init {}",
            program.display(),
            guest.split_once(' ').map_or("", |(_, rest)| rest)
        );
        self.daemon().start(&mut boot::command(self.folder, &shared, &init)?)
    }

    /// Waits until it takes commands.
    pub(crate) fn wait_ready(&self) -> Result<()> {
        let ready = command::until("the machine", Duration::from_secs(120), || {
            if self.daemon().pid().is_none() {
                return Ok(Some(false));
            }
            Ok(self.exec(None, "true", Duration::from_secs(5), |_, _| {}).is_ok().then_some(true))
        });
        if matches!(ready, Ok(true)) {
            return Ok(());
        }
        let log = self.daemon().log();
        let text = format!("the machine does not boot; the end of {}:\n{}", log.display(), tail(&log, 8));
        ready.and_then(|_| bail!("it has ended")).context(text)
    }

    /// Runs a shell command in a node or in the machine itself.
    pub(crate) fn exec(
        &self,
        node: Option<u8>,
        command: &str,
        limit: Duration,
        show: impl FnMut(bool, &[u8]) + Send,
    ) -> Result<Output> {
        let request = Request { node, command: command.to_owned() };
        self.netns.run(|| exec::call(SocketAddr::from((MACHINE, guest::PORT)), &request, limit, show))?
    }

    fn daemon(&self) -> Daemon<'_> {
        Daemon { netns: self.netns, folder: self.folder, name: "machine" }
    }
}
