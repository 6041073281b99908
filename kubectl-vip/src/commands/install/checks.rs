//! What is looked at before anything is applied, by the judgements of `check`; and what is there already.

use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, ResourceExt};
use vip_core::api::VIPPool;
use vip_core::validate::check_pools;

use crate::cluster::{Cluster, permitted, present};
use crate::codes::{Code, Problem, Severity};
use crate::commands::check::{cluster as judge, kube_proxy};
use crate::exit::{Failure, Result};
use crate::output::say;
use crate::wait::{self, Ended, Look};

/// Refuses a cluster in which it could not work with these pools and those that it has, except for what is to be skipped.
pub async fn run(
    cluster: &Cluster,
    namespace: &str,
    wanted: &[VIPPool],
    skip: &[&'static Code],
) -> Result<()> {
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let (version, proxy, agents, place, pools) = futures::join!(
        cluster.client.apiserver_version(),
        kube_proxy::read(cluster),
        cluster.list_agents(),
        namespaces.get_opt(namespace),
        cluster.list_pools()
    );
    let version = version?;
    let proxy = proxy?;
    if proxy.is_none() {
        say("warning: ConfigMap kube-proxy may not be read: its mode is not checked");
    }
    // Before the first install there are none, nor a definition of them.
    let mut pools = pools.unwrap_or_default();
    pools.retain(|pool| wanted.iter().all(|wanted| wanted.name_any() != pool.name_any()));
    pools.extend_from_slice(wanted);
    let (pools, _) = check_pools(&pools);
    // Our own namespace gets the right label.
    let place = permitted(place)?.flatten().filter(|place| !is_ours(place));
    let problems: Vec<Problem> = [
        judge::too_old(&version.major, &version.minor, &version.git_version),
        kube_proxy::problem(proxy.as_deref().unwrap_or_default(), &pools),
        place.as_ref().and_then(judge::pod_security),
        judge::elsewhere(&agents?.unwrap_or_default(), namespace),
    ]
    .into_iter()
    .flatten()
    .filter(|problem| problem.code.severity == Severity::Error && !skip.contains(&problem.code))
    .collect();
    let Some((first, others)) = problems.split_first() else { return Ok(()) };
    for other in others {
        say(format!("also: {} ({})", other.message, other.code));
    }
    let code = first.code;
    Err(Failure::new(first.message.clone())
        .hint(&first.command)
        .hint(format!("kubectl vip explain {code}; to leave this check out: --skip-checks {code}")))
}

/// Whether install made the namespace.
fn is_ours(namespace: &Namespace) -> bool {
    let (label, ours) = crate::manifests::LABEL;
    namespace.labels().get(label).map(String::as_str) == Some(ours)
}

/// Whether a namespace of this name is there and not ours: then it is neither changed nor, later, deleted. One that is
/// being deleted, by an uninstall that has just ended, is waited for.
pub async fn foreign_namespace(cluster: &Cluster, name: &str, timeout: Duration) -> Result<bool> {
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let what = format!("namespace/{name}");
    let ended = wait::until(&what, timeout, async || {
        // Who may not read it finds out when applying it.
        let Some(namespace) = permitted(namespaces.get_opt(name).await)?.flatten() else {
            return Ok(Look::Done(false));
        };
        if namespace.metadata.deletion_timestamp.is_some() {
            return Ok(Look::NotYet("it is still being deleted".to_owned()));
        }
        Ok(Look::Done(!is_ours(&namespace)))
    })
    .await?;
    match ended {
        Ended::Done(foreign) => Ok(foreign),
        Ended::TimedOut(reason) => Err(wait::timed_out(&what, timeout, &reason)),
    }
}

/// Whether the resource definitions are there.
pub async fn has_definitions(cluster: &Cluster) -> Result<bool> {
    let one = kube::api::ListParams::default().limit(1);
    Ok(present(cluster.pools().list(&one).await)?.is_some())
}
