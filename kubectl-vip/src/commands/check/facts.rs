//! What the checks look at, read all at once. `None` is what the user may not read.

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Namespace, Node, Service};
use k8s_openapi::api::networking::v1::{NetworkPolicy, ServiceCIDR};
use kube::api::ListParams;
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use vip_core::api::{DAEMONSET, DEFAULT_NAMESPACE, VIPNode, VIPPool, VirtualIP};

use super::kube_proxy::{self, KubeProxy};
use super::rights::{Lack, agents_lack, missing, user_lacks};
use crate::cluster::{Cluster, permitted, present};
use crate::exit::Result;
use crate::manifests::{self, Settings};

/// What was read.
pub struct Facts {
    /// Whether it is asked what stands in the way of an installation.
    pub pre: bool,
    /// Version of the API server: of all, and in words.
    pub version: (String, String, String),
    /// Namespace of the agents, or where they would be.
    pub namespace: String,
    /// Whether that namespace was named.
    pub named: bool,
    /// That namespace, if it is there.
    pub place: Option<Option<Namespace>>,
    /// What says how kube-proxy runs.
    pub proxy: Option<Vec<KubeProxy>>,
    /// All DaemonSets.
    pub sets: Option<Vec<DaemonSet>>,
    /// Those of the agents.
    pub agents: Option<Vec<DaemonSet>>,
    /// Objects of the installation that are missing; none is missing where nothing is installed.
    pub missing: Option<Vec<String>>,
    /// What the agents may not do; none where nothing is installed.
    pub agents_lack: Option<Vec<Lack>>,
    /// What the user may not do of what an installation takes; none where that is not asked.
    pub user_lacks: Vec<Lack>,
    /// Nodes of the cluster.
    pub nodes: Option<Vec<Node>>,
    /// What the agents say of them.
    pub reports: Option<Vec<VIPNode>>,
    /// Pools.
    pub pools: Option<Vec<VIPPool>>,
    /// Virtual IPs.
    pub vips: Option<Vec<VirtualIP>>,
    /// Services, to know the pods behind them.
    pub services: Option<Vec<Service>>,
    /// Policies that keep traffic from pods.
    pub policies: Option<Vec<NetworkPolicy>>,
    /// The networks of the Services.
    pub cidrs: Vec<ServiceCIDR>,
    /// The moment of the judgement.
    pub now: Timestamp,
}

impl Facts {
    /// Reads everything.
    pub async fn read(cluster: &Cluster, pre: bool) -> Result<Self> {
        let (version, proxy, sets, nodes, services, policies, cidrs) = futures::join!(
            cluster.client.apiserver_version(),
            kube_proxy::read(cluster),
            all::<DaemonSet>(cluster),
            all::<Node>(cluster),
            all::<Service>(cluster),
            all::<NetworkPolicy>(cluster),
            all::<ServiceCIDR>(cluster),
        );
        let (reports, pools, vips) =
            futures::join!(all::<VIPNode>(cluster), all::<VIPPool>(cluster), all::<VirtualIP>(cluster));
        let (version, sets) = (version?, sets?);
        let agents: Option<Vec<DaemonSet>> = sets.as_ref().map(|sets| {
            sets.iter()
                .filter(|set| {
                    let component = set.labels().get("app.kubernetes.io/component");
                    component.is_some_and(|component| component == DAEMONSET)
                })
                .cloned()
                .collect()
        });
        let installed = agents.iter().flatten().find_map(ResourceExt::namespace);
        let named = cluster.namespace_named;
        let namespace = match (named, &installed) {
            (true, _) => cluster.namespace.clone(),
            (false, Some(installed)) => installed.clone(),
            (false, None) => DEFAULT_NAMESPACE.to_owned(),
        };
        let settings = Settings { namespace: Some(namespace.clone()), ..Settings::default() };
        let objects = manifests::render(&settings)?;
        let is_installed = installed.is_some();
        let places: Api<Namespace> = Api::all(cluster.client.clone());
        let (place, missing, agents_lack, user_lacks) = futures::join!(
            places.get_opt(&namespace),
            missing(cluster, &objects, is_installed),
            agents_lack(cluster, &objects, &namespace, is_installed),
            user_lacks(cluster, &objects, pre),
        );
        let mut vips = vips?;
        if let Some(vips) = &mut vips {
            vips.sort_by_key(|vip| vip.spec.address.parse::<std::net::IpAddr>().ok());
        }
        Ok(Self {
            pre,
            version: (version.major, version.minor, version.git_version),
            namespace,
            named,
            place: permitted(place)?,
            proxy: proxy?,
            sets,
            agents,
            missing: missing?,
            agents_lack: agents_lack?,
            user_lacks: user_lacks?,
            nodes: nodes?,
            reports: reports?,
            pools: pools?,
            vips,
            services: services?,
            policies: policies?,
            cidrs: cidrs?.unwrap_or_default(),
            now: Timestamp::now(),
        })
    }
}

/// All objects of a kind, in all namespaces; none where the API server does not know it.
async fn all<K>(cluster: &Cluster) -> Result<Option<Vec<K>>>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
{
    let api: Api<K> = Api::all(cluster.client.clone());
    match api.list(&ListParams::default()).await {
        Err(kube::Error::Api(status)) if status.is_forbidden() => Ok(None),
        answer => Ok(Some(present(answer)?.map(|list| list.items).unwrap_or_default())),
    }
}
