//! Who may do only a part: what they may see is shown and the rest is marked; what they may not change is refused in one sentence, before
//! anything is changed.

use std::time::Duration;

use lab::{Output, command};
use serde_json::{Value, json};

use super::{
    USERS,
    agents::{ago, field, gone, node, report},
    installed, namespace, pool, said, vip,
};

/// May read what kubectl-vip has, and nothing else.
const READER: &str = "--as vera --as-group partial-view";
/// May do everything that an uninstall takes, but delete the definitions.
const HALF: &str = "--as rita";
/// May do nothing.
const NOBODY: &str = "--as otto";

#[test]
fn every_command_shows_what_may_be_seen_and_says_which_permission_is_missing() {
    let (lab, _guard) = installed();
    let kubectl = |words: &[&str]| lab.kubectl(words).and_then(Output::ok).unwrap();
    namespace(lab, "partial", &[("web", 80, "TCP"), ("api", 80, "TCP")]);
    pool(lab, "partial", "10.98.82.1-10.98.82.4");
    gone(lab, &["partial-1"]);
    report(lab, "partial-1", &node("10.98.82.200/24", 82, &ago(0), "Backup"));
    said(lab, "expose svc/web -n partial --pool partial --wait=false");
    kubectl(&["delete", "clusterrolebinding", "partial-view", "--ignore-not-found"]);
    kubectl(&[
        "create",
        "clusterrolebinding",
        "partial-view",
        "--clusterrole=kubectl-vip-view",
        "--group=partial-view",
    ]);
    kubectl(&["delete", "role,rolebinding", "partial", "-n", "partial", "--ignore-not-found"]);
    let verbs = "--verb=get,list,update,patch";
    kubectl(&["create", "role", "partial", verbs, "--resource=services", "-n", "partial"]);
    kubectl(&["create", "rolebinding", "partial", "--role=partial", "--user=nina", "-n", "partial"]);
    let user = format!("--as nina --as-group {USERS}");
    kubectl(&["delete", "clusterrole,clusterrolebinding", "partial-half", "--ignore-not-found"]);
    let rules = json!([
        {"apiGroups": ["*"], "resources": ["*"], "verbs": ["get", "list"]},
        {"apiGroups": ["", "apps", "admissionregistration.k8s.io", "kubectl-vip.io", "rbac.authorization.k8s.io"],
         "resources": ["*"], "verbs": ["delete"]},
        {"apiGroups": [""], "resources": ["services"], "verbs": ["update"]},
    ]);
    let half = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
                      "metadata": {"name": "partial-half"}, "rules": rules});
    lab.apply(&half.to_string()).unwrap();
    kubectl(&["create", "clusterrolebinding", "partial-half", "--clusterrole=partial-half", "--user=rita"]);
    // The API server takes notice a moment later.
    command::until("the roles", Duration::from_secs(20), || {
        let reads = vip(lab, &format!("pool list {READER}"))?;
        let writes = vip(lab, &format!("expose svc/api -n partial --pool partial --dry-run=server {user}"))?;
        let half = vip(lab, &format!("pool list {HALF}"))?;
        Ok((reads.success() && writes.success() && half.success()).then_some(()))
    })
    .unwrap();

    let run = |line: &str, who: &str| vip(lab, &format!("{line} {who}")).unwrap();
    for who in [READER, user.as_str()] {
        let status = run("status -A", who);
        assert!(status.success() && status.stdout.starts_with("Agent: Forbidden"), "{who}: {status:#?}");
        assert!(status.stdout.contains("10.98.82.1   partial   <pending>"), "{who}: {status:#?}");
        let data: Value = serde_json::from_str(&run("status -n partial -o json", who).stdout).unwrap();
        assert_eq!(data["forbidden"], json!(["daemonsets.apps"]), "{who}");
        let depth = run("status 10.98.82.1", who);
        assert!(depth.success() && depth.stdout.contains("\nBACKEND\nForbidden\n"), "{who}: {depth:#?}");
        for line in ["pool list", "node list", "version"] {
            assert!(run(line, who).success(), "{line} {who}");
        }
        assert!(run("check", who).stdout.contains("  Forbidden  nodes: "), "{who}");
    }
    let refuses = |line: &str, who: &str, cannot: &str| {
        let output = run(line, who);
        let name = who.split(' ').nth(1).unwrap_or_default();
        let sentence = format!("Error from server (Forbidden): user {name:?} cannot {cannot}");
        assert!(output.code == 1 && output.stdout.is_empty(), "{line} {who}: {output:#?}");
        let (verb, rest) = cannot.split_once(' ').unwrap();
        let ask = format!("hint: kubectl auth can-i {verb} {}", rest.split(' ').next().unwrap_or_default());
        let words = output.stderr.contains(&sentence) && output.stderr.contains(&ask);
        assert!(words, "{line} {who}: {output:#?}");
    };
    let (vips, pools, nodes) =
        ("virtualips.kubectl-vip.io", "vippools.kubectl-vip.io", "vipnodes.kubectl-vip.io");
    for (line, cannot) in [
        ("move 10.98.82.1 --to partial-1", format!("patch {vips}")),
        ("unexpose 10.98.82.1", format!("delete {vips}")),
        ("unexpose svc/web -n partial", format!("delete {vips}")),
        ("expose svc/api -n partial --pool partial", "get services in \"partial\"".to_owned()),
    ] {
        refuses(line, READER, &cannot);
    }
    for who in [READER, user.as_str()] {
        for (line, cannot) in [
            ("node drain partial-1 --yes", format!("patch {nodes}")),
            ("pool create other 10.98.83.1", format!("create {pools}")),
            ("pool set partial --add 10.98.82.9", format!("patch {pools}")),
            ("import configmap partial/vips", "get configmaps in \"partial\"".to_owned()),
            ("expose svc/kubernetes -n default", "get services in \"default\"".to_owned()),
        ] {
            refuses(line, who, &cannot);
        }
    }
    // Addresses and agents would come first.
    refuses("uninstall --yes", HALF, "delete customresourcedefinitions.apiextensions.k8s.io");
    assert_eq!(field(lab, "virtualip/10.98.82.1", ".metadata.deletionTimestamp"), "");
    kubectl(&["get", "daemonset", "vip-node", "-n", "kubectl-vip"]);
    for (line, cannot) in [
        ("status -A", format!("list {vips}")),
        ("pool list", format!("list {pools}")),
        ("node list", format!("list {nodes}")),
        ("rebalance", format!("list {vips}")),
        ("unexpose 10.98.82.1", format!("list {vips}")),
        ("pool delete partial", format!("list {pools}")),
    ] {
        refuses(line, NOBODY, &cannot);
    }
    assert_eq!(field(lab, "virtualip/10.98.82.1", ".spec.preferredNode"), "", "nothing has changed");

    // In the own namespace all goes well.
    report(lab, "partial-1", &node("10.98.82.200/24", 82, &ago(0), "Backup"));
    let own = |line: &str| run(line, &user).ok().unwrap().stdout;
    assert!(own("expose svc/api -n partial --pool partial --wait=false").contains("exposed: 10.98.82.2"));
    // The two addresses share the pool's virtual router.
    assert_eq!(own("move svc/api -n partial --to partial-1 --wait=false").lines().count(), 2);
    assert_eq!(own("unexpose svc/web svc/api -n partial").lines().count(), 2);
    gone(lab, &["partial-1"]);
    said(lab, "pool delete partial");
}
