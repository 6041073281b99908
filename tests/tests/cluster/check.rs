//! `check` on a real cluster: faults that are really there, in kernels, on the LAN and in the cluster, are found with their
//! codes and no others, and are gone from the report when they are mended.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use lab::{Agent, Lab, Node, command};
use serde_json::{Value, json};
use vip_core::vrrp::{
    Family,
    packet::{Advert, Checksum, group},
};

use super::{Exposed, NAMESPACE, SOON, check_alone, installed, product, web};

/// Agents report every ten seconds, what was heard is remembered for a while, and silence counts after half a minute.
const IN_TIME: Duration = Duration::from_secs(240);
/// The lab's side of the LAN: a machine that is none of ours.
const STRANGER: Ipv4Addr = Ipv4Addr::new(10, 87, 0, 1);
/// An address of the pool that the stranger has.
const TAKEN: Ipv4Addr = Ipv4Addr::new(10, 87, 2, 231);
/// A Service whose scheduler is in a module that nobody has loaded.
const RARE: &str = "check-rare";
const EXCLUDE: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// What `check` looks for in the role of the agents; they themselves miss it only when something happens.
const ROLE: &str = "kubectl-vip-agent";

/// Faults, and how to mend them. What is left of them is mended in any case: other tests need the lab.
struct Faults {
    lab: &'static Lab,
    /// A node that is owner, and two that are not.
    owner: Node<'static>,
    excluded: Node<'static>,
    stopped: Node<'static>,
    vrid: u8,
    /// The rules of the agents' role.
    rules: Value,
}

impl Faults {
    fn kubectl(&self, line: &str) -> Result<String> {
        Ok(self.lab.kubectl(line.split_whitespace())?.ok()?.stdout)
    }

    fn plant(&self) -> Result<()> {
        let pool = |name: &str, range: &str, first: u8| {
            let spec = json!({"addresses": [range], "virtualRouters": {"first": first, "count": 1}});
            json!({"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VIPPool", "metadata": {"name": name}, "spec": spec})
                .to_string()
        };
        let vip = json!({"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VirtualIP", "metadata": {"name": TAKEN},
                         "spec": {"address": TAKEN, "virtualRouter": self.vrid}});
        let proxy = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
                           "data": {"config.conf": "kind: KubeProxyConfiguration\nmode: ipvs\n"}});
        self.lab.netns().ip(&format!("address add {TAKEN}/32 dev br0"))?;
        let planted = [
            pool("check-overlap", "10.87.2.250-10.87.2.251", 240),
            pool("check-nowhere", "192.168.10.240/28", 241),
            pool("check-some", "10.99.7.240/28", 242),
            vip.to_string(),
            proxy.to_string(),
        ];
        self.lab.apply(&planted.join("\n---\n"))?;
        let without_events: Vec<&Value> = self
            .rules
            .as_array()
            .into_iter()
            .flatten()
            .filter(|rule| rule["resources"] != json!(["events"]))
            .collect();
        self.set_rules(&json!(without_events))?;
        self.kubectl(&format!("label node {} {EXCLUDE}=", self.excluded.name()))?;
        web(self.lab)?.add_service(RARE, 80)?;
        self.kubectl(&format!(
            "vip expose svc/{RARE} -n {NAMESPACE} --pool lab --scheduler lblc --wait=false"
        ))?;
        for node in [&self.owner, &self.excluded] {
            let address = format!("10.99.7.{}/24", node.number());
            node.exec(&format!(
                "ip link add planted type dummy && ip address add {address} dev planted && ip link set planted up"
            ))?
            .ok()?;
        }
        let wall = "add table inet planted; add chain inet planted input { type filter hook input priority 100; policy drop; }; \
                    add rule inet planted input accept";
        self.stopped.exec(&format!("nft '{wall}'"))?.ok().map(drop)
    }

    fn mend(&self) -> Result<()> {
        let _ = self.lab.netns().ip(&format!("address delete {TAKEN}/32 dev br0"));
        self.kubectl("delete vippool check-overlap check-nowhere check-some --ignore-not-found")?;
        self.kubectl(&format!("delete virtualip {TAKEN} --ignore-not-found"))?;
        self.kubectl("delete configmap kube-proxy -n kube-system --ignore-not-found")?;
        self.set_rules(&self.rules)?;
        self.kubectl(&format!("label node {} {EXCLUDE}-", self.excluded.name()))?;
        // The cure that the message names. The Service is taken away only when it has helped.
        self.lab.vm().exec("modprobe ip_vs_lblc")?.ok()?;
        for node in self.lab.nodes() {
            node.exec("ip link delete planted; nft delete table inet planted; nft delete table netdev planted; true")?;
        }
        Ok(())
    }

    fn set_rules(&self, rules: &Value) -> Result<()> {
        let patch = json!([{"op": "replace", "path": "/rules", "value": rules}]).to_string();
        self.lab.kubectl(["patch", "clusterrole", ROLE, "--type=json", "-p", &patch])?.ok().map(drop)
    }

    /// A router of others says once that it has our virtual router.
    fn speak_as_a_stranger(&self) -> Result<()> {
        let theirs = Ipv4Addr::new(10, 87, 9, 9).into();
        let advert = Advert { vrid: self.vrid, priority: 50, interval: 100, addresses: vec![theirs] };
        let bytes = advert.encode(STRANGER.into(), group(Family::V4), Checksum::PseudoHeader);
        self.lab.netns().injector("br0", 255)?.send(&bytes)
    }

    /// Waits until `check` finds what is wanted of it. Until then `meanwhile` is done again and again.
    fn wait(
        &self,
        what: &str,
        flags: &str,
        is_it: impl Fn(&BTreeSet<String>) -> bool,
        meanwhile: impl Fn() -> Result<()>,
    ) -> Result<()> {
        command::until(what, IN_TIME, || {
            // Each look takes some sixty requests of a busy machine.
            thread::sleep(Duration::from_secs(2));
            meanwhile()?;
            let words = format!("vip check -o json {flags}");
            let output = self.lab.kubectl(words.split_whitespace())?;
            let report: Value = serde_json::from_str(&output.stdout)?;
            let items = report["items"].as_array().cloned().unwrap_or_default();
            let lines: Vec<&Value> = items.iter().filter(|item| item["code"].is_string()).collect();
            let codes = lines.iter().filter_map(|item| item["code"].as_str()).map(str::to_owned).collect();
            ensure!(is_it(&codes), "it finds {lines:?}");
            Ok(Some(()))
        })
    }

    fn wait_healthy(&self) -> Result<()> {
        self.wait("check to find nothing", "--pre", BTreeSet::is_empty, || Ok(()))
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        if let Err(error) = self.mend() {
            eprintln!("faults are left in the lab: {error:#}");
        }
        for line in [
            format!("vip unexpose svc/{RARE} -n {NAMESPACE}"),
            format!("delete service {RARE} -n {NAMESPACE} --ignore-not-found --wait=false"),
        ] {
            let _ = self.kubectl(&line);
        }
    }
}

/// Its status tells how it came to its owner, and each backend with the connections that it has in the kernel.
fn told_in_depth(lab: &Lab, exposed: &Exposed) -> Result<()> {
    let at = SocketAddr::from((exposed.vip, 80));
    let held = lab.netns().run(|| TcpStream::connect_timeout(&at, SOON))??;
    command::until("a connection to be counted", IN_TIME, || {
        let line = format!("vip status svc/{} -n {NAMESPACE}", exposed.service);
        let told = lab.kubectl(line.split(' '))?.ok()?.stdout;
        let rows: Vec<Vec<&str>> = told
            .lines()
            .skip_while(|line| !line.starts_with("BACKEND"))
            .skip(1)
            .take_while(|line| !line.is_empty())
            .map(|line| line.split_whitespace().collect())
            .collect();
        let are_well = rows.iter().filter(|row| row[1] == "80/TCP").all(|row| {
            row[2] == "1" && row[4] == "Healthy" && row[5] == "Ready" && row[8].starts_with("node-")
        });
        let connections: u32 = rows.iter().filter_map(|row| row[3].parse::<u32>().ok()).sum();
        ensure!(
            told.contains("\nLast handover ") && rows.len() >= 3 && are_well && connections >= 1,
            "{told}"
        );
        Ok(Some(()))
    })?;
    drop(held);
    Ok(())
}

#[test]
fn check_finds_each_planted_fault_and_nothing_on_a_healthy_cluster() {
    check_alone(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "check")?;
        // Pinned: it stays where it is whatever the others say.
        let owner = exposed.owner.number;
        let pin = format!("vip move {} --to {}", exposed.vip, exposed.owner.node);
        lab.kubectl(pin.split(' '))?.ok()?;
        let others: Vec<u8> =
            lab.nodes().map(|node| node.number()).filter(|number| *number != owner).collect();
        let rules = lab.kubectl(["get", "clusterrole", ROLE, "-o", "jsonpath={.rules}"])?.ok()?.stdout;
        let faults = Faults {
            lab,
            owner: lab.node(owner),
            excluded: lab.node(others[0]),
            stopped: lab.node(others[1]),
            vrid: product::field(lab, exposed.vip, "{.spec.virtualRouter}")?.parse()?,
            rules: serde_json::from_str(&rules)?,
        };
        faults.wait_healthy()?;
        told_in_depth(lab, &exposed)?;

        faults.plant()?;
        let wanted = [
            ("VIP003", "kube-proxy in IPVS mode"),
            ("VIP006", "agents without a permission"),
            ("VIP109", "a label that excludes"),
            ("VIP112", "an interface outside the subnet"),
            ("VIP113", "a pool of another LAN"),
            ("VIP114", "a firewall that drops by default"),
            ("VIP205", "overlapping pools"),
            ("VIP207", "an address in use"),
            ("VIP308", "a missing module"),
            ("VIP402", "a router of others"),
        ];
        let wanted = wanted.map(|(code, _)| code.to_owned()).into();
        faults.wait(
            "all planted faults",
            "--pre",
            |codes| *codes == wanted,
            || faults.speak_as_a_stranger(),
        )?;
        // Who may not install is told so.
        let may_not = |codes: &BTreeSet<String>| codes.contains("VIP002");
        faults.wait("a missing permission", "--pre --as carol", may_not, || Ok(()))?;
        faults.mend()?;
        faults.wait_healthy()?;

        // What the owner says of itself does not leave its node any more: another takes over, too.
        let mute = "add table netdev planted; add chain netdev planted out { type filter hook egress device eth0 priority 0; }; \
                    add rule netdev planted out ip protocol 112 drop";
        faults.owner.exec(&format!("nft '{mute}'"))?.ok()?;
        let two = ["VIP203", "VIP401"].map(str::to_owned).into();
        faults.wait("a firewall that drops protocol 112", "", |codes| *codes == two, || Ok(()))?;
        faults.owner.exec("nft delete table netdev planted")?.ok()?;
        faults.wait_healthy()?;

        let agent = Agent::on(lab, faults.stopped.number()).process()?;
        lab.vm().exec(&format!("kill -STOP {agent}"))?.ok()?;
        let stale = faults.wait("a stale agent", "", |codes| codes.contains("VIP102"), || Ok(()));
        // The kubelet may have replaced it meanwhile.
        lab.vm().exec(&format!("kill -CONT {agent}"))?;
        stale?;
        product::wait_rollout(lab)?;
        faults.wait_healthy()?;
        drop(faults);
        exposed.remove(lab)
    });
}
