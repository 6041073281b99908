//! The Virtual Router Redundancy Protocol, version 3 (RFC 9568): bytes, timers, state machine and ranks.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The family of the addresses that an election is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// What identifies an election: interface, family and virtual router identifier (RFC 9568 section 1.7).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RouterId {
    /// The interface on which the routers hear each other.
    pub interface: String,
    /// The family of the addresses.
    pub family: Family,
    /// Virtual router identifier, 1 to 255.
    pub vrid: u8,
}

/// What one node is told about one virtual router that it takes part in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterConfig {
    /// The election.
    pub id: RouterId,
    /// Priority, 1 to 255 (RFC 9568 section 5.2.4).
    pub priority: u8,
    /// Advertisement interval, 10 ms to 40.95 s, sent in centiseconds.
    pub interval: Duration,
    /// Whether a router of higher priority takes over from a living master.
    pub preempt: bool,
    /// The virtual IPs, in ascending order.
    pub addresses: Vec<IpAddr>,
    /// Addresses of the other agents: the senders that are obeyed whatever addresses they list.
    pub peers: Vec<IpAddr>,
}
