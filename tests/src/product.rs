//! The product itself: how it is built, and what tests and the demo ask of it in a running lab: who owns an address, what the
//! kernels hold, what is left.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{
    command, image,
    lab::{Lab, Node, Parts},
};

/// How long answers to one ARP request are collected.
const ARP: Duration = Duration::from_millis(300);

/// A node that answers for an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its name.
    pub node: String,
    /// Its number.
    pub number: u8,
}

/// Builds the plugin, the agent and its image.
pub fn build() -> Result<()> {
    build_programs()?;
    image::build_product().map(drop)
}

/// The programs that tests start: the plugin and the agent.
pub fn build_programs() -> Result<()> {
    let mut cargo = command::cargo();
    cargo.args(["build", "--quiet", "--package", "vip-node", "--package", "kubectl-vip"]);
    let status = cargo.status().context("can't start cargo")?;
    if !status.success() {
        bail!("the programs do not build");
    }
    Ok(())
}

/// The address that a Service was given: an [`IpAddr`], or one of the family that the caller expects.
pub fn address_of<A: FromStr>(lab: &Lab, namespace: &str, service: &str) -> Result<A> {
    let vips: Value = serde_json::from_str(&lab.kubectl(["get", "virtualips", "-o", "json"])?.ok()?.stdout)?;
    let items = vips["items"].as_array().context("no list of virtual IPs")?;
    let named = |vip: &&Value| {
        let services = vip["spec"]["services"].as_array();
        services
            .is_some_and(|all| all.iter().any(|one| one["namespace"] == namespace && one["name"] == service))
    };
    let mut addresses = items.iter().filter(named).filter_map(|vip| vip["spec"]["address"].as_str());
    addresses
        .find_map(|address| address.parse().ok())
        .with_context(|| format!("service {namespace}/{service} has no such virtual IP"))
}

/// The nodes that answer ARP for an address at this moment.
pub fn owners(lab: &Lab, vip: Ipv4Addr) -> Result<Vec<Owner>> {
    let macs = lab.arp_owner(vip, ARP)?;
    macs.iter()
        .map(|mac| {
            let number =
                lab.node_of_mac(mac).with_context(|| format!("{mac} answers for {vip} and is no node"))?;
            Ok(Owner { node: format!("node-{number}"), number })
        })
        .collect()
}

/// Waits until exactly one node answers for an address.
pub fn wait_owner(lab: &Lab, vip: Ipv4Addr, limit: Duration) -> Result<Owner> {
    command::until(&format!("one owner of {vip}"), limit, || match owners(lab, vip)?.as_slice() {
        [one] => Ok(Some(one.clone())),
        all => bail!("{} nodes answer", all.len()),
    })
}

/// Waits until exactly one node answers for an address, and another than this.
pub fn wait_other_owner(lab: &Lab, vip: Ipv4Addr, than: u8, limit: Duration) -> Result<Owner> {
    command::until(&format!("another owner of {vip}"), limit, || match owners(lab, vip)?.as_slice() {
        [one] if one.number != than => Ok(Some(one.clone())),
        all => bail!("answering: {all:?}"),
    })
}

/// Waits until exactly one node's kernel has the address and clients on the LAN find the same node, three times in a row.
pub fn wait_one_owner(lab: &Lab, vip: impl Into<IpAddr>, limit: Duration) -> Result<Owner> {
    match vip.into() {
        IpAddr::V4(vip) => wait_one_answering(lab, vip, limit),
        IpAddr::V6(vip) => wait_one_neighbour(lab, vip, limit),
    }
}

/// Over IPv4: the node that answers ARP.
fn wait_one_answering(lab: &Lab, vip: Ipv4Addr, limit: Duration) -> Result<Owner> {
    let mut last: Option<(Owner, u8)> = None;
    command::until(&format!("one owner of {vip} in every kernel"), limit, || {
        let bound: Vec<u8> = bound_on(lab, vip)?;
        let answering = owners(lab, vip)?;
        let ([number], [owner]) = (bound.as_slice(), answering.as_slice()) else {
            last = None;
            bail!("bound on nodes {bound:?}, answering: {answering:?}");
        };
        ensure!(*number == owner.number, "bound on node {number}, answered by {}", owner.node);
        let count = last.as_ref().filter(|(last, _)| last == owner).map_or(1, |(_, count)| count + 1);
        last = Some((owner.clone(), count));
        ensure!(count >= 3, "{} has been seen {count} times in a row", owner.node);
        Ok(Some(owner.clone()))
    })
}

/// The numbers of the nodes whose kernel has the address.
fn bound_on(lab: &Lab, vip: impl Into<IpAddr>) -> Result<Vec<u8>> {
    let vip = vip.into();
    let bound = lab.each_node(|node| {
        let addresses = node.exec("ip -oneline address show")?.ok()?;
        Ok(addresses.stdout.contains(&format!(" {vip}/")).then_some(node.number()))
    })?;
    Ok(bound.into_iter().flatten().collect())
}

/// Over IPv6, where nobody is asked by ARP: the node whose MAC address a client on the LAN has learnt.
fn wait_one_neighbour(lab: &Lab, vip: Ipv6Addr, limit: Duration) -> Result<Owner> {
    let mut last = (0, 0);
    command::until(&format!("one owner of {vip}"), limit, || {
        // Makes the client ask who has the address, unless it knows.
        let _ = lab.client().limit(ARP).get(&format!("http://[{vip}]/"));
        let known = lab.netns().ip(&format!("-6 neighbour show {vip}"))?.ok()?.stdout;
        let bound = bound_on(lab, vip)?;
        let [number] = bound[..] else { bail!("bound on nodes {bound:?}") };
        let mac = lab.node(number).mac();
        ensure!(known.contains(&mac), "bound on node {number} ({mac}), the client knows {known:?}");
        last = (number, if last.0 == number { last.1 + 1 } else { 1 });
        ensure!(last.1 >= 3, "node-{number} has been seen {} times in a row", last.1);
        Ok(Some(Owner { node: format!("node-{number}"), number }))
    })
}

/// Waits until the status of a virtual IP names a node as its owner.
pub fn wait_status_owner(lab: &Lab, vip: impl Into<IpAddr>, node: &str, limit: Duration) -> Result<()> {
    let vip = vip.into();
    command::until(&format!("status.node of {vip} to be {node}"), limit, || {
        let found = field(lab, vip, "{.status.node}")?;
        if found != node {
            bail!("it is {found:?}");
        }
        Ok(Some(()))
    })
}

/// Waits until a condition of a virtual IP is as said, as `True Active`; gives its message.
pub fn wait_condition(
    lab: &Lab,
    vip: impl Into<IpAddr>,
    kind: &str,
    wanted: &str,
    limit: Duration,
) -> Result<String> {
    let vip = vip.into();
    let condition = format!(".status.conditions[?(@.type==\"{kind}\")]");
    let path = format!("{{{condition}.status}} {{{condition}.reason}}\n{{{condition}.message}}");
    command::until(&format!("{kind} of {vip} to be {wanted}"), limit, || {
        let found = field(lab, vip, &path)?;
        let (head, message) = found.split_once('\n').unwrap_or((&found, ""));
        ensure!(head == wanted, "it is {head:?}: {message}");
        Ok(Some(message.to_owned()))
    })
}

/// A lab for as long as the work takes. When the work fails in a cluster, the agents' logs are kept beside the others.
pub fn in_lab<T>(name: &str, parts: Parts, work: impl FnOnce(&Lab) -> Result<T>) -> Result<T> {
    let lab = Lab::up(name, parts)?;
    let result = work(&lab);
    if result.is_err() && parts == Parts::Cluster {
        collect_logs(&lab);
    }
    lab.down()?;
    result
}

/// Waits until every pod of the product runs its newest version and is ready.
pub fn wait_rollout(lab: &Lab) -> Result<()> {
    let status = ["rollout", "status", "-n", "kubectl-vip", "daemonset/vip-node", "--timeout=280s"];
    lab.kubectl_for(Duration::from_secs(290), status)?.ok().map(drop)
}

/// Waits until the status of a virtual IP counts that many backends, all ready.
pub fn wait_backends(lab: &Lab, vip: impl Into<IpAddr>, count: u32, limit: Duration) -> Result<()> {
    let vip = vip.into();
    let wanted = format!("{count}/{count}");
    command::until(&format!("{wanted} backends of {vip}"), limit, || {
        let found = field(lab, vip, "{.status.backends.ready}/{.status.backends.total}")?;
        if found != wanted {
            bail!("there are {found}");
        }
        Ok(Some(()))
    })
}

/// The name of the object for a virtual IP: IPv6 as eight groups joined by `-`.
fn name_of(vip: IpAddr) -> String {
    match vip {
        IpAddr::V4(vip) => vip.to_string(),
        IpAddr::V6(vip) => vip.segments().map(|group| format!("{group:x}")).join("-"),
    }
}

/// Whether a virtual IP's owner has lost it unasked, as one does that stood still with the whole machine for longer than the others wait.
pub fn was_lost(lab: &Lab, vip: impl Into<IpAddr>) -> Result<bool> {
    let reason = field(lab, vip, "{.status.lastHandover.reason}")?;
    Ok(["OwnerSilent", "OwnerLeft", "HigherPriority"].contains(&reason.as_str()))
}

/// A field of a virtual IP by JSONPath.
pub fn field(lab: &Lab, vip: impl Into<IpAddr>, path: &str) -> Result<String> {
    let output = format!("jsonpath={path}");
    Ok(lab.kubectl(["get", "virtualip", &name_of(vip.into()), "-o", &output])?.ok()?.text().to_owned())
}

/// What a node's kernel has for an address: by transport, port and settings, as `TCP :80 wlc`, the destinations, all of them
/// by masquerading, and their weights.
pub fn table(node: &Node<'_>, vip: impl Into<IpAddr>) -> Result<BTreeMap<String, BTreeMap<String, u32>>> {
    let vip = vip.into();
    let text = node.exec("ipvsadm -Ln")?.ok()?.stdout;
    let mut found: BTreeMap<String, BTreeMap<String, u32>> = BTreeMap::new();
    let mut service = None;
    for line in text.lines().skip_while(|line| !line.contains("RemoteAddress")).skip(1) {
        match line.split_whitespace().collect::<Vec<_>>().as_slice() {
            ["->", destination, forwarding, weight, ..] => {
                if let Some(service) = &service {
                    ensure!(*forwarding == "Masq", "{destination} of {vip} is reached by {forwarding}");
                    let weight = weight.parse()?;
                    found
                        .entry(String::clone(service))
                        .or_default()
                        .insert((*destination).to_owned(), weight);
                }
            }
            [transport, at, settings @ ..] => {
                // Not so for a service by firewall mark, which is none of ours.
                let at = at.parse::<SocketAddr>().ok().filter(|at| at.ip() == vip);
                service =
                    at.map(|at| [&[*transport, &format!(":{}", at.port())], settings].concat().join(" "));
                if let Some(service) = &service {
                    found.entry(service.clone()).or_default();
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

/// The destinations and weights that a node's kernel has for a TCP port of an address.
pub fn destinations(node: &Node<'_>, vip: impl Into<IpAddr>, port: u16) -> Result<BTreeMap<String, u32>> {
    let head = format!("TCP :{port} ");
    let found = table(node, vip)?.into_iter().find(|(service, _)| service.starts_with(&head));
    Ok(found.map(|(_, destinations)| destinations).unwrap_or_default())
}

/// Waits until every node's kernel has that many destinations for a TCP port of an address: the owner's status does not
/// speak for those that may have to take over.
pub fn wait_destinations(
    lab: &Lab,
    vip: impl Into<IpAddr>,
    port: u16,
    count: usize,
    limit: Duration,
) -> Result<()> {
    let vip = vip.into();
    let at = SocketAddr::new(vip, port);
    command::until(&format!("{count} destinations of {at} on every node"), limit, || {
        let found = lab.each_node(|node| Ok(destinations(&node, vip, port)?.len()))?;
        ensure!(found.iter().all(|found| *found == count), "they have {found:?}");
        Ok(Some(()))
    })
}

/// What is left of the product on a node: addresses, IPVS services, nftables tables.
pub fn leftovers(node: &Node<'_>) -> Result<Vec<String>> {
    // The addresses of the tests' pools, as `ip` and `ipvsadm` print them.
    const POOLS: [&str; 3] = [" 10.87.2.", " fd87::2:", " [fd87::2:"];
    let mut left = Vec::new();
    for (command, marks) in [
        ("ip -oneline address show", &POOLS[..]),
        ("ipvsadm -Ln", &POOLS),
        ("nft list tables", &["kubectl-vip"]),
    ] {
        let found = node.exec(command)?.ok()?.stdout;
        let ours = found.lines().filter(|line| marks.iter().any(|mark| line.contains(mark)));
        left.extend(ours.map(|line| line.trim().to_owned()));
    }
    Ok(left)
}

/// What is left of the product in the cluster, by kind and name.
pub fn cluster_leftovers(lab: &Lab) -> Result<BTreeSet<String>> {
    let kinds = "crd,clusterrole,clusterrolebinding,validatingadmissionpolicy,validatingadmissionpolicybinding,namespace";
    let names = lab.kubectl(["get", kinds, "-o", "name"])?.ok()?.stdout;
    Ok(names
        .lines()
        .filter(|name| name.contains("kubectl-vip") || name.contains("vip-node"))
        .map(str::to_owned)
        .collect())
}

/// A kubeconfig with the token that the agent's pod on a node has: it is bound to a pod there.
pub fn agent_kubeconfig(lab: &Lab, node: &str) -> Result<Value> {
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": node, "namespace": "kubectl-vip"},
        "spec": {
            "nodeName": node,
            "serviceAccountName": "vip-node",
            // No kubelet says that the node lives.
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "agent", "image": "none", "imagePullPolicy": "Never"}],
        },
    });
    lab.kubectl(["delete", "pod", node, "-n", "kubectl-vip", "--ignore-not-found", "--force"])?.ok()?;
    lab.apply(&pod.to_string())?;
    let create = "create token vip-node -n kubectl-vip --bound-object-kind Pod --bound-object-name";
    let token = lab.kubectl(create.split(' ').chain([node]))?.ok()?;
    let config = lab.kubectl(["config", "view", "--raw", "--minify", "-o", "json"])?.ok()?;
    let mut config: Value = serde_json::from_str(&config.stdout)?;
    // A certificate would go before the token.
    let user = config["users"][0]["name"].clone();
    config["users"] = json!([{"name": user, "user": {"token": token.text()}}]);
    Ok(config)
}

/// Writes the agents' logs beside the others. For when something went wrong, so nothing here is an error.
pub fn collect_logs(lab: &Lab) {
    let Ok(pods) = lab.kubectl(["get", "pods", "-n", "kubectl-vip", "-o", "name"]) else { return };
    for pod in pods.stdout.lines() {
        for container in ["vrrp", "agent"] {
            if let Ok(log) = lab.kubectl(["logs", "-n", "kubectl-vip", pod, "-c", container]) {
                let name = format!("{}-{container}.log", pod.replace('/', "-"));
                let _ = fs::write(lab.logs_dir().join(name), log.stdout + &log.stderr);
            }
        }
    }
}
