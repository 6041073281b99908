//! `node list`: the nodes with an agent, and the addresses that each owns.

pub mod drain;

use jiff::Timestamp;
use kube::ResourceExt;
use serde_json::json;
use vip_core::api::{InterfaceStatus, VIPNode, VIPNodeStatus, VirtualIP, VrrpState};

use crate::cli::List;
use crate::cluster::{Cluster, silence, title_of};
use crate::exit::Result;
use crate::output::{self, Form, NONE, Table};

/// Runs the command.
pub async fn list(cluster: &Cluster, args: &List) -> Result<()> {
    let (nodes, vips) = futures::join!(cluster.list_nodes(), cluster.list_vips());
    // Here the nodes are what was asked for: a refusal is the answer.
    let mut nodes = match nodes? {
        Some(nodes) => nodes,
        None => cluster.nodes().list(&Default::default()).await?.items,
    };
    // Without the virtual IPs the table lacks a column, no more.
    let vips = vips.unwrap_or_default();
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
            output::print(&table(&nodes, &vips, wide, Timestamp::now()).render(args.no_headers));
        }
    }
    Ok(())
}

fn table(nodes: &[VIPNode], vips: &[VirtualIP], wide: bool, now: Timestamp) -> Table {
    let mut headers = vec!["NODE", "READY", "VERSION", "INTERFACE", "ADDRESS", "MASTER-OF", "LAST-SEEN"];
    if wide {
        headers.extend(["PEERS", "REASON", "MESSAGE"]);
    }
    let mut table = Table::new(&headers);
    for node in nodes {
        let status = node.status.clone().unwrap_or_default();
        let silent = silence(node, now);
        let ready = match silent {
            Some(_) => "Unknown",
            None if status.dataplane.ready => "True",
            None => "False",
        };
        let interface = interface(&status);
        let owned = match silent {
            Some(_) => output::UNKNOWN.to_owned(),
            None => owned(&status, vips).join(","),
        };
        let seen = status
            .renew_time
            .as_ref()
            .map_or_else(|| NONE.to_owned(), |time| format!("{} ago", output::age(time.0, now)));
        let version = status.agent_version.trim_start_matches('v');
        let mut row = vec![
            node.name_any(),
            ready.to_owned(),
            if version.is_empty() { String::new() } else { format!("v{version}") },
            interface.map(|i| i.name.clone()).unwrap_or_default(),
            interface.map(|i| i.addresses.join(",")).unwrap_or_default(),
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

/// The interface on which the node competes; before it does, the first that could.
fn interface(status: &VIPNodeStatus) -> Option<&InterfaceStatus> {
    let elects =
        |interface: &&InterfaceStatus| status.virtual_routers.iter().any(|r| r.interface == interface.name);
    status
        .interfaces
        .iter()
        .find(elects)
        .or_else(|| status.interfaces.iter().find(|i| i.carrier && !i.addresses.is_empty()))
}

/// The addresses whose virtual routers the node is master of.
pub fn owned(status: &VIPNodeStatus, vips: &[VirtualIP]) -> Vec<String> {
    let is_master = |vip: &VirtualIP| {
        let family = if vip.spec.address.contains(':') { 6 } else { 4 };
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
        let node = |name: &str, renewed: &str, state: &str| -> VIPNode {
            serde_json::from_value(json!({
                "metadata": {"name": name},
                "status": {
                    "renewTime": renewed, "agentVersion": "0.1.0", "dataplane": {"ready": true},
                    "interfaces": [
                        {"name": "eth0", "mac": "m", "addresses": ["10.0.2.15/24"], "carrier": true},
                        {"name": "eth1", "mac": "m", "addresses": ["192.168.10.11/24"], "carrier": true},
                    ],
                    "virtualRouters": [{"interface": "eth1", "family": 4, "virtualRouter": 100, "state": state,
                                        "priority": 254, "since": "2026-01-01T00:00:00Z"}],
                },
            }))
            .unwrap()
        };
        let vip: VirtualIP = serde_json::from_value(json!({
            "metadata": {"name": "192.168.10.241"}, "spec": {"address": "192.168.10.241", "virtualRouter": 100},
        }))
        .unwrap();
        let nodes = [
            node("node-1", "2026-01-01T00:00:58Z", "Master"),
            node("node-2", "2026-01-01T00:00:50Z", "Backup"),
            node("node-3", "2026-01-01T00:00:00Z", "Master"),
        ];
        assert_eq!(
            table(&nodes, &[vip], false, now).render(false),
            "NODE     READY     VERSION   INTERFACE   ADDRESS            MASTER-OF        LAST-SEEN\n\
             node-1   True      v0.1.0    eth1        192.168.10.11/24   192.168.10.241   2s ago\n\
             node-2   True      v0.1.0    eth1        192.168.10.11/24   <none>           10s ago\n\
             node-3   Unknown   v0.1.0    eth1        192.168.10.11/24   <unknown>        60s ago\n"
        );
    }
}
