//! Who owns what, changed on purpose: `move`, `node drain`, `rebalance`; and virtual routers that others have.

use std::{process::Stdio, thread};

use lab::{Lab, Output, command};
use serde_json::json;

use super::{
    agents::{ago, backups, field, gone, node, owner, report, until_field},
    exclusive, installed, namespace, pool, refused, said, vip,
};

const PREFERRED: &str = ".spec.preferredNode";
const DRAIN: &str = ".metadata.labels.kubectl-vip\\.io/drain";

/// Runs a line, does in its midst what an agent would do, and gives what was said.
fn meanwhile(lab: &Lab, line: &str, agents: impl FnOnce()) -> Output {
    thread::scope(|scope| {
        let running = scope.spawn(|| vip(lab, line));
        agents();
        running.join().unwrap().and_then(Output::ok).unwrap()
    })
}

#[test]
fn a_virtual_ip_moves_with_all_of_its_virtual_router() {
    let (lab, _guard) = installed();
    namespace(lab, "move", &[("web", 80, "TCP"), ("api", 80, "TCP")]);
    pool(lab, "move", "10.98.9.1-10.98.9.4");
    gone(lab, &["move-1", "move-2", "move-3"]);
    let addresses = ["10.98.9.201/24", "10.98.9.202/24", "172.16.9.203/24"];
    backups(lab, "move", &addresses, 9);
    for (service, address) in [("web", "10.98.9.1"), ("api", "10.98.9.2")] {
        said(lab, &format!("expose svc/{service} -n move --pool move --wait=false"));
        owner(lab, address, "move-1");
    }

    assert_eq!(
        refused(lab, "move 10.98.9.3 --to move-2"),
        "Error: virtual IP 10.98.9.3 not found; did you mean \"10.98.9.1\"?\nhint: kubectl vip status -A"
    );
    assert_eq!(
        refused(lab, "move 10.98.9.1 --to mvoe-2"),
        "Error: node \"mvoe-2\" has no agent; did you mean \"move-2\"?\nhint: kubectl vip node list"
    );
    assert_eq!(
        refused(lab, "move svc/web -n move --to move-3"),
        "Error: node move-3 has no interface in the subnet of 10.98.9.1\nhint: kubectl vip node list -o wide"
    );
    for (how, suffix) in [("client", " (dry run)"), ("server", " (server dry run)")] {
        assert_eq!(
            said(lab, &format!("move 10.98.9.1 --to move-2 --dry-run={how}")),
            format!(
                "virtualip/10.98.9.1 pinned to move-2{suffix}\nvirtualip/10.98.9.2 pinned to move-2{suffix}\n"
            )
        );
        assert_eq!(field(lab, "virtualip/10.98.9.1", PREFERRED), "");
    }

    backups(lab, "move", &addresses, 9);
    let moved = meanwhile(lab, "move svc/web -n move --to move-2 --timeout 60s", || {
        for address in ["10.98.9.1", "10.98.9.2"] {
            until_field(lab, &format!("virtualip/{address}"), PREFERRED, "move-2");
            owner(lab, address, "move-2");
        }
    });
    assert_eq!(
        moved.stdout,
        "virtualip/10.98.9.1 pinned to move-2\nvirtualip/10.98.9.2 pinned to move-2\n\
         virtualip/10.98.9.1 moved from move-1 to move-2\nvirtualip/10.98.9.2 moved from move-1 to move-2\n"
    );
    for words in [
        "virtual router 9 of 10.98.9.1 moves as one, with 10.98.9.2 (move/api)\n",
        "waiting for 10.98.9.1, 10.98.9.2 to move to move-2: 10.98.9.1 is still on move-1",
    ] {
        assert!(moved.stderr.contains(words), "{words}: {moved:#?}");
    }

    backups(lab, "move", &addresses, 9);
    let late = vip(lab, "move 10.98.9.1 --to move-1 --timeout 1s").unwrap();
    assert_eq!(late.code, 1, "{late:#?}");
    assert!(
        late.stderr.ends_with(
            "Error: timed out after 1s waiting for the move to move-1: 10.98.9.1 is still on move-2, 10.98.9.2 is still on move-2\n\
             hint: it stays pinned; to end that: kubectl vip move 10.98.9.1 --unpin\n"
        ),
        "{late:#?}"
    );
    let unpinned = "virtualip/10.98.9.1 unpinned (was move-1)\nvirtualip/10.98.9.2 unpinned (was move-1)\n";
    assert_eq!(said(lab, "move 10.98.9.1 --unpin"), unpinned);
    assert_eq!(field(lab, "virtualip/10.98.9.2", PREFERRED), "");
    assert_eq!(said(lab, "move 10.98.9.1 --unpin").matches("unpinned (unchanged)").count(), 2);
    gone(lab, &["move-1", "move-2", "move-3"]);
}

#[test]
fn a_drained_node_gives_away_and_takes_nothing() {
    let (lab, _guard) = installed();
    namespace(lab, "drain", &[("web", 80, "TCP")]);
    pool(lab, "drain", "10.98.11.1-10.98.11.4");
    gone(lab, &["drain-1", "drain-2"]);
    let addresses = ["10.98.11.201/24", "10.98.11.202/24"];
    backups(lab, "drain", &addresses, 11);
    said(lab, "expose svc/web -n drain --pool drain --wait=false");
    owner(lab, "10.98.11.1", "drain-1");

    assert_eq!(
        refused(lab, "node drain drian-1"),
        "Error: node \"drian-1\" has no agent; did you mean \"drain-1\"?\nhint: kubectl vip node list"
    );
    let would = vip(lab, "node drain drain-1 --dry-run=server").and_then(Output::ok).unwrap();
    assert_eq!(would.stdout, "vipnode/drain-1 drained (server dry run)\n");
    assert!(would.stderr.ends_with("it would give away 10.98.11.1\n"), "{would:#?}");
    let drained = meanwhile(lab, "node drain drain-1 --timeout 60s", || {
        until_field(lab, "vipnode/drain-1", DRAIN, "true");
        owner(lab, "10.98.11.1", "drain-2");
    });
    assert_eq!(drained.stdout, "vipnode/drain-1 drained\n");
    assert!(drained.stderr.ends_with("drain-1 owns no virtual IP\n"), "{drained:#?}");
    assert_eq!(said(lab, "node drain drain-1"), "vipnode/drain-1 already drained\n");
    assert_eq!(said(lab, "node drain drain-1 -o name"), "vipnode.kubectl-vip.io/drain-1\n");
    let undrained = said(lab, "node undrain drain-1 --dry-run -o yaml");
    assert!(
        undrained.contains("kind: VIPNode\n") && !undrained.contains("kubectl-vip.io/drain"),
        "{undrained}"
    );

    backups(lab, "drain", &addresses, 11);
    let list = said(lab, "node list");
    let row = list.lines().find(|line| line.starts_with("drain-1")).unwrap();
    assert_eq!(row.split_whitespace().nth(1), Some("Ready,Drained"), "reports leave the label: {list}");
    assert_eq!(
        refused(lab, "move 10.98.11.1 --to drain-1"),
        "Error: node drain-1 is drained\nhint: kubectl vip node undrain drain-1"
    );
    let last = refused(lab, "node drain drain-2");
    assert!(
        last.ends_with(
            "Error: nothing changed: no other node can take 10.98.11.1: nobody would answer there until drain-2 is \
             undrained, and there is no terminal to ask at\nhint: say yes beforehand: --yes"
        ),
        "{last}"
    );
    let forced = vip(lab, "node drain drain-2 --yes --timeout 1s").unwrap();
    assert_eq!((forced.code, forced.stdout.as_str()), (1, "vipnode/drain-2 drained\n"), "{forced:#?}");
    assert!(
        forced.stderr.ends_with(
            "Error: timed out after 1s waiting for drain-2 to give its addresses away: it still owns 10.98.11.1 \
             (no other node can take it)\nhint: it stays drained; to end that: kubectl vip node undrain drain-2\n"
        ),
        "{forced:#?}"
    );
    assert_eq!(said(lab, "node undrain drain-2"), "vipnode/drain-2 undrained\n");

    // The manifests bring a role for those who look after nodes.
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "plugin-operators"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "kubectl-vip-operator"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "plugin-operators"}],
    });
    lab.apply(&binding.to_string()).unwrap();
    let undrain = "node undrain drain-1 --as carl --as-group plugin-operators";
    let done = command::until("the role", std::time::Duration::from_secs(20), || {
        let output = vip(lab, undrain)?;
        Ok(output.success().then_some(output))
    });
    assert_eq!(done.unwrap().stdout, "vipnode/drain-1 undrained\n");
    assert_eq!(said(lab, "node undrain drain-1"), "vipnode/drain-1 already undrained\n");
    gone(lab, &["drain-1", "drain-2"]);
}

#[test]
fn a_rebalance_moves_what_is_elsewhere_and_leaves_no_pin() {
    // It would move what other tests have.
    let (lab, _alone) = exclusive();
    namespace(lab, "even", &[("web", 80, "TCP"), ("api", 80, "TCP")]);
    lab.kubectl(["delete", "vippool", "even", "--ignore-not-found"]).and_then(Output::ok).unwrap();
    said(lab, "pool create even 10.98.12.1-10.98.12.4 --auto-assign=false --virtual-routers 12-13");
    let addresses = ["10.98.12.201/24", "10.98.12.202/24"];
    let [web, api] = ["10.98.12.1", "10.98.12.2"];
    for service in ["web", "api"] {
        said(lab, &format!("expose svc/{service} -n even --pool even --wait=false"));
    }
    backups(lab, "even", &addresses, 12);
    owner(lab, web, "even-1");
    let is_elsewhere = said(lab, "rebalance --dry-run").contains(web);
    let (from, to) = if is_elsewhere { ("even-1", "even-2") } else { ("even-2", "even-1") };
    owner(lab, web, from);
    // The other one is pinned where it is, rightly or not.
    said(lab, &format!("move {api} --to even-2 --wait=false"));
    owner(lab, api, "even-1");

    for (how, words) in
        [("client", "nothing moved (dry run)\n"), ("server", "nothing moved (server dry run)\n")]
    {
        backups(lab, "even", &addresses, 12);
        let would = vip(lab, &format!("rebalance --dry-run={how}")).and_then(Output::ok).unwrap();
        assert_eq!(would.stdout, format!("VIP          FROM     TO\n{web}   {from}   {to}\n"), "{would:#?}");
        assert!(would.stderr.contains(words) && would.stderr.contains(api), "{would:#?}");
        assert_eq!(field(lab, &format!("virtualip/{web}"), PREFERRED), "");
    }

    let late = vip(lab, "rebalance --timeout 1s").unwrap();
    assert_eq!(late.code, 1, "{late:#?}");
    let words = format!("hint: no pin is left; not moved: {web}; to go on: kubectl vip rebalance\n");
    assert!(late.stderr.ends_with(&words), "{late:#?}");
    assert_eq!(field(lab, &format!("virtualip/{web}"), PREFERRED), "");

    backups(lab, "even", &addresses, 12);
    let mut cut = lab.kubectl_command().unwrap();
    let cut = cut
        .args(["vip", "rebalance", "--timeout", "60s"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until_field(lab, &format!("virtualip/{web}"), PREFERRED, to);
    command::words(&["kill", "-INT", &cut.id().to_string()]).and_then(Output::ok).unwrap();
    let cut = cut.wait_with_output().unwrap();
    let words = format!("Error: interrupted\n{words}");
    assert!(String::from_utf8_lossy(&cut.stderr).ends_with(&words), "{cut:#?}");
    assert_eq!(
        (cut.status.code(), field(lab, &format!("virtualip/{web}"), PREFERRED)),
        (Some(1), String::new())
    );

    backups(lab, "even", &addresses, 12);
    let moved = meanwhile(lab, "rebalance --timeout 60s", || {
        until_field(lab, &format!("virtualip/{web}"), PREFERRED, to);
        owner(lab, web, to);
    });
    assert!(moved.stdout.ends_with(&format!("virtualip/{web} moved from {from} to {to}\n")), "{moved:#?}");
    assert_eq!(field(lab, &format!("virtualip/{web}"), PREFERRED), "", "it stays without a pin");
    assert_eq!(field(lab, &format!("virtualip/{api}"), PREFERRED), "even-2");
    backups(lab, "even", &addresses, 12);
    let balanced = vip(lab, "rebalance").and_then(Output::ok).unwrap();
    assert_eq!(balanced.stdout, "");
    assert!(balanced.stderr.contains("nothing to do"), "{balanced:#?}");
    gone(lab, &["even-1", "even-2"]);
}

#[test]
fn virtual_routers_that_others_have_are_left_to_them() {
    let (lab, _guard) = installed();
    namespace(lab, "strange", &[("web", 80, "TCP"), ("api", 80, "TCP")]);
    lab.kubectl(["delete", "vippool", "strange", "--ignore-not-found"]).and_then(Output::ok).unwrap();
    said(lab, "pool create strange 10.98.14.1-10.98.14.4 --auto-assign=false --virtual-routers 14-15");
    let hear = |routers: &[u8]| {
        let mut status = node("10.98.14.201/24", 16, &ago(0), "Backup");
        let foreign = routers.iter().map(|id| {
            json!({"address": "10.98.14.99", "interface": "eth0", "family": 4, "virtualRouter": id, "priority": 100})
        });
        status["foreignRouters"] = foreign.collect();
        report(lab, "strange-1", &status);
    };
    let expose = |service: &str| format!("expose svc/{service} -n strange --pool strange --wait=false");
    hear(&[14]);
    said(lab, &expose("web"));
    assert_eq!(field(lab, "virtualip/10.98.14.1", ".spec.virtualRouter"), "15");
    hear(&[14, 15]);
    assert_eq!(
        refused(lab, &expose("api")),
        "Error: all virtual routers of pool \"strange\" (14-15) belong to other routers of the LAN: \
         14 of 10.98.14.99, 15 of 10.98.14.99\n\
         hint: give it others: kubectl vip pool set strange --virtual-routers FIRST-LAST"
    );
    said(lab, "pool set strange --virtual-routers 14-16");
    hear(&[14, 15]);
    said(lab, &expose("api"));
    assert_eq!(field(lab, "virtualip/10.98.14.2", ".spec.virtualRouter"), "16");
    gone(lab, &["strange-1"]);
}
