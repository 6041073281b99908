//! What the API server says, kept in memory: it stays valid as the last known state while the API server is away.

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use backon::ExponentialBuilder;
use futures::{StreamExt, TryStreamExt};
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

use super::view::{View, peer, service_of};

/// A way to the API server.
pub struct Connection {
    /// The client.
    pub client: Client,
    /// What no other cluster has: the certificates of its authority, or its address where it has none.
    pub cluster: Vec<u8>,
}

/// Connects as the pod's service account, or as a kubeconfig file says.
///
/// # Errors
/// When there is neither a usable service account nor a usable file; an API server that does not answer is no error.
pub async fn connect(kubeconfig: Option<&Path>) -> anyhow::Result<Connection> {
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
    let authority = config.root_cert.as_ref().map(|certificates| certificates.concat());
    let cluster = authority.unwrap_or_else(|| config.cluster_url.to_string().into_bytes());
    Ok(Connection { client: Client::try_from(config).context("API client")?, cluster })
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

    /// What is known now.
    pub fn view(&self, own: &str) -> View {
        let mut view = View::default();
        for vip in self.vips.state() {
            match &vip.parsed {
                Ok(parsed) => view.vips.push(parsed.clone()),
                Err(error) => view.malformed.push((vip.name_any(), error.clone())),
            }
        }
        let wanted = View::wanted(&view.vips);
        let service = |reference: &&ServiceRef| {
            self.services.get(&ObjectRef::new(&reference.name).within(&reference.namespace))
        };
        view.services = wanted.iter().filter_map(service).collect();
        let mut slices = self.slices.state();
        slices.retain(|slice| service_of(slice).is_some_and(|service| wanted.contains(&service)));
        view.slices = slices;
        view.pools = self.pools.state().iter().filter_map(|pool| pool.parsed.clone().ok()).collect();
        view.nodes = self.nodes.state().iter().filter_map(|node| node.parsed.clone().ok()).collect();
        view.own = self.own.state().into_iter().next();
        view.sort();
        view.peers = view.nodes.iter().filter(|node| node.name_any() != own).map(|node| peer(node)).collect();
        view.drained =
            view.nodes.iter().any(|node| node.name_any() == own && node.labels().contains_key(DRAIN_LABEL));
        view.labels = view.own.as_ref().map(|node| node.labels().clone()).unwrap_or_default();
        view
    }
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
