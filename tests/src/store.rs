//! A containerd store with the images in it, filled once and natively: the nodes link to it instead of importing the
//! images each, which takes them a minute.

use std::{
    fs,
    os::unix::{fs::symlink, net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{command, daemon::Daemon};

/// Where containerd keeps its things.
const ROOT: &str = "/var/lib/containerd";
const CONTENT: &str = "io.containerd.content.v1.content/blobs/sha256";
const SNAPSHOTS: &str = "io.containerd.snapshotter.v1.overlayfs";
const METADATA: &str = "io.containerd.metadata.v1.bolt";

/// Fills the store in `root` by a containerd that runs for that time only, in the lab's namespace.
pub(crate) fn fill(daemon: &Daemon<'_>, root: &Path, archives: &[PathBuf]) -> Result<()> {
    let state = daemon.folder.join("run/containerd");
    let socket = state.join("socket");
    fs::create_dir_all(&state)?;
    let config = state.join("config.toml");
    let text = format!(
        "version = 2\nroot = {root:?}\nstate = {state:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
         [grpc]\naddress = {socket:?}\n[ttrpc]\naddress = {:?}\n",
        state.join("ttrpc")
    );
    fs::write(&config, text)?;
    let mut containerd = Command::new("unshare");
    containerd.args(["--mount", "--propagation", "private", "containerd", "--config"]).arg(&config);
    daemon.start(&mut containerd)?;
    command::until("containerd", Duration::from_secs(30), || Ok(UnixStream::connect(&socket).ok()))?;
    for archive in archives {
        let mut import = Command::new("ctr");
        import.arg("--address").arg(&socket).args(["--namespace", "k8s.io", "images", "import"]).arg(archive);
        command::run(&mut import, Duration::from_secs(120))?.ok()?;
    }
    daemon.kill()
}

/// Waits until the store in `root` is filled, and makes this node's own from it: lists copied, contents linked.
pub(crate) fn link(root: &Path, ready: &Path) -> Result<()> {
    command::until("the images", Duration::from_secs(120), || Ok(ready.exists().then_some(())))?;
    let own = Path::new(ROOT);
    for folder in [CONTENT, METADATA, SNAPSHOTS] {
        fs::create_dir_all(own.join(folder))?;
    }
    for list in [format!("{METADATA}/meta.db"), format!("{SNAPSHOTS}/metadata.db")] {
        fs::copy(root.join(&list), own.join(&list)).with_context(|| format!("can't copy {list}"))?;
    }
    for blob in fs::read_dir(root.join(CONTENT))?.flatten() {
        symlink(blob.path(), own.join(CONTENT).join(blob.file_name()))?;
    }
    let snapshots = root.join(SNAPSHOTS).join("snapshots");
    for snapshot in fs::read_dir(&snapshots).context("a store without snapshots")?.flatten() {
        let folder = own.join(SNAPSHOTS).join("snapshots").join(snapshot.file_name());
        fs::create_dir_all(folder.join("work"))?;
        symlink(snapshot.path().join("fs"), folder.join("fs"))?;
    }
    Ok(())
}
