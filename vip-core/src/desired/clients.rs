//! What is said of a Service's clients: which may connect, and whose addresses the pods may see.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::ServiceSpec;

use super::Node;

/// Who may connect to a Service at an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sources {
    /// The networks of the clients, which do not overlap; `None`: everybody may.
    pub(super) networks: Option<BTreeSet<IpNet>>,
    /// Why nobody may although the Service names somebody.
    pub(super) fault: Option<String>,
}

/// Reads `loadBalancerSourceRanges`. Ranges that cannot be read close the Service: to leave one out could let in whom the
/// others were meant to keep out, and none of the address's family means that nobody of that family was meant.
pub(super) fn sources(spec: &ServiceSpec, address: IpAddr, node: &Node) -> Sources {
    let ranges = spec.load_balancer_source_ranges.as_deref().unwrap_or_default();
    if ranges.is_empty() {
        return Sources::default();
    }
    let closed = |fault| Sources { networks: Some(BTreeSet::new()), fault: Some(fault) };
    let mut networks: Vec<IpNet> = Vec::new();
    for range in ranges {
        match range.trim().parse::<IpNet>() {
            Ok(net) if net.addr().is_ipv4() == address.is_ipv4() => networks.push(net.trunc()),
            Ok(_) => {}
            Err(_) => return closed(format!("\"{range}\" is no range of addresses")),
        }
    }
    if networks.is_empty() {
        let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
        return closed(format!("none of them is of {family}, the family of {address}"));
    }
    // What the owner itself sends to a virtual IP may come from that very address, as the system sees fit.
    let own = |net: &IpNet| addresses(node).any(|own| net.contains(&own));
    if networks.iter().any(own) {
        networks.push(address.into());
    }
    Sources { networks: Some(IpNet::aggregate(&networks).into_iter().collect()), fault: None }
}

/// The clients that have to be masqueraded even though the pods should see them, because the pods' answers would not pass
/// through this node: whoever is on one network with a pod, such as the bridge of the network plugin, and the pod itself.
/// Answers of pods that have the node's own address always do.
pub(super) fn near(pods: impl Iterator<Item = IpAddr>, node: &Node) -> BTreeSet<IpNet> {
    let mut networks: Vec<IpNet> = Vec::new();
    for pod in pods.filter(|pod| !addresses(node).any(|own| own == *pod)) {
        let shared = node.interfaces.iter().flat_map(|(_, nets)| nets).filter(|net| net.contains(&pod));
        networks.extend(shared.map(IpNet::trunc));
        networks.push(pod.into());
    }
    IpNet::aggregate(&networks).into_iter().collect()
}

/// The node's own addresses.
fn addresses(node: &Node) -> impl Iterator<Item = IpAddr> {
    node.interfaces.iter().flat_map(|(_, nets)| nets).map(IpNet::addr)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> Node {
        let nets = |text: &[&str]| text.iter().map(|net| net.parse().unwrap()).collect();
        let interfaces = vec![
            ("eth0".to_owned(), nets(&["10.87.0.11/16", "fd87::11/64"])),
            ("cni0".to_owned(), nets(&["10.244.1.1/24"])),
            ("tunl0".to_owned(), nets(&["10.245.1.1/32"])),
        ];
        Node { interfaces, ..Node::default() }
    }

    #[test]
    fn ranges_are_those_of_the_family_and_close_what_cannot_be_read() {
        let read = |ranges: &[&str], address: &str| {
            let ranges = ranges.iter().map(|range| (*range).to_owned()).collect();
            let spec = ServiceSpec { load_balancer_source_ranges: Some(ranges), ..ServiceSpec::default() };
            let sources = sources(&spec, address.parse().unwrap(), &node());
            let text =
                sources.networks.map(|nets| nets.iter().map(IpNet::to_string).collect::<Vec<_>>().join(" "));
            (text.unwrap_or("all".to_owned()), sources.fault.unwrap_or_default())
        };
        let open = |text: &str| (text.to_owned(), String::new());
        let shut = |fault: &str| (String::new(), fault.to_owned());
        assert_eq!(read(&[], "10.87.2.50"), open("all"));
        assert_eq!(
            read(&["192.0.2.7/24", " 203.0.113.0/24", "2001:db8::/32"], "10.87.2.50"),
            open("192.0.2.0/24 203.0.113.0/24")
        );
        assert_eq!(read(&["192.0.2.0/24", "2001:db8::/32"], "fd87::2:50"), open("2001:db8::/32"));
        // Ranges in the kernel's set must not overlap.
        assert_eq!(
            read(&["192.0.2.0/25", "192.0.2.128/25", "192.0.2.9/32"], "10.87.2.50"),
            open("192.0.2.0/24")
        );
        // The node may, so it may from the virtual IP too.
        assert_eq!(read(&["10.87.0.11/32"], "10.88.2.50"), open("10.87.0.11/32 10.88.2.50/32"));
        assert_eq!(read(&["0.0.0.0/0"], "10.87.2.50"), open("0.0.0.0/0"));
        assert_eq!(
            read(&["192.0.2.0/24", "192.0.2.0/33"], "10.87.2.50"),
            shut("\"192.0.2.0/33\" is no range of addresses")
        );
        assert_eq!(
            read(&["192.0.2.0/24"], "fd87::2:50"),
            shut("none of them is of IPv6, the family of fd87::2:50")
        );
    }

    #[test]
    fn near_are_those_whose_answers_pass_the_node_by() {
        let near = |pods: &[&str]| {
            let nets = near(pods.iter().map(|pod| pod.parse().unwrap()), &node());
            nets.iter().map(IpNet::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(near(&["10.244.1.7", "10.244.1.8"]), "10.244.1.0/24", "on a bridge");
        assert_eq!(near(&["10.245.1.7"]), "10.245.1.7/32", "routed");
        assert_eq!(near(&["10.87.0.11"]), "", "in the host's network");
        assert_eq!(near(&["10.87.5.5"]), "10.87.0.0/16", "on the LAN itself");
        assert_eq!(near(&["fd10::7"]), "fd10::7/128");
    }
}
