//! IPv6 addresses and mixed pools: the address is of the family of its Service.

use serde_json::json;

use super::{
    agents::{backups, field, gone},
    installed, namespace, refused, said,
};

#[test]
fn an_ipv6_service_is_exposed_shown_moved_and_taken_off_again() {
    let (lab, _guard) = installed();
    namespace(lab, "families", &[]);
    for (name, policy, families) in [
        ("four", "SingleStack", json!(["IPv4"])),
        ("six", "SingleStack", json!(["IPv6"])),
        ("both", "RequireDualStack", json!(["IPv6", "IPv4"])),
    ] {
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "families"},
            "spec": {"selector": {"app": name}, "ports": [{"port": 80}], "ipFamilyPolicy": policy, "ipFamilies": families},
        });
        lab.apply(&service.to_string()).unwrap();
    }
    for (name, range, router) in
        [("families-6", "fd98::1:0/112", 40), ("families", "10.98.15.1-10.98.15.2,fd98::2:1", 41)]
    {
        lab.kubectl(["delete", "vippool", name, "--ignore-not-found"]).unwrap();
        said(lab, &format!("pool create {name} {range} --auto-assign=false --virtual-routers {router}"));
    }

    let six = "service/six exposed: fd98::1:0 (pool families-6, owner <pending>, <pending> backends)";
    let name = "fd98-0-0-0-0-0-1-0";
    assert_eq!(said(lab, "expose svc/six -n families --pool families-6 --wait=false"), format!("{six}\n"));
    assert_eq!(field(lab, &format!("virtualip/{name}"), ".spec.address"), "fd98::1:0");
    assert_eq!(said(lab, "expose svc/six -n families --ip fd98:0::1:0"), format!("{six} (unchanged)\n"));

    let dry =
        |service: &str| said(lab, &format!("expose svc/{service} -n families --pool families --dry-run"));
    assert_eq!(dry("four"), "service/four exposed: 10.98.15.1 (pool families) (dry run)\n");
    let six_first = "service/both exposed: fd98::2:1 (pool families) (dry run)\n";
    assert_eq!(
        dry("both"),
        format!("{six_first}service/both exposed: 10.98.15.1 (pool families) (dry run)\n")
    );
    let four_only = "service/both exposed: 10.98.15.2 (pool families, owner <pending>, <pending> backends)";
    assert_eq!(
        said(lab, "expose svc/both -n families --ip 10.98.15.2 --wait=false"),
        format!("{four_only}\n")
    );
    // What is missing is added.
    assert_eq!(
        said(lab, "expose svc/both -n families --pool families --wait=false"),
        format!(
            "{four_only} (unchanged)\n\
             service/both exposed: fd98::2:1 (pool families, owner <pending>, <pending> backends)\n"
        )
    );
    assert_eq!(
        refused(lab, "expose svc/both -n families --ip fd98::2:1,10.98.15.1"),
        "Error: service families/both is already exposed at 10.98.15.2, fd98::2:1\n\
         hint: kubectl vip unexpose svc/both -n families"
    );
    assert_eq!(
        said(lab, "unexpose svc/both -n families"),
        "service/both unexposed: 10.98.15.2 released\nservice/both unexposed: fd98::2:1 released\n"
    );
    assert_eq!(
        said(lab, "expose svc/both -n families --ip fd98::2:1,10.98.15.1 --dry-run").lines().count(),
        2
    );
    let hint = "hint: in a dual-stack cluster it can have both: kubectl patch service four -n families -p \
                '{\"spec\":{\"ipFamilyPolicy\":\"PreferDualStack\"}}'";
    assert_eq!(
        refused(lab, "expose svc/four -n families --pool families-6"),
        format!(
            "Error: service families/four is IPv4 only, and pool \"families-6\" has IPv6 addresses only (fd98::1:0/112)\n{hint}"
        )
    );
    assert_eq!(
        refused(lab, "expose svc/four -n families --ip fd98::1:5"),
        format!("Error: service families/four is IPv4 only, and fd98::1:5 is an IPv6 address\n{hint}")
    );

    let status = said(lab, "status fd98::1:0 --no-headers");
    let row: Vec<&str> =
        status.lines().find(|line| line.contains("six")).unwrap().split_whitespace().collect();
    assert_eq!(row[..5], ["families", "six", "fd98::1:0", "families-6", "<pending>"], "{status}");
    assert_eq!(said(lab, &format!("status {name} -o name")), format!("virtualip.kubectl-vip.io/{name}\n"));
    backups(lab, "families", &["fd98::201/64", "10.98.15.202/24"], 40);
    assert_eq!(
        refused(lab, "move fd98::1:0 --to families-2"),
        "Error: node families-2 has no interface in the subnet of fd98::1:0\nhint: kubectl vip node list -o wide"
    );
    assert_eq!(
        said(lab, "move fd98::1:0 --to families-1 --wait=false"),
        format!("virtualip/{name} pinned to families-1\n")
    );
    gone(lab, &["families-1", "families-2"]);
    assert_eq!(said(lab, "unexpose fd98::1:0"), format!("virtualip/{name} released (was families/six)\n"));
}
