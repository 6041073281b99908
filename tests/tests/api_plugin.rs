//! The api tier: the plugin against a real API server, called through the real kubectl. What it writes, what it says.
//!
//! No agent runs here: what agents would report is written by the tests themselves. Each test has its own namespace,
//! pool and addresses, and removes what an earlier run left of them.

#![allow(clippy::unwrap_used, reason = "all of this is tests")]

#[path = "api_plugin/agents.rs"]
mod agents;
#[path = "api_plugin/check.rs"]
mod check;
#[path = "api_plugin/completion.rs"]
mod completion;
#[path = "api_plugin/connecting.rs"]
mod connecting;
#[path = "api_plugin/docs.rs"]
mod docs;
#[path = "api_plugin/expose.rs"]
mod expose;
#[path = "api_plugin/families.rs"]
mod families;
#[path = "api_plugin/import.rs"]
mod import;
#[path = "api_plugin/install.rs"]
mod install;
#[path = "api_plugin/interrupted.rs"]
mod interrupted;
#[path = "api_plugin/krew.rs"]
mod krew;
#[path = "api_plugin/mistakes.rs"]
mod mistakes;
#[path = "api_plugin/owners.rs"]
mod owners;
#[path = "api_plugin/rights.rs"]
mod rights;
#[path = "api_plugin/status.rs"]
mod status;
#[path = "api_plugin/terminal.rs"]
mod terminal;
#[path = "api_plugin/upgrade.rs"]
mod upgrade;

use std::{
    fmt::Write as _,
    fs, io,
    net::{Shutdown, TcpStream},
    path::{Path, PathBuf},
    sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    thread,
    time::Duration,
};

use anyhow::{Result, anyhow};
use lab::{Lab, Output, command};
use serde_json::{Value, json};

/// Held for writing by tests that take the product away from the cluster, for reading by those that need it.
static INSTALLED: RwLock<()> = RwLock::new(());
/// The plugin waits for the API server here and there.
const LIMIT: Duration = Duration::from_secs(120);
/// People who expose Services: bound to the role that the manifests bring for them.
const USERS: &str = "plugin-users";

/// The cluster with the product installed, until the guard is dropped.
fn installed() -> (&'static Lab, RwLockReadGuard<'static, ()>) {
    static DONE: OnceLock<Result<(), String>> = OnceLock::new();
    let guard = INSTALLED.read().unwrap_or_else(PoisonError::into_inner);
    let lab = lab::api().unwrap();
    let done = DONE.get_or_init(|| prepare(lab).map_err(|error| format!("{error:#}")));
    done.clone().map_err(|error| anyhow!(error)).unwrap();
    (lab, guard)
}

/// Nobody else uses the product while this lives; afterwards it is installed again, also when the test has failed.
struct Alone {
    _held: RwLockWriteGuard<'static, ()>,
}

impl Drop for Alone {
    fn drop(&mut self) {
        // A failure here shows in the tests that come after.
        let _ = lab::api().and_then(install);
    }
}

/// The cluster alone.
fn exclusive() -> (&'static Lab, Alone) {
    drop(installed());
    let held = INSTALLED.write().unwrap_or_else(PoisonError::into_inner);
    (lab::api().unwrap(), Alone { _held: held })
}

/// Installs the product and waits until the API server knows its resources.
fn install(lab: &Lab) -> Result<()> {
    // Objects of other tests of this tier were applied by kubectl.
    vip(lab, "install --wait=false --force-conflicts --yes")?.ok()?;
    command::until("the resources to be served", Duration::from_secs(30), || {
        let served = lab.kubectl(["get", "virtualips,vippools,vipnodes"])?;
        Ok(served.success().then_some(()))
    })
}

fn prepare(lab: &Lab) -> Result<()> {
    install(lab)?;
    // They may have left pods that no kubelet runs.
    lab.kubectl(["delete", "pods", "--all", "-n", "kubectl-vip", "--force"])?.ok()?;
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": USERS},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "kubectl-vip-user"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": USERS}],
    });
    lab.apply(&role.to_string())?;
    // The API server takes notice of policies and roles a moment after they were written.
    command::until("the admission policies", Duration::from_secs(30), || {
        let bare = lab.kubectl(["auth", "can-i", "list", "virtualips", "--as", "x", "--as-group", USERS])?;
        Ok(bare.success().then_some(()))
    })
}

/// `kubectl vip` with the words of a line.
fn vip(lab: &Lab, line: &str) -> Result<Output> {
    let words = ["vip"].into_iter().chain(line.split_whitespace());
    command::run(lab.kubectl_command()?.args(words), LIMIT)
}

/// What `kubectl vip` prints to stdout; wants success.
#[track_caller]
fn said(lab: &Lab, line: &str) -> String {
    vip(lab, line).and_then(Output::ok).unwrap().stdout
}

/// What `kubectl vip` prints to stderr; wants exit code 1 and nothing on stdout.
#[track_caller]
fn refused(lab: &Lab, line: &str) -> String {
    let output = vip(lab, line).unwrap();
    assert_eq!((output.code, output.stdout.as_str()), (1, ""), "{output:#?}");
    output.stderr.trim_end().to_owned()
}

/// A namespace with these Services (name, port, transport), without virtual IPs of an earlier run.
fn namespace(lab: &Lab, name: &str, services: &[(&str, u16, &str)]) {
    lab.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}).to_string())
        .unwrap();
    let all = lab.kubectl(["get", "virtualips", "-o", "json"]).and_then(Output::ok).unwrap();
    let all: Value = serde_json::from_str(&all.stdout).unwrap();
    for vip in all["items"].as_array().unwrap() {
        let services = vip["spec"]["services"].as_array().cloned().unwrap_or_default();
        if services.iter().any(|service| service["namespace"] == name) {
            let address = vip["metadata"]["name"].as_str().unwrap();
            lab.kubectl(["delete", "virtualip", address]).and_then(Output::ok).unwrap();
        }
    }
    let mut list = String::new();
    for (service, port, transport) in services {
        let object = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": service, "namespace": name},
            "spec": {"selector": {"app": service}, "ports": [{"port": port, "protocol": transport}]},
        });
        writeln!(list, "---\n{object}").unwrap();
    }
    if !list.is_empty() {
        lab.apply(&list).unwrap();
    }
}

/// A new pool with these addresses. It has to be named to be drawn from, so that tests do not meet.
fn pool(lab: &Lab, name: &str, range: &str) {
    lab.kubectl(["delete", "vippool", name, "--ignore-not-found"]).and_then(Output::ok).unwrap();
    said(
        lab,
        &format!("pool create {name} {range} --auto-assign=false --virtual-routers {}", routers(range)),
    );
}

/// Virtual routers that no other test has: one, from the third number of the pool's first address.
fn routers(range: &str) -> String {
    range.split('.').nth(2).unwrap_or("1").to_owned()
}

/// A new folder for the files of a test.
fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Address and port of the API server.
fn server(lab: &Lab) -> String {
    let url = "jsonpath={.clusters[0].cluster.server}";
    let url = lab.kubectl(["config", "view", "--minify", "-o", url]).and_then(Output::ok).unwrap().stdout;
    url.trim().trim_start_matches("https://").to_owned()
}

/// What comes from either end goes to the other.
fn join(near: &TcpStream, far: &TcpStream) {
    for (from, to) in [(near, far), (far, near)] {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        thread::spawn(move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
    }
}
