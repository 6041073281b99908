//! How kube-proxy runs, as far as the cluster tells: in its ConfigMap, on the command line of its DaemonSet or pods, or in
//! what k3s and RKE2 write to their nodes.

use std::net::IpAddr;

use ipnet::{Ipv4Subnets, Ipv6Subnets};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, PodSpec};
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use serde_json::Value;
use vip_core::pool::{AddressSet, Span};
use vip_core::validate::CheckedPool;

use crate::cluster::{Cluster, permitted};
use crate::codes::Problem;
use crate::codes::cluster::KUBE_PROXY_IPVS;
use crate::exit::Result;

/// Its name, that of its objects, and of their containers.
const NAME: &str = "kube-proxy";
/// Their namespace.
const NAMESPACE: &str = "kube-system";
/// Static pods have one of these labels.
const LABELS: [&str; 2] = ["component=kube-proxy", "k8s-app=kube-proxy"];
/// One would do, but for those that are just ending.
const SOME: u32 = 10;
/// Where k3s and RKE2 write the arguments of a node: a list in JSON.
const NODE_ARGS: [&str; 2] = ["k3s.io/node-args", "rke2.io/node-args"];

/// One place that says how kube-proxy runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubeProxy {
    /// That place.
    place: String,
    /// The command that shows or changes it.
    command: String,
    /// Its mode; empty: its default.
    mode: String,
    /// What it leaves alone in IPVS mode.
    excluded: Vec<String>,
}

/// All places that say how kube-proxy runs; `None` when none does, and its ConfigMap may not be read.
pub async fn read(cluster: &Cluster) -> Result<Option<Vec<KubeProxy>>> {
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    let [by_component, by_app] = LABELS.map(|label| ListParams::default().labels(label).limit(SOME));
    let all = ListParams::default();
    let (map, set, some, others, nodes) = futures::join!(
        maps.get_opt(NAME),
        sets.get_opt(NAME),
        pods.list(&by_component),
        pods.list(&by_app),
        nodes.list_metadata(&all)
    );
    let map = permitted(map)?;
    let is_hidden = map.is_none();
    let set = permitted(set)?.flatten();
    let mut pods = [permitted(some)?, permitted(others)?].into_iter().flatten().flat_map(|list| list.items);
    let pod = pods.find(|pod| pod.metadata.deletion_timestamp.is_none());
    let nodes = permitted(nodes)?.map(|list| list.items).unwrap_or_default();

    let mut found = Vec::new();
    let args = set.as_ref().and_then(|set| arguments(set.spec.as_ref()?.template.spec.as_ref()?));
    let of_pod = pod.as_ref().and_then(|pod| arguments(pod.spec.as_ref()?));
    // With --config it reads the file, and nothing else of what counts here.
    let reads_file = |args: &Vec<String>| args.iter().any(|arg| arg.starts_with("--config"));
    if args.as_ref().or(of_pod.as_ref()).is_none_or(reads_file) {
        found.extend(map.flatten().as_ref().and_then(of_config));
    }
    if let Some(args) = args.filter(|args| !reads_file(args)) {
        let command = format!("kubectl edit daemonset {NAME} -n {NAMESPACE}");
        found.push(of_arguments(format!("DaemonSet {NAME} in namespace {NAMESPACE}"), command, &args));
    } else if let (None, Some(pod), Some(args)) = (&set, &pod, of_pod.filter(|args| !reads_file(args))) {
        let name = pod.name_any();
        let command = format!("kubectl get pod {name} -n {NAMESPACE} -o yaml");
        found.push(of_arguments(format!("pod {name} in namespace {NAMESPACE}"), command, &args));
    }
    for node in &nodes {
        let args = NODE_ARGS.iter().find_map(|key| node.annotations().get(*key));
        let Some(args) = args.and_then(|text| serde_json::from_str::<Vec<String>>(text).ok()) else {
            continue;
        };
        if args.iter().any(|arg| arg.starts_with("--disable-kube-proxy")) {
            continue;
        }
        let name = node.name_any();
        found.push(of_arguments(format!("node {name}"), format!("kubectl describe node {name}"), &args));
    }
    Ok(if found.is_empty() && is_hidden { None } else { Some(found) })
}

/// All words of its container's command line.
fn arguments(pod: &PodSpec) -> Option<Vec<String>> {
    let container = pod.containers.iter().find(|container| container.name == NAME)?;
    let words = container.command.iter().chain(&container.args).flatten();
    Some(words.flat_map(|word| word.split_whitespace()).map(str::to_owned).collect())
}

/// What the configuration that kubeadm writes says.
fn of_config(map: &ConfigMap) -> Option<KubeProxy> {
    let config: Value = serde_saphyr::from_str(map.data.as_ref()?.get("config.conf")?).ok()?;
    let excluded = config["ipvs"]["excludeCIDRs"].as_array().into_iter().flatten();
    Some(KubeProxy {
        place: format!("ConfigMap {NAME} in namespace {NAMESPACE}"),
        command: format!("kubectl edit configmap {NAME} -n {NAMESPACE}"),
        mode: config["mode"].as_str().unwrap_or_default().to_owned(),
        excluded: excluded.filter_map(Value::as_str).map(str::to_owned).collect(),
    })
}

/// What its flags say, also where they are arguments of an argument (`--kube-proxy-arg proxy-mode=ipvs`).
fn of_arguments(place: String, command: String, args: &[String]) -> KubeProxy {
    let value = |flag: &str| {
        args.iter().enumerate().find_map(|(place, arg)| match arg.rsplit_once(flag)? {
            (_, "") => args.get(place + 1).map(String::as_str),
            (_, rest) => rest.strip_prefix('='),
        })
    };
    let list = |text: &str| text.split(',').map(str::to_owned).collect();
    KubeProxy {
        place,
        command,
        mode: value("proxy-mode").unwrap_or_default().to_owned(),
        excluded: value("ipvs-exclude-cidrs").map(list).unwrap_or_default(),
    }
}

/// What is well, in words.
pub fn well(found: &[KubeProxy]) -> String {
    match found.first() {
        None => format!(
            "how kube-proxy runs is not known: {NAMESPACE} has no ConfigMap, DaemonSet or pod of it, as where there is none"
        ),
        Some(one) if one.mode.is_empty() => "kube-proxy does not disturb IPVS (its default mode)".to_owned(),
        Some(one) if one.mode == "ipvs" => "kube-proxy's IPVS mode leaves the pools alone".to_owned(),
        Some(one) => format!("kube-proxy does not disturb IPVS (mode {})", one.mode),
    }
}

/// A kube-proxy that would delete our IPVS services, unless all addresses of the pools are excluded by hand.
pub fn problem(found: &[KubeProxy], pools: &[CheckedPool]) -> Option<Problem> {
    let one = found.iter().find(|one| one.mode == "ipvs" && !one.excludes(pools))?;
    let mut cidrs: Vec<String> = pools.iter().flat_map(cidrs).collect();
    if cidrs.is_empty() {
        cidrs.push("those of the pools".to_owned());
    }
    Some(Problem {
        code: &KUBE_PROXY_IPVS,
        about: NAME.to_owned(),
        message: format!(
            "kube-proxy runs in IPVS mode ({}): it deletes IPVS services it does not know; use its nftables mode, or \
             excludeCIDRs: {}",
            one.place,
            cidrs.join(", ")
        ),
        command: one.command.clone(),
    })
}

impl KubeProxy {
    /// Whether it leaves all of these alone. Before there are pools, any exclusion is taken for one of theirs.
    fn excludes(&self, pools: &[CheckedPool]) -> bool {
        let excluded = AddressSet::parse_whole(&self.excluded).unwrap_or_default();
        !excluded.is_empty() && pools.iter().all(|pool| pool.addresses.minus(&excluded).is_empty())
    }
}

/// The addresses of a pool as CIDRs: as they are written, or as few as make up a range.
fn cidrs(pool: &CheckedPool) -> Vec<String> {
    let of = |text: &str| -> Vec<String> {
        if text.contains('/') {
            return vec![text.to_owned()];
        }
        let set = AddressSet::parse_whole(&[text]).unwrap_or_default();
        set.spans().iter().flat_map(networks).collect()
    };
    pool.text.split(',').flat_map(of).collect()
}

fn networks(span: &Span) -> Vec<String> {
    match (span.first(), span.last()) {
        (IpAddr::V4(first), IpAddr::V4(last)) => {
            Ipv4Subnets::new(first, last, 0).map(|network| network.to_string()).collect()
        }
        (IpAddr::V6(first), IpAddr::V6(last)) => {
            Ipv6Subnets::new(first, last, 0).map(|network| network.to_string()).collect()
        }
        // A span is of one family.
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vip_core::api::VirtualRouterRange;

    use super::*;
    use crate::commands::pool::draft;

    fn config(text: &str) -> Vec<KubeProxy> {
        let map = serde_json::from_value(json!({"data": {"config.conf": text}})).unwrap();
        of_config(&map).into_iter().collect()
    }

    fn pools(ranges: &[&str]) -> Vec<CheckedPool> {
        let ranges: Vec<String> = ranges.iter().map(|range| (*range).to_owned()).collect();
        vec![CheckedPool::new(&draft("lab", &ranges, VirtualRouterRange { first: 1, count: 9 })).unwrap()]
    }

    #[test]
    fn what_the_config_map_says() {
        let lab = pools(&["192.168.10.240/28", "10.0.0.4-10.0.0.9"]);
        let said = |text: &str| problem(&config(text), &lab).map(|problem| problem.message);
        assert_eq!(
            said("kind: KubeProxyConfiguration\nmode: ipvs\n").unwrap(),
            "kube-proxy runs in IPVS mode (ConfigMap kube-proxy in namespace kube-system): it deletes IPVS services it does not \
             know; use its nftables mode, or excludeCIDRs: 192.168.10.240/28, 10.0.0.4/30, 10.0.0.8/31"
        );
        for elsewhere in ["[172.16.0.0/12]", "[192.168.10.240/28]", "[nonsense]"] {
            assert!(said(&format!("mode: ipvs\nipvs:\n  excludeCIDRs: {elsewhere}\n")).is_some());
        }
        for text in [
            "mode: nftables\n",
            "mode: \"\"\n",
            "mode: ipvs\nipvs:\n  excludeCIDRs: [10.0.0.0/8, 192.168.10.0/24]\n",
            ": [",
        ] {
            assert_eq!(said(text), None, "{text}");
        }
        assert!(well(&config("mode: nftables\n")).ends_with("(mode nftables)"));
        assert!(well(&[]).starts_with("how kube-proxy runs is not known"));
        let before = problem(&config("mode: ipvs\n"), &[]).unwrap().message;
        assert!(before.ends_with("excludeCIDRs: those of the pools"), "{before}");
    }

    #[test]
    fn what_command_lines_say() {
        let mode = |args: &[&str]| {
            let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
            let read = of_arguments(String::new(), String::new(), &args);
            (read.mode, read.excluded.join(" "))
        };
        let ipvs = |excluded: &str| ("ipvs".to_owned(), excluded.to_owned());
        assert_eq!(mode(&["kube-proxy", "--proxy-mode=ipvs"]), ipvs(""));
        assert_eq!(
            mode(&["--proxy-mode", "ipvs", "--ipvs-exclude-cidrs=10.0.0.0/8,fd00::/8"]),
            ipvs("10.0.0.0/8 fd00::/8")
        );
        assert_eq!(mode(&["server", "--kube-proxy-arg", "proxy-mode=ipvs"]), ipvs(""));
        assert_eq!(mode(&["agent", "--kube-proxy-arg=proxy-mode=ipvs"]), ipvs(""));
        assert_eq!(mode(&["server"]), (String::new(), String::new()));
    }
}
