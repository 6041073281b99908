//! Container images without a container engine or a registry: built by buildah from nothing, kept as archive files.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{binaries, command, paths};

/// The name of the agnhost image in the lab: an HTTP, UDP and SCTP server to balance to.
pub const AGNHOST: &str = "lab.local/agnhost:1";
/// The name of the pause image in the lab.
pub const PAUSE: &str = "lab.local/pause:1";

const LIMIT: Duration = Duration::from_secs(900);

/// The name of the product's image at the workspace's version.
pub fn product_name() -> String {
    format!("ghcr.io/kubectl-vip/vip-node:v{}", env!("CARGO_PKG_VERSION"))
}

/// Where the product's image is when it was built.
pub fn product_archive() -> PathBuf {
    paths::target().join("image/vip-node.tar")
}

/// Builds `vip-node` statically and its image; gives the archive.
pub fn build_product() -> Result<PathBuf> {
    const TRIPLE: &str = "x86_64-unknown-linux-gnu";
    let target = paths::target().join("image");
    let mut cargo = command::cargo();
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
    cargo
        .args(["build", "--release", "--package", "vip-node", "--target", TRIPLE, "--target-dir"])
        .arg(&target);
    let status = cargo.status().context("can't start cargo")?;
    if !status.success() {
        bail!("vip-node does not build");
    }
    let binary = target.join(TRIPLE).join("release/vip-node");
    let archive = product_archive();
    let recipe = fs::read_to_string(paths::repository().join("vip-node/Dockerfile"))
        .context("no vip-node/Dockerfile")?;
    build(&binary, &recipe, &product_name(), &archive)?;
    let size = fs::metadata(&archive)?.len() as f64 / 1e6;
    println!("{} is {size:.1} MB: {}", product_name(), archive.display());
    Ok(archive)
}

/// The archives of the lab's own images, built when they are missing.
pub fn lab_archives() -> Result<Vec<PathBuf>> {
    let folder = binaries::folder()?.join("images");
    fs::create_dir_all(&folder)?;
    let (pause, agnhost) = (folder.join("pause-1.tar"), folder.join("agnhost-1.tar"));
    if !pause.exists() {
        println!("building the image {PAUSE}");
        let source = paths::repository().join("tests/images/pause.rs");
        let binary = folder.join("pause");
        let mut rustc = Command::new("rustc");
        rustc.args([
            "--edition=2024",
            "-Copt-level=s",
            "-Cpanic=abort",
            "-Cstrip=symbols",
            "-Ctarget-feature=+crt-static",
        ]);
        command::run(rustc.arg("-o").arg(&binary).arg(source), LIMIT)?.ok()?;
        build(&binary, "FROM scratch\nCOPY pause /pause\nENTRYPOINT [\"/pause\"]\n", PAUSE, &pause)?;
    }
    if !agnhost.exists() {
        println!("building the image {AGNHOST}");
        let recipe = "FROM scratch\nCOPY agnhost /agnhost\nENTRYPOINT [\"/agnhost\"]\n";
        build(&binaries::path("agnhost")?, recipe, AGNHOST, &agnhost)?;
    }
    Ok(vec![pause, agnhost])
}

/// Builds an image around one binary. All of buildah's storage is in a folder that is removed afterwards.
fn build(binary: &Path, recipe: &str, name: &str, archive: &Path) -> Result<()> {
    let folder = archive.with_extension("build");
    let _ = fs::remove_dir_all(&folder);
    let context = folder.join("context");
    fs::create_dir_all(&context)?;
    fs::write(folder.join("Dockerfile"), recipe)?;
    fs::copy(binary, context.join(binary.file_name().context("a binary without a name")?))?;
    let fresh = folder.join("image.tar");
    let buildah = || {
        let mut buildah = Command::new("buildah");
        buildah.args(["--storage-driver", "vfs", "--root"]).arg(folder.join("store"));
        buildah.arg("--runroot").arg(folder.join("run"));
        buildah
    };
    let mut bud = buildah();
    bud.args(["bud", "--quiet", "--isolation", "chroot", "--tag", name, "--file"])
        .arg(folder.join("Dockerfile"));
    command::run(bud.arg(&context), LIMIT)?.ok()?;
    let mut push = buildah();
    push.args(["push", "--quiet", name]).arg(format!("docker-archive:{}:{name}", fresh.display()));
    command::run(&mut push, LIMIT)?.ok()?;
    fs::rename(&fresh, archive)?;
    fs::remove_dir_all(&folder)?;
    Ok(())
}
