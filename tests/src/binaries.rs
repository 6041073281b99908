//! Kubernetes, etcd and agnhost, built from their Go modules at the versions that `kubernetes/go.mod` pins.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{command, paths};

const NAMES: [&str; 8] = [
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubectl",
    "agnhost",
];

/// The folder of the cache that belongs to the pinned versions.
pub fn folder() -> Result<PathBuf> {
    let module = module();
    let mut pins = fs::read(module.join("go.mod")).context("can't read the versions of Kubernetes")?;
    pins.extend(fs::read(module.join("go.sum"))?);
    Ok(paths::cache().join(format!("{:016x}", paths::fingerprint(&pins))))
}

/// The path of a built program. What lies in `$KUBEBUILDER_ASSETS` goes first.
pub fn path(name: &str) -> Result<PathBuf> {
    let given = env::var_os("KUBEBUILDER_ASSETS").map(|folder| Path::new(&folder).join(name));
    if let Some(given) = given.filter(|path| path.exists()) {
        return Ok(given);
    }
    let path = folder()?.join("bin").join(name);
    if !path.exists() {
        bail!("{name} is not built yet: run `make setup`");
    }
    Ok(path)
}

/// Builds what is missing. Minutes from an empty Go build cache, nothing when all is there.
pub fn build() -> Result<()> {
    if NAMES.iter().all(|name| path(name).is_ok()) {
        return Ok(());
    }
    if command::words(&["go", "version"]).is_err() {
        bail!("Go is missing: install Go 1.26 or later to build Kubernetes");
    }
    let bin = folder()?.join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("can't make {}", bin.display()))?;
    let lock = fs::File::create(folder()?.join("lock"))?;
    lock.lock()?;
    let packages = tools()?;
    let version = version("k8s.io/kubernetes")?;
    println!("building Kubernetes {version} (some minutes the first time)");
    let mut numbers = version.trim_start_matches('v').split('.');
    let set = "-X k8s.io/component-base/version";
    let flags = format!(
        "-s -w {set}.gitVersion={version} {set}.gitMajor={} {set}.gitMinor={}",
        numbers.next().unwrap_or_default(),
        numbers.next().unwrap_or_default(),
    );
    for package in packages {
        let name = name(&package);
        if path(name).is_ok() {
            continue;
        }
        let start = Instant::now();
        let fresh = bin.join(format!(".{name}"));
        let mut build = Command::new("go");
        build.current_dir(module()).env("CGO_ENABLED", "0").env("GOFLAGS", "-buildvcs=false");
        build.args(["build", "-trimpath", "-ldflags", &flags, "-o"]).arg(&fresh).arg(&package);
        command::run(&mut build, Duration::from_secs(1800))?.ok()?;
        fs::rename(&fresh, bin.join(name))?;
        println!("built {name} in {} s", start.elapsed().as_secs());
    }
    Ok(())
}

/// The folder of the Go module, which has nothing but versions.
fn module() -> PathBuf {
    paths::repository().join("tests/kubernetes")
}

fn go_mod() -> Result<String> {
    fs::read_to_string(module().join("go.mod")).context("can't read the versions of Kubernetes")
}

/// The packages in the `tool` block.
fn tools() -> Result<Vec<String>> {
    let text = go_mod()?;
    let block = text.split("tool (").nth(1).and_then(|rest| rest.split(')').next());
    let block = block.context("kubernetes/go.mod has no tool block")?;
    Ok(block.split_whitespace().map(str::to_owned).collect())
}

fn version(module: &str) -> Result<String> {
    let text = go_mod()?;
    let mut words = text.split_whitespace();
    words.find(|word| *word == module);
    Ok(words.next().with_context(|| format!("kubernetes/go.mod has no {module}"))?.to_owned())
}

/// The program's name: the last part of the package's path, but for etcd's.
fn name(package: &str) -> &str {
    match package {
        "go.etcd.io/etcd/server/v3" => "etcd",
        _ => package.rsplit('/').next().unwrap_or(package),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_is_a_pinned_tool() {
        let tools = tools().unwrap();
        let mut names: Vec<&str> = tools.iter().map(|tool| name(tool)).collect();
        let mut wanted = NAMES.to_vec();
        names.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(names, wanted);
        assert!(version("k8s.io/kubernetes").unwrap().starts_with("v1."));
    }
}
