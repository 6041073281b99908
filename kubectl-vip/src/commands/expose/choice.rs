//! Which pools and addresses are in question, decided on what was read; writing is up to `expose`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use vip_core::api::{ForeignRouterStatus, ServiceRef, VIPNode, VIPPool, VirtualIP};
use vip_core::pool::{AddressSet, choose_virtual_router, next_free, used};
use vip_core::validate::{CheckedPool, check_pools, in_no_pool, pool_of};
use vip_core::vrrp::Family;

use crate::cluster::silence;
use crate::commands::pool::lan::{Lan, range_text};
use crate::commands::pool::{self, taken};
use crate::exit::{Failure, Result};

/// The pools and virtual IPs of the cluster, as they were read.
#[derive(Clone)]
pub struct World {
    /// The pools that keep the rules.
    pub pools: Vec<CheckedPool>,
    /// All of them, for their names.
    raw_pools: Vec<VIPPool>,
    /// All virtual IPs.
    pub vips: Vec<VirtualIP>,
    /// Routers of others that agents hear, each with the networks of the interface.
    foreign: Vec<(ForeignRouterStatus, Vec<IpNet>)>,
    /// Addresses that machines have, and which.
    hosts: BTreeMap<IpAddr, String>,
    /// The networks in which nodes are.
    near: Vec<AddressSet>,
}

impl World {
    /// Checks the pools, and takes from the nodes what they hear of others.
    pub fn new(raw_pools: Vec<VIPPool>, vips: Vec<VirtualIP>, nodes: &[VIPNode], now: Timestamp) -> Self {
        let live = nodes.iter().filter(|node| silence(node, now).is_none());
        let (mut foreign, mut near) = (Vec::new(), Vec::new());
        for status in live.filter_map(|node| node.status.as_ref()) {
            for router in &status.foreign_routers {
                let interface = status.interfaces.iter().find(|i| i.name == router.interface);
                let networks = interface.iter().flat_map(|i| &i.addresses).filter_map(|a| a.parse().ok());
                foreign.push((router.clone(), networks.collect()));
            }
            let own = status.interfaces.iter().flat_map(|interface| &interface.addresses);
            // One that no virtual IP could be in, a link-local one say, is none.
            near.extend(own.filter_map(|network| AddressSet::parse_whole(&[network]).ok()));
        }
        let hosts = Lan::new(Vec::new(), &[], nodes, &[]).hosts().collect();
        Self { pools: check_pools(&raw_pools).0, raw_pools, vips, foreign, hosts, near }
    }

    /// Takes in what pools and virtual IPs there are now.
    pub fn renew(&mut self, raw_pools: Vec<VIPPool>, vips: Vec<VirtualIP>) {
        (self.pools, self.raw_pools, self.vips) = (check_pools(&raw_pools).0, raw_pools, vips);
    }

    /// Takes in the addresses of nodes.
    pub fn add_hosts(&mut self, nodes: &[Node]) {
        self.hosts.extend(Lan::new(Vec::new(), nodes, &[], &[]).hosts());
    }

    /// Why nobody may have an address: it is a node's own.
    pub fn refuse_host(&self, address: IpAddr) -> Result<()> {
        let Some(owner) = self.hosts.get(&address) else { return Ok(()) };
        let hint = pool_of(&self.pools, address).map_or_else(
            || "name an address that no machine has".to_owned(),
            |pool| format!("keep it out of the pool: kubectl vip pool set {} --exclude {address}", pool.name),
        );
        Err(Failure::new(format!(
            "{address} is the address of {owner}: as a virtual IP it would cut that off"
        ))
        .hint(hint))
    }

    /// The virtual IP with this address.
    pub fn vip(&self, address: IpAddr) -> Option<&VirtualIP> {
        self.vips.iter().find(|vip| vip.spec.address.parse() == Ok(address))
    }

    /// Takes in what was written.
    pub fn know(&mut self, vip: &VirtualIP) {
        self.vips.retain(|other| other.spec.address != vip.spec.address);
        self.vips.push(vip.clone());
    }

    /// The virtual IPs of a Service.
    pub fn of(&self, service: &ServiceRef) -> impl Iterator<Item = &VirtualIP> {
        self.vips.iter().filter(move |vip| vip.spec.services.contains(service))
    }

    /// Name of the pool that holds an address.
    pub fn pool_name(&self, address: &str) -> Option<&str> {
        pool_of(&self.pools, address.parse().ok()?).map(|pool| pool.name.as_str())
    }

    /// Addresses that may not be given out.
    pub fn taken(&self) -> BTreeSet<IpAddr> {
        taken(&self.vips).into_iter().chain(self.hosts.keys().copied()).collect()
    }

    /// The virtual router for a new virtual IP: none that others of the LAN have, and none of another pool while there
    /// is a choice. One that must not move with others gets one that no other virtual IP has.
    pub fn virtual_router(&self, pool: &CheckedPool, address: IpAddr, applicant: &Applicant) -> Result<u8> {
        let in_use: Vec<u8> = self
            .vips
            .iter()
            .filter(|vip| vip.spec.address.parse().is_ok_and(|a: IpAddr| a.is_ipv4() == address.is_ipv4()))
            .map(|vip| vip.spec.virtual_router)
            .collect();
        let position = pool.addresses.position(address).unwrap_or(0);
        let choose = |avoid: &BTreeSet<u8>| {
            choose_virtual_router(pool.virtual_routers, in_use.iter().copied(), avoid, position)
        };
        let foreign = self.foreign_near(address);
        let theirs: BTreeSet<u8> = foreign.keys().copied().collect();
        let others = self.pools.iter().filter(|other| other.name != pool.name);
        let both: BTreeSet<u8> =
            others.flat_map(|other| other.virtual_routers.iter()).chain(theirs.iter().copied()).collect();
        if applicant.alone {
            let used: BTreeSet<u8> = in_use.iter().copied().collect();
            let free = choose(&(&both | &used)).or_else(|| choose(&(&theirs | &used)));
            return free.ok_or_else(|| {
                Failure::new(format!(
                    "all virtual routers of pool {:?} ({}) are in use, and service {} needs one of its own: its \
                     externalTrafficPolicy is Local, so its address follows its own pods",
                    pool.name,
                    range_text(pool.virtual_routers),
                    applicant.at
                ))
                .hint(format!("give it more: kubectl vip pool set {} --virtual-routers FIRST-LAST", pool.name))
            });
        }
        choose(&both).or_else(|| choose(&theirs)).ok_or_else(|| {
            let heard: Vec<String> = pool
                .virtual_routers
                .iter()
                .filter_map(|id| foreign.get(&id).map(|address| format!("{id} of {address}")))
                .take(3)
                .collect();
            Failure::new(format!(
                "all virtual routers of pool {:?} ({}) belong to other routers of the LAN: {}{}",
                pool.name,
                range_text(pool.virtual_routers),
                heard.join(", "),
                if usize::from(pool.virtual_routers.count) > heard.len() { ", ..." } else { "" }
            ))
            .hint(format!("give it others: kubectl vip pool set {} --virtual-routers FIRST-LAST", pool.name))
        })
    }

    /// Virtual routers that others have on the LAN of an address, and who.
    fn foreign_near(&self, address: IpAddr) -> BTreeMap<u8, &str> {
        let family = if address.is_ipv4() { 4 } else { 6 };
        self.foreign
            .iter()
            .filter(|(router, networks)| {
                // An interface that nobody describes may be on any LAN.
                let near = networks.is_empty() || networks.iter().any(|network| network.contains(&address));
                router.family == family && near
            })
            .map(|(router, _)| (router.virtual_router, router.address.as_str()))
            .collect()
    }

    /// For each family of a Service of which there are addresses, its preferred one first, the pools from which it may
    /// draw, in the order in which they are tried. There is at least one family.
    pub fn pools_for<'a>(
        &'a self,
        applicant: &Applicant,
        wanted: Option<&str>,
    ) -> Result<Vec<(Family, Vec<&'a CheckedPool>)>> {
        let namespace = &applicant.at.namespace;
        if let Some(name) = wanted {
            let raw = pool::named(&self.raw_pools, name)?;
            let checked = self.pools.iter().find(|pool| pool.name == name).ok_or_else(|| {
                pool::checked(raw).err().unwrap_or_else(|| Failure::new(format!("pool {name:?} is broken")))
            })?;
            if !checked.allows(namespace) {
                return Err(not_for(checked, namespace));
            }
            let families = applicant.families.iter().filter(|family| checked.addresses.has(**family));
            let found: Vec<_> = families.map(|family| (*family, vec![checked])).collect();
            if found.is_empty() {
                let only = checked.addresses.spans().first().map(|span| word(Family::of(span.first())));
                let (only, text) = (only.unwrap_or_default(), &checked.text);
                return Err(applicant.lacks(&format!("pool {name:?} has {only} addresses only ({text})")));
            }
            return Ok(found);
        }
        if self.pools.is_empty() {
            return Err(Failure::new("there is no pool to draw an address from").hint(
                "kubectl vip pool create NAME RANGE, such as: kubectl vip pool create lab 192.168.10.240/28",
            ));
        }
        let allowed: Vec<&'a CheckedPool> = self.pools.iter().filter(|pool| pool.allows(namespace)).collect();
        let (automatic, named): (Vec<&'a CheckedPool>, Vec<&'a CheckedPool>) =
            allowed.iter().partition(|pool| pool.auto_assign);
        let with = |pools: &[&'a CheckedPool]| -> Vec<(Family, Vec<&'a CheckedPool>)> {
            let of = |family: Family| {
                let of_family = pools.iter().copied().filter(move |pool| pool.addresses.has(family));
                let mut pools: Vec<&'a CheckedPool> = of_family.collect();
                pools.sort_by_key(|pool| !self.is_near(pool));
                pools
            };
            let all = applicant.families.iter().map(|family| (*family, of(*family)));
            all.filter(|(_, pools): &(Family, Vec<_>)| !pools.is_empty()).collect()
        };
        let found = with(&automatic);
        if !found.is_empty() {
            return Ok(found);
        }
        if let Some((family, named)) = with(&named).into_iter().next() {
            let what = if automatic.is_empty() {
                "addresses".to_owned()
            } else {
                format!("{} addresses", word(family))
            };
            let sentence = format!("no pool gives {what} to namespace {namespace:?} without being named");
            let name = named.first().map_or("NAME", |pool| pool.name.as_str());
            return Err(Failure::new(sentence).hint(format!("name it: --pool {name}")));
        }
        if allowed.is_empty() {
            let sentence = format!("no pool gives addresses to namespace {namespace:?} without being named");
            return Err(
                Failure::new(sentence).hint("kubectl vip pool list shows which namespaces each pool allows")
            );
        }
        let pools: Vec<String> = allowed.iter().map(|pool| format!("{}: {}", pool.name, pool.text)).collect();
        Err(applicant.lacks(&format!("no pool has {} addresses ({})", applicant.words(), pools.join("; "))))
    }

    /// Whether a node is on the LAN of some address of the pool, as far as is known.
    fn is_near(&self, pool: &CheckedPool) -> bool {
        self.near.is_empty() || self.near.iter().any(|network| network.overlaps(&pool.addresses))
    }

    /// The pools from which a Service may draw an address of a family.
    pub fn pools_of<'a>(
        &'a self,
        applicant: &Applicant,
        wanted: Option<&str>,
        family: Family,
    ) -> Result<Vec<&'a CheckedPool>> {
        let found = self.pools_for(applicant, wanted)?.into_iter().find(|(other, _)| *other == family);
        found
            .map(|(_, pools)| pools)
            .ok_or_else(|| Failure::new(format!("no pool has {} addresses", word(family))))
    }

    /// The first address of this family that is free in these pools, in the order in which they are tried.
    pub fn free<'a>(
        &self,
        family: Family,
        pools: &[&'a CheckedPool],
        taken: &BTreeSet<IpAddr>,
    ) -> Option<(&'a CheckedPool, IpAddr)> {
        pools.iter().find_map(|pool| Some((*pool, next_free(&part(pool, family), taken).next()?)))
    }

    /// Says that these pools are full, and what would help.
    pub fn exhausted(
        &self,
        family: Family,
        pools: &[&CheckedPool],
        namespace: &str,
        taken: &BTreeSet<IpAddr>,
    ) -> Failure {
        let full: Vec<String> = pools
            .iter()
            .map(|pool| {
                let (all, part) = (pool.addresses.len(), part(pool, family).len());
                let what =
                    if part < all { format!("{} addresses", word(family)) } else { "addresses".to_owned() };
                format!("pool {:?}: 0 of {part} {what} free", pool.name)
            })
            .collect();
        let name = pools.first().map_or("NAME", |pool| pool.name.as_str());
        let other = self.pools.iter().find(|pool| {
            let part = part(pool, family);
            pool.allows(namespace) && u128::from(used(&part, taken)) < part.len()
        });
        let or = other.map_or_else(String::new, |pool| format!(", or --pool {}", pool.name));
        Failure::new(full.join("; ")).hint(format!("kubectl vip pool set {name} --add RANGE{or}"))
    }

    /// The pool of a named address, or why the Service cannot have it.
    pub fn pool_of_ip(&self, address: IpAddr, applicant: &Applicant) -> Result<&CheckedPool> {
        let family = Family::of(address);
        if !applicant.families.contains(&family) {
            return Err(applicant.lacks(&format!("{address} is an {} address", word(family))));
        }
        self.refuse_host(address)?;
        let Some(pool) = pool_of(&self.pools, address) else {
            let alike = Applicant { families: vec![family], ..applicant.clone() };
            let next = self.pools_of(&alike, None, family).ok();
            let next = next.and_then(|pools| self.free(family, &pools, &self.taken()));
            let next = next.map_or_else(String::new, |(_, address)| format!("; next free: {address}"));
            return Err(Failure::new(format!("{}{next}", in_no_pool(&self.pools, address))));
        };
        match pool.allows(&applicant.at.namespace) {
            true => Ok(pool),
            false => Err(not_for(pool, &applicant.at.namespace)),
        }
    }
}

/// Who asks for an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applicant {
    /// The Service.
    pub at: ServiceRef,
    /// The families over which its pods can be reached, the preferred one first.
    pub families: Vec<Family>,
    /// Whether its address may not move with others (`externalTrafficPolicy: Local`).
    pub alone: bool,
}

impl Applicant {
    /// Its families as they are written.
    fn words(&self) -> String {
        let words: Vec<&str> = self.families.iter().map(|family| word(*family)).collect();
        words.join(" and ")
    }

    /// It cannot be reached over the family that something has.
    fn lacks(&self, what: &str) -> Failure {
        let Self { at, .. } = self;
        Failure::new(format!("service {at} is {} only, and {what}", self.words())).hint(format!(
            "in a dual-stack cluster it can have both: kubectl patch service {} -n {} -p \
             '{{\"spec\":{{\"ipFamilyPolicy\":\"PreferDualStack\"}}}}'",
            at.name, at.namespace
        ))
    }
}

/// A family as it is written.
fn word(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// The addresses of a pool that are of one family.
fn part(pool: &CheckedPool, family: Family) -> AddressSet {
    let others = match family {
        Family::V4 => "::/0",
        Family::V6 => "0.0.0.0/0",
    };
    AddressSet::parse_whole(&[others]).map(|others| pool.addresses.minus(&others)).unwrap_or_default()
}

/// Says whose an address is.
pub fn belongs(vip: &VirtualIP) -> String {
    let services: Vec<String> = vip.spec.services.iter().map(ToString::to_string).collect();
    match services.as_slice() {
        [] => {
            format!("{} is a virtual IP without a Service, all ports of its owner are open", vip.spec.address)
        }
        [one] => format!("{} belongs to service {one}", vip.spec.address),
        many => format!("{} belongs to services {}", vip.spec.address, many.join(" and ")),
    }
}

/// The pool is not for Services of this namespace.
pub fn not_for(pool: &CheckedPool, namespace: &str) -> Failure {
    let allowed: Vec<&str> = pool.namespaces.iter().map(String::as_str).collect();
    Failure::new(format!(
        "pool {:?} is not for namespace {namespace:?}: it allows {}",
        pool.name,
        allowed.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vip_core::api::VirtualRouterRange;

    use super::*;
    use crate::commands::pool::draft;

    fn vip(address: &str, services: &[&str]) -> VirtualIP {
        let services: Vec<_> =
            services.iter().map(|name| json!({"namespace": "shop", "name": name})).collect();
        serde_json::from_value(json!({
            "metadata": {"name": address},
            "spec": {"address": address, "virtualRouter": 100, "services": services},
        }))
        .unwrap()
    }

    fn world(vips: &[&str]) -> World {
        let pool = |name: &str, range: &str, first| {
            draft(name, &[range.to_owned()], VirtualRouterRange { first, count: 8 })
        };
        let mut edge = pool("edge", "10.0.0.1-10.0.0.4", 100);
        edge.spec.auto_assign = false;
        edge.spec.namespaces = vec!["bank".to_owned()];
        let lab = pool("lab", "192.168.10.240/30", 108);
        let old = pool("old", "10.9.0.9-10.9.0.1", 116);
        let vips = vips.iter().map(|address| vip(address, &["web"])).collect();
        World::new(vec![lab, edge, old], vips, &[], now())
    }

    fn applicant(namespace: &str, families: &[Family]) -> Applicant {
        let at = ServiceRef { namespace: namespace.to_owned(), name: "web".to_owned() };
        Applicant { at, families: families.to_vec(), alone: false }
    }

    fn shop() -> Applicant {
        applicant("shop", &[Family::V4])
    }

    fn bank() -> Applicant {
        applicant("bank", &[Family::V4])
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn now() -> Timestamp {
        "2026-01-01T00:00:10Z".parse().unwrap()
    }

    fn sentence<T>(result: Result<T>) -> String {
        result.err().map_or_else(String::new, |failure| failure.to_string())
    }

    #[test]
    fn the_lowest_free_address_of_an_automatic_pool() {
        let world = world(&["192.168.10.241"]);
        let (family, pools) = world.pools_for(&shop(), None).unwrap().swap_remove(0);
        let taken = world.taken();
        let (pool, address) = world.free(family, &pools, &taken).unwrap();
        assert_eq!((pool.name.as_str(), address.to_string()), ("lab", "192.168.10.242".to_owned()));
        assert_eq!(world.virtual_router(pool, address, &shop()), Ok(109), "at its place in the pool");
    }

    #[test]
    fn a_pool_on_whose_lan_no_node_is_comes_last() {
        let range = VirtualRouterRange { first: 1, count: 9 };
        let pools = [("far", "10.0.0.0/28"), ("near", "192.168.10.240/28")]
            .map(|(name, addresses)| draft(name, &[addresses.to_owned()], range));
        let order = |renewed: &str| -> Vec<String> {
            let interface = json!({"name": "eth0", "mac": "m", "addresses": ["fe80::11/64", "192.168.10.11/24"], "carrier": true});
            let node = json!({"metadata": {"name": "node-1"}, "status": {"renewTime": renewed, "interfaces": [interface]}});
            let world =
                World::new(pools.to_vec(), Vec::new(), &[serde_json::from_value(node).unwrap()], now());
            let (_, pools) = world.pools_for(&shop(), None).unwrap().swap_remove(0);
            pools.iter().map(|pool| pool.name.clone()).collect()
        };
        assert_eq!(order("2026-01-01T00:00:05Z"), ["near", "far"]);
        assert_eq!(order("2025-12-31T00:00:00Z"), ["far", "near"], "of no node is anything known");
    }

    #[test]
    fn virtual_routers_of_others_are_avoided() {
        let range = |first| VirtualRouterRange { first, count: 2 };
        let node = |heard: &[(u8, u8, &str)], renewed: &str| -> VIPNode {
            let foreign: Vec<_> = heard
                .iter()
                .map(|(id, family, interface)| {
                    json!({"address": "192.168.10.7", "interface": interface, "family": family,
                           "virtualRouter": id, "priority": 100})
                })
                .collect();
            serde_json::from_value(json!({
                "metadata": {"name": "node-1"},
                "status": {
                    "renewTime": renewed, "foreignRouters": foreign,
                    "interfaces": [
                        {"name": "eth0", "mac": "m", "addresses": ["192.168.10.11/24"], "carrier": true},
                        {"name": "eth1", "mac": "m", "addresses": ["10.0.0.11/24"], "carrier": true},
                    ],
                },
            }))
            .unwrap()
        };
        let choose = |other, nodes: &[VIPNode]| {
            let pools = [("lab", "192.168.10.240/30", 50), ("edge", "10.9.0.0/30", other)]
                .map(|(name, addresses, first)| draft(name, &[addresses.to_owned()], range(first)));
            let world = World::new(pools.into(), Vec::new(), nodes, now());
            world.virtual_router(&world.pools[1], "192.168.10.241".parse().unwrap(), &shop())
        };
        let lately = "2026-01-01T00:00:05Z";
        assert_eq!(choose(60, &[]), Ok(50));
        assert_eq!(choose(60, &[node(&[(50, 4, "eth0")], lately)]), Ok(51));
        assert_eq!(choose(60, &[node(&[(50, 6, "eth0")], lately)]), Ok(50), "of the other family");
        assert_eq!(choose(60, &[node(&[(50, 4, "eth1")], lately)]), Ok(50), "on another LAN");
        assert_eq!(choose(60, &[node(&[(50, 4, "eth0")], "2025-12-31T00:00:00Z")]), Ok(50), "long ago");
        assert_eq!(choose(49, &[]), Ok(51), "one that another pool has, too");
        assert_eq!(choose(49, &[node(&[(51, 4, "eth0")], lately)]), Ok(50), "rather than a foreign one");
        assert_eq!(
            sentence(choose(60, &[node(&[(50, 4, "eth0"), (51, 4, "eth0")], lately)])),
            "Error: all virtual routers of pool \"lab\" (50-51) belong to other routers of the LAN: \
             50 of 192.168.10.7, 51 of 192.168.10.7\n\
             hint: give it others: kubectl vip pool set lab --virtual-routers FIRST-LAST"
        );
    }

    #[test]
    fn the_address_of_a_node_is_no_virtual_ip() {
        let node: VIPNode = serde_json::from_value(json!({
            "metadata": {"name": "node-1"},
            "status": {"interfaces": [
                {"name": "eth0", "mac": "m", "addresses": ["192.168.10.241/24"], "carrier": true}]},
        }))
        .unwrap();
        let mut world = world(&[]);
        world = World::new(world.raw_pools, world.vips, &[node], now());
        let machine = json!({
            "metadata": {"name": "node-2"},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.168.10.242"},
                                     {"type": "Hostname", "address": "node-2"}]},
        });
        world.add_hosts(&[serde_json::from_value(machine).unwrap()]);
        assert_eq!(
            sentence(world.pool_of_ip(ip("192.168.10.241"), &shop())),
            "Error: 192.168.10.241 is the address of node node-1: as a virtual IP it would cut that off\n\
             hint: keep it out of the pool: kubectl vip pool set lab --exclude 192.168.10.241"
        );
        let (family, pools) = world.pools_for(&shop(), None).unwrap().swap_remove(0);
        assert!(world.free(family, &pools, &world.taken()).is_none(), "neither is drawn");
    }

    #[test]
    fn an_address_that_follows_its_own_pods_moves_with_no_other() {
        let alone = Applicant { alone: true, ..shop() };
        let choose = |count, vips: Vec<VirtualIP>| {
            let range = VirtualRouterRange { first: 100, count };
            let pool = draft("lab", &["192.168.10.240/29".to_owned()], range);
            let world = World::new(vec![pool], vips, &[], now());
            world.virtual_router(&world.pools[0], "192.168.10.243".parse().unwrap(), &alone)
        };
        let other = || vec![vip("192.168.10.241", &["api"])];
        assert_eq!(choose(2, other()), Ok(101));
        assert_eq!(
            sentence(choose(1, other())),
            "Error: all virtual routers of pool \"lab\" (100) are in use, and service shop/web needs one of its own: its \
             externalTrafficPolicy is Local, so its address follows its own pods\n\
             hint: give it more: kubectl vip pool set lab --virtual-routers FIRST-LAST"
        );
    }

    #[test]
    fn pools_that_do_not_serve_a_namespace() {
        let world = world(&[]);
        assert_eq!(
            sentence(world.pools_for(&shop(), Some("edge"))),
            r#"Error: pool "edge" is not for namespace "shop": it allows bank"#
        );
        assert!(sentence(world.pools_for(&shop(), Some("lba"))).contains(r#"did you mean "lab"?"#));
        assert!(sentence(world.pools_for(&shop(), Some("old"))).contains("a range goes upwards"));
        assert_eq!(world.pools_for(&bank(), Some("edge")).unwrap()[0].1.len(), 1);
        let none = World::new(Vec::new(), Vec::new(), &[], now());
        assert!(sentence(none.pools_for(&shop(), None)).contains("there is no pool"));
        let mut only = draft("edge", &["10.0.0.1".to_owned()], VirtualRouterRange { first: 1, count: 1 });
        only.spec.auto_assign = false;
        let only = World::new(vec![only], Vec::new(), &[], now());
        assert!(sentence(only.pools_for(&shop(), None)).ends_with("hint: name it: --pool edge"));
    }

    #[test]
    fn a_full_pool_says_what_would_help() {
        let world = world(&["192.168.10.241", "192.168.10.242"]);
        let (family, pools) = world.pools_for(&bank(), None).unwrap().swap_remove(0);
        let taken = world.taken();
        assert!(world.free(family, &pools, &taken).is_none());
        assert_eq!(
            world.exhausted(family, &pools, "bank", &taken).to_string(),
            "Error: pool \"lab\": 0 of 2 addresses free\nhint: kubectl vip pool set lab --add RANGE, or --pool edge"
        );
        assert!(
            world
                .exhausted(family, &pools, "shop", &taken)
                .to_string()
                .ends_with("hint: kubectl vip pool set lab --add RANGE")
        );
    }

    #[test]
    fn named_addresses() {
        let world = world(&["192.168.10.241"]);
        assert_eq!(
            sentence(world.pool_of_ip(ip("172.16.0.9"), &shop())),
            "Error: 172.16.0.9 is in no pool (edge: 10.0.0.1-10.0.0.4; lab: 192.168.10.240/30); next free: 192.168.10.242"
        );
        assert!(sentence(world.pool_of_ip(ip("10.0.0.1"), &shop())).contains("not for namespace"));
        assert_eq!(world.pool_of_ip(ip("10.0.0.1"), &bank()).unwrap().name, "edge");
    }

    const HINT: &str = "hint: in a dual-stack cluster it can have both: kubectl patch service web -n shop -p \
                        '{\"spec\":{\"ipFamilyPolicy\":\"PreferDualStack\"}}'";

    /// Pools `four` and `six`, each of one family, and `both`, which has to be named.
    fn families(vips: &[&str]) -> World {
        let pool = |name: &str, ranges: &[&str], first| {
            let ranges: Vec<String> = ranges.iter().map(|range| (*range).to_owned()).collect();
            draft(name, &ranges, VirtualRouterRange { first, count: 8 })
        };
        let mut both = pool("both", &["10.0.0.1", "fd87::3:1-fd87::3:2"], 100);
        both.spec.auto_assign = false;
        let pools = vec![both, pool("four", &["10.9.0.0/30"], 108), pool("six", &["fd87::2:0/112"], 116)];
        World::new(pools, vips.iter().map(|address| vip(address, &["api"])).collect(), &[], now())
    }

    #[test]
    fn the_address_is_of_the_family_of_the_service() {
        use Family::{V4, V6};
        let world = families(&["fd87::2:0", "10.0.0.1"]);
        let drawn = |families: &[Family], pool| {
            let (family, pools) = world.pools_for(&applicant("shop", families), pool).unwrap().swap_remove(0);
            world
                .free(family, &pools, &world.taken())
                .map(|(pool, address)| format!("{} {address}", pool.name))
        };
        assert_eq!(drawn(&[V4], None).unwrap(), "four 10.9.0.1");
        assert_eq!(drawn(&[V6], None).unwrap(), "six fd87::2:1");
        let both = applicant("shop", &[V4, V6]);
        let families = world.pools_for(&both, None).unwrap().into_iter().map(|(family, _)| family);
        assert_eq!(families.collect::<Vec<_>>(), [V4, V6], "an address of each");
        assert_eq!(drawn(&[V4, V6], None).unwrap(), "four 10.9.0.1");
        assert_eq!(drawn(&[V6, V4], None).unwrap(), "six fd87::2:1");
        assert_eq!(drawn(&[V6, V4], Some("four")).unwrap(), "four 10.9.0.1", "what the pool has");
        assert_eq!(drawn(&[V4, V6], Some("six")).unwrap(), "six fd87::2:1");
        assert_eq!(drawn(&[V6], Some("both")).unwrap(), "both fd87::3:1");
        assert_eq!(
            drawn(&[V4, V6], Some("both")),
            None,
            "no other family than asked for because one is full"
        );
        let (family, pools) =
            world.pools_for(&applicant("shop", &[V4]), Some("both")).unwrap().swap_remove(0);
        assert_eq!(
            world.exhausted(family, &pools, "shop", &world.taken()).to_string(),
            "Error: pool \"both\": 0 of 1 IPv4 addresses free\nhint: kubectl vip pool set both --add RANGE, or --pool four"
        );
    }

    #[test]
    fn families_that_do_not_meet() {
        let (four, six) = (applicant("shop", &[Family::V4]), applicant("shop", &[Family::V6]));
        let mut world = families(&[]);
        assert_eq!(
            sentence(world.pools_for(&six, Some("four"))),
            format!(
                "Error: service shop/web is IPv6 only, and pool \"four\" has IPv4 addresses only (10.9.0.0/30)\n{HINT}"
            )
        );
        assert_eq!(
            sentence(world.pool_of_ip(ip("fd87::2:50"), &four)),
            format!("Error: service shop/web is IPv4 only, and fd87::2:50 is an IPv6 address\n{HINT}")
        );
        assert_eq!(world.pool_of_ip(ip("fd87::2:50"), &six).unwrap().name, "six");
        assert!(sentence(world.pool_of_ip(ip("fd87::9"), &six)).ends_with("; next free: fd87::2:0"));
        world.pools.retain(|pool| pool.name != "six");
        assert_eq!(
            sentence(world.pools_for(&six, None)),
            "Error: no pool gives IPv6 addresses to namespace \"shop\" without being named\nhint: name it: --pool both"
        );
        world.pools.retain(|pool| pool.name == "four");
        assert_eq!(
            sentence(world.pools_for(&six, None)),
            format!(
                "Error: service shop/web is IPv6 only, and no pool has IPv6 addresses (four: 10.9.0.0/30)\n{HINT}"
            )
        );
    }

    #[test]
    fn whose_an_address_is() {
        assert_eq!(belongs(&vip("10.0.0.1", &["web"])), "10.0.0.1 belongs to service shop/web");
        assert_eq!(
            belongs(&vip("10.0.0.1", &["web", "api"])),
            "10.0.0.1 belongs to services shop/web and shop/api"
        );
        assert!(belongs(&vip("10.0.0.1", &[])).contains("without a Service"));
    }
}
