//! What is known of the cluster at one moment: from the watches, or from the node's memory while the API server is away.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node as KubeNode;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use serde::{Deserialize, Serialize};
use vip_core::api::{ServiceRef, VIPNode, VirtualIP};
use vip_core::desired::{Carrier, Objects};
use vip_core::vrrp::{Peer, Peers};

use crate::link::Interface;

/// The label by which an EndpointSlice names its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The objects, and what follows from them about this node's place among the others.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// What this node's duties follow from; of the Services only those that virtual IPs name.
    pub objects: Objects,
    /// The other agents.
    pub peers: Peers,
    /// Addresses that their nodes have by other means than our elections.
    pub carried: Arc<BTreeMap<IpAddr, Carrier>>,
    /// The labels of this node.
    pub labels: BTreeMap<String, String>,
    /// Whether this node was told to give its addresses away.
    pub drained: bool,
    /// What the agents say of their nodes; not remembered, for it is of the moment.
    #[serde(skip)]
    pub nodes: Vec<Arc<VIPNode>>,
    /// This node's object in the cluster.
    #[serde(skip)]
    pub own: Option<Arc<KubeNode>>,
}

impl View {
    /// Whether a node's agent has told the others how to reach it.
    pub fn knows(&self, node: &str) -> bool {
        let told = |said: &VIPNode| said.status.as_ref().is_some_and(|status| !status.interfaces.is_empty());
        self.nodes.iter().any(|said| said.name_any() == node && told(said))
    }

    /// A virtual IP by name.
    pub fn vip(&self, name: &str) -> Option<&Arc<VirtualIP>> {
        let vips = &self.objects.vips;
        let at = vips.binary_search_by(|vip| vip.metadata.name.as_deref().unwrap_or_default().cmp(name));
        vips.get(at.ok()?)
    }
}

/// The Service of an EndpointSlice.
pub fn service_of(slice: &EndpointSlice) -> Option<ServiceRef> {
    let name = slice.labels().get(SERVICE_NAME)?.clone();
    Some(ServiceRef { namespace: slice.namespace().unwrap_or_default(), name })
}

/// A node as its neighbours on the LAN know it.
pub fn peer(node: &VIPNode) -> Peer {
    let interfaces = || node.status.iter().flat_map(|status| &status.interfaces);
    let addresses = interfaces().flat_map(|interface| &interface.addresses);
    Peer {
        node: node.name_any(),
        addresses: addresses.filter_map(|a| a.parse::<IpNet>().ok()).map(|net| net.addr()).collect(),
        macs: interfaces().filter_map(|interface| parse_mac(&interface.mac)).collect(),
    }
}

/// The addresses that a node says it has.
pub fn carried(node: &VIPNode) -> impl Iterator<Item = (IpAddr, Carrier)> {
    let interfaces = node.status.iter().flat_map(|status| &status.interfaces);
    interfaces.flat_map(move |interface| {
        let carrier = Carrier {
            node: node.name_any(),
            interface: interface.name.clone(),
            mac: parse_mac(&interface.mac).unwrap_or_default(),
        };
        let addresses = interface.addresses.iter().filter_map(|address| address.parse::<IpNet>().ok());
        let addresses = addresses.map(|net| net.addr()).filter(|address| !is_link_local(*address));
        addresses.map(move |address| (address, carrier.clone()))
    })
}

/// The interfaces on which a virtual IP can be, with their addresses. The ends of the pods' links have no subnet, or a link-local
/// one: they come and go by the hundred, and nobody needs to hear of them.
pub fn places(interfaces: &[Interface]) -> Vec<(String, Vec<IpNet>)> {
    let on_a_lan = interfaces.iter().filter(|interface| is_on_a_lan(interface));
    on_a_lan.map(|interface| (interface.name.clone(), interface.addresses.clone())).collect()
}

/// Whether an interface has a subnet with addresses that can be virtual IPs.
pub fn is_on_a_lan(interface: &Interface) -> bool {
    interface
        .addresses
        .iter()
        .any(|net| net.prefix_len() < net.max_prefix_len() && !is_link_local(net.addr()))
}

/// Whether an address means something on its own link only: every node may have the same.
pub fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Who has which address, of all nodes: this one has these interfaces, the others are known already.
pub fn carriers(
    node: &str,
    interfaces: &[Interface],
    others: &BTreeMap<IpAddr, Carrier>,
) -> BTreeMap<IpAddr, Carrier> {
    let mut carriers = others.clone();
    for Interface { name, mac, addresses, .. } in interfaces {
        for net in addresses.iter().filter(|net| !is_link_local(net.addr())) {
            let carrier = Carrier { node: node.to_owned(), interface: name.clone(), mac: *mac };
            carriers.insert(net.addr(), carrier);
        }
    }
    carriers
}

/// A hardware address such as `52:54:00:00:00:01`.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses() {
        assert_eq!(parse_mac("52:54:00:aa:bb:0c"), Some([0x52, 0x54, 0, 0xaa, 0xbb, 0x0c]));
        for bad in ["", "52:54:00:aa:bb", "52:54:00:aa:bb:cc:dd", "52:54:00:aa:bb:xx"] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}
