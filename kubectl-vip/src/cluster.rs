//! The cluster: a connection made the way kubectl makes it, and the requests that several commands share.
//!
//! What the answers mean for the user is for the commands to say.

mod config;
mod login;
mod proxy;
mod trace;

use std::fmt::Debug;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{ListParams, Patch, PatchParams};
use kube::client::ClientBuilder;
use kube::core::{ApiResource, DynamicObject, Status};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tower_layer::layer_fn;
use vip_core::api::{
    DAEMONSET, PLUGIN_MANAGER, SILENT_AFTER_SECONDS, ServiceRef, VIPNode, VIPPool, VirtualIP,
};

use crate::cli::{Connection, DryRun};
use crate::exit::{Failure, Result, is_missing_resource};
use crate::suggest;

pub use self::config::names;
use self::trace::Traced;

/// A connection to a cluster.
pub struct Cluster {
    /// The client.
    pub client: Client,
    /// Name of the context; `None` inside a pod or with `--server` alone.
    pub context: Option<String>,
    /// URL of the API server.
    pub server: String,
    /// Namespace of the Services: `--namespace`, or that of the context.
    pub namespace: String,
    /// Whether the namespace was named on the command line.
    pub namespace_named: bool,
}

impl Cluster {
    /// Reads the kubeconfig and makes a client. Nothing is sent yet.
    pub async fn connect(connection: &Connection) -> Result<Self> {
        let source = config::load(connection).await?;
        let server = source.config.cluster_url.to_string().trim_end_matches('/').to_owned();
        let namespace =
            connection.namespace.clone().unwrap_or_else(|| source.config.default_namespace.clone());
        let told = connection.verbosity >= trace::REQUESTS;
        let traced = layer_fn(|inner| Traced { inner, server: server.clone(), told });
        let exec = source.config.auth_info.exec.clone();
        let client = ClientBuilder::try_from(source.config)
            .map_err(|error| login::failure(&error, exec.as_ref(), &server))?
            .with_layer(&traced)
            .build();
        Ok(Self {
            client,
            context: source.context,
            server,
            namespace,
            namespace_named: connection.namespace.is_some(),
        })
    }

    /// The cluster in words: context and server.
    pub fn name(&self) -> String {
        match &self.context {
            Some(context) => format!("context {context:?} ({})", self.server),
            None => self.server.clone(),
        }
    }

    /// The context for a sentence: its name, or the server.
    pub fn place(&self) -> &str {
        self.context.as_deref().unwrap_or(&self.server)
    }

    /// VirtualIPs.
    pub fn vips(&self) -> Api<VirtualIP> {
        Api::all(self.client.clone())
    }

    /// VIPPools.
    pub fn pools(&self) -> Api<VIPPool> {
        Api::all(self.client.clone())
    }

    /// VIPNodes.
    pub fn nodes(&self) -> Api<VIPNode> {
        Api::all(self.client.clone())
    }

    /// Services of a namespace.
    pub fn services(&self, namespace: &str) -> Api<Service> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// All VirtualIPs, in the order of their addresses.
    pub async fn list_vips(&self) -> Result<Vec<VirtualIP>> {
        let mut vips = self.vips().list(&ListParams::default()).await?.items;
        vips.sort_by_key(|vip| vip.spec.address.parse::<std::net::IpAddr>().ok());
        Ok(vips)
    }

    /// All pools.
    pub async fn list_pools(&self) -> Result<Vec<VIPPool>> {
        Ok(self.pools().list(&ListParams::default()).await?.items)
    }

    /// All VIPNodes; `None` when the user may not see them.
    pub async fn list_nodes(&self) -> Result<Option<Vec<VIPNode>>> {
        permitted(self.nodes().list(&ListParams::default()).await).map(|list| list.map(|l| l.items))
    }

    /// Where the DaemonSets of the agents are, and which they are.
    pub fn agents(&self) -> (Api<DaemonSet>, ListParams) {
        let ours = ListParams::default().labels(&format!("app.kubernetes.io/component={DAEMONSET}"));
        (Api::all(self.client.clone()), ours)
    }

    /// The DaemonSets of the agents in all namespaces; `None` when the user may not see them.
    pub async fn list_agents(&self) -> Result<Option<Vec<DaemonSet>>> {
        let (agents, ours) = self.agents();
        permitted(agents.list(&ours).await).map(|list| list.map(|l| l.items))
    }

    /// The EndpointSlices of a Service; `None` when the user may not see them.
    pub async fn list_slices(&self, service: &ServiceRef) -> Result<Option<Vec<EndpointSlice>>> {
        let slices: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &service.namespace);
        let of_service =
            ListParams::default().labels(&format!("kubernetes.io/service-name={}", service.name));
        permitted(slices.list(&of_service).await).map(|list| list.map(|l| l.items))
    }

    /// A Service of the current namespace; its absence is a sentence with the closest name.
    pub async fn service(&self, name: &str) -> Result<Service> {
        let services = self.services(&self.namespace);
        match services.get_opt(name).await? {
            Some(service) => Ok(service),
            None => Err(self.no_service(name).await),
        }
    }

    /// There is no such Service in the current namespace, nor that namespace perhaps.
    pub async fn no_service(&self, name: &str) -> Failure {
        let place = format!("namespace {}, context {}", self.namespace, self.place());
        let services = names_of(&self.services(&self.namespace)).await;
        if services.is_empty() {
            let namespaces = names_of(&Api::<Namespace>::all(self.client.clone())).await;
            if !namespaces.is_empty() && !namespaces.contains(&self.namespace) {
                let known = suggest::ending(&self.namespace, namespaces.iter().map(String::as_str));
                return Failure::new(format!(
                    "services {name:?} not found ({place}): there is no such namespace{known}"
                ));
            }
        }
        let known = suggest::ending(name, services.iter().map(String::as_str));
        Failure::new(format!("services {name:?} not found ({place}){known}"))
    }

    /// Server-side apply of one object. With a dry run of the client nothing is sent, and the object comes back as it is.
    pub async fn apply(
        &self,
        object: &DynamicObject,
        dry_run: DryRun,
        force: bool,
    ) -> kube::Result<DynamicObject> {
        if dry_run == DryRun::Client {
            return Ok(object.clone());
        }
        let mut params = PatchParams {
            dry_run: dry_run == DryRun::Server,
            force,
            field_manager: Some(PLUGIN_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let (api, name) = (self.api_of(object), object.name_any());
        match api.patch(&name, &params, &Patch::Apply(object)).await {
            // `pool create` and `pool set` write by other requests, which the API server takes for somebody else.
            Err(kube::Error::Api(status)) if with_ourselves(&status) => {
                params.force = true;
                api.patch(&name, &params, &Patch::Apply(object)).await
            }
            answer => answer,
        }
    }

    /// Where the API server keeps an object of our manifests.
    pub fn api_of(&self, object: &DynamicObject) -> Api<DynamicObject> {
        let resource = resource_of(object);
        match object.namespace() {
            Some(namespace) => Api::namespaced_with(self.client.clone(), &namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        }
    }
}

/// The names of all objects of a kind, for a suggestion; none for those who may not list them.
pub async fn names_of<K>(api: &Api<K>) -> Vec<String>
where
    K: Clone + DeserializeOwned + Debug,
{
    let list = api.list_metadata(&ListParams::default()).await.map(|list| list.items);
    list.unwrap_or_default().into_iter().filter_map(|object| object.metadata.name).collect()
}

/// Group, version, kind and plural of an object of our manifests.
pub fn resource_of(object: &DynamicObject) -> ApiResource {
    let types = object.types.clone().unwrap_or_default();
    let (group, version) = types.api_version.split_once('/').unwrap_or(("", &types.api_version));
    let plural = match types.kind.as_str() {
        "ValidatingAdmissionPolicy" => "validatingadmissionpolicies".to_owned(),
        kind => format!("{}s", kind.to_lowercase()),
    };
    ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version: types.api_version.clone(),
        kind: types.kind.clone(),
        plural,
    }
}

/// An object as kubectl names it: `daemonset.apps/vip-node`.
pub fn title(object: &DynamicObject) -> String {
    let resource = resource_of(object);
    named(&resource.kind, &resource.group, &object.name_any())
}

/// A typed object as kubectl names it: `vippool.kubectl-vip.io/lab`.
pub fn title_of<K: Resource<DynamicType = ()>>(name: &str) -> String {
    named(&K::kind(&()), &K::group(&()), name)
}

fn named(kind: &str, group: &str, name: &str) -> String {
    let dot = if group.is_empty() { "" } else { "." };
    format!("{}{dot}{group}/{name}", kind.to_lowercase())
}

/// An answer that the user may be refused: `None` then, instead of an error.
pub fn permitted<T>(answer: kube::Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(kube::Error::Api(status)) if status.is_forbidden() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// An answer of a cluster that may not know the resource, or lack the object: `None` then.
pub fn present<T>(answer: kube::Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(kube::Error::Api(status)) if status.is_not_found() || is_missing_resource(&status) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether the error is a conflict of two writers, to be tried again from the start.
pub fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_conflict())
}

/// Whether all that an apply conflicts with was written by this plugin.
fn with_ourselves(status: &Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let mut managers = causes.filter(|cause| cause.reason == "FieldManagerConflict").peekable();
    let ours = format!("conflict with {PLUGIN_MANAGER:?} ");
    status.is_conflict()
        && managers.peek().is_some()
        && managers.all(|cause| cause.message.starts_with(&ours))
}

/// For how long a node's agent has been silent; `None` while it reports.
pub fn silence(node: &VIPNode, now: Timestamp) -> Option<i64> {
    let renewed = node.status.as_ref().and_then(|status| status.renew_time.as_ref());
    let since = renewed.or(node.metadata.creation_timestamp.as_ref())?;
    let seconds = now.as_second() - since.0.as_second();
    (seconds > SILENT_AFTER_SECONDS).then_some(seconds)
}

/// The family of a virtual IP as reports have it: 4 or 6.
pub fn family(vip: &VirtualIP) -> u8 {
    if vip.spec.address.contains(':') { 6 } else { 4 }
}

/// Whether the virtual IP names this Service.
pub fn serves(vip: &VirtualIP, service: &ServiceRef) -> bool {
    vip.spec.services.contains(service)
}

/// How often an object is looked at while something is waited for.
pub const POLL: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_named_as_kubectl_names_them() {
        let object = |api_version: &str, kind: &str| -> DynamicObject {
            serde_json::from_value(
                serde_json::json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": "x"}}),
            )
            .unwrap()
        };
        assert_eq!(title(&object("v1", "Namespace")), "namespace/x");
        assert_eq!(title(&object("apps/v1", "DaemonSet")), "daemonset.apps/x");
        let policy = object("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy");
        assert_eq!(resource_of(&policy).plural, "validatingadmissionpolicies");
        assert_eq!(title_of::<VIPPool>("lab"), "vippool.kubectl-vip.io/lab");
    }

    #[test]
    fn a_conflict_with_ourselves_is_none() {
        let conflict = |managers: &[&str]| -> Status {
            let causes: Vec<_> = managers
                .iter()
                .map(|manager| {
                    serde_json::json!({"reason": "FieldManagerConflict", "field": ".spec.addresses",
                                       "message": format!("conflict with {manager:?} using kubectl-vip.io/v1alpha1")})
                })
                .collect();
            serde_json::from_value(
                serde_json::json!({"status": "Failure", "code": 409, "reason": "Conflict", "message": "",
                                   "details": {"causes": causes}}),
            )
            .unwrap()
        };
        assert!(with_ourselves(&conflict(&["kubectl-vip", "kubectl-vip"])));
        assert!(!with_ourselves(&conflict(&["kubectl-vip", "kubectl-edit"])));
        assert!(!with_ourselves(&conflict(&["kubectl-vip-other"])) && !with_ourselves(&conflict(&[])));
    }

    #[test]
    fn silence_is_counted_from_the_last_report() {
        let mut node = VIPNode::new("node-1", vip_core::api::VIPNodeSpec::default());
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        assert_eq!(silence(&node, now), None, "a new object without a time is no silence");
        let time =
            |text: &str| Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(text.parse().unwrap()));
        node.metadata.creation_timestamp = time("2026-01-01T00:00:00Z");
        assert_eq!(silence(&node, now), Some(60));
        node.status = Some(vip_core::api::VIPNodeStatus {
            renew_time: time("2026-01-01T00:00:45Z"),
            ..Default::default()
        });
        assert_eq!(silence(&node, now), None);
    }
}
