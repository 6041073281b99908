//! The objects of the cluster as a node knows them. Those that did not change are shared, so that two states are compared by
//! what they point to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::{Deserialize, Serialize};

use crate::api::{ServiceRef, VIPPool, VirtualIP};

/// The objects from which a node's duties follow, as last seen.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Objects {
    /// All virtual IPs that could be read, in the order of their names.
    pub vips: Vec<Arc<VirtualIP>>,
    /// Names of the virtual IPs that could not be read, and why.
    #[serde(skip)]
    pub malformed: Vec<(String, String)>,
    /// All pools.
    pub pools: Vec<Arc<VIPPool>>,
    /// The Services, at least those that virtual IPs name.
    #[serde(with = "pairs")]
    pub services: BTreeMap<ServiceRef, Arc<Backing>>,
}

/// A Service with what is behind it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backing {
    /// The Service; `None`: there is none of this name.
    pub service: Option<Arc<Service>>,
    /// Its EndpointSlices in the order of their names.
    pub slices: Vec<Arc<EndpointSlice>>,
}

impl Objects {
    /// The addresses of the endpoints that are on a node.
    pub fn endpoints_on(&self, node: &str) -> BTreeSet<IpAddr> {
        let slices = self.services.values().flat_map(|backing| &backing.slices);
        slices
            .flat_map(|slice| &slice.endpoints)
            .filter(|endpoint| endpoint.node_name.as_deref() == Some(node))
            .filter_map(|endpoint| endpoint.addresses.first()?.parse().ok())
            .collect()
    }
}

/// A map with keys that are no text, as a list of pairs.
mod pairs {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serializer};

    use super::Backing;
    use crate::api::ServiceRef;

    type Map = BTreeMap<ServiceRef, Arc<Backing>>;

    pub fn serialize<S: Serializer>(map: &Map, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(map)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Map, D::Error> {
        Vec::deserialize(deserializer).map(|pairs| pairs.into_iter().collect())
    }
}
