//! What a Service must have for a virtual IP to lead somewhere.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Service;
use kube::ResourceExt;
use vip_core::api::ServiceRef;
use vip_core::plan::Protocol;
use vip_core::vrrp::Family;

use crate::cluster::Cluster;
use crate::exit::{Failure, Result};

/// A transport and a port.
pub type Port = (String, i32);

/// The reference to a Service.
pub fn reference(service: &Service) -> ServiceRef {
    ServiceRef { namespace: service.namespace().unwrap_or_default(), name: service.name_any() }
}

/// The families over which the Service's pods can be reached, the preferred one first.
pub fn families(service: &Service) -> Vec<Family> {
    let named = service.spec.iter().flat_map(|spec| spec.ip_families.iter().flatten());
    let known: Vec<Family> = named
        .filter_map(|family| match family.as_str() {
            "IPv4" => Some(Family::V4),
            "IPv6" => Some(Family::V6),
            _ => None,
        })
        .collect();
    // The API server always fills it in, for a Service that has endpoints.
    if known.is_empty() { vec![Family::V4, Family::V6] } else { known }
}

/// Whether only pods on the address's own node answer.
pub fn is_local(service: &Service) -> bool {
    let policy = service.spec.as_ref().and_then(|spec| spec.external_traffic_policy.as_deref());
    policy == Some("Local")
}

/// The ports that a virtual IP opens for a Service.
pub fn ports(service: &Service) -> BTreeSet<Port> {
    service
        .spec
        .iter()
        .flat_map(|spec| spec.ports.iter().flatten())
        .map(|port| (port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()), port.port))
        .filter(|(protocol, _)| Protocol::ALL.iter().any(|known| known.to_string() == *protocol))
        .collect()
}

/// Refuses a Service to which no virtual IP can lead.
pub async fn check(cluster: &Cluster, service: &Service) -> Result<()> {
    let selects = refuse(service)?;
    if selects {
        return Ok(());
    }
    let at = reference(service);
    // Who may not read EndpointSlices gets the benefit of the doubt.
    match cluster.list_slices(&at).await? {
        Some(slices) if slices.is_empty() => Err(Failure::new(format!(
            "service {at} has neither selector nor EndpointSlices: a VIP would lead nowhere"
        ))
        .hint(format!("kubectl describe service {} -n {}", at.name, at.namespace))),
        _ => Ok(()),
    }
}

/// What can be said from the Service alone; returns whether it selects pods.
fn refuse(service: &Service) -> Result<bool> {
    let at = reference(service);
    let spec = service.spec.clone().unwrap_or_default();
    if spec.type_.as_deref() == Some("ExternalName") {
        return Err(Failure::new(format!(
            "service {at} has neither selector nor EndpointSlices: a VIP would lead nowhere; ExternalName is not supported"
        )));
    }
    if spec.ports.iter().flatten().next().is_none() {
        return Err(Failure::new(format!("service {at} has no ports: a VIP would lead nowhere")));
    }
    if ports(service).is_empty() {
        return Err(Failure::new(format!(
            "service {at} has no port over TCP, UDP or SCTP, and a VIP serves no other"
        )));
    }
    Ok(spec.selector.is_some_and(|selector| !selector.is_empty()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(spec: serde_json::Value) -> Service {
        serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": spec}))
            .unwrap()
    }

    #[test]
    fn services_that_lead_nowhere() {
        let refused = |spec| refuse(&service(spec)).map_err(|failure| failure.to_string());
        assert_eq!(
            refused(json!({"type": "ExternalName", "externalName": "a.b"})).unwrap_err(),
            "Error: service shop/web has neither selector nor EndpointSlices: a VIP would lead nowhere; ExternalName is not supported"
        );
        assert_eq!(
            refused(json!({"selector": {"a": "b"}})).unwrap_err(),
            "Error: service shop/web has no ports: a VIP would lead nowhere"
        );
        assert!(refused(json!({"ports": [{"port": 1, "protocol": "DCCP"}]})).is_err());
        assert_eq!(refused(json!({"ports": [{"port": 80}], "selector": {"a": "b"}})), Ok(true));
        assert_eq!(refused(json!({"ports": [{"port": 80}]})), Ok(false));
    }

    #[test]
    fn families_in_their_order() {
        let of = |spec| families(&service(spec));
        assert_eq!(of(json!({"ipFamilies": ["IPv6"]})), [Family::V6]);
        assert_eq!(of(json!({"ipFamilies": ["IPv6", "IPv4"]})), [Family::V6, Family::V4]);
        assert_eq!(of(json!({})), [Family::V4, Family::V6]);
    }

    #[test]
    fn ports_with_their_transport() {
        let web = service(
            json!({"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53}, {"port": 9, "protocol": "DCCP"}]}),
        );
        assert_eq!(ports(&web), BTreeSet::from([("TCP".to_owned(), 53), ("UDP".to_owned(), 53)]));
    }
}
