//! What the owner of a virtual IP tells of it in depth: how it came here, and each backend with its connections.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use vip_core::api::DRAIN_LABEL;
use vip_core::api::{
    Destination, Handover, HandoverReason, MOST_DESTINATIONS, VIPNode, VirtualIP, VirtualIPStatus,
};
use vip_core::checks::Checks;
use vip_core::desired::VipPlan;
use vip_core::plan::Tables;
use vip_core::vrrp::Cause;

use crate::agent::census::Counts;

/// How a virtual IP came to this node: anew, or as it was told before.
pub fn handover(
    vip: &VirtualIP,
    node: &str,
    cause: Option<Cause>,
    nodes: &[std::sync::Arc<VIPNode>],
    now: &Time,
) -> Option<Handover> {
    let previous = vip.status.as_ref();
    let last = previous.and_then(|status| status.last_handover.clone());
    let before = previous.and_then(|status| status.node.clone());
    if before.as_deref() == Some(node) {
        return last;
    }
    let is_first = previous.is_none_or(|status| status.first_announced.is_none());
    let from = before.or_else(|| last.map(|last| last.to)).filter(|from| from != node);
    let is_drained = from.as_ref().is_some_and(|from| {
        nodes.iter().any(|other| other.name_any() == *from && other.labels().contains_key(DRAIN_LABEL))
    });
    let reason = match cause {
        _ if is_first => HandoverReason::First,
        _ if from.is_none() => HandoverReason::Unowned,
        Some(Cause::Silence) => HandoverReason::OwnerSilent,
        Some(Cause::Goodbye) if is_drained => HandoverReason::Drained,
        Some(Cause::Preference) => HandoverReason::Moved,
        Some(Cause::Goodbye) => HandoverReason::OwnerLeft,
        Some(Cause::Rank) => HandoverReason::HigherPriority,
        Some(Cause::Alone) | None => HandoverReason::Unowned,
    };
    Some(Handover { from: from.filter(|_| !is_first), to: node.to_owned(), at: now.clone(), reason })
}

/// The backends of a virtual IP that this node owns, and how many more there are than are told one by one.
///
/// Numbers of connections change all the time: those that were told stay until a quarter of one or more has changed.
pub fn destinations(
    plan: &VipPlan,
    tables: &Tables,
    checks: &Checks,
    counts: &Counts,
    previous: Option<&VirtualIPStatus>,
) -> (Vec<Destination>, u32) {
    let mut all = Vec::new();
    for key in &plan.keys {
        let found = tables.services.get(key).into_iter().flat_map(|service| &service.destinations);
        all.extend(found.map(|(to, weight)| Destination {
            protocol: key.protocol,
            port: key.port,
            to: *to,
            weight: *weight,
            connections: counts.get(&(*key, *to)).copied().unwrap_or_default(),
            check: plan.check.map(|_| checks.verdict(key.protocol, *to)),
        }));
    }
    if all.len() > MOST_DESTINATIONS {
        all.sort_by_key(|one| one.check);
    }
    let more = u32::try_from(all.len().saturating_sub(MOST_DESTINATIONS)).unwrap_or(u32::MAX);
    all.truncate(MOST_DESTINATIONS);
    let told = previous.map(|status| status.destinations.as_slice()).unwrap_or_default();
    if told.len() == all.len() && all.iter().zip(told).all(|(now, told)| is_nearly(now, told)) {
        all.clear();
        all.extend(told);
    }
    (all, more)
}

/// Whether the same is to be told, or nearly the same number of connections.
fn is_nearly(now: &Destination, told: &Destination) -> bool {
    let same = Destination { connections: told.connections, ..*now } == *told;
    let most = now.connections.max(told.connections);
    same && now.connections.abs_diff(told.connections) <= most / 4
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};
    use vip_core::desired::{Backing, Node, Objects, Planner};

    use super::*;

    fn from<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    fn vip(status: &Value) -> VirtualIP {
        let services = json!([{"namespace": "shop", "name": "web"}]);
        let spec = json!({"address": "10.87.2.50", "virtualRouter": 100, "services": services});
        from(json!({"metadata": {"name": "10.87.2.50"}, "spec": spec, "status": status}))
    }

    #[test]
    fn why_it_came_here() {
        let now: Time = from(json!("2026-01-01T00:00:00Z"));
        let nodes: Vec<Arc<VIPNode>> =
            vec![from(json!({"metadata": {"name": "drained", "labels": {DRAIN_LABEL: "true"}}}))];
        let told = |status: &Value, cause| {
            handover(&vip(status), "here", cause, &nodes, &now)
                .map(|told| told.to_string())
                .unwrap_or_default()
        };
        let owned = |node: &str| json!({"node": node, "firstAnnounced": "2025-01-01T00:00:00Z"});
        assert_eq!(told(&json!({}), Some(Cause::Silence)), "to here: no node had owned it before");
        for (node, cause, words) in [
            ("there", Cause::Silence, "there was not heard any more"),
            ("there", Cause::Goodbye, "there gave it up (stopped, or it could not serve any more)"),
            ("drained", Cause::Goodbye, "drained was drained"),
            ("there", Cause::Preference, "here is its preferred node"),
            ("there", Cause::Rank, "both believed that they owned it, and here has the higher priority"),
        ] {
            assert_eq!(told(&owned(node), Some(cause)), format!("from {node} to here: {words}"));
        }
        // What was told stays, also when nobody owns it for a while.
        let last = |to: &str| json!({"to": to, "at": "2025-06-01T00:00:00Z", "reason": "First"});
        let mut status = owned("here");
        assert_eq!(told(&status, Some(Cause::Silence)), "");
        status["lastHandover"] = last("here");
        assert_eq!(told(&status, Some(Cause::Silence)), "to here: no node had owned it before");
        status["node"] = json!(null);
        assert_eq!(told(&status, Some(Cause::Silence)), "to here: nobody owned it");
        status["lastHandover"] = last("there");
        assert_eq!(told(&status, Some(Cause::Silence)), "from there to here: there was not heard any more");
    }

    #[test]
    fn each_backend_with_its_weight_and_connections_that_have_changed_much() {
        let addresses: Vec<String> = (1..=20).map(|n| format!("10.244.1.{n}")).collect();
        let endpoints: Vec<Value> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
        let slice = json!({"addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]});
        let service = json!({"spec": {"ports": [{"name": "http", "port": 80}]}});
        let pool = json!({"metadata": {"name": "lab"},
            "spec": {"addresses": ["10.87.2.0/24"], "virtualRouters": {"first": 100, "count": 64}}});
        let backing = Backing { service: Some(from(service)), slices: vec![from(slice)] };
        let shop = vip_core::api::ServiceRef { namespace: "shop".into(), name: "web".into() };
        let objects = Objects {
            vips: vec![Arc::new(vip(&json!({})))],
            pools: vec![from(pool)],
            services: [(shop, Arc::new(backing))].into(),
            ..Objects::default()
        };
        let desired = Planner::default().plan(&objects, &Node::default());
        let (plan, checks) = (&desired.vips[0], Checks::new(1));
        let key = plan.keys[0];
        let told = |counts: &Counts, before: &[Destination]| {
            let previous = VirtualIPStatus { destinations: before.to_vec(), ..VirtualIPStatus::default() };
            destinations(plan, &desired.tables, &checks, counts, Some(&previous))
        };
        let counts = |count: u32| Counts::from([((key, ([10, 244, 1, 1], 8080).into()), count)]);
        let (first, more) = told(&counts(100), &[]);
        assert_eq!((first.len(), more), (MOST_DESTINATIONS, 4));
        assert_eq!((first[0].weight, first[0].connections, first[1].connections), (1, 100, 0));
        for (count, shown) in [(80, 100), (125, 100), (70, 70), (140, 140), (0, 0)] {
            assert_eq!(told(&counts(count), &first).0[0].connections, shown, "{count} after 100");
        }
        assert_eq!(told(&counts(1), &told(&counts(0), &[]).0).0[0].connections, 1);
    }
}
