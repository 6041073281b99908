//! `check` on a healthy cluster and on one fault after the other, each planted where its cause would leave its trace: in
//! the API. Kubelets and agents are the test's own.

use std::time::Duration;

use lab::{Lab, Output, command};
use serde_json::{Value, json};

use super::{
    USERS,
    agents::{ago, node, owner, report},
    exclusive, installed, namespace, pool, refused, said, vip,
};

const NODES: [&str; 3] = ["check-1", "check-2", "check-3"];
const VIP: &str = "10.98.70.1";
const ROLE: &str = "plugin-check";

/// A cluster of three nodes with ready agents, one pool, and a virtual IP that check-1 owns.
struct Scene<'a> {
    lab: &'a Lab,
}

impl Scene<'_> {
    fn kubectl(&self, arguments: &[&str]) -> Output {
        self.lab.kubectl(arguments).and_then(Output::ok).unwrap()
    }

    fn patch(&self, object: &str, subresource: &str, patch: &Value) {
        let [subresource, patch] = [format!("--subresource={subresource}"), patch.to_string()];
        self.kubectl(&["patch", object, "-n", "kubectl-vip", &subresource, "--type=merge", "-p", &patch]);
    }

    /// What other tests have left, and this one.
    fn clear(&self) {
        for kind in ["virtualips", "vippools", "vipnodes"] {
            self.kubectl(&["delete", kind, "--all"]);
        }
        self.kubectl(&[&["delete", "node", "--ignore-not-found"][..], &NODES].concat());
    }

    fn nodes(&self) {
        for name in NODES {
            let labels = json!({"kubernetes.io/os": "linux"});
            let object =
                json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}});
            self.lab.apply(&object.to_string()).unwrap();
            // Enough for a pod. It never says that it is ready, so it is not missed when it says nothing.
            let room = json!({"cpu": "4", "memory": "8Gi", "pods": "110"});
            self.patch(
                &format!("node/{name}"),
                "status",
                &json!({"status": {"capacity": room, "allocatable": room}}),
            );
        }
    }

    /// Does what kubelets do: the pods of the agents run.
    fn kubelets(&self) {
        let path = "jsonpath={range .items[?(@.spec.nodeName)]}{.metadata.name} {end}";
        let pods = command::until("the pods of the agents", Duration::from_secs(60), || {
            let pods = self.kubectl(&["get", "pods", "-n", "kubectl-vip", "-o", path]).stdout;
            let pods: Vec<String> = pods.split_whitespace().map(str::to_owned).collect();
            Ok((pods.len() == NODES.len()).then_some(pods))
        });
        for pod in pods.unwrap() {
            let ready = json!({"type": "Ready", "status": "True"});
            self.patch(
                &format!("pod/{pod}"),
                "status",
                &json!({"status": {"phase": "Running", "conditions": [ready]}}),
            );
        }
        let ready =
            ["get", "daemonset", "vip-node", "-n", "kubectl-vip", "-o", "jsonpath={.status.numberReady}"];
        command::until("the agents to be ready", Duration::from_secs(60), || {
            Ok((self.kubectl(&ready).stdout == "3").then_some(()))
        })
        .unwrap();
    }

    /// What the agents of healthy nodes say.
    fn agents(&self) -> [Value; 3] {
        [1, 2, 3].map(|number| {
            let state = if number == 1 { "Master" } else { "Backup" };
            let mut status = node(&format!("10.98.70.20{number}/24"), 70, &ago(0), state);
            status["peers"] = if number == 1 { json!([]) } else { json!([hears(1)]) };
            status["foreignRouters"] = json!([]);
            status["firewalls"] = json!([]);
            status["dataplane"] = json!({"ready": true, "reason": "Ready", "message": null});
            status
        })
    }

    fn report(&self, change: impl FnOnce(&mut [Value; 3])) {
        let mut agents = self.agents();
        change(&mut agents);
        for (name, status) in NODES.iter().zip(&agents) {
            report(self.lab, name, status);
        }
    }

    /// The codes that are found, each once.
    fn codes(&self, flags: &str) -> Vec<String> {
        let output = vip(self.lab, &format!("check -o json {flags}")).unwrap();
        let document: Value = serde_json::from_str(&output.stdout).unwrap_or_else(|_| panic!("{output:#?}"));
        assert_eq!(
            (&document["apiVersion"], &document["kind"]),
            (&json!("cli.kubectl-vip.io/v1alpha1"), &json!("CheckReport"))
        );
        let errors = document["summary"]["errors"].as_u64().unwrap();
        assert_eq!(output.code, i32::from(errors > 0), "{output:#?}");
        let items = document["items"].as_array().unwrap();
        let mut codes: Vec<String> =
            items.iter().filter_map(|item| item["code"].as_str()).map(str::to_owned).collect();
        codes.sort();
        codes.dedup();
        codes
    }

    /// Reports, looks, and wants these codes and no others.
    #[track_caller]
    fn finds(&self, what: &str, codes: &[&str], change: impl FnOnce(&mut [Value; 3])) {
        self.report(change);
        assert_eq!(self.codes("--pre"), codes, "{what}");
    }

    /// As above, where the API server takes notice of what was changed a moment later.
    fn finds_soon(&self, what: &str, codes: &[&str], flags: &str) {
        command::until(what, Duration::from_secs(30), || {
            self.report(|_| ());
            Ok((self.codes(flags) == codes).then_some(()))
        })
        .unwrap();
    }
}

fn hears(number: u8) -> Value {
    json!({"node": format!("check-{number}"), "address": format!("10.98.70.20{number}"), "interface": "eth0",
           "virtualRouter": 70, "priority": 254})
}

impl Drop for Scene<'_> {
    fn drop(&mut self) {
        self.clear();
        for rest in ["clusterrole", "clusterrolebinding"] {
            self.kubectl(&["delete", rest, ROLE, "--ignore-not-found"]);
        }
        self.kubectl(&["delete", "configmap", "kube-proxy", "-n", "kube-system", "--ignore-not-found"]);
    }
}

#[test]
fn planted_faults_are_found_and_nothing_else() {
    let (lab, _alone) = exclusive();
    let scene = Scene { lab };
    scene.clear();
    namespace(lab, "check", &[("web", 80, "TCP")]);
    scene.nodes();
    let unready = vip(lab, "check -o short").unwrap();
    assert_eq!(unready.code, 1, "{unready:#?}");
    assert!(unready.stdout.contains("error VIP101 agents: "), "{unready:#?}");
    scene.kubelets();
    pool(lab, "check", "10.98.70.1-10.98.70.4");
    said(lab, "expose svc/web -n check --pool check --wait=false");
    owner(lab, VIP, "check-1");

    scene.finds("a healthy cluster", &[], |_| ());
    let healthy = vip(lab, "check --fail-on warning").and_then(Output::ok).unwrap();
    assert_eq!(healthy.stderr, "");
    for words in [
        "  ok         3/3 agents are ready\n",
        "  ok         1 virtual IP: owned and served\n",
        "             LISTENER   check-1   check-2   check-3\n",
        "             check-2    yes       -         -\n",
    ] {
        assert!(healthy.stdout.contains(words), "{words}: {}", healthy.stdout);
    }
    let short = vip(lab, "check -o short").and_then(Output::ok).unwrap();
    assert_eq!(short.stdout, "");

    scene.finds("a stale agent", &["VIP102"], |agents| agents[2]["renewTime"] = json!(ago(90)));
    scene.finds("a missing module", &["VIP104"], |agents| {
        agents[2]["dataplane"] =
            json!({"ready": false, "reason": "IPVSUnavailable", "message": "module ip_vs is missing"});
    });
    scene.finds("a firewall that drops by default", &["VIP114"], |agents| {
        agents[2]["firewalls"] = json!(["inet filter input"]);
    });
    scene.finds("another version", &["VIP108"], |agents| agents[2]["agentVersion"] = json!("0.2.0"));
    scene.finds("an interface outside the subnet", &["VIP112"], |agents| {
        agents[2]["interfaces"][0]["addresses"] = json!(["172.16.70.203/24"]);
    });
    scene.finds("no node on the LAN", &["VIP113"], |agents| {
        for agent in agents {
            agent["interfaces"][0]["addresses"] = json!(["172.16.70.203/24"]);
        }
    });
    scene.finds("a router of others", &["VIP402"], |agents| {
        agents[1]["foreignRouters"] =
            json!([{"address": "10.98.70.99", "interface": "eth0", "family": 4, "virtualRouter": 70, "priority": 100}]);
    });
    scene.finds("jumbo frames on one node", &["VIP404"], |agents| {
        for (agent, mtu) in agents.iter_mut().zip([1500, 1500, 9000]) {
            agent["interfaces"][0]["mtu"] = json!(mtu);
        }
    });
    scene.finds("a firewall on check-3 that drops protocol 112", &["VIP203", "VIP401"], |agents| {
        agents[0]["peers"] = json!([hears(3)]);
        agents[1]["peers"] = json!([hears(1), hears(3)]);
        agents[2]["peers"] = json!([]);
        agents[2]["virtualRouters"][0]["state"] = json!("Master");
    });
    let deaf = vip(lab, "check -o short").unwrap();
    let sentence = "error VIP401 check-3: it does not hear the advertisements of check-1, though check-1 hears check-3\n";
    assert!(deaf.stdout.contains(sentence), "{deaf:#?}");
    assert!(
        deaf.stderr.ends_with("Error: 2 errors and 0 warnings found\nhint: kubectl vip explain CODE\n"),
        "{deaf:#?}"
    );

    let excluded = "node.kubernetes.io/exclude-from-external-load-balancers";
    scene.kubectl(&["label", "node", "check-3", &format!("{excluded}=")]);
    scene.finds("a label", &["VIP109"], |_| ());
    assert_eq!(vip(lab, "check").unwrap().code, 0, "a warning");
    assert_eq!(vip(lab, "check --fail-on warning").unwrap().code, 1);
    scene.kubectl(&["label", "node", "check-3", &format!("{excluded}-")]);
    scene.kubectl(&["label", "vipnode", "check-3", "kubectl-vip.io/drain=true"]);
    scene.finds("a drained node", &["VIP110"], |_| ());
    scene.kubectl(&["label", "vipnode", "check-3", "kubectl-vip.io/drain-"]);

    let config = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
        "data": {"config.conf": "kind: KubeProxyConfiguration\nmode: ipvs\n"},
    });
    lab.apply(&config.to_string()).unwrap();
    scene.finds("kube-proxy in IPVS mode", &["VIP003"], |_| ());
    scene.kubectl(&["delete", "configmap", "kube-proxy", "-n", "kube-system"]);
    let set = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
        "spec": {
            "selector": {"matchLabels": {"k8s-app": "kube-proxy"}},
            "template": {
                "metadata": {"labels": {"k8s-app": "kube-proxy"}},
                "spec": {"containers": [
                    {"name": "kube-proxy", "image": "kube-proxy", "command": ["kube-proxy", "--proxy-mode=ipvs"]}]},
            },
        },
    });
    lab.apply(&set.to_string()).unwrap();
    scene.finds("kube-proxy in IPVS mode by its command line", &["VIP003"], |_| ());
    scene.kubectl(&["delete", "daemonset", "kube-proxy", "-n", "kube-system"]);
    // No kubelet ends its pods.
    scene.kubectl(&["delete", "pods", "-l", "k8s-app=kube-proxy", "-n", "kube-system", "--force"]);

    // The plugin would refuse it, and admission knows only virtual routers.
    let overlap = json!({
        "apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VIPPool", "metadata": {"name": "check-too"},
        "spec": {"addresses": ["10.98.70.3-10.98.70.9"], "virtualRouters": {"first": 71, "count": 1}},
    });
    lab.apply(&overlap.to_string()).unwrap();
    scene.finds("overlapping pools", &["VIP205"], |_| ());
    scene.kubectl(&["delete", "vippool", "check-too"]);

    let in_use = |kind: &str, status: &str| {
        json!({"type": kind, "status": status, "reason": "AddressInUse", "lastTransitionTime": ago(60),
               "message": "52:54:00:aa:bb:cc uses it"})
    };
    let taken = json!({"status": {"node": null, "conditions": [in_use("Announced", "False"), in_use("Conflict", "True")]}});
    scene.patch(&format!("virtualip/{VIP}"), "status", &taken);
    scene.finds("an address in use", &["VIP207"], |agents| {
        agents[0]["virtualRouters"][0]["state"] = json!("Backup");
    });
    owner(lab, VIP, "check-1");

    scene.kubectl(&[
        "patch",
        "clusterrole",
        "kubectl-vip-agent",
        "--type=json",
        "-p",
        r#"[{"op": "remove", "path": "/rules/0"}]"#,
    ]);
    scene.finds_soon("agents without a permission", &["VIP006"], "");
    scene.kubectl(&["delete", "clusterrole", "kubectl-vip-view"]);
    scene.finds_soon("a part that is missing", &["VIP006", "VIP007"], "");
    said(lab, "install --wait=false --force-conflicts --yes");
    scene.finds_soon("all to be well again", &[], "--pre");
    a_user_who_may_not_install(&scene);
}

/// Everything that install takes, but the DaemonSet.
fn a_user_who_may_not_install(scene: &Scene) {
    let apply = ["create", "patch"];
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": ROLE},
        "rules": [
            {"apiGroups": ["*"], "resources": ["*"], "verbs": ["get", "list"]},
            {"apiGroups": ["authorization.k8s.io"], "resources": ["*"], "verbs": ["create"]},
            {"apiGroups": ["", "apiextensions.k8s.io", "admissionregistration.k8s.io", "kubectl-vip.io",
                           "rbac.authorization.k8s.io"], "resources": ["*"], "verbs": apply},
        ],
    });
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": ROLE},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": ROLE},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "carol"}],
    });
    scene.lab.apply(&format!("{role}\n---\n{binding}")).unwrap();
    scene.finds_soon("a user who may not install", &["VIP002"], "--pre --as carol");
    let said = vip(scene.lab, "check --pre -o short --as carol").unwrap();
    assert!(
        said.stdout
            .contains("error VIP002 you: you cannot create, patch daemonsets.apps in \"kubectl-vip\"\n"),
        "{said:#?}"
    );
    scene.finds_soon("what it takes to look", &[], "--as carol");
}

#[test]
fn what_may_not_be_read_is_forbidden_and_the_rest_is_shown() {
    let (lab, _guard) = installed();
    let output = vip(lab, &format!("check --as dora --as-group {USERS}")).unwrap();
    for words in [
        "cluster\n  ok         the API server is v1.",
        "  Forbidden  ConfigMap kube-proxy: the mode of kube-proxy is not checked\n",
        "  Forbidden  daemonsets: whether the agents are ready is not checked\n",
        "\nobjects\n",
    ] {
        assert!(output.stdout.contains(words), "{words}: {output:#?}");
    }
    assert!(!output.stderr.contains("Forbidden"), "{output:#?}");
}

#[test]
fn codes_are_explained() {
    let (lab, _guard) = installed();
    let text = said(lab, "explain 301");
    assert!(text.starts_with("VIP301 (warning): a Service has no ready endpoint\n\nCause:\n  "), "{text}");
    assert_eq!(said(lab, "explain vip301"), text);
    assert!(said(lab, "explain").lines().any(|line| line.starts_with("VIP003   error")));
    assert_eq!(
        refused(lab, "explain VIP3001"),
        "Error: there is no code \"VIP3001\"; did you mean \"VIP001\"?\nhint: kubectl vip explain lists all codes"
    );
}
