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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(n: u8) -> ServiceKey {
        ServiceKey {
            address: IpAddr::from([10, 87, 2, n / 4]),
            protocol: if n.is_multiple_of(2) { Protocol::Tcp } else { Protocol::Sctp },
            port: 80 + u16::from(n % 4 / 2),
        }
    }

    fn pod(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 244, 1, n], 8080))
    }

    fn nets<const N: usize>(text: [&str; N]) -> BTreeSet<IpNet> {
        text.into_iter().map(|net| net.parse().unwrap()).collect()
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

    fn ranges() -> impl Strategy<Value = BTreeMap<ServiceKey, BTreeSet<IpNet>>> {
        let net = (0..3u8).prop_map(|n| IpNet::new_assert([10, n, 0, 0].into(), 16));
        let nets = prop::collection::btree_set(net, 0..3);
        prop::collection::btree_map((0..12u8).prop_map(key), nets, 0..8)
    }

    /// What is said of clients concerns services that there are.
    fn desired() -> impl Strategy<Value = Tables> {
        (services(), addresses(), ranges(), ranges()).prop_map(
            |(services, guarded, mut direct, mut sources)| {
                direct.retain(|key, _| services.contains_key(key));
                sources.retain(|key, _| services.contains_key(key));
                Tables {
                    ledger: services.keys().copied().collect(),
                    services,
                    guarded,
                    direct,
                    sources,
                    ..Tables::default()
                }
            },
        )
    }

    /// Anything goes: services of others, ledger entries without a service, guards and networks without either.
    fn observed() -> impl Strategy<Value = Tables> {
        let ledger = prop::collection::btree_set((0..12u8).prop_map(key), 0..10);
        (services(), ledger, addresses(), ranges(), ranges()).prop_map(
            |(services, ledger, guarded, direct, sources)| Tables {
                services,
                ledger,
                guarded,
                direct,
                sources,
                ..Tables::default()
            },
        )
    }

    /// Services that are open now and will be: who may connect is what it was or what it is to be, nothing in between. For
    /// those that open it is what it is to be at once.
    fn open_as_wide_as_may_be(kernel: &Tables, observed: &Tables, desired: &Tables) -> bool {
        kernel.ledger.iter().all(|key| {
            let (now, before, after) =
                (kernel.sources.get(key), observed.sources.get(key), desired.sources.get(key));
            let old = now == before && observed.ledger.contains(key);
            old || (now == after && desired.services.contains_key(key))
        })
    }

    /// A service that is opened has its clients masqueraded, or not, as desired from the start.
    fn masqueraded_from_the_start(kernel: &Tables, observed: &Tables, desired: &Tables) -> bool {
        let opened = kernel.ledger.difference(&observed.ledger);
        opened.into_iter().all(|key| kernel.direct.get(key) == desired.direct.get(key))
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
                // What our own table says of the clients of one is not theirs.
                let forgets = matches!(change, Change::Indirect(_) | Change::Unrestrict(_));
                let touches = change.key().is_some_and(|key| others.contains_key(key));
                prop_assert!(forgets || !touches, "{change} touches a foreign entry");
                kernel.apply(change);
                prop_assert!(open_as_wide_as_may_be(&kernel, &observed, &desired), "{change} lets others in");
                prop_assert!(masqueraded_from_the_start(&kernel, &observed, &desired), "{change} is early");
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
            expected.direct.retain(|key, _| !conflicts.contains(key));
            expected.sources.retain(|key, _| !conflicts.contains(key));
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
            direct: BTreeMap::from([(key(1), nets(["10.244.1.0/24"]))]),
            sources: BTreeMap::from([(key(1), nets(["192.0.2.0/24", "10.0.0.0/8"]))]),
            ..Tables::default()
        };
        let words = |plan: Plan| plan.changes.iter().map(Change::to_string).collect::<Vec<_>>();
        assert_eq!(
            words(plan(&desired, &Tables::default())),
            [
                "guard 10.87.2.0",
                "open TCP 10.87.2.0:80",
                "restrict SCTP 10.87.2.0:80 to 10.0.0.0/8, 192.0.2.0/24",
                "masquerade clients of SCTP 10.87.2.0:80 only in 10.244.1.0/24",
                "open SCTP 10.87.2.0:80",
                "add service TCP 10.87.2.0:80 wlc",
                "add 10.244.1.1:8080 to TCP 10.87.2.0:80 with weight 1",
                "add 10.244.1.2:8080 to TCP 10.87.2.0:80 with weight 1",
                "add service SCTP 10.87.2.0:80 wlc",
                "add 10.244.1.1:8080 to SCTP 10.87.2.0:80 with weight 1",
                "add 10.244.1.2:8080 to SCTP 10.87.2.0:80 with weight 1",
            ]
        );
        assert_eq!(
            words(plan(&Tables::default(), &desired)),
            [
                "delete service TCP 10.87.2.0:80",
                "delete service SCTP 10.87.2.0:80",
                "close TCP 10.87.2.0:80",
                "close SCTP 10.87.2.0:80",
                "masquerade all clients of SCTP 10.87.2.0:80",
                "restrict SCTP 10.87.2.0:80 no longer",
                "unguard 10.87.2.0",
            ]
        );
    }

    #[test]
    fn who_is_masqueraded_changes_when_the_destinations_fit() {
        let service = |n| VirtualService {
            settings: Settings::new(Scheduler::Wlc, None),
            destinations: BTreeMap::from([(pod(n), 1)]),
        };
        let all = Tables {
            services: BTreeMap::from([(key(0), service(1))]),
            ledger: BTreeSet::from([key(0)]),
            ..Tables::default()
        };
        let mut direct = all.clone();
        direct.services.insert(key(0), service(2));
        direct.direct.insert(key(0), nets([]));
        let (add, delete) =
            (|n| Change::AddDestination(key(0), pod(n), 1), |n| Change::DeleteDestination(key(0), pod(n)));
        assert_eq!(plan(&direct, &all).changes, [add(2), delete(1), Change::Direct(key(0), nets([]))]);
        assert_eq!(plan(&all, &direct).changes, [Change::Indirect(key(0)), add(1), delete(2)]);
    }

    #[test]
    fn what_only_stays_where_it_is_gets_weight_0_and_is_never_added() {
        let service = |weights: &[(u8, u32)]| VirtualService {
            settings: Settings::new(Scheduler::Wlc, None),
            destinations: weights.iter().map(|(n, weight)| (pod(*n), *weight)).collect(),
        };
        let tables = |weights: &[(u8, u32)]| Tables {
            services: BTreeMap::from([(key(0), service(weights))]),
            ledger: BTreeSet::from([key(0)]),
            ..Tables::default()
        };
        let mut desired = tables(&[(1, 1)]);
        desired.kept = BTreeSet::from([(key(0), pod(2)), (key(1), pod(3))]);
        let steps = |weights| plan(&desired, &tables(weights)).changes;
        assert_eq!(steps(&[(1, 1), (2, 1)]), [Change::SetDestination(key(0), pod(2), 0)]);
        assert_eq!(steps(&[(1, 1), (2, 0)]), []);
        assert_eq!(steps(&[(1, 1)]), []);
        assert_eq!(steps(&[(1, 1), (3, 1)]), [Change::DeleteDestination(key(0), pod(3))]);
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
            ..Tables::default()
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
