//! The cluster as a whole. `install` refuses by these judgements, too.

use std::cmp::Ordering;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Namespace;
use kube::ResourceExt;
use vip_core::validate::check_pools;

use super::facts::Facts;
use super::rights::Lack;
use super::{Report, kube_proxy};
use crate::codes::cluster as codes;
use crate::codes::{Group, Problem};
use crate::output::NONE;

/// The first minor version of Kubernetes 1 whose rules can read IP addresses.
const OLDEST: u32 = 31;
/// The label of a namespace that says which pods may run there.
const ENFORCE: &str = "pod-security.kubernetes.io/enforce";

/// The lines of this group.
pub fn judge(facts: &Facts, report: &mut Report) {
    let (major, minor, version) = &facts.version;
    report.verdict(Group::Cluster, format!("the API server is {version}"), too_old(major, minor, version));
    if facts.pre {
        let problems = facts.user_lacks.iter().map(not_allowed);
        report.verdict(Group::Cluster, "you may apply all that install applies", problems);
    }
    match &facts.proxy {
        None => {
            report.forbidden(Group::Cluster, "ConfigMap kube-proxy: the mode of kube-proxy is not checked")
        }
        Some(found) => {
            let (pools, _) = check_pools(facts.pools.iter().flatten());
            report.verdict(Group::Cluster, kube_proxy::well(found), kube_proxy::problem(found, &pools));
        }
    }
    let namespace = &facts.namespace;
    match &facts.place {
        None => report.forbidden(Group::Cluster, "namespaces: pod security is not checked"),
        Some(None) => report.verdict(
            Group::Cluster,
            format!("namespace {namespace} is not there yet: install makes it"),
            None,
        ),
        Some(Some(place)) => report.verdict(
            Group::Cluster,
            format!("namespace {namespace} lets the agents' pods run"),
            pod_security(place),
        ),
    }
    if let Some(agents) = &facts.agents
        && facts.named
    {
        let well = "there is no installation in another namespace";
        report.verdict(Group::Cluster, well, elsewhere(agents, namespace));
    }
    if facts.agents.as_ref().is_some_and(Vec::is_empty) {
        return;
    }
    match &facts.missing {
        None => report
            .forbidden(Group::Cluster, "definitions, roles and policies: not all of them are looked for"),
        Some(missing) => {
            let problems = missing.iter().map(|title| Problem {
                code: &codes::INCOMPLETE,
                about: title.clone(),
                message: "it is missing".to_owned(),
                command: "kubectl vip install".to_owned(),
            });
            report.verdict(Group::Cluster, "definitions, roles and admission policies are there", problems);
        }
    }
    match &facts.agents_lack {
        None => report
            .forbidden(Group::Cluster, "subjectaccessreviews: the permissions of the agents are not checked"),
        Some(lacks) => {
            let problem = |lack: &Lack| Problem {
                code: &codes::AGENT_RIGHTS,
                about: "agents".to_owned(),
                message: format!("they cannot {} {}", lack.verbs.replace(',', ", "), lack.resource),
                command: "kubectl vip install".to_owned(),
            };
            report.verdict(
                Group::Cluster,
                "the agents have the permissions they need",
                lacks.iter().map(problem),
            );
        }
    }
}

/// An API server that cannot enforce our rules.
pub fn too_old(major: &str, minor: &str, version: &str) -> Option<Problem> {
    // Some providers write `31+`.
    let minor: u32 = minor.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok()?;
    (major == "1" && minor.cmp(&OLDEST) == Ordering::Less).then(|| Problem {
        code: &codes::TOO_OLD,
        about: "API server".to_owned(),
        message: format!("the API server is {version}; Kubernetes 1.{OLDEST} or later is needed"),
        command: "kubectl version".to_owned(),
    })
}

fn not_allowed(lack: &Lack) -> Problem {
    let place = lack.namespace.as_ref().map(|namespace| format!(" in {namespace:?}")).unwrap_or_default();
    let flag = lack.namespace.as_ref().map(|namespace| format!(" -n {namespace}")).unwrap_or_default();
    let verb = lack.verbs.split(',').next().unwrap_or(NONE);
    Problem {
        code: &codes::NOT_ALLOWED,
        about: "you".to_owned(),
        message: format!("you cannot {} {}{place}", lack.verbs.replace(',', ", "), lack.resource),
        command: format!("kubectl auth can-i {verb} {}{flag}", lack.resource),
    }
}

/// A namespace in which the agents' pods would be refused.
pub fn pod_security(namespace: &Namespace) -> Option<Problem> {
    let level = namespace.labels().get(ENFORCE).filter(|level| *level != "privileged")?;
    let name = namespace.name_any();
    Some(Problem {
        code: &codes::POD_SECURITY,
        about: "pod security".to_owned(),
        message: format!(
            "namespace {name} allows {level} pods only: those of the agents use the network of their node"
        ),
        command: format!("kubectl label namespace {name} {ENFORCE}=privileged --overwrite"),
    })
}

/// An installation in another namespace.
pub fn elsewhere(agents: &[DaemonSet], namespace: &str) -> Option<Problem> {
    let other = agents.iter().filter_map(ResourceExt::namespace).find(|other| other != namespace)?;
    Some(Problem {
        code: &codes::ELSEWHERE,
        about: "agents".to_owned(),
        message: format!("kubectl-vip is installed in namespace {other} already"),
        command: format!("go on there: --namespace {other}"),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn the_version_of_the_api_server() {
        let code = |major: &str, minor: &str| too_old(major, minor, "v").map(|problem| problem.code.id);
        assert_eq!(code("1", "30+"), Some("VIP001"));
        for (major, minor) in [("1", "31"), ("1", "31+"), ("2", "0"), ("1", "")] {
            assert_eq!(code(major, minor), None, "{major}.{minor}");
        }
    }

    #[test]
    fn an_installation_in_another_namespace() {
        let agents = json!({"metadata": {"name": "vip-node", "namespace": "edge"}});
        let agents = [serde_json::from_value(agents).unwrap()];
        assert_eq!(elsewhere(&agents, "kubectl-vip").map(|problem| problem.code.id), Some("VIP005"));
        assert_eq!(elsewhere(&agents, "edge").map(|problem| problem.code.id), None);
    }

    #[test]
    fn the_level_of_the_namespace() {
        let code = |labels: Value| {
            let namespace = json!({"metadata": {"name": "x", "labels": labels}});
            pod_security(&serde_json::from_value(namespace).unwrap()).map(|problem| problem.code.id)
        };
        assert_eq!(code(json!({})), None);
        assert_eq!(code(json!({ENFORCE: "privileged"})), None);
        assert_eq!(code(json!({ENFORCE: "restricted"})), Some("VIP004"));
    }
}
