//! From the objects of the API to what this node should do: the tables of its kernel and the elections it enters.

mod clients;
mod node;
mod objects;
mod planner;
mod service;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

pub use node::{Carrier, Node};
pub use objects::{Backing, Objects};
pub use planner::Planner;

use crate::api::{Backends, EXCLUDE_LABEL, Reason};
use crate::checks::Settings;
use crate::plan::{ServiceKey, Tables};
use crate::validate::{CheckedPool, CheckedVip, Fault};
use crate::vrrp::{Family, Peer, RouterConfig, RouterId, rank};

/// How long a preferred node that is fit again lets the owner be, so that one that comes and goes does not take the
/// addresses with it each time.
const PREEMPT_DELAY: Duration = Duration::from_secs(1);

/// A word for programs and a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The word.
    pub reason: Reason,
    /// The sentence.
    pub message: String,
}

impl Trouble {
    /// A trouble with its sentence.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    /// The smaller, the graver: what somebody has to put right comes before what may pass by itself.
    fn gravity(&self) -> u8 {
        match self.reason {
            Reason::BackendsFailing => 2,
            Reason::NoEndpoints => 1,
            _ => 0,
        }
    }
}

impl From<Fault> for Trouble {
    fn from(fault: Fault) -> Self {
        Self { reason: fault.reason, message: fault.to_string() }
    }
}

/// What is to be done about one virtual IP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VipPlan {
    /// Name of the object.
    pub name: String,
    /// The address; `None` when the object is malformed.
    pub address: Option<IpAddr>,
    /// Virtual router identifier.
    pub vrid: u8,
    /// The node that should own it.
    pub preferred: Option<String>,
    /// Whether no node has ever announced it.
    pub fresh: bool,
    /// Whether that is because another machine uses it.
    pub contested: bool,
    /// Whether it names Services: only then does owning it need the dataplane.
    pub bare: bool,
    /// The virtual services that its Services ask for.
    pub keys: Vec<ServiceKey>,
    /// Which of these belong to one Service.
    pub parts: Vec<Range<usize>>,
    /// How its owner checks the backends; `None`: not at all.
    pub check: Option<Settings>,
    /// What IPVS sends to.
    pub backends: Backends,
    /// Backends that Kubernetes calls ready and that get no connections, because their checks fail or their node is silent.
    pub shunned: BTreeSet<SocketAddr>,
    /// What is wrong with the object or its Services, the gravest first.
    pub troubles: Vec<Trouble>,
    /// The interface on which this node may own it, or why it may not.
    pub candidate: Result<String, Trouble>,
}

impl VipPlan {
    /// Adds a trouble, behind those that are as grave.
    pub(crate) fn suffers(&mut self, trouble: Trouble) {
        let at = self.troubles.partition_point(|known| known.gravity() <= trouble.gravity());
        self.troubles.insert(at, trouble);
    }

    /// Whether this node knows of no backend for one of its Services.
    fn is_blind(&self) -> bool {
        self.troubles.iter().any(|t| matches!(t.reason, Reason::ServiceNotFound | Reason::NoEndpoints))
    }

    /// Whether this node may not own it for want of a backend of its own (`externalTrafficPolicy: Local`).
    fn waits_for_backend(&self) -> bool {
        self.candidate.as_ref().is_err_and(|trouble| trouble.reason == Reason::NoLocalEndpoint)
    }

    /// Whether nobody may own it because a node has the address by other means.
    pub fn is_carried(&self) -> bool {
        self.candidate.as_ref().is_err_and(|trouble| trouble.reason == Reason::AddressInUse)
    }

    /// Whether no interface of this node has its subnet.
    fn is_out_of_reach(&self) -> bool {
        self.candidate.as_ref().is_err_and(|trouble| trouble.reason == Reason::NoInterface)
    }

    /// The virtual router that it belongs to, on whatever interface.
    fn router(&self) -> Option<(Family, u8)> {
        Some((Family::of(self.address?), self.vrid))
    }

    /// Nothing is done for it, and it says why.
    fn refused(name: String, address: Option<IpAddr>, trouble: Trouble) -> Self {
        Self {
            name,
            address,
            vrid: 0,
            preferred: None,
            fresh: false,
            contested: false,
            bare: false,
            keys: Vec::new(),
            parts: Vec::new(),
            check: None,
            backends: Backends::default(),
            shunned: BTreeSet::new(),
            troubles: vec![trouble.clone()],
            candidate: Err(trouble),
        }
    }
}

/// All that this node should hold and enter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// For the kernel of every node, owner or not: a takeover then binds an address and nothing else.
    pub tables: Arc<Tables>,
    /// One for each virtual IP, in the order of their names.
    pub vips: Vec<VipPlan>,
}

impl Desired {
    /// Keeps the ports of addresses shut that are still bound here although no Service asks for them any more: without that
    /// they would be doors to the node until vrrp has let them go.
    pub fn guard(&mut self, bound: &BTreeSet<IpAddr>) {
        let bare: BTreeSet<IpAddr> =
            self.vips.iter().filter(|vip| vip.bare).filter_map(|vip| vip.address).collect();
        let open = |address: &&IpAddr| !bare.contains(address) && !self.tables.guarded.contains(address);
        let open: Vec<IpAddr> = bound.iter().filter(open).copied().collect();
        if !open.is_empty() {
            Arc::make_mut(&mut self.tables).guarded.extend(open);
        }
    }

    /// The elections to enter, given whether this node's kernel can serve a virtual IP. A virtual router with one
    /// address that cannot be served here is left to others as a whole, for its addresses move together.
    pub fn elections(
        &self,
        node: &Node,
        others: &[Peer],
        interval: Duration,
        can_serve: impl Fn(&VipPlan) -> bool,
    ) -> Vec<RouterConfig> {
        // Where one must wait for a backend of its own node, those that move with it wait too.
        let waiting: BTreeSet<(Family, u8)> =
            self.vips.iter().filter(|vip| vip.waits_for_backend()).filter_map(VipPlan::router).collect();
        // Where one is out of reach, a node that reaches them all goes first, and takes over when it comes back.
        let partial: BTreeSet<(Family, u8)> =
            self.vips.iter().filter(|vip| vip.is_out_of_reach()).filter_map(VipPlan::router).collect();
        let mut routers: BTreeMap<RouterId, Vec<(IpAddr, &VipPlan)>> = BTreeMap::new();
        for vip in &self.vips {
            let (Some(address), Ok(interface)) = (vip.address, &vip.candidate) else { continue };
            let id = RouterId { interface: interface.clone(), family: Family::of(address), vrid: vip.vrid };
            routers.entry(id).or_default().push((address, vip));
        }
        routers
            .into_iter()
            .filter(|(id, _)| !waiting.contains(&(id.family, id.vrid)))
            .filter(|(_, vips)| vips.iter().all(|(_, vip)| vip.bare || can_serve(vip)))
            .map(|(id, vips)| {
                // They move together, so one wish holds for all: that of the first by name.
                let preferred = vips.iter().find_map(|(_, vip)| vip.preferred.as_deref());
                let nodes = others.iter().map(|peer| peer.node.as_str());
                let rank = rank::priority(&node.name, nodes, id.vrid, preferred);
                let subnets = vips.iter().filter_map(|(address, _)| node.subnet(&id.interface, *address));
                let is_partial = partial.contains(&(id.family, id.vrid));
                let is_whole = !is_partial && subnets.collect::<BTreeSet<_>>().len() > 1;
                let rank = match (is_partial, is_whole) {
                    (true, _) => (rank / 3).max(1),
                    (_, true) => 127 + rank / 2,
                    _ => rank,
                };
                // One that sees nothing to send to may only be behind with its view of the cluster: others go first.
                let blind = vips.iter().any(|(_, vip)| vip.is_blind());
                let those = |wanted: fn(&VipPlan) -> bool| -> BTreeSet<IpAddr> {
                    vips.iter().filter(|(_, vip)| wanted(vip)).map(|(address, _)| *address).collect()
                };
                RouterConfig {
                    priority: if blind { (rank / 2).max(1) } else { rank },
                    interval,
                    preempt: (is_whole || preferred == Some(&node.name)).then_some(PREEMPT_DELAY),
                    addresses: those(|_| true).into_iter().collect(),
                    fresh: those(|vip| vip.fresh),
                    contested: those(|vip| vip.contested),
                    id,
                }
            })
            .collect()
    }
}

fn plan_vip(
    name: String,
    vip: &CheckedVip,
    pools: &[CheckedPool],
    objects: &Objects,
    node: &Node,
    fresh: bool,
    tables: &mut Tables,
) -> VipPlan {
    let address = vip.address;
    let pool = match vip.pool(pools) {
        Ok(pool) => pool,
        Err(fault) => return VipPlan::refused(name, Some(address), fault.into()),
    };
    // It must not even be programmed: what does not belong to a Service is shut, so its node would be locked out, and others would
    // send to our backends what is for that node.
    if let Some(carrier) = node.carried.get(&address) {
        return VipPlan::refused(name, Some(address), carrier.trouble(address, &pool.name));
    }
    // One that is served goes on when its pool gets other virtual routers.
    if let Some(fault) = vip.stray(pool, pools).filter(|_| fresh) {
        return VipPlan::refused(name, Some(address), fault.into());
    }
    let mut plan = VipPlan {
        name,
        address: Some(address),
        vrid: vip.virtual_router,
        preferred: vip.preferred_node.clone(),
        fresh,
        contested: false,
        bare: vip.services.is_empty(),
        keys: Vec::new(),
        parts: Vec::new(),
        check: vip.check,
        backends: Backends::default(),
        shunned: BTreeSet::new(),
        troubles: Vec::new(),
        candidate: candidate(address, pool, node),
    };
    if !plan.bare {
        tables.guarded.insert(address);
    }
    for reference in &vip.services {
        let first = plan.keys.len();
        service::serve(vip, reference, objects, node, tables, &mut plan);
        plan.parts.push(first..plan.keys.len());
    }
    if let Some(other) =
        pools.iter().find(|other| other.name != pool.name && other.addresses.contains(address))
    {
        let message = format!(
            "{address} is in pool {:?} and in pool {:?}: the first by name counts; exclude it from one of them",
            pool.name, other.name
        );
        plan.troubles.push(Trouble::new(Reason::PoolsOverlap, message));
    }
    plan
}

/// The interface on which this node may own an address, or why it may not compete for it.
fn candidate(address: IpAddr, pool: &CheckedPool, node: &Node) -> Result<String, Trouble> {
    if node.drained {
        let message =
            format!("node {} is drained; `kubectl vip node undrain {}` ends that", node.name, node.name);
        return Err(Trouble::new(Reason::NodeDrained, message));
    }
    if let Some((key, value)) =
        pool.node_selector.iter().find(|(key, value)| node.labels.get(*key) != Some(value))
    {
        let message =
            format!("node {} lacks the label {key}={value} that pool \"{}\" asks for", node.name, pool.name);
        return Err(Trouble::new(Reason::NodeExcluded, message));
    }
    // A pool that names its nodes overrides the label that kubeadm puts on control planes.
    if pool.node_selector.is_empty() && node.labels.contains_key(EXCLUDE_LABEL) {
        let message = format!("node {} has the label {EXCLUDE_LABEL}", node.name);
        return Err(Trouble::new(Reason::NodeExcluded, message));
    }
    node.interfaces
        .iter()
        .filter(|(name, _)| pool.interface.as_ref().is_none_or(|wanted| wanted == name))
        .find(|(name, _)| node.subnet(name, address).is_some())
        .map(|(name, _)| name.clone())
        .ok_or_else(|| {
            let which = pool
                .interface
                .as_ref()
                .map_or("no interface".to_owned(), |name| format!("no interface {name}"));
            let message = format!("node {} has {which} in the subnet of {address}", node.name);
            Trouble::new(Reason::NoInterface, message)
        })
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;
    use k8s_openapi::api::discovery::v1::EndpointSlice;
    use serde_json::{Value, json};

    use super::*;
    use crate::api::{ServiceRef, VirtualIP};

    fn from<T: serde::de::DeserializeOwned>(value: Value) -> Arc<T> {
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn vip(address: &str, spec: Value) -> Arc<VirtualIP> {
        let mut spec = spec;
        spec["address"] = json!(address);
        spec["virtualRouter"] = json!(100);
        from(
            json!({"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VirtualIP", "metadata": {"name": address}, "spec": spec}),
        )
    }

    fn web() -> Value {
        json!({"services": [{"namespace": "shop", "name": "web"}]})
    }

    fn reference(name: &str) -> ServiceRef {
        ServiceRef { namespace: "shop".into(), name: name.into() }
    }

    fn slice(endpoints: Value) -> Arc<EndpointSlice> {
        from(json!({"addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 5353, "protocol": "UDP"}]}))
    }

    /// Service shop/web, ports 80/TCP and 53/UDP, one endpoint of each kind, and a pool and a node that fit.
    fn scene() -> (Objects, Node) {
        let service = from(json!({"spec": {"ports": [
            {"name": "http", "port": 80, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}]}}));
        let endpoints = json!([
            {"addresses": ["10.244.1.2"], "conditions": {"ready": true}},
            {"addresses": ["10.244.1.3"], "conditions": {"ready": false, "serving": true, "terminating": true}},
            {"addresses": ["10.244.1.4"], "conditions": {"ready": false, "serving": false}}]);
        let pool = from(
            json!({"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VIPPool", "metadata": {"name": "lab"},
            "spec": {"addresses": ["10.87.2.0/24"], "virtualRouters": {"first": 100, "count": 64}}}),
        );
        let backing = Backing { service: Some(service), slices: vec![slice(endpoints)] };
        let objects = Objects {
            vips: vec![vip("10.87.2.50", web())],
            pools: vec![pool],
            services: [(reference("web"), Arc::new(backing))].into(),
            ..Objects::default()
        };
        let nets = vec!["10.87.0.11/16".parse().unwrap()];
        let node = Node { name: "node-1".into(), interfaces: vec![("eth0".into(), nets)], ..Node::default() };
        (objects, node)
    }

    fn plan(objects: &Objects, node: &Node) -> Desired {
        Planner::default().plan(objects, node)
    }

    fn reasons(plan: &VipPlan) -> Vec<Reason> {
        plan.troubles.iter().map(|t| t.reason).collect()
    }

    #[test]
    fn a_service_becomes_virtual_services_with_ready_and_draining_destinations() {
        let (objects, node) = scene();
        let desired = plan(&objects, &node);
        let plan = &desired.vips[0];
        assert_eq!(plan.candidate, Ok("eth0".to_owned()));
        assert_eq!(plan.backends, Backends { ready: 1, total: 3 });
        assert_eq!(plan.troubles, []);
        let text: Vec<String> = desired
            .tables
            .services
            .iter()
            .map(|(k, s)| format!("{k} {} {:?}", s.settings.scheduler, s.destinations))
            .collect();
        assert_eq!(
            text,
            [
                "TCP 10.87.2.50:80 wlc {10.244.1.2:8080: 1, 10.244.1.3:8080: 0}",
                "UDP 10.87.2.50:53 wlc {10.244.1.2:5353: 1, 10.244.1.3:5353: 0}",
            ]
        );
    }

    #[test]
    fn affinity_is_the_services_unless_the_virtual_ip_says_otherwise() {
        let (mut objects, node) = scene();
        let mut backing = objects.services[&reference("web")].as_ref().clone();
        let mut service = backing.service.as_deref().cloned().unwrap();
        service.spec.as_mut().unwrap().session_affinity = Some("ClientIP".into());
        backing.service = Some(Arc::new(service));
        objects.services.insert(reference("web"), Arc::new(backing));
        let persistence = |objects: &Objects| {
            plan(objects, &node).tables.services.values().next().unwrap().settings.persistence
        };
        assert_eq!(persistence(&objects), Some(10_800));
        let mut spec = web();
        spec["persistenceSeconds"] = json!(60);
        objects.vips = vec![vip("10.87.2.50", spec)];
        assert_eq!(persistence(&objects), Some(60));
    }

    #[test]
    fn an_address_stays_shut_for_as_long_as_it_is_bound() {
        let (mut objects, node) = scene();
        let bound = BTreeSet::from([IpAddr::from([10, 87, 2, 50])]);
        let guarded = |objects: &Objects, bound: &BTreeSet<IpAddr>| {
            let mut desired = plan(objects, &node);
            desired.guard(bound);
            desired.tables.guarded.clone()
        };
        assert_eq!(guarded(&objects, &bound), bound);
        let vip = std::mem::take(&mut objects.vips);
        assert_eq!(guarded(&objects, &bound), bound, "the object is gone");
        assert_eq!(guarded(&objects, &BTreeSet::new()), BTreeSet::new());
        // One that should be open is opened at once.
        objects.vips = vec![self::vip(&vip[0].spec.address, json!({"services": []}))];
        assert_eq!(guarded(&objects, &bound), BTreeSet::new());
    }

    #[test]
    fn a_bad_object_hurts_only_itself() {
        let (mut objects, node) = scene();
        let good = plan(&objects, &node);
        objects.vips.push(vip("10.87.2.51", json!({"services": [{"namespace": "shop", "name": "gone"}]})));
        objects.vips.push(vip("10.99.0.1", web()));
        objects.vips.push(vip("010.1", web()));
        objects.malformed.push(("10.87.2.52".into(), "number too large".into()));
        let desired = plan(&objects, &node);
        assert_eq!(desired.tables.services, good.tables.services);
        let all: BTreeMap<&str, Vec<Reason>> =
            desired.vips.iter().map(|p| (p.name.as_str(), reasons(p))).collect();
        assert_eq!(all["10.87.2.50"], []);
        assert_eq!(all["10.87.2.51"], [Reason::ServiceNotFound]);
        assert_eq!(all["10.87.2.52"], [Reason::Invalid]);
        assert_eq!(all["10.99.0.1"], [Reason::Rejected]);
        assert_eq!(all["010.1"], [Reason::Invalid]);
    }

    #[test]
    fn two_services_of_one_address_clash_only_on_the_same_port() {
        let (mut objects, node) = scene();
        let other =
            from(json!({"spec": {"ports": [{"name": "http", "port": 80}, {"name": "tls", "port": 443}]}}));
        let backing = Backing { service: Some(other), slices: Vec::new() };
        objects.services.insert(reference("api"), Arc::new(backing));
        objects.vips = vec![vip(
            "10.87.2.50",
            json!({"services": [{"namespace": "shop", "name": "web"}, {"namespace": "shop", "name": "api"}]}),
        )];
        let desired = plan(&objects, &node);
        assert_eq!(
            reasons(&desired.vips[0]),
            [Reason::PortClash, Reason::NoEndpoints],
            "the graver one first"
        );
        assert_eq!(desired.tables.ledger.len(), 3);
    }

    #[test]
    fn who_may_compete() {
        let (mut objects, mut node) = scene();
        let candidate = |objects: &Objects, node: &Node| {
            plan(objects, node).vips[0].candidate.clone().map_err(|t| t.reason)
        };
        node.labels.insert(EXCLUDE_LABEL.into(), String::new());
        assert_eq!(candidate(&objects, &node), Err(Reason::NodeExcluded));
        let mut pool = objects.pools[0].as_ref().clone();
        pool.spec.node_selector.insert("edge".into(), "yes".into());
        objects.pools = vec![Arc::new(pool)];
        assert_eq!(candidate(&objects, &node), Err(Reason::NodeExcluded));
        node.labels.insert("edge".into(), "yes".into());
        assert_eq!(candidate(&objects, &node), Ok("eth0".into()));
        node.interfaces = vec![("eth0".into(), vec!["192.168.1.1/24".parse().unwrap()])];
        assert_eq!(candidate(&objects, &node), Err(Reason::NoInterface));
    }

    #[test]
    fn an_address_that_a_node_carries_itself_is_never_shut_nor_bound() {
        let (mut objects, mut node) = scene();
        objects.vips.push(vip("10.87.2.60", web()));
        let mut planner = Planner::default();
        assert_eq!(planner.plan(&objects, &node).tables.guarded.len(), 2);
        for name in ["node-1", "node-2"] {
            let carrier = Carrier { node: name.into(), interface: "eth0".into(), mac: [2, 0, 0, 0, 0, 9] };
            node.carried = Arc::new([([10, 87, 2, 50].into(), carrier)].into());
            let desired = planner.plan(&objects, &node);
            let tables = &desired.tables;
            let programmed: BTreeSet<IpAddr> = tables.ledger.iter().map(|key| key.address).collect();
            let other: BTreeSet<IpAddr> = [[10, 87, 2, 60].into()].into();
            assert_eq!((&tables.guarded, &programmed), (&other, &other));
            let routers = desired.elections(&node, &[], Duration::from_secs(1), |_| true);
            assert_eq!(routers[0].addresses, other.into_iter().collect::<Vec<_>>());
            let trouble = &desired.vips[0].troubles[0];
            let sentence =
                format!("10.87.2.50 is used by node {name} (02:00:00:00:00:09 on eth0): it is not bound; ");
            assert_eq!(trouble.reason, Reason::AddressInUse);
            assert!(trouble.message.starts_with(&sentence), "{}", trouble.message);
        }
        // It goes away when the address is gone.
        node.carried = Arc::default();
        let desired = planner.plan(&objects, &node);
        assert_eq!((desired.tables.guarded.len(), reasons(&desired.vips[0])), (2, vec![]));
    }

    #[test]
    fn of_overlapping_pools_the_first_counts_and_the_virtual_ip_says_so() {
        let (mut objects, node) = scene();
        let mut other = objects.pools[0].as_ref().clone();
        other.metadata.name = Some("attic".into());
        other.spec.addresses = vec!["10.87.2.50".into()];
        objects.pools.push(Arc::new(other));
        objects.vips.push(vip("10.87.2.60", web()));
        let desired = plan(&objects, &node);
        assert_eq!(desired.tables.guarded.len(), 2, "both are served");
        assert_eq!(
            (reasons(&desired.vips[0]), reasons(&desired.vips[1])),
            (vec![Reason::PoolsOverlap], vec![])
        );
        let sentence = r#"10.87.2.50 is in pool "attic" and in pool "lab""#;
        assert!(desired.vips[0].troubles[0].message.starts_with(sentence));
    }

    #[test]
    fn a_virtual_router_of_another_pool_is_not_for_a_new_virtual_ip() {
        let (mut objects, node) = scene();
        let pool = Arc::make_mut(&mut objects.pools[0]);
        pool.spec.virtual_routers.first = 101;
        let refused = plan(&objects, &node);
        assert_eq!((reasons(&refused.vips[0]), refused.tables.guarded.len()), (vec![Reason::Rejected], 0));
        // It was served before the pool got others.
        let known = Arc::make_mut(&mut objects.vips[0]);
        known.status =
            Some(serde_json::from_value(json!({"firstAnnounced": "2026-01-01T00:00:00Z"})).unwrap());
        assert_eq!(reasons(&plan(&objects, &node).vips[0]), []);
    }

    #[test]
    fn a_node_that_reaches_only_some_of_the_addresses_comes_after_those_that_reach_all() {
        let (mut objects, whole) = scene();
        objects.vips.push(vip("10.88.2.50", web()));
        Arc::make_mut(&mut objects.pools[0]).spec.addresses.push("10.88.2.0/24".into());
        let names: Vec<String> = (1..=12).map(|n| format!("node-{n}")).collect();
        let peers: Vec<Peer> =
            names.iter().map(|name| Peer { node: name.clone(), ..Peer::default() }).collect();
        let elect = |second: Option<&str>| -> Vec<RouterConfig> {
            let on = |name: &String| {
                let mut node = Node { name: name.clone(), ..whole.clone() };
                node.interfaces[0].1.extend(second.map(|net| net.parse::<IpNet>().unwrap()));
                plan(&objects, &node).elections(&node, &peers, Duration::from_secs(1), |_| true).remove(0)
            };
            names.iter().map(on).collect()
        };
        let (partial, all) = (elect(None), elect(Some("10.88.0.11/16")));
        assert!(all.iter().all(|router| router.addresses.len() == 2 && router.preempt.is_some()));
        assert!(partial.iter().all(|router| router.addresses.len() == 1 && router.preempt.is_none()));
        let highest = partial.iter().map(|router| router.priority).max();
        assert!(all.iter().map(|router| router.priority).min() > highest);
    }

    #[test]
    fn a_router_is_entered_only_when_all_of_its_addresses_can_be_served() {
        let (mut objects, node) = scene();
        objects.vips.push(vip("10.87.2.60", json!({})));
        let desired = plan(&objects, &node);
        let others = [Peer { node: "node-2".to_owned(), ..Peer::default() }];
        let interval = Duration::from_millis(100);
        let routers = desired.elections(&node, &others, interval, |_| true);
        assert_eq!(routers.len(), 1);
        assert_eq!(routers[0].addresses.len(), 2);
        assert_eq!(desired.elections(&node, &others, interval, |_| false), []);
        let mut behind = objects.clone();
        for backing in behind.services.values_mut() {
            Arc::make_mut(backing).slices.clear();
        }
        let blind = plan(&behind, &node).elections(&node, &others, interval, |_| true);
        assert_eq!(blind[0].priority, routers[0].priority / 2, "who sees no endpoint waits for those who do");
        objects.vips.remove(0);
        let bare = plan(&objects, &node);
        assert_eq!(bare.elections(&node, &others, interval, |_| false).len(), 1);
    }
}
