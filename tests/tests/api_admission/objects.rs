//! The rules of the custom resources, each with the words of its refusal.

use std::time::Duration;

use lab::{Output, command};
use serde_json::{Value, json};

use crate::{Who, judge, passed, refused, resource, server};

/// An object to be judged, and the words of its refusal.
type Case = (Value, &'static str);

fn all_refused(cases: &[Case]) {
    server().unwrap();
    let mut wrong = Vec::new();
    for (object, words) in cases {
        let Output { code, stderr, .. } = judge(&Who::Admin, object).unwrap();
        if code == 0 || !stderr.contains(words) {
            wrong.push(format!("{object}\n  wanted: {words}\n  exit code {code}: {}", stderr.trim_end()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A virtual IP whose name and address are both given.
fn named(name: &str, address: &str) -> Value {
    resource("VirtualIP", name, json!({ "address": address, "virtualRouter": 1 }))
}

/// A virtual IP with some fields changed; `null` leaves one out.
fn changed(fields: Value) -> Value {
    let mut object = named("10.99.1.1", "10.99.1.1");
    merge(&mut object["spec"], fields);
    object
}

fn pool(fields: Value) -> Value {
    // None that a pool of another test has.
    let range = json!({ "first": 238, "count": 1 });
    let mut object =
        resource("VIPPool", "lab-bad", json!({ "addresses": ["10.99.1.0/24"], "virtualRouters": range }));
    merge(&mut object["spec"], fields);
    object
}

fn merge(spec: &mut Value, fields: Value) {
    let Value::Object(fields) = fields else { panic!("no fields: {fields}") };
    for (key, value) in fields {
        spec[&key] = value;
    }
}

#[test]
fn addresses_are_canonical_and_unicast() {
    let form = "address must be one IP address in canonical form";
    let unicast = "address must be a unicast address of the LAN";
    all_refused(&[
        (named("foo", "foo"), form),
        (named("foo", ""), form),
        (named("10.99.1", "10.99.1"), form),
        (named("10.099.1.1", "10.099.1.1"), form),
        (named("10.99.1.0", "10.99.1.0/24"), form),
        (named("fd87-0-0-0-0-0-1-ab", "fd87::1:AB"), form),
        (named("fd87-0-0-0-0-0-1-1", "fd87:0:0:0:0:0:1:1"), form),
        (named("0-0-0-0-0-ffff-a63-101", "::ffff:10.99.1.1"), form),
        (named("fe80-0-0-0-0-0-0-1", "fe80::1%eth0"), form),
        (named("x", &"1".repeat(40)), "Too long: may not be more than 39 bytes"),
        (named("0.0.0.0", "0.0.0.0"), unicast),
        (named("0.1.2.3", "0.1.2.3"), unicast),
        (named("127.0.0.1", "127.0.0.1"), unicast),
        (named("169.254.1.1", "169.254.1.1"), unicast),
        (named("224.0.0.18", "224.0.0.18"), unicast),
        (named("240.0.0.1", "240.0.0.1"), unicast),
        (named("255.255.255.255", "255.255.255.255"), unicast),
        (named("0-0-0-0-0-0-0-1", "::1"), unicast),
        (named("fe80-0-0-0-0-0-0-1", "fe80::1"), unicast),
        (named("ff02-0-0-0-0-0-0-12", "ff02::12"), unicast),
    ]);
}

#[test]
fn the_name_is_the_address() {
    let words =
        "the name of a VirtualIP is its address; for IPv6 all eight groups, joined by '-' instead of ':'";
    all_refused(&[
        (named("web", "10.99.1.1"), words),
        (named("10.99.1.2", "10.99.1.1"), words),
        (named("fd87--1-1", "fd87::1:1"), words),
        (named("fd87-0-0-0-0-0-1-01", "fd87::1:1"), words),
        (named("fd87-0-0-0-0-0-1-2", "fd87::1:1"), words),
        (named("fd87-0-0-0-0-0-1-1-0", "fd87::1:1"), words),
    ]);
}

#[test]
fn numbers_and_lists_have_bounds() {
    let service = |namespace: &str, name: &str| json!({ "namespace": namespace, "name": name });
    let nine: Vec<Value> = (1..=9).map(|n| service("shop", &format!("web-{n}"))).collect();
    all_refused(&[
        (changed(json!({ "virtualRouter": 0 })), "should be greater than or equal to 1"),
        (changed(json!({ "virtualRouter": 256 })), "should be less than or equal to 255"),
        (changed(json!({ "virtualRouter": null })), "spec.virtualRouter: Required value"),
        (changed(json!({ "scheduler": "best" })), r#"supported values: "rr", "wrr", "lc", "wlc","#),
        (changed(json!({ "persistenceSeconds": 0 })), "should be greater than or equal to 1"),
        (changed(json!({ "persistenceSeconds": 86401 })), "should be less than or equal to 86400"),
        (changed(json!({ "healthCheck": { "type": "HTTP" } })), r#"supported values: "TCP", "None""#),
        (
            changed(json!({ "healthCheck": { "intervalSeconds": 301 } })),
            "should be less than or equal to 300",
        ),
        (changed(json!({ "healthCheck": { "timeoutSeconds": 0 } })), "should be greater than or equal to 1"),
        (changed(json!({ "healthCheck": { "failureThreshold": 11 } })), "should be less than or equal to 10"),
        (
            changed(json!({ "healthCheck": { "successThreshold": 0 } })),
            "should be greater than or equal to 1",
        ),
        (
            changed(json!({ "healthCheck": { "intervalSeconds": 2 } })),
            "timeoutSeconds (3 unless set) must not be longer than intervalSeconds",
        ),
        (changed(json!({ "services": nine })), "spec.services: Too many: 9: must have at most 8 items"),
        (
            changed(json!({ "services": [service("shop", "web"), service("shop", "web")] })),
            "spec.services[1]: Duplicate value",
        ),
        (changed(json!({ "services": [service("", "web")] })), "spec.services[0].namespace"),
        (changed(json!({ "services": [service("shop", "Web.1")] })), "spec.services[0].name: Invalid value"),
        (changed(json!({ "services": [{ "name": "web" }] })), "spec.services[0].namespace: Required value"),
        (changed(json!({ "adress": "10.99.1.1" })), r#"unknown field "spec.adress""#),
    ]);
}

#[test]
fn ranges_of_pools_are_valid() {
    let form = "must be an address, a CIDR or a range first-last";
    let order = "a range must be of one family and go upwards";
    let mut cases = Vec::new();
    for (entry, words) in [
        ("", form),
        ("abc", form),
        ("10.99.1", form),
        ("010.99.1.1", form),
        ("10.99.1.0/33", form),
        ("fd87::/129", form),
        ("10.99.1.1-", form),
        ("10.99.1.1 - 10.99.1.9", form),
        ("10.99.1.1-10.99.1.2-10.99.1.3", form),
        ("::ffff:10.99.1.1", form),
        ("10.99.1.9-10.99.1.8", order),
        ("100.99.1.1-20.99.1.1", order),
        ("10.99.1.1-fd87::1", order),
        ("fd87::1-10.99.1.1", order),
    ] {
        cases.push((pool(json!({ "addresses": ["10.99.1.1", entry] })), words));
        cases.push((pool(json!({ "exclude": [entry] })), words));
    }
    all_refused(&cases);
    // The refusal names the entry.
    refused(
        judge(&Who::Admin, &pool(json!({ "addresses": ["10.99.1.1", "10.99.1.0/33"] }))),
        r#"spec.addresses[1]: Invalid value: "10.99.1.0/33": must be an address, a CIDR or a range first-last"#,
    );
}

#[test]
fn pools_have_bounds() {
    let range = |first: u32, count: u32| json!({ "virtualRouters": { "first": first, "count": count } });
    all_refused(&[
        (pool(json!({ "addresses": [] })), "spec.addresses in body should have at least 1 items"),
        (pool(json!({ "addresses": vec!["10.99.1.1"; 33] })), "Too many: 33: must have at most 32 items"),
        (pool(json!({ "virtualRouters": null })), "spec.virtualRouters: Required value"),
        (pool(range(0, 1)), "spec.virtualRouters.first in body should be greater than or equal to 1"),
        (pool(range(1, 0)), "spec.virtualRouters.count in body should be greater than or equal to 1"),
        (pool(range(256, 1)), "spec.virtualRouters.first in body should be less than or equal to 255"),
        (pool(range(2, 255)), "virtual router identifiers end at 255: first + count must be at most 256"),
        (pool(json!({ "interface": "eth0/1" })), "spec.interface: Invalid value"),
        (pool(json!({ "interface": "a-name-of-16-let" })), "spec.interface: Too long"),
        (pool(json!({ "namespaces": ["Shop"] })), "spec.namespaces[0]: Invalid value"),
        (pool(json!({ "nodeSelector": { "a b": "c" } })), "each key must be the key of a label"),
        (pool(json!({ "nodeSelector": { "zone": "c/d" } })), "spec.nodeSelector.zone: Invalid value"),
    ]);
}

#[test]
fn good_objects_pass() {
    server().unwrap();
    let all = json!({
        "addresses": [
            "10.99.1.1", "10.99.1.0/24", "10.99.1.9-10.99.1.10", "9.255.255.255-10.0.0.0", "10.99.1.1-10.99.1.1",
            "fd87::1", "FD87::/64", "fd87::1-fd87::ffff",
        ],
        "exclude": ["10.99.1.1-10.99.1.5"],
        "autoAssign": false,
        "namespaces": ["shop", "team-2"],
        "virtualRouters": { "first": 240, "count": 16 },
        "nodeSelector": { "example.com/lan": "", "zone": "A-1.b_c" },
        "interface": "eth0.5",
    });
    let every_scheduler =
        ["rr", "wrr", "lc", "wlc", "fo", "ovf", "lblc", "lblcr", "dh", "sh", "mh", "sed", "nq", "twos"];
    let schedulers = every_scheduler.map(|name| changed(json!({ "scheduler": name })));
    let others = [
        named("10.99.1.1", "10.99.1.1"),
        named("fd87-0-0-0-0-0-1-ab", "fd87::1:ab"),
        named("2001-db8-1-2-3-4-5-6", "2001:db8:1:2:3:4:5:6"),
        changed(json!({ "virtualRouter": 255, "persistenceSeconds": 86400 })),
        changed(json!({ "healthCheck": { "type": "None" } })),
        changed(
            json!({ "healthCheck": { "intervalSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 10 } }),
        ),
        pool(all),
    ];
    for object in others.iter().chain(&schedulers) {
        passed(judge(&Who::Admin, object));
    }
}

#[test]
fn what_is_left_out_has_a_default() {
    server().unwrap();
    let spec = |object: &Value| -> Value {
        let stored: Value = serde_json::from_str(&passed(judge(&Who::Admin, object)).stdout).unwrap();
        stored["spec"].clone()
    };
    assert_eq!(spec(&changed(json!({})))["scheduler"], "wlc");
    assert_eq!(
        spec(&changed(json!({ "healthCheck": {} })))["healthCheck"],
        json!({ "type": "TCP", "intervalSeconds": 5, "timeoutSeconds": 3, "failureThreshold": 2, "successThreshold": 1 })
    );
    assert_eq!(spec(&pool(json!({})))["autoAssign"], true);
}

#[test]
fn the_address_cannot_change() {
    server().unwrap();
    passed(Who::Admin.kubectl(&["delete", "vip", "10.99.11.1", "--ignore-not-found"]));
    passed(Who::Admin.send("create", &named("10.99.11.1", "10.99.11.1")));
    refused(
        Who::Admin.patch("vip/10.99.11.1", &json!({ "spec": { "address": "10.99.11.2" } })),
        "address cannot change: delete the VirtualIP and create another",
    );
    passed(Who::Admin.patch("vip/10.99.11.1", &json!({ "spec": { "scheduler": "rr" } })));
    refused(Who::Admin.send("create", &named("10.99.11.1", "10.99.11.1")), "already exists");
    passed(Who::Admin.kubectl(&["delete", "vip", "10.99.11.1"]));
}

#[test]
fn pools_do_not_share_virtual_routers() {
    server().unwrap();
    let clear = || {
        passed(Who::Admin.kubectl(&["delete", "vippool", "lab-low", "lab-high", "--ignore-not-found"]));
    };
    let pool = |name: &str, first: u8, count: u8| {
        let range = json!({ "first": first, "count": count });
        resource("VIPPool", name, json!({ "addresses": ["10.99.40.1"], "virtualRouters": range }))
    };
    clear();
    passed(Who::Admin.send("create", &pool("lab-low", 234, 2)));
    let words = "virtual routers 235-236 of pool \"lab-high\" overlap those of pool \"lab-low\" (234-235)";
    // The API server learns late that there are pools to compare with.
    command::until("pools to be compared", Duration::from_secs(90), || {
        let output = judge(&Who::Admin, &pool("lab-high", 235, 2))?;
        Ok(output.stderr.contains(words).then_some(()))
    })
    .unwrap();
    passed(Who::Admin.send("create", &pool("lab-high", 236, 1)));
    let grow =
        |first: u8, count: u8| json!({ "spec": { "virtualRouters": { "first": first, "count": count } } });
    refused(Who::Admin.patch("vippool/lab-high", &grow(235, 2)), words);
    passed(Who::Admin.patch("vippool/lab-high", &grow(236, 2)));
    passed(Who::Admin.patch("vippool/lab-high", &json!({ "spec": { "addresses": ["10.99.40.2"] } })));
    clear();
}
