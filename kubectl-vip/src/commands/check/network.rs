//! The LAN: who hears whom, whose virtual routers are there, and network plugins that virtual IPs could confuse.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::ResourceExt;
use vip_core::api::{VIPNode, VirtualIP};

use super::facts::Facts;
use super::{Report, peers};
use crate::cluster::{family, silence};
use crate::codes::{Group, Problem, network as codes};

/// Network plugins by the name of their DaemonSet.
const PLUGINS: [(&str, &str); 9] = [
    ("antrea-agent", "Antrea"),
    ("calico-node", "Calico"),
    ("canal", "Canal"),
    ("cilium", "Cilium"),
    ("kindnet", "kindnet"),
    ("kube-flannel-ds", "flannel"),
    ("kube-ovn-cni", "Kube-OVN"),
    ("kube-router", "kube-router"),
    ("weave-net", "Weave Net"),
];

/// The lines of this group, except on addresses: those come from the virtual IPs.
pub fn judge(facts: &Facts, report: &mut Report) {
    let group = Group::Network;
    match &facts.reports {
        None => report.forbidden(group, "vipnodes: who hears whom is not checked"),
        Some(reports) if reports.is_empty() => {}
        Some(reports) => {
            report.peers = peers::matrix(reports, facts.now);
            let well = "all that speak are heard";
            let deaf = peers::deaf(&report.peers);
            report.verdict(group, well, deaf);
            let vips = facts.vips.as_deref().unwrap_or_default();
            let heard = reports.iter().filter(|node| silence(node, facts.now).is_none());
            report.verdict(
                group,
                "no router of others has a virtual router of ours",
                foreign_routers(heard.clone(), vips),
            );
            report.verdict(group, "the nodes of each LAN have one MTU", mtus(heard, vips));
        }
    }
    match &facts.sets {
        None => report.forbidden(group, "daemonsets: the network plugin is not known"),
        Some(sets) => {
            let names: BTreeSet<String> = sets.iter().map(ResourceExt::name_any).collect();
            let known: Vec<&str> =
                PLUGINS.iter().filter(|(set, _)| names.contains(*set)).map(|(_, name)| *name).collect();
            let well = match known.is_empty() {
                true => "the network plugin is none that this plugin knows".to_owned(),
                false => format!("the network plugin is {}", known.join(" and ")),
            };
            report.verdict(group, well, sets.iter().filter_map(autodetection));
        }
    }
}

/// Routers of others with the identifier of a virtual IP of ours, once each.
fn foreign_routers<'a>(reports: impl Iterator<Item = &'a VIPNode>, vips: &[VirtualIP]) -> Vec<Problem> {
    let mut ours: BTreeMap<(u8, u8), Vec<&str>> = BTreeMap::new();
    for vip in vips {
        let family = family(vip);
        ours.entry((family, vip.spec.virtual_router)).or_default().push(&vip.spec.address);
    }
    let mut told = BTreeSet::new();
    let mut problems = Vec::new();
    for node in reports {
        for router in node.status.iter().flat_map(|status| &status.foreign_routers) {
            let Some(addresses) = ours.get(&(router.family, router.virtual_router)) else { continue };
            if told.insert((router.family, router.virtual_router, &router.address)) {
                problems.push(Problem {
                    code: &codes::FOREIGN_ROUTER,
                    about: router.address.clone(),
                    message: format!(
                        "it speaks for virtual router {}, which {} has (heard by {} on {})",
                        router.virtual_router,
                        addresses.join(", "),
                        node.name_any(),
                        router.interface
                    ),
                    command: format!("kubectl describe vipnode {}", node.name_any()),
                });
            }
        }
    }
    problems
}

/// Subnets of virtual IPs in which interfaces differ in the size of their packets.
fn mtus<'a>(reports: impl Iterator<Item = &'a VIPNode>, vips: &[VirtualIP]) -> Vec<Problem> {
    let addresses: Vec<IpAddr> = vips.iter().filter_map(|vip| vip.spec.address.parse().ok()).collect();
    let mut lans: BTreeMap<IpNet, BTreeMap<u32, Vec<String>>> = BTreeMap::new();
    for node in reports {
        for interface in node.status.iter().flat_map(|status| &status.interfaces) {
            let Some(mtu) = interface.mtu else { continue };
            let networks: BTreeSet<IpNet> = interface
                .addresses
                .iter()
                .filter_map(|text| text.parse().ok())
                .filter(|network: &IpNet| addresses.iter().any(|address| network.contains(address)))
                .map(|network| network.trunc())
                .collect();
            for network in networks {
                let place = format!("{} ({})", node.name_any(), interface.name);
                lans.entry(network).or_default().entry(mtu).or_default().push(place);
            }
        }
    }
    let differing = lans.into_iter().filter(|(_, mtus)| mtus.len() > 1);
    differing
        .map(|(network, mtus)| {
            let each: Vec<String> =
                mtus.iter().map(|(mtu, places)| format!("{mtu} on {}", places.join(", "))).collect();
            Problem {
                code: &codes::MTU,
                about: network.to_string(),
                message: format!("its interfaces have different MTUs: {}", each.join("; ")),
                command: format!("kubectl vip explain {}", codes::MTU.id),
            }
        })
        .collect()
}

/// A Calico that takes the first address it finds.
fn autodetection(set: &DaemonSet) -> Option<Problem> {
    if set.name_any() != "calico-node" {
        return None;
    }
    let pods = set.spec.as_ref()?.template.spec.as_ref()?;
    let variables = || pods.containers.iter().flat_map(|container| container.env.iter().flatten());
    let value =
        |name: &str| variables().find(|variable| variable.name == name).and_then(|v| v.value.as_deref());
    // An address that is written down is not looked for.
    let is_fixed = value("IP").is_some_and(|address| address != "autodetect");
    let method = value("IP_AUTODETECTION_METHOD").unwrap_or("first-found");
    let namespace = set.namespace().unwrap_or_default();
    (!is_fixed && method == "first-found").then(|| Problem {
        code: &codes::AUTODETECTION,
        about: format!("{namespace}/calico-node"),
        message: "it takes the first address it finds for that of the node (IP_AUTODETECTION_METHOD is first-found)".to_owned(),
        command: format!(
            "kubectl set env daemonset/calico-node -n {namespace} IP_AUTODETECTION_METHOD=kubernetes-internal-ip"
        ),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn calico_and_how_it_finds_addresses() {
        let code = |name: &str, env: Value| {
            let set = json!({
                "metadata": {"name": name, "namespace": "kube-system"},
                "spec": {"selector": {}, "template": {"spec": {"containers": [{"name": "calico-node", "env": env}]}}},
            });
            autodetection(&serde_json::from_value(set).unwrap()).map(|problem| problem.code.id)
        };
        let auto = |method: &str| json!([{"name": "IP", "value": "autodetect"}, {"name": "IP_AUTODETECTION_METHOD", "value": method}]);
        assert_eq!(code("calico-node", json!([])), Some("VIP403"));
        assert_eq!(code("calico-node", auto("first-found")), Some("VIP403"));
        assert_eq!(code("calico-node", auto("kubernetes-internal-ip")), None);
        assert_eq!(code("calico-node", json!([{"name": "IP", "value": "10.0.0.1"}])), None);
        assert_eq!(code("cilium", json!([])), None);
    }
}
