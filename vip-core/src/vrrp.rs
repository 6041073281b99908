//! The Virtual Router Redundancy Protocol, version 3 (RFC 9568): bytes, timers, state machine and ranks.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

mod lan;
pub mod packet;
pub mod rank;
pub mod router;
#[cfg(test)]
mod simulation;
pub mod timers;

pub use lan::{ChecksumPolicy, Lan, Peer, Peers};

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
    /// Whether this router takes over from a living master of lower priority, and if so, how much later than its
    /// active down interval (keepalived's `preempt_delay`). `None`: never.
    pub preempt: Option<Duration>,
    /// The virtual IPs, in ascending order.
    pub addresses: Vec<IpAddr>,
    /// Those of them that nobody has owned so far: they are probed before they are bound.
    pub fresh: BTreeSet<IpAddr>,
    /// Those of the fresh ones that another machine had when they were probed: whoever takes over probes them again.
    pub contested: BTreeSet<IpAddr>,
}

/// Why a router is master.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// No other master was heard.
    Alone,
    /// The master was not heard any more.
    Silence,
    /// The master gave up by priority 0.
    Goodbye,
    /// This is the preferred node, and displaced a master that lives.
    Preference,
    /// Another one believes that it is master too, and has the lower priority.
    Rank,
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

    /// Whether an advertisement claims an address of ours. Its sender is then obeyed even when it is no known peer: it is
    /// a new agent, or the router that is being replaced. An unknown sender that claims none of ours is foreign.
    pub fn is_claimed_by(&self, advert: &packet::Advert) -> bool {
        advert.addresses.iter().any(|address| self.addresses.contains(address))
    }

    /// The advertisement of this router, with this or another priority, sent from `source`. Over IPv6 a link-local address
    /// comes first (RFC 9568 section 5.2.9): one of the virtual router's own, as keepalived expects it, or else the
    /// sender's.
    pub fn advert(&self, priority: u8, source: IpAddr) -> packet::Advert {
        let link_local =
            |address: &&IpAddr| matches!(address, IpAddr::V6(six) if six.is_unicast_link_local());
        let own = self.addresses.iter().find(link_local).copied();
        let first = own.or(Some(source).filter(|source| link_local(&source)));
        let others = self.addresses.iter().copied().filter(|address| Some(*address) != first);
        packet::Advert {
            vrid: self.id.vrid,
            priority,
            interval: timers::to_centiseconds(self.interval),
            addresses: first.into_iter().chain(others).take(packet::MAX_LISTED).collect(),
        }
    }
}
