//! One Service behind a virtual IP: which of its endpoints get connections, at which ports.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::ServiceSpec;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

use super::clients::{near, sources};
use super::{Node, Objects, Trouble, VipPlan};
use crate::api::{Reason, ServiceRef};
use crate::plan::{Protocol, ServiceKey, Settings, Tables, VirtualService};
use crate::validate::CheckedVip;

/// Seconds for which `sessionAffinity: ClientIP` holds when the Service names no time (Kubernetes' default).
const AFFINITY_DEFAULT: u32 = 10_800;

/// How an endpoint stands. What is better comes later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    /// It is not ready, and may never have been: it keeps connections that it has.
    Unready,
    /// It ends and answers no more: it keeps the connections that it has.
    Ending,
    /// It ends and still answers.
    Serving,
    /// It is ready.
    Ready,
}

impl State {
    /// Absent conditions mean ready, as Kubernetes has it.
    fn of(endpoint: &Endpoint) -> Self {
        let Some(conditions) = &endpoint.conditions else { return Self::Ready };
        let ready = conditions.ready.unwrap_or(true);
        match (ready, conditions.serving.unwrap_or(ready), conditions.terminating.unwrap_or(false)) {
            (true, ..) => Self::Ready,
            (false, true, true) => Self::Serving,
            (false, false, true) => Self::Ending,
            (false, _, false) => Self::Unready,
        }
    }
}

/// An endpoint of the address's family.
struct Candidate<'a> {
    slice: &'a EndpointSlice,
    pod: IpAddr,
    state: State,
    /// On this node.
    local: bool,
}

impl Candidate<'_> {
    fn answers(&self) -> bool {
        self.state >= State::Serving
    }
}

/// Adds one Service's ports and endpoints to the tables and to the plan.
pub(super) fn serve(
    vip: &CheckedVip,
    reference: &ServiceRef,
    objects: &Objects,
    node: &Node,
    tables: &mut Tables,
    plan: &mut VipPlan,
) {
    let address = vip.address;
    let backing = objects.services.get(reference);
    let service = backing.and_then(|backing| backing.service.as_ref());
    let Some(spec) = service.and_then(|service| service.spec.as_ref()) else {
        plan.suffers(Trouble::new(Reason::ServiceNotFound, format!("service {reference} does not exist")));
        return;
    };
    let ports = spec.ports.as_deref().unwrap_or_default();
    let unfit = match spec.type_.as_deref() {
        Some("ExternalName") => {
            Some("is an ExternalName, which has no endpoints that an address could lead to")
        }
        _ => ports.is_empty().then_some("has no ports that an address could serve"),
    };
    if let Some(why) = unfit {
        plan.suffers(Trouble::new(Reason::ServiceNotSupported, format!("service {reference} {why}")));
        return;
    }
    let settings = Settings::new(vip.scheduler, vip.persistence_seconds.or(affinity(spec)));
    let slices = backing.map(|backing| backing.slices.as_slice()).unwrap_or_default();
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    let mut candidates: Vec<Candidate<'_>> = slices
        .iter()
        .filter(|slice| slice.address_type == family)
        .flat_map(|slice| slice.endpoints.iter().map(move |endpoint| (slice, endpoint)))
        .filter_map(|(slice, endpoint)| {
            let pod: IpAddr = endpoint.addresses.first()?.parse().ok()?;
            let local = endpoint.node_name.as_deref() == Some(&node.name);
            // A slice may say of itself what it likes: the kernel would refuse the mixture.
            (pod.is_ipv4() == address.is_ipv4()).then(|| Candidate {
                slice,
                pod,
                state: State::of(endpoint),
                local,
            })
        })
        .collect();
    let anywhere = candidates.iter().any(Candidate::answers);
    let mut direct = false;
    if spec.external_traffic_policy.as_deref() == Some("Local") {
        // Where none is ready, one that ends and still answers is the best that there is.
        let best = candidates.iter().map(|candidate| candidate.state).max();
        let is_best = |candidate: &Candidate<'_>| candidate.answers() && Some(candidate.state) == best;
        if !candidates.iter().any(|candidate| candidate.local && is_best(candidate)) {
            let message = format!(
                "service {reference} has externalTrafficPolicy Local and no ready endpoint on node {}",
                node.name
            );
            plan.candidate = Err(Trouble::new(Reason::NoLocalEndpoint, message));
        }
        // A node that has none does not own the address: its table serves its own processes, which any endpoint may answer.
        if candidates.iter().any(|candidate| candidate.local && candidate.answers()) {
            candidates.retain(|candidate| candidate.local);
            // Their answers come by this node, so they may see whom they answer.
            direct = true;
        }
    }
    let sources = sources(spec, address, node);
    if let Some(fault) = &sources.fault {
        let message = format!(
            "nobody may connect to service {reference}, which names its clients in loadBalancerSourceRanges: {fault}"
        );
        plan.suffers(Trouble::new(Reason::Invalid, message));
    }

    let total: BTreeSet<IpAddr> = candidates.iter().map(|candidate| candidate.pod).collect();
    let pods = weights(candidates.iter().map(|candidate| (candidate.pod, candidate.state))).0;
    let ready = pods.values().filter(|weight| **weight > 0).count();
    plan.backends.ready += u32::try_from(ready).unwrap_or(u32::MAX);
    plan.backends.total += u32::try_from(total.len()).unwrap_or(u32::MAX);
    if !anywhere {
        plan.suffers(Trouble::new(Reason::NoEndpoints, format!("service {reference} has no ready endpoint")));
    }

    for port in ports {
        let protocol = match port.protocol.as_deref() {
            None | Some("TCP") => Protocol::Tcp,
            Some("UDP") => Protocol::Udp,
            Some("SCTP") => Protocol::Sctp,
            Some(other) => {
                let message = format!(
                    "port {} of service {reference} is {other}: only TCP, UDP and SCTP are served",
                    port.port
                );
                plan.suffers(Trouble::new(Reason::ServiceNotSupported, message));
                continue;
            }
        };
        let Ok(number @ 1..) = u16::try_from(port.port) else { continue };
        let key = ServiceKey { address, protocol, port: number };
        if plan.keys.contains(&key) {
            let message = format!(
                "port {number}/{protocol} of service {reference} is taken by another service of {address}"
            );
            plan.suffers(Trouble::new(Reason::PortClash, message));
            continue;
        }
        // A flow of UDP has no end that it could be left to: for as long as its client sends, IPVS would send it to a backend
        // that answers no more. Those of TCP and SCTP begin anew, and are balanced anew then.
        let stays = |candidate: &&Candidate<'_>| protocol != Protocol::Udp || candidate.answers();
        let (destinations, unready) = weights(candidates.iter().filter(stays).filter_map(|candidate| {
            let target = target_port(candidate.slice, port.name.as_deref(), protocol)?;
            Some((SocketAddr::new(candidate.pod, target), candidate.state))
        }));
        let served = destinations.values().any(|weight| *weight > 0);
        if anywhere && !served {
            let message = format!("no ready endpoint of service {reference} has port {number}/{protocol}");
            plan.suffers(Trouble::new(Reason::NoEndpoints, message));
        }
        if direct {
            tables.direct.insert(key, near(destinations.keys().map(SocketAddr::ip), node));
        }
        // IPVS alone would refuse by ICMP, which the kernel sends to a client once a second: our own table does it each time.
        let clients = if served { sources.networks.clone() } else { Some(BTreeSet::new()) };
        tables.sources.extend(clients.map(|networks| (key, networks)));
        plan.keys.push(key);
        tables.ledger.insert(key);
        tables.kept.extend(unready.into_iter().map(|to| (key, to)));
        tables.services.insert(key, VirtualService { settings: settings.clone(), destinations });
    }
}

/// Seconds for which a client stays with its backend, if the Service wants that.
fn affinity(spec: &ServiceSpec) -> Option<u32> {
    (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let client_ip = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        client_ip
            .and_then(|c| c.timeout_seconds)
            .and_then(|s| u32::try_from(s).ok())
            .unwrap_or(AFFINITY_DEFAULT)
    })
}

/// What gets connections, with weight 1, and what keeps those it has, with weight 0. Endpoints that end and still answer
/// get connections while no other does. One may stand in two slices while one of them is being filled: the better word
/// counts. Beside them: what is not ready, which only stays where it is.
fn weights<T: Ord>(found: impl Iterator<Item = (T, State)>) -> (BTreeMap<T, u32>, Vec<T>) {
    let mut states: BTreeMap<T, State> = BTreeMap::new();
    for (what, state) in found {
        let entry = states.entry(what).or_insert(state);
        *entry = state.max(*entry);
    }
    let best = states.values().max().copied().unwrap_or(State::Ready).max(State::Serving);
    let (unready, known): (Vec<_>, Vec<_>) =
        states.into_iter().partition(|(_, state)| *state == State::Unready);
    let weights = known.into_iter().map(|(what, state)| (what, u32::from(state >= best))).collect();
    (weights, unready.into_iter().map(|(what, _)| what).collect())
}

/// The port of a slice's endpoints for a Service port: matched by name, as Kubernetes does.
fn target_port(slice: &EndpointSlice, name: Option<&str>, protocol: Protocol) -> Option<u16> {
    let wanted = name.unwrap_or_default();
    slice
        .ports
        .iter()
        .flatten()
        .find(|port| {
            let same_protocol = port.protocol.as_deref().unwrap_or("TCP") == protocol.to_string();
            port.name.as_deref().unwrap_or_default() == wanted && same_protocol
        })
        .and_then(|port| u16::try_from(port.port?).ok())
        .filter(|port| *port > 0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::super::{Backing, Desired, Node, Objects, Planner};
    use super::*;
    use crate::api::Backends;

    fn from<T: serde::de::DeserializeOwned>(value: Value) -> Arc<T> {
        Arc::new(serde_json::from_value(value).unwrap())
    }

    /// What node-1 makes of shop/web at 10.87.2.50: the virtual services as text, the backends and the troubles.
    fn read(spec: Value, slices: &[Value]) -> (Vec<String>, Backends, Vec<Reason>, Desired) {
        let at = ServiceRef { namespace: "shop".into(), name: "web".into() };
        let backing = Backing {
            service: Some(from(json!({"spec": spec}))),
            slices: slices.iter().cloned().map(from).collect(),
        };
        let objects = Objects {
            vips: vec![from(json!({"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VirtualIP",
                "metadata": {"name": "10.87.2.50"},
                "spec": {"address": "10.87.2.50", "virtualRouter": 100, "services": [{"namespace": "shop", "name": "web"}]}}))],
            pools: vec![from(json!({"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VIPPool",
                "metadata": {"name": "lab"},
                "spec": {"addresses": ["10.87.2.0/24"], "virtualRouters": {"first": 100, "count": 64}}}))],
            services: [(at, Arc::new(backing))].into(),
            ..Objects::default()
        };
        let nets = vec!["10.87.0.11/16".parse().unwrap()];
        let node = Node { name: "node-1".into(), interfaces: vec![("eth0".into(), nets)], ..Node::default() };
        let desired = Planner::default().plan(&objects, &node);
        let services = desired.tables.services.iter();
        let text = services
            .map(|(key, service)| {
                let to = service.destinations.iter().map(|(to, weight)| format!(" {to}={weight}"));
                format!("{}/{}{}", key.port, key.protocol, to.collect::<String>())
            })
            .collect();
        let plan = &desired.vips[0];
        let troubles = plan.troubles.iter().map(|trouble| trouble.reason).collect();
        (text, plan.backends, troubles, desired)
    }

    fn http() -> Value {
        json!({"ports": [{"name": "http", "port": 80}]})
    }

    /// A slice with the port `http`: each endpoint as its last octet, its node and `r`eady, `s`erving, `t`erminating.
    fn slice(port: u16, endpoints: &[(u8, &str, &str)]) -> Value {
        let endpoints: Vec<Value> = endpoints
            .iter()
            .map(|(number, node, state)| {
                json!({"addresses": [format!("10.244.1.{number}")], "nodeName": node, "conditions": {
                    "ready": state.contains('r'), "serving": state.contains('s'), "terminating": state.contains('t')}})
            })
            .collect();
        json!({"addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "http", "port": port}]})
    }

    #[test]
    fn which_endpoints_get_connections() {
        let of = |states: &[&str]| {
            let endpoints: Vec<(u8, &str, &str)> =
                (1..).zip(states).map(|(number, state)| (number, "node-1", *state)).collect();
            let (text, backends, troubles, _) = read(http(), &[slice(8080, &endpoints)]);
            (text.join(";"), (backends.ready, backends.total), troubles)
        };
        let none = vec![Reason::NoEndpoints];
        for (states, text, backends, troubles) in [
            (vec!["rs", "st"], "80/TCP 10.244.1.1:8080=1 10.244.1.2:8080=0", (1, 2), vec![]),
            // Nothing else serves.
            (vec!["st", "t"], "80/TCP 10.244.1.1:8080=1 10.244.1.2:8080=0", (1, 2), vec![]),
            (vec!["t", "s"], "80/TCP 10.244.1.1:8080=0", (0, 2), none.clone()),
            (vec!["", ""], "80/TCP", (0, 2), none.clone()),
            (vec![], "80/TCP", (0, 0), none),
            // publishNotReadyAddresses: ready is said of whatever there is.
            (vec!["rt"], "80/TCP 10.244.1.1:8080=1", (1, 1), vec![]),
        ] {
            assert_eq!(of(&states), (text.to_owned(), backends, troubles), "{states:?}");
        }
    }

    #[test]
    fn what_no_endpoint_serves_nobody_may_connect_to() {
        let clients = |endpoints: &[(u8, &str, &str)]| {
            let desired = read(http(), &[slice(8080, endpoints)]).3;
            desired.tables.sources.values().map(BTreeSet::len).collect::<Vec<_>>()
        };
        assert_eq!(clients(&[(1, "node-1", "rs"), (2, "node-1", "")]), [0_usize; 0]);
        for states in ["", "t", "s"] {
            assert_eq!(clients(&[(1, "node-1", states)]), [0], "{states}");
        }
        assert_eq!(clients(&[]), [0]);
    }

    #[test]
    fn what_is_no_longer_ready_may_stay_for_its_connections() {
        let slices =
            [slice(8080, &[(1, "node-1", "rs"), (2, "node-1", ""), (3, "node-1", "s"), (4, "node-1", "t")])];
        let (text, _, _, desired) = read(http(), &slices);
        assert_eq!(text, ["80/TCP 10.244.1.1:8080=1 10.244.1.4:8080=0"]);
        let kept: Vec<String> = desired.tables.kept.iter().map(|(_, to)| to.to_string()).collect();
        assert_eq!(kept, ["10.244.1.2:8080", "10.244.1.3:8080"]);
    }

    #[test]
    fn over_udp_what_does_not_answer_goes_at_once() {
        let mut slice =
            slice(8080, &[(1, "node-1", "rs"), (2, "node-1", ""), (3, "node-1", "st"), (4, "node-1", "t")]);
        slice["ports"][0]["protocol"] = json!("UDP");
        let udp = json!({"ports": [{"name": "http", "port": 80, "protocol": "UDP"}]});
        let (text, backends, _, desired) = read(udp, &[slice]);
        assert_eq!(text, ["80/UDP 10.244.1.1:8080=1 10.244.1.3:8080=0"]);
        assert_eq!((backends.total, desired.tables.kept.len()), (4, 0));
    }

    #[test]
    fn a_named_port_may_differ_from_pod_to_pod() {
        let slices = [slice(8080, &[(1, "node-1", "rs")]), slice(9090, &[(2, "node-2", "rs")])];
        assert_eq!(read(http(), &slices).0, ["80/TCP 10.244.1.1:8080=1 10.244.1.2:9090=1"]);
    }

    #[test]
    fn what_makes_no_sense_is_left_out_and_the_rest_is_served() {
        let mut odd = slice(8080, &[(1, "node-1", "rs"), (1, "node-1", "rs")]);
        odd["endpoints"].as_array_mut().unwrap().push(json!({"addresses": ["fd00::1"]}));
        odd["endpoints"].as_array_mut().unwrap().push(json!({"addresses": ["pod.example"]}));
        // The same endpoint in a second slice, which knows it better.
        let twice = [slice(8080, &[(1, "node-1", "st")]), odd];
        let (text, backends, troubles, _) = read(http(), &twice);
        assert_eq!((text, backends.total), (vec!["80/TCP 10.244.1.1:8080=1".to_owned()], 1));
        assert_eq!(troubles, []);
        let (text, _, troubles, _) = read(http(), &[slice(0, &[(1, "node-1", "rs")])]);
        assert_eq!((text, troubles), (vec!["80/TCP".to_owned()], vec![Reason::NoEndpoints]), "port 0");
        let two = json!({"ports": [{"name": "http", "port": 80}, {"name": "tls", "port": 443}]});
        let (text, _, troubles, _) = read(two, &[slice(8080, &[(1, "node-1", "rs")])]);
        assert_eq!((text.len(), troubles), (2, vec![Reason::NoEndpoints]), "a port that no pod has");
    }

    #[test]
    fn local_traffic_stays_on_the_node_and_waits_for_its_pods() {
        let local = json!({"ports": [{"name": "http", "port": 80}], "externalTrafficPolicy": "Local"});
        let of = |endpoints: &[(u8, &str, &str)]| {
            let (text, backends, _, desired) = read(local.clone(), &[slice(8080, endpoints)]);
            let candidate = desired.vips[0].candidate.clone().map_err(|trouble| trouble.reason);
            let node = Node { name: "node-1".into(), ..Node::default() };
            let routers = desired.elections(&node, &[], std::time::Duration::from_secs(1), |_| true);
            assert_eq!(candidate.is_ok(), !routers.is_empty());
            (text.join(";"), (backends.ready, backends.total), candidate.err())
        };
        let one = "80/TCP 10.244.1.1:8080=1".to_owned();
        assert_eq!(of(&[(1, "node-1", "rs"), (2, "node-2", "rs")]), (one.clone(), (1, 1), None));
        // Its last pod ends: it hands the address over, and serves until that has happened.
        let waits = Some(Reason::NoLocalEndpoint);
        assert_eq!(of(&[(1, "node-1", "st"), (2, "node-2", "rs")]), (one.clone(), (1, 1), waits));
        // It is the last one that answers at all.
        assert_eq!(of(&[(1, "node-1", "st"), (2, "node-2", "t")]), (one.clone(), (1, 1), None));
        assert_eq!(of(&[(1, "node-1", "st"), (2, "node-2", "st")]), (one.clone(), (1, 1), None));
        assert_eq!(of(&[(1, "node-1", "t")]).2, waits);
        let other = "80/TCP 10.244.1.2:8080=1".to_owned();
        assert_eq!(of(&[(1, "node-1", ""), (2, "node-2", "rs")]), (other, (1, 2), waits));
    }

    #[test]
    fn what_is_said_of_clients_follows_the_service_and_its_pods() {
        let spec = json!({"ports": [{"name": "http", "port": 80, "protocol": "SCTP"}], "externalTrafficPolicy": "Local",
            "loadBalancerSourceRanges": ["192.0.2.0/24"]});
        let of = |endpoints: &[(u8, &str, &str)]| {
            let mut slice = slice(8080, endpoints);
            slice["ports"][0]["protocol"] = json!("SCTP");
            let (text, _, _, desired) = read(spec.clone(), &[slice]);
            let key = *desired.tables.ledger.first().unwrap();
            assert_eq!(desired.tables.sources[&key], ["192.0.2.0/24".parse().unwrap()].into());
            (
                text.join(";"),
                desired.tables.direct.get(&key).map(|near| near.iter().next().unwrap().to_string()),
            )
        };
        let own = of(&[(1, "node-1", "rs"), (2, "node-2", "rs")]);
        assert_eq!(own, ("80/SCTP 10.244.1.1:8080=1".to_owned(), Some("10.244.1.1/32".to_owned())));
        // Pods elsewhere would answer past this node.
        assert_eq!(of(&[(2, "node-2", "rs")]), ("80/SCTP 10.244.1.2:8080=1".to_owned(), None));
        let mut bad = spec.clone();
        bad["loadBalancerSourceRanges"] = json!(["somewhere"]);
        let (_, _, troubles, desired) = read(bad, &[slice(8080, &[(1, "node-1", "rs")])]);
        assert_eq!(troubles.first(), Some(&Reason::Invalid));
        assert!(desired.tables.sources.values().all(BTreeSet::is_empty) && desired.tables.sources.len() == 1);
    }

    #[test]
    fn an_address_that_waits_for_a_backend_holds_back_those_that_move_with_it() {
        let local = json!({"ports": [{"name": "http", "port": 80}], "externalTrafficPolicy": "Local"});
        let mut desired = read(local, &[slice(8080, &[(2, "node-2", "rs")])]).3;
        let mut other = desired.vips[0].clone();
        other.address = Some(IpAddr::from([10, 87, 2, 51]));
        other.candidate = Ok("eth0".into());
        desired.vips.push(other.clone());
        let node = Node { name: "node-1".into(), ..Node::default() };
        let enter = |desired: &Desired| {
            desired.elections(&node, &[], std::time::Duration::from_secs(1), |_| true).len()
        };
        assert_eq!(enter(&desired), 0);
        other.vrid = 101;
        desired.vips[1] = other;
        assert_eq!(enter(&desired), 1);
    }
}
