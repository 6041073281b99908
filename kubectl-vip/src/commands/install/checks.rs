//! What is looked at before anything is applied: the version of the API server, kube-proxy's mode, an older install.

use std::cmp::Ordering;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::{Api, ResourceExt};
use serde_json::Value;

use crate::cluster::{Cluster, permitted, present};
use crate::exit::{Failure, Result};
use crate::output::say;
use crate::wait::{self, Ended, Look};

/// The first minor version of Kubernetes 1 whose rules can read IP addresses.
const OLDEST: u32 = 31;

/// Refuses a cluster in which it could not work.
pub async fn run(cluster: &Cluster, namespace: &str) -> Result<()> {
    let (version, proxy, agents) =
        futures::join!(cluster.client.apiserver_version(), proxy_mode(cluster), cluster.list_agents());
    let version = version?;
    if let Some(minor) = digits(&version.minor)
        && version.major == "1"
        && minor.cmp(&OLDEST) == Ordering::Less
    {
        return Err(Failure::new(format!(
            "the API server is {}; Kubernetes 1.{OLDEST} or later is needed",
            version.git_version
        )));
    }
    if proxy?.as_deref() == Some("ipvs") {
        return Err(Failure::new(
            "kube-proxy runs in IPVS mode (ConfigMap kube-proxy in namespace kube-system): it deletes IPVS services it does not know",
        )
        .hint("use its nftables mode: mode: nftables in that ConfigMap, then restart kube-proxy")
        .hint("or keep its hands off the pools: ipvs: {excludeCIDRs: [the pools' CIDRs]}"));
    }
    let elsewhere =
        agents?.unwrap_or_default().into_iter().filter_map(|set| set.namespace()).find(|n| n != namespace);
    match elsewhere {
        Some(other) => Err(Failure::new(format!("kubectl-vip is installed in namespace {other} already"))
            .hint(format!("go on there: --namespace {other}"))),
        None => Ok(()),
    }
}

fn digits(text: &str) -> Option<u32> {
    // Some providers write `31+`.
    text.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok()
}

/// kube-proxy's mode, where it is configured by the ConfigMap that kubeadm writes.
async fn proxy_mode(cluster: &Cluster) -> Result<Option<String>> {
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "kube-system");
    let Some(found) = permitted(maps.get_opt("kube-proxy").await)? else {
        say("warning: ConfigMap kube-proxy may not be read: its mode is not checked");
        return Ok(None);
    };
    Ok(found.and_then(|map| mode_of(&map)))
}

/// The mode, unless all that IPVS mode would delete is excluded by hand.
fn mode_of(map: &ConfigMap) -> Option<String> {
    let text = map.data.as_ref()?.get("config.conf")?;
    let config: Value = serde_saphyr::from_str(text).ok()?;
    let excluded = config["ipvs"]["excludeCIDRs"].as_array().is_some_and(|list| !list.is_empty());
    if excluded { None } else { config["mode"].as_str().map(str::to_owned) }
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
        let (label, ours) = crate::manifests::LABEL;
        Ok(Look::Done(namespace.labels().get(label).map(String::as_str) != Some(ours)))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(config: &str) -> Option<String> {
        let map = serde_json::json!({"data": {"config.conf": config}});
        mode_of(&serde_json::from_value(map).unwrap())
    }

    #[test]
    fn the_mode_of_kube_proxy() {
        assert_eq!(mode("kind: KubeProxyConfiguration\nmode: ipvs\n").as_deref(), Some("ipvs"));
        assert_eq!(mode("mode: nftables\n").as_deref(), Some("nftables"));
        assert_eq!(mode("mode: \"\"\n").as_deref(), Some(""));
        assert_eq!(mode("mode: ipvs\nipvs:\n  excludeCIDRs: [192.168.10.240/28]\n"), None);
        assert_eq!(mode(": ["), None);
        assert_eq!(digits("31+"), Some(31));
    }
}
