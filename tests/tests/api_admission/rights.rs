//! Who may write what: the admission policies on top of the roles.

use lab::Lab;
use serde_json::{Value, json};

use crate::{Who, judge, node, passed, refused, server, vip};

/// A person who may edit Services in one namespace, and another namespace beside it.
struct Shop {
    bob: Who,
    own: String,
    other: String,
}

impl Shop {
    /// `test` makes names of its own; `addresses` are those whose virtual IPs an earlier run may have left.
    fn new(lab: &Lab, test: &str, addresses: &[&str]) -> Self {
        let bob = format!("bob-{test}");
        let (own, other) = (format!("shop-{test}"), format!("other-{test}"));
        clear(addresses);
        for namespace in [&own, &other] {
            let object =
                json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace } });
            lab.apply(&object.to_string()).unwrap();
        }
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": { "name": "edit", "namespace": own },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit" },
            "subjects": [{ "apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": bob }],
        });
        lab.apply(&binding.to_string()).unwrap();
        let shop = Self { bob: Who::user(&bob), own, other };
        // Roles are known to the API server a moment after they were written.
        let may = ["auth", "can-i", "update", "services", "-n", &shop.own];
        lab::command::until("bob's role", lab::command::LIMIT, || shop.bob.kubectl(&may)?.ok().map(Some))
            .unwrap();
        shop
    }

    fn own(&self, service: &str) -> String {
        format!("{}/{service}", self.own)
    }

    fn other(&self, service: &str) -> String {
        format!("{}/{service}", self.other)
    }

    fn remove(self, addresses: &[&str]) {
        clear(addresses);
        passed(Who::Admin.kubectl(&["delete", "namespace", &self.own, &self.other, "--wait=false"]));
    }
}

fn clear(addresses: &[&str]) {
    let delete = ["delete", "vip", "--ignore-not-found"];
    passed(Who::Admin.kubectl(&[&delete, addresses].concat()));
}

/// A patch to the Services of a virtual IP.
fn services(of: &[&str]) -> Value {
    let spec = &vip("10.99.0.1", of)["spec"];
    json!({ "spec": { "services": spec["services"] } })
}

#[test]
fn bob_binds_his_own_services_and_no_others() {
    let lab = server().unwrap();
    let addresses = ["10.99.20.1", "10.99.20.2", "10.99.20.3"];
    let shop = Shop::new(lab, "bind", &addresses);
    let (bob, web, other) = (&shop.bob, shop.own("web"), shop.other("web"));

    passed(bob.send("create", &vip("10.99.20.1", &[&web])));
    let cannot = |address: &str, what: &str| {
        format!(
            "user \"bob-bind\" cannot update services in \"other-bind\" (service web), so it cannot {what}"
        )
        .replace("ADDRESS", address)
    };
    let bind = |address: &str| cannot(address, "bind virtual IP ADDRESS to it");
    let take = |address: &str| cannot(address, "take virtual IP ADDRESS away from it");
    refused(bob.send("create", &vip("10.99.20.2", &[&other])), &bind("10.99.20.2"));
    refused(bob.send("create", &vip("10.99.20.2", &[&web, &other])), &bind("10.99.20.2"));
    refused(bob.send("create", &vip("10.99.20.2", &[&other])), "Error from server (Forbidden)");

    // His own may be changed, as long as each Service before and after is his.
    passed(bob.patch("vip/10.99.20.1", &json!({ "spec": { "scheduler": "rr" } })));
    passed(bob.patch("vip/10.99.20.1", &services(&[&web, &shop.own("api")])));
    refused(bob.patch("vip/10.99.20.1", &services(&[&web, &other])), &bind("10.99.20.1"));

    // Another's may not: neither changed, nor taken over, nor deleted.
    passed(Who::Admin.send("create", &vip("10.99.20.3", &[&other])));
    refused(bob.patch("vip/10.99.20.3", &json!({ "spec": { "scheduler": "rr" } })), &bind("10.99.20.3"));
    refused(bob.patch("vip/10.99.20.3", &services(&[&web])), &take("10.99.20.3"));
    refused(bob.kubectl(&["annotate", "vip/10.99.20.3", "a=b"]), &bind("10.99.20.3"));
    refused(bob.kubectl(&["delete", "vip/10.99.20.3"]), &take("10.99.20.3"));

    passed(bob.kubectl(&["delete", "vip/10.99.20.1"]));
    shop.remove(&addresses);
}

#[test]
fn a_bare_address_is_for_those_who_create_pools() {
    let lab = server().unwrap();
    let addresses = ["10.99.21.1", "10.99.21.2"];
    let shop = Shop::new(lab, "bare", &addresses);
    let (bob, web) = (&shop.bob, shop.own("web"));
    let words = |address: &str| {
        format!(
            "user \"bob-bare\" cannot create vippools, so it cannot create, change or delete a virtual IP without \
             Services, which opens all ports of a node (here {address})"
        )
    };

    refused(bob.send("create", &vip("10.99.21.1", &[])), &words("10.99.21.1"));
    passed(Who::Admin.send("create", &vip("10.99.21.1", &[])));
    refused(bob.patch("vip/10.99.21.1", &services(&[&web])), &words("10.99.21.1"));
    refused(bob.kubectl(&["delete", "vip/10.99.21.1"]), &words("10.99.21.1"));

    passed(bob.send("create", &vip("10.99.21.2", &[&web])));
    refused(bob.patch("vip/10.99.21.2", &services(&[])), &words("10.99.21.2"));
    shop.remove(&addresses);
}

/// Each question to the authorizer has a price, and the API server gives a policy a budget: 16 questions at once.
#[test]
fn eight_services_before_and_eight_others_after() {
    let lab = server().unwrap();
    let addresses = ["10.99.22.1"];
    let shop = Shop::new(lab, "many", &addresses);
    let eight = |name: fn(&Shop, &str) -> String, prefix: &str| -> Vec<String> {
        (1..=8).map(|number| name(&shop, &format!("{prefix}-{number}"))).collect()
    };
    let object =
        |services: &[String]| vip("10.99.22.1", &services.iter().map(String::as_str).collect::<Vec<_>>());
    let bob = &shop.bob;

    passed(bob.send("create", &object(&eight(Shop::own, "a"))));
    passed(bob.send("replace", &object(&eight(Shop::own, "b"))));
    let mut last_is_another = eight(Shop::own, "a");
    last_is_another[7] = shop.other("web");
    refused(
        bob.send("replace", &object(&last_is_another)),
        "in \"other-many\" (service web), so it cannot bind",
    );
    let mut last_was_another = eight(Shop::own, "b");
    last_was_another[7] = shop.other("web");
    passed(Who::Admin.send("replace", &object(&last_was_another)));
    refused(
        bob.send("replace", &object(&eight(Shop::own, "a"))),
        "in \"other-many\" (service web), so it cannot take virtual IP 10.99.22.1 away from it",
    );
    shop.remove(&addresses);
}

#[test]
fn agents_write_the_status_of_any_virtual_ip_and_nothing_else_of_it() {
    let lab = server().unwrap();
    clear(&["10.99.23.1", "10.99.23.2"]);
    let agent = Who::agent(lab, "lab-status").unwrap();
    passed(Who::Admin.send("create", &vip("10.99.23.1", &["shop/web"])));
    passed(Who::Admin.send("create", &vip("10.99.23.2", &[])));
    for object in ["vip/10.99.23.1", "vip/10.99.23.2"] {
        passed(
            agent.report(object, &json!({ "node": "lab-status", "backends": { "ready": 1, "total": 2 } })),
        );
        let forbidden = "cannot patch resource \"virtualips\"";
        refused(agent.patch(object, &json!({ "spec": { "scheduler": "rr" } })), forbidden);
        refused(agent.kubectl(&["delete", object]), "cannot delete resource \"virtualips\"");
    }
    refused(
        Who::user("bob-status").report("vip/10.99.23.1", &json!({ "node": "me" })),
        "\"virtualips/status\"",
    );
    clear(&["10.99.23.1", "10.99.23.2"]);
}

#[test]
fn an_agent_writes_its_own_node_and_no_other() {
    let lab = server().unwrap();
    passed(Who::Admin.kubectl(&["delete", "vipnode", "lab-one", "lab-two", "--ignore-not-found"]));
    let [one, two] = ["lab-one", "lab-two"].map(|name| Who::agent(lab, name).unwrap());
    let status = json!({ "agentVersion": "0.1.0", "dataplane": { "ready": true, "reason": "Ready" } });
    let words =
        "VIPNode lab-two is written by the agent on that node only; this is a pod on node \"lab-one\"";

    passed(one.send("create", &node("lab-one")));
    passed(one.report("vipnode/lab-one", &status));
    refused(one.send("create", &node("lab-two")), words);
    passed(two.send("create", &node("lab-two")));
    refused(one.report("vipnode/lab-two", &status), words);
    refused(one.kubectl(&["label", "vipnode/lab-two", "a=b"]), words);
    refused(one.kubectl(&["delete", "vipnode/lab-two"]), "cannot delete resource \"vipnodes\"");

    // The administrator cannot speak for a node, but may label it and remove it.
    let admin = "VIPNode lab-two is written by the agent on that node only; this is user \"admin\"";
    refused(Who::Admin.report("vipnode/lab-two", &status), admin);
    passed(Who::Admin.kubectl(&["label", "vipnode/lab-two", "a=b"]));
    passed(Who::Admin.kubectl(&["delete", "vipnode", "lab-one", "lab-two"]));
    for pod in ["lab-one", "lab-two"] {
        passed(Who::Admin.kubectl(&[
            "delete",
            "pod",
            pod,
            "-n",
            "kubectl-vip",
            "--ignore-not-found",
            "--force",
        ]));
    }
}

#[test]
fn a_token_without_a_node_is_no_agents() {
    server().unwrap();
    let name = "system:serviceaccount:kubectl-vip:vip-node";
    let unbound = Who::Named(["--as", name].map(str::to_owned).into());
    refused(
        judge(&unbound, &node("lab-none")),
        "VIPNode lab-none is written by the agent on that node only; this is user \"system:serviceaccount:kubectl-vip:vip-node\"",
    );
}

/// Foreground deletion puts a finalizer on an object, and only the garbage collector takes it off.
#[test]
fn the_garbage_collector_passes() {
    let lab = server().unwrap();
    let addresses = ["10.99.24.1", "10.99.24.2"];
    passed(Who::Admin.kubectl(&["delete", "vipnode", "lab-garbage", "--ignore-not-found"]));
    clear(&addresses);
    passed(Who::Admin.send("create", &vip("10.99.24.1", &[])));
    passed(Who::Admin.send("create", &vip("10.99.24.2", &["shop/web"])));
    let agent = Who::agent(lab, "lab-garbage").unwrap();
    passed(agent.send("create", &node("lab-garbage")));
    for object in ["vip/10.99.24.1", "vip/10.99.24.2", "vipnode/lab-garbage"] {
        let collector = Who::garbage_collector();
        passed(collector.patch(object, &json!({ "metadata": { "finalizers": ["kubectl-vip.io/test"] } })));
        passed(collector.patch(object, &json!({ "metadata": { "finalizers": null } })));
        passed(collector.kubectl(&["delete", object]));
    }
}
