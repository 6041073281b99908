//! Mistakes and what is said about them, word by word.

use lab::Output;
use serde_json::json;

use super::{exclusive, installed, namespace, pool, refused, said};

#[test]
fn services() {
    let (lab, _guard) = installed();
    namespace(lab, "mistakes", &[("web", 80, "TCP")]);
    pool(lab, "mistakes", "10.98.4.1-10.98.4.4");
    for spec in [
        json!({"metadata": {"name": "named"}, "spec": {"type": "ExternalName", "externalName": "a.example"}}),
        json!({"metadata": {"name": "lost"}, "spec": {"ports": [{"port": 80}]}}),
    ] {
        let mut service = spec;
        service["apiVersion"] = json!("v1");
        service["kind"] = json!("Service");
        service["metadata"]["namespace"] = json!("mistakes");
        lab.apply(&service.to_string()).unwrap();
    }
    let context = lab.kubectl(["config", "current-context"]).unwrap().text().to_owned();
    let expose = |rest: &str| refused(lab, &format!("expose {rest} -n mistakes"));
    assert_eq!(
        expose("svc/wbe"),
        format!(
            "Error: services \"wbe\" not found (namespace mistakes, context {context}); did you mean \"web\"?"
        )
    );
    assert_eq!(
        expose("svc/named"),
        "Error: service mistakes/named has neither selector nor EndpointSlices: a VIP would lead nowhere; ExternalName is not supported"
    );
    assert_eq!(
        expose("svc/lost"),
        "Error: service mistakes/lost has neither selector nor EndpointSlices: a VIP would lead nowhere\n\
         hint: kubectl describe service lost -n mistakes"
    );
    assert_eq!(
        expose("deploy/web"),
        "Error: there are no virtual IPs for a \"deploy\"\nhint: name the Service: svc/web"
    );
    assert_eq!(
        expose("svc/web --pool mistaeks"),
        "Error: pool \"mistaeks\" not found; did you mean \"mistakes\"?\nhint: kubectl vip pool list"
    );
    assert_eq!(
        expose("web"),
        "Error: \"web\" names neither a Service (svc/NAME) nor a virtual IP\nhint: if it is a Service: svc/web"
    );
    assert_eq!(
        refused(lab, "expose svc/web -n mistaeks"),
        format!(
            "Error: services \"web\" not found (namespace mistaeks, context {context}): there is no such namespace; \
             did you mean \"mistakes\"?"
        )
    );
    assert_eq!(
        refused(lab, "status svc/web -n mistakes"),
        "Error: service mistakes/web has no virtual IP\nhint: kubectl vip expose svc/web -n mistakes"
    );
    assert_eq!(
        refused(lab, "status svc/wbe -n mistakes"),
        format!(
            "Error: services \"wbe\" not found (namespace mistakes, context {context}); did you mean \"web\"?"
        )
    );
    said(lab, "expose svc/web -n mistakes --ip 10.98.4.2 --wait=false");
    for line in ["status 10.98.4.22", "unexpose 10.98.4.22"] {
        assert_eq!(
            refused(lab, line),
            "Error: virtual IP 10.98.4.22 not found; did you mean \"10.98.4.2\"?\nhint: kubectl vip status -A"
        );
    }
    assert_eq!(
        refused(lab, "expose svc/web -n mistakes --ip 10.98.4.3"),
        "Error: service mistakes/web is already exposed at 10.98.4.2\nhint: kubectl vip unexpose svc/web -n mistakes"
    );
    assert_eq!(
        refused(lab, "pool delete mistakes"),
        "Error: pool \"mistakes\" is in use: 1 of its addresses are virtual IPs: 10.98.4.2 (mistakes/web)\n\
         hint: take them away first: kubectl vip unexpose VIP"
    );
    said(lab, "unexpose svc/web -n mistakes");
    assert_eq!(said(lab, "pool delete mistakes"), "vippool.kubectl-vip.io/mistakes deleted\n");
}

#[test]
fn help_is_there_however_it_is_asked_for() {
    let (lab, _guard) = installed();
    let all = said(lab, "--help");
    assert!(all.contains("--kubeconfig <FILE>"), "{all}");
    let short = said(lab, "");
    assert!(short.contains("Install Commands:\n") && said(lab, "help") == all, "{short}");
    assert_eq!(said(lab, "help pool set"), said(lab, "pool set --help"));
    assert!(said(lab, "pool").contains("Usage: kubectl vip pool"));
    let unknown = refused(lab, "help stauts");
    assert!(unknown.starts_with("Error: unrecognized subcommand 'stauts'"), "{unknown}");
    assert_eq!(refused(lab, "status svc/a svc/b"), "Error: name one Service (svc/NAME) or one virtual IP");
}

#[test]
fn an_address_outside_every_pool() {
    // The sentence names all pools.
    let (lab, _alone) = exclusive();
    for kind in ["virtualips", "vippools"] {
        lab.kubectl(["delete", kind, "--all"]).and_then(Output::ok).unwrap();
    }
    namespace(lab, "outside", &[("web", 80, "TCP"), ("api", 80, "TCP")]);
    said(lab, "pool create outside 10.98.30.8-10.98.30.9,10.98.31.0/28");
    said(lab, "expose svc/web -n outside --ip 10.98.30.8 --wait=false");
    assert_eq!(
        refused(lab, "expose svc/api -n outside --ip 10.0.0.9"),
        "Error: 10.0.0.9 is in no pool (outside: 10.98.30.8-10.98.30.9,10.98.31.0/28); next free: 10.98.30.9"
    );
    said(lab, "unexpose svc/web -n outside");
    said(lab, "pool delete outside");
}

#[test]
fn pools() {
    let (lab, _guard) = installed();
    pool(lab, "near", "10.98.5.0/28");
    let create = |rest: &str| refused(lab, &format!("pool create far {rest}"));
    assert_eq!(create("192.168.10.240/33"), "Error: \"192.168.10.240/33\": an IPv4 prefix is 0 to 32");
    assert_eq!(
        create("10.98.5.9-10.98.5.1"),
        "Error: \"10.98.5.9-10.98.5.1\": a range goes upwards: 10.98.5.1-10.98.5.9"
    );
    assert_eq!(
        create("10.98.5.14-10.98.5.20"),
        "Error: pool \"far\" overlaps pool \"near\" (10.98.5.0/28) at 10.98.5.14\n\
         hint: each address belongs to one pool: kubectl vip pool list"
    );
    assert_eq!(
        create("10.96.0.9"),
        "Error: pool \"far\" holds 10.96.0.9 of the cluster's network of Services (10.96.0.0/16)\n\
         hint: a pool has addresses of the LAN that nobody else gives out"
    );
    assert_eq!(
        create("fd96::9"),
        "Error: pool \"far\" holds fd96::9 of the cluster's network of Services (fd96::/112)\n\
         hint: a pool has addresses of the LAN that nobody else gives out"
    );
    assert_eq!(create("fd98::/129"), "Error: \"fd98::/129\": an IPv6 prefix is 0 to 128");
    assert_eq!(
        create("fe80::1"),
        "Error: pool \"far\": fe80::1 is a link-local address, not a unicast address of the LAN"
    );
    // Which are free depends on the pools of other tests.
    let taken = create("10.98.5.32/28 --virtual-routers 5");
    let (taken, free) = taken.rsplit_once(' ').unwrap();
    assert_eq!(
        taken,
        "Error: virtual router 5 of pool \"far\" belongs to pool \"near\" (5)\nhint: free ones: --virtual-routers"
    );
    assert!(!free.is_empty());
    said(lab, &format!("pool create far 10.98.5.48/28 --virtual-routers {free} --dry-run=server"));
    pool(lab, "next", "10.98.6.1");
    let grown = refused(lab, "pool set near --virtual-routers 5-6");
    let words = "Error: virtual router 6 of pool \"near\" belongs to pool \"next\" (6)\n";
    assert!(grown.starts_with(words), "{grown}");
    assert_eq!(
        refused(lab, "pool create near 10.98.5.32/28"),
        "Error: pool \"near\" already exists\nhint: kubectl vip pool set near --add RANGE"
    );
    assert_eq!(
        said(lab, "pool set near --add 10.98.5.32 --exclude 10.98.5.1"),
        "vippool.kubectl-vip.io/near configured\n"
    );
    let list = said(lab, "pool list --no-headers");
    assert!(
        list.lines().any(|line| line.starts_with("near") && line.contains("10.98.5.0/28,10.98.5.32")),
        "{list}"
    );
}
