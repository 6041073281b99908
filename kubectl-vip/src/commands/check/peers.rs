//! Who hears whom, from what the agents heard of each other.
//!
//! Only the master of a virtual router speaks (RFC 9568, section 6.4.3), and all others that take part in it on the same
//! LAN must hear it. Who speaks for none cannot be heard, and nothing is said about that.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use jiff::Timestamp;
use kube::ResourceExt;
use serde::Serialize;
use vip_core::api::{VIPNode, VIPNodeStatus, VirtualRouterStatus, VrrpState};

use crate::cluster::silence;
use crate::codes::{Problem, network as codes};

/// A master must have spoken for so long (seconds) before its silence means something: reports are renewed every 10 s.
const SETTLED: i64 = 15;

/// What a node has heard of the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// The node that listens.
    pub node: String,
    /// For each other node that speaks to it, whether it is heard.
    pub hears: BTreeMap<String, bool>,
}

/// A row for each node that reports.
pub fn matrix(reports: &[VIPNode], now: Timestamp) -> Vec<Row> {
    let known: Vec<(String, &VIPNodeStatus)> = reports
        .iter()
        .filter(|node| silence(node, now).is_none())
        .filter_map(|node| Some((node.name_any(), node.status.as_ref()?)))
        .collect();
    let row = |(listener, listening): &(String, &VIPNodeStatus)| {
        let others = known.iter().filter(|(speaker, _)| speaker != listener);
        let hears = others
            .filter_map(|(speaker, speaking)| Some((speaker.clone(), heard(listening, speaker, speaking)?)));
        Row { node: listener.clone(), hears: hears.collect() }
    };
    let mut rows: Vec<Row> = known.iter().map(row).collect();
    rows.sort_by(|a, b| a.node.cmp(&b.node));
    rows
}

/// Whether all that one node says to another arrives; `None` when it says nothing to it.
fn heard(listening: &VIPNodeStatus, speaker: &str, speaking: &VIPNodeStatus) -> Option<bool> {
    let reported = listening.renew_time.as_ref()?.0.as_second();
    let settled = |router: &VirtualRouterStatus| router.since.0.as_second() + SETTLED < reported;
    let masters = speaking.virtual_routers.iter().filter(|r| r.state == VrrpState::Master && settled(r));
    let mut verdict = None;
    for router in masters {
        let is_same = |mine: &&VirtualRouterStatus| {
            (mine.virtual_router, mine.family) == (router.virtual_router, router.family)
                && settled(mine)
                && is_one_lan((listening, &mine.interface), (speaking, &router.interface), router.family)
        };
        let Some(mine) = listening.virtual_routers.iter().find(is_same) else { continue };
        let arrives = listening.peers.iter().any(|peer| {
            peer.virtual_router == router.virtual_router
                && peer.interface == mine.interface
                && (peer.node.as_deref() == Some(speaker) || has_address(speaking, &peer.address))
        });
        verdict = Some(verdict.unwrap_or(true) && arrives);
    }
    verdict
}

/// Whether two interfaces have a subnet in common. Each LAN has link-local addresses: they say nothing.
fn is_one_lan(one: (&VIPNodeStatus, &str), other: (&VIPNodeStatus, &str), family: u8) -> bool {
    let networks = |(status, interface): (&VIPNodeStatus, &str)| -> Vec<IpNet> {
        let addresses = status.interfaces.iter().filter(|i| i.name == interface).flat_map(|i| &i.addresses);
        let parsed = addresses.filter_map(|address| address.parse::<IpNet>().ok());
        let is_lan = |net: &IpNet| match net.addr() {
            IpAddr::V4(_) => family == 4,
            IpAddr::V6(address) => family == 6 && !address.is_unicast_link_local(),
        };
        parsed.filter(is_lan).map(|net| net.trunc()).collect()
    };
    let theirs = networks(other);
    networks(one).iter().any(|net| theirs.contains(net))
}

fn has_address(status: &VIPNodeStatus, address: &str) -> bool {
    let Ok(address) = address.parse::<IpAddr>() else { return false };
    let own = status.interfaces.iter().flat_map(|interface| &interface.addresses);
    own.filter_map(|text| text.parse::<IpNet>().ok()).any(|net| net.addr() == address)
}

/// The silences of a matrix.
pub fn deaf(rows: &[Row]) -> Vec<Problem> {
    let silences = rows.iter().flat_map(|row| {
        row.hears.iter().filter(|(_, heard)| !**heard).map(move |(speaker, _)| (&row.node, speaker))
    });
    silences
        .map(|(listener, speaker)| {
            let back = rows.iter().find(|row| row.node == *speaker).and_then(|row| row.hears.get(listener));
            let back = match back {
                Some(true) => format!(", though {speaker} hears {listener}"),
                Some(false) => format!(", nor does {speaker} hear {listener}"),
                None => String::new(),
            };
            Problem {
                code: &codes::DEAF,
                about: listener.clone(),
                message: format!("it does not hear the advertisements of {speaker}{back}"),
                command: format!("kubectl describe vipnode {listener} {speaker}"),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn now() -> Timestamp {
        "2026-01-01T00:01:00Z".parse().unwrap()
    }

    /// A node of the LAN in a state of virtual router 9, and whom it hears.
    fn node(number: u8, state: &str, since: &str, hears: &[u8]) -> VIPNode {
        let peer = |other: &u8| json!({"address": format!("10.0.0.{other}"), "interface": "eth0", "virtualRouter": 9, "priority": 1});
        let peers: Vec<Value> = hears.iter().map(peer).collect();
        serde_json::from_value(json!({
            "metadata": {"name": format!("node-{number}")},
            "status": {
                "renewTime": "2026-01-01T00:00:55Z", "dataplane": {"ready": true}, "peers": peers,
                "interfaces": [{"name": "eth0", "mac": "m", "carrier": true,
                                "addresses": [format!("10.0.0.{number}/24"), format!("fe80::{number}/64")]}],
                "virtualRouters": [{"interface": "eth0", "family": 4, "virtualRouter": 9, "state": state, "priority": 1,
                                    "since": since}],
            },
        }))
        .unwrap()
    }

    const LONG: &str = "2026-01-01T00:00:00Z";
    const LATELY: &str = "2026-01-01T00:00:50Z";

    fn said(nodes: &[VIPNode]) -> Vec<String> {
        deaf(&matrix(nodes, now())).iter().map(|p| format!("{} {} {}", p.code, p.about, p.message)).collect()
    }

    #[test]
    fn a_master_is_heard_by_all_who_take_part() {
        let nodes =
            [node(1, "Master", LONG, &[]), node(2, "Backup", LONG, &[1]), node(3, "Backup", LONG, &[])];
        assert_eq!(said(&nodes), ["VIP401 node-3 it does not hear the advertisements of node-1"]);
        let rows = matrix(&nodes, now());
        assert!(rows[0].hears.is_empty(), "backups do not speak");
        assert_eq!(rows[1].hears, BTreeMap::from([("node-1".to_owned(), true)]));
    }

    #[test]
    fn silence_may_be_of_one_way() {
        let one_way = [node(1, "Master", LONG, &[2]), node(2, "Master", LONG, &[])];
        assert_eq!(
            said(&one_way),
            ["VIP401 node-2 it does not hear the advertisements of node-1, though node-1 hears node-2"]
        );
        let both = [node(1, "Master", LONG, &[]), node(2, "Master", LONG, &[])];
        assert_eq!(said(&both).len(), 2);
        assert!(said(&both)[0].ends_with(", nor does node-2 hear node-1"));
    }

    #[test]
    fn what_is_new_or_elsewhere_proves_nothing() {
        assert!(said(&[node(1, "Master", LATELY, &[]), node(2, "Backup", LONG, &[])]).is_empty());
        assert!(said(&[node(1, "Master", LONG, &[]), node(2, "Backup", LATELY, &[])]).is_empty());
        let mut far = node(2, "Backup", LONG, &[]);
        for interface in far.status.iter_mut().flat_map(|status| &mut status.interfaces) {
            interface.addresses = vec!["10.1.0.2/24".to_owned(), "fe80::2/64".to_owned()];
        }
        assert!(said(&[node(1, "Master", LONG, &[]), far]).is_empty());
    }
}
