//! Installing twice, installing next to `kubectl apply -k`, and uninstalling.

use std::{fs, process::Command};

use lab::{Output, command, paths};
use serde_json::json;

use super::{
    LIMIT,
    agents::{ago, node, report},
    exclusive, installed, namespace, refused, said, vip,
};

#[test]
fn a_client_dry_run_needs_no_cluster_and_is_the_same_each_time() {
    let (lab, _guard) = installed();
    let show = || {
        let mut kubectl = lab.kubectl_command().unwrap();
        kubectl.env("KUBECONFIG", "/nonexistent");
        let line = ["vip", "install", "--dry-run=client", "-o", "yaml", "--pool", "dry=10.98.60.0/28"];
        command::run(kubectl.args(line), LIMIT).and_then(Output::ok).unwrap().stdout
    };
    let text = show();
    assert_eq!(text, show());
    let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("install.yaml");
    fs::write(&file, text).unwrap();
    let file = file.display().to_string();
    lab.kubectl(["apply", "--dry-run=server", "-f", &file]).and_then(Output::ok).unwrap();
}

#[test]
fn installing_twice_and_by_kubectl_is_one_and_the_same() {
    let (lab, _guard) = exclusive();
    said(lab, "uninstall --yes");
    let first =
        said(lab, "install --wait=false --pool twice=10.98.61.0/28 --pool more=10.98.62.1,10.98.62.2");
    for line in [
        "customresourcedefinition.apiextensions.k8s.io/virtualips.kubectl-vip.io serverside-applied",
        "daemonset.apps/vip-node serverside-applied",
        "vippool.kubectl-vip.io/twice serverside-applied",
    ] {
        assert!(first.lines().any(|said| said == line), "{line} is missing:\n{first}");
    }
    let versions = || {
        let kinds = "crd,validatingadmissionpolicy,clusterrole,clusterrolebinding,vippool";
        let mine = lab.kubectl(["get", kinds, "-l", "app.kubernetes.io/name=kubectl-vip", "-o", "name"]);
        let generations = "jsonpath={range .items[*]}{.metadata.name} {.metadata.generation}{\"\\n\"}{end}";
        let sets = lab.kubectl(["get", "daemonset,vippool,crd", "-A", "-o", generations]);
        (mine.and_then(Output::ok).unwrap().stdout, sets.and_then(Output::ok).unwrap().stdout)
    };
    let before = versions();
    assert_eq!(
        said(lab, "install --wait=false --pool twice=10.98.61.0/28 --pool more=10.98.62.1,10.98.62.2"),
        first
    );
    let folder = paths::repository().join("manifests").display().to_string();
    lab.kubectl(["apply", "--server-side", "-k", &folder]).and_then(Output::ok).unwrap();
    said(lab, "install --wait=false");
    assert_eq!(versions(), before, "neither changed anything");

    let other = vip(lab, "install --wait=false --namespace elsewhere").unwrap();
    assert!(
        other.stderr.contains("Error: kubectl-vip is installed in namespace kubectl-vip already\nhint: go on there: --namespace kubectl-vip\nhint: kubectl vip explain VIP005"),
        "{other:#?}"
    );
    said(lab, "pool delete twice");
    said(lab, "pool delete more");
}

#[test]
fn an_install_over_another_keeps_what_no_flag_names_and_asks_before_it_changes_anything() {
    let (lab, _guard) = exclusive();
    said(lab, "uninstall --yes");
    let flags =
        "--image registry.example/vip-node:v0.1.0 --unicast --node-selector role=edge --advert-interval 1s";
    said(
        lab,
        &format!("install --wait=false -n elsewhere --pool kept=10.98.64.0/28 --interface eth7 {flags}"),
    );
    let agents = || {
        let path = "jsonpath={.metadata.generation} {.spec.template.spec.nodeSelector.role} \
                    {.spec.template.spec.containers[*].image} {.spec.template.spec.containers[1].env[*].value}";
        let get = ["get", "daemonset", "vip-node", "-n", "elsewhere", "-o", path];
        lab.kubectl(get).and_then(Output::ok).unwrap().stdout
    };
    let before = agents();
    assert!(before.contains("edge registry.example/vip-node:v0.1.0"), "{before}");
    // The plugin's own changes of a pool are no conflict, and not taken back.
    said(lab, "pool set kept --add 10.98.65.0/28 --exclude 10.98.64.3");
    said(lab, "install --wait=false --pool kept=10.98.64.0/28");
    assert_eq!(agents(), before);
    let pool = lab.kubectl(["get", "vippool", "kept", "-o", "json"]).and_then(Output::ok).unwrap().stdout;
    let pool: serde_json::Value = serde_json::from_str(&pool).unwrap();
    assert_eq!(pool["spec"]["addresses"], json!(["10.98.64.0/28", "10.98.65.0/28"]));
    assert_eq!(
        (&pool["spec"]["exclude"], &pool["spec"]["interface"]),
        (&json!(["10.98.64.3"]), &json!("eth7"))
    );

    let unasked = refused(lab, "install --unicast=false --pool kept=10.98.66.0/28 --pool more=10.98.67.1");
    for words in [
        "\nvippool.kubectl-vip.io/more is new\n",
        "\n-        - name: VIP_UNICAST\n",
        "\n+  - 10.98.66.0/28\n",
        "install changes 2 objects and restarts the agents one by one, and there is no terminal to ask at\nhint: say yes",
    ] {
        assert!(unasked.contains(words), "{words}: {unasked}");
    }
    assert_eq!(agents(), before, "nothing changed");
    said(lab, "install --wait=false --yes --unicast=false --pool kept=10.98.66.0/28");
    assert_eq!(lab.kubectl(["get", "vippool", "more"]).unwrap().code, 1);
    assert!(agents().starts_with("2 edge registry") && !agents().ends_with("true"), "{}", agents());
    said(lab, "pool delete kept");
    said(lab, "uninstall --yes");
}

#[test]
fn a_cluster_whose_kube_proxy_uses_ipvs_is_refused() {
    let (lab, _guard) = exclusive();
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
        "data": {"config.conf": "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ipvs\n"},
    });
    lab.kubectl(["delete", "virtualips,vippools", "--all"]).and_then(Output::ok).unwrap();
    said(lab, "pool create modes 10.98.80.8/29");
    lab.apply(&map.to_string()).unwrap();
    let output = vip(lab, "install --wait=false --pool more=10.98.81.0/30");
    let skipped = vip(lab, "install --dry-run=server --skip-checks VIP003").and_then(Output::ok);
    said(lab, "pool delete modes");
    lab.kubectl(["delete", "configmap", "kube-proxy", "-n", "kube-system"]).and_then(Output::ok).unwrap();
    let output = output.unwrap();
    assert_eq!((output.code, output.stdout.as_str()), (1, ""), "nothing was applied");
    assert!(
        output.stderr.ends_with(
            "Error: kube-proxy runs in IPVS mode (ConfigMap kube-proxy in namespace kube-system): it deletes IPVS services it does not \
             know; use its nftables mode, or excludeCIDRs: 10.98.80.8/29, 10.98.81.0/30\n\
             hint: kubectl edit configmap kube-proxy -n kube-system\n\
             hint: kubectl vip explain VIP003; to leave this check out: --skip-checks VIP003\n"
        ),
        "{output:#?}"
    );
    let skipped = skipped.unwrap();
    assert!(
        skipped.stdout.contains("daemonset.apps/vip-node serverside-applied (server dry run)\n"),
        "{skipped:#?}"
    );
}

#[test]
fn nobody_who_reads_and_a_full_disk_stop_nothing_half_way() {
    let (lab, _guard) = exclusive();
    said(lab, "uninstall --yes");
    let shell = |line: &str| {
        let kubectl = lab.kubectl_command().unwrap();
        let mut shell = Command::new("sh");
        let environment = kubectl.get_envs().filter_map(|(name, value)| Some((name, value?)));
        shell.envs(environment).env("KUBECTL", kubectl.get_program());
        command::run(shell.args(["-c", &line.replace("VIP", "\"$KUBECTL\" vip")]), LIMIT).unwrap()
    };
    let output = shell("{ VIP install --wait=false --pool unread=10.98.68.1; echo $? >&2; } | true");
    assert!(output.stderr.ends_with("\n0\n"), "{output:#?}");
    said(lab, "pool delete unread");
    // Neither does anybody read what is said.
    let output = shell("{ { VIP uninstall --yes 2>&1; echo $? >&3; } | true; } 3>&1");
    assert_eq!(output.stdout, "0\n", "{output:#?}");
    let left = lab.kubectl(["get", "crd", "virtualips.kubectl-vip.io", "--ignore-not-found"]);
    assert_eq!(left.and_then(Output::ok).unwrap().stdout, "");
    let full = shell("VIP install --wait=false > /dev/full");
    assert_eq!(full.code, 1, "{full:#?}");
    assert!(
        full.stderr.ends_with("Error: the output cannot be written: No space left on device\n"),
        "{full:#?}"
    );
    assert!(lab.kubectl(["get", "daemonset", "vip-node", "-n", "kubectl-vip"]).unwrap().success());
    assert_eq!(shell("VIP pool list -o json > /dev/full").code, 1);
}

#[test]
fn an_uninstall_names_the_nodes_that_it_could_not_clean_and_what_helps() {
    let (lab, _guard) = exclusive();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "stuck", "namespace": "kubectl-vip", "finalizers": ["example.org/dead"],
                     "labels": {"app.kubernetes.io/component": "vip-node"}},
        "spec": {"nodeName": "dead-1", "containers": [{"name": "agent", "image": "example/image"}]},
    });
    lab.apply(&pod.to_string()).unwrap();
    lab.kubectl(["delete", "pod", "stuck", "-n", "kubectl-vip", "--wait=false", "--force"])
        .and_then(Output::ok)
        .unwrap();
    report(lab, "dead-1", &node("10.98.69.201/24", 69, &ago(90), "Master"));
    report(lab, "dead-2", &node("10.98.69.202/24", 69, &ago(90), "Backup"));
    let output = vip(lab, "uninstall --yes --timeout 6s").unwrap();
    let finalizers = r#"{"metadata": {"finalizers": null}}"#;
    let patch = ["patch", "pod", "stuck", "-n", "kubectl-vip", "--type=merge", "-p", finalizers];
    lab.kubectl(patch).and_then(Output::ok).unwrap();
    assert_eq!(output.code, 1, "{output:#?}");
    for words in [
        "warning: dead-1: its agent did not confirm that the node is clean; a restart of the node cleans it\n",
        "warning: dead-2: its agent did not confirm",
        "Error: timed out after 6s waiting for the API server to forget them: namespace/kubectl-vip is still there\n\
         hint: if their nodes are lost: kubectl delete pod stuck -n kubectl-vip --force\n",
    ] {
        assert!(output.stderr.contains(words), "{words}: {output:#?}");
    }
    said(lab, "uninstall --yes");
}

#[test]
fn an_uninstall_that_was_cut_off_is_finished_where_it_was() {
    let (lab, _guard) = exclusive();
    said(lab, "uninstall --yes");
    said(lab, "install --wait=false --namespace faraway");
    assert_eq!(
        refused(lab, "uninstall --yes --namespace farawya"),
        "Error: kubectl-vip is in namespace faraway, not in farawya\nhint: --namespace faraway"
    );
    // It had come as far as the agents.
    lab.kubectl(["delete", "daemonset", "vip-node", "-n", "faraway"]).and_then(Output::ok).unwrap();
    let names = said(lab, "uninstall --yes -o name");
    assert!(names.lines().any(|line| line == "namespace/faraway"), "{names}");
    let left = lab.kubectl(["get", "namespace", "faraway", "--ignore-not-found"]);
    assert_eq!(left.and_then(Output::ok).unwrap().stdout, "");
}

#[test]
fn uninstall_takes_everything_and_can_be_repeated() {
    let (lab, _guard) = exclusive();
    namespace(lab, "leave", &[("web", 80, "TCP")]);
    said(lab, "install --wait=false --pool leave=10.98.63.0/28");
    said(lab, "expose svc/web -n leave --pool leave --wait=false");

    let unasked = refused(lab, "uninstall");
    assert!(unasked.contains("there is no terminal to ask at\nhint: say yes beforehand: --yes"), "{unasked}");
    let would = said(lab, "uninstall --dry-run");
    assert!(would.contains("virtualip.kubectl-vip.io/10.98.63.1 deleted (dry run)"), "{would}");
    said(lab, "status 10.98.63.1");

    let kept = said(lab, "uninstall --yes --keep-crds");
    assert!(!kept.contains("virtualip.") && kept.contains("daemonset.apps/vip-node deleted"), "{kept}");
    lab.kubectl(["get", "virtualip", "10.98.63.1"]).and_then(Output::ok).unwrap();
    let gone = said(lab, "uninstall --yes");
    assert!(
        gone.contains("customresourcedefinition.apiextensions.k8s.io/virtualips.kubectl-vip.io deleted"),
        "{gone}"
    );

    let again = vip(lab, "uninstall --yes").and_then(Output::ok).unwrap();
    assert_eq!(again.stdout, "");
    assert!(again.stderr.contains("Nothing of kubectl-vip found."), "{again:#?}");
    let all = ["get", "crd,ns,clusterrole,clusterrolebinding,validatingadmissionpolicy", "-o", "name"];
    let all = lab.kubectl(all).and_then(Output::ok).unwrap();
    let left: Vec<&str> = all.stdout.lines().filter(|line| line.contains("kubectl-vip")).collect();
    assert!(left.is_empty(), "{left:?}");
    for line in
        ["status -A", "pool list", "node list", "expose svc/web -n leave", "pool create x 10.98.63.0/28"]
    {
        let words = refused(lab, line);
        assert!(
            words.ends_with("Error: no vip-node found in any namespace\nhint: kubectl vip install"),
            "{line}: {words}"
        );
    }
}
