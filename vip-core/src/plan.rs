//! What the kernel should hold, what it holds, and the ordered changes between the two.
//!
//! The kernel's IPVS table has no owner field. Our own set of `address . protocol . port` (the *ledger*, kept in our
//! nftables table) says which virtual services are ours; nothing outside it is ever changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use crate::api::Scheduler;

/// A transport that IPVS balances here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP, protocol 6.
    Tcp,
    /// UDP, protocol 17.
    Udp,
}

impl Protocol {
    /// The protocol number of the IP header.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// What identifies a virtual service in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// The virtual IP.
    pub address: IpAddr,
    /// Its transport.
    pub protocol: Protocol,
    /// Its port.
    pub port: u16,
}

impl std::fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.protocol, SocketAddr::new(self.address, self.port))
    }
}

/// How a virtual service spreads its connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The kernel's name of the scheduler. What the kernel shows may be one that we would never write.
    pub scheduler: String,
    /// Seconds for which a client stays with its destination; `None`: no persistence.
    pub persistence: Option<u32>,
}

impl Settings {
    /// Settings as we write them.
    pub fn new(scheduler: Scheduler, persistence: Option<u32>) -> Self {
        Self { scheduler: scheduler.as_str().to_owned(), persistence }
    }
}

/// A virtual service with its destinations and their weights (0: keeps its connections, gets no new ones).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VirtualService {
    /// Scheduler and persistence.
    pub settings: Settings,
    /// Destinations, all forwarded by masquerading.
    pub destinations: BTreeMap<SocketAddr, u32>,
}

/// What the kernel holds, or should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// All virtual services of address and port; as observed, those of others too.
    pub services: BTreeMap<ServiceKey, VirtualService>,
    /// The virtual services that are ours, which are also the open ports.
    pub ledger: BTreeSet<ServiceKey>,
    /// Addresses whose client traffic is masqueraded and whose other ports are shut.
    pub guarded: BTreeSet<IpAddr>,
}

/// One step: one message to the kernel (a new or changed set element, service or destination).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Masquerade traffic to this address and shut its ports.
    Guard(IpAddr),
    /// Write a service down as ours and open its port.
    Open(ServiceKey),
    /// Create a virtual service without destinations.
    AddService(ServiceKey, Settings),
    /// Change scheduler or persistence.
    SetService(ServiceKey, Settings),
    /// Add a destination with a weight.
    AddDestination(ServiceKey, SocketAddr, u32),
    /// Change a destination's weight.
    SetDestination(ServiceKey, SocketAddr, u32),
    /// Remove a destination.
    DeleteDestination(ServiceKey, SocketAddr),
    /// Remove a virtual service with its destinations.
    DeleteService(ServiceKey),
    /// Shut the port and strike the service from the ledger.
    Close(ServiceKey),
    /// Leave the address alone.
    Unguard(IpAddr),
}
