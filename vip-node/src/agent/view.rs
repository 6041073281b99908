//! What is known of the cluster at one moment: from the watches, or from the node's memory while the API server is away.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node as KubeNode, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;
use serde::{Deserialize, Serialize};
use vip_core::api::{ServiceRef, VIPNode, VIPPool, VirtualIP};
use vip_core::desired::Objects;
use vip_core::vrrp::Peer;

/// The label by which an EndpointSlice names its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The objects, and what follows from them about this node's place among the others.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// All virtual IPs that could be read.
    pub vips: Vec<Arc<VirtualIP>>,
    /// Names of the virtual IPs that could not be read, and why.
    #[serde(skip)]
    pub malformed: Vec<(String, String)>,
    /// All pools.
    pub pools: Vec<Arc<VIPPool>>,
    /// The Services that virtual IPs name.
    pub services: Vec<Arc<Service>>,
    /// The EndpointSlices of these Services.
    pub slices: Vec<Arc<EndpointSlice>>,
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
    /// The Services that the virtual IPs name.
    pub fn wanted(vips: &[Arc<VirtualIP>]) -> BTreeSet<&ServiceRef> {
        vips.iter().flat_map(|vip| &vip.spec.services).collect()
    }

    /// Puts what has a name into the order of the names: stores give it in any.
    pub fn sort(&mut self) {
        self.vips.sort_by_cached_key(|vip| vip.name_any());
        self.pools.sort_by_cached_key(|pool| pool.name_any());
        self.slices.sort_by_cached_key(|slice| (slice.namespace(), slice.name_any()));
        self.nodes.sort_by_cached_key(|node| node.name_any());
    }

    /// The objects from which this node's duties follow.
    pub fn objects(&self) -> Objects {
        let services = self.services.iter().map(|service| {
            let namespace = service.namespace().unwrap_or_default();
            (ServiceRef { namespace, name: service.name_any() }, service.clone())
        });
        let mut slices: BTreeMap<ServiceRef, Vec<Arc<EndpointSlice>>> = BTreeMap::new();
        for slice in &self.slices {
            if let Some(service) = service_of(slice) {
                slices.entry(service).or_default().push(slice.clone());
            }
        }
        Objects {
            vips: self.vips.clone(),
            malformed: self.malformed.clone(),
            pools: self.pools.clone(),
            services: services.collect(),
            slices,
        }
    }

    /// A virtual IP by name.
    pub fn vip(&self, name: &str) -> Option<&Arc<VirtualIP>> {
        self.vips.iter().find(|vip| vip.metadata.name.as_deref() == Some(name))
    }

    /// Whether all that is remembered is the same. Objects that did not change are shared, so nothing is compared by
    /// its contents.
    pub fn is_same(&self, other: &Self) -> bool {
        fn same<T>(here: &[Arc<T>], there: &[Arc<T>]) -> bool {
            here.len() == there.len() && here.iter().zip(there).all(|(a, b)| Arc::ptr_eq(a, b))
        }
        same(&self.vips, &other.vips)
            && same(&self.pools, &other.pools)
            && same(&self.services, &other.services)
            && same(&self.slices, &other.slices)
            && (&self.peers, &self.labels, self.drained) == (&other.peers, &other.labels, other.drained)
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
