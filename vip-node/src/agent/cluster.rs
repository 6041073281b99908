//! What the API server says, kept in memory: it stays valid as the last known state while the API server is away.

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use backon::ExponentialBuilder;
use futures::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node as KubeNode, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::ObjectMeta;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::WatchStreamExt;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::{self, ExponentialBackoff, watcher};
use kube::{Api, Client, Config, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use tokio::sync::Notify;
use tracing::{info, warn};
use vip_core::api::{DRAIN_LABEL, ServiceRef, VIPNode, VIPPool, VirtualIP};
use vip_core::desired::Objects;
use vip_core::vrrp::Peer;

/// The label by which an EndpointSlice names its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Connects as the pod's service account, or as a kubeconfig file says.
///
/// # Errors
/// When there is neither a usable service account nor a usable file; an API server that does not answer is no error.
pub async fn connect(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    let mut config = match kubeconfig {
        Some(path) => {
            let file =
                Kubeconfig::read_from(path).with_context(|| format!("kubeconfig {}", path.display()))?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .with_context(|| format!("kubeconfig {}", path.display()))?
        }
        None => Config::incluster()
            .context("not in a pod with a service account; outside of one, --kubeconfig names a file")?,
    };
    config.connect_timeout = Some(Duration::from_secs(5));
    Client::try_from(config).context("API client")
}

/// The watched objects.
pub struct Cluster {
    vips: Store<Lenient<VirtualIP>>,
    pools: Store<Lenient<VIPPool>>,
    nodes: Store<Lenient<VIPNode>>,
    services: Store<Service>,
    slices: Store<EndpointSlice>,
    own: Store<KubeNode>,
    changed: Arc<Notify>,
}

impl Cluster {
    /// Starts to watch, on tasks of the current runtime that never end.
    pub fn watch(client: &Client, node: &str) -> Self {
        let changed = Arc::new(Notify::new());
        let all = watcher::Config::default();
        let own = watcher::Config::default().fields(&format!("metadata.name={node}"));
        Self {
            vips: reflect(Api::all(client.clone()), all.clone(), &changed),
            pools: reflect(Api::all(client.clone()), all.clone(), &changed),
            nodes: reflect(Api::all(client.clone()), all.clone(), &changed),
            services: reflect(Api::all(client.clone()), all.clone(), &changed),
            slices: reflect(Api::all(client.clone()), all, &changed),
            own: reflect(Api::all(client.clone()), own, &changed),
            changed,
        }
    }

    /// Waits until every kind was listed once.
    pub async fn synced(&self) {
        // A writer lives in a task that never ends, so none of these can fail.
        let _ = self.vips.wait_until_ready().await;
        let _ = self.pools.wait_until_ready().await;
        let _ = self.nodes.wait_until_ready().await;
        let _ = self.services.wait_until_ready().await;
        let _ = self.slices.wait_until_ready().await;
        let _ = self.own.wait_until_ready().await;
    }

    /// Waits for a change since the last call.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The objects from which this node's duties follow.
    pub fn objects(&self) -> Objects {
        let mut objects = Objects::default();
        for vip in self.vips.state() {
            match &vip.parsed {
                Ok(parsed) => objects.vips.push(parsed.clone()),
                Err(error) => objects.malformed.push((vip.name_any(), error.clone())),
            }
        }
        objects.pools = self.pools.state().iter().filter_map(|pool| pool.parsed.clone().ok()).collect();
        let wanted: std::collections::BTreeSet<&ServiceRef> =
            objects.vips.iter().flat_map(|vip| &vip.spec.services).collect();
        for reference in &wanted {
            let key = ObjectRef::new(&reference.name).within(&reference.namespace);
            if let Some(service) = self.services.get(&key) {
                objects.services.insert((*reference).clone(), service);
            }
        }
        for slice in self.slices.state() {
            let Some(name) = slice.labels().get(SERVICE_NAME) else { continue };
            let reference =
                ServiceRef { namespace: slice.namespace().unwrap_or_default(), name: name.clone() };
            if wanted.contains(&reference) {
                objects.slices.entry(reference).or_default().push(slice);
            }
        }
        objects
    }

    /// A virtual IP by name.
    pub fn vip(&self, name: &str) -> Option<Arc<VirtualIP>> {
        self.vips.get(&ObjectRef::new(name)).and_then(|vip| vip.parsed.clone().ok())
    }

    /// The virtual IPs and pools.
    pub fn pools(&self) -> Vec<Arc<VIPPool>> {
        self.pools.state().iter().filter_map(|pool| pool.parsed.clone().ok()).collect()
    }

    /// What the agents say of their nodes.
    pub fn nodes(&self) -> Vec<Arc<VIPNode>> {
        self.nodes.state().iter().filter_map(|node| node.parsed.clone().ok()).collect()
    }

    /// The other nodes with an agent.
    pub fn peers(&self, own: &str) -> Vec<Peer> {
        let mut peers: Vec<Peer> = self.nodes().iter().map(|node| peer(node)).collect();
        peers.retain(|peer| peer.node != own);
        peers.sort_by(|a, b| a.node.cmp(&b.node));
        peers
    }

    /// Whether a node was told to give its addresses away.
    pub fn is_drained(&self, node: &str) -> bool {
        self.nodes
            .get(&ObjectRef::new(node))
            .is_some_and(|node| node.meta.labels.iter().flatten().any(|(key, _)| key == DRAIN_LABEL))
    }

    /// This node's object in the cluster.
    pub fn own(&self) -> Option<Arc<KubeNode>> {
        self.own.state().into_iter().next()
    }
}

/// A node as its neighbours on the LAN know it.
fn peer(node: &VIPNode) -> Peer {
    let interfaces = || node.status.iter().flat_map(|status| &status.interfaces);
    let addresses = interfaces().flat_map(|interface| &interface.addresses);
    Peer {
        node: node.name_any(),
        addresses: addresses.filter_map(|a| a.parse::<IpNet>().ok()).map(|net| net.addr()).collect(),
        macs: interfaces().filter_map(|interface| parse_mac(&interface.mac)).collect(),
    }
}

/// A hardware address such as `52:54:00:00:00:01`.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect::<Option<_>>()?;
    bytes.try_into().ok()
}

fn reflect<K>(api: Api<K>, config: watcher::Config, changed: &Arc<Notify>) -> Store<K>
where
    K: Resource<DynamicType = ()> + ResourceExt + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let (reader, writer) = reflector::store();
    let changed = changed.clone();
    let kind = K::plural(&()).into_owned();
    let stream = watcher(api, config)
        .backoff(retry())
        .modify(|object| {
            object.managed_fields_mut().clear();
            object.annotations_mut().clear();
        })
        .reflect(writer);
    tokio::spawn(async move {
        let mut stream = std::pin::pin!(stream.into_stream());
        let mut failing = false;
        while let Some(event) = stream.next().await {
            match event {
                Ok(event) => {
                    if failing && !matches!(event, watcher::Event::Init) {
                        failing = false;
                        info!(kind, "the API server answers again");
                    }
                    if !matches!(event, watcher::Event::Init | watcher::Event::InitApply(_)) {
                        changed.notify_one();
                    }
                }
                Err(error) if !failing => {
                    failing = true;
                    warn!(kind, error = %describe(&error), "cannot watch, the last known state stays in force; retrying");
                }
                Err(_) => {}
            }
        }
    });
    reader
}

/// From 0.5 s to 5 s: an API server that is back is used soon, one that struggles is not hammered.
fn retry() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(500))
        .with_max_delay(Duration::from_secs(5))
        .with_factor(2.0)
        .with_jitter()
        .without_max_times()
        .into()
}

/// An error with its causes, in one line.
pub fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// An object of a custom resource that is kept even when it cannot be understood, so that one malformed object does
/// not stop the list that it is in.
#[derive(Clone, Debug)]
struct Lenient<K> {
    meta: ObjectMeta,
    parsed: Result<Arc<K>, String>,
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Lenient<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Named {
            metadata: ObjectMeta,
        }
        let value = serde_json::Value::deserialize(deserializer)?;
        let named = Named::deserialize(&value).map_err(serde::de::Error::custom)?;
        let parsed = serde_json::from_value(value).map(Arc::new).map_err(|error| error.to_string());
        Ok(Self { meta: named.metadata, parsed })
    }
}

impl<K: Resource<DynamicType = ()>> Resource for Lenient<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind((): &()) -> std::borrow::Cow<'_, str> {
        K::kind(&())
    }
    fn group((): &()) -> std::borrow::Cow<'_, str> {
        K::group(&())
    }
    fn version((): &()) -> std::borrow::Cow<'_, str> {
        K::version(&())
    }
    fn plural((): &()) -> std::borrow::Cow<'_, str> {
        K::plural(&())
    }
    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_object_is_kept_with_its_error() {
        let text = r#"[{"metadata":{"name":"10.0.0.1"},"spec":{"address":"10.0.0.1","virtualRouter":300}},
                       {"metadata":{"name":"10.0.0.2"},"spec":{"address":"10.0.0.2","virtualRouter":7}}]"#;
        let list: Vec<Lenient<VirtualIP>> = serde_json::from_str(text).unwrap();
        assert!(list[0].parsed.as_ref().unwrap_err().contains("300"));
        assert_eq!(list[0].name_any(), "10.0.0.1");
        assert_eq!(list[1].parsed.as_ref().unwrap().spec.virtual_router, 7);
    }
}
