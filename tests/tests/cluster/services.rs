//! Every kind of Service behind a virtual IP, one row each: asked by clients, and looked up in the kernels of all nodes.

#[path = "services/changes.rs"]
mod changes;
#[path = "services/local.rs"]
mod local;
#[path = "services/scene.rs"]
mod scene;

use std::net::IpAddr;

use anyhow::{Result, ensure};
use lab::{command, product};
use vip_core::api::name_of;

use super::{SOON, check, installed, traffic::ask_from_pod};
use scene::{KINDS, Scene, names};
pub(super) use scene::{LEAVING, READY};

/// Name, port, and how each pod in it stands.
type Slice = (&'static str, u16, &'static [(&'static str, &'static str)]);

/// A Service of one kind.
struct Row {
    name: &'static str,
    /// What its `spec` holds.
    spec: &'static str,
    /// More arguments of `expose`.
    flags: &'static [&'static str],
    /// EndpointSlices that nobody but their author looks after.
    slices: &'static [Slice],
    /// The same over IPv6 too.
    both: bool,
    check: fn(&Scene, IpAddr) -> Result<()>,
}

const ROWS: [Row; 16] = [
    Row {
        name: "named",
        spec: "selector: {tier: both}, ports: [{port: 80, targetPort: http}]",
        flags: &[],
        slices: &[],
        both: true,
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[("a", 8080), ("b", 9080)])?;
            scene.answer("http", (vip, 80), &["a", "b"])
        },
    },
    Row {
        name: "numbered",
        spec: "selector: {app: a}, ports: [{port: 80, targetPort: 8080}]",
        flags: &["--scheduler", "rr"],
        slices: &[],
        both: false,
        check: |scene, vip| {
            scene.table(vip, "TCP :80 rr", &[("a", 8080)])?;
            scene.answer("http", (vip, 80), &["a"])
        },
    },
    Row {
        // Debian's kernel has no `twos`.
        name: "unscheduled",
        spec: "selector: {app: a}, ports: [{port: 80, targetPort: http}]",
        flags: &["--scheduler", "twos", "--wait=false"],
        slices: &[],
        both: false,
        check: |scene, vip| {
            scene.programmed(vip, "False SchedulerUnavailable")?;
            scene.table(vip, "TCP :80 wlc", &[("a", 8080)])?;
            scene.answer("http", (vip, 80), &["a"])
        },
    },
    Row {
        name: "dns",
        spec: "selector: {tier: both}, ports: [{name: t, port: 53, targetPort: http},
               {name: u, port: 53, targetPort: udp, protocol: UDP}]",
        flags: &[],
        slices: &[],
        both: true,
        check: |scene, vip| {
            scene.table(vip, "TCP :53 wlc", &[("a", 8080), ("b", 9080)])?;
            scene.table(vip, "UDP :53 wlc", &[("a", 8081), ("b", 9081)])?;
            scene.answer("http", (vip, 53), &["a", "b"])?;
            scene.answer("udp", (vip, 53), &["a", "b"])
        },
    },
    Row {
        name: "sctp",
        spec: "selector: {tier: both}, ports: [{port: 80, targetPort: sctp, protocol: SCTP}]",
        flags: &[],
        slices: &[],
        both: false,
        check: |scene, vip| {
            scene.table(vip, "SCTP :80 wlc", &[("a", 8082), ("b", 9082)])?;
            // The LAN's client may have no SCTP: a pod asks.
            let asks = scene.pod("b", false)?.to_string();
            let reached = ask_from_pod(scene.lab, "node-2", &format!("{asks}:9080"), vip, "sctp", 80)?;
            ensure!(reached == names(&["a", "b"]), "{reached:?}");
            Ok(())
        },
    },
    Row {
        name: "affinity",
        spec: "selector: {tier: both}, sessionAffinity: ClientIP, ports: [{port: 80, targetPort: http}],
               sessionAffinityConfig: {clientIP: {timeoutSeconds: 600}}",
        flags: &[],
        slices: &[],
        both: true,
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc persistent 600", &[("a", 8080), ("b", 9080)])?;
            scene.one_answers((vip, 80))
        },
    },
    Row {
        name: "persistence",
        spec: "selector: {tier: both}, ports: [{port: 80, targetPort: http}]",
        flags: &["--persistence", "30m"],
        slices: &[],
        both: false,
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc persistent 1800", &[("a", 8080), ("b", 9080)])?;
            scene.one_answers((vip, 80))
        },
    },
    Row {
        name: "headless",
        spec: "clusterIP: None, selector: {tier: both}, ports: [{port: 80, targetPort: http}]",
        flags: &[],
        slices: &[],
        both: false,
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[("a", 8080), ("b", 9080)])?;
            scene.answer("http", (vip, 80), &["a", "b"])
        },
    },
    Row {
        name: "unready",
        spec: "publishNotReadyAddresses: true, selector: {app: never}, ports: [{port: 80, targetPort: http}]",
        flags: &[],
        slices: &[],
        both: false,
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[("never", 8080)])?;
            scene.answer("http", (vip, 80), &["never"])
        },
    },
    Row {
        name: "hosted",
        spec: "selector: {app: host}, ports: [{name: t, port: 80, targetPort: http},
               {name: u, port: 81, targetPort: udp, protocol: UDP}]",
        flags: &[],
        slices: &[],
        both: false,
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[("host", 18080)])?;
            for owner in ["node-1", "node-3"] {
                scene.lab.kubectl(["vip", "move", &vip.to_string(), "--to", owner])?.ok()?;
                product::wait_status_owner(scene.lab, vip, owner, SOON)?;
                if owner == "node-1" {
                    scene.answer("http", (vip, 80), &["node-3"])?;
                    scene.answer("udp", (vip, 81), &["node-3"])?;
                } else {
                    // What the node itself answers is not masqueraded.
                    scene.answer_to_client("http", (vip, 80), &["node-3"])?;
                    scene.answer_to_client("udp", (vip, 81), &["node-3"])?;
                }
            }
            Ok(())
        },
    },
    Row {
        name: "nobody",
        spec: "selector: {app: nobody}, ports: [{port: 80}]",
        flags: &["--wait=false"],
        slices: &[],
        both: false,
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[])?;
            scene.programmed(vip, "False NoEndpoints")?;
            product::wait_one_owner(scene.lab, vip, SOON)?;
            scene.refuses((vip, 80))
        },
    },
    Row {
        name: "local",
        spec: "type: LoadBalancer, externalTrafficPolicy: Local, selector: {tier: both}, ports: [{port: 80, targetPort: http}]",
        flags: &[],
        slices: &[],
        both: true,
        check: |scene, vip| {
            let owner = product::wait_one_owner(scene.lab, vip, SOON)?;
            let (own, port) = if owner.number == 1 { ("a", 8080) } else { ("b", 9080) };
            scene.table_of(owner.number, vip, "TCP :80 wlc", &[(own, port, 1)])?;
            scene.answer_to_client("http", (vip, 80), &[own])?;
            scene.programmed(vip, "True Programmed")
        },
    },
    Row {
        name: "ranges",
        spec: "type: LoadBalancer, loadBalancerSourceRanges: [10.99.0.0/16], selector: {app: a},
               ports: [{port: 80, targetPort: http}]",
        flags: &[],
        slices: &[],
        both: false,
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[("a", 8080)])?;
            scene.refuses((vip, 80))?;
            let range = r#"{"spec":{"loadBalancerSourceRanges":["10.99.0.0/16","10.87.0.1/32"]}}"#;
            scene.lab.kubectl(["patch", "service", "ranges", "-n", KINDS, "-p", range])?.ok()?;
            command::until("the client to be let in", SOON, || {
                Ok(scene.lab.client().get(&format!("http://{vip}/hostname")).ok().map(drop))
            })
        },
    },
    Row {
        name: "handmade",
        spec: "ports: [{name: http, port: 80}]",
        flags: &[],
        // One endpoint twice in a slice, and in another.
        slices: &[
            ("one", 8080, &[("a", READY)]),
            ("two", 8080, &[("a", READY), ("a", READY)]),
            ("three", 9080, &[("b", READY)]),
        ],
        both: false,
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[("a", 8080), ("b", 9080)])?;
            scene.answer("http", (vip, 80), &["a", "b"])
        },
    },
    Row {
        name: "ending",
        spec: "ports: [{name: http, port: 80}]",
        flags: &[],
        slices: &[("a", 8080, &[("a", READY)]), ("b", 9080, &[("b", READY)])],
        both: false,
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[("a", 8080), ("b", 9080)])?;
            scene.answer("http", (vip, 80), &["a", "b"])?;
            let mut open = scene.connection_to((vip, 80), "b")?;
            scene.slice("ending", "b", 9080, &[("b", LEAVING)])?;
            scene.weights(vip, "TCP :80 wlc", &[("a", 8080, 1), ("b", 9080, 0)])?;
            scene.answer("http", (vip, 80), &["a"])?;
            ensure!(open.get("hostname")?.body == "b", "the connection has moved");
            // Better one that ends than none.
            scene.slice("ending", "a", 8080, &[])?;
            scene.weights(vip, "TCP :80 wlc", &[("b", 9080, 1)])?;
            scene.answer("http", (vip, 80), &["b"])?;
            ensure!(open.get("hostname")?.body == "b", "the connection has moved");
            Ok(())
        },
    },
    Row {
        name: "checked",
        spec: "ports: [{name: http, port: 80}]",
        flags: &[],
        slices: &[("good", 8080, &[("a", READY)]), ("bad", 9, &[("a", READY)])],
        both: false,
        check: |scene, vip| {
            let often = r#"{"spec":{"healthCheck":{"intervalSeconds":1,"timeoutSeconds":1}}}"#;
            let name = name_of(vip);
            scene.lab.kubectl(["patch", "virtualip", &name, "--type=merge", "-p", often])?.ok()?;
            let owner = product::wait_one_owner(scene.lab, vip, SOON)?.number;
            for node in 1..=3 {
                // Only the owner checks.
                let bad = u32::from(node != owner);
                scene.table_of(node, vip, "TCP :80 wlc", &[("a", 8080, 1), ("a", 9, bad)])?;
            }
            scene.answer("http", (vip, 80), &["a"])?;
            scene.programmed(vip, "True Programmed")?;
            // All failing is as good as none.
            scene.slice("checked", "good", 8080, &[])?;
            scene.programmed(vip, "False BackendsFailing")?;
            scene.table_of(owner, vip, "TCP :80 wlc", &[("a", 9, 1)])
        },
    },
];

impl Row {
    /// Everything about the row, in one family or the other; once more where the owner has lost the address meanwhile.
    fn run(&self, scene: &Scene, six: bool) -> Result<()> {
        let name = if six { format!("{}6", self.name) } else { self.name.to_owned() };
        let vip = self.make(scene, &name, six)?;
        let mut outcome = (self.check)(scene, vip);
        if let Err(error) = &outcome
            && product::was_lost(scene.lab, vip)?
        {
            println!("{name} once more: {error:#}");
            scene.remove(&name)?;
            outcome = (self.check)(scene, self.make(scene, &name, six)?);
        }
        outcome.and_then(|()| scene.remove(&name))
    }

    fn make(&self, scene: &Scene, name: &str, six: bool) -> Result<IpAddr> {
        let family = if six { ", ipFamilies: [IPv6]" } else { "" };
        scene.service(name, &format!("{}{family}", self.spec))?;
        for (slice, port, pods) in self.slices {
            scene.slice(name, slice, *port, pods)?;
        }
        let vip = scene.expose(name, self.flags)?;
        ensure!(vip.is_ipv6() == six, "it got {vip}");
        Ok(vip)
    }
}

#[test]
fn every_kind_of_service_is_served() {
    check(|| {
        let scene = Scene::new(installed()?)?;
        let mut failures = Vec::new();
        let families = |row: &Row| if row.both { &[false, true][..] } else { &[false] };
        for (row, six) in ROWS.iter().flat_map(|row| families(row).iter().map(move |six| (row, *six))) {
            if let Err(error) = row.run(&scene, six) {
                failures.push(format!("{} over {}: {error:#}", row.name, if six { "IPv6" } else { "IPv4" }));
            }
        }
        ensure!(failures.is_empty(), "{} rows:\n{}", failures.len(), failures.join("\n"));
        Ok(())
    });
}
