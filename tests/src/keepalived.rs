//! A newer keepalived than the distribution's, built from its source: the first that knows `v3_checksum_as_v2` came after
//! Debian 12's. It has VRRP and nothing else, so a compiler is all that it takes.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result, bail};

use crate::{command, paths};

const VERSION: &str = "2.3.3";
/// Of the source as Debian has it.
const SHA256: &str = "2288c5c7609fa452782b7acefa19acce742d0204dc17f54d36da46b10f8b590c";
/// The download tool of apt: it knows the machine's proxies, and checks a sum.
const FETCH: &str = "/usr/lib/apt/apt-helper";
/// What would need other libraries, or takes its time.
const WITHOUT: &str =
    "lvs vrrp-auth vmac routes iptables nftables track-process systemd hardening dependency-tracking";
const LIMIT: Duration = Duration::from_secs(600);

/// The program, once it is built.
pub fn path() -> Result<PathBuf> {
    let path = folder().join("keepalived");
    if !path.exists() {
        bail!("keepalived {VERSION} is not built yet: run `make setup`");
    }
    Ok(path)
}

/// Builds it, if need be.
pub fn build() -> Result<()> {
    fs::create_dir_all(folder()).with_context(|| format!("can't make {}", folder().display()))?;
    let lock = fs::File::create(folder().join("lock"))?;
    lock.lock()?;
    if path().is_ok() {
        return Ok(());
    }
    println!("building keepalived {VERSION}, a peer of the tests");
    let archive = archive()?;
    let source = folder().join("source");
    let _ = fs::remove_dir_all(&source);
    fs::create_dir_all(&source)?;
    let mut unpack = Command::new("tar");
    run(unpack.args(["--strip-components=1", "--extract", "--file"]).arg(archive).arg("-C").arg(&source))?;
    let mut configure = Command::new("./configure");
    configure.current_dir(&source).args(["--quiet", "--with-init=SYSV", "CFLAGS=-O1 -w"]);
    configure.args(WITHOUT.split(' ').map(|part| format!("--disable-{part}")));
    // It writes a name for its addresses there, for `ip` to show: not where this machine's own are.
    configure.arg(format!("--with-iproute-etc-dir={}", folder().join("iproute2").display()));
    run(&mut configure)?;
    for part in ["lib", "keepalived"] {
        run(Command::new("make").current_dir(&source).args(["--silent", "--jobs=2", "-C", part]))?;
    }
    fs::rename(source.join("keepalived/keepalived"), folder().join("keepalived"))?;
    fs::remove_dir_all(&source)?;
    Ok(())
}

fn folder() -> PathBuf {
    paths::cache().join(format!("keepalived-{VERSION}"))
}

/// Its source, from the first of the machine's Debian mirrors that has it.
fn archive() -> Result<PathBuf> {
    let name = format!("keepalived_{VERSION}.orig.tar.gz");
    let path = folder().join(&name);
    let list =
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian", "Created-By: Packages"];
    let mirrors = command::words(&list)?.ok()?.stdout;
    let mut tried: Vec<&str> = Vec::new();
    for mirror in mirrors.lines() {
        if tried.contains(&mirror) {
            continue;
        }
        tried.push(mirror);
        let address = format!("{}/pool/main/k/keepalived/{name}", mirror.trim_end_matches('/'));
        let mut fetch = Command::new(FETCH);
        fetch.args(["download-file", &address]).arg(&path).arg(format!("SHA256:{SHA256}"));
        if run(&mut fetch).is_ok() {
            return Ok(path);
        }
    }
    bail!("no source of keepalived {VERSION} (sum {SHA256}) at any Debian mirror of this machine: {tried:?}")
}

fn run(command: &mut Command) -> Result<()> {
    command::run(command, LIMIT)?.ok().map(drop)
}
