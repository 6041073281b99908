//! Which node could own which virtual IP, and why another could not: by the rules of the agents, applied to what the
//! agents report of their nodes.
//!
//! The agents decide. What is said here is for people who want to know beforehand.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use vip_core::api::{DRAIN_LABEL, EXCLUDE_LABEL, Reason, VIPNode, VIPPool, VirtualIP};
use vip_core::desired::{self, Objects, Planner, Trouble};

use crate::cluster::{Cluster, permitted, silence};
use crate::exit::{Failure, Result};
use crate::output::{say, span};
use crate::suggest;

/// By virtual IP: the interface on which a node could own it, or what is in the way.
type Verdicts = BTreeMap<String, std::result::Result<String, Trouble>>;
/// Labels by node.
type Labels = BTreeMap<String, BTreeMap<String, String>>;

/// What was read of the cluster.
pub struct View {
    /// All virtual IPs, in the order of their addresses.
    pub vips: Vec<VirtualIP>,
    /// What the agents say of their nodes.
    pub nodes: Vec<VIPNode>,
    /// All pools.
    pub pools: Vec<VIPPool>,
    /// Labels of the nodes; `None`: they may not be read.
    pub labels: Option<Labels>,
}

impl View {
    /// Reads everything. Labels that the user may not read are named on stderr and not compared.
    pub async fn read(cluster: &Cluster) -> Result<Self> {
        let (nodes, everything) = (cluster.nodes(), ListParams::default());
        let (vips, nodes, pools, labels) = futures::join!(
            cluster.list_vips(),
            nodes.list(&everything),
            cluster.list_pools(),
            labels(cluster)
        );
        let view = Self { vips: vips?, nodes: nodes?.items, pools: pools?, labels: labels? };
        if view.labels.is_none() && view.pools.iter().any(|pool| !pool.spec.node_selector.is_empty()) {
            say(
                "warning: nodes may not be read: their labels are not compared with the pools' node selectors",
            );
        }
        Ok(view)
    }

    /// What the agent on a node says, or a sentence with the closest name.
    pub fn node(&self, name: &str) -> Result<&VIPNode> {
        self.nodes.iter().find(|node| node.name_any() == name).ok_or_else(|| {
            let known: Vec<String> = self.nodes.iter().map(ResourceExt::name_any).collect();
            Failure::new(format!(
                "node {name:?} has no agent{}",
                suggest::ending(name, known.iter().map(String::as_str))
            ))
            .hint("kubectl vip node list")
        })
    }
}

async fn labels(cluster: &Cluster) -> Result<Option<Labels>> {
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    let list = permitted(nodes.list_metadata(&ListParams::default()).await)?;
    let labels = |list: Vec<_>| {
        list.into_iter()
            .map(|node: kube::core::PartialObjectMeta<Node>| (node.name_any(), node.labels().clone()))
    };
    Ok(list.map(|list| labels(list.items).collect()))
}

/// Why a node cannot own a virtual IP, and the command that shows more or helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfit {
    /// The sentence.
    pub why: String,
    /// The command.
    pub help: String,
}

impl From<Unfit> for Failure {
    fn from(unfit: Unfit) -> Self {
        Self::new(unfit.why).hint(unfit.help)
    }
}

/// Whether a node was drained.
pub fn is_drained(node: &VIPNode) -> bool {
    node.labels().contains_key(DRAIN_LABEL)
}

/// The verdicts on every node and virtual IP.
pub struct Fitness {
    /// By node: why it can own nothing, if so.
    nodes: BTreeMap<String, Option<Unfit>>,
    /// By node: why its kernel cannot serve, if so. A virtual IP without Services needs no kernel.
    kernels: BTreeMap<String, Option<Unfit>>,
    /// By node: where on the LAN it stands.
    interfaces: BTreeMap<String, Verdicts>,
}

impl Fitness {
    /// Judges what was read.
    pub fn new(view: &View, now: Timestamp) -> Self {
        let pools = view.pools.iter().cloned().map(|mut pool| {
            if view.labels.is_none() {
                pool.spec.node_selector.clear();
            }
            Arc::new(pool)
        });
        let objects = Objects {
            vips: view.vips.iter().cloned().map(Arc::new).collect(),
            pools: pools.collect(),
            ..Objects::default()
        };
        let mut fitness =
            Self { nodes: BTreeMap::new(), kernels: BTreeMap::new(), interfaces: BTreeMap::new() };
        for node in &view.nodes {
            let name = node.name_any();
            let labels = view.labels.as_ref().and_then(|labels| labels.get(&name));
            // Drained or not, where it stands on the LAN is the same.
            let as_seen = desired::Node {
                name: name.clone(),
                labels: labels.cloned().unwrap_or_default(),
                interfaces: interfaces(node),
                drained: false,
                // An address that a node has by other means is told by the virtual IP's own condition.
                carried: Arc::default(),
            };
            let plans = Planner::default().plan(&objects, &as_seen).vips.into_iter();
            let verdicts = plans.map(|plan| {
                let candidate =
                    plan.candidate.map_err(|trouble| unplugged(node, plan.address).unwrap_or(trouble));
                (plan.name, candidate)
            });
            let verdicts = verdicts.collect();
            fitness.nodes.insert(name.clone(), out_of_service(node, now));
            fitness.kernels.insert(name.clone(), broken(node));
            fitness.interfaces.insert(name, verdicts);
        }
        fitness
    }

    /// Why the node cannot own the virtual IP; `None` when it can.
    pub fn unfit(&self, node: &str, vip: &VirtualIP) -> Option<Unfit> {
        let Some(state) = self.nodes.get(node) else {
            return Some(Unfit {
                why: format!("node {node} has no agent"),
                help: "kubectl vip node list".to_owned(),
            });
        };
        let kernel = || self.kernels.get(node).cloned().flatten().filter(|_| !vip.spec.services.is_empty());
        state.clone().or_else(kernel).or_else(|| match self.interfaces.get(node)?.get(&vip.name_any())? {
            Ok(_) => None,
            Err(trouble) => Some(in_the_way(node, trouble)),
        })
    }

    /// What keeps a node that reports from a virtual IP because of where it stands: labels, interfaces, pools.
    pub fn trouble(&self, node: &str, vip: &VirtualIP) -> Option<&Trouble> {
        self.interfaces.get(node)?.get(&vip.name_any())?.as_ref().err()
    }

    /// The nodes that can own all of these virtual IPs.
    pub fn fit(&self, vips: &[&VirtualIP]) -> Vec<&str> {
        let nodes = self.nodes.keys().map(String::as_str);
        nodes.filter(|node| vips.iter().all(|vip| self.unfit(node, vip).is_none())).collect()
    }

    /// The virtual IPs by virtual router, and so by what moves together: those with the same identifier and family that
    /// some node has on the same interface.
    pub fn routers<'a>(&self, vips: &'a [VirtualIP]) -> Vec<Vec<&'a VirtualIP>> {
        struct Router<'p, 'v> {
            is_v6: bool,
            id: u8,
            places: BTreeSet<(&'p str, &'p str)>,
            vips: Vec<&'v VirtualIP>,
        }
        let mut routers: Vec<Router> = Vec::new();
        for vip in vips {
            let is_v6 = vip.spec.address.parse::<IpAddr>().is_ok_and(|address| address.is_ipv6());
            let (id, places) = (vip.spec.virtual_router, self.places(&vip.name_any()));
            let same = |router: &&mut Router| {
                router.is_v6 == is_v6 && router.id == id && !router.places.is_disjoint(&places)
            };
            match routers.iter_mut().find(same) {
                Some(router) => {
                    router.places.extend(places);
                    router.vips.push(vip);
                }
                None => routers.push(Router { is_v6, id, places, vips: vec![vip] }),
            }
        }
        routers.into_iter().map(|router| router.vips).collect()
    }

    /// Nodes and interfaces on which a virtual IP could be.
    fn places(&self, name: &str) -> BTreeSet<(&str, &str)> {
        let mut places = BTreeSet::new();
        for (node, verdicts) in &self.interfaces {
            if let Some(Ok(interface)) = verdicts.get(name) {
                places.insert((node.as_str(), interface.as_str()));
            }
        }
        places
    }
}

/// The interfaces with a carrier and their networks.
fn interfaces(node: &VIPNode) -> Vec<(String, Vec<IpNet>)> {
    let all = node.status.iter().flat_map(|status| &status.interfaces);
    all.filter(|interface| interface.carrier)
        .map(|interface| {
            let networks = interface.addresses.iter().filter_map(|address| address.parse().ok());
            (interface.name.clone(), networks.collect())
        })
        .collect()
}

/// The interface that would do, had it a carrier.
fn unplugged(node: &VIPNode, address: Option<IpAddr>) -> Option<Trouble> {
    let down = node.status.iter().flat_map(|status| &status.interfaces).filter(|i| !i.carrier);
    let has = |text: &String| {
        text.parse().is_ok_and(|network: IpNet| address.is_some_and(|a| network.contains(&a)))
    };
    let interface = down.into_iter().find(|interface| interface.addresses.iter().any(has))?;
    let message = format!("interface {} of node {} has no carrier", interface.name, node.name_any());
    Some(Trouble::new(Reason::NoInterface, message))
}

/// Why a node is out of service now, whatever the virtual IP.
pub fn unready(node: &VIPNode, now: Timestamp) -> Option<Unfit> {
    out_of_service(node, now).or_else(|| broken(node))
}

/// Why a node can own nothing at all.
fn out_of_service(node: &VIPNode, now: Timestamp) -> Option<Unfit> {
    let name = node.name_any();
    if let Some(seconds) = silence(node, now) {
        return Some(Unfit {
            why: format!("the agent on node {name} has been silent for {}", span(seconds)),
            help: format!(
                "kubectl get pods -A -l app.kubernetes.io/component=vip-node --field-selector spec.nodeName={name}"
            ),
        });
    }
    is_drained(node).then(|| Unfit {
        why: format!("node {name} is drained"),
        help: format!("kubectl vip node undrain {name}"),
    })
}

/// Why a node's kernel cannot serve.
fn broken(node: &VIPNode) -> Option<Unfit> {
    let name = node.name_any();
    let dataplane = node.status.as_ref().map(|status| status.dataplane.clone()).unwrap_or_default();
    if dataplane.ready {
        return None;
    }
    let said = [dataplane.reason.map(|reason| reason.to_string()), dataplane.message];
    let said: Vec<String> = said.into_iter().flatten().collect();
    let said = if said.is_empty() { "it has not said that it is ready".to_owned() } else { said.join(": ") };
    Some(Unfit {
        why: format!("node {name} cannot serve: {said}"),
        help: format!("kubectl describe vipnode {name}"),
    })
}

fn in_the_way(node: &str, trouble: &Trouble) -> Unfit {
    let help = match trouble.reason {
        Reason::NodeExcluded if trouble.message.contains(EXCLUDE_LABEL) => {
            format!("kubectl label node {node} {EXCLUDE_LABEL}-")
        }
        Reason::NodeExcluded => format!("kubectl get node {node} --show-labels"),
        Reason::Rejected => "kubectl vip pool list".to_owned(),
        _ => "kubectl vip node list -o wide".to_owned(),
    };
    Unfit { why: trouble.message.clone(), help }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn vip(address: &str, router: u8, services: Value) -> VirtualIP {
        serde_json::from_value(json!({
            "metadata": {"name": address},
            "spec": {"address": address, "virtualRouter": router, "services": services},
        }))
        .unwrap()
    }

    fn node(name: &str, labels: Value, ready: bool, interfaces: &[(&str, &str, bool)]) -> VIPNode {
        let interfaces: Vec<Value> = interfaces
            .iter()
            .map(|(name, address, carrier)| {
                json!({"name": name, "mac": "m", "addresses": [address], "carrier": carrier})
            })
            .collect();
        serde_json::from_value(json!({
            "metadata": {"name": name, "labels": labels},
            "status": {"renewTime": "2026-01-01T00:00:00Z", "interfaces": interfaces,
                       "dataplane": {"ready": ready, "reason": "IPVSUnavailable", "message": "no ip_vs"}},
        }))
        .unwrap()
    }

    fn view(nodes: Vec<VIPNode>, vips: Vec<VirtualIP>) -> View {
        let mut lab: VIPPool = serde_json::from_value(json!({
            "metadata": {"name": "lab"},
            "spec": {"addresses": ["10.0.0.0/24"], "virtualRouters": {"first": 1, "count": 9},
                     "nodeSelector": {"role": "edge"}},
        }))
        .unwrap();
        let mut wide = lab.clone();
        wide.metadata.name = Some("wide".into());
        wide.spec.addresses = vec!["10.0.1.0/24".into()];
        wide.spec.node_selector.clear();
        lab.spec.interface = Some("eth1".into());
        let labels = nodes.iter().map(|node| (node.name_any(), BTreeMap::new())).collect();
        View { vips, nodes, pools: vec![lab, wide], labels: Some(labels) }
    }

    const NOW: Timestamp = Timestamp::constant(1_767_225_601, 0);
    const WEB: &str = r#"[{"namespace": "shop", "name": "web"}]"#;

    #[test]
    fn what_is_in_the_way_of_a_node() {
        let web: Value = serde_json::from_str(WEB).unwrap();
        let lan = [("eth1", "10.0.0.11/24", true), ("eth0", "10.0.1.11/24", true)];
        let mut silent = node("silent", json!({}), true, &lan);
        silent.status.as_mut().unwrap().renew_time =
            serde_json::from_value(json!("2025-12-31T23:55:01Z")).unwrap();
        let nodes = vec![
            node("good", json!({}), true, &lan),
            node("drained", json!({DRAIN_LABEL: "true"}), true, &lan),
            node("sick", json!({}), false, &lan),
            node("far", json!({}), true, &[("eth0", "172.16.0.1/24", true)]),
            node("unplugged", json!({}), true, &[("eth0", "10.0.1.12/24", false)]),
            silent,
        ];
        let vips =
            vec![vip("10.0.1.200", 1, web.clone()), vip("10.0.1.201", 2, json!([])), vip("10.0.0.9", 3, web)];
        let view = view(nodes, vips);
        let fitness = Fitness::new(&view, NOW);
        let said = |node: &str, vip: usize| {
            fitness.unfit(node, &view.vips[vip]).map(|unfit| format!("{}; {}", unfit.why, unfit.help))
        };
        assert_eq!(said("good", 0), None);
        assert_eq!(said("drained", 0).unwrap(), "node drained is drained; kubectl vip node undrain drained");
        assert_eq!(
            said("sick", 0).unwrap(),
            "node sick cannot serve: IPVSUnavailable: no ip_vs; kubectl describe vipnode sick"
        );
        assert_eq!(said("sick", 1), None, "a bare address needs no kernel tables");
        assert_eq!(
            said("far", 0).unwrap(),
            "node far has no interface in the subnet of 10.0.1.200; kubectl vip node list -o wide"
        );
        assert_eq!(
            said("unplugged", 0).unwrap(),
            "interface eth0 of node unplugged has no carrier; kubectl vip node list -o wide"
        );
        assert!(said("silent", 0).unwrap().starts_with("the agent on node silent has been silent for 5m;"));
        assert_eq!(
            said("good", 2).unwrap(),
            "node good lacks the label role=edge that pool \"lab\" asks for; kubectl get node good --show-labels"
        );
        assert!(said("gone", 0).unwrap().starts_with("node gone has no agent"));
        assert_eq!(fitness.fit(&[&view.vips[1]]), ["good", "sick"]);
        let blind = View { labels: None, ..view };
        let unfit = Fitness::new(&blind, NOW).unfit("good", &blind.vips[2]);
        assert_eq!(unfit, None, "labels that may not be read are not held against a node");
    }

    #[test]
    fn what_shares_a_virtual_router_on_one_lan_moves_together() {
        let lan = [("eth0", "10.0.1.11/24", true), ("eth2", "10.0.0.11/24", true)];
        let vips = ["10.0.1.200", "10.0.1.201", "10.0.1.202", "10.0.0.9", "192.168.1.1"];
        let routers = [7, 7, 8, 7, 7];
        let vips = vips.iter().zip(routers).map(|(address, id)| vip(address, id, json!([]))).collect();
        let mut view = view(vec![node("n", json!({}), true, &lan)], vips);
        view.pools[0].spec.interface = None;
        view.labels = None;
        let routers: Vec<Vec<&str>> = Fitness::new(&view, NOW)
            .routers(&view.vips)
            .iter()
            .map(|vips| vips.iter().map(|vip| vip.spec.address.as_str()).collect())
            .collect();
        assert_eq!(
            routers,
            [vec!["10.0.1.200", "10.0.1.201"], vec!["10.0.1.202"], vec!["10.0.0.9"], vec!["192.168.1.1"]]
        );
    }
}
