//! One Service behind a virtual IP: which of its endpoints get connections, at which ports.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

use super::{Objects, Trouble, VipPlan};
use crate::api::{Reason, ServiceRef};
use crate::plan::{Protocol, ServiceKey, Settings, Tables, VirtualService};
use crate::validate::CheckedVip;

/// Seconds for which `sessionAffinity: ClientIP` holds when the Service names no time (Kubernetes' default).
const AFFINITY_DEFAULT: u32 = 10_800;

/// Adds one Service's ports and endpoints to the tables and to the plan.
pub(super) fn serve(
    vip: &CheckedVip,
    reference: &ServiceRef,
    objects: &Objects,
    tables: &mut Tables,
    plan: &mut VipPlan,
) {
    let address = vip.address;
    let Some(spec) = objects.services.get(reference).and_then(|service| service.spec.as_ref()) else {
        plan.troubles
            .push(Trouble::new(Reason::ServiceNotFound, format!("service {reference} does not exist")));
        return;
    };
    let ports = spec.ports.as_deref().unwrap_or_default();
    if spec.type_.as_deref() == Some("ExternalName") || ports.is_empty() {
        let message = format!("service {reference} has no ports that an address could serve");
        plan.troubles.push(Trouble::new(Reason::ServiceNotSupported, message));
        return;
    }
    let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let client_ip = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        client_ip
            .and_then(|c| c.timeout_seconds)
            .and_then(|s| u32::try_from(s).ok())
            .unwrap_or(AFFINITY_DEFAULT)
    });
    let settings = Settings::new(vip.scheduler, vip.persistence_seconds.or(affinity));
    let slices = objects.slices.get(reference).map(Vec::as_slice).unwrap_or_default();
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    let endpoints = || {
        let slices = slices.iter().filter(|slice| slice.address_type == family);
        slices.flat_map(|slice| slice.endpoints.iter().map(move |endpoint| (slice, endpoint)))
    };

    let (mut ready, mut total) = (BTreeSet::new(), BTreeSet::new());
    for endpoint in endpoints().map(|(_, endpoint)| endpoint) {
        total.extend(endpoint.addresses.first());
        if weight(endpoint).is_some_and(|weight| weight > 0) {
            ready.extend(endpoint.addresses.first());
        }
    }
    plan.backends.ready += u32::try_from(ready.len()).unwrap_or(u32::MAX);
    plan.backends.total += u32::try_from(total.len()).unwrap_or(u32::MAX);
    if ready.is_empty() {
        plan.troubles
            .push(Trouble::new(Reason::NoEndpoints, format!("service {reference} has no ready endpoint")));
    }

    for port in ports {
        let protocol = match port.protocol.as_deref() {
            None | Some("TCP") => Protocol::Tcp,
            Some("UDP") => Protocol::Udp,
            Some(other) => {
                let message = format!(
                    "port {} of service {reference} is {other}: only TCP and UDP are served",
                    port.port
                );
                plan.troubles.push(Trouble::new(Reason::ServiceNotSupported, message));
                continue;
            }
        };
        let Ok(number @ 1..) = u16::try_from(port.port) else { continue };
        let key = ServiceKey { address, protocol, port: number };
        if plan.keys.contains(&key) {
            let message = format!(
                "port {number}/{protocol} of service {reference} is taken by another service of {address}"
            );
            plan.troubles.push(Trouble::new(Reason::PortClash, message));
            continue;
        }
        let mut destinations = BTreeMap::new();
        for (slice, endpoint) in endpoints() {
            let Some(target) = target_port(slice, port.name.as_deref(), protocol) else { continue };
            let Some(weight) = weight(endpoint) else { continue };
            let Some(Ok(pod)) = endpoint.addresses.first().map(|a| a.parse::<IpAddr>()) else { continue };
            if pod.is_ipv4() == address.is_ipv4() {
                // The same endpoint may stand in two slices while one is being filled: the better word counts.
                let entry = destinations.entry(SocketAddr::new(pod, target)).or_insert(weight);
                *entry = weight.max(*entry);
            }
        }
        plan.keys.push(key);
        tables.ledger.insert(key);
        tables.services.insert(key, VirtualService { settings: settings.clone(), destinations });
    }
}

/// The weight of an endpoint: 1 when ready, 0 while it ends but still serves (it keeps its connections), `None` when
/// it should not be in the kernel.
fn weight(endpoint: &Endpoint) -> Option<u32> {
    let Some(conditions) = &endpoint.conditions else { return Some(1) };
    match (
        conditions.ready.unwrap_or(true),
        conditions.serving.unwrap_or(true),
        conditions.terminating.unwrap_or(false),
    ) {
        (true, _, _) => Some(1),
        (false, true, true) => Some(0),
        _ => None,
    }
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
