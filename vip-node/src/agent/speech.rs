//! What this node has to say, turn by turn: the status of what it owns, of itself, of what nobody owns; and Events for
//! what is new. Nothing here waits: all goes to the [`Writer`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use kube::{Resource, ResourceExt};
use vip_core::api::{
    RENEW_SECONDS, Reason, SILENT_AFTER_SECONDS, VIPNode, VIPNodeStatus, VIPPoolStatus, VirtualIP,
    VirtualIPStatus, VrrpState,
};
use vip_core::checks::Checks;
use vip_core::desired::{Desired, Trouble, VipPlan};
use vip_core::pool;
use vip_core::validate::check_pools;
use vip_core::vrrp::{Family, Lan};

use super::programmer::Programmed;
use super::report;
use super::view::View;
use super::writer::{Happening, Outbox, Writer};
use crate::link::{Heard, Report, RouterReport};

/// A virtual IP without an owner for this long is said to have none: a takeover is shorter.
const UNOWNED: Duration = Duration::from_secs(3);

/// How things stand at one turn.
pub struct Scene<'a> {
    /// This node's name.
    pub node: &'a str,
    /// The cluster.
    pub view: &'a View,
    /// What follows from it.
    pub desired: &'a Desired,
    /// The other agents.
    pub lan: &'a Lan,
    /// What vrrp said last.
    pub report: Option<&'a Report>,
    /// What the kernel holds.
    pub programmed: &'a Programmed,
    /// What its checks hold of the backends.
    pub checks: &'a Checks,
    /// The wall clock.
    pub now: &'a Time,
}

/// What was said so far, so that nothing is an Event twice.
pub struct Speaker {
    writer: Writer,
    /// Virtual IPs that this node owned at the last turn.
    owned: BTreeSet<String>,
    /// Virtual IPs without an owner anywhere, since when.
    orphans: BTreeMap<String, Instant>,
    /// Conflicts that were told, each with its virtual IP.
    conflicts: BTreeSet<(String, String)>,
    /// Virtual IPs that are left to another machine.
    in_use: BTreeSet<String>,
    /// Routers of others that were told.
    foreign: BTreeSet<(String, u8, IpAddr)>,
    /// Repairs that were told: of addresses, and of the kernel's tables. `None` until those of former times are known.
    repaired: Option<BTreeMap<IpAddr, u64>>,
    repairs: u64,
}

impl Speaker {
    /// Has said nothing yet.
    pub fn new(writer: Writer) -> Self {
        Self {
            writer,
            owned: BTreeSet::new(),
            orphans: BTreeMap::new(),
            conflicts: BTreeSet::new(),
            in_use: BTreeSet::new(),
            foreign: BTreeSet::new(),
            repaired: None,
            repairs: 0,
        }
    }

    /// Says what is to be said.
    pub fn speak(&mut self, scene: &Scene<'_>) {
        let mut outbox = Outbox::default();
        self.speak_for_node(scene, &mut outbox);
        self.speak_for_owned(scene, &mut outbox);
        self.speak_for_conflicts(scene, &mut outbox);
        self.speak_of_repairs(scene);
        self.speak_for_orphans(scene, &mut outbox);
        if is_scribe(scene) {
            speak_for_pools(scene, &mut outbox);
        }
        self.writer.write(outbox);
    }

    fn speak_for_node(&mut self, scene: &Scene<'_>, outbox: &mut Outbox) {
        let own = own_node(scene);
        let previous = own.and_then(|node| node.status.as_ref());
        let carried = scene.desired.vips.iter().filter(|plan| plan.is_carried());
        let carried = carried.filter_map(|plan| plan.address).collect();
        let status = report::node(scene.report, scene.programmed, scene.lan, &carried, previous, scene.now);
        if is_due(previous, &status) {
            outbox.node = Some((status, owner_reference(scene)));
        }
        let Some(own) = own else { return };
        let heard = scene.report.map(|report| report.foreign.as_slice()).unwrap_or_default();
        // Only what disturbs is an Event: a router of others with an identifier of its own is a good neighbour.
        let disturbs = |one: &&Heard| {
            scene.report.iter().flat_map(|report| &report.routers).any(|router| router.id == one.id)
        };
        let foreign: BTreeMap<_, _> = heard
            .iter()
            .filter(disturbs)
            .map(|one| ((one.id.interface.clone(), one.id.vrid, one.address), one))
            .collect();
        for (_, one) in foreign.iter().filter(|(key, _)| !self.foreign.contains(*key)) {
            let note = format!(
                "{} advertises virtual router {} with priority {} on {} and none of our addresses: it is not obeyed; give it or \
                 our pool another identifier",
                one.address, one.id.vrid, one.priority, one.id.interface
            );
            self.warn_of_node(own, "ForeignRouter", note);
        }
        self.foreign = foreign.into_keys().collect();
    }

    fn speak_for_owned(&mut self, scene: &Scene<'_>, outbox: &mut Outbox) {
        let owned = owned_now(scene);
        for plan in &scene.desired.vips {
            let (Some(vip), Some(router)) = (scene.view.vip(&plan.name), owned.get(&plan.name)) else {
                continue;
            };
            let status = owned_status(scene, vip, plan, router);
            if vip.status.as_ref() != Some(&status) {
                outbox.vips.insert(plan.name.clone(), status.clone());
            }
            let last = vip.status.as_ref().and_then(|status| status.node.as_deref());
            if !self.owned.contains(&plan.name) && last != Some(scene.node) {
                let how = status.last_handover.map(|handover| format!("; it came {handover}"));
                let (how, interface) = (how.unwrap_or_default(), &router.id.interface);
                let note = format!("{} is announced by {} on {interface}{how}", plan.name, scene.node);
                self.tell(vip, false, "Announced", note);
            }
        }
        for name in self.owned.iter().filter(|name| !owned.contains_key(*name)) {
            if let Some(vip) = scene.view.vip(name) {
                let note = format!("{name} is no longer announced by {}", scene.node);
                self.tell(vip, false, "Released", note);
            }
        }
        self.owned = owned.into_keys().collect();
    }

    /// Addresses that others use or claim. Of those that are left to them, the master of their router speaks.
    fn speak_for_conflicts(&mut self, scene: &Scene<'_>, outbox: &mut Outbox) {
        let mut told = BTreeSet::new();
        self.in_use.clear();
        for plan in &scene.desired.vips {
            let (Some(vip), Some(conflict)) = (scene.view.vip(&plan.name), conflict_about(scene, plan))
            else {
                continue;
            };
            if conflict.reason == Reason::AddressInUse {
                self.in_use.insert(plan.name.clone());
                let status = report::in_use(vip, plan, &conflict, scene.programmed, scene.now);
                if vip.status.as_ref() != Some(&status) {
                    outbox.vips.insert(plan.name.clone(), status);
                }
            }
            let key = (plan.name.clone(), conflict.message);
            if !self.conflicts.contains(&key) {
                self.tell(vip, true, conflict.reason.to_string(), key.1.clone());
            }
            told.insert(key);
        }
        self.conflicts = told;
    }

    /// What others have taken away, and we have put back.
    fn speak_of_repairs(&mut self, scene: &Scene<'_>) {
        if let Some(own) = own_node(scene).filter(|_| scene.programmed.repairs != self.repairs) {
            let note = format!(
                "what {} has in IPVS and nftables was changed by another program, and is put right",
                scene.node
            );
            self.warn_of_node(own, "Repaired", note);
            self.repairs = scene.programmed.repairs;
        }
        let Some(report) = scene.report else { return };
        let known = self.repaired.replace(report.repaired.clone());
        let Some(known) = known else { return };
        for plan in &scene.desired.vips {
            let Some(address) = plan.address else { continue };
            let count = |of: &BTreeMap<IpAddr, u64>| of.get(&address).copied().unwrap_or_default();
            let (Some(vip), true) = (scene.view.vip(&plan.name), count(&report.repaired) > count(&known))
            else {
                continue;
            };
            let note =
                format!("{} was taken off {} by another program, and is put back", plan.name, scene.node);
            self.tell(vip, true, "Repaired", note);
        }
    }

    fn speak_for_orphans(&mut self, scene: &Scene<'_>, outbox: &mut Outbox) {
        let orphans: BTreeSet<String> = orphans(scene)
            // What another machine uses has been told.
            .filter(|name| !self.owned.contains(*name) && !self.in_use.contains(*name))
            .map(str::to_owned)
            .collect();
        self.orphans.retain(|name, _| orphans.contains(name));
        for plan in scene.desired.vips.iter().filter(|plan| orphans.contains(&plan.name)) {
            let since = self.orphans.entry(plan.name.clone()).or_insert_with(Instant::now);
            if since.elapsed() < UNOWNED {
                continue;
            }
            match scene.view.vip(&plan.name) {
                Some(vip) => {
                    let status = report::unowned(vip, plan, scene.programmed, scene.now);
                    if vip.status.as_ref() != Some(&status) {
                        outbox.vips.insert(plan.name.clone(), status);
                    }
                }
                None => {
                    outbox.vips.insert(plan.name.clone(), report::malformed(plan, scene.now));
                }
            }
        }
    }

    fn warn_of_node(&self, node: &VIPNode, reason: &str, note: String) {
        let about = node.object_ref(&());
        self.writer.tell(Happening { about, warning: true, reason: reason.to_owned(), note });
    }

    fn tell(&self, vip: &VirtualIP, warning: bool, reason: impl Into<String>, note: String) {
        let about = vip.object_ref(&());
        self.writer.tell(Happening { about, warning, reason: reason.into(), note });
    }
}

/// What this node has written of itself.
fn own_node<'a>(scene: &Scene<'a>) -> Option<&'a VIPNode> {
    scene.view.nodes.iter().map(AsRef::as_ref).find(|node: &&VIPNode| node.name_any() == scene.node)
}

/// The routers in which this node is master.
fn masters<'a>(scene: &Scene<'a>) -> impl Iterator<Item = &'a RouterReport> {
    let routers = scene.report.map(|report| report.routers.as_slice()).unwrap_or_default();
    routers.iter().filter(|router| router.state == VrrpState::Master)
}

/// The status of a virtual IP that this node owns.
fn owned_status(
    scene: &Scene<'_>,
    vip: &VirtualIP,
    plan: &VipPlan,
    router: &RouterReport,
) -> VirtualIPStatus {
    let (node, programmed, now) = (scene.node, scene.programmed, scene.now);
    let previous = vip.status.as_ref();
    let (tables, counts) = (&scene.desired.tables, &programmed.connections);
    let (destinations, more_destinations) =
        report::destinations(plan, tables, scene.checks, counts, previous);
    let conflict = conflict_about(scene, plan);
    let interface = &router.id.interface;
    VirtualIPStatus {
        last_handover: report::handover(vip, node, router.cause, &scene.view.nodes, now),
        destinations,
        more_destinations,
        ..report::owned(vip, plan, node, interface, conflict.as_ref(), programmed, now)
    }
}

/// The virtual IPs that are bound here with this node as master, and the router of each.
fn owned_now<'a>(scene: &Scene<'a>) -> BTreeMap<String, &'a RouterReport> {
    let mut owned = BTreeMap::new();
    for router in masters(scene) {
        for plan in scene.desired.vips.iter().filter(|plan| plan.candidate.is_ok()) {
            if plan.address.is_some_and(|address| router.bound.contains(&address)) {
                owned.insert(plan.name.clone(), router);
            }
        }
    }
    owned
}

/// The virtual IPs for which this node has to say that nobody has them, unless it has them itself. One whose virtual router has a
/// master is that master's to speak for: it alone knows which of the addresses it has. For the others the first node speaks.
fn orphans<'a>(scene: &Scene<'a>) -> impl Iterator<Item = &'a str> {
    let scribe = is_scribe(scene);
    let (view, own) = (scene.view, scene.node);
    let mut masters_of: BTreeMap<(u8, u8), BTreeSet<String>> = BTreeMap::new();
    for router in masters(scene) {
        let key = (report::family(router.id.family), router.id.vrid);
        masters_of.entry(key).or_default().insert(own.to_owned());
    }
    // What this node wrote of itself may be behind.
    let others = view.nodes.iter().filter(|node| node.name_any() != own);
    for node in others.filter(|node| is_live(node, scene.now)) {
        let routers = node.status.iter().flat_map(|status| &status.virtual_routers);
        for router in routers.filter(|router| router.state == VrrpState::Master) {
            masters_of.entry((router.family, router.virtual_router)).or_default().insert(node.name_any());
        }
    }
    let speaks = move |plan: &&VipPlan| {
        let family = plan.address.map_or(4, |address| report::family(Family::of(address)));
        let Some(masters) = masters_of.get(&(family, plan.vrid)) else { return scribe };
        // On two segments a virtual router has two masters.
        let last = view.vip(&plan.name).and_then(|vip| vip.status.as_ref()?.node.as_ref());
        last.filter(|last| masters.contains(*last)).or(masters.first()).is_some_and(|master| master == own)
    };
    scene.desired.vips.iter().filter(speaks).map(|plan| plan.name.as_str())
}

/// Who else uses or claims a virtual IP that this node speaks for: as the master, or for all where a node has the address.
fn conflict_about(scene: &Scene<'_>, plan: &VipPlan) -> Option<Trouble> {
    let address = plan.address?;
    if plan.is_carried() {
        return plan.candidate.clone().err().filter(|_| is_scribe(scene));
    }
    let family = Family::of(address);
    let master = masters(scene).find(|router| (router.id.vrid, router.id.family) == (plan.vrid, family))?;
    let claims = scene.report.map(|report| report.claims.as_slice()).unwrap_or_default();
    let claim = claims.iter().find(|claim| claim.address == address);
    let claim = claim.map(|claim| report::claimed(claim, scene.node));
    claim.or_else(|| Some(report::rivalled(&address.to_string(), master.rival?, scene.lan)))
}

/// Whether this node speaks for what nobody owns: the first by name of those that are not silent.
fn is_scribe(scene: &Scene<'_>) -> bool {
    let mut live = scene.view.nodes.iter().filter(|node| is_live(node, scene.now));
    live.all(|node| *scene.node <= *node.name_any())
}

fn is_live(node: &VIPNode, now: &Time) -> bool {
    let renewed = node.status.as_ref().and_then(|status| status.renew_time.as_ref());
    renewed.is_some_and(|renewed| now.0.as_second() - renewed.0.as_second() <= SILENT_AFTER_SECONDS)
}

fn speak_for_pools(scene: &Scene<'_>, outbox: &mut Outbox) {
    let raw = &scene.view.objects.pools;
    let taken = scene.desired.vips.iter().filter_map(|plan| plan.address).collect();
    for pool in check_pools(raw.iter().map(AsRef::as_ref)).0 {
        let total = pool.addresses.len_u64();
        let allocated = pool::used(&pool.addresses, &taken);
        let status = VIPPoolStatus { total, allocated, available: total.saturating_sub(allocated) };
        let known = raw.iter().find(|raw| raw.name_any() == pool.name).and_then(|raw| raw.status);
        if known != Some(status) {
            outbox.pools.insert(pool.name, status);
        }
    }
}

/// The VIPNode goes when the Node goes.
fn owner_reference(scene: &Scene<'_>) -> Option<OwnerReference> {
    scene.view.own.as_ref().and_then(|node| node.owner_ref(&()))
}

/// Whether a VIPNode has to be written: it differs in more than its time and its counters, or is old enough to be renewed.
fn is_due(previous: Option<&VIPNodeStatus>, status: &VIPNodeStatus) -> bool {
    let Some(previous) = previous else { return true };
    let seconds = |status: &VIPNodeStatus| status.renew_time.as_ref().map_or(0, |time| time.0.as_second());
    let same = VIPNodeStatus {
        renew_time: previous.renew_time.clone(),
        refused: previous.refused.clone(),
        ..status.clone()
    } == *previous;
    !same || seconds(status) - seconds(previous) >= i64::try_from(RENEW_SECONDS).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use vip_core::desired::{Node, Planner};
    use vip_core::vrrp::RouterId;

    use super::*;

    fn from<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn of_a_router_with_a_master_the_master_says_which_addresses_nobody_has() {
        let vip = |(address, owner): (&str, &str)| {
            json!({"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VirtualIP", "metadata": {"name": address},
                "spec": {"address": address, "virtualRouter": 100}, "status": {"node": owner}})
        };
        let addresses = [("10.87.2.50", "node-2"), ("10.88.2.50", "gone")];
        let pool = json!({"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VIPPool", "metadata": {"name": "lab"},
            "spec": {"addresses": ["10.87.2.0/24", "10.88.2.0/24"], "virtualRouters": {"first": 100, "count": 64}}});
        let mut view: View = from(json!({
            "objects": {"vips": addresses.map(vip), "pools": [pool], "services": []},
            "peers": [], "carried": {}, "labels": {}, "drained": false
        }));
        let node = |name: &str, state: &str| {
            json!({"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VIPNode", "metadata": {"name": name}, "status": {
                "renewTime": "2026-01-01T00:00:00Z", "virtualRouters": [{"interface": "eth0", "family": 4, "virtualRouter": 100,
                    "state": state, "priority": 84, "since": "2026-01-01T00:00:00Z"}]}})
        };
        let now: Time = from(json!("2026-01-01T00:00:10Z"));
        let said = |own: &str, second: VrrpState, view: &View| -> Vec<String> {
            let node = Node { name: own.into(), ..Node::default() };
            let id = RouterId { interface: "eth0".into(), family: Family::V4, vrid: 100 };
            let state = if own == "node-2" { second } else { VrrpState::Backup };
            let router = RouterReport {
                id,
                state,
                priority: 84,
                source: None,
                master: None,
                cause: None,
                lost: None,
                rival: None,
                bound: Vec::new(),
                trouble: None,
            };
            let report = Report { routers: vec![router], ..Report::default() };
            let scene = Scene {
                node: own,
                view,
                desired: &Planner::default().plan(&view.objects, &node),
                lan: &Lan::default(),
                report: Some(&report),
                programmed: &Programmed::default(),
                checks: &Checks::new(0),
                now: &now,
            };
            orphans(&scene).map(str::to_owned).collect()
        };
        view.nodes = vec![from(node("node-1", "Backup")), from(node("node-2", "Master"))];
        let none: [&str; 0] = [];
        // Its own it leaves out later.
        assert_eq!(said("node-2", VrrpState::Master, &view), ["10.87.2.50", "10.88.2.50"]);
        assert_eq!(said("node-1", VrrpState::Master, &view), none);
        // Nobody is master: the first node speaks.
        view.nodes[1] = from(node("node-2", "Backup"));
        assert_eq!(said("node-1", VrrpState::Backup, &view), ["10.87.2.50", "10.88.2.50"]);
        assert_eq!(said("node-2", VrrpState::Backup, &view), none);
    }
}
