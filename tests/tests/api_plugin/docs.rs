//! Every kubectl command of the documentation, run against a cluster in which it makes sense.
//!
//! What would change something asks the API server for a dry run, so the commands of a page do not depend on each other, except
//! for `pool create`, whose pool the next lines may need. What the commands do when it counts is for the other tests.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use lab::{Lab, Output, binaries, command, paths};
use serde_json::json;

use super::{
    LIMIT,
    agents::{backups, gone, owner},
    exclusive, namespace, said, scratch,
};

/// They need a kubelet, or krew and its index.
const ELSEWHERE: [&str; 4] =
    ["kubectl logs", "kubectl describe pod", "kubectl krew", "kubectl wait --for=delete"];
/// Sentences name these without what belongs to them.
const NAMED_ONLY: [&str; 7] = [
    "kubectl vip",
    "kubectl vip expose",
    "kubectl vip unexpose",
    "kubectl vip move",
    "kubectl vip move --to",
    "kubectl vip node drain",
    "kubectl drain",
];
/// What would change something.
const CHANGES: [&str; 19] = [
    "kubectl vip install",
    "kubectl vip upgrade",
    "kubectl vip uninstall",
    "kubectl vip expose",
    "kubectl vip unexpose",
    "kubectl vip import",
    "kubectl vip move",
    "kubectl vip rebalance",
    "kubectl vip node drain",
    "kubectl vip node undrain",
    "kubectl vip pool set",
    "kubectl vip pool delete",
    "kubectl create",
    "kubectl apply",
    "kubectl delete",
    "kubectl label",
    "kubectl patch",
    "kubectl set",
    "kubectl uncordon",
];
/// What stands for something of the reader's, longer ones first.
const STAND_INS: [(&str, &str); 17] = [
    ("NAME=RANGE", "lab=192.168.10.240/28"),
    ("svc/NAME", "svc/web -n shop"),
    ("virtualip NAME", "virtualip 192.168.10.241"),
    ("NAMESPACE/NAME", "kube-system/vip-configmap"),
    ("NS/NAME", "kube-system/vip-configmap"),
    ("FIRST-LAST", "200-210"),
    ("NAMESPACE", "shop"),
    ("SCHEDULER", "rr"),
    ("SELECTOR", "app=web"),
    ("ADDRESS", "192.168.10.241"),
    ("COMMAND", "install"),
    ("SERVICE", "web"),
    ("RANGE", "192.168.10.249"),
    ("NODE", "docs-1"),
    ("POOL", "lab"),
    ("CODE", "VIP301"),
    ("NAME", "docs"),
];

/// A command and where it stands.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Found {
    place: String,
    line: String,
}

/// The commands of a page: lines of its blocks, and what stands between backquotes.
fn commands(page: &Path) -> Vec<Found> {
    let text = fs::read_to_string(page).unwrap();
    let mut found = Vec::new();
    let mut fenced = false;
    for (number, line) in (1..).zip(text.lines()) {
        let mut add = |command: &str| {
            if command.starts_with("kubectl ") {
                let place = format!("{}:{number}", page.file_name().unwrap().display());
                found.push(Found { place, line: command.to_owned() });
            }
        };
        let whole = line.trim().trim_start_matches("$ ");
        if whole.starts_with("```") {
            fenced = !fenced;
        } else if fenced || line.starts_with("    ") {
            // Two spaces: words in a picture.
            add(whole.split("  ").next().unwrap_or_default().trim_end_matches('\\'));
        } else {
            line.split('`').skip(1).step_by(2).for_each(add);
        }
    }
    found
}

/// What is run for a command: each of its alternatives, with something for what stands in.
fn concrete(line: &str) -> Vec<String> {
    if NAMED_ONLY.contains(&line) {
        return vec![format!("{} --help", line.trim_end_matches(" --to"))];
    }
    if let Some((start, choices)) = line.rsplit_once(' ').filter(|(_, last)| last.contains("\\|")) {
        return choices.split("\\|").map(|choice| format!("{start} {choice} --help")).collect();
    }
    let mut line = line.replace("...", "").replace(['[', ']'], "").replace("\\|", "|");
    // It would go on, and has tests of its own.
    line = line.replace(" -w", "");
    for (word, instead) in STAND_INS {
        line = line.replace(word, instead);
    }
    line = line.replace("move VIP", "move 192.168.10.241").replace("unexpose VIP", "unexpose 192.168.10.241");
    if line.contains("node drain|undrain") {
        return ["drain", "undrain"]
            .iter()
            .flat_map(|one| concrete(&line.replace("drain|undrain", one)))
            .collect();
    }
    let changes = CHANGES.iter().any(|start| line.starts_with(start));
    if changes && !line.contains("--dry-run") && !line.contains("--help") {
        // What a page creates may be there already.
        let how = if line.starts_with("kubectl create") { "client" } else { "server" };
        let (command, output) = line.split_at(line.find(" > ").unwrap_or(line.len()));
        line = format!("{command} --dry-run={how}{output}");
    }
    vec![line]
}

/// A cluster like that of the pages, with an agent on each of two nodes.
fn scene(lab: &Lab) {
    // Installed afresh: in other tests kubectl has set fields of it.
    said(lab, "uninstall --yes");
    said(lab, "install --wait=false");
    namespace(lab, "shop", &[("web", 80, "TCP"), ("mail", 25, "TCP")]);
    namespace(lab, "ingress", &[("nginx", 80, "TCP")]);
    let workload = |name: &str, namespace: &str| {
        json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": name, "namespace": namespace}, "spec": {
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"nodeSelector": {"nowhere": ""}, "containers": [{"name": name, "image": "example/image"}]},
            },
        }})
    };
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "vip-configmap", "namespace": "kube-system"},
        "data": {"10.4.0.50": "shop/web", "10.4.0.51": "shop/mail:DR", "10.4.0.52": "ingress/nginx:PROXY", "10.4.0.53": ""},
    });
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "docs-1"}});
    for object in [workload("kube-keepalived-vip", "kube-system"), workload("calico-node", "shop"), map, node]
    {
        lab.apply(&object.to_string()).unwrap();
    }
    said(lab, "pool create lab 192.168.10.240/28 --virtual-routers 100-139");
    said(lab, "pool create old 10.4.0.50-10.4.0.59 --virtual-routers 140-149");
    backups(lab, "docs", &["192.168.10.1/24", "192.168.10.2/24"], 100);
    said(lab, "expose svc/web -n shop --ip 192.168.10.241 --wait=false");
    owner(lab, "192.168.10.241", "docs-1");
}

/// Every page for readers.
fn pages() -> Vec<PathBuf> {
    let root = paths::repository();
    let docs = fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let mut pages: Vec<PathBuf> = docs.filter(|path| path.extension().is_some_and(|it| it == "md")).collect();
    pages.extend([root.join("README.md"), root.join("CONTRIBUTING.md")]);
    pages.sort();
    pages
}

#[test]
fn every_command_of_the_documentation_works() {
    let (lab, _alone) = exclusive();
    scene(lab);
    let folder = scratch("docs");
    fs::create_dir_all(folder.join(".local/bin")).unwrap();
    std::os::unix::fs::symlink(paths::repository().join("manifests"), folder.join("manifests")).unwrap();
    let kubectl = binaries::path("kubectl").unwrap();
    let path = format!(
        "{}:{}:{}",
        paths::target().join("debug").display(),
        kubectl.parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );

    let run = |line: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-c", line]).current_dir(&folder).env("PATH", &path);
        shell.env("KUBECONFIG", lab.kubeconfig()).env("HOME", &folder);
        command::run(&mut shell, LIMIT).unwrap()
    };
    let (mut done, mut wrong) = (BTreeSet::new(), Vec::new());
    for found in pages().iter().flat_map(|page| commands(page)) {
        if ELSEWHERE.iter().any(|start| found.line.starts_with(start)) {
            continue;
        }
        for line in concrete(&found.line) {
            if !done.insert(line.clone()) {
                continue;
            }
            if let Some(pool) = line.strip_prefix("kubectl vip pool create ") {
                let name = pool.split(' ').next().unwrap();
                lab.kubectl(["delete", "vippool", name, "--ignore-not-found"]).unwrap().ok().unwrap();
            }
            // A dry run of the client asks for nothing to be stored, not even by way of trying.
            let client = line.replace("--dry-run=server", "--dry-run=client");
            let unsent = line.starts_with("kubectl vip ") && client != line;
            let before = unsent.then(|| versions(lab));
            if unsent && !run(&client).success() {
                wrong.push(format!("{}: {}\n  run as: {client}", found.place, found.line));
            }
            if unsent && before != Some(versions(lab)) {
                wrong.push(format!("{}: {client} has changed something", found.place));
            }
            let output = run(&line);
            if !output.success() && !reports(&line, output.code) {
                wrong.push(format!("{}: {}\n  run as: {line}\n  {}", found.place, found.line, output.stderr));
            }
        }
    }
    lab.kubectl(["delete", "virtualips,vippools", "--all"]).unwrap().ok().unwrap();
    lab.kubectl(["delete", "node", "docs-1"]).unwrap().ok().unwrap();
    gone(lab, &["docs-1", "docs-2"]);
    fs::remove_dir_all(&folder).unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(done.len() > 60, "only {} commands were found", done.len());
}

/// The versions of everything that commands of ours change.
fn versions(lab: &Lab) -> String {
    let kinds = "virtualips,vippools,vipnodes,crd,ns,daemonsets,clusterroles,clusterrolebindings,\
                 validatingadmissionpolicies,validatingadmissionpolicybindings";
    let path = "jsonpath={range .items[*]}{.kind}/{.metadata.name} {.metadata.resourceVersion}{\"\\n\"}{end}";
    lab.kubectl(["get", kinds, "-A", "-o", path]).and_then(Output::ok).unwrap().stdout
}

/// Whether a command says by this exit code what it has found.
fn reports(line: &str, code: i32) -> bool {
    code == 1 && (line.starts_with("kubectl vip check") || line.starts_with("kubectl vip diff"))
}
