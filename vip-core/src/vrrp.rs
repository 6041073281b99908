//! The Virtual Router Redundancy Protocol, version 3 (RFC 9568): bytes, timers, state machine and ranks.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub mod packet;
pub mod rank;
pub mod router;
#[cfg(test)]
mod simulation;
pub mod timers;

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

impl RouterConfig {
    /// What makes this configuration unusable, in words; `None` when it can be elected with.
    pub fn fault(&self) -> Option<String> {
        let centiseconds = self.interval.as_nanos() / timers::CENTISECOND.as_nanos();
        if self.id.vrid == 0 {
            return Some("a virtual router identifier is 1 to 255".to_owned());
        }
        if self.priority == 0 {
            return Some("a priority is 1 to 255".to_owned());
        }
        if !(1..=u128::from(timers::MAX_CENTISECONDS)).contains(&centiseconds) {
            return Some("an advertisement interval is 10 ms to 40.95 s".to_owned());
        }
        if self.addresses.is_empty() {
            return Some("a virtual router needs an address".to_owned());
        }
        let stray = self.addresses.iter().find(|address| Family::of(**address) != self.id.family)?;
        Some(format!("{stray} is not of the virtual router's address family"))
    }

    /// Whether a sender is one to listen to: a known peer, or one that claims an address of ours (a new agent, or
    /// the router that is being replaced). A sender of the same identifier with neither is foreign.
    pub fn knows(&self, source: IpAddr, advert: &packet::Advert) -> bool {
        self.peers.contains(&source)
            || advert.addresses.iter().any(|address| self.addresses.contains(address))
    }

    /// The advertisement of this router, with this or another priority.
    pub fn advert(&self, priority: u8) -> packet::Advert {
        packet::Advert {
            vrid: self.id.vrid,
            priority,
            interval: timers::to_centiseconds(self.interval),
            addresses: self.addresses.iter().copied().take(packet::MAX_LISTED).collect(),
        }
    }
}
