//! Pools, virtual IPs and the Services behind them.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicySpec};
use kube::ResourceExt;
use vip_core::api::{ServiceRef, VIPNode, VIPPool, VirtualIP};
use vip_core::pool::used;
use vip_core::validate::{CheckedVip, check_pools, pool_of};

use super::facts::Facts;
use super::{Report, counted};
use crate::cluster::silence;
use crate::codes::{Group, Problem, addresses, services};
use crate::commands::pool::lan::Lan;
use crate::commands::pool::taken;
use crate::fitness::is_drained;
use crate::judge::{self, Judge};

/// The lines of this group; what is wrong with addresses on the LAN goes to that of the network.
pub fn judge(facts: &Facts, report: &mut Report) {
    match &facts.pools {
        None => report.forbidden(Group::Objects, "vippools: pools are not checked"),
        Some(pools) => {
            let well =
                format!("{}: no two want the same, all have free addresses", counted(pools.len(), "pool"));
            let well = if pools.is_empty() { "there is no pool yet".to_owned() } else { well };
            let mut problems = judge::pools(pools);
            problems.extend(full(pools, facts.vips.as_deref().unwrap_or_default()));
            let nodes = facts.nodes.as_deref().unwrap_or_default();
            let reports = facts.reports.as_deref().unwrap_or_default();
            problems.extend(not_ours(&Lan::new(Vec::new(), nodes, reports, &facts.cidrs), pools));
            report.verdict(Group::Objects, well, problems);
        }
    }
    let Some(vips) = &facts.vips else {
        report.forbidden(Group::Objects, "virtualips: virtual IPs are not checked");
        return;
    };
    let judge = Judge::new(facts.reports.as_deref(), facts.now);
    let mut problems: Vec<Problem> = vips.iter().flat_map(|vip| judge.judge(vip).problems).collect();
    problems.extend(judge.split(vips));
    problems.extend(strays(facts.pools.as_deref().unwrap_or_default(), vips));
    let (on_the_lan, of_objects): (Vec<_>, Vec<_>) =
        problems.into_iter().partition(|problem| problem.code.group == Group::Network);
    let is_quiet = on_the_lan.is_empty();
    report.verdict(Group::Network, "no other machine uses or claims a virtual IP", on_the_lan);
    let well = match vips.len() {
        0 => "there is no virtual IP yet".to_owned(),
        count => format!("{}: owned and served", counted(count, "virtual IP")),
    };
    // What the network has said of a virtual IP is not contradicted here.
    if is_quiet || !of_objects.is_empty() {
        report.verdict(Group::Objects, well, of_objects);
    }
    if let Some(reports) = &facts.reports {
        report.verdict(Group::Objects, "owners are balanced", unbalanced(reports, vips, facts.now));
    }
    match (&facts.policies, &facts.services) {
        (Some(policies), Some(services)) => {
            let well = "no NetworkPolicy keeps traffic of virtual IPs out";
            report.verdict(Group::Objects, well, shut_out(vips, services, policies));
        }
        _ => report.forbidden(Group::Objects, "networkpolicies or services: policies are not checked"),
    }
}

/// Pools without a free address.
fn full(pools: &[VIPPool], vips: &[VirtualIP]) -> Vec<Problem> {
    let taken = taken(vips);
    let (pools, _) = check_pools(pools);
    let full = pools.into_iter().filter(|pool| used(&pool.addresses, &taken) >= pool.addresses.len_u64());
    full.map(|pool| Problem {
        code: &addresses::FULL,
        about: format!("VIPPool {}", pool.name),
        message: format!("all of its addresses ({}) are virtual IPs", pool.addresses.len()),
        command: format!("kubectl vip pool set {} --add RANGE", pool.name),
    })
    .collect()
}

/// Virtual IPs whose virtual router is none of their pool.
fn strays(pools: &[VIPPool], vips: &[VirtualIP]) -> Vec<Problem> {
    let (pools, _) = check_pools(pools);
    let stray = |vip: &VirtualIP| {
        let checked = CheckedVip::new(vip).ok()?;
        let fault = checked.stray(pool_of(&pools, checked.address)?, &pools)?;
        Some(Problem {
            code: &addresses::STRAY_ROUTER,
            about: judge::about(vip),
            message: format!("{}: {}", vip.spec.address, fault.why),
            command: "kubectl vip pool list -o wide".to_owned(),
        })
    };
    vips.iter().filter_map(stray).collect()
}

/// Pools with addresses of nodes, pods or Services.
fn not_ours(lan: &Lan, pools: &[VIPPool]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for pool in check_pools(pools).0 {
        let mut problem = |message: String, command: String| {
            let about = format!("VIPPool {}", pool.name);
            problems.push(Problem { code: &addresses::FOREIGN_RANGE, about, message, command });
        };
        if let Some((address, sentence)) = lan.host_in(&pool) {
            problem(sentence, format!("kubectl vip pool set {} --exclude {address}", pool.name));
        }
        if let Some(sentence) = lan.network_in(&pool) {
            problem(sentence, "kubectl vip pool list -o wide".to_owned());
        }
    }
    problems
}

/// Whether some nodes own many virtual routers and others few. What is pinned is where it should be.
fn unbalanced(reports: &[VIPNode], vips: &[VirtualIP], now: Timestamp) -> Option<Problem> {
    let mut owned: BTreeMap<String, usize> = BTreeMap::new();
    for node in reports.iter().filter(|node| silence(node, now).is_none() && !is_drained(node)) {
        if node.status.as_ref().is_some_and(|status| status.dataplane.ready) {
            owned.insert(node.name_any(), 0);
        }
    }
    let mut routers: Vec<(u8, bool, &str)> = vips
        .iter()
        .filter(|vip| vip.spec.preferred_node.is_none())
        .filter_map(|vip| {
            let owner = vip.status.as_ref()?.node.as_deref()?;
            Some((vip.spec.virtual_router, vip.spec.address.contains(':'), owner))
        })
        .collect();
    routers.sort_unstable();
    routers.dedup();
    for (_, _, owner) in &routers {
        if let Some(count) = owned.get_mut(*owner) {
            *count += 1;
        }
    }
    let (most, fewest) = (owned.iter().max_by_key(|(_, n)| **n)?, owned.iter().min_by_key(|(_, n)| **n)?);
    // The agents choose owners by a hash: some unevenness is chance.
    (*most.1 >= fewest.1 + 4 && *most.1 > 2 * routers.len().div_ceil(owned.len())).then(|| Problem {
        code: &addresses::UNBALANCED,
        about: most.0.clone(),
        message: format!(
            "it owns {} of {} virtual routers, {} owns {}",
            most.1,
            routers.len(),
            fewest.0,
            fewest.1
        ),
        command: "kubectl vip rebalance --dry-run".to_owned(),
    })
}

/// Services whose pods let in only pods and namespaces: what comes by a virtual IP has the address of a node.
fn shut_out(vips: &[VirtualIP], known: &[Service], policies: &[NetworkPolicy]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for reference in vips.iter().flat_map(|vip| &vip.spec.services) {
        let is_it = |service: &&Service| {
            service.namespace().as_deref() == Some(&reference.namespace)
                && service.name_any() == reference.name
        };
        let spec = known.iter().find(is_it).and_then(|service| service.spec.as_ref());
        let Some(selector) = spec.and_then(|spec| spec.selector.as_ref()) else { continue };
        let isolating: Vec<&NetworkPolicy> =
            policies.iter().filter(|policy| isolates(policy, reference, selector)).collect();
        if isolating.is_empty() || isolating.iter().any(|policy| lets_nodes_in(policy)) {
            continue;
        }
        let names: Vec<String> = isolating.iter().map(|policy| policy.name_any()).collect();
        problems.push(Problem {
            code: &services::POLICY,
            about: reference.to_string(),
            message: format!(
                "NetworkPolicy {} lets in only certain pods; what comes by the virtual IP has the address of a node",
                names.join(", ")
            ),
            command: format!("kubectl describe networkpolicy -n {} {}", reference.namespace, names.join(" ")),
        });
    }
    problems
}

/// Whether a policy isolates, for certain, all pods that this selector selects.
fn isolates(policy: &NetworkPolicy, service: &ServiceRef, selector: &BTreeMap<String, String>) -> bool {
    let Some(NetworkPolicySpec { pod_selector, policy_types, .. }) = &policy.spec else { return false };
    let pods = pod_selector.clone().unwrap_or_default();
    policy.namespace().as_deref() == Some(&service.namespace)
        && policy_types.as_ref().is_none_or(|types| types.iter().any(|kind| kind == "Ingress"))
        // Expressions may be about labels that the Service does not name.
        && pods.match_expressions.is_none_or(|expressions| expressions.is_empty())
        && pods.match_labels.unwrap_or_default().iter().all(|(key, value)| selector.get(key) == Some(value))
}

/// Whether a policy has a rule for everybody, or for addresses.
fn lets_nodes_in(policy: &NetworkPolicy) -> bool {
    policy.spec.iter().flat_map(|spec| spec.ingress.iter().flatten()).any(|rule| match &rule.from {
        None => true,
        Some(from) => from.is_empty() || from.iter().any(|peer| peer.ip_block.is_some()),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn policy(selector: Value, ingress: Value) -> NetworkPolicy {
        serde_json::from_value(json!({
            "metadata": {"name": "deny", "namespace": "shop"}, "spec": {"podSelector": selector, "ingress": ingress},
        }))
        .unwrap()
    }

    #[test]
    fn policies_that_let_in_only_pods() {
        let vip: VirtualIP = serde_json::from_value(json!({
            "metadata": {"name": "10.0.0.1"},
            "spec": {"address": "10.0.0.1", "virtualRouter": 9, "services": [{"namespace": "shop", "name": "web"}]},
        }))
        .unwrap();
        let service = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "shop"}, "spec": {"selector": {"app": "web"}},
        }))
        .unwrap();
        let services = [service];
        let code = |policies: &[NetworkPolicy]| {
            shut_out(std::slice::from_ref(&vip), &services, policies).first().map(|problem| problem.code.id)
        };
        let pods_alone = json!([{"from": [{"podSelector": {}}]}]);
        let shut = policy(json!({}), pods_alone.clone());
        assert_eq!(code(&[]), None);
        assert_eq!(code(std::slice::from_ref(&shut)), Some("VIP307"));
        assert_eq!(
            code(&[policy(json!({"matchLabels": {"app": "web"}}), pods_alone.clone())]),
            Some("VIP307")
        );
        assert_eq!(code(&[policy(json!({"matchLabels": {"app": "api"}}), pods_alone.clone())]), None);
        let addresses = policy(json!({}), json!([{"from": [{"ipBlock": {"cidr": "10.0.0.0/24"}}]}]));
        assert_eq!(code(&[shut.clone(), addresses]), None, "policies add up");
        assert_eq!(code(&[policy(json!({}), json!([{"ports": [{"port": 80}]}]))]), None);
        let expressions = json!({"matchExpressions": [{"key": "a", "operator": "Exists"}]});
        assert_eq!(code(&[policy(expressions, pods_alone)]), None);
    }

    #[test]
    fn pools_that_are_full_or_of_others() {
        let pool = |addresses: &str| -> VIPPool {
            serde_json::from_value(json!({
                "metadata": {"name": "lab"},
                "spec": {"addresses": [addresses], "virtualRouters": {"first": 9, "count": 1}},
            }))
            .unwrap()
        };
        let vip = serde_json::from_value(json!({
            "metadata": {"name": "10.0.0.1"}, "spec": {"address": "10.0.0.1", "virtualRouter": 9},
        }));
        let vips = [vip.unwrap()];
        let codes = |problems: Vec<Problem>| problems.iter().map(|p| p.code.id).collect::<Vec<_>>();
        assert_eq!(codes(full(&[pool("10.0.0.1")], &vips)), ["VIP210"]);
        assert!(full(&[pool("10.0.0.1-10.0.0.2")], &vips).is_empty());
        assert!(strays(&[pool("10.0.0.1")], &vips).is_empty());
        let mut stray = vips[0].clone();
        stray.spec.virtual_router = 10;
        assert_eq!(codes(strays(&[pool("10.0.0.1")], &[stray])), ["VIP213"]);
        let node = serde_json::from_value(json!({
            "metadata": {"name": "a"}, "spec": {"podCIDRs": ["10.244.0.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.2"}]},
        }));
        let lan = Lan::new(Vec::new(), &[node.unwrap()], &[], &[]);
        assert!(not_ours(&lan, &[pool("10.0.0.1")]).is_empty());
        assert_eq!(codes(not_ours(&lan, &[pool("10.0.0.1-10.0.0.2")])), ["VIP211"]);
        assert_eq!(codes(not_ours(&lan, &[pool("10.244.0.9")])), ["VIP211"]);
    }

    #[test]
    fn owners_of_many_and_of_none() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let node = |name: &str| -> VIPNode {
            serde_json::from_value(json!({
                "metadata": {"name": name}, "status": {"renewTime": "2026-01-01T00:00:00Z", "dataplane": {"ready": true}},
            }))
            .unwrap()
        };
        let vips = |owners: &[&str]| -> Vec<VirtualIP> {
            let vip = |(number, owner): (usize, &&str)| {
                let address = format!("10.0.0.{number}");
                let spec = json!({"address": address, "virtualRouter": number});
                let vip = json!({"metadata": {"name": address}, "spec": spec, "status": {"node": owner}});
                serde_json::from_value(vip).unwrap()
            };
            (1..).zip(owners).map(vip).collect()
        };
        let nodes = [node("a"), node("b"), node("c")];
        let code = |owners: &[&str]| unbalanced(&nodes, &vips(owners), now).map(|problem| problem.code.id);
        assert_eq!(code(&["a"; 6]), Some("VIP212"));
        assert_eq!(code(&["a", "a", "a", "b", "b", "c"]), None);
        assert_eq!(code(&["a"; 3]), None, "chance");
        assert_eq!(code(&[]), None);
    }
}
