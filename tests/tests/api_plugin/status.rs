//! What `status`, `node list`, `version` and a waiting `expose` make of what agents report.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use lab::{Output, command};
use serde_json::{Value, json};

use super::{
    agents::{ago, node, own, report},
    exclusive, installed, namespace, pool, refused, said, vip,
};

#[test]
fn reports_are_shown_for_as_long_as_they_hold() {
    let (lab, _guard) = installed();
    namespace(lab, "seen", &[("web", 80, "TCP"), ("api", 80, "TCP")]);
    pool(lab, "seen", "10.98.7.1-10.98.7.4");
    report(lab, "plugin-node", &node("10.98.7.200/24", 7, &ago(0), "Master"));

    let exposed = thread::scope(|scope| {
        let running = scope.spawn(|| vip(lab, "expose svc/web -n seen --pool seen --wait --timeout 60s"));
        command::until("the virtual IP", Duration::from_secs(30), || {
            Ok(lab.kubectl(["get", "virtualip", "10.98.7.1"])?.success().then_some(()))
        })
        .unwrap();
        thread::sleep(Duration::from_secs(1));
        own(lab, "10.98.7.1", "plugin-node", "True", "Programmed", 3);
        running.join().unwrap().and_then(Output::ok).unwrap()
    });
    assert_eq!(exposed.stdout, "service/web exposed: 10.98.7.1 (pool seen, owner plugin-node, 3 backends)\n");
    assert!(
        exposed.stderr.contains("waiting for an owner of 10.98.7.1: no node has taken it"),
        "{exposed:#?}"
    );

    said(lab, "expose svc/api -n seen --pool seen --wait=false");
    own(lab, "10.98.7.2", "plugin-node", "False", "NoEndpoints", 0);
    report(lab, "plugin-node", &node("10.98.7.200/24", 7, &ago(0), "Master"));
    let status = said(lab, "status -n seen");
    let line = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(line("SERVICE"), ["SERVICE", "VIP", "POOL", "OWNER", "BACKENDS", "STATUS", "AGE"]);
    assert_eq!(line("web")[..6], ["web", "10.98.7.1", "seen", "plugin-node", "3/3", "Active"]);
    assert_eq!(line("api")[..6], ["api", "10.98.7.2", "seen", "plugin-node", "0/3", "NoEndpoints"]);
    assert!(
        status.contains(
            "! VIP301 seen/api: no ready endpoints for 14m\n    kubectl get endpointslices -n seen -l kubernetes.io/service-name=api\n"
        ),
        "{status}"
    );
    let nodes = said(lab, "node list");
    let row = nodes.lines().find(|line| line.starts_with("plugin-node")).unwrap();
    let row: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(row[1..7], ["Ready", "v0.1.0", "eth0", "10.98.7.200/24", "2", "10.98.7.1,10.98.7.2"]);
    assert!(said(lab, "version").starts_with("Client Version: v0.1.0\nAgent Version: "));

    // Who names one is told all about it, and nothing of an earlier one at its address.
    let earlier = json!({
        "apiVersion": "v1", "kind": "Event", "metadata": {"name": "seen-earlier", "namespace": "default"},
        "involvedObject": {"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VirtualIP", "name": "10.98.7.1", "uid": "earlier"},
        "reason": "Announced", "type": "Normal", "message": "announced by plugin-node", "lastTimestamp": ago(60),
    });
    lab.apply(&earlier.to_string()).unwrap();
    let depth = said(lab, "status svc/web -n seen");
    let cells = |head: &str| -> Vec<Vec<String>> {
        let part = depth.lines().skip_while(|line| !line.starts_with(head)).skip(1);
        let rows = part.take_while(|line| !line.is_empty());
        rows.map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
    };
    assert!(depth.contains("\nVirtual router 7 of 10.98.7.1, scheduler wlc\n"), "{depth}");
    assert!(cells("NODE").iter().any(|row| row[0] == "plugin-node" && row[2] == "Master"), "{depth}");
    assert_eq!(cells("BACKEND"), [["<none>"]], "{depth}");
    assert!(cells("CONDITION").iter().any(|row| row[..3] == ["Announced", "True", "Active"]), "{depth}");
    assert_eq!(cells("LAST"), [["<none>"]], "{depth}");

    report(lab, "plugin-node", &node("10.98.7.200/24", 7, &ago(90), "Master"));
    let silent = said(lab, "status svc/web -n seen");
    assert!(silent.contains("<unknown>   <unknown>   Unknown (9"), "{silent}");
    assert!(silent.contains("! VIP202 seen/web: last owner plugin-node has been silent for 9"), "{silent}");
    assert!(silent.contains(": nobody knows who owns 10.98.7.1\n"), "{silent}");
    let document: Value = serde_json::from_str(&said(lab, "status 10.98.7.1 -o json")).unwrap();
    let item = &document["items"][0];
    assert_eq!([&item["owner"], &item["backends"]], [&json!(null); 2], "{document:#}");
    assert_eq!((&item["status"], &item["virtualRouter"]), (&json!("Unknown"), &json!(7)));
    assert_eq!(item["details"]["virtualIP"]["status"]["node"], "plugin-node", "what was reported last");
    // Those that Kubernetes makes of a Service without pods lead nowhere.
    let slices = item["details"]["endpointSlices"].as_array().expect("a list");
    assert!(slices.iter().all(|slice| slice["endpoints"] == json!([])), "{slices:?}");
    // For programs: rows and nothing else.
    let rows = vip(lab, "status svc/web -n seen --no-headers").and_then(Output::ok).unwrap();
    assert_eq!(rows.stdout.lines().count(), 1, "{rows:#?}");
    assert!(rows.stdout.starts_with("web   10.98.7.1   seen   <unknown>"), "{rows:#?}");
    for talk in ["Agent: ", "! VIP202 seen/web: "] {
        assert!(rows.stderr.contains(talk), "{talk}: {rows:#?}");
    }
    assert_eq!(said(lab, "status svc/web -n seen -o name"), "virtualip.kubectl-vip.io/10.98.7.1\n");
    lab.kubectl(["delete", "vipnode", "plugin-node"]).and_then(Output::ok).unwrap();
}

#[test]
fn agents_of_another_version_are_not_written_to() {
    // An old agent stands in everybody's way while it is there.
    let (lab, _guard) = exclusive();
    namespace(lab, "skew", &[("web", 80, "TCP")]);
    pool(lab, "skew", "10.98.8.1-10.98.8.4");
    let mut old = node("10.98.8.200/24", 8, &ago(0), "Backup");
    old["agentVersion"] = json!("0.9.0");
    report(lab, "plugin-old", &old);
    let output = vip(lab, "expose svc/web -n skew --pool skew").unwrap();
    lab.kubectl(["delete", "vipnode", "plugin-old"]).and_then(Output::ok).unwrap();
    assert_eq!(output.code, 1);
    assert!(
        output
            .stderr
            .starts_with("Error: plugin v0.1.0, agent v0.9.0: nothing changed; reading still works\n"),
        "{output:#?}"
    );
    let empty = vip(lab, "status -n skew").and_then(Output::ok).unwrap();
    assert!(empty.stderr.contains("No virtual IPs found in skew namespace."), "{empty:#?}");
}

/// A watch of the status; it ends with this.
struct Watching(Child);

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_watch_prints_what_has_changed_line_by_line_into_a_pipe() {
    let (lab, _guard) = installed();
    namespace(lab, "watched", &[("web", 80, "TCP"), ("api", 80, "TCP")]);
    pool(lab, "watched", "10.98.72.1-10.98.72.4");
    said(lab, "expose svc/web -n watched --pool watched --wait=false");
    let mut command = lab.kubectl_command().unwrap();
    command.args(["vip", "status", "-n", "watched", "-w"]).stdout(Stdio::piped());
    let mut watching = Watching(command.spawn().unwrap());
    let stdout = BufReader::new(watching.0.stdout.take().unwrap());
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let next = || {
        let line = lines.recv_timeout(Duration::from_secs(60)).unwrap();
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(next()[..3], ["SERVICE", "VIP", "POOL"]);
    assert_eq!(next()[..3], ["web", "10.98.72.1", "watched"]);
    said(lab, "expose svc/api -n watched --pool watched --wait=false");
    assert_eq!(next()[..3], ["api", "10.98.72.2", "watched"]);
    said(lab, "unexpose svc/web -n watched");
    let gone = next();
    assert_eq!((gone[0].as_str(), gone[5].as_str()), ("web", "Released"));
    assert!(refused(lab, "status -w -o json").starts_with("Error: --watch prints a table\n"));
    assert!(
        refused(lab, "status svc/wbe -n watched -w").starts_with("Error: services \"wbe\" not found"),
        "a mistyped name is not waited for"
    );
}
