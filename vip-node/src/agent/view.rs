//! What is known of the cluster at one moment: from the watches, or from the node's memory while the API server is away.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node as KubeNode;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use serde::{Deserialize, Serialize};
use vip_core::api::{ServiceRef, VIPNode, VirtualIP};
use vip_core::desired::Objects;
use vip_core::vrrp::Peer;

/// The label by which an EndpointSlice names its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The objects, and what follows from them about this node's place among the others.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// What this node's duties follow from; of the Services only those that virtual IPs name.
    pub objects: Objects,
    /// The other agents.
    pub peers: Vec<Peer>,
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
