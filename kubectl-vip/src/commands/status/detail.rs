//! One virtual IP in depth: how it came to its owner, who competes for it with which rank, each backend as Kubernetes and
//! as the owner see it, its conditions, and what happened to it lately.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use vip_core::api::{Destination, ServiceRef, VIPNode, VirtualIP};

use super::FORBIDDEN;
use crate::cluster::{Cluster, family, permitted};
use crate::exit::Result;
use crate::judge::Judge;
use crate::output::{NONE, Table, UNKNOWN, age};

/// Events that are shown.
const RECENT: usize = 10;

/// What is read for one virtual IP alone; `None`: it may not be read.
pub struct Detail {
    /// The EndpointSlices of its Services.
    pub slices: Option<Vec<EndpointSlice>>,
    /// Events about it.
    pub events: Option<Vec<Event>>,
}

impl Detail {
    /// Reads it.
    pub async fn read(cluster: &Cluster, vip: &VirtualIP) -> Result<Self> {
        // What happens to objects without a namespace is told in this one.
        let events: Api<Event> = Api::namespaced(cluster.client.clone(), "default");
        // By uid: an earlier virtual IP had the same name.
        let uid = vip.uid().unwrap_or_default();
        let about = format!("involvedObject.kind=VirtualIP,involvedObject.uid={uid}");
        let about = ListParams::default().fields(&about);
        let (events, slices) =
            futures::join!(events.list(&about), slices(cluster, vip.spec.services.as_slice()));
        Ok(Self { events: permitted(events)?.map(|list| list.items), slices: slices? })
    }

    /// The parts, each after an empty line.
    pub fn text(&self, vip: &VirtualIP, nodes: Option<&[VIPNode]>, now: Timestamp) -> String {
        let judge = Judge::new(nodes, now);
        let mut text = format!(
            "\nVirtual router {} of {}, scheduler {}\n",
            vip.spec.virtual_router,
            vip.spec.address,
            vip.spec.scheduler.as_str()
        );
        let status = vip.status.as_ref();
        if let Some(handover) = status.and_then(|status| status.last_handover.as_ref()) {
            let ago = age(handover.at.0, now);
            text.push_str(&format!("Last handover {ago} ago, {handover}\n"));
        }
        text.push_str(&part(nodes.map(|nodes| ranks(vip, nodes, &judge)), "NODE"));
        text.push('\n');
        let backends = backends(vip, self.slices.as_deref(), &judge);
        let is_readable = self.slices.is_some() || !backends.is_empty();
        text.push_str(&part(is_readable.then_some(backends), "BACKEND"));
        match status.map(|status| status.more_destinations) {
            None | Some(0) => {}
            Some(more) => text.push_str(&format!("The owner has {more} more than it tells one by one.\n")),
        }
        text.push('\n');
        text.push_str(&part(Some(conditions(vip, &judge)), "CONDITION"));
        text.push('\n');
        text.push_str(&part(self.events.as_deref().map(|events| recent(events, now)), "LAST SEEN"));
        text
    }
}

/// The EndpointSlices of the Services; `None` when one may not be read.
async fn slices(cluster: &Cluster, services: &[ServiceRef]) -> Result<Option<Vec<EndpointSlice>>> {
    let mut all = Vec::new();
    for service in services {
        match cluster.list_slices(service).await? {
            Some(slices) => all.extend(slices),
            None => return Ok(None),
        }
    }
    Ok(Some(all))
}

/// A table, or that there is nothing in it, or that it may not be read.
fn part(table: Option<Table>, what: &str) -> String {
    match table {
        None => format!("{what}\n{FORBIDDEN}\n"),
        Some(table) if table.is_empty() => format!("{what}\n{NONE}\n"),
        Some(table) => table.render(false),
    }
}

/// The nodes that compete, the first first. Of a silent one nothing is known to hold.
fn ranks(vip: &VirtualIP, nodes: &[VIPNode], judge: &Judge<'_>) -> Table {
    let family = family(vip);
    let mut ranked = Vec::new();
    for node in nodes {
        let routers = node.status.iter().flat_map(|status| &status.virtual_routers);
        let mut ours =
            routers.filter(|one| (one.family, one.virtual_router) == (family, vip.spec.virtual_router));
        ranked.extend(ours.next().map(|router| (router, node)));
    }
    ranked.sort_by(|(a, left), (b, right)| {
        b.priority.cmp(&a.priority).then_with(|| left.name_any().cmp(&right.name_any()))
    });
    let mut table = Table::new(&["NODE", "PRIORITY", "STATE", "SINCE", "INTERFACE"]);
    for (router, node) in ranked {
        let (state, since) = match judge.silent(&node.name_any()) {
            Some((unknown, _)) => (unknown, UNKNOWN.to_owned()),
            None => (format!("{:?}", router.state), age(router.since.0, judge.now)),
        };
        table.row([node.name_any(), router.priority.to_string(), state, since, router.interface.clone()]);
    }
    table
}

/// Where Kubernetes says that an endpoint is, of what it is and how it stands.
#[derive(Clone, Default)]
struct Place {
    service: String,
    pod: String,
    node: String,
    state: &'static str,
}

/// Each backend: what Kubernetes says of it, and what its owner does with it. One may serve several ports.
fn backends(vip: &VirtualIP, slices: Option<&[EndpointSlice]>, judge: &Judge<'_>) -> Table {
    let mut places = slices.map(|slices| endpoints(vip, slices));
    let status = vip.status.as_ref();
    let told = status.map(|status| status.destinations.as_slice()).unwrap_or_default();
    // What an owner wrote that has been silent since need not hold any more.
    let owner = status.and_then(|status| status.node.as_deref());
    let is_known = owner.is_some_and(|owner| judge.silent(owner).is_none());
    let mut table =
        Table::new(&["BACKEND", "PORT", "WEIGHT", "CONNECTIONS", "CHECK", "STATE", "SERVICE", "POD", "NODE"]);
    let mut row = |to: String, port: String, numbers: [String; 3], place: Place| {
        let Place { service, pod, node, state } = place;
        let [weight, connections, check] = numbers;
        table.row([to, port, weight, connections, check, state.to_owned(), service, pod, node]);
    };
    let unknown = || [UNKNOWN, UNKNOWN, UNKNOWN].map(str::to_owned);
    let mut met = Vec::new();
    for Destination { protocol, port, to, weight, connections, check } in told {
        let place = match &mut places {
            None => Place {
                service: FORBIDDEN.into(),
                pod: FORBIDDEN.into(),
                node: FORBIDDEN.into(),
                state: FORBIDDEN,
            },
            Some(places) => {
                met.push(*to);
                places.get(to).cloned().unwrap_or(Place { state: "Gone", ..Place::default() })
            }
        };
        let check = check.map(|verdict| format!("{verdict:?}")).unwrap_or_default();
        let numbers = match is_known {
            true => [weight.to_string(), connections.to_string(), check],
            false => unknown(),
        };
        row(to.to_string(), format!("{port}/{protocol}"), numbers, place);
    }
    // Those that IPVS has not, or of which the owner does not tell.
    let is_told = status.is_some_and(|status| is_known && status.more_destinations == 0);
    for (to, place) in places.into_iter().flatten().filter(|(to, _)| !met.contains(to)) {
        let numbers = if is_told { Default::default() } else { unknown() };
        row(to.to_string(), String::new(), numbers, place);
    }
    table
}

/// What Kubernetes says of the endpoints of the address's family.
fn endpoints(vip: &VirtualIP, slices: &[EndpointSlice]) -> BTreeMap<SocketAddr, Place> {
    let family = format!("IPv{}", family(vip));
    let mut places = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.address_type == family) {
        let service = slice.labels().get("kubernetes.io/service-name").cloned().unwrap_or_default();
        let ports = || slice.ports.iter().flatten().filter_map(|port| u16::try_from(port.port?).ok());
        for endpoint in &slice.endpoints {
            let pod = endpoint.target_ref.as_ref().and_then(|target| target.name.clone());
            let place = Place {
                service: service.clone(),
                pod: pod.unwrap_or_default(),
                node: endpoint.node_name.clone().unwrap_or_default(),
                state: condition_of(endpoint),
            };
            // The first address is the one that counts (discovery.k8s.io/v1).
            let address = endpoint.addresses.first().and_then(|address| address.parse().ok());
            places.extend(
                address
                    .into_iter()
                    .flat_map(|address| ports().map(move |port| SocketAddr::new(address, port)))
                    .map(|to| (to, place.clone())),
            );
        }
    }
    places
}

/// A word for the state of an endpoint. What is unset counts as ready (discovery.k8s.io/v1: EndpointConditions).
fn condition_of(endpoint: &Endpoint) -> &'static str {
    let conditions = endpoint.conditions.as_ref();
    match conditions.and_then(|conditions| conditions.terminating) {
        Some(true) => "Terminating",
        _ if conditions.and_then(|conditions| conditions.ready) == Some(false) => "NotReady",
        _ => "Ready",
    }
}

/// The conditions. What an owner wrote that has been silent since need not hold any more.
fn conditions(vip: &VirtualIP, judge: &Judge<'_>) -> Table {
    let owner = vip.status.as_ref().and_then(|status| status.node.as_deref());
    let is_silent = owner.is_some_and(|owner| judge.silent(owner).is_some());
    let mut table = Table::new(&["CONDITION", "STATUS", "REASON", "SINCE", "MESSAGE"]);
    let conditions = vip.status.iter().flat_map(|status| &status.conditions);
    for condition in conditions {
        table.row([
            condition.type_.clone(),
            if is_silent { "Unknown".to_owned() } else { condition.status.clone() },
            condition.reason.clone(),
            age(condition.last_transition_time.0, judge.now),
            condition.message.clone(),
        ]);
    }
    table
}

/// The latest Events, the newest last. Who owned the address before, and why it moved, is said there.
fn recent(events: &[Event], now: Timestamp) -> Table {
    let mut known: Vec<(Timestamp, &Event)> =
        events.iter().filter_map(|event| Some((last_seen(event)?, event))).collect();
    known.sort_by_key(|(time, _)| *time);
    let mut table = Table::new(&["LAST SEEN", "TYPE", "REASON", "MESSAGE"]);
    for (time, event) in known.iter().skip(known.len().saturating_sub(RECENT)) {
        table.row([
            age(*time, now),
            event.type_.clone().unwrap_or_default(),
            event.reason.clone().unwrap_or_default(),
            event.message.clone().unwrap_or_default(),
        ]);
    }
    table
}

fn last_seen(event: &Event) -> Option<Timestamp> {
    let repeated = event.series.as_ref().and_then(|series| series.last_observed_time.as_ref());
    let once = event.event_time.as_ref();
    let old = event.last_timestamp.as_ref().map(|time| time.0);
    repeated.map(|time| time.0).or(once.map(|time| time.0)).or(old)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn now() -> Timestamp {
        "2026-01-06T00:00:00Z".parse().unwrap()
    }

    fn node(name: &str, renewed: &str, priority: u8, state: &str) -> VIPNode {
        serde_json::from_value(json!({
            "metadata": {"name": name},
            "status": {"renewTime": renewed, "agentVersion": "0.1.0", "dataplane": {"ready": true},
                "virtualRouters": [
                    {"interface": "eth0", "family": 6, "virtualRouter": 100, "state": "Master", "priority": 1,
                     "since": "2026-01-05T23:00:00Z"},
                    {"interface": "eth0", "family": 4, "virtualRouter": 100, "state": state, "priority": priority,
                     "since": "2026-01-05T23:50:00Z"}]},
        }))
        .unwrap()
    }

    fn vip() -> VirtualIP {
        serde_json::from_value(json!({
            "metadata": {"name": "192.168.10.241"},
            "spec": {"address": "192.168.10.241", "virtualRouter": 100,
                "services": [{"namespace": "shop", "name": "web"}]},
            "status": {"node": "node-2", "backends": {"ready": 1, "total": 3},
                "lastHandover": {"from": "node-1", "to": "node-2", "at": "2026-01-05T23:50:00Z", "reason": "OwnerSilent"},
                "destinations": [
                    {"protocol": "TCP", "port": 80, "to": "10.244.1.2:8080", "weight": 1, "connections": 7,
                     "check": "Healthy"},
                    {"protocol": "TCP", "port": 80, "to": "10.244.2.2:8080", "weight": 0},
                    {"protocol": "TCP", "port": 80, "to": "10.244.9.9:8080", "weight": 0, "check": "Failing"}],
                "conditions": [
                {"type": "Announced", "status": "True", "reason": "Active", "message": "by node-2",
                 "lastTransitionTime": "2026-01-05T23:50:00Z"}]},
        }))
        .unwrap()
    }

    #[test]
    fn everything_about_one() {
        let slice = serde_json::from_value(json!({
            "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"port": 8080}],
            "endpoints": [
                {"addresses": ["10.244.1.2"], "nodeName": "node-1", "targetRef": {"kind": "Pod", "name": "web-a"},
                 "conditions": {"ready": true}},
                {"addresses": ["10.244.2.2"], "conditions": {"ready": false, "serving": true, "terminating": true}},
                {"addresses": ["10.244.3.2"], "conditions": {"ready": false}}],
        }))
        .unwrap();
        let event = |reason: &str, time: &str, message: &str| -> Event {
            serde_json::from_value(json!({
                "metadata": {"name": reason}, "involvedObject": {}, "eventTime": time, "type": "Normal",
                "reason": reason, "message": message,
            }))
            .unwrap()
        };
        let detail = Detail {
            slices: Some(vec![slice]),
            events: Some(vec![
                event("Announced", "2026-01-05T23:50:00.000000Z", "announced by node-2, was on node-1"),
                event("Released", "2026-01-05T23:49:59.000000Z", "no longer announced by node-1"),
            ]),
        };
        let nodes = [
            node("node-1", "2026-01-05T23:59:00Z", 194, "Backup"),
            node("node-2", "2026-01-05T23:59:58Z", 254, "Master"),
        ];
        assert_eq!(
            detail.text(&vip(), Some(&nodes), now()),
            "\n\
             Virtual router 100 of 192.168.10.241, scheduler wlc\n\
             Last handover 10m ago, from node-1 to node-2: node-1 was not heard any more\n\
             NODE     PRIORITY   STATE           SINCE       INTERFACE\n\
             node-2   254        Master          10m         eth0\n\
             node-1   194        Unknown (60s)   <unknown>   eth0\n\
             \n\
             BACKEND           PORT     WEIGHT   CONNECTIONS   CHECK     STATE         SERVICE   POD      NODE\n\
             10.244.1.2:8080   80/TCP   1        7             Healthy   Ready         web       web-a    node-1\n\
             10.244.2.2:8080   80/TCP   0        0             <none>    Terminating   web       <none>   <none>\n\
             10.244.9.9:8080   80/TCP   0        0             Failing   Gone          <none>    <none>   <none>\n\
             10.244.3.2:8080   <none>   <none>   <none>        <none>    NotReady      web       <none>   <none>\n\
             \n\
             CONDITION   STATUS   REASON   SINCE   MESSAGE\n\
             Announced   True     Active   10m     by node-2\n\
             \n\
             LAST SEEN   TYPE     REASON      MESSAGE\n\
             10m         Normal   Released    no longer announced by node-1\n\
             10m         Normal   Announced   announced by node-2, was on node-1\n"
        );
    }

    #[test]
    fn what_may_not_be_read_is_marked_and_what_is_not_there_is_none() {
        let text = Detail { slices: None, events: None }.text(&vip(), None, now());
        assert!(text.contains("NODE\nForbidden\n\nBACKEND "), "{text}");
        let told =
            "80/TCP   1        7             Healthy   Forbidden   Forbidden   Forbidden   Forbidden\n";
        assert!(text.contains(told), "{text}");
        let mut without = vip();
        without.status = None;
        let text = Detail { slices: None, events: None }.text(&without, None, now());
        assert!(text.contains("\nBACKEND\nForbidden\n"), "{text}");
        assert!(text.ends_with("LAST SEEN\nForbidden\n"), "{text}");
        let text =
            Detail { slices: Some(Vec::new()), events: Some(Vec::new()) }.text(&vip(), Some(&[]), now());
        assert!(text.contains("NODE\n<none>\n\nBACKEND "), "{text}");
        // Its owner has no agent any more.
        assert!(text.contains("80/TCP   <unknown>   <unknown>     <unknown>   Gone "), "{text}");
        assert!(text.contains("Announced   Unknown  "), "{text}");
        assert!(text.ends_with("LAST SEEN\n<none>\n"), "{text}");
    }
}
