//! What the API server says, kept in memory: it stays valid as the last known state while the API server is away.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use backon::ExponentialBuilder;
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Node as KubeNode, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
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
use vip_core::api::{DRAIN_LABEL, ServiceRef, VIPNode, VIPPool, VirtualIP, VirtualIPStatus};
use vip_core::desired::{Backing, Objects};
use vip_core::vrrp::Peers;

use super::trust::Trust;
use super::view::{View, carried, peer, service_of};

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
    news: Arc<News>,
}

/// What is to be read anew.
#[derive(Default)]
struct News {
    signal: Notify,
    touched: Mutex<Touched>,
}

#[derive(Default)]
struct Touched {
    /// Virtual IPs or pools.
    vips: bool,
    /// What the agents say of their nodes, or this node's object.
    nodes: bool,
    /// All Services.
    all: bool,
    services: BTreeSet<ServiceRef>,
    slices: Slices,
    /// What a list has brought so far; the store too has it only when the list has ended.
    listed: Slices,
}

/// Which EndpointSlices there are: the store finds one by its name alone.
#[derive(Default)]
struct Slices {
    of: BTreeMap<ServiceRef, BTreeSet<String>>,
    /// By namespace and name.
    service: BTreeMap<(String, String), ServiceRef>,
}

impl Cluster {
    /// Starts to watch, on tasks of the current runtime that never end.
    pub fn watch(client: &Client, node: &str) -> Self {
        let news = Arc::new(News::default());
        let all = watcher::Config::default();
        let own = watcher::Config::default().fields(&format!("metadata.name={node}"));
        Self {
            vips: reflect(Api::all(client.clone()), all.clone(), &news, |touched, _| touched.vips = true),
            pools: reflect(Api::all(client.clone()), all.clone(), &news, |touched, _| touched.vips = true),
            nodes: reflect(Api::all(client.clone()), all.clone(), &news, |touched, _| touched.nodes = true),
            services: reflect(Api::all(client.clone()), all.clone(), &news, Touched::service),
            slices: reflect(Api::all(client.clone()), all, &news, Touched::slice),
            own: reflect(Api::all(client.clone()), own, &news, |touched, _| touched.nodes = true),
            news,
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

    /// When an agent last wrote of that node.
    pub fn written(&self, node: &str) -> Option<Time> {
        let object = self.nodes.get(&ObjectRef::new(node))?;
        object.parsed.as_ref().ok()?.status.as_ref()?.renew_time.clone()
    }

    /// Waits for a change since the last call.
    pub async fn changed(&self) {
        self.news.signal.notified().await;
    }

    /// Brings a view up to date with what has changed since the last call, as far as it is to be trusted; whether anything of it
    /// is worth remembering.
    pub fn refresh(&self, own: &str, trust: &mut Trust, view: &mut View) -> bool {
        let now = Instant::now();
        let mut touched = self.news.touched();
        touched.services.append(&mut trust.review(now));
        let Touched { vips, nodes, all, services, .. } = &mut *touched;
        let (vips, nodes, all) = (std::mem::take(vips), std::mem::take(nodes), std::mem::take(all));
        let services = std::mem::take(services);
        let mut news = nodes && self.refresh_nodes(own, view);
        if vips {
            news |= self.refresh_vips(&mut view.objects);
        }
        let known = &mut view.objects.services;
        let stale: BTreeSet<ServiceRef> = if vips || all {
            let wanted: BTreeSet<&ServiceRef> =
                view.objects.vips.iter().flat_map(|vip| &vip.spec.services).collect();
            known.retain(|service, _| wanted.contains(service));
            let stale =
                |service: &&ServiceRef| all || services.contains(*service) || !known.contains_key(*service);
            wanted.into_iter().filter(stale).cloned().collect()
        } else {
            services.into_iter().filter(|service| known.contains_key(service)).collect()
        };
        for service in stale {
            let mut said = self.backing(&service, &touched.slices);
            if let Some(before) = known.get(&service) {
                trust.judge(&service, &before.slices, &mut said.slices, now);
            }
            known.insert(service, Arc::new(said));
            news = true;
        }
        news
    }

    /// Whether more has changed than what is of the moment.
    fn refresh_vips(&self, objects: &mut Objects) -> bool {
        let (vips, malformed) = (std::mem::take(&mut objects.vips), std::mem::take(&mut objects.malformed));
        let pools = std::mem::take(&mut objects.pools);
        for vip in self.vips.state() {
            match &vip.parsed {
                Ok(parsed) => objects.vips.push(parsed.clone()),
                Err(error) => objects.malformed.push((vip.name_any(), error.clone())),
            }
        }
        objects.pools = self.pools.state().iter().filter_map(|pool| pool.parsed.clone().ok()).collect();
        // Stores give what they have in any order.
        objects.vips.sort_by_cached_key(|vip| vip.name_any());
        objects.pools.sort_by_cached_key(|pool| pool.name_any());
        let same =
            vips.len() == objects.vips.len() && vips.iter().zip(&objects.vips).all(|(a, b)| is_same(a, b));
        !same || pools != objects.pools || malformed != objects.malformed
    }

    /// Whether more has changed than what is of the moment.
    fn refresh_nodes(&self, own: &str, view: &mut View) -> bool {
        view.nodes = self.nodes.state().iter().filter_map(|node| node.parsed.clone().ok()).collect();
        view.nodes.sort_by_cached_key(|node| node.name_any());
        view.own = self.own.state().into_iter().next();
        let others = || view.nodes.iter().filter(move |node| node.name_any() != own);
        let peers: Peers = others().map(|node| peer(node)).collect();
        let carried: Arc<BTreeMap<_, _>> = Arc::new(others().flat_map(|node| carried(node)).collect());
        let drained =
            view.nodes.iter().any(|node| node.name_any() == own && node.labels().contains_key(DRAIN_LABEL));
        let labels = view.own.as_ref().map(|node| node.labels().clone()).unwrap_or_default();
        let news =
            (&view.peers, &view.carried, &view.labels, view.drained) != (&peers, &carried, &labels, drained);
        if news {
            (view.peers, view.carried, view.labels, view.drained) = (peers, carried, labels, drained);
        }
        news
    }

    fn backing(&self, reference: &ServiceRef, known: &Slices) -> Backing {
        let ServiceRef { namespace, name } = reference;
        let slice = |name: &String| self.slices.get(&ObjectRef::new(name).within(namespace));
        let names = known.of.get(reference).into_iter().flatten();
        Backing {
            service: self.services.get(&ObjectRef::new(name).within(namespace)),
            slices: names.filter_map(slice).collect(),
        }
    }
}

impl News {
    fn touched(&self) -> MutexGuard<'_, Touched> {
        self.touched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Touched {
    fn service(&mut self, event: &watcher::Event<Service>) {
        match event {
            watcher::Event::Init | watcher::Event::InitApply(_) => {}
            // What vanished between two lists is in no event.
            watcher::Event::InitDone => self.all = true,
            watcher::Event::Apply(service) | watcher::Event::Delete(service) => {
                let namespace = service.namespace().unwrap_or_default();
                self.services.insert(ServiceRef { namespace, name: service.name_any() });
            }
        }
    }

    fn slice(&mut self, event: &watcher::Event<EndpointSlice>) {
        match event {
            watcher::Event::Init => self.listed = Slices::default(),
            watcher::Event::InitApply(slice) => {
                self.listed.put(slice, service_of(slice));
            }
            watcher::Event::InitDone => {
                self.slices = std::mem::take(&mut self.listed);
                self.all = true;
            }
            watcher::Event::Apply(slice) => {
                self.services.extend(self.slices.put(slice, service_of(slice)));
            }
            watcher::Event::Delete(slice) => self.services.extend(self.slices.put(slice, None)),
        }
    }
}

impl Slices {
    /// Notes the Service of a slice; returns the Services that this concerns.
    fn put(&mut self, slice: &EndpointSlice, service: Option<ServiceRef>) -> Vec<ServiceRef> {
        let (namespace, name) = (slice.namespace().unwrap_or_default(), slice.name_any());
        let key = (namespace, name.clone());
        let before = match &service {
            Some(service) => self.service.insert(key, service.clone()),
            None => self.service.remove(&key),
        };
        if let Some(before) = before.as_ref().filter(|before| service.as_ref() != Some(before))
            && let Some(names) = self.of.get_mut(before)
        {
            names.remove(&name);
            if names.is_empty() {
                self.of.remove(before);
            }
        }
        if let Some(service) = &service {
            self.of.entry(service.clone()).or_default().insert(name);
        }
        before.into_iter().chain(service).collect()
    }
}

/// Watches one kind; `touch` notes what an event concerns.
fn reflect<K>(
    api: Api<K>,
    config: watcher::Config,
    news: &Arc<News>,
    touch: impl Fn(&mut Touched, &watcher::Event<K>) + Send + 'static,
) -> Store<K>
where
    K: Resource<DynamicType = ()> + ResourceExt + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    let (reader, writer) = reflector::store();
    let news = news.clone();
    let kind = K::plural(&()).into_owned();
    let stream =
        watcher(api, config).backoff(retry()).modify(|object| slim(object.meta_mut())).reflect(writer);
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
                    touch(&mut news.touched(), &event);
                    if !matches!(event, watcher::Event::Init | watcher::Event::InitApply(_)) {
                        news.signal.notify_one();
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

/// Whether two states of a virtual IP are the same, but for its backends: they are known from the endpoints.
fn is_same(a: &Arc<VirtualIP>, b: &Arc<VirtualIP>) -> bool {
    let lasting = |vip: &VirtualIP| {
        let status = vip.status.clone();
        status.map(|status| VirtualIPStatus { destinations: Vec::new(), ..status })
    };
    Arc::ptr_eq(a, b) || (a.name_any() == b.name_any() && a.spec == b.spec && lasting(a) == lasting(b))
}

/// Drops what nobody here reads, which may be most of an object.
fn slim(meta: &mut ObjectMeta) {
    (meta.managed_fields, meta.annotations) = (None, None);
    (meta.owner_references, meta.finalizers) = (None, None);
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

impl<'de, K: DeserializeOwned + Resource> Deserialize<'de> for Lenient<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Named {
            metadata: ObjectMeta,
        }
        let value = serde_json::Value::deserialize(deserializer)?;
        let named = Named::deserialize(&value).map_err(serde::de::Error::custom)?;
        let slimmed = |mut object: K| {
            slim(object.meta_mut());
            Arc::new(object)
        };
        let parsed = serde_json::from_value(value).map(slimmed).map_err(|error| error.to_string());
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

    fn slice(name: &str, service: &str) -> EndpointSlice {
        serde_json::from_value(serde_json::json!({"addressType": "IPv4", "endpoints": [],
            "metadata": {"namespace": "shop", "name": name, "labels": {"kubernetes.io/service-name": service}}}))
        .unwrap()
    }

    #[test]
    fn slices_are_found_by_their_service_also_while_they_are_listed_anew() {
        use watcher::Event;
        let mut touched = Touched::default();
        let known = |touched: &Touched| {
            let of = touched.slices.of.iter();
            of.map(|(service, names)| format!("{service}: {names:?}")).collect::<Vec<_>>().join(" ")
        };
        for event in [Event::Init, Event::InitApply(slice("a", "web")), Event::InitApply(slice("b", "web"))] {
            touched.slice(&event);
            assert_eq!(known(&touched), "");
        }
        touched.slice(&Event::InitDone);
        assert_eq!(known(&touched), r#"shop/web: {"a", "b"}"#);
        // One that changes its Service concerns both.
        touched.slice(&Event::Apply(slice("b", "api")));
        assert_eq!(known(&touched), r#"shop/api: {"b"} shop/web: {"a"}"#);
        assert_eq!(touched.services.len(), 2);
        touched.slice(&Event::Delete(slice("a", "web")));
        assert_eq!(known(&touched), r#"shop/api: {"b"}"#);
        touched.slice(&Event::Init);
        touched.slice(&Event::InitApply(slice("c", "web")));
        assert_eq!(known(&touched), r#"shop/api: {"b"}"#);
        touched.slice(&Event::InitDone);
        assert_eq!(known(&touched), r#"shop/web: {"c"}"#);
    }

    #[test]
    fn numbers_of_connections_are_of_the_moment() {
        let vip = |owner: &str, connections: u32| {
            let to = serde_json::json!({"protocol": "TCP", "port": 80, "to": "10.244.1.2:8080", "weight": 1,
                                        "connections": connections});
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": "10.0.0.1", "resourceVersion": connections.to_string()},
                "spec": {"address": "10.0.0.1", "virtualRouter": 7},
                "status": {"node": owner, "destinations": [to]}}))
            .unwrap()
        };
        assert!(is_same(&vip("node-1", 1), &vip("node-1", 9)));
        assert!(!is_same(&vip("node-1", 1), &vip("node-2", 1)));
    }

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
