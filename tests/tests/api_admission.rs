//! The api tier: the manifests in a real API server. What it admits, what it refuses, and in which words.
//!
//! Nothing here needs a node. Objects that only have to be judged are sent as dry runs; a test that keeps some has its
//! own addresses, users and namespaces, and removes what an earlier run left of them.

#![allow(clippy::unwrap_used, reason = "all of this is tests")]

#[path = "api_admission/objects.rs"]
mod objects;
#[path = "api_admission/rights.rs"]
mod rights;
#[path = "api_admission/shape.rs"]
mod shape;

use std::{
    fs,
    path::Path,
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use lab::{
    Lab, Output,
    command::{self, LIMIT},
    paths, product,
};
use serde_json::{Value, json};

/// A group that has the role for people who expose Services, and no other.
const USERS: &str = "lab-vip-users";

/// The API server with the manifests applied, once for all tests.
fn server() -> Result<&'static Lab> {
    static APPLIED: OnceLock<Result<(), String>> = OnceLock::new();
    let lab = lab::api()?;
    let applied = APPLIED.get_or_init(|| prepare(lab).map_err(|error| format!("{error:#}")));
    applied.as_ref().map_err(|error| anyhow!(error.clone()))?;
    Ok(lab)
}

fn prepare(lab: &Lab) -> Result<()> {
    apply(lab)?.ok()?;
    for crd in ["virtualips", "vippools", "vipnodes"] {
        let crd = format!("crd/{crd}.kubectl-vip.io");
        lab.kubectl(["wait", "--for=condition=Established", "--timeout=30s", &crd])?.ok()?;
    }
    lab.apply(
        &json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": { "name": USERS },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "kubectl-vip-user" },
            "subjects": [{ "apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": USERS }],
        })
        .to_string(),
    )?;
    // The API server takes notice of policies and roles a moment after they were written.
    command::until("the admission policies", Duration::from_secs(30), || {
        let bare = judge(&Who::user("nobody"), &vip("10.99.0.1", &[]))?;
        let node = judge(&Who::Admin, &node("lab-nowhere"))?;
        ensure!(bare.stderr.contains("cannot create vippools"), "{bare:?}");
        ensure!(node.stderr.contains("is written by the agent on that node only"), "{node:?}");
        Ok(Some(()))
    })
}

fn apply(lab: &Lab) -> Result<Output> {
    lab.kubectl(["apply", "--server-side", "--force-conflicts", "-k", &manifests()])
}

fn manifests() -> String {
    paths::repository().join("manifests").display().to_string()
}

/// Who speaks to the API server.
enum Who {
    Admin,
    /// By impersonation: a name and, for people, the group [`USERS`].
    Named(Vec<String>),
    /// The bearer of the token in a kubeconfig.
    Bearer(String),
}

impl Who {
    /// A person whose roles are those of [`USERS`] and what a test binds to the name.
    fn user(name: &str) -> Self {
        Self::Named(["--as", name, "--as-group", USERS].map(str::to_owned).into())
    }

    fn garbage_collector() -> Self {
        let name = "system:serviceaccount:kube-system:generic-garbage-collector";
        Self::Named(["--as", name].map(str::to_owned).into())
    }

    /// The agent on a node: the bearer of a token that is bound to a pod there.
    fn agent(lab: &Lab, node: &str) -> Result<Self> {
        let config = product::agent_kubeconfig(lab, node)?;
        Ok(Self::Bearer(file(&config)?))
    }

    fn kubectl(&self, arguments: &[&str]) -> Result<Output> {
        let mut kubectl = lab::api()?.kubectl_command()?;
        match self {
            Self::Admin => {}
            Self::Named(flags) => drop(kubectl.args(flags)),
            Self::Bearer(kubeconfig) => drop(kubectl.env("KUBECONFIG", kubeconfig)),
        }
        command::run(kubectl.args(arguments), LIMIT)
    }

    /// Sends an object by `create` or `replace`.
    fn send(&self, verb: &str, object: &Value) -> Result<Output> {
        let path = file(object)?;
        let output = self.kubectl(&[verb, "-f", &path]);
        fs::remove_file(path)?;
        output
    }

    /// Changes an object by a merge patch.
    fn patch(&self, object: &str, patch: &Value) -> Result<Output> {
        self.kubectl(&["patch", object, "--type=merge", "-p", &patch.to_string()])
    }

    /// Changes the status of an object by a merge patch.
    fn report(&self, object: &str, status: &Value) -> Result<Output> {
        let patch = json!({ "status": status }).to_string();
        self.kubectl(&["patch", object, "--subresource=status", "--type=merge", "-p", &patch])
    }
}

/// What would become of a new object.
fn judge(who: &Who, object: &Value) -> Result<Output> {
    let path = file(object)?;
    let output = who.kubectl(&["create", "--dry-run=server", "-o", "json", "-f", &path]);
    fs::remove_file(path)?;
    output
}

/// Wants a refusal with these words.
#[track_caller]
fn refused(output: Result<Output>, words: &str) {
    let output = output.unwrap();
    assert!(!output.success() && output.stderr.contains(words), "wanted {words:?}: {output:#?}");
}

/// Wants success.
#[track_caller]
fn passed(output: Result<Output>) -> Output {
    output.and_then(Output::ok).unwrap()
}

/// A file of its own with this JSON.
fn file(content: &Value) -> Result<String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("{}-{}.json", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, content.to_string()).with_context(|| format!("can't write {}", path.display()))?;
    Ok(path.display().to_string())
}

fn resource(kind: &str, name: &str, spec: Value) -> Value {
    json!({ "apiVersion": "kubectl-vip.io/v1alpha1", "kind": kind, "metadata": { "name": name }, "spec": spec })
}

/// A virtual IP for Services given as `namespace/name`.
fn vip(address: &str, services: &[&str]) -> Value {
    let service = |text: &&str| {
        let (namespace, name) = text.split_once('/').unwrap();
        json!({ "namespace": namespace, "name": name })
    };
    let services: Vec<Value> = services.iter().map(service).collect();
    resource("VirtualIP", address, json!({ "address": address, "virtualRouter": 7, "services": services }))
}

fn node(name: &str) -> Value {
    json!({ "apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VIPNode", "metadata": { "name": name } })
}
