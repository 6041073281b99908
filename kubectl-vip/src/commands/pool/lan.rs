//! What a pool must not touch: other pools, the addresses of nodes, the networks of pods and Services.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use vip_core::api::{VIPNode, VIPPool, VirtualRouterRange};
use vip_core::pool::{AddressSet, Span, free_virtual_routers};
use vip_core::validate::{CheckedPool, check_pools};

use crate::cluster::{Cluster, permitted, present, silence};
use crate::exit::{Failure, Result};
use crate::output::say;

/// What is in use around the pools.
#[derive(Clone, Debug, Default)]
pub struct Lan {
    /// The pools that there are.
    pub pools: Vec<VIPPool>,
    /// What the agents report.
    pub agents: Vec<VIPNode>,
    /// Single addresses and what has them.
    hosts: Vec<(IpAddr, String)>,
    /// Networks and what they are for.
    networks: Vec<(AddressSet, String)>,
    /// Virtual routers of others that agents hear on the LAN.
    heard: BTreeSet<u8>,
}

/// What two pools cannot both have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clash {
    /// These addresses.
    Addresses(Span),
    /// This virtual router.
    VirtualRouter(u8),
}

impl Clash {
    /// The first thing that both pools want, if any.
    pub fn between(pool: &CheckedPool, other: &CheckedPool) -> Option<Self> {
        let theirs: BTreeSet<u8> = other.virtual_routers.iter().collect();
        let router = || pool.virtual_routers.iter().find(|id| theirs.contains(id)).map(Self::VirtualRouter);
        pool.addresses.overlap(&other.addresses).map(Self::Addresses).or_else(router)
    }

    /// The sentence about it.
    pub fn sentence(self, pool: &CheckedPool, other: &CheckedPool) -> String {
        let (name, theirs) = (&pool.name, &other.name);
        match self {
            Self::Addresses(span) => {
                format!("pool {name:?} overlaps pool {theirs:?} ({}) at {span}", other.text)
            }
            Self::VirtualRouter(id) => format!(
                "virtual router {id} of pool {name:?} belongs to pool {theirs:?} ({})",
                range_text(other.virtual_routers)
            ),
        }
    }
}

impl Lan {
    /// Reads pools, nodes and networks. What the user may not read is named on stderr and not compared.
    pub async fn read(cluster: &Cluster) -> Result<Self> {
        let nodes: Api<Node> = Api::all(cluster.client.clone());
        let services: Api<ServiceCIDR> = Api::all(cluster.client.clone());
        let all = ListParams::default();
        let (pools, agents) = (cluster.pools(), cluster.nodes());
        let (pools, agents, nodes, services) =
            futures::join!(pools.list(&all), agents.list(&all), nodes.list(&all), services.list(&all));

        let pools = present(pools)?.map(|list| list.items).unwrap_or_default();
        let agents = present(agents).ok().flatten().map(|list| list.items).unwrap_or_default();
        let nodes = permitted(nodes)?.map(|list| list.items);
        if nodes.is_none() {
            say("warning: nodes may not be read: the pool is not compared with their addresses");
        }
        // Older API servers do not have ServiceCIDRs.
        let cidrs = services.map(|list| list.items).unwrap_or_default();
        Ok(Self::new(pools, &nodes.unwrap_or_default(), &agents, &cidrs))
    }

    /// From what was read.
    pub fn new(pools: Vec<VIPPool>, nodes: &[Node], agents: &[VIPNode], services: &[ServiceCIDR]) -> Self {
        let mut lan = Self { pools, agents: agents.to_vec(), ..Self::default() };
        nodes.iter().for_each(|node| lan.add_node(node));
        agents.iter().for_each(|node| lan.add_agent(node));
        for network in services.iter().filter_map(|cidr| cidr.spec.as_ref()?.cidrs.as_ref()).flatten() {
            lan.add_network(network, "the cluster's network of Services".to_owned());
        }
        lan
    }

    fn add_node(&mut self, node: &Node) {
        let name = node.name_any();
        for address in node.status.iter().flat_map(|status| status.addresses.iter().flatten()) {
            self.hosts.extend(address.address.parse().ok().map(|ip| (ip, format!("node {name}"))));
        }
        let spec = node.spec.clone().unwrap_or_default();
        for network in spec.pod_cidrs.unwrap_or_else(|| spec.pod_cidr.into_iter().collect()) {
            self.add_network(&network, format!("the network of the pods on node {name}"));
        }
    }

    fn add_agent(&mut self, node: &VIPNode) {
        let name = node.name_any();
        if silence(node, Timestamp::now()).is_none() {
            self.heard.extend(node.status.iter().flat_map(|s| &s.foreign_routers).map(|r| r.virtual_router));
        }
        for interface in node.status.iter().flat_map(|status| &status.interfaces) {
            for network in interface.addresses.iter().filter_map(|address| address.parse::<IpNet>().ok()) {
                self.hosts.push((network.addr(), format!("node {name}")));
                self.hosts
                    .extend(anycast(network).map(|ip| (ip, format!("every router of {}", network.trunc()))));
            }
        }
    }

    fn add_network(&mut self, network: &str, what: String) {
        if let Ok(set) = AddressSet::parse_whole(&[network]) {
            self.networks.push((set, format!("{what} ({network})")));
        }
    }

    /// Says why there cannot be such a pool, if so. A pool of the same name is the one that changes.
    pub fn admit(&self, pool: &CheckedPool) -> Result<()> {
        let name = &pool.name;
        let (others, _) = check_pools(self.pools.iter().filter(|other| other.name_any() != *name));
        for other in &others {
            let Some(clash) = Clash::between(pool, other) else { continue };
            let hint = match clash {
                Clash::Addresses(_) => "each address belongs to one pool: kubectl vip pool list".to_owned(),
                Clash::VirtualRouter(_) => match self.unused(Some(name)) {
                    Some(range) => format!("free ones: --virtual-routers {}", range_text(range)),
                    None => "kubectl vip pool list -o wide".to_owned(),
                },
            };
            return Err(Failure::new(clash.sentence(pool, other)).hint(hint));
        }
        if let Some((address, sentence)) = self.host_in(pool) {
            return Err(Failure::new(sentence).hint(format!("leave it out: --exclude {address}")));
        }
        match self.network_in(pool) {
            Some(sentence) => {
                Err(Failure::new(sentence).hint("a pool has addresses of the LAN that nobody else gives out"))
            }
            None => Ok(()),
        }
    }

    /// Single addresses and what has them.
    pub fn hosts(&self) -> impl Iterator<Item = (IpAddr, String)> + '_ {
        self.hosts.iter().cloned()
    }

    /// An address of the pool that something has already, and the sentence about it.
    pub fn host_in(&self, pool: &CheckedPool) -> Option<(IpAddr, String)> {
        let (address, owner) = self.hosts.iter().find(|(address, _)| pool.addresses.contains(*address))?;
        Some((*address, format!("pool {:?} holds {address}, which is the address of {owner}", pool.name)))
    }

    /// The sentence about a network of the cluster that the pool has addresses of.
    pub fn network_in(&self, pool: &CheckedPool) -> Option<String> {
        let overlap = |(set, what): &(AddressSet, String)| {
            Some(format!("pool {:?} holds {} of {what}", pool.name, pool.addresses.overlap(set)?))
        };
        self.networks.iter().find_map(overlap)
    }

    /// Virtual routers for a new pool.
    pub fn free_virtual_routers(&self) -> Result<VirtualRouterRange> {
        self.unused(None).ok_or_else(|| {
            Failure::new("all 255 virtual router identifiers belong to pools, or to other routers of the LAN")
                .hint("kubectl vip pool list -o wide")
        })
    }

    /// Virtual routers that belong neither to a pool, except this one, nor to others on the LAN.
    fn unused(&self, except: Option<&str>) -> Option<VirtualRouterRange> {
        let pools = self.pools.iter().filter(|pool| pool.metadata.name.as_deref() != except);
        let ours = pools.flat_map(|pool| pool.spec.virtual_routers.iter());
        free_virtual_routers(&ours.chain(self.heard.iter().copied()).collect())
    }
}

/// The Subnet-Router anycast address of an IPv6 network, which every node that forwards has (RFC 4291, section 2.6.1; not
/// on links between two routers, RFC 6164).
fn anycast(network: IpNet) -> Option<IpAddr> {
    match network {
        IpNet::V6(network) if network.prefix_len() < 127 => Some(network.network().into()),
        _ => None,
    }
}

/// A range of virtual routers as it is written: `100-163`.
pub fn range_text(range: VirtualRouterRange) -> String {
    let last = u16::from(range.first) + u16::from(range.count.saturating_sub(1));
    if range.count == 1 { range.first.to_string() } else { format!("{}-{last}", range.first) }
}

/// Reads `100-163` or `51`.
pub fn parse_range(text: &str) -> Result<VirtualRouterRange> {
    let wrong = || {
        Failure::new(format!(
            "{text:?} is not a range of virtual routers: write FIRST-LAST, from 1 to 255, such as 100-163"
        ))
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last): (u8, u8) =
        (first.trim().parse().map_err(|_| wrong())?, last.trim().parse().map_err(|_| wrong())?);
    if first == 0 || last < first {
        return Err(wrong());
    }
    Ok(VirtualRouterRange { first, count: last - first + 1 })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::commands::pool::draft;

    fn lan() -> Lan {
        let range = VirtualRouterRange { first: 100, count: 64 };
        let mut lan =
            Lan { pools: vec![draft("lab", &["192.168.10.240/28".to_owned()], range)], ..Lan::default() };
        lan.add_node(
            &serde_json::from_value(json!({
                "metadata": {"name": "node-1"}, "spec": {"podCIDRs": ["10.244.1.0/24", "fd10:244:1::/64"]},
                "status": {"addresses": [
                    {"type": "InternalIP", "address": "192.168.10.11"}, {"type": "InternalIP", "address": "fd87::11"},
                    {"type": "Hostname", "address": "node-1"},
                ]},
            }))
            .unwrap(),
        );
        lan.add_agent(
            &serde_json::from_value(json!({
                "metadata": {"name": "node-1"},
                "status": {"interfaces": [{"name": "eth0", "mac": "m", "addresses": ["fd87::a11/64"], "carrier": true}]},
            }))
            .unwrap(),
        );
        for network in ["10.96.0.0/16", "fd96::/112"] {
            lan.add_network(network, "the cluster's network of Services".to_owned());
        }
        lan
    }

    fn refusal(name: &str, addresses: &str, first: u8) -> String {
        let raw = draft(name, &[addresses.to_owned()], VirtualRouterRange { first, count: 8 });
        lan().admit(&CheckedPool::new(&raw).unwrap()).err().map_or_else(String::new, |f| f.to_string())
    }

    #[test]
    fn what_a_pool_must_not_touch() {
        assert_eq!(refusal("b", "192.168.10.224/28", 1), "");
        assert_eq!(
            refusal("b", "192.168.10.250-192.168.11.3", 1),
            "Error: pool \"b\" overlaps pool \"lab\" (192.168.10.240/28) at 192.168.10.250-192.168.10.254\n\
             hint: each address belongs to one pool: kubectl vip pool list"
        );
        assert_eq!(refusal("lab", "192.168.10.250-192.168.11.3", 100), "", "a pool may change itself");
        assert_eq!(
            refusal("b", "192.168.10.8/29", 1),
            "Error: pool \"b\" holds 192.168.10.11, which is the address of node node-1\n\
             hint: leave it out: --exclude 192.168.10.11"
        );
        assert!(
            refusal("b", "10.244.1.9", 1).contains("the network of the pods on node node-1 (10.244.1.0/24)")
        );
        assert!(refusal("b", "10.96.0.9", 1).contains("network of Services"));
        assert_eq!(
            refusal("b", "192.168.10.1", 160),
            "Error: virtual router 160 of pool \"b\" belongs to pool \"lab\" (100-163)\n\
             hint: free ones: --virtual-routers 164-227"
        );
    }

    #[test]
    fn what_an_ipv6_pool_must_not_touch() {
        assert_eq!(refusal("b", "fd87::2:0/112", 1), "");
        assert!(
            refusal("b", "fd87::10-fd87::1f", 1)
                .contains("holds fd87::11, which is the address of node node-1")
        );
        assert!(
            refusal("b", "fd87::a00/120", 1).contains("holds fd87::a11, which is the address of node node-1")
        );
        assert_eq!(
            refusal("b", "fd87::/124", 1),
            "Error: pool \"b\" holds fd87::, which is the address of every router of fd87::/64\n\
             hint: leave it out: --exclude fd87::"
        );
        assert!(refusal("b", "fd10:244:1::9", 1).contains("pods on node node-1 (fd10:244:1::/64)"));
        assert!(refusal("b", "fd96::9", 1).contains("the cluster's network of Services (fd96::/112)"));
        assert!(
            refusal("b", "fd87::2:0/112", 160).contains("virtual router 160"),
            "one pool's, in either family"
        );
    }

    #[test]
    fn ranges_of_virtual_routers() {
        assert_eq!(parse_range("100-163").unwrap(), VirtualRouterRange { first: 100, count: 64 });
        assert_eq!(range_text(parse_range("1-255").unwrap()), "1-255");
        assert_eq!(range_text(parse_range("51").unwrap()), "51");
        for bad in ["", "0-9", "9-1", "1-256", "a", "1-2-3"] {
            assert!(parse_range(bad).is_err(), "{bad}");
        }
        let mut lan = lan();
        assert_eq!(lan.free_virtual_routers().unwrap(), VirtualRouterRange { first: 164, count: 64 });
        lan.heard.insert(170);
        assert_eq!(
            lan.free_virtual_routers().unwrap(),
            VirtualRouterRange { first: 171, count: 64 },
            "past a foreign router"
        );
    }
}
