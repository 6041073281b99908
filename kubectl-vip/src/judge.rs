//! What is true of a virtual IP, given what its owner wrote and when that owner was last heard of.
//!
//! An owner that has been silent may be dead: then nothing that it wrote is repeated as if it held. `status` and `check`
//! share these judgements.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;
use vip_core::api::{
    CONDITION_ANNOUNCED, CONDITION_CONFLICT, CONDITION_PROGRAMMED, PLUGIN_MANAGER, Reason, ServiceRef,
    VIPNode, VIPPool, VirtualIP,
};
use vip_core::validate::check_pools;

use crate::cluster::silence;
use crate::codes::{Code, Problem, addresses, nodes, services};
use crate::commands::pool::lan::Clash;
use crate::fitness::unready;
use crate::output::{NONE, PENDING, UNKNOWN, span};

/// A virtual IP may be away from the node it is pinned to for so long (seconds) before that is worth a word.
const PATIENCE: i64 = 60;

/// The truth about one virtual IP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The owner, `<pending>` or `<unknown>`.
    pub owner: String,
    /// Ready and total backends, `<none>` for a bare address, or `<unknown>`.
    pub backends: String,
    /// One word.
    pub status: String,
    /// What is wrong.
    pub problems: Vec<Problem>,
}

/// Judges virtual IPs by the nodes as they are known.
pub struct Judge<'a> {
    /// The nodes by name; `None`: they may not be seen.
    pub nodes: Option<BTreeMap<String, &'a VIPNode>>,
    /// The moment of the judgement.
    pub now: Timestamp,
}

impl<'a> Judge<'a> {
    /// With the nodes that may be seen.
    pub fn new(nodes: Option<&'a [VIPNode]>, now: Timestamp) -> Self {
        let nodes = nodes.map(|nodes| nodes.iter().map(|node| (node.name_any(), node)).collect());
        Self { nodes, now }
    }

    /// Why nothing is known of a node, short and as a sentence; `None` while it reports, or when that may not be seen.
    pub fn silent(&self, node: &str) -> Option<(String, String)> {
        match self.nodes.as_ref()?.get(node) {
            Some(node) => {
                let time = silence(node, self.now).map(span)?;
                Some((format!("Unknown ({time})"), format!("has been silent for {time}")))
            }
            None => Some(("Unknown".to_owned(), "has no agent any more".to_owned())),
        }
    }

    /// The verdict on one virtual IP.
    pub fn judge(&self, vip: &VirtualIP) -> Verdict {
        let status = vip.status.clone().unwrap_or_default();
        let about = about(vip);
        let bare = vip.spec.services.is_empty();
        let describe = format!("kubectl describe virtualip {}", vip.name_any());
        let condition = |kind: &str| status.conditions.iter().find(|condition| condition.type_ == kind);
        let problem = |code: &'static Code, message: String, command: String| Problem {
            code,
            about: about.clone(),
            message,
            command,
        };
        let (announced, programmed) = (condition(CONDITION_ANNOUNCED), condition(CONDITION_PROGRAMMED));
        let conflict = condition(CONDITION_CONFLICT).filter(|condition| condition.status == "True");

        let Some(owner) = &status.node else {
            let (word, mut problems) = match announced.filter(|condition| condition.status != "True") {
                Some(condition) => (condition.reason.clone(), vec![self.fault(vip, condition)]),
                None => {
                    let message = format!("no node owns {}", vip.spec.address);
                    (
                        "Pending".to_owned(),
                        vec![problem(&addresses::UNOWNED, message, "kubectl vip node list".to_owned())],
                    )
                }
            };
            // Where nobody owns it for that very reason, once is enough.
            let other = conflict.filter(|condition| condition.reason != word);
            problems.extend(other.map(|condition| self.fault(vip, condition)));
            let backends = if bare { NONE } else { PENDING }.to_owned();
            return Verdict { owner: PENDING.to_owned(), backends, status: word, problems };
        };
        if let Some((word, silent)) = self.silent(owner) {
            let message = format!("last owner {owner} {silent}: nobody knows who owns {}", vip.spec.address);
            return Verdict {
                owner: UNKNOWN.to_owned(),
                backends: if bare { NONE } else { UNKNOWN }.to_owned(),
                status: word,
                problems: vec![problem(&addresses::OWNER_UNKNOWN, message, describe)],
            };
        }
        let faults: Vec<&Condition> = [announced, programmed]
            .into_iter()
            .flatten()
            .filter(|condition| condition.status != "True")
            .chain(conflict)
            .collect();
        let backends = match bare {
            true => NONE.to_owned(),
            false => format!("{}/{}", status.backends.ready, status.backends.total),
        };
        let word = match faults.first() {
            Some(condition) => condition.reason.clone(),
            None if announced.is_none() => "Pending".to_owned(),
            None => Reason::Active.to_string(),
        };
        let mut problems: Vec<Problem> =
            faults.into_iter().map(|condition| self.fault(vip, condition)).collect();
        problems.extend(self.stray(vip, owner));
        Verdict { owner: owner.clone(), backends, status: word, problems }
    }

    /// A virtual IP that has not gone for long to the node that it is pinned to.
    fn stray(&self, vip: &VirtualIP, owner: &str) -> Option<Problem> {
        let wanted = vip.spec.preferred_node.as_deref().filter(|wanted| *wanted != owner)?;
        let since = vip.status.as_ref()?.since.as_ref().map(|time| time.0);
        let fields = vip.metadata.managed_fields.iter().flatten();
        let pinned = fields.filter(|entry| entry.manager.as_deref() == Some(PLUGIN_MANAGER));
        let pinned = pinned.filter_map(|entry| entry.time.as_ref()).map(|time| time.0).max();
        let away = self.now.as_second() - since.max(pinned)?.as_second();
        if away <= PATIENCE {
            return None;
        }
        let unpin = format!("kubectl vip move {} --unpin", vip.spec.address);
        let (why, command) = match self.nodes.as_ref().map(|nodes| nodes.get(wanted)) {
            Some(None) => (format!(": node {wanted} has no agent"), unpin),
            Some(Some(node)) => match unready(node, self.now) {
                Some(unfit) => (format!(": {}", unfit.why), unfit.help),
                None => (String::new(), "kubectl vip node list -o wide".to_owned()),
            },
            None => (String::new(), unpin),
        };
        let message =
            format!("{} is pinned to {wanted}, but on {owner} for {}{why}", vip.spec.address, span(away));
        Some(Problem { code: &addresses::STRAY, about: about(vip), message, command })
    }

    /// A condition that is not as it should be, as a problem.
    fn fault(&self, vip: &VirtualIP, condition: &Condition) -> Problem {
        let since = span(self.now.as_second() - condition.last_transition_time.0.as_second());
        let service = vip.spec.services.first().cloned();
        let ServiceRef { namespace, name } =
            service.unwrap_or(ServiceRef { namespace: String::new(), name: String::new() });
        let describe = format!("kubectl describe virtualip {}", vip.name_any());
        let get_service = format!("kubectl get service -n {namespace} {name} -o wide");
        let said = match condition.message.is_empty() {
            true => format!("{} for {since}", condition.reason),
            false => format!("{} (for {since})", condition.message),
        };
        let (code, message, command) = match condition.reason.as_str() {
            "NoEndpoints" => (
                &services::NO_ENDPOINTS,
                format!("no ready endpoints for {since}"),
                format!("kubectl get endpointslices -n {namespace} -l kubernetes.io/service-name={name}"),
            ),
            "ServiceNotFound" => (&services::GONE, said, get_service),
            "ServiceNotSupported" => (&services::UNSUPPORTED, said, get_service),
            "PortClash" => (&services::PORT_CLASH, said, get_service),
            "ForeignEntry" => (&services::FOREIGN_ENTRY, said, describe),
            "Invalid" => {
                (&services::MALFORMED, said, format!("kubectl get virtualip {} -o yaml", vip.name_any()))
            }
            "Rejected" => (&addresses::REJECTED, said, "kubectl vip pool list".to_owned()),
            "PoolsOverlap" => (&addresses::POOLS, said, "kubectl vip pool list -o wide".to_owned()),
            "AddressInUse" => (&addresses::IN_USE, said, describe),
            "TwoOwners" => (&addresses::TWO_OWNERS, said, "kubectl vip check".to_owned()),
            "AddressClaimed" => (&addresses::CLAIMED, said, describe),
            "NoCandidate" | "NoInterface" | "NodeExcluded" | "NodeDrained" | "NoLocalEndpoint" => {
                (&addresses::UNOWNED, said, "kubectl vip node list -o wide".to_owned())
            }
            "BackendsFailing" => (&services::FAILING, said, describe),
            "SchedulerUnavailable" => (&services::SCHEDULER, said, describe),
            _ => (&addresses::NOT_SERVED, said, describe),
        };
        Problem { code, about: about(vip), message, command }
    }

    /// What is wrong with the nodes themselves.
    pub fn nodes(&self, namespace: Option<&str>) -> Vec<Problem> {
        let pods = |node: &str| match namespace {
            Some(namespace) => {
                format!("kubectl get pods -n {namespace} -o wide --field-selector spec.nodeName={node}")
            }
            None => format!("kubectl describe vipnode {node}"),
        };
        let mut problems = Vec::new();
        for (name, node) in self.nodes.iter().flatten() {
            if let Some(seconds) = silence(node, self.now) {
                let message = format!("the agent has been silent for {}", span(seconds));
                problems.push(Problem {
                    code: &nodes::SILENT,
                    about: name.clone(),
                    message,
                    command: pods(name),
                });
                continue;
            }
            let Some(status) = node.status.as_ref().filter(|status| !status.dataplane.ready) else {
                continue;
            };
            let reason =
                status.dataplane.reason.map_or_else(|| "not ready".to_owned(), |reason| reason.to_string());
            let message = match &status.dataplane.message {
                Some(message) => format!("{reason}: {message}"),
                None => reason,
            };
            let command = format!("kubectl describe vipnode {name}");
            let code = kernel_code(status.dataplane.reason);
            problems.push(Problem { code, about: name.clone(), message, command });
        }
        problems
    }

    /// Virtual routers with more than one master among those who report.
    pub fn split(&self, vips: &[VirtualIP]) -> Vec<Problem> {
        let mut owners: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, node) in self.nodes.iter().flatten() {
            let Some(status) = node.status.as_ref().filter(|_| silence(node, self.now).is_none()) else {
                continue;
            };
            let owned = crate::commands::node::owned(status, vips);
            for vip in vips.iter().filter(|vip| owned.contains(&vip.spec.address)) {
                owners.entry(&vip.spec.address).or_default().push(name);
            }
        }
        owners
            .into_iter()
            .filter(|(_, nodes)| nodes.len() > 1)
            .map(|(address, nodes)| Problem {
                code: &addresses::TWO_OWNERS,
                about: address.to_owned(),
                message: format!(
                    "{} {} say that they own it: they do not hear each other",
                    nodes.join(" and "),
                    if nodes.len() == 2 { "both" } else { "all" }
                ),
                command: "kubectl vip node list".to_owned(),
            })
            .collect()
    }
}

/// The code for a node that says that it cannot serve.
fn kernel_code(reason: Option<Reason>) -> &'static Code {
    match reason {
        Some(Reason::IPVSUnavailable) => &nodes::NO_IPVS,
        Some(Reason::SysctlNotSet) => &nodes::SYSCTL,
        Some(Reason::VrrpUnavailable) => &nodes::NO_VRRP,
        Some(Reason::NotPermitted) => &nodes::CAPABILITY,
        Some(Reason::Starting) => &nodes::AGENTS,
        _ => &nodes::KERNEL_REFUSED,
    }
}

/// What is wrong with the DaemonSets of the agents.
pub fn agents(sets: &[DaemonSet]) -> Option<Problem> {
    let problem = |message: String, command: String| {
        Some(Problem { code: &nodes::AGENTS, about: "agents".to_owned(), message, command })
    };
    let Some(set) = sets.first() else {
        let message = "no vip-node found in any namespace: nothing elects and serves".to_owned();
        return problem(message, "kubectl vip install".to_owned());
    };
    let (ready, wanted) = count(sets);
    let namespace = set.namespace().unwrap_or_default();
    if wanted == 0 {
        let message = "no node is to run an agent: none matches the node selector".to_owned();
        return problem(message, format!("kubectl describe daemonset vip-node -n {namespace}"));
    }
    if ready < wanted {
        let message = format!("{} of {wanted} agents are not ready", wanted - ready);
        return problem(message, format!("kubectl get pods -n {namespace} -o wide"));
    }
    None
}

/// Agents that are ready, and that should be.
pub fn count(sets: &[DaemonSet]) -> (i32, i32) {
    sets.iter().filter_map(|set| set.status.as_ref()).fold((0, 0), |(ready, wanted), status| {
        (ready + status.number_ready, wanted + status.desired_number_scheduled)
    })
}

/// What is wrong with the pools themselves, and between them.
pub fn pools(raw: &[VIPPool]) -> Vec<Problem> {
    let (pools, faults) = check_pools(raw);
    let mut problems: Vec<Problem> = faults
        .into_iter()
        .map(|fault| Problem {
            code: &addresses::POOLS,
            command: format!("kubectl edit {}", fault.object.to_lowercase()),
            about: fault.object,
            message: fault.why,
        })
        .collect();
    for (place, pool) in pools.iter().enumerate() {
        let before = pools.iter().take(place);
        let clashes = before.filter_map(|other| Some((Clash::between(pool, other)?, other)));
        problems.extend(clashes.map(|(clash, other)| Problem {
            code: &addresses::POOLS,
            about: format!("VIPPool {}", pool.name),
            message: clash.sentence(pool, other),
            command: "kubectl vip pool list -o wide".to_owned(),
        }));
    }
    problems
}

/// The Services of a virtual IP, or its address.
pub fn about(vip: &VirtualIP) -> String {
    let services: Vec<String> = vip.spec.services.iter().map(ToString::to_string).collect();
    if services.is_empty() { vip.spec.address.clone() } else { services.join(",") }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn now() -> Timestamp {
        "2026-01-01T00:14:00Z".parse().unwrap()
    }

    fn vip(status: Value) -> VirtualIP {
        serde_json::from_value(json!({
            "metadata": {"name": "10.0.0.1"},
            "spec": {"address": "10.0.0.1", "virtualRouter": 100, "services": [{"namespace": "shop", "name": "api"}]},
            "status": status,
        }))
        .unwrap()
    }

    fn node(name: &str, renewed: &str) -> VIPNode {
        let router = json!({"interface": "eth0", "family": 4, "virtualRouter": 100, "state": "Master",
                            "priority": 254, "since": "2026-01-01T00:00:00Z"});
        serde_json::from_value(json!({
            "metadata": {"name": name},
            "status": {"renewTime": renewed, "dataplane": {"ready": true}, "virtualRouters": [router]},
        }))
        .unwrap()
    }

    fn condition(kind: &str, status: &str, reason: &str, message: &str) -> Value {
        json!({"type": kind, "status": status, "reason": reason, "message": message,
               "lastTransitionTime": "2026-01-01T00:00:00Z"})
    }

    fn judge(status: Value, renewed: &str) -> Verdict {
        let nodes = [node("node-1", renewed)];
        Judge::new(Some(&nodes), now()).judge(&vip(status))
    }

    const LATELY: &str = "2026-01-01T00:13:55Z";

    #[test]
    fn all_is_well() {
        let conditions =
            [condition("Announced", "True", "Active", ""), condition("Programmed", "True", "Programmed", "")];
        let verdict = judge(
            json!({"node": "node-1", "backends": {"ready": 3, "total": 3}, "conditions": conditions}),
            LATELY,
        );
        assert_eq!(
            (verdict.owner.as_str(), verdict.backends.as_str(), verdict.status.as_str()),
            ("node-1", "3/3", "Active")
        );
        assert!(verdict.problems.is_empty());
    }

    #[test]
    fn good_news_of_a_silent_owner_are_not_repeated() {
        let conditions = [condition("Announced", "True", "Active", "")];
        let status =
            json!({"node": "node-1", "backends": {"ready": 3, "total": 3}, "conditions": conditions});
        let verdict = judge(status.clone(), "2026-01-01T00:13:00Z");
        assert_eq!(
            (verdict.owner.as_str(), verdict.backends.as_str(), verdict.status.as_str()),
            ("<unknown>", "<unknown>", "Unknown (60s)")
        );
        assert_eq!(
            verdict.problems[0].message,
            "last owner node-1 has been silent for 60s: nobody knows who owns 10.0.0.1"
        );
        let gone = Judge::new(Some(&[]), now()).judge(&vip(status.clone()));
        assert!(gone.problems[0].message.contains("node-1 has no agent any more"));
        let unseen = Judge::new(None, now()).judge(&vip(status));
        assert_eq!(unseen.status, "Active", "who may not see nodes is told what the virtual IP says");
    }

    #[test]
    fn no_endpoints_name_the_command() {
        let conditions = [
            condition("Announced", "True", "Active", ""),
            condition("Programmed", "False", "NoEndpoints", "no endpoint is ready"),
        ];
        let verdict = judge(
            json!({"node": "node-1", "backends": {"ready": 0, "total": 2}, "conditions": conditions}),
            LATELY,
        );
        assert_eq!((verdict.backends.as_str(), verdict.status.as_str()), ("0/2", "NoEndpoints"));
        assert_eq!(
            verdict.problems,
            [Problem {
                code: &services::NO_ENDPOINTS, // VIP301
                about: "shop/api".into(),
                message: "no ready endpoints for 14m".into(),
                command: "kubectl get endpointslices -n shop -l kubernetes.io/service-name=api".into(),
            }]
        );
    }

    #[test]
    fn nobody_owns_it() {
        let fresh = judge(json!({}), LATELY);
        assert_eq!((fresh.owner.as_str(), fresh.status.as_str()), ("<pending>", "Pending"));
        assert_eq!(fresh.problems[0].message, "no node owns 10.0.0.1");
        let rejected = judge(
            json!({"conditions": [condition("Announced", "False", "Rejected", "10.0.0.1 is in no pool")]}),
            LATELY,
        );
        assert_eq!(rejected.status, "Rejected");
        assert_eq!(
            (rejected.problems[0].code.id, rejected.problems[0].command.as_str()),
            ("VIP204", "kubectl vip pool list")
        );
        assert_eq!(rejected.problems[0].message, "10.0.0.1 is in no pool (for 14m)");
    }

    #[test]
    fn others_that_use_the_address() {
        let mac = "10.0.0.1 answered ARP from 52:54:00:aa:bb:cc (eth0 on node-1)";
        let in_use = [
            condition("Announced", "False", "AddressInUse", mac),
            condition("Conflict", "True", "AddressInUse", mac),
        ];
        let verdict = judge(json!({"conditions": in_use}), LATELY);
        assert_eq!(verdict.status, "AddressInUse");
        let said: Vec<String> =
            verdict.problems.iter().map(|p| format!("{} {}", p.code, p.message)).collect();
        assert_eq!(said, [format!("VIP207 {mac} (for 14m)")]);

        let claimed = [
            condition("Announced", "True", "Active", ""),
            condition("Conflict", "True", "AddressClaimed", "52:54:00:aa:bb:cc claims it"),
        ];
        let verdict = judge(json!({"node": "node-1", "conditions": claimed}), LATELY);
        assert_eq!((verdict.status.as_str(), verdict.problems[0].code.id), ("AddressClaimed", "VIP208"));
        let over =
            [condition("Announced", "True", "Active", ""), condition("Conflict", "False", "NoConflict", "")];
        assert!(judge(json!({"node": "node-1", "conditions": over}), LATELY).problems.is_empty());
    }

    #[test]
    fn away_from_where_it_is_pinned() {
        let mut drained = node("node-2", LATELY);
        drained.metadata.labels = Some([("kubectl-vip.io/drain".to_owned(), "true".to_owned())].into());
        let nodes = [node("node-1", LATELY), drained, node("node-3", LATELY)];
        let judge = Judge::new(Some(&nodes), now());
        let said = |pin: &str, since: &str, pinned: &str| {
            let mut vip = vip(json!({
                "node": "node-1", "since": since, "conditions": [condition("Announced", "True", "Active", "")]}));
            vip.spec.preferred_node = Some(pin.to_owned());
            vip.metadata.managed_fields =
                serde_json::from_value(json!([{"manager": "kubectl-vip", "time": pinned}])).unwrap();
            let problems = judge.judge(&vip).problems;
            problems.first().map(|p| format!("{} {}; {}", p.code, p.message, p.command)).unwrap_or_default()
        };
        let long = "2026-01-01T00:00:00Z";
        assert_eq!(said("node-1", long, long), "");
        assert_eq!(said("node-2", long, LATELY), "", "it may be on its way");
        assert_eq!(said("node-2", LATELY, long), "");
        assert_eq!(
            said("node-2", long, long),
            "VIP209 10.0.0.1 is pinned to node-2, but on node-1 for 14m: node node-2 is drained; \
             kubectl vip node undrain node-2"
        );
        assert_eq!(
            said("node-3", long, long),
            "VIP209 10.0.0.1 is pinned to node-3, but on node-1 for 14m; kubectl vip node list -o wide"
        );
        assert!(
            said("node-9", long, long).ends_with("node-9 has no agent; kubectl vip move 10.0.0.1 --unpin")
        );
    }

    #[test]
    fn two_masters_and_sick_nodes() {
        let mut sick = node("node-2", LATELY);
        if let Some(status) = &mut sick.status {
            status.dataplane.ready = false;
            status.dataplane.reason = Some(Reason::IPVSUnavailable);
            status.dataplane.message = Some("module ip_vs is missing".into());
        }
        let nodes = [node("node-1", LATELY), sick, node("node-3", "2026-01-01T00:00:00Z")];
        let judge = Judge::new(Some(&nodes), now());
        let split = judge.split(&[vip(json!({}))]);
        assert_eq!(split.len(), 1);
        assert_eq!(
            split[0].message,
            "node-1 and node-2 both say that they own it: they do not hear each other"
        );
        let said: Vec<String> = judge
            .nodes(Some("ns"))
            .iter()
            .map(|p| format!("{} {}: {}", p.code, p.about, p.message))
            .collect();
        assert_eq!(
            said,
            [
                "VIP104 node-2: IPVSUnavailable: module ip_vs is missing",
                "VIP102 node-3: the agent has been silent for 14m"
            ]
        );
    }

    #[test]
    fn each_reason_of_a_node_has_a_code() {
        for (reason, code) in [
            (Reason::IPVSUnavailable, "VIP104"),
            (Reason::SysctlNotSet, "VIP105"),
            (Reason::VrrpUnavailable, "VIP106"),
            (Reason::NotPermitted, "VIP107"),
            (Reason::KernelRefused, "VIP103"),
            (Reason::Starting, "VIP101"),
        ] {
            assert_eq!(kernel_code(Some(reason)).id, code);
        }
        assert_eq!(kernel_code(None).id, "VIP103");
    }

    #[test]
    fn each_reason_of_a_condition_has_a_code() {
        for (reason, code) in [
            ("NoEndpoints", "VIP301"),
            ("ServiceNotFound", "VIP302"),
            ("ServiceNotSupported", "VIP303"),
            ("PortClash", "VIP304"),
            ("ForeignEntry", "VIP305"),
            ("Invalid", "VIP306"),
            ("Rejected", "VIP204"),
            ("PoolsOverlap", "VIP205"),
            ("AddressInUse", "VIP207"),
            ("AddressClaimed", "VIP208"),
            ("TwoOwners", "VIP203"),
            ("NoCandidate", "VIP201"),
            ("SchedulerUnavailable", "VIP308"),
            ("BackendsFailing", "VIP309"),
            ("KernelRefused", "VIP206"),
        ] {
            let conditions = [condition("Announced", "False", reason, "")];
            let verdict = judge(json!({"node": "node-1", "conditions": conditions}), LATELY);
            assert_eq!(verdict.problems[0].code.id, code, "{reason}");
        }
    }
}
