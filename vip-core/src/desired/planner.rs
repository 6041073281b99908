//! What follows from the objects, kept from one state to the next: a change of one Service costs the work for the virtual IPs that
//! name it, not for thousands of others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Backing, Desired, Node, Objects, Trouble, VipPlan, plan_vip};
use crate::api::{Reason, VIPPool, VirtualIP};
use crate::plan::Tables;
use crate::validate::{CheckedPool, CheckedVip, check_pools};

/// The plans of one node and what they were made from.
#[derive(Clone, Debug, Default)]
pub struct Planner {
    node: Node,
    pools: Vec<Arc<VIPPool>>,
    checked: Vec<CheckedPool>,
    /// By the name of the virtual IP.
    known: BTreeMap<String, Known>,
    tables: Arc<Tables>,
}

#[derive(Clone, Debug)]
struct Known {
    vip: Arc<VirtualIP>,
    /// What is behind its Services, in its order.
    backings: Vec<Option<Arc<Backing>>>,
    plan: VipPlan,
}

impl Planner {
    /// Reads the objects for one node. A malformed object yields a plan with its trouble and touches no other.
    pub fn plan(&mut self, objects: &Objects, node: &Node) -> Desired {
        if !node.is_like(&self.node) || !same(&objects.pools, &self.pools) {
            let checked = check_pools(objects.pools.iter().map(AsRef::as_ref)).0;
            *self = Self { node: node.clone(), pools: objects.pools.clone(), checked, ..Self::default() };
        }
        if node.carried != self.node.carried {
            let before = std::mem::replace(&mut self.node.carried, Arc::clone(&node.carried));
            let passed_on = |known: &Known| {
                known.plan.address.is_some_and(|address| before.get(&address) != node.carried.get(&address))
            };
            let stale = self.known.iter().filter(|(_, known)| passed_on(known));
            let stale: Vec<String> = stale.map(|(name, _)| name.clone()).collect();
            stale.iter().for_each(|name| self.forget(name));
        }
        let names: BTreeSet<&str> = objects.vips.iter().map(|vip| name(vip)).collect();
        let gone: Vec<String> =
            self.known.keys().filter(|known| !names.contains(known.as_str())).cloned().collect();
        gone.iter().for_each(|name| self.forget(name));
        for vip in &objects.vips {
            if !self.knows(vip, objects) {
                self.forget(name(vip));
                self.learn(vip, objects);
            }
        }
        let mut vips: Vec<VipPlan> = self.known.values().map(|known| known.plan.clone()).collect();
        for (name, error) in &objects.malformed {
            let trouble = Trouble::new(Reason::Invalid, format!("VirtualIP {name} cannot be read: {error}"));
            vips.push(VipPlan::refused(name.clone(), None, trouble));
        }
        vips.sort_by(|a, b| a.name.cmp(&b.name));
        Desired { tables: Arc::clone(&self.tables), vips }
    }

    /// Whether nothing has changed that a virtual IP's plan was made from.
    fn knows(&self, vip: &Arc<VirtualIP>, objects: &Objects) -> bool {
        self.known.get(name(vip)).is_some_and(|known| {
            let mut now = vip.spec.services.iter().map(|service| objects.services.get(service));
            Arc::ptr_eq(&known.vip, vip)
                && known.backings.iter().all(|before| match (before, now.next().flatten()) {
                    (Some(before), Some(now)) => Arc::ptr_eq(before, now),
                    (before, now) => before.is_none() && now.is_none(),
                })
        })
    }

    fn learn(&mut self, vip: &Arc<VirtualIP>, objects: &Objects) {
        let name = name(vip).to_owned();
        let plan = match CheckedVip::new(vip) {
            Ok(checked) => {
                let status = vip.status.as_ref();
                let fresh = status.is_none_or(|status| status.first_announced.is_none());
                let in_use = Reason::AddressInUse.to_string();
                let contested = fresh
                    && status.is_some_and(|status| status.conditions.iter().any(|c| c.reason == in_use));
                let tables = Arc::make_mut(&mut self.tables);
                let plan =
                    plan_vip(name.clone(), &checked, &self.checked, objects, &self.node, fresh, tables);
                VipPlan { contested, ..plan }
            }
            Err(fault) => VipPlan::refused(name.clone(), None, fault.into()),
        };
        let services = &vip.spec.services;
        let backings = services.iter().map(|service| objects.services.get(service).cloned()).collect();
        self.known.insert(name, Known { vip: vip.clone(), backings, plan });
    }

    /// Takes out all that a virtual IP has brought. No other has brought the same: its name is its address.
    fn forget(&mut self, name: &str) {
        let Some(Known { plan, .. }) = self.known.remove(name) else { return };
        let Tables { services, ledger, guarded, direct, sources, kept } = Arc::make_mut(&mut self.tables);
        if let Some(address) = &plan.address {
            guarded.remove(address);
        }
        for key in &plan.keys {
            services.remove(key);
            ledger.remove(key);
            direct.remove(key);
            sources.remove(key);
        }
        kept.retain(|(key, _)| !plan.keys.contains(key));
    }
}

fn name(vip: &VirtualIP) -> &str {
    vip.metadata.name.as_deref().unwrap_or_default()
}

fn same<T>(here: &[Arc<T>], there: &[Arc<T>]) -> bool {
    here.len() == there.len() && here.iter().zip(there).all(|(a, b)| Arc::ptr_eq(a, b))
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::super::Carrier;
    use super::*;
    use crate::api::ServiceRef;

    fn from<T: serde::de::DeserializeOwned>(value: Value) -> Arc<T> {
        Arc::new(serde_json::from_value(value).unwrap())
    }

    /// What may happen between two looks.
    #[derive(Clone, Debug)]
    enum Happening {
        /// A virtual IP with these Services, by their numbers; none: it is deleted.
        Vip(u8, Option<Vec<u8>>),
        /// A Service with so many ports and, if so, for certain clients only; none: it is deleted.
        Service(u8, Option<(u8, bool)>),
        /// The endpoints of a Service, each ready or not.
        Endpoints(u8, Vec<bool>),
        Pool(bool),
        Drained(bool),
        /// A node has the address of a virtual IP, or no longer.
        Carried(u8, bool),
    }

    fn happening() -> impl Strategy<Value = Happening> {
        let service = 0..4_u8;
        let names = proptest::collection::vec(service.clone(), 0..3);
        prop_oneof![
            (0..3_u8, proptest::option::of(names)).prop_map(|(n, to)| Happening::Vip(n, to)),
            (service.clone(), proptest::option::of((0..3_u8, any::<bool>())))
                .prop_map(|(n, spec)| Happening::Service(n, spec)),
            (service, proptest::collection::vec(any::<bool>(), 0..4))
                .prop_map(|(n, ready)| Happening::Endpoints(n, ready)),
            any::<bool>().prop_map(Happening::Pool),
            any::<bool>().prop_map(Happening::Drained),
            (0..3_u8, any::<bool>()).prop_map(|(n, has)| Happening::Carried(n, has)),
        ]
    }

    fn reference(n: u8) -> ServiceRef {
        ServiceRef { namespace: "shop".into(), name: format!("web-{n}") }
    }

    fn happen(happening: &Happening, objects: &mut Objects, node: &mut Node) {
        let backing = |objects: &Objects, n: u8| {
            objects.services.get(&reference(n)).map(|backing| Backing::clone(backing)).unwrap_or_default()
        };
        match happening {
            Happening::Vip(n, services) => {
                let address = format!("10.87.2.{n}");
                objects.vips.retain(|vip| name(vip) != address);
                if let Some(services) = services {
                    let names: BTreeSet<u8> = services.iter().copied().collect();
                    let refs: Vec<Value> = names
                        .iter()
                        .map(|n| json!({"namespace": "shop", "name": format!("web-{n}")}))
                        .collect();
                    let spec = json!({"address": address, "virtualRouter": 100, "services": refs});
                    objects
                        .vips
                        .push(from(json!({"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VirtualIP",
                        "metadata": {"name": address}, "spec": spec})));
                }
            }
            Happening::Service(n, spec) => {
                let service = spec.map(|(ports, restricted)| {
                    let ports: Vec<Value> =
                        (0..ports).map(|port| json!({"port": 80 + u16::from(port + n)})).collect();
                    let sources = if restricted { json!(["192.0.2.0/24"]) } else { json!([]) };
                    from(json!({"spec": {"ports": ports, "loadBalancerSourceRanges": sources,
                        "externalTrafficPolicy": if n % 2 == 0 { "Local" } else { "Cluster" }}}))
                });
                let backing = Backing { service, ..backing(objects, *n) };
                objects.services.insert(reference(*n), Arc::new(backing));
            }
            Happening::Endpoints(n, ready) => {
                let endpoints = ready.iter().zip(1..).map(|(ready, pod): (_, u8)| {
                    json!({"addresses": [format!("10.244.{n}.{pod}")], "nodeName": "node-1",
                        "conditions": {"ready": ready}})
                });
                let slice = json!({"addressType": "IPv4", "endpoints": endpoints.collect::<Vec<_>>(),
                    "ports": [{"port": 8080, "protocol": "TCP"}]});
                let backing = Backing { slices: vec![from(slice)], ..backing(objects, *n) };
                objects.services.insert(reference(*n), Arc::new(backing));
            }
            Happening::Pool(there) => {
                let spec =
                    json!({"addresses": ["10.87.2.0/24"], "virtualRouters": {"first": 100, "count": 64}});
                let pool = json!({"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VIPPool",
                    "metadata": {"name": "lab"}, "spec": spec});
                objects.pools = if *there { vec![from(pool)] } else { Vec::new() };
            }
            Happening::Drained(drained) => node.drained = *drained,
            Happening::Carried(n, has) => {
                let address = IpAddr::from([10, 87, 2, *n]);
                let carrier = Carrier { node: "node-2".into(), interface: "eth0".into(), mac: [2; 6] };
                let carried = Arc::make_mut(&mut node.carried);
                match has {
                    true => carried.insert(address, carrier),
                    false => carried.remove(&address),
                };
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_kept_is_what_would_be_made_anew(history in proptest::collection::vec(happening(), 1..40)) {
            let mut objects = Objects::default();
            let nets = vec!["10.87.0.11/16".parse().unwrap()];
            let mut node =
                Node { name: "node-1".into(), interfaces: vec![("eth0".into(), nets)], ..Node::default() };
            happen(&Happening::Pool(true), &mut objects, &mut node);
            let mut planner = Planner::default();
            for one in history {
                happen(&one, &mut objects, &mut node);
                prop_assert_eq!(planner.plan(&objects, &node), Planner::default().plan(&objects, &node), "{:?}", one);
            }
        }
    }
}
