//! `uninstall`: releases the addresses while the agents can still do it, then removes everything of ours.
//!
//! Works on what it finds, so it can be run again after it was cut off, or on half an install.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use kube::api::{DeleteParams, ListParams};
use kube::core::DynamicObject;
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use vip_core::api::{DAEMONSET, DEFAULT_NAMESPACE, VIPNode, VIPPool, VirtualIP, VrrpState};

use crate::cli::{DryRun, Named, UninstallArgs};
use crate::cluster::{Cluster, permitted, present, resource_of, silence, title, title_of};
use crate::commands::install::{node_of, only_one};
use crate::exit::{Failure, Result};
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
    /// Whether the agents' DaemonSet is there.
    agents: bool,
    namespace: String,
}

impl Found {
    /// The nodes whose agents cannot clean up, for they are not heard any more. After an uninstall that was cut off none is:
    /// then those are meant that were silent before the last one was.
    fn lost(&self, now: Timestamp) -> Vec<String> {
        let renewed = |node: &VIPNode| Some(node.status.as_ref()?.renew_time.as_ref()?.0);
        let last = self.nodes.iter().filter_map(renewed).max().filter(|_| !self.agents);
        let silent = self.nodes.iter().filter(|node| is_silent(node, last.unwrap_or(now)));
        silent.map(ResourceExt::name_any).collect()
    }
}

/// Runs the command.
pub async fn run(cluster: &Cluster, args: &UninstallArgs) -> Result<()> {
    let found = find(cluster).await?;
    say(format!("Uninstalling kubectl-vip from namespace {} of {}", found.namespace, cluster.name()));
    let removal =
        |dry_run: DryRun, is_told: bool| Removal { cluster, args, dry_run, is_told, deleted: Cell::new(0) };
    if args.dry_run == DryRun::None {
        // Whoever may not delete a part of it learns so before anything is gone.
        removal(DryRun::Server, false).all(&found, &mut Unclean::default()).await?;
        prompt::confirm(&question(&found, args.keep_crds), args.yes)?;
    }
    let removal = removal(args.dry_run, true);
    let mut unclean = Unclean::default();
    let outcome = removal.all(&found, &mut unclean).await;
    // A removal that failed has left those nodes alone, too.
    unclean.tell();
    outcome?;
    if args.dry_run == DryRun::None && !args.keep_crds {
        removal.gone(&found.namespace, unclean.hint(&found.namespace)).await?;
    }
    Ok(())
}

/// Nodes whose agent did not say that it has cleaned up, and agents that do not end.
#[derive(Default)]
struct Unclean {
    nodes: BTreeSet<String>,
    pods: Vec<String>,
}

impl Unclean {
    fn tell(&self) {
        for node in &self.nodes {
            say(format!(
                "warning: {node}: its agent did not confirm that the node is clean; a restart of the node cleans it"
            ));
        }
    }

    /// What helps against what stays because of these pods.
    fn hint(&self, namespace: &str) -> Option<String> {
        (!self.pods.is_empty()).then(|| {
            format!(
                "if their nodes are lost: kubectl delete pod {} -n {namespace} --force",
                self.pods.join(" ")
            )
        })
    }
}

async fn find(cluster: &Cluster) -> Result<Found> {
    let all = ListParams::default();
    let (vips, pools, nodes) = (cluster.vips(), cluster.pools(), cluster.nodes());
    let (vips, pools, nodes, agents) =
        futures::join!(vips.list(&all), pools.list(&all), nodes.list(&all), cluster.list_agents());
    let mut places: BTreeSet<String> =
        agents?.unwrap_or_default().iter().filter_map(ResourceExt::namespace).collect();
    let has_agents = !places.is_empty();
    if !has_agents {
        places = left_behind(cluster).await?;
    }
    Ok(Found {
        vips: present(vips)?.map(|list| list.items).unwrap_or_default(),
        pools: present(pools)?.map(|list| list.items).unwrap_or_default(),
        nodes: present(nodes)?.map(|list| list.items).unwrap_or_default(),
        agents: has_agents,
        namespace: choose(places, cluster.namespace_named.then_some(cluster.namespace.as_str()))?,
    })
}

/// The namespaces in which an uninstall that was cut off has left something.
async fn left_behind(cluster: &Cluster) -> Result<BTreeSet<String>> {
    let ours = ListParams::default().labels(&format!("{}={}", LABEL.0, LABEL.1));
    let (namespaces, accounts): (Api<Namespace>, Api<ServiceAccount>) =
        (Api::all(cluster.client.clone()), Api::all(cluster.client.clone()));
    let (namespaces, accounts) = futures::join!(namespaces.list(&ours), accounts.list(&ours));
    let mut places: BTreeSet<String> =
        permitted(namespaces)?.into_iter().flatten().map(|namespace| namespace.name_any()).collect();
    let accounts =
        permitted(accounts)?.into_iter().flatten().filter(|account| account.name_any() == DAEMONSET);
    places.extend(accounts.filter_map(|account| account.namespace()));
    Ok(places)
}

/// The namespace to remove from: one of these, and the one that is named.
fn choose(places: BTreeSet<String>, named: Option<&str>) -> Result<String> {
    match named {
        Some(named) if !places.is_empty() && !places.contains(named) => {
            let places: Vec<String> = places.into_iter().collect();
            Err(Failure::new(format!("kubectl-vip is in namespace {}, not in {named}", places.join(" and ")))
                .hint(format!("--namespace {}", places[0])))
        }
        Some(named) => Ok(named.to_owned()),
        None => {
            only_one(places.iter().cloned())?;
            Ok(places.into_iter().next().unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()))
        }
    }
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
    dry_run: DryRun,
    /// Whether it says what it does.
    is_told: bool,
    /// How many objects are deleted so far.
    deleted: Cell<usize>,
}

impl Removal<'_> {
    /// Removes what was found, in an order in which the agents can still clean their nodes.
    async fn all(&self, found: &Found, unclean: &mut Unclean) -> Result<()> {
        let stored = self.dry_run == DryRun::None;
        if !self.args.keep_crds {
            for vip in &found.vips {
                self.typed(&self.cluster.vips(), &vip.name_any()).await?;
            }
            if !found.vips.is_empty() && stored {
                unclean.nodes.extend(self.released(&found.nodes).await?);
            }
            for pool in &found.pools {
                self.typed(&self.cluster.pools(), &pool.name_any()).await?;
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
            self.object(object).await?;
        }
        if stored {
            unclean.nodes.extend(found.lost(Timestamp::now()));
            self.pods_gone(&found.namespace, unclean).await?;
        }
        for object in &rest {
            self.object(object).await?;
        }
        if self.args.keep_crds {
            // Their agents are gone: what they said of their nodes does not hold any more.
            for node in &found.nodes {
                self.typed(&self.cluster.nodes(), &node.name_any()).await?;
            }
            self.tell("kept: the resource definitions with their pools and virtual IPs");
        } else {
            for object in &definitions {
                self.object(object).await?;
            }
        }
        for object in &namespaces {
            self.namespace(object).await?;
        }
        if self.deleted.get() == 0 {
            self.tell("Nothing of kubectl-vip found.");
        }
        Ok(())
    }

    fn tell(&self, text: impl AsRef<str>) {
        if self.is_told {
            say(text);
        }
    }

    fn said(&self, title: &str) {
        self.deleted.set(self.deleted.get() + 1);
        if self.is_told {
            output::line(match self.args.output {
                Some(Named::Name) => title.to_owned(),
                None => format!("{title} deleted{}", self.dry_run.suffix()),
            });
        }
    }

    fn params(&self) -> DeleteParams {
        DeleteParams { dry_run: self.dry_run == DryRun::Server, ..DeleteParams::background() }
    }

    async fn typed<K>(&self, api: &Api<K>, name: &str) -> Result<()>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        let is_there = match self.dry_run {
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
            self.tell(format!("{} is not of kubectl-vip and stays", title(object)));
            return Ok(());
        }
        if self.dry_run != DryRun::Client && present(api.delete(&name, &self.params()).await)?.is_none() {
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
            self.tell(format!("namespace/{name} stays: pods of others run in it: {}", others.join(", ")));
            return Ok(());
        }
        self.object(object).await
    }

    /// Waits until no agent that reports has an address any more; returns the nodes that still have one.
    async fn released(&self, nodes: &[VIPNode]) -> Result<Vec<String>> {
        let now = Timestamp::now();
        if nodes.iter().all(|node| is_silent(node, now)) {
            return Ok(Vec::new());
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
        }
        Ok(holding)
    }

    /// Waits until the agents have ended: they clean their nodes when they are told to stop.
    async fn pods_gone(&self, namespace: &str, unclean: &mut Unclean) -> Result<()> {
        let api: Api<Pod> = Api::namespaced(self.cluster.client.clone(), namespace);
        let ours = ListParams::default().labels(&format!("app.kubernetes.io/component={DAEMONSET}"));
        let mut left: Vec<Pod> = Vec::new();
        let ended = wait::until("the agents to clean their nodes", self.args.timeout, async || {
            left = present(api.list(&ours).await)?.map(|list| list.items).unwrap_or_default();
            let mut nodes: Vec<String> = left.iter().filter_map(node_of).collect();
            nodes.sort();
            Ok(match left.is_empty() {
                true => Look::Done(()),
                false => Look::NotYet(format!("{} left: {}", left.len(), nodes.join(", "))),
            })
        })
        .await?;
        if let Ended::TimedOut(reason) = ended {
            say(format!("going on without waiting longer: {reason}"));
            unclean.nodes.extend(left.iter().filter_map(node_of));
            unclean.pods = left.iter().map(ResourceExt::name_any).collect();
        }
        Ok(())
    }

    /// Waits until the definitions and the namespace are gone for good, so that an install can follow at once.
    async fn gone(&self, namespace: &str, hint: Option<String>) -> Result<()> {
        let definitions: Vec<DynamicObject> = manifests::render(&Settings::default())?
            .into_iter()
            .filter(|object| manifests::is_kind(object, CRD))
            .collect();
        let namespaces: Api<Namespace> = Api::all(self.cluster.client.clone());
        let what = "the API server to forget them";
        let ended = wait::until(what, self.args.timeout, async || {
            for object in &definitions {
                let api: Api<DynamicObject> =
                    Api::all_with(self.cluster.client.clone(), &resource_of(object));
                if present(api.get(&object.name_any()).await)?.is_some() {
                    return Ok(Look::NotYet(format!("{} is still there", title(object))));
                }
            }
            let place = namespaces.get_opt(namespace).await?;
            Ok(match place.filter(|place| place.metadata.deletion_timestamp.is_some()) {
                Some(_) => Look::NotYet(format!("namespace/{namespace} is still there")),
                None => Look::Done(()),
            })
        })
        .await?;
        match ended {
            Ended::Done(()) => Ok(()),
            Ended::TimedOut(reason) => {
                let failure = wait::timed_out(what, self.args.timeout, &reason);
                Err(match hint {
                    Some(hint) => failure.hint(hint),
                    None => failure,
                })
            }
        }
    }
}

/// Whether nothing was heard of the node's agent for long, or never.
fn is_silent(node: &VIPNode, now: Timestamp) -> bool {
    silence(node, now).is_some() || node.status.is_none()
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
    fn nodes_that_nobody_hears_of_are_lost() {
        let node = |name: &str, renewed: &str| -> VIPNode {
            serde_json::from_value(json!({"metadata": {"name": name}, "status": {"renewTime": renewed}}))
                .unwrap()
        };
        let nodes = vec![
            node("node-1", "2026-01-01T00:00:55Z"),
            node("node-2", "2026-01-01T00:01:00Z"),
            node("node-3", "2026-01-01T00:00:00Z"),
        ];
        let mut found =
            Found { vips: Vec::new(), pools: Vec::new(), nodes, agents: true, namespace: String::new() };
        let lost = |found: &Found, now: &str| found.lost(now.parse().unwrap());
        assert_eq!(lost(&found, "2026-01-01T00:01:02Z"), ["node-3"]);
        assert_eq!(lost(&found, "2026-01-01T01:00:00Z").len(), 3);
        found.agents = false;
        assert_eq!(
            lost(&found, "2026-01-01T01:00:00Z"),
            ["node-3"],
            "the others have ended with the uninstall before"
        );
    }

    #[test]
    fn only_where_it_is_it_is_removed() {
        let choose = |places: &[&str], named: Option<&str>| {
            let places = places.iter().map(|place| (*place).to_owned()).collect();
            choose(places, named).map_err(|failure| failure.to_string())
        };
        assert_eq!(choose(&[], None).as_deref(), Ok(DEFAULT_NAMESPACE));
        assert_eq!(choose(&["edge"], None).as_deref(), Ok("edge"));
        assert_eq!(choose(&["edge"], Some("edge")).as_deref(), Ok("edge"));
        assert_eq!(choose(&[], Some("edge")).as_deref(), Ok("edge"));
        assert_eq!(
            choose(&["edge"], Some("egde")).unwrap_err(),
            "Error: kubectl-vip is in namespace edge, not in egde\nhint: --namespace edge"
        );
        assert!(choose(&["a", "b"], None).unwrap_err().ends_with("hint: choose one with --namespace"));
        assert_eq!(choose(&["a", "b"], Some("b")).as_deref(), Ok("b"));
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
            agents: true,
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
