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

impl Change {
    /// The service that the step is about; `None` for the steps that concern an address.
    pub fn key(&self) -> Option<&ServiceKey> {
        match self {
            Self::Guard(_) | Self::Unguard(_) => None,
            Self::Open(key)
            | Self::AddService(key, _)
            | Self::SetService(key, _)
            | Self::AddDestination(key, ..)
            | Self::SetDestination(key, ..)
            | Self::DeleteDestination(key, _)
            | Self::DeleteService(key)
            | Self::Close(key) => Some(key),
        }
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Guard(address) => write!(f, "guard {address}"),
            Self::Open(key) => write!(f, "open {key}"),
            Self::AddService(key, settings) => write!(f, "add service {key} {}", settings.scheduler),
            Self::SetService(key, settings) => write!(f, "set service {key} {}", settings.scheduler),
            Self::AddDestination(key, to, weight) => write!(f, "add {to} to {key} with weight {weight}"),
            Self::SetDestination(key, to, weight) => write!(f, "set {to} of {key} to weight {weight}"),
            Self::DeleteDestination(key, to) => write!(f, "delete {to} from {key}"),
            Self::DeleteService(key) => write!(f, "delete service {key}"),
            Self::Close(key) => write!(f, "close {key}"),
            Self::Unguard(address) => write!(f, "unguard {address}"),
        }
    }
}

impl Tables {
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
/// The order keeps three promises whenever the steps stop half-way: whatever is in the kernel and ours is in the
/// ledger (opened before the service is added, closed after it is gone); an address that has a service is guarded; and a
/// service that takes connections before and after takes them in between (new destinations before old ones go).
pub fn plan(desired: &Tables, observed: &Tables) -> Plan {
    let conflicts: Vec<ServiceKey> =
        desired.services.keys().filter(|key| foreign(observed, key)).copied().collect();
    let wanted = || desired.services.iter().filter(|(key, _)| !foreign(observed, key));
    let dropped = || observed.ledger.iter().filter(|key| !desired.services.contains_key(key));

    let mut changes = Vec::new();
    changes.extend(desired.guarded.difference(&observed.guarded).copied().map(Change::Guard));
    changes
        .extend(wanted().map(|(key, _)| *key).filter(|key| !observed.ledger.contains(key)).map(Change::Open));
    for (key, service) in wanted() {
        match observed.services.get(key) {
            None => create(*key, service, &mut changes),
            Some(old) => adjust(*key, service, old, &mut changes),
        }
    }
    changes.extend(
        dropped().filter(|key| observed.services.contains_key(key)).copied().map(Change::DeleteService),
    );
    changes.extend(dropped().copied().map(Change::Close));
    changes.extend(observed.guarded.difference(&desired.guarded).copied().map(Change::Unguard));
    Plan { changes, conflicts }
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
fn adjust(key: ServiceKey, new: &VirtualService, old: &VirtualService, changes: &mut Vec<Change>) {
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
    changes.append(&mut lowered);
    let gone = old.destinations.keys().filter(|to| !new.destinations.contains_key(to));
    changes.extend(gone.map(|to| Change::DeleteDestination(key, *to)));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(n: u8) -> ServiceKey {
        ServiceKey {
            address: IpAddr::from([10, 87, 2, n / 4]),
            protocol: if n.is_multiple_of(2) { Protocol::Tcp } else { Protocol::Udp },
            port: 80 + u16::from(n % 4 / 2),
        }
    }

    fn pod(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 244, 1, n], 8080))
    }

    fn settings() -> impl Strategy<Value = Settings> {
        (prop::sample::select(vec!["wlc", "rr"]), prop::sample::select(vec![None, Some(60)]))
            .prop_map(|(scheduler, persistence)| Settings { scheduler: scheduler.to_owned(), persistence })
    }

    fn service() -> impl Strategy<Value = VirtualService> {
        let destinations = prop::collection::btree_map((0..5u8).prop_map(pod), 0..3u32, 0..5);
        (settings(), destinations)
            .prop_map(|(settings, destinations)| VirtualService { settings, destinations })
    }

    fn services() -> impl Strategy<Value = BTreeMap<ServiceKey, VirtualService>> {
        prop::collection::btree_map((0..12u8).prop_map(key), service(), 0..10)
    }

    fn addresses() -> impl Strategy<Value = BTreeSet<IpAddr>> {
        prop::collection::btree_set((0..12u8).prop_map(|n| key(n).address), 0..3)
    }

    fn desired() -> impl Strategy<Value = Tables> {
        (services(), addresses()).prop_map(|(services, guarded)| Tables {
            ledger: services.keys().copied().collect(),
            services,
            guarded,
        })
    }

    /// Anything goes: services of others, ledger entries without a service, guards without either.
    fn observed() -> impl Strategy<Value = Tables> {
        let ledger = prop::collection::btree_set((0..12u8).prop_map(key), 0..10);
        (services(), ledger, addresses()).prop_map(|(services, ledger, guarded)| Tables {
            services,
            ledger,
            guarded,
        })
    }

    fn takes_connections(tables: &Tables, key: &ServiceKey) -> bool {
        tables
            .services
            .get(key)
            .is_some_and(|service| service.destinations.values().any(|weight| *weight > 0))
    }

    fn has_destinations(tables: &Tables, key: &ServiceKey) -> bool {
        tables.services.get(key).is_some_and(|service| !service.destinations.is_empty())
    }

    proptest! {
        #[test]
        fn leads_to_what_is_desired_and_leaves_others_alone(
            desired in desired(), observed in observed(), owned in addresses(),
        ) {
            let plan = plan(&desired, &observed).first(&owned);
            let others: BTreeMap<_, _> =
                observed.services.iter().filter(|(key, _)| foreign(&observed, key)).map(|(k, v)| (*k, v.clone())).collect();

            let mut kernel = observed.clone();
            for change in &plan.changes {
                prop_assert!(change.key().is_none_or(|key| !others.contains_key(key)), "{change} touches a foreign entry");
                kernel.apply(change);
                for key in kernel.services.keys() {
                    prop_assert!(kernel.ledger.contains(key) || others.contains_key(key), "{key} is in no ledger");
                    for holds in [takes_connections, has_destinations] {
                        if holds(&observed, key) && holds(&desired, key) {
                            prop_assert!(holds(&kernel, key), "{key} is deaf after {change}");
                        }
                    }
                }
            }

            let conflicts: Vec<_> = desired.services.keys().filter(|key| others.contains_key(key)).copied().collect();
            prop_assert_eq!(&plan.conflicts, &conflicts);
            let mut expected = desired.clone();
            expected.services.extend(others);
            expected.ledger.retain(|key| !conflicts.contains(key));
            prop_assert_eq!(&kernel, &expected);
            prop_assert_eq!(super::plan(&desired, &kernel).changes, vec![]);
        }

        /// Steps are for different things, so none could be saved.
        #[test]
        fn takes_the_fewest_steps(desired in desired(), observed in observed()) {
            let changes = plan(&desired, &observed).changes;
            for (n, change) in changes.iter().enumerate() {
                let mut without = observed.clone();
                let mut with = observed.clone();
                changes.iter().enumerate().filter(|(m, _)| *m != n).for_each(|(_, c)| without.apply(c));
                changes.iter().for_each(|c| with.apply(c));
                prop_assert_ne!(with, without, "{} was not needed", change);
            }
        }

        #[test]
        fn one_endpoint_is_one_step(desired in desired(), chosen in any::<prop::sample::Index>(), weight in 0..3u32) {
            prop_assume!(!desired.services.is_empty());
            let key = *chosen.get(&desired.services.keys().collect::<Vec<_>>());
            let mut more = desired.clone();
            more.apply(&Change::AddDestination(*key, pod(99), weight));
            prop_assert_eq!(plan(&more, &desired).changes, vec![Change::AddDestination(*key, pod(99), weight)]);
            prop_assert_eq!(plan(&desired, &more).changes, vec![Change::DeleteDestination(*key, pod(99))]);
        }
    }

    #[test]
    fn order_from_nothing_and_back() {
        let service = VirtualService {
            settings: Settings::new(Scheduler::Wlc, None),
            destinations: BTreeMap::from([(pod(1), 1), (pod(2), 1)]),
        };
        let desired = Tables {
            services: BTreeMap::from([(key(0), service.clone()), (key(1), service)]),
            ledger: BTreeSet::from([key(0), key(1)]),
            guarded: BTreeSet::from([key(0).address]),
        };
        let words = |plan: Plan| plan.changes.iter().map(Change::to_string).collect::<Vec<_>>();
        assert_eq!(
            words(plan(&desired, &Tables::default())),
            [
                "guard 10.87.2.0",
                "open TCP 10.87.2.0:80",
                "open UDP 10.87.2.0:80",
                "add service TCP 10.87.2.0:80 wlc",
                "add 10.244.1.1:8080 to TCP 10.87.2.0:80 with weight 1",
                "add 10.244.1.2:8080 to TCP 10.87.2.0:80 with weight 1",
                "add service UDP 10.87.2.0:80 wlc",
                "add 10.244.1.1:8080 to UDP 10.87.2.0:80 with weight 1",
                "add 10.244.1.2:8080 to UDP 10.87.2.0:80 with weight 1",
            ]
        );
        assert_eq!(
            words(plan(&Tables::default(), &desired)),
            [
                "delete service TCP 10.87.2.0:80",
                "delete service UDP 10.87.2.0:80",
                "close TCP 10.87.2.0:80",
                "close UDP 10.87.2.0:80",
                "unguard 10.87.2.0",
            ]
        );
    }

    #[test]
    fn a_flushed_table_is_filled_again_and_a_changed_scheduler_set() {
        let service = VirtualService {
            settings: Settings::new(Scheduler::Wlc, None),
            destinations: BTreeMap::from([(pod(1), 1)]),
        };
        let desired = Tables {
            services: BTreeMap::from([(key(0), service)]),
            ledger: BTreeSet::from([key(0)]),
            guarded: BTreeSet::new(),
        };
        let mut flushed = desired.clone();
        flushed.services.clear();
        assert_eq!(
            plan(&desired, &flushed).changes,
            [
                Change::AddService(key(0), Settings::new(Scheduler::Wlc, None)),
                Change::AddDestination(key(0), pod(1), 1)
            ]
        );
        let mut other = desired.clone();
        let persistent = Settings::new(Scheduler::Rr, Some(60));
        other.apply(&Change::SetService(key(0), persistent.clone()));
        other.apply(&Change::SetDestination(key(0), pod(1), NOT_MASQUERADED));
        assert_eq!(
            plan(&desired, &other).changes,
            [
                Change::SetService(key(0), Settings::new(Scheduler::Wlc, None)),
                Change::SetDestination(key(0), pod(1), 1)
            ]
        );
    }
}
