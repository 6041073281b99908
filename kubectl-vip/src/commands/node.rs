//! `node list`: the nodes with an agent, whether they can serve, and the addresses that each owns.

pub mod drain;

use ipnet::IpNet;
use jiff::Timestamp;
use kube::ResourceExt;
use serde_json::json;
use vip_core::api::{InterfaceStatus, VIPNode, VIPNodeStatus, VirtualIP, VrrpState};
use vip_core::validate::{CheckedPool, check_pools};

use crate::cli::List;
use crate::cluster::{Cluster, family, silence, title_of};
use crate::exit::Result;
use crate::fitness::is_drained;
use crate::output::{self, Form, NONE, Table};

/// So many addresses of a node stand in the table; the others are counted.
const SHOWN: usize = 3;

/// Runs the command.
pub async fn list(cluster: &Cluster, args: &List) -> Result<()> {
    let (nodes, vips, pools) =
        futures::join!(cluster.list_nodes(), cluster.list_vips(), cluster.list_pools());
    // Here the nodes are what was asked for: a refusal is the answer.
    let mut nodes = match nodes? {
        Some(nodes) => nodes,
        None => cluster.nodes().list(&Default::default()).await?.items,
    };
    // Without virtual IPs or pools the table lacks a column, no more.
    let (vips, pools) = (vips.unwrap_or_default(), check_pools(&pools.unwrap_or_default()).0);
    nodes.sort_by_key(ResourceExt::name_any);
    match Form::from(args.output) {
        Form::Names => {
            nodes.iter().for_each(|node| output::line(title_of::<VIPNode>(&node.name_any())));
        }
        Form::Document(document) => {
            for node in &mut nodes {
                node.metadata.managed_fields = None;
            }
            let list = json!({
                "apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VIPNodeList", "metadata": {}, "items": nodes,
            });
            output::document(&list, document)?;
        }
        Form::Table { .. } if nodes.is_empty() => output::say("No vip-node has reported to the cluster."),
        Form::Table { wide } => {
            output::print(&table(&nodes, &vips, &pools, wide, Timestamp::now()).render(args.no_headers));
        }
    }
    Ok(())
}

fn table(nodes: &[VIPNode], vips: &[VirtualIP], pools: &[CheckedPool], wide: bool, now: Timestamp) -> Table {
    let mut headers =
        vec!["NODE", "STATUS", "VERSION", "INTERFACE", "ADDRESS", "OWNS", "VIRTUAL-IPS", "LAST-SEEN"];
    if wide {
        headers.extend(["PEERS", "REASON", "MESSAGE"]);
    }
    let mut table = Table::new(&headers);
    for node in nodes {
        let status = node.status.clone().unwrap_or_default();
        let silent = silence(node, now);
        let mut word = match silent {
            Some(seconds) => format!("Unknown ({})", output::span(seconds)),
            None if status.dataplane.ready => "Ready".to_owned(),
            None => "NotReady".to_owned(),
        };
        if is_drained(node) {
            word.push_str(",Drained");
        }
        let (interfaces, addresses) = lan(&status, pools);
        let (count, owned) = match silent {
            Some(_) => (output::UNKNOWN.to_owned(), output::UNKNOWN.to_owned()),
            None => {
                let owned = owned(&status, vips);
                (owned.len().to_string(), abridged(&owned, if wide { owned.len() } else { SHOWN }))
            }
        };
        let seen = status
            .renew_time
            .as_ref()
            .map_or_else(|| NONE.to_owned(), |time| format!("{} ago", output::age(time.0, now)));
        let version = status.agent_version.trim_start_matches('v');
        let mut row = vec![
            node.name_any(),
            word,
            if version.is_empty() { String::new() } else { format!("v{version}") },
            interfaces,
            addresses,
            count,
            owned,
            seen,
        ];
        if wide {
            row.extend([
                status.peers.len().to_string(),
                status.dataplane.reason.map(|reason| reason.to_string()).unwrap_or_default(),
                status.dataplane.message.unwrap_or_default(),
            ]);
        }
        table.row(row);
    }
    table
}

/// The first few of a list, as kubectl shortens endpoints: `a,b,c + 2 more...`.
fn abridged(list: &[String], most: usize) -> String {
    match list.get(most..) {
        Some(rest) if !rest.is_empty() => format!("{} + {} more...", list[..most].join(","), rest.len()),
        _ => list.join(","),
    }
}

/// The interfaces on which the node could own addresses of the pools, or does, and its own addresses there.
fn lan(status: &VIPNodeStatus, pools: &[CheckedPool]) -> (String, String) {
    let (mut names, mut addresses) = (Vec::new(), Vec::new());
    for interface in &status.interfaces {
        let of_pools = interface.addresses.iter().filter(|address| is_lan(interface, address, pools));
        let mut here: Vec<&str> = of_pools.map(String::as_str).collect();
        if here.is_empty() && status.virtual_routers.iter().any(|r| r.interface == interface.name) {
            here = interface.addresses.iter().map(String::as_str).collect();
        }
        if !here.is_empty() {
            names.push(interface.name.as_str());
            addresses.extend(here);
        }
    }
    (names.join(","), addresses.join(","))
}

/// Whether addresses of a pool are in the subnet of this address of an interface.
fn is_lan(interface: &InterfaceStatus, address: &str, pools: &[CheckedPool]) -> bool {
    let Ok(network) = address.parse::<IpNet>() else { return false };
    pools
        .iter()
        .filter(|pool| pool.interface.as_ref().is_none_or(|name| *name == interface.name))
        .flat_map(|pool| pool.addresses.spans())
        .any(|span| network.contains(&span.first()) || network.contains(&span.last()))
}

/// The addresses whose virtual routers the node is master of.
pub fn owned(status: &VIPNodeStatus, vips: &[VirtualIP]) -> Vec<String> {
    let is_master = |vip: &VirtualIP| {
        let family = family(vip);
        status.virtual_routers.iter().any(|router| {
            router.state == VrrpState::Master
                && router.virtual_router == vip.spec.virtual_router
                && router.family == family
        })
    };
    vips.iter().filter(|vip| is_master(vip)).map(|vip| vip.spec.address.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_of_each_node() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let node = |name: &str, renewed: &str, state: &str, labels: serde_json::Value| -> VIPNode {
            serde_json::from_value(json!({
                "metadata": {"name": name, "labels": labels},
                "status": {
                    "renewTime": renewed, "agentVersion": "0.1.0", "dataplane": {"ready": true},
                    "interfaces": [
                        {"name": "cni0", "mac": "m", "addresses": ["10.244.0.1/24"], "carrier": true},
                        {"name": "eth1", "mac": "m", "addresses": ["192.168.10.11/24"], "carrier": true},
                    ],
                    "virtualRouters": [{"interface": "eth1", "family": 4, "virtualRouter": 100, "state": state,
                                        "priority": 254, "since": "2026-01-01T00:00:00Z"}],
                },
            }))
            .unwrap()
        };
        let vip = |last: u8| -> VirtualIP {
            let address = format!("192.168.10.{last}");
            serde_json::from_value(json!({
                "metadata": {"name": address}, "spec": {"address": address, "virtualRouter": 100},
            }))
            .unwrap()
        };
        let vips: Vec<VirtualIP> = (241..=244).map(vip).collect();
        let nodes = [
            node("node-1", "2026-01-01T00:00:58Z", "Master", json!({})),
            node("node-2", "2026-01-01T00:00:50Z", "Backup", json!({"kubectl-vip.io/drain": "true"})),
            node("node-3", "2026-01-01T00:00:00Z", "Master", json!({})),
        ];
        let pool = crate::commands::pool::draft(
            "lab",
            &["192.168.10.240/28".to_owned()],
            vip_core::api::VirtualRouterRange { first: 100, count: 64 },
        );
        let pools = [CheckedPool::new(&pool).unwrap()];
        assert_eq!(
            table(&nodes, &vips, &pools, false, now).render(false),
            "NODE     STATUS          VERSION   INTERFACE   ADDRESS            OWNS        VIRTUAL-IPS                                                LAST-SEEN\n\
             node-1   Ready           v0.1.0    eth1        192.168.10.11/24   4           192.168.10.241,192.168.10.242,192.168.10.243 + 1 more...   2s ago\n\
             node-2   Ready,Drained   v0.1.0    eth1        192.168.10.11/24   0           <none>                                                     10s ago\n\
             node-3   Unknown (60s)   v0.1.0    eth1        192.168.10.11/24   <unknown>   <unknown>                                                  60s ago\n"
        );
        let wide = table(&nodes, &vips, &pools, true, now).render(true);
        assert!(wide.contains("192.168.10.243,192.168.10.244"), "{wide}");
        let without = table(&nodes[..1], &[], &[], false, now).render(true);
        assert!(
            without.contains("v0.1.0   eth1"),
            "where it competes is its LAN, whatever the pools: {without}"
        );
    }
}
