//! What the decisions need to know of the nodes.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::Trouble;
use crate::api::Reason;

/// This node, as far as the elections care.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its interfaces on which virtual IPs can be, with their own addresses.
    pub interfaces: Vec<(String, Vec<IpNet>)>,
    /// Whether it was drained: its VIPNode has the label [`crate::api::DRAIN_LABEL`].
    pub drained: bool,
    /// Who has which address, of all nodes and this one, by other means than our elections.
    pub carried: Arc<BTreeMap<IpAddr, Carrier>>,
}

impl Node {
    /// The subnet of an address on an interface.
    pub(super) fn subnet(&self, interface: &str, address: IpAddr) -> Option<IpNet> {
        let mut nets =
            self.interfaces.iter().filter(|(name, _)| name == interface).flat_map(|(_, nets)| nets);
        let holds = |net: &&IpNet| net.prefix_len() < net.max_prefix_len() && net.contains(&address);
        nets.find(holds).map(IpNet::trunc)
    }

    /// Whether all is as with another, but for the addresses that are carried.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let Self { name, labels, interfaces, drained, carried: _ } = self;
        (name, labels, interfaces, drained) == (&other.name, &other.labels, &other.interfaces, &other.drained)
    }
}

/// A node that has an address, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carrier {
    /// The node.
    pub node: String,
    /// The interface with the address.
    pub interface: String,
    /// Its hardware address.
    pub mac: [u8; 6],
}

impl Carrier {
    /// Says that the address is not for a virtual IP.
    pub(super) fn trouble(&self, address: IpAddr, pool: &str) -> Trouble {
        let message = format!(
            "{address} is used by {self}: it is not bound; take the address from that node, or exclude it from pool {pool:?}"
        );
        Trouble::new(Reason::AddressInUse, message)
    }
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mac = self.mac.map(|byte| format!("{byte:02x}")).join(":");
        write!(f, "node {} ({mac} on {})", self.node, self.interface)
    }
}
