//! `import configmap`: what kube-keepalived-vip was given, and what becomes of it.

use lab::{Output, command};
use serde_json::json;

use super::{LIMIT, agents::field, installed, namespace, pool, refused, said, vip};

#[test]
fn addresses_of_kube_keepalived_vip_are_taken_over() {
    let (lab, _guard) = installed();
    namespace(lab, "old", &[("web", 80, "TCP"), ("dns", 53, "UDP"), ("ingress", 443, "TCP")]);
    for address in ["10.98.21.5", "10.98.22.1"] {
        lab.kubectl(["delete", "virtualip", address, "--ignore-not-found"]).and_then(Output::ok).unwrap();
    }
    lab.kubectl(["delete", "vippool", "import-2", "--ignore-not-found"]).and_then(Output::ok).unwrap();
    pool(lab, "import", "10.98.21.0/28");
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "vips", "namespace": "old"},
        "data": {
            "10.98.21.2": "old/web",
            "10.98.21.10": "old/dns:DR",
            "10.98.21.3": "old/ingress:PROXY",
            "10.98.21.5": "",
            "10.98.22.1": "old/web:NAT",
            "10.98.21.6": "old/gone",
            "10.98.21.7": "old/web:udp",
        },
    });
    lab.apply(&map.to_string()).unwrap();

    let first = vip(lab, "import configmap old/vips --dry-run=server").unwrap();
    assert_eq!(first.code, 1);
    assert_eq!(
        first.stdout,
        "virtualip.kubectl-vip.io/10.98.21.2 created (old/web) (server dry run)\n\
         virtualip.kubectl-vip.io/10.98.21.3 created (old/ingress) (server dry run)\n\
         virtualip.kubectl-vip.io/10.98.21.5 created (<none>) (server dry run)\n\
         virtualip.kubectl-vip.io/10.98.21.10 created (old/dns) (server dry run)\n"
    );
    for words in [
        "10.98.21.10: DR is not taken over: ",
        "10.98.21.3: PROXY is not taken over: ",
        "10.98.21.5: it has no Service: all ports of its owner are open there",
        "10.98.22.1: not imported: it is in no pool\n",
        "10.98.21.6: not imported: service old/gone does not exist\n",
        "10.98.21.7: not imported: \"udp\" is none of the methods NAT, DR and PROXY\n",
        "Error: 3 of 7 entries are not imported, see above\nhint: ",
    ] {
        assert!(first.stderr.contains(words), "{words}: {first:#?}");
    }
    let nothing = lab.kubectl(["get", "virtualip", "10.98.21.2"]).unwrap();
    assert!(!nothing.success(), "a dry run stores nothing");

    let done = vip(lab, "import configmap old/vips").unwrap();
    assert_eq!(done.stdout, first.stdout.replace(" (server dry run)", ""));
    assert_eq!(field(lab, "virtualip/10.98.21.10", ".spec.services[0].name"), "dns");
    assert_eq!(field(lab, "virtualip/10.98.21.2", ".spec.scheduler"), "wlc");
    assert_eq!(field(lab, "virtualip/10.98.21.2", ".spec.persistenceSeconds"), "1800");
    assert_eq!(field(lab, "virtualip/10.98.21.5", ".spec.services"), "");

    // The command that the hint names, and the rest mended.
    assert!(done.stderr.contains("kubectl vip pool create NAME 10.98.22.1\n"), "{done:#?}");
    pool(lab, "import-2", "10.98.22.1");
    let remove =
        r#"[{"op": "remove", "path": "/data/10.98.21.6"}, {"op": "remove", "path": "/data/10.98.21.7"}]"#;
    lab.kubectl(["patch", "configmap", "vips", "-n", "old", "--type=json", "-p", remove])
        .and_then(Output::ok)
        .unwrap();
    assert_eq!(
        said(lab, "import cm vips -n old"),
        "virtualip.kubectl-vip.io/10.98.21.2 unchanged (old/web)\n\
         virtualip.kubectl-vip.io/10.98.21.3 unchanged (old/ingress)\n\
         virtualip.kubectl-vip.io/10.98.21.5 unchanged (<none>)\n\
         virtualip.kubectl-vip.io/10.98.21.10 unchanged (old/dns)\n\
         virtualip.kubectl-vip.io/10.98.22.1 created (old/web)\n"
    );
    let list = said(lab, "import configmap old/vips --dry-run=client -o json");
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    assert_eq!((&list["kind"], list["items"].as_array().unwrap().len()), (&json!("List"), 5));

    for service in ["web", "dns", "ingress"] {
        said(lab, &format!("unexpose svc/{service} -n old"));
    }
    lab.kubectl(["delete", "virtualip", "10.98.21.5"]).and_then(Output::ok).unwrap();
}

#[test]
fn a_configmap_that_cannot_be_read() {
    let (lab, _guard) = installed();
    let context = lab.kubectl(["config", "current-context"]).unwrap().text().to_owned();
    assert_eq!(
        refused(lab, "import configmap default/nothing"),
        format!(
            "Error: configmaps \"nothing\" not found (namespace default, context {context})\n\
             hint: kube-keepalived-vip names it in its flag --services-configmap"
        )
    );
    assert_eq!(
        refused(lab, "import configmap a/b/c"),
        "Error: \"a/b/c\" is not the NAMESPACE/NAME of a ConfigMap"
    );
    let mut kubectl = lab.kubectl_command().unwrap();
    let bare = command::run(kubectl.args(["vip", "import", "configmap"]), LIMIT).unwrap();
    assert!(bare.code == 1 && bare.stderr.contains("<NS/NAME>"), "{bare:#?}");
}
