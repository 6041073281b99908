//! A virtual IP over IPv6: announced, served, and given away like one over IPv4.

use std::{collections::BTreeSet, net::Ipv6Addr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{Lab, command, product};

use super::{NAMESPACE, SOON, answered, check_alone, installed, web};

/// A drained node owns addresses again when this ends, however it ends: other tests need it.
struct Drained {
    lab: &'static Lab,
    node: String,
}

impl Drained {
    fn new(lab: &'static Lab, node: &str) -> Result<Self> {
        let this = Self { lab, node: node.to_owned() };
        lab.kubectl(["vip", "node", "drain", node])?.ok()?;
        Ok(this)
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        let undrained = self.lab.kubectl(["vip", "node", "undrain", &self.node]).and_then(lab::Output::ok);
        if let Err(error) = undrained {
            eprintln!("{} stays drained: {error:#}", self.node);
        }
    }
}

#[test]
fn an_ipv6_address_serves_all_pods_and_goes_on_when_its_owner_is_drained() {
    check_alone(|| {
        let lab = installed()?;
        let pods = web(lab)?.pods()?;
        let pod = pods.values().next().cloned().context("no pods")?;
        let pods: BTreeSet<String> = pods.into_keys().collect();
        web(lab)?.add_service_of("six", 80, "IPv6")?;
        lab.kubectl(["vip", "expose", "svc/six", "-n", NAMESPACE])?.ok()?;
        let vip: Ipv6Addr = product::address_of(lab, NAMESPACE, "six")?;
        product::wait_backends(lab, vip, 3, SOON)?;
        product::wait_destinations(lab, vip, 80, 3, SOON)?;
        let owner = product::wait_one_owner(lab, vip, SOON)?;

        let url = format!("http://[{vip}]/hostname");
        // Until all have answered: in step with the client that goes on asking, some may be missed for a while.
        let ask = |url: &str| -> Result<BTreeSet<String>> {
            let mut reached = BTreeSet::new();
            for _ in 0..100 {
                reached.insert(lab.client().get(url)?.body);
                if reached == pods {
                    break;
                }
            }
            Ok(reached)
        };
        let (tcp, udp) = (ask(&url)?, ask(&format!("udp://[{vip}]:81/hostname"))?);
        ensure!(tcp == pods && udp == pods, "of {pods:?}, TCP reached {tcp:?}, and UDP {udp:?}");
        for node in lab.nodes() {
            let mut reached = BTreeSet::new();
            command::until(&format!("all pods answer {}", node.name()), SOON, || {
                let asked = node
                    .exec(&format!("for i in 1 2 3 4 5 6; do curl -sS -m 5 '{url}'; echo; done"))?
                    .ok()?;
                reached.extend(asked.stdout.split_whitespace().map(str::to_owned));
                ensure!(reached == pods, "reached {reached:?} of {pods:?}");
                Ok(Some(()))
            })?;
        }
        ensure!(lab.client().tcp_refused((vip, 10250).into())?, "the kubelet answers at the virtual IP");

        let client = lab.client().limit(Duration::from_secs(1));
        let every = Duration::from_millis(50);
        let (watch, beside) = (client.watch(&url, every)?, client.watch(&pod.url(), every)?);
        watch.wait_answers(50, SOON)?;
        let drained = Drained::new(lab, &owner.node)?;
        let next = product::wait_one_owner(lab, vip, SOON)?;
        ensure!(next != owner, "{} still has {vip}", owner.node);
        product::wait_status_owner(lab, vip, &next.node, SOON)?;
        let reached = ask(&url)?;
        ensure!(reached == pods, "{} reaches {reached:?} of {pods:?}", next.node);
        let (report, beside) = (watch.stop(), beside.stop());
        answered(&report, &beside)?;
        println!("from {} to {}, longest gap {} ms", owner.node, next.node, report.longest_gap.as_millis());
        drop(drained);

        lab.kubectl(["vip", "unexpose", &vip.to_string()])?.ok()?;
        lab.kubectl(["delete", "service", "six", "-n", NAMESPACE, "--wait=false"])?.ok().map(drop)
    });
}
