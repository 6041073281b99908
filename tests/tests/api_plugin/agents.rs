//! What agents write to the API, written by the tests in their place.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lab::{Lab, Output, command};
use serde_json::{Value, json};

use super::LIMIT;

/// Reports as the agent of a node.
pub fn report(lab: &Lab, node: &str, status: &Value) {
    let agent = |arguments: &[&str]| {
        let mut kubectl = lab.kubectl_command().unwrap();
        kubectl.args(arguments).args(["--as", "system:serviceaccount:kubectl-vip:vip-node"]);
        kubectl.arg(format!("--as-user-extra=authentication.kubernetes.io/node-name={node}"));
        command::run(&mut kubectl, LIMIT).and_then(Output::ok).unwrap()
    };
    let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{node}.json"));
    let object =
        json!({"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VIPNode", "metadata": {"name": node}});
    std::fs::write(&file, object.to_string()).unwrap();
    agent(&["apply", "--server-side", "-f", &file.display().to_string()]);
    let patch = json!({"status": status}).to_string();
    agent(&["patch", "vipnode", node, "--subresource=status", "--type=merge", "-p", &patch]);
}

/// A moment so many seconds ago, as Kubernetes writes it.
pub fn ago(seconds: u64) -> String {
    let then = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() - Duration::from_secs(seconds);
    let date = format!("@{}", then.as_secs());
    command::words(&["date", "-u", "-d", &date, "+%Y-%m-%dT%H:%M:%SZ"]).unwrap().text().to_owned()
}

/// What an agent says of a node with this address, ready, in this state of this virtual router.
pub fn node(address: &str, router: u8, renewed: &str, state: &str) -> Value {
    json!({
        "renewTime": renewed, "agentVersion": "0.1.0", "dataplane": {"ready": true},
        "interfaces": [{"name": "eth0", "mac": "52:54:00:00:00:01", "addresses": [address], "carrier": true}],
        "virtualRouters": [{"interface": "eth0", "family": 4, "virtualRouter": router, "state": state, "priority": 254,
                            "since": "2026-01-01T00:00:00Z"}],
    })
}

/// What the owner writes about a virtual IP.
pub fn own(lab: &Lab, address: &str, node: &str, programmed: &str, reason: &str, ready: u32) {
    let condition = |kind: &str, status: &str, reason: &str| json!({"type": kind, "status": status, "reason": reason, "message": "", "lastTransitionTime": ago(840)});
    let status = json!({"status": {
        "node": node, "since": ago(840), "backends": {"ready": ready, "total": 3},
        "conditions": [condition("Announced", "True", "Active"), condition("Programmed", programmed, reason)],
    }});
    let patch = status.to_string();
    lab.kubectl(["patch", "virtualip", address, "--subresource=status", "--type=merge", "-p", &patch])
        .and_then(Output::ok)
        .unwrap();
}

/// Backups with these addresses on their LAN; nodes of that name and number, from 1 up.
pub fn backups(lab: &Lab, name: &str, addresses: &[&str], router: u8) {
    for (number, address) in (1..).zip(addresses) {
        report(lab, &format!("{name}-{number}"), &node(address, router, &ago(0), "Backup"));
    }
}

/// Takes the nodes of a test away again.
pub fn gone(lab: &Lab, nodes: &[&str]) {
    let delete = ["delete", "vipnode", "--ignore-not-found"];
    lab.kubectl(delete.iter().chain(nodes)).and_then(Output::ok).unwrap();
}

/// The owner of a healthy virtual IP.
pub fn owner(lab: &Lab, address: &str, node: &str) {
    own(lab, address, node, "True", "Programmed", 3);
}

/// A field of an object, as text.
pub fn field(lab: &Lab, object: &str, path: &str) -> String {
    let path = format!("jsonpath={{{path}}}");
    lab.kubectl(["get", object, "-o", &path]).and_then(Output::ok).unwrap().stdout
}

/// Waits until a field of an object is this.
pub fn until_field(lab: &Lab, object: &str, path: &str, value: &str) {
    let what = format!("{path} of {object} to be {value:?}");
    command::until(&what, Duration::from_secs(30), || Ok((field(lab, object, path) == value).then_some(())))
        .unwrap();
}
