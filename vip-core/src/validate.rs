//! Raw objects -> checked ones. What the API server's rules should have refused is refused here again, in a sentence
//! that names the object, so that a malformed object hurts only itself.
//!
//! The plugin checks before it writes, the agents before they act. What takes more than the virtual IPs and the
//! pools to judge (Services, nodes, interfaces) is not judged here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use kube::ResourceExt;

use crate::api::{
    HealthCheck, HealthCheckType, Reason, Scheduler, ServiceRef, VIPPool, VirtualIP, VirtualRouterRange,
    name_of,
};
use crate::checks::Settings;
use crate::pool::{AddressSet, Span, parse_address};

/// Most Services on one address.
pub const MAX_SERVICES: usize = 8;
/// Longest time for which a client stays with its backend, in seconds: a day.
pub const MAX_PERSISTENCE_SECONDS: u32 = 86_400;

/// Why an object is not acted upon.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {why}")]
pub struct Fault {
    /// Kind and name, such as `VirtualIP 10.0.0.9`.
    pub object: String,
    /// The word for a condition: [`Reason::Invalid`] or [`Reason::Rejected`].
    pub reason: Reason,
    /// What is wrong, the rest of the sentence.
    pub why: String,
}

/// A virtual IP that keeps the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedVip {
    /// The address; also its name, see [`name_of`].
    pub address: IpAddr,
    /// The Services that answer there; none: a bare address.
    pub services: Vec<ServiceRef>,
    /// Virtual router identifier, 1 to 255.
    pub virtual_router: u8,
    /// Scheduler of its virtual services.
    pub scheduler: Scheduler,
    /// Seconds for which a client stays with its backend; `None`: as the Service says.
    pub persistence_seconds: Option<u32>,
    /// The node that should own it.
    pub preferred_node: Option<String>,
    /// How its owner checks the backends; `None`: not at all.
    pub check: Option<Settings>,
}

impl CheckedVip {
    /// Checks an object by itself.
    pub fn new(raw: &VirtualIP) -> Result<Self, Fault> {
        let name = raw.name_any();
        let invalid =
            |why: String| Fault { object: format!("VirtualIP {name}"), reason: Reason::Invalid, why };
        let spec = &raw.spec;

        let address = parse_address(&spec.address).map_err(|e| invalid(format!("spec.address {e}")))?;
        if address.to_string() != spec.address {
            return Err(invalid(format!(
                "spec.address {:?} is not canonical: write {address}",
                spec.address
            )));
        }
        if name_of(address) != name {
            return Err(invalid(format!(
                "its name does not agree with its address {address}: it must be {}",
                name_of(address)
            )));
        }
        if let Some(kind) = not_unicast(address) {
            return Err(invalid(format!("{address} is {kind}, not a unicast address of the LAN")));
        }
        if spec.virtual_router == 0 {
            return Err(invalid("virtual router identifiers are 1 to 255, not 0".to_owned()));
        }
        if let Some(seconds) = spec.persistence_seconds
            && !(1..=MAX_PERSISTENCE_SECONDS).contains(&seconds)
        {
            return Err(invalid(format!(
                "persistence is 1 to {MAX_PERSISTENCE_SECONDS} seconds, not {seconds}"
            )));
        }
        check_services(&spec.services).map_err(invalid)?;
        let check = check_settings(spec.health_check.unwrap_or_default()).map_err(invalid)?;
        Ok(Self {
            address,
            services: spec.services.clone(),
            virtual_router: spec.virtual_router,
            scheduler: spec.scheduler,
            persistence_seconds: spec.persistence_seconds,
            preferred_node: spec.preferred_node.clone(),
            check,
        })
    }

    /// The name of its object.
    pub fn name(&self) -> String {
        name_of(self.address)
    }

    /// The pool that holds the address, or why it must not be bound.
    pub fn pool<'a>(&self, pools: &'a [CheckedPool]) -> Result<&'a CheckedPool, Fault> {
        let rejected = |why: String| Fault {
            object: format!("VirtualIP {}", self.name()),
            reason: Reason::Rejected,
            why,
        };
        let pool = pool_of(pools, self.address).ok_or_else(|| rejected(in_no_pool(pools, self.address)))?;
        match self.services.iter().find(|service| !pool.allows(&service.namespace)) {
            Some(service) => Err(rejected(format!(
                "pool {:?} is not for namespace {:?} (service {service}): it allows {}",
                pool.name,
                service.namespace,
                pool.namespaces.iter().cloned().collect::<Vec<_>>().join(", ")
            ))),
            None => Ok(pool),
        }
    }

    /// What is wrong with its virtual router: addresses of two pools would move together, and not every node may have both.
    pub fn stray(&self, pool: &CheckedPool, pools: &[CheckedPool]) -> Option<Fault> {
        let has = |pool: &&CheckedPool| pool.virtual_routers.iter().any(|id| id == self.virtual_router);
        if has(&pool) {
            return None;
        }
        let range = |pool: &CheckedPool| {
            let VirtualRouterRange { first, count } = pool.virtual_routers;
            format!("pool {:?} ({first}-{})", pool.name, first.saturating_add(count - 1))
        };
        let whose =
            pools.iter().find(has).map_or_else(String::new, |other| format!(", but of {}", range(other)));
        let why = format!("virtual router {} is none of {}{whose}", self.virtual_router, range(pool));
        Some(Fault { object: format!("VirtualIP {}", self.name()), reason: Reason::Rejected, why })
    }
}

/// How backends are checked; `None`: not at all.
fn check_settings(raw: HealthCheck) -> Result<Option<Settings>, String> {
    let HealthCheck { type_, interval_seconds, timeout_seconds, failure_threshold, success_threshold } = raw;
    for (field, value, most) in [
        ("intervalSeconds", interval_seconds, 300),
        ("timeoutSeconds", timeout_seconds, interval_seconds.min(60)),
        ("failureThreshold", failure_threshold, 10),
        ("successThreshold", success_threshold, 10),
    ] {
        if !(1..=most).contains(&value) {
            return Err(format!("healthCheck.{field} is 1 to {most}, not {value}"));
        }
    }
    Ok((type_ == HealthCheckType::Tcp).then(|| Settings {
        interval: Duration::from_secs(interval_seconds.into()),
        timeout: Duration::from_secs(timeout_seconds.into()),
        failures: failure_threshold,
        successes: success_threshold,
    }))
}

fn check_services(services: &[ServiceRef]) -> Result<(), String> {
    if services.len() > MAX_SERVICES {
        return Err(format!("it names {} Services, at most {MAX_SERVICES} fit one address", services.len()));
    }
    let mut seen = BTreeSet::new();
    for service in services {
        if service.namespace.is_empty() || service.name.is_empty() {
            return Err("it names a Service without namespace or name".to_owned());
        }
        if !seen.insert(service) {
            return Err(format!("it names service {service} twice"));
        }
    }
    Ok(())
}

/// The kind of an address that is not a unicast address of a LAN, in words; `None` for one that is.
pub fn not_unicast(address: IpAddr) -> Option<&'static str> {
    if address.is_unspecified() {
        Some("the unspecified address")
    } else if address.is_loopback() {
        Some("a loopback address")
    } else if address.is_multicast() {
        Some("a multicast address")
    } else {
        match address {
            IpAddr::V4(a) if a.is_link_local() => Some("a link-local address"),
            IpAddr::V4(a) if a.is_broadcast() => Some("the broadcast address"),
            IpAddr::V6(a) if a.is_unicast_link_local() => Some("a link-local address"),
            _ => None,
        }
    }
}

/// Addresses that no pool may hold.
const NEVER: [&str; 9] = [
    "0.0.0.0",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/4",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::/10",
    "ff00::/8",
];

/// The first run of addresses of a set that no virtual IP may have.
fn first_unusable(set: &AddressSet) -> Option<Span> {
    // The list is a constant and parses: see the test.
    AddressSet::parse_whole(&NEVER).ok().and_then(|never| set.overlap(&never))
}

/// A pool that keeps the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedPool {
    /// Name of its object.
    pub name: String,
    /// The addresses that may be given out.
    pub addresses: AddressSet,
    /// The addresses as they are written in the object, for messages.
    pub text: String,
    /// Whether an address may be drawn without naming the pool.
    pub auto_assign: bool,
    /// Namespaces that may draw; none: all.
    pub namespaces: BTreeSet<String>,
    /// Virtual routers for new virtual IPs of the pool.
    pub virtual_routers: VirtualRouterRange,
    /// Labels that a node must have to compete.
    pub node_selector: BTreeMap<String, String>,
    /// The only interface to bind to; `None`: the one whose subnet holds the address.
    pub interface: Option<String>,
}

impl CheckedPool {
    /// Checks an object by itself.
    pub fn new(raw: &VIPPool) -> Result<Self, Fault> {
        let name = raw.name_any();
        let invalid = |why: String| Fault { object: format!("VIPPool {name}"), reason: Reason::Invalid, why };
        let spec = &raw.spec;

        let addresses =
            AddressSet::parse(&spec.addresses, &spec.exclude).map_err(|e| invalid(e.to_string()))?;
        if addresses.is_empty() {
            return Err(invalid("there is no address in it".to_owned()));
        }
        if let Some(span) = first_unusable(&addresses) {
            let kind = not_unicast(span.first()).unwrap_or("reserved");
            return Err(invalid(format!("{} is {kind}, not a unicast address of the LAN", span.first())));
        }
        let range = spec.virtual_routers;
        if range.first == 0 || range.count == 0 || u16::from(range.first) + u16::from(range.count) > 256 {
            return Err(invalid(format!(
                "virtual routers are 1 to 255: first {} and count {} do not fit",
                range.first, range.count
            )));
        }
        Ok(Self {
            name,
            addresses,
            text: spec.addresses.join(","),
            auto_assign: spec.auto_assign,
            namespaces: spec.namespaces.iter().cloned().collect(),
            virtual_routers: range,
            node_selector: spec.node_selector.clone(),
            interface: spec.interface.clone(),
        })
    }

    /// Whether Services of this namespace may have an address of the pool.
    pub fn allows(&self, namespace: &str) -> bool {
        self.namespaces.is_empty() || self.namespaces.contains(namespace)
    }
}

/// Checks each pool for itself: the good ones in the order of their names, and why the others are left out.
pub fn check_pools<'a>(raw: impl IntoIterator<Item = &'a VIPPool>) -> (Vec<CheckedPool>, Vec<Fault>) {
    let (mut good, mut faults) = (Vec::new(), Vec::new());
    for object in raw {
        match CheckedPool::new(object) {
            Ok(pool) => good.push(pool),
            Err(fault) => faults.push(fault),
        }
    }
    good.sort_by(|a, b| a.name.cmp(&b.name));
    faults.sort_by(|a, b| a.object.cmp(&b.object));
    (good, faults)
}

/// The pool that holds the address. Pools should not overlap; where they do, the first name wins on every node.
pub fn pool_of(pools: &[CheckedPool], address: IpAddr) -> Option<&CheckedPool> {
    pools.iter().filter(|pool| pool.addresses.contains(address)).min_by(|a, b| a.name.cmp(&b.name))
}

/// Says that an address is in no pool, and which pools there are.
pub fn in_no_pool(pools: &[CheckedPool], address: IpAddr) -> String {
    if pools.is_empty() {
        return format!("{address} is in no pool: there is none");
    }
    let known: Vec<String> = pools.iter().map(|pool| format!("{}: {}", pool.name, pool.text)).collect();
    format!("{address} is in no pool ({})", known.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{VIPPoolSpec, VirtualIPSpec};

    fn raw_vip(name: &str, address: &str) -> VirtualIP {
        VirtualIP::new(
            name,
            VirtualIPSpec {
                address: address.to_owned(),
                services: vec![ServiceRef { namespace: "shop".to_owned(), name: "web".to_owned() }],
                virtual_router: 100,
                scheduler: Scheduler::default(),
                persistence_seconds: None,
                preferred_node: None,
                health_check: None,
            },
        )
    }

    fn raw_pool(name: &str, addresses: &[&str]) -> VIPPool {
        VIPPool::new(
            name,
            VIPPoolSpec {
                addresses: addresses.iter().map(|a| (*a).to_owned()).collect(),
                exclude: Vec::new(),
                auto_assign: true,
                namespaces: Vec::new(),
                virtual_routers: VirtualRouterRange { first: 100, count: 64 },
                node_selector: BTreeMap::new(),
                interface: None,
            },
        )
    }

    fn vip_fault(name: &str, address: &str, change: impl FnOnce(&mut VirtualIPSpec)) -> String {
        let mut raw = raw_vip(name, address);
        change(&mut raw.spec);
        CheckedVip::new(&raw).unwrap_err().to_string()
    }

    fn pool_fault(addresses: &[&str], change: impl FnOnce(&mut VIPPoolSpec)) -> String {
        let mut raw = raw_pool("lab", addresses);
        change(&mut raw.spec);
        CheckedPool::new(&raw).unwrap_err().to_string()
    }

    #[test]
    fn good_virtual_ips() {
        let vip = CheckedVip::new(&raw_vip("10.0.0.9", "10.0.0.9")).unwrap();
        assert_eq!((vip.address.to_string(), vip.virtual_router), ("10.0.0.9".to_owned(), 100));
        let check = vip.check.unwrap();
        assert_eq!((check.interval, check.timeout), (Duration::from_secs(5), Duration::from_secs(3)));
        assert_eq!((check.failures, check.successes), (2, 1));
        let mut unchecked = raw_vip("10.0.0.9", "10.0.0.9");
        unchecked.spec.health_check =
            Some(HealthCheck { type_: HealthCheckType::None, ..HealthCheck::default() });
        assert_eq!(CheckedVip::new(&unchecked).unwrap().check, None);
        let v6 = CheckedVip::new(&raw_vip("fd87-0-0-0-0-0-2-50", "fd87::2:50")).unwrap();
        assert_eq!(v6.name(), "fd87-0-0-0-0-0-2-50");
    }

    #[test]
    fn malformed_virtual_ips_are_named_with_the_reason() {
        let keep = |_: &mut VirtualIPSpec| ();
        assert_eq!(
            vip_fault("x", "10.0.0", keep),
            r#"VirtualIP x: spec.address "10.0.0": not an IP address"#
        );
        assert_eq!(
            vip_fault("fd87-0-0-0-0-0-0-1", "FD87::1", keep),
            r#"VirtualIP fd87-0-0-0-0-0-0-1: spec.address "FD87::1" is not canonical: write fd87::1"#
        );
        assert_eq!(
            vip_fault("10.0.0.8", "10.0.0.9", keep),
            "VirtualIP 10.0.0.8: its name does not agree with its address 10.0.0.9: it must be 10.0.0.9"
        );
        for (address, kind) in [
            ("127.0.0.1", "a loopback"),
            ("224.0.0.18", "a multicast"),
            ("0.0.0.0", "the unspecified"),
            ("169.254.1.1", "a link-local"),
            ("255.255.255.255", "the broadcast"),
        ] {
            assert_eq!(
                vip_fault(address, address, keep),
                format!("VirtualIP {address}: {address} is {kind} address, not a unicast address of the LAN")
            );
        }
        assert!(vip_fault("fe80-0-0-0-0-0-0-1", "fe80::1", keep).contains("a link-local address"));
        assert!(vip_fault("10.0.0.9", "10.0.0.9", |s| s.virtual_router = 0).contains("1 to 255"));
        assert!(
            vip_fault("10.0.0.9", "10.0.0.9", |s| s.persistence_seconds = Some(0)).contains("1 to 86400")
        );
        let check = |change: fn(&mut HealthCheck)| {
            let mut check = HealthCheck::default();
            change(&mut check);
            vip_fault("10.0.0.9", "10.0.0.9", |s| s.health_check = Some(check))
        };
        for (fault, words) in [
            (check(|c| c.interval_seconds = 0), "healthCheck.intervalSeconds is 1 to 300, not 0"),
            (check(|c| c.interval_seconds = 2), "healthCheck.timeoutSeconds is 1 to 2, not 3"),
            (check(|c| c.failure_threshold = 11), "healthCheck.failureThreshold is 1 to 10, not 11"),
            (check(|c| c.success_threshold = 0), "healthCheck.successThreshold is 1 to 10, not 0"),
        ] {
            assert_eq!(fault, format!("VirtualIP 10.0.0.9: {words}"));
        }
        assert!(
            vip_fault("10.0.0.9", "10.0.0.9", |s| s.services.push(s.services[0].clone()))
                .contains("service shop/web twice")
        );
        assert!(
            vip_fault("10.0.0.9", "10.0.0.9", |s| s.services[0].name.clear()).contains("without namespace")
        );
        assert!(
            vip_fault("10.0.0.9", "10.0.0.9", |s| s.services = vec![s.services[0].clone(); 9])
                .contains("names 9 Services, at most 8")
        );
    }

    #[test]
    fn malformed_pools_are_named_with_the_reason() {
        let keep = |_: &mut VIPPoolSpec| ();
        assert_eq!(
            pool_fault(&["192.168.10.240/33"], keep),
            r#"VIPPool lab: "192.168.10.240/33": an IPv4 prefix is 0 to 32"#
        );
        assert_eq!(pool_fault(&[], keep), "VIPPool lab: there is no address in it");
        assert_eq!(
            pool_fault(&["10.0.0.1"], |s| s.exclude = vec!["10.0.0.0/24".to_owned()]),
            "VIPPool lab: there is no address in it"
        );
        assert_eq!(
            pool_fault(&["223.255.255.0-224.0.0.9"], keep),
            "VIPPool lab: 224.0.0.0 is a multicast address, not a unicast address of the LAN"
        );
        assert!(
            pool_fault(&["10.0.0.1"], |s| s.virtual_routers.first = 200).contains("first 200 and count 64")
        );
        assert!(pool_fault(&["10.0.0.1"], |s| s.virtual_routers.count = 0).contains("count 0"));
    }

    #[test]
    fn every_address_no_pool_may_hold_is_one_no_virtual_ip_may_have() {
        let never = AddressSet::parse_whole(&NEVER).unwrap();
        for span in never.spans() {
            assert!(not_unicast(span.first()).is_some() && not_unicast(span.last()).is_some(), "{span}");
        }
    }

    #[test]
    fn a_virtual_ip_needs_a_pool_that_allows_its_namespaces() {
        let mut shop = raw_pool("shop", &["10.0.1.0/28"]);
        shop.spec.namespaces = vec!["bank".to_owned(), "shop".to_owned()];
        let mut bank = raw_pool("bank", &["10.0.2.0/28"]);
        bank.spec.namespaces = vec!["bank".to_owned()];
        let broken = raw_pool("broken", &["10.0.3.9-10.0.3.1"]);
        let (pools, faults) = check_pools(&[shop, bank, broken]);
        assert_eq!(faults.len(), 1);
        assert_eq!(pools.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["bank", "shop"]);

        let admit = |address: &str| {
            let vip = CheckedVip::new(&raw_vip(address, address)).unwrap();
            vip.pool(&pools).map(|pool| pool.name.clone()).map_err(|fault| fault.to_string())
        };
        assert_eq!(admit("10.0.1.2"), Ok("shop".to_owned()));
        assert_eq!(
            admit("10.0.2.2").unwrap_err(),
            r#"VirtualIP 10.0.2.2: pool "bank" is not for namespace "shop" (service shop/web): it allows bank"#
        );
        assert_eq!(
            admit("10.0.3.2").unwrap_err(),
            "VirtualIP 10.0.3.2: 10.0.3.2 is in no pool (bank: 10.0.2.0/28; shop: 10.0.1.0/28)"
        );
        assert_eq!(in_no_pool(&[], "10.0.0.9".parse().unwrap()), "10.0.0.9 is in no pool: there is none");
    }

    #[test]
    fn a_virtual_router_is_one_of_the_pool() {
        let mut other = raw_pool("dmz", &["10.0.1.0/28"]);
        other.spec.virtual_routers = VirtualRouterRange { first: 50, count: 10 };
        let pools = check_pools(&[raw_pool("lab", &["10.0.0.0/28"]), other]).0;
        let fault = |router: u8| {
            let mut raw = raw_vip("10.0.0.9", "10.0.0.9");
            raw.spec.virtual_router = router;
            let vip = CheckedVip::new(&raw).unwrap();
            vip.stray(vip.pool(&pools).unwrap(), &pools).map(|fault| fault.to_string())
        };
        assert_eq!((fault(100), fault(163)), (None, None));
        let foreign = r#"VirtualIP 10.0.0.9: virtual router 59 is none of pool "lab" (100-163), but of pool "dmz" (50-59)"#;
        assert_eq!(fault(59).as_deref(), Some(foreign));
        let nobodys = r#"VirtualIP 10.0.0.9: virtual router 7 is none of pool "lab" (100-163)"#;
        assert_eq!(fault(7).as_deref(), Some(nobodys));
    }

    #[test]
    fn overlapping_pools_give_every_node_the_same_answer() {
        let (a, b) = (raw_pool("a", &["10.0.0.0/28"]), raw_pool("b", &["10.0.0.0/24"]));
        let address = "10.0.0.9".parse().unwrap();
        for order in [[&a, &b], [&b, &a]] {
            let pools: Vec<CheckedPool> = order.map(|pool| CheckedPool::new(pool).unwrap()).into();
            assert_eq!(pool_of(&pools, address).unwrap().name, "a");
        }
    }
}
