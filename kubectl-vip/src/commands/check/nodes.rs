//! Agents, and what they say of the kernels, clocks, labels and interfaces of their nodes.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;
use serde_json::json;
use vip_core::api::{EXCLUDE_LABEL, Reason, VIPNode, VirtualIP, name_of};
use vip_core::validate::{CheckedPool, check_pools};

use super::facts::Facts;
use super::{Report, counted};
use crate::cluster::silence;
use crate::codes::{Group, Problem, nodes as codes};
use crate::commands::VERSION;
use crate::commands::version::versions;
use crate::fitness::{Fitness, View, is_drained};
use crate::judge::{self, Judge};
use crate::output::span;

/// The label that kubeadm gives nodes of the control plane, together with that which excludes them.
const CONTROL_PLANE: &str = "node-role.kubernetes.io/control-plane";
/// A clock may differ by so much (seconds): the API server writes whole seconds, and a report takes its time.
const SKEW: i64 = 10;

/// The lines of this group.
pub fn judge(facts: &Facts, report: &mut Report) {
    let group = Group::Nodes;
    match &facts.agents {
        None => report.forbidden(group, "daemonsets: whether the agents are ready is not checked"),
        Some(sets) if sets.is_empty() && facts.pre => {
            report.verdict(group, "there is no agent yet: install brings them", None);
        }
        Some(sets) => {
            let (ready, wanted) = judge::count(sets);
            report.verdict(group, format!("{ready}/{wanted} agents are ready"), judge::agents(sets));
        }
    }
    match &facts.nodes {
        None => report.forbidden(group, "nodes: labels that exclude are not checked"),
        Some(nodes) => report.verdict(
            group,
            "no label keeps a node from owning addresses",
            nodes.iter().filter_map(excluded),
        ),
    }
    let Some(reports) = &facts.reports else {
        report.forbidden(group, "vipnodes: kernels, clocks and interfaces are not checked");
        return;
    };
    if reports.is_empty() {
        return;
    }
    let namespace = facts.agents.iter().flatten().find_map(ResourceExt::namespace);
    let judge = Judge::new(Some(reports), facts.now);
    let well = format!("{} reported within 30s, their kernels can serve", counted(reports.len(), "agent"));
    report.verdict(group, well, judge.nodes(namespace.as_deref()));
    report.verdict(group, format!("all agents are {VERSION}"), skew(reports));
    let walls = reports.iter().filter(|node| silence(node, facts.now).is_none()).filter_map(walled);
    report.verdict(group, "no node's firewall drops by default", walls);
    report.verdict(group, "no node is drained", reports.iter().filter_map(drained));
    let clocks = reports.iter().filter_map(|node| clock(node, facts.now));
    report.verdict(group, "clocks agree with that of the API server", clocks);
    if let Some(pools) = &facts.pools
        && !pools.is_empty()
    {
        let labels = facts.nodes.iter().flatten().map(|node| (node.name_any(), node.labels().clone()));
        let (good, _) = check_pools(pools);
        let view = View {
            vips: good.iter().flat_map(probes).collect(),
            nodes: reports.clone(),
            pools: pools.clone(),
            labels: facts.nodes.is_some().then(|| labels.collect()),
        };
        report.verdict(group, "nodes have an interface for each pool", places(&view, &good, facts.now));
    }
}

fn excluded(node: &Node) -> Option<Problem> {
    let labels = node.labels();
    (labels.contains_key(EXCLUDE_LABEL) && !labels.contains_key(CONTROL_PLANE)).then(|| {
        let name = node.name_any();
        Problem {
            code: &codes::EXCLUDED,
            message: format!("label {EXCLUDE_LABEL} keeps it from owning addresses"),
            command: format!("kubectl label node {name} {EXCLUDE_LABEL}-"),
            about: name,
        }
    })
}

fn skew(reports: &[VIPNode]) -> Vec<Problem> {
    let others = versions(reports).into_iter().filter(|(version, _)| version != VERSION);
    others
        .map(|(version, nodes)| Problem {
            code: &codes::SKEW,
            about: nodes.join(","),
            message: format!("the agent is {version}, this plugin {VERSION}"),
            command: "kubectl vip version".to_owned(),
        })
        .collect()
}

fn walled(node: &VIPNode) -> Option<Problem> {
    let chains: Vec<&str> = node.status.as_ref()?.firewalls.iter().map(String::as_str).collect();
    (!chains.is_empty()).then(|| Problem {
        code: &codes::FIREWALL,
        about: node.name_any(),
        message: format!(
            "its firewall drops what no rule accepts ({}): virtual IPs need rules there",
            chains.join(", ")
        ),
        command: format!("kubectl vip explain {}", codes::FIREWALL.id),
    })
}

fn drained(node: &VIPNode) -> Option<Problem> {
    let name = node.name_any();
    is_drained(node).then(|| Problem {
        code: &codes::DRAINED,
        message: "it is drained: it takes no address".to_owned(),
        command: format!("kubectl vip node undrain {name}"),
        about: name,
    })
}

/// Compares the time that the agent wrote with that at which the API server took notice of it.
fn clock(node: &VIPNode, now: Timestamp) -> Option<Problem> {
    if silence(node, now).is_some() {
        return None;
    }
    let written = node.status.as_ref()?.renew_time.as_ref()?.0.as_second();
    let fields = node.metadata.managed_fields.iter().flatten();
    let status = fields.filter(|entry| entry.subresource.as_deref() == Some("status"));
    let taken = status.filter_map(|entry| entry.time.as_ref()).map(|time| time.0.as_second()).max()?;
    let (fast, name) = (written - taken, node.name_any());
    (fast.abs() > SKEW).then(|| Problem {
        code: &codes::CLOCK,
        message: format!(
            "its clock is {} {} that of the API server",
            span(fast.abs()),
            if fast > 0 { "ahead of" } else { "behind" }
        ),
        command: format!("kubectl get vipnode {name} -o yaml --show-managed-fields"),
        about: name,
    })
}

/// Virtual IPs that stand for a pool: one in each of its ranges.
fn probes(pool: &CheckedPool) -> Vec<VirtualIP> {
    let probe = |address: std::net::IpAddr| {
        serde_json::from_value(json!({
            "metadata": {"name": name_of(address)},
            "spec": {"address": address, "virtualRouter": pool.virtual_routers.first},
            // Where pools overlap, its virtual router may be that of the other pool: what has served before may have any.
            "status": {"firstAnnounced": "1970-01-01T00:00:00Z"},
        }))
    };
    // What is written here is what a VirtualIP reads.
    pool.addresses.spans().iter().filter_map(|span| probe(span.first()).ok()).collect()
}

/// Nodes that cannot own addresses of a pool for want of an interface, and pools that no node can serve.
fn places(view: &View, pools: &[CheckedPool], now: Timestamp) -> Vec<Problem> {
    let fitness = Fitness::new(view, now);
    // The others have lines of their own.
    let nodes: Vec<String> = view
        .nodes
        .iter()
        .filter(|node| silence(node, now).is_none() && !is_drained(node))
        .map(ResourceExt::name_any)
        .collect();
    let mut problems = Vec::new();
    for pool in pools {
        let probes = probes(pool);
        // The first thing in the way of each node.
        let troubles: Vec<_> = nodes
            .iter()
            .filter_map(|node| Some((node, probes.iter().find_map(|probe| fitness.trouble(node, probe))?)))
            .collect();
        let is_served = |probe: &VirtualIP| nodes.iter().any(|node| fitness.trouble(node, probe).is_none());
        if let Some(lost) = probes.iter().find(|probe| !nodes.is_empty() && !is_served(probe)) {
            let why = nodes.iter().find_map(|node| fitness.trouble(node, lost));
            let why = why.map(|trouble| format!("; for one, {}", trouble.message)).unwrap_or_default();
            problems.push(Problem {
                code: &codes::NO_CANDIDATE,
                about: format!("VIPPool {}", pool.name),
                message: format!("no node can own {}{why}", lost.spec.address),
                command: "kubectl vip node list -o wide".to_owned(),
            });
            continue;
        }
        // A node that is kept out by labels is meant to be.
        let stranded = troubles.iter().filter(|(_, trouble)| trouble.reason == Reason::NoInterface);
        problems.extend(stranded.map(|(node, trouble)| Problem {
            code: &codes::NO_INTERFACE,
            about: (*node).clone(),
            message: format!("it cannot own addresses of pool {:?}: {}", pool.name, trouble.message),
            command: "kubectl vip node list -o wide".to_owned(),
        }));
    }
    problems
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    fn report(name: &str, address: &str, renewed: &str) -> VIPNode {
        serde_json::from_value(json!({
            "metadata": {"name": name, "managedFields": [
                {"manager": "vip-node", "subresource": "status", "time": "2026-01-01T00:00:00Z"}]},
            "status": {"renewTime": renewed, "dataplane": {"ready": true}, "agentVersion": VERSION,
                       "interfaces": [{"name": "eth0", "mac": "m", "addresses": [address], "carrier": true}]},
        }))
        .unwrap()
    }

    #[test]
    fn clocks_are_compared_with_the_api_servers() {
        let said = |renewed: &str| {
            clock(&report("a", "10.0.0.1/24", renewed), now()).map(|p| format!("{} {}", p.code, p.message))
        };
        assert_eq!(said("2025-12-31T23:59:58Z"), None);
        assert_eq!(
            said("2026-01-01T01:00:00Z").as_deref(),
            Some("VIP111 its clock is 60m ahead of that of the API server")
        );
        assert_eq!(
            said("2025-12-31T23:59:40Z").as_deref(),
            Some("VIP111 its clock is 20s behind that of the API server")
        );
        assert_eq!(said("2025-12-31T23:59:00Z"), None, "that is called silent");
    }

    #[test]
    fn interfaces_and_pools() {
        let pool = |selector: Value| {
            serde_json::from_value(json!({
                "metadata": {"name": "lab"},
                "spec": {"addresses": ["10.0.0.9", "10.0.0.20-10.0.0.30"], "nodeSelector": selector,
                         "virtualRouters": {"first": 9, "count": 1}},
            }))
            .unwrap()
        };
        let found = |addresses: &[&str], selector: Value| -> Vec<String> {
            let nodes = ["a", "b"].iter().zip(addresses);
            let pools = vec![pool(selector)];
            let (good, _) = check_pools(&pools);
            let view = View {
                vips: good.iter().flat_map(probes).collect(),
                nodes: nodes.map(|(name, address)| report(name, address, "2026-01-01T00:00:00Z")).collect(),
                pools,
                labels: Some(std::collections::BTreeMap::new()),
            };
            places(&view, &good, now()).iter().map(|p| format!("{} {}", p.code, p.about)).collect()
        };
        assert!(found(&["10.0.0.1/24", "10.0.0.2/24"], json!({})).is_empty());
        assert_eq!(found(&["10.0.0.1/24", "10.1.0.2/24"], json!({})), ["VIP112 b"]);
        assert_eq!(found(&["10.2.0.1/24", "10.1.0.2/24"], json!({})), ["VIP113 VIPPool lab"]);
        assert_eq!(found(&["10.0.0.1/24", "10.0.0.2/24"], json!({"role": "edge"})), ["VIP113 VIPPool lab"]);
        assert!(found(&[], json!({})).is_empty(), "nobody has reported");
    }
}
