//! What the kernel should hold, what it holds, and the ordered changes between the two.
//!
//! The kernel's IPVS table has no owner field. Our own set of `address . protocol . port` (the *ledger*, kept in our
//! nftables table) says which virtual services are ours; nothing outside it is ever changed.

use std::collections::{BTreeMap, BTreeSet};
use std::iter::Peekable;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::api::Scheduler;

/// A transport that IPVS balances here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP, protocol 6.
    Tcp,
    /// UDP, protocol 17.
    Udp,
    /// SCTP, protocol 132.
    Sctp,
}

impl Protocol {
    /// Every transport that there is.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// The transport with a protocol number.
    pub fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|protocol| protocol.number() == number)
    }

    /// The protocol number of the IP header.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
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

/// As [`ServiceKey`] is displayed.
impl std::str::FromStr for ServiceKey {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (protocol, at) = text.split_once(' ').ok_or(())?;
        let protocol = Protocol::ALL.into_iter().find(|one| one.to_string() == protocol).ok_or(())?;
        let at: SocketAddr = at.parse().map_err(drop)?;
        Ok(Self { address: at.ip(), protocol, port: at.port() })
    }
}

/// The weight under which a destination shows that is not forwarded by masquerading: somebody changed ours. The
/// kernel's own weights are at most `i32::MAX`, so it differs from whatever is desired and is put right or removed.
pub const NOT_MASQUERADED: u32 = u32::MAX;

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

impl VirtualService {
    /// Whether a destination takes new connections.
    pub fn is_served(&self) -> bool {
        self.destinations.values().any(|weight| *weight > 0)
    }
}

/// What the kernel holds, or should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// All virtual services of address and port; as observed, those of others too (their destinations may be left out:
    /// nobody asks for them).
    pub services: BTreeMap<ServiceKey, VirtualService>,
    /// The virtual services that are ours, which are also the open ports. As desired it follows from `services`.
    pub ledger: BTreeSet<ServiceKey>,
    /// Addresses whose client traffic is masqueraded and whose other ports are shut.
    pub guarded: BTreeSet<IpAddr>,
    /// The virtual services whose clients are not masqueraded, so that the pods see their addresses; with the networks whose
    /// clients are masqueraded all the same, because a pod's answer to them would not come by this node. The networks of a
    /// service do not overlap.
    pub direct: BTreeMap<ServiceKey, BTreeSet<IpNet>>,
    /// The virtual services that only some may connect to, with the networks of these clients, which do not overlap. None:
    /// nobody may. A service that is not here is open to all.
    pub sources: BTreeMap<ServiceKey, BTreeSet<IpNet>>,
    /// Destinations that are not wanted and keep the connections that they have, should they be in the kernel: at weight 0.
    /// Nothing observes them.
    pub kept: BTreeSet<(ServiceKey, SocketAddr)>,
}

/// One step: one message to the kernel (a new or changed set element, service or destination), or a few that take effect as
/// one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Masquerade traffic to this address and shut its ports.
    Guard(IpAddr),
    /// Let only clients of these networks connect to a service; all that were allowed before no longer count.
    Restrict(ServiceKey, BTreeSet<IpNet>),
    /// Masquerade only those clients of a service that are in these networks.
    Direct(ServiceKey, BTreeSet<IpNet>),
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
    /// Masquerade all clients of a service.
    Indirect(ServiceKey),
    /// Let everybody connect to a service.
    Unrestrict(ServiceKey),
    /// Leave the address alone.
    Unguard(IpAddr),
}

impl Change {
    /// The service that the step is about; `None` for the steps that concern an address.
    pub fn key(&self) -> Option<&ServiceKey> {
        match self {
            Self::Guard(_) | Self::Unguard(_) => None,
            Self::Restrict(key, _)
            | Self::Direct(key, _)
            | Self::Open(key)
            | Self::AddService(key, _)
            | Self::SetService(key, _)
            | Self::AddDestination(key, ..)
            | Self::SetDestination(key, ..)
            | Self::DeleteDestination(key, _)
            | Self::DeleteService(key)
            | Self::Close(key)
            | Self::Indirect(key)
            | Self::Unrestrict(key) => Some(key),
        }
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Guard(address) => write!(f, "guard {address}"),
            Self::Restrict(key, ranges) => write!(f, "restrict {key} to {}", list(ranges)),
            Self::Direct(key, ranges) => write!(f, "masquerade clients of {key} only in {}", list(ranges)),
            Self::Open(key) => write!(f, "open {key}"),
            Self::AddService(key, settings) => write!(f, "add service {key} {}", settings.scheduler),
            Self::SetService(key, settings) => write!(f, "set service {key} {}", settings.scheduler),
            Self::AddDestination(key, to, weight) => write!(f, "add {to} to {key} with weight {weight}"),
            Self::SetDestination(key, to, weight) => write!(f, "set {to} of {key} to weight {weight}"),
            Self::DeleteDestination(key, to) => write!(f, "delete {to} from {key}"),
            Self::DeleteService(key) => write!(f, "delete service {key}"),
            Self::Close(key) => write!(f, "close {key}"),
            Self::Indirect(key) => write!(f, "masquerade all clients of {key}"),
            Self::Unrestrict(key) => write!(f, "restrict {key} no longer"),
            Self::Unguard(address) => write!(f, "unguard {address}"),
        }
    }
}

/// Networks in words.
fn list(ranges: &BTreeSet<IpNet>) -> String {
    match ranges.is_empty() {
        true => "nothing".to_owned(),
        false => ranges.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", "),
    }
}

impl Tables {
    /// Adds what an earlier agent has left in the kernel, which may have heard more than these tables were made from: its
    /// services, and destinations of those that are known here too.
    pub fn adopt(&mut self, found: &Self) {
        self.guarded.extend(&found.guarded);
        for key in &found.ledger {
            let Some(left) = found.services.get(key) else { continue };
            let service = self.services.entry(*key).or_insert_with(|| VirtualService {
                settings: left.settings.clone(),
                ..VirtualService::default()
            });
            let served = service.is_served();
            for (to, weight) in &left.destinations {
                if *weight != NOT_MASQUERADED && !self.kept.contains(&(*key, *to)) {
                    service.destinations.entry(*to).or_insert(*weight);
                }
            }
            let is_new = self.ledger.insert(*key);
            if is_new && let Some(near) = found.direct.get(key) {
                self.direct.insert(*key, near.clone());
            }
            if is_new || served != service.is_served() {
                match found.sources.get(key) {
                    Some(clients) => self.sources.insert(*key, clients.clone()),
                    None => self.sources.remove(key),
                };
            }
        }
    }

    /// Puts what was found of some services in the place of what was known of them.
    pub fn replace(&mut self, keys: &BTreeSet<ServiceKey>, found: Self) {
        for key in keys {
            self.services.remove(key);
            self.ledger.remove(key);
            self.direct.remove(key);
            self.sources.remove(key);
        }
        self.services.extend(found.services);
        self.ledger.extend(found.ledger);
        self.direct.extend(found.direct);
        self.sources.extend(found.sources);
    }

    /// What the kernel does with a change. A step that makes no sense (a destination of a service that is not there) does
    /// nothing, as a step that is done already.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Guard(address) => {
                self.guarded.insert(*address);
            }
            Change::Unguard(address) => {
                self.guarded.remove(address);
            }
            Change::Restrict(key, ranges) => {
                self.sources.insert(*key, ranges.clone());
            }
            Change::Unrestrict(key) => {
                self.sources.remove(key);
            }
            Change::Direct(key, ranges) => {
                self.direct.insert(*key, ranges.clone());
            }
            Change::Indirect(key) => {
                self.direct.remove(key);
            }
            Change::Open(key) => {
                self.ledger.insert(*key);
            }
            Change::Close(key) => {
                self.ledger.remove(key);
            }
            Change::AddService(key, settings) => {
                self.services.entry(*key).or_default().settings = settings.clone();
            }
            Change::SetService(key, settings) => {
                if let Some(service) = self.services.get_mut(key) {
                    service.settings = settings.clone();
                }
            }
            Change::AddDestination(key, to, weight) => {
                if let Some(service) = self.services.get_mut(key) {
                    service.destinations.insert(*to, *weight);
                }
            }
            Change::SetDestination(key, to, weight) => {
                if let Some(known) =
                    self.services.get_mut(key).and_then(|service| service.destinations.get_mut(to))
                {
                    *known = *weight;
                }
            }
            Change::DeleteDestination(key, to) => {
                if let Some(service) = self.services.get_mut(key) {
                    service.destinations.remove(to);
                }
            }
            Change::DeleteService(key) => {
                self.services.remove(key);
            }
        }
    }
}

/// The way from what the kernel holds to what it should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The steps, in the order in which they are to be taken.
    pub changes: Vec<Change>,
    /// Desired services whose address and port somebody else's service occupies. No step touches those.
    pub conflicts: Vec<ServiceKey>,
}

impl Plan {
    /// The same steps, those first that make or change services of these addresses. What the steps of one service are, and
    /// their order, stays.
    pub fn first(mut self, addresses: &BTreeSet<IpAddr>) -> Self {
        let fills = |change: &Change| {
            matches!(
                change,
                Change::AddService(..)
                    | Change::SetService(..)
                    | Change::AddDestination(..)
                    | Change::SetDestination(..)
                    | Change::DeleteDestination(..)
            )
        };
        for run in self.changes.chunk_by_mut(|a, b| fills(a) == fills(b)) {
            if run.first().is_some_and(fills) {
                run.sort_by_key(|change| !change.key().is_some_and(|key| addresses.contains(&key.address)));
            }
        }
        self
    }
}

/// The fewest steps from `observed` to `desired`.
///
/// The order keeps these promises whenever the steps stop half-way: whatever is in the kernel and ours is in the ledger
/// (opened before the service is added, closed after it is gone); an address that has a service is guarded; a service that
/// takes connections before and after takes them in between (new destinations before old ones go); a service that not all
/// may use is restricted before it is opened, until it is closed; and its clients are masqueraded as desired from its first
/// one on. The pods of a service that is to become direct are put in place first, those of one that no longer is follow:
/// answers of the others would not come back.
pub fn plan(desired: &Tables, observed: &Tables) -> Plan {
    let mut conflicts = Vec::new();
    let mut wanted = Vec::new();
    let mut there = Along::new(&observed.services);
    let mut ours = Along::new(observed.ledger.iter().map(|key| (key, ())));
    // Most are as they should be, and there is nothing to say of them.
    let same_clients = desired.sources == observed.sources && desired.direct == observed.direct;
    for (key, service) in &desired.services {
        match (there.at(key), ours.at(key).is_some()) {
            (Some(_), false) => conflicts.push(*key),
            (Some(old), true) if same_clients && old == service => {}
            (old, open) => wanted.push((*key, service, old, open)),
        }
    }
    let mut services = Along::new(&desired.services);
    let dropped: Vec<&ServiceKey> = observed.ledger.iter().filter(|key| services.at(key).is_none()).collect();

    let mut changes = Vec::new();
    changes.extend(desired.guarded.difference(&observed.guarded).copied().map(Change::Guard));
    let mut directed = Vec::new();
    let mut sources = [Along::new(&desired.sources), Along::new(&observed.sources)];
    let mut direct = [Along::new(&desired.direct), Along::new(&observed.direct)];
    for (key, _, _, open) in &wanted {
        match sources.each_mut().map(|side| side.at(key)) {
            [Some(new), old] if old != Some(new) => changes.push(Change::Restrict(*key, new.clone())),
            [None, Some(_)] => changes.push(Change::Unrestrict(*key)),
            _ => {}
        }
        match direct.each_mut().map(|side| side.at(key)) {
            [Some(new), None] if *open => directed.push(Change::Direct(*key, new.clone())),
            [Some(new), old] if old != Some(new) => changes.push(Change::Direct(*key, new.clone())),
            [None, Some(_)] => changes.push(Change::Indirect(*key)),
            _ => {}
        }
        changes.extend((!open).then_some(Change::Open(*key)));
    }
    for (key, service, old, _) in wanted {
        match old {
            None => create(key, service, &mut changes),
            Some(old) if old == service => {}
            Some(old) => adjust(key, service, old, &desired.kept, &mut changes),
        }
    }
    let mut there = Along::new(&observed.services);
    let standing = dropped.iter().filter(|key| there.at(key).is_some());
    changes.extend(standing.map(|key| Change::DeleteService(**key)));
    changes.append(&mut directed);
    changes.extend(dropped.into_iter().copied().map(Change::Close));
    // What is said of a service that is not (or no longer) ours.
    let stale = |key: &&ServiceKey| foreign(observed, key) || !desired.services.contains_key(key);
    changes.extend(observed.direct.keys().filter(stale).copied().map(Change::Indirect));
    changes.extend(observed.sources.keys().filter(stale).copied().map(Change::Unrestrict));
    changes.extend(observed.guarded.difference(&desired.guarded).copied().map(Change::Unguard));
    Plan { changes, conflicts }
}

/// Looks up keys in a sorted list, each greater than the one before. A walk beside thousands of keys is far cheaper than a
/// search for each of them.
pub struct Along<I: Iterator>(Peekable<I>);

impl<'a, V, I: Iterator<Item = (&'a ServiceKey, V)>> Along<I> {
    /// At the beginning of the list.
    pub fn new(list: impl IntoIterator<IntoIter = I>) -> Self {
        Self(list.into_iter().peekable())
    }

    /// What the list has for a key.
    pub fn at(&mut self, key: &ServiceKey) -> Option<V> {
        while self.0.next_if(|(at, _)| *at < key).is_some() {}
        self.0.next_if(|(at, _)| *at == key).map(|(_, value)| value)
    }
}

/// Whether a service stands there that is not ours.
fn foreign(observed: &Tables, key: &ServiceKey) -> bool {
    observed.services.contains_key(key) && !observed.ledger.contains(key)
}

fn create(key: ServiceKey, service: &VirtualService, changes: &mut Vec<Change>) {
    changes.push(Change::AddService(key, service.settings.clone()));
    changes.extend(service.destinations.iter().map(|(to, weight)| Change::AddDestination(key, *to, *weight)));
}

/// What gives connections a place comes before what takes one away.
fn adjust(
    key: ServiceKey,
    new: &VirtualService,
    old: &VirtualService,
    kept: &BTreeSet<(ServiceKey, SocketAddr)>,
    changes: &mut Vec<Change>,
) {
    if new.settings != old.settings {
        changes.push(Change::SetService(key, new.settings.clone()));
    }
    let mut lowered = Vec::new();
    for (to, weight) in &new.destinations {
        match old.destinations.get(to) {
            None => changes.push(Change::AddDestination(key, *to, *weight)),
            Some(before) if before == weight => {}
            Some(_) if *weight == 0 => lowered.push(Change::SetDestination(key, *to, 0)),
            Some(_) => changes.push(Change::SetDestination(key, *to, *weight)),
        }
    }
    for (to, before) in old.destinations.iter().filter(|(to, _)| !new.destinations.contains_key(to)) {
        match (kept.contains(&(key, *to)), before) {
            (true, 0) => {}
            (true, _) => lowered.push(Change::SetDestination(key, *to, 0)),
            (false, _) => lowered.push(Change::DeleteDestination(key, *to)),
        }
    }
    changes.append(&mut lowered);
}

#[cfg(test)]
mod tests;
