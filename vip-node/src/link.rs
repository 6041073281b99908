//! What the two processes of a node say to each other over a Unix socket, one JSON document a line.
//!
//! `vip-node vrrp` listens, `vip-node agent` connects and may come and go: what it said last stays in force.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use vip_core::api::{Reason, VrrpState};
use vip_core::vrrp::{RouterConfig, RouterId};

/// From the agent to vrrp.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// All the elections to take part in. One that is missing from the list is left: with a priority-0
    /// advertisement, then without its addresses.
    Elect(Vec<RouterConfig>),
}

/// From vrrp to the agent: the whole state, at each change and once a second.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The node's interfaces, loopback left out, virtual IPs not among their addresses.
    pub interfaces: Vec<Interface>,
    /// The elections, as ordered.
    pub routers: Vec<RouterReport>,
    /// Routers lately heard.
    pub peers: Vec<Peer>,
    /// Refused advertisements by kind since the start.
    pub refused: BTreeMap<String, u64>,
    /// Set once the process was asked to end: the elections are being left.
    pub stopping: bool,
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Name, such as `eth0`.
    pub name: String,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Addresses with their prefix lengths, virtual IPs left out.
    pub addresses: Vec<IpNet>,
    /// Whether it is up and has a carrier.
    pub carrier: bool,
}

/// How an election stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterReport {
    /// The election.
    pub id: RouterId,
    /// This node's state in it.
    pub state: VrrpState,
    /// This node's priority in it.
    pub priority: u8,
    /// Source address of the master's last advertisement, unless it is us.
    pub master: Option<IpAddr>,
    /// Addresses that are bound here now.
    pub bound: Vec<IpAddr>,
    /// What keeps the node from taking part or from binding: a word and a sentence.
    pub trouble: Option<(Reason, String)>,
}

/// A router that was heard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The election that it spoke in.
    pub id: RouterId,
    /// Its address.
    pub address: IpAddr,
    /// Priority of its last advertisement.
    pub priority: u8,
}
