//! What people see of the manifests and what the agents are given.

use std::time::Duration;

use lab::command;
use serde_json::{Value, json};

use crate::{Who, apply, manifests, node, passed, resource, server, vip};

/// The objects of the manifests as they are stored, by kind and name, with their generations.
fn stored() -> Vec<String> {
    let list = passed(Who::Admin.kubectl(&["get", "-k", &manifests(), "-o", "json"]));
    let list: Value = serde_json::from_str(&list.stdout).unwrap();
    let line = |object: &Value| {
        let meta = &object["metadata"];
        format!("{} {} {} {}", object["kind"], meta["name"], meta["uid"], meta["generation"])
    };
    list["items"].as_array().unwrap().iter().map(line).collect()
}

#[test]
fn applying_twice_changes_nothing() {
    let lab = server().unwrap();
    let before = stored();
    assert_eq!(before.len(), 17, "{before:#?}");
    let again = passed(apply(lab));
    assert_eq!(again.stderr, "", "no warnings");
    assert_eq!(stored(), before);
    let diff = lab.kubectl(["diff", "--server-side", "--force-conflicts", "-k", &manifests()]).unwrap();
    assert!(diff.success() && diff.stdout.is_empty(), "{diff:#?}");
}

/// The API server checks the types of the expressions against the schemas and says what is odd.
#[test]
fn the_policies_agree_with_the_schemas() {
    let lab = server().unwrap();
    for policy in ["kubectl-vip-services", "kubectl-vip-own-node"] {
        command::until("the check of the types", Duration::from_secs(30), || {
            let policy = lab.kubectl(["get", "validatingadmissionpolicy", policy, "-o", "json"])?.ok()?;
            let policy: Value = serde_json::from_str(&policy.stdout)?;
            let checked = &policy["status"]["typeChecking"];
            assert!(checked["expressionWarnings"].is_null(), "{checked:#}");
            Ok((!checked.is_null()).then_some(()))
        })
        .unwrap();
    }
}

#[test]
fn the_resources_are_as_the_api_server_wants_them() {
    let lab = server().unwrap();
    for crd in ["virtualips", "vippools", "vipnodes"] {
        let crd = lab
            .kubectl(["get", "crd", &format!("{crd}.kubectl-vip.io"), "-o", "json"])
            .unwrap()
            .ok()
            .unwrap();
        let crd: Value = serde_json::from_str(&crd.stdout).unwrap();
        for condition in crd["status"]["conditions"].as_array().unwrap() {
            let bad = condition["type"] == "NonStructuralSchema" || condition["status"] != "True";
            assert!(!bad, "{condition:#}");
        }
    }
}

/// The words of the first line that holds `mark`.
fn words<'a>(text: &'a str, mark: &str) -> Vec<&'a str> {
    text.lines().find(|line| line.contains(mark)).unwrap_or_default().split_whitespace().collect()
}

#[test]
fn kubectl_get_prints_what_matters() {
    let lab = server().unwrap();
    let delete = ["delete", "vip/10.99.30.1", "vippool/lab-shown", "vipnode/lab-shown", "--ignore-not-found"];
    passed(Who::Admin.kubectl(&delete));

    passed(Who::Admin.send("create", &vip("10.99.30.1", &["shop/web"])));
    let announced = json!({
        "type": "Announced", "status": "True", "reason": "Active",
        "message": "The address is bound on lab-shown.", "lastTransitionTime": "2026-01-01T00:00:00Z",
    });
    let status =
        json!({ "node": "lab-shown", "backends": { "ready": 5, "total": 6 }, "conditions": [announced] });
    passed(Who::Admin.report("vip/10.99.30.1", &status));
    let pool =
        json!({ "addresses": ["10.99.30.1-10.99.30.9"], "virtualRouters": { "first": 239, "count": 1 } });
    passed(Who::Admin.send("create", &resource("VIPPool", "lab-shown", pool)));
    passed(Who::Admin.report("vippool/lab-shown", &json!({ "total": 9, "allocated": 1, "available": 8 })));
    let agent = Who::agent(lab, "lab-shown").unwrap();
    passed(agent.send("create", &node("lab-shown")));
    let status =
        json!({ "agentVersion": "0.1.0", "dataplane": { "ready": false, "reason": "IPVSUnavailable" } });
    passed(agent.report("vipnode/lab-shown", &status));

    let shown = passed(Who::Admin.kubectl(&["get", "vip,vippool,vipnode"])).stdout;
    let heads: Vec<Vec<&str>> = shown
        .lines()
        .filter(|line| line.starts_with("NAME"))
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(
        heads,
        [
            vec!["NAME", "NAMESPACE", "SERVICE", "NODE", "READY", "TOTAL", "ANNOUNCED", "REASON", "AGE"],
            vec!["NAME", "ADDRESSES", "TOTAL", "ALLOCATED", "AVAILABLE", "AGE"],
            vec!["NAME", "READY", "REASON", "VERSION", "RENEWED", "AGE"],
        ],
        "{shown}"
    );
    let vip = words(&shown, "virtualip.kubectl-vip.io/10.99.30.1");
    assert_eq!(vip[1..8], ["shop", "web", "lab-shown", "5", "6", "True", "Active"], "{shown}");
    let pool = words(&shown, "vippool.kubectl-vip.io/lab-shown");
    assert_eq!(pool[1..5], [r#"["10.99.30.1-10.99.30.9"]"#, "9", "1", "8"], "{shown}");
    let node = words(&shown, "vipnode.kubectl-vip.io/lab-shown");
    assert_eq!(node[1..4], ["false", "IPVSUnavailable", "0.1.0"], "{shown}");
    passed(Who::Admin.kubectl(&delete));
}

#[test]
fn containers_have_two_capabilities_and_no_more() {
    let lab = server().unwrap();
    let set = lab
        .kubectl(["get", "daemonset", "vip-node", "-n", "kubectl-vip", "-o", "json"])
        .unwrap()
        .ok()
        .unwrap();
    let set: Value = serde_json::from_str(&set.stdout).unwrap();
    let pod = &set["spec"]["template"]["spec"];
    let containers = pod["containers"].as_array().unwrap();
    let names: Vec<&Value> = containers.iter().map(|container| &container["name"]).collect();
    assert_eq!(names, ["vrrp", "agent"]);
    for container in containers {
        let expected = json!({
            "privileged": false,
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"] },
        });
        assert_eq!(container["securityContext"], expected, "{}", container["name"]);
        assert!(
            container["resources"]["limits"]["cpu"].is_null()
                && !container["resources"]["limits"]["memory"].is_null()
        );
    }
    assert_eq!((&pod["hostNetwork"], &pod["hostPID"]), (&json!(true), &Value::Null));
    assert_eq!(pod["automountServiceAccountToken"], false);
    let holds = |container: &Value, volume: &str| {
        container["volumeMounts"].as_array().unwrap().iter().any(|mount| mount["name"] == volume)
    };
    // Only the agent has a token and the sysctls; both have the socket.
    for (volume, vrrp) in [("api-access", false), ("sysctl-net", false), ("link", true)] {
        assert_eq!((holds(&containers[0], volume), holds(&containers[1], volume)), (vrrp, true), "{volume}");
    }
}

#[test]
fn roles_grant_what_is_needed_and_no_more() {
    server().unwrap();
    let agent = "system:serviceaccount:kubectl-vip:vip-node";
    let person = "carol";
    for (who, verb, what, expected) in [
        (agent, "watch", "services", true),
        (agent, "watch", "endpointslices.discovery.k8s.io", true),
        (agent, "watch", "nodes", true),
        (agent, "patch", "virtualips.kubectl-vip.io/status", true),
        (agent, "create", "events.events.k8s.io", true),
        (agent, "create", "vipnodes.kubectl-vip.io", true),
        (agent, "update", "virtualips.kubectl-vip.io", false),
        (agent, "update", "vippools.kubectl-vip.io", false),
        (agent, "delete", "vipnodes.kubectl-vip.io", false),
        (agent, "update", "services", false),
        (agent, "patch", "nodes", false),
        (agent, "get", "secrets", false),
        (agent, "get", "pods", false),
        (person, "create", "virtualips.kubectl-vip.io", true),
        (person, "list", "vipnodes.kubectl-vip.io", true),
        (person, "create", "vippools.kubectl-vip.io", false),
        (person, "patch", "virtualips.kubectl-vip.io/status", false),
    ] {
        let who_is = match who == person {
            true => Who::user(who),
            false => Who::Named(["--as", who].map(str::to_owned).into()),
        };
        let (resource, sub) = what.split_once('/').unwrap_or((what, ""));
        let output = who_is.kubectl(&["auth", "can-i", verb, resource, "--subresource", sub]).unwrap();
        assert_eq!(output.text() == "yes", expected, "{who} {verb} {what}: {output:?}");
    }
}

#[test]
fn reading_belongs_to_the_role_view() {
    let lab = server().unwrap();
    let found = command::until("the role view to take ours up", Duration::from_secs(30), || {
        let role = lab.kubectl(["get", "clusterrole", "view", "-o", "json"])?.ok()?.stdout;
        Ok(role.contains("virtualips").then_some(role))
    });
    let role: Value = serde_json::from_str(&found.unwrap()).unwrap();
    let rules = role["rules"].as_array().unwrap();
    let ours = rules.iter().find(|rule| rule["apiGroups"] == json!(["kubectl-vip.io"])).unwrap();
    assert_eq!(ours["verbs"], json!(["get", "list", "watch"]));
}
