//! The machine of a lab: a virtual one whose kernel has IPVS (virtme-ng over qemu), its root the file tree of the host.

use std::{env, net::SocketAddr, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, bail};

use crate::{
    command::{self, Output},
    daemon::{Daemon, tail},
    exec::{self, Request},
    guest::{self, NODES},
    kernel,
    lan::MACHINE,
    netns::Netns,
    setup,
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
        let mut options = String::new();
        for card in 0..=NODES.len() {
            let mac = guest::mac(u8::try_from(card)?);
            options += &format!(" -netdev tap,id=n{card},ifname=tap{card},script=no,downscript=no");
            options += &format!(" -device virtio-net-pci,netdev=n{card},mac={mac}");
        }
        let launcher = setup::vng()?;
        // It starts a sibling by its bare name.
        let path = env::join_paths(
            launcher
                .parent()
                .map(Path::to_owned)
                .into_iter()
                .chain(env::split_paths(&env::var_os("PATH").unwrap_or_default())),
        )?;
        let mut vng = Command::new(launcher);
        vng.env("PATH", path);
        vng.current_dir(self.folder).arg("-r").arg(kernel::find()?);
        if env::var("LAB_ACCEL").as_deref() != Ok("kvm") {
            vng.arg("--disable-kvm");
        }
        vng.args(["--cpus", "2", "--memory", "8G", "--user", "root", "--verbose"]);
        for shared in ["shared", "logs"] {
            vng.arg("--rwdir").arg(self.folder.join(shared));
        }
        vng.arg(format!("--qemu-opts={options}")).args(["--exec", &guest]);
        self.daemon().start(&mut vng)
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
