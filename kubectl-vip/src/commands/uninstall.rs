//! `uninstall`: releases the addresses while the agents can still do it, then removes everything of ours.
//!
//! Works on what it finds, so it can be run again after it was cut off, or on half an install.

use std::cell::Cell;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{DeleteParams, ListParams};
use kube::core::DynamicObject;
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use vip_core::api::{DAEMONSET, DEFAULT_NAMESPACE, VIPNode, VIPPool, VirtualIP, VrrpState};

use crate::cli::{DryRun, UninstallArgs};
use crate::cluster::{Cluster, present, resource_of, silence, title, title_of};
use crate::commands::install::node_of;
use crate::exit::Result;
use crate::manifests::{self, CRD, LABEL, Settings};
use crate::output::{self, say};
use crate::prompt;
use crate::wait::{self, Ended, Look};

/// How long the agents get to let go of their addresses while they run; a handover takes a second.
const RELEASE: Duration = Duration::from_secs(30);

/// What there is to remove.
struct Found {
    vips: Vec<VirtualIP>,
    pools: Vec<VIPPool>,
    nodes: Vec<VIPNode>,
    namespace: String,
}

/// Runs the command.
pub async fn run(cluster: &Cluster, args: &UninstallArgs) -> Result<()> {
    let found = find(cluster).await?;
    say(format!("Uninstalling kubectl-vip from namespace {} of {}", found.namespace, cluster.name()));
    if args.dry_run == DryRun::None {
        prompt::confirm(&question(&found, args.keep_crds), args.yes)?;
    }
    let removal = Removal { cluster, args, deleted: Cell::new(0) };

    let mut unsure = Vec::new();
    if !args.keep_crds {
        for vip in &found.vips {
            removal.typed(&cluster.vips(), &vip.name_any()).await?;
        }
        if !found.vips.is_empty() && args.dry_run == DryRun::None {
            unsure = removal.released(&found.nodes).await?;
        }
        for pool in &found.pools {
            removal.typed(&cluster.pools(), &pool.name_any()).await?;
        }
    }

    let settings = Settings { namespace: Some(found.namespace.clone()), ..Settings::default() };
    let mut objects = manifests::render(&settings)?;
    // Backwards: what was applied last goes first.
    objects.reverse();
    let (definitions, rest): (Vec<_>, Vec<_>) =
        objects.into_iter().partition(|object| manifests::is_kind(object, CRD));
    let (namespaces, rest): (Vec<_>, Vec<_>) =
        rest.into_iter().partition(|object| manifests::is_kind(object, "Namespace"));
    let (agents, rest): (Vec<_>, Vec<_>) = rest.into_iter().partition(manifests::is_agents);
    for object in &agents {
        removal.object(object).await?;
    }
    if args.dry_run == DryRun::None {
        unsure.extend(removal.pods_gone(&found.namespace).await?);
    }
    for object in &rest {
        removal.object(object).await?;
    }
    if args.keep_crds {
        // Their agents are gone: what they said of their nodes does not hold any more.
        for node in &found.nodes {
            removal.typed(&cluster.nodes(), &node.name_any()).await?;
        }
        say("kept: the resource definitions with their pools and virtual IPs");
    } else {
        for object in &definitions {
            removal.object(object).await?;
        }
    }
    for object in &namespaces {
        removal.namespace(object).await?;
    }
    if args.dry_run == DryRun::None && !args.keep_crds {
        removal.gone(&definitions).await?;
    }
    if removal.deleted.get() == 0 {
        say("Nothing of kubectl-vip found.");
    }
    unsure.sort();
    unsure.dedup();
    for node in unsure {
        say(format!(
            "warning: {node}: its agent did not confirm that the node is clean; a restart of the node cleans it"
        ));
    }
    Ok(())
}

async fn find(cluster: &Cluster) -> Result<Found> {
    let all = ListParams::default();
    let (vips, pools, nodes) = (cluster.vips(), cluster.pools(), cluster.nodes());
    let (vips, pools, nodes, agents) =
        futures::join!(vips.list(&all), pools.list(&all), nodes.list(&all), cluster.list_agents());
    let namespace = agents?.unwrap_or_default().iter().find_map(ResourceExt::namespace);
    let named = cluster.namespace_named.then(|| cluster.namespace.clone());
    Ok(Found {
        vips: present(vips)?.map(|list| list.items).unwrap_or_default(),
        pools: present(pools)?.map(|list| list.items).unwrap_or_default(),
        nodes: present(nodes)?.map(|list| list.items).unwrap_or_default(),
        namespace: namespace.or(named).unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()),
    })
}

fn question(found: &Found, keep: bool) -> String {
    let count = |number: usize, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
    let fate = if keep { "stops answering at" } else { "gives up" };
    format!(
        "uninstall {fate} {} and removes the agents of {}{}. Go on?",
        count(found.vips.len(), "virtual IP"),
        count(found.nodes.len(), "node"),
        if keep { String::new() } else { format!(" and {}", count(found.pools.len(), "pool")) }
    )
}

struct Removal<'a> {
    cluster: &'a Cluster,
    args: &'a UninstallArgs,
    /// How many objects are deleted so far.
    deleted: Cell<usize>,
}

impl Removal<'_> {
    fn said(&self, title: &str) {
        self.deleted.set(self.deleted.get() + 1);
        output::line(format!("{title} deleted{}", self.args.dry_run.suffix()));
    }

    fn params(&self) -> DeleteParams {
        DeleteParams { dry_run: self.args.dry_run == DryRun::Server, ..DeleteParams::background() }
    }

    async fn typed<K>(&self, api: &Api<K>, name: &str) -> Result<()>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        let is_there = match self.args.dry_run {
            DryRun::Client => true,
            DryRun::None | DryRun::Server => present(api.delete(name, &self.params()).await)?.is_some(),
        };
        if is_there {
            self.said(&title_of::<K>(name));
        }
        Ok(())
    }

    async fn object(&self, object: &DynamicObject) -> Result<()> {
        let api = self.cluster.api_of(object);
        let name = object.name_any();
        let Some(stored) = present(api.get(&name).await)? else { return Ok(()) };
        // A namesake that is somebody else's stays.
        if stored.labels().get(LABEL.0).map(String::as_str) != Some(LABEL.1) {
            say(format!("{} is not of kubectl-vip and stays", title(object)));
            return Ok(());
        }
        if self.args.dry_run != DryRun::Client && present(api.delete(&name, &self.params()).await)?.is_none()
        {
            return Ok(());
        }
        self.said(&title(object));
        Ok(())
    }

    /// A namespace that is ours goes, unless somebody has put something else into it.
    async fn namespace(&self, object: &DynamicObject) -> Result<()> {
        let name = object.name_any();
        let pods: Api<Pod> = Api::namespaced(self.cluster.client.clone(), &name);
        let others: Vec<String> = present(pods.list(&ListParams::default()).await)?
            .into_iter()
            .flat_map(|list| list.items)
            .filter(|pod| {
                pod.labels().get("app.kubernetes.io/component").map(String::as_str) != Some(DAEMONSET)
            })
            .map(|pod| pod.name_any())
            .collect();
        if !others.is_empty() {
            say(format!("namespace/{name} stays: pods of others run in it: {}", others.join(", ")));
            return Ok(());
        }
        self.object(object).await
    }

    /// Waits until no agent that reports has an address any more; returns the nodes that were not heard of.
    async fn released(&self, nodes: &[VIPNode]) -> Result<Vec<String>> {
        let now = Timestamp::now();
        let (silent, live): (Vec<&VIPNode>, Vec<&VIPNode>) =
            nodes.iter().partition(|node| silence(node, now).is_some() || node.status.is_none());
        let mut unsure: Vec<String> = silent.iter().map(|node| node.name_any()).collect();
        if live.is_empty() {
            return Ok(unsure);
        }
        let timeout = RELEASE.min(self.args.timeout);
        let mut holding: Vec<String> = Vec::new();
        let ended = wait::until("the addresses to be released", timeout, async || {
            let nodes = present(self.cluster.nodes().list(&ListParams::default()).await)?;
            let nodes = nodes.map(|list| list.items).unwrap_or_default();
            holding = holders(&nodes, Timestamp::now());
            Ok(match holding.is_empty() {
                true => Look::Done(()),
                false => Look::NotYet(format!("not yet by {}", holding.join(", "))),
            })
        })
        .await?;
        if let Ended::TimedOut(reason) = ended {
            say(format!("going on without waiting longer: {reason}"));
            unsure.extend(holding);
        }
        Ok(unsure)
    }

    /// Waits until the agents have ended: they clean their nodes when they are told to stop. Returns the nodes where
    /// one has not.
    async fn pods_gone(&self, namespace: &str) -> Result<Vec<String>> {
        let pods: Api<Pod> = Api::namespaced(self.cluster.client.clone(), namespace);
        let ours = ListParams::default().labels(&format!("app.kubernetes.io/component={DAEMONSET}"));
        let mut left: Vec<String> = Vec::new();
        let ended = wait::until("the agents to clean their nodes", self.args.timeout, async || {
            let pods = present(pods.list(&ours).await)?.map(|list| list.items).unwrap_or_default();
            left = pods.iter().filter_map(node_of).collect();
            left.sort();
            Ok(match pods.is_empty() {
                true => Look::Done(()),
                false => Look::NotYet(format!("{} left: {}", pods.len(), left.join(", "))),
            })
        })
        .await?;
        match ended {
            Ended::Done(()) => Ok(Vec::new()),
            Ended::TimedOut(reason) => {
                say(format!("going on without waiting longer: {reason}"));
                Ok(left)
            }
        }
    }

    /// Waits until the definitions and the namespace are gone for good, so that an install can follow at once.
    async fn gone(&self, definitions: &[DynamicObject]) -> Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.cluster.client.clone());
        let ours = ListParams::default().labels(&format!("{}={}", LABEL.0, LABEL.1));
        let what = "the API server to forget them";
        let ended = wait::until(what, self.args.timeout, async || {
            for object in definitions {
                let api: Api<DynamicObject> =
                    Api::all_with(self.cluster.client.clone(), &resource_of(object));
                if present(api.get(&object.name_any()).await)?.is_some() {
                    return Ok(Look::NotYet(format!("{} is still there", title(object))));
                }
            }
            let list = namespaces.list(&ours).await?;
            Ok(match list.items.iter().find(|n| n.metadata.deletion_timestamp.is_some()) {
                Some(namespace) => Look::NotYet(format!("namespace/{} is still there", namespace.name_any())),
                None => Look::Done(()),
            })
        })
        .await?;
        match ended {
            Ended::Done(()) => Ok(()),
            Ended::TimedOut(reason) => Err(wait::timed_out(what, self.args.timeout, &reason)),
        }
    }
}

/// Nodes that report and are master of something.
fn holders(nodes: &[VIPNode], now: Timestamp) -> Vec<String> {
    let is_master = |node: &&VIPNode| {
        node.status
            .iter()
            .flat_map(|status| &status.virtual_routers)
            .any(|router| router.state == VrrpState::Master)
    };
    nodes
        .iter()
        .filter(|node| silence(node, now).is_none())
        .filter(is_master)
        .map(ResourceExt::name_any)
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_masters_that_report_are_waited_for() {
        let node = |name: &str, renewed: &str, state: &str| -> VIPNode {
            serde_json::from_value(json!({
                "metadata": {"name": name},
                "status": {"renewTime": renewed, "virtualRouters": [
                    {"interface": "eth0", "family": 4, "virtualRouter": 100, "state": state, "priority": 1,
                     "since": "2026-01-01T00:00:00Z"}]},
            }))
            .unwrap()
        };
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let lately = "2026-01-01T00:00:55Z";
        let nodes = [
            node("node-1", lately, "Backup"),
            node("node-2", lately, "Master"),
            node("node-3", "2026-01-01T00:00:00Z", "Master"),
        ];
        assert_eq!(holders(&nodes, now), ["node-2"]);
    }

    #[test]
    fn the_question_says_what_goes() {
        let found = Found {
            vips: Vec::new(),
            pools: vec![crate::commands::pool::draft(
                "lab",
                &["10.0.0.1".to_owned()],
                vip_core::api::VirtualRouterRange { first: 1, count: 1 },
            )],
            nodes: Vec::new(),
            namespace: "n".to_owned(),
        };
        assert_eq!(
            question(&found, false),
            "uninstall gives up 0 virtual IPs and removes the agents of 0 nodes and 1 pool. Go on?"
        );
        assert_eq!(
            question(&found, true),
            "uninstall stops answering at 0 virtual IPs and removes the agents of 0 nodes. Go on?"
        );
    }
}
