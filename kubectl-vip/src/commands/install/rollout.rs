//! Waiting for what was applied: resource definitions that are served, agents that are ready.

use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use vip_core::api::{DAEMONSET, VIPNode};

use crate::cluster::Cluster;
use crate::exit::{Failure, Result};
use crate::output::say;
use crate::wait::{self, Ended, Look};

/// Waits until the API server serves these resource definitions.
pub async fn definitions(cluster: &Cluster, names: &[String], timeout: Duration) -> Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    let what = "the API server to serve the new resources";
    let ended = wait::until(what, timeout, async || {
        for name in names {
            let definition = api.get(name).await?;
            let conditions = definition.status.and_then(|status| status.conditions).unwrap_or_default();
            let established = conditions.iter().find(|condition| condition.type_ == "Established");
            if established.is_none_or(|condition| condition.status != "True") {
                let refused = conditions.iter().find(|c| c.type_ == "NamesAccepted" && c.status == "False");
                let why =
                    refused.and_then(|c| c.message.clone()).unwrap_or_else(|| "not established".to_owned());
                return Ok(Look::NotYet(format!("{name}: {why}")));
            }
        }
        Ok(Look::Done(()))
    })
    .await?;
    match ended {
        Ended::Done(()) => Ok(()),
        Ended::TimedOut(reason) => Err(wait::timed_out(what, timeout, &reason)),
    }
}

/// Waits until every agent is ready.
pub async fn agents(cluster: &Cluster, namespace: &str, timeout: Duration) -> Result<()> {
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), namespace);
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace);
    let ours = ListParams::default().labels(&format!("app.kubernetes.io/component={DAEMONSET}"));
    let what = format!("daemonset/{DAEMONSET}");
    let ended = wait::until(&what, timeout, async || {
        let set = sets.get(DAEMONSET).await?;
        let Some((ready, wanted)) = progress(&set) else {
            return Ok(Look::NotYet("not scheduled yet".to_owned()));
        };
        if ready >= wanted {
            return Ok(Look::Done(wanted));
        }
        let (pods, nodes) = futures::join!(pods.list(&ours), cluster.list_nodes());
        // Why is worth knowing, but not worth failing for.
        let pods = pods.map(|list| list.items).unwrap_or_default();
        let nodes = nodes.ok().flatten().unwrap_or_default();
        Ok(Look::NotYet(format!("{ready}/{wanted} ready{}", reasons(&pods, &nodes))))
    })
    .await?;
    match ended {
        Ended::Done(0) => {
            say(format!(
                "daemonset/{DAEMONSET}: no node is to run an agent; see: kubectl describe daemonset {DAEMONSET} -n {namespace}"
            ));
            Ok(())
        }
        Ended::Done(all) => {
            say(format!("daemonset/{DAEMONSET} {all}/{all} ready"));
            Ok(())
        }
        Ended::TimedOut(reason) => Err(Failure::hint(
            wait::timed_out(&what, timeout, &reason),
            format!("all is applied, and the agents go on starting: kubectl get pods -n {namespace} -o wide"),
        )),
    }
}

/// Agents of the newest version that are ready, and that should be; `None` before the controller has looked.
fn progress(set: &DaemonSet) -> Option<(i32, i32)> {
    let status = set.status.as_ref()?;
    if status.observed_generation < set.metadata.generation {
        return None;
    }
    let updated = status.updated_number_scheduled.unwrap_or(0);
    Some((status.number_ready.min(updated), status.desired_number_scheduled))
}

/// Why agents are not ready, node by node: `; node-3: agent ImagePullBackOff: ...`.
fn reasons(pods: &[Pod], nodes: &[VIPNode]) -> String {
    let mut said: Vec<String> = pods.iter().filter_map(|pod| reason(pod, nodes)).collect();
    said.sort();
    said.dedup();
    if said.is_empty() { String::new() } else { format!("; {}", said.join("; ")) }
}

fn reason(pod: &Pod, nodes: &[VIPNode]) -> Option<String> {
    let status = pod.status.clone().unwrap_or_default();
    let conditions = status.conditions.unwrap_or_default();
    if conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True") {
        return None;
    }
    let node = node_of(pod);
    let place = node.clone().unwrap_or_else(|| pod.name_any());
    let unscheduled = conditions.iter().find(|c| c.type_ == "PodScheduled" && c.status == "False");
    if let Some(message) = unscheduled.and_then(|condition| condition.message.clone()) {
        return Some(format!("{place}: {message}"));
    }
    for container in status.container_statuses.unwrap_or_default() {
        let state = container.state.unwrap_or_default();
        let waiting = state.waiting.map(|w| (w.reason, w.message));
        let ended = state.terminated.map(|t| (t.reason, t.message));
        if let Some((reason, message)) = waiting.or(ended) {
            let reason = reason.unwrap_or_else(|| "not running".to_owned());
            let message = message.map_or_else(String::new, |message| format!(" ({message})"));
            return Some(format!("{place}: container {} {reason}{message}", container.name));
        }
    }
    // It runs: what does the agent itself say?
    let report = node.and_then(|name| nodes.iter().find(|node| node.name_any() == name)?.status.clone());
    match report.map(|status| status.dataplane).filter(|dataplane| !dataplane.ready) {
        Some(dataplane) => {
            let reason = dataplane.reason.map_or_else(|| "not ready".to_owned(), |reason| reason.to_string());
            let message = dataplane.message.map_or_else(String::new, |message| format!(": {message}"));
            Some(format!("{place}: {reason}{message}"))
        }
        None => Some(format!("{place}: starting")),
    }
}

/// The node of a DaemonSet's pod, also before it is scheduled: its affinity names it.
pub fn node_of(pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    if let Some(node) = &spec.node_name {
        return Some(node.clone());
    }
    let required = spec
        .affinity
        .as_ref()?
        .node_affinity
        .as_ref()?
        .required_during_scheduling_ignored_during_execution
        .as_ref()?;
    let mut fields = required.node_selector_terms.iter().flat_map(|term| term.match_fields.iter().flatten());
    fields.find(|field| field.key == "metadata.name")?.values.as_ref()?.first().cloned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn progress_counts_the_newest_only() {
        let set = |status: serde_json::Value| -> DaemonSet {
            serde_json::from_value(json!({"metadata": {"generation": 2}, "status": status})).unwrap()
        };
        let counts = |observed: i64, updated: i32| {
            json!({"observedGeneration": observed, "updatedNumberScheduled": updated, "numberReady": 3,
                   "desiredNumberScheduled": 3, "currentNumberScheduled": 3, "numberMisscheduled": 0})
        };
        assert_eq!(progress(&set(counts(1, 3))), None);
        assert_eq!(progress(&set(counts(2, 1))), Some((1, 3)));
        assert_eq!(progress(&set(counts(2, 3))), Some((3, 3)));
    }

    #[test]
    fn each_node_says_why() {
        let pod = |node: &str, status: serde_json::Value| -> Pod {
            serde_json::from_value(
                json!({"metadata": {"name": "vip-node-x"}, "spec": {"nodeName": node, "containers": []}, "status": status}),
            )
            .unwrap()
        };
        let running = json!({"containerStatuses": [{"name": "agent", "state": {"running": {}}, "image": "", "imageID": "",
                              "ready": false, "restartCount": 0}]});
        let pods = [
            pod("node-1", json!({"conditions": [{"type": "Ready", "status": "True"}]})),
            pod("node-2", running.clone()),
            pod(
                "node-3",
                json!({"containerStatuses": [{"name": "agent", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                    "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}]}),
            ),
            pod("node-4", running),
            serde_json::from_value(json!({"spec": {"containers": [], "affinity": {"nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": [
                    {"key": "metadata.name", "operator": "In", "values": ["node-5"]}]}]}}}}}))
            .unwrap(),
        ];
        let node: VIPNode = serde_json::from_value(json!({
            "metadata": {"name": "node-2"},
            "status": {"dataplane": {"ready": false, "reason": "IPVSUnavailable", "message": "module ip_vs is missing"}},
        }))
        .unwrap();
        assert_eq!(
            reasons(&pods, &[node]),
            "; node-2: IPVSUnavailable: module ip_vs is missing; node-3: container agent ImagePullBackOff (no such image); node-4: starting; node-5: starting"
        );
    }
}
