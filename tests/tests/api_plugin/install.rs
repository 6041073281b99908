//! Installing twice, installing next to `kubectl apply -k`, and uninstalling.

use std::fs;

use lab::{Output, command, paths};
use serde_json::json;

use super::{LIMIT, exclusive, installed, namespace, refused, said, vip};

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
fn a_cluster_whose_kube_proxy_uses_ipvs_is_refused() {
    let (lab, _guard) = exclusive();
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
        "data": {"config.conf": "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ipvs\n"},
    });
    lab.kubectl(["delete", "virtualips,vippools", "--all"]).and_then(Output::ok).unwrap();
    said(lab, "pool create modes 10.98.80.8/29");
    lab.apply(&map.to_string()).unwrap();
    let output = vip(lab, "install --wait=false");
    let skipped = vip(lab, "install --dry-run=server --skip-checks VIP003").and_then(Output::ok);
    said(lab, "pool delete modes");
    lab.kubectl(["delete", "configmap", "kube-proxy", "-n", "kube-system"]).and_then(Output::ok).unwrap();
    let output = output.unwrap();
    assert_eq!((output.code, output.stdout.as_str()), (1, ""), "nothing was applied");
    assert!(
        output.stderr.ends_with(
            "Error: kube-proxy runs in IPVS mode (ConfigMap kube-proxy in namespace kube-system): it deletes IPVS services it does not \
             know; use its nftables mode, or excludeCIDRs: 10.98.80.8/29\n\
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
        assert_eq!(
            refused(lab, line),
            "Error: no vip-node found in any namespace\nhint: kubectl vip install",
            "{line}"
        );
    }
}
