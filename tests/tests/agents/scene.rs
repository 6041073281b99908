//! Nodes of the native lab on one segment, and what tests and measurements ask of them.

use std::{net::IpAddr, time::Duration};

use anyhow::{Result, bail, ensure};
use lab::{Host, Lab, Segment, command};
use serde_json::{Value, json};
use vip_core::api::name_of;

use crate::node::Node;

/// The virtual router of the addresses here.
pub const VRID: u8 = 100;
/// How long anything may take.
pub const SOON: Duration = Duration::from_secs(20);

/// Installs the product; its DaemonSet finds no kubelet.
pub fn install(lab: &Lab) -> Result<()> {
    let words = ["vip", "install", "--wait=false", "--pool", "native=10.87.2.0/24,fd87::2:0/112"];
    lab.kubectl_for(Duration::from_secs(120), words)?.ok().map(drop)
}

/// Hosts of a segment with the product, and one more that is their client.
pub struct Scene<'a> {
    pub lab: &'static Lab,
    pub segment: &'a Segment,
    pub nodes: Vec<Node<'a>>,
}

impl<'a> Scene<'a> {
    /// Starts them on the first hosts. `interval` is that of the advertisements.
    pub fn new(lab: &'static Lab, segment: &'a Segment, count: u8, interval: &'static str) -> Result<Self> {
        segment.connect(lab)?;
        let nodes = (1..=count)
            .map(|number| Node::start(lab, segment.host(number), interval))
            .collect::<Result<_>>()?;
        Ok(Self { lab, segment, nodes })
    }

    /// Reserves a bare address.
    pub fn reserve(&self, address: impl Into<IpAddr>) -> Result<()> {
        let address = address.into();
        let vip = json!({
            "apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VirtualIP", "metadata": {"name": name_of(address)},
            "spec": {"address": address.to_string(), "virtualRouter": VRID},
        });
        self.lab.kubectl(["delete", "virtualip", "--all"])?.ok()?;
        self.lab.apply(&vip.to_string()).map(drop)
    }

    /// The first host after theirs.
    pub fn client(&self) -> &Host {
        self.beyond(1)
    }

    /// The hosts after theirs, from 1.
    pub fn beyond(&self, number: u8) -> &Host {
        self.segment.host(u8::try_from(self.nodes.len()).unwrap_or(u8::MAX) + number)
    }

    /// The numbers of the nodes whose kernel has an address.
    pub fn bound(&self, address: impl Into<IpAddr>) -> Result<Vec<usize>> {
        let address = address.into();
        let mut bound = Vec::new();
        for (index, node) in self.nodes.iter().enumerate() {
            if node.has(address)? {
                bound.push(index);
            }
        }
        Ok(bound)
    }

    /// Waits for the one owner of an address: bound there alone, and answering alone: by ARP, or over IPv6 whom the client reaches.
    pub fn owner(&self, address: impl Into<IpAddr>) -> Result<usize> {
        let (address, client) = (address.into(), self.client());
        command::until(&format!("one owner of {address}"), SOON, || {
            let bound = self.bound(address)?;
            let answering = match address {
                IpAddr::V4(four) => client.arp_owner(four, Duration::from_millis(200))?,
                IpAddr::V6(_) => vec![client.client().get(&format!("http://[{address}]/"))?.body],
            };
            let known_as = |node: &Node<'_>| match address {
                IpAddr::V4(_) => node.host.mac(),
                IpAddr::V6(_) => Ok(node.name.clone()),
            };
            match bound.as_slice() {
                [one] if answering == [known_as(&self.nodes[*one])?] => Ok(Some(*one)),
                _ => bail!("bound on {bound:?}, answering: {answering:?}"),
            }
        })
    }

    /// An object of the cluster.
    pub fn object(&self, kind: &str, name: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.lab.kubectl(["get", kind, name, "-o", "json"])?.ok()?.stdout)?)
    }

    /// Waits until the status of an address names a node.
    pub fn wait_status(&self, address: impl Into<IpAddr>, node: &str) -> Result<()> {
        let address = address.into();
        command::until(&format!("the status of {address} to name {node}"), SOON, || {
            let vip = self.object("virtualip", &name_of(address))?;
            ensure!(vip["status"]["node"] == node, "it says {}", vip["status"]);
            Ok(Some(()))
        })
    }

    /// Waits until the status of an address says that it came to a node, from another or from none, for that reason.
    pub fn wait_handover(
        &self,
        address: impl Into<IpAddr>,
        from: Option<usize>,
        to: usize,
        reason: &str,
    ) -> Result<()> {
        let address = address.into();
        let name = |index: usize| self.nodes[index].name.as_str();
        let (from, to) = (from.map(name), name(to));
        self.wait_status(address, to)?;
        command::until(&format!("{address} to have come to {to}: {reason}"), SOON, || {
            let vip = self.object("virtualip", &name_of(address))?;
            let told = &vip["status"]["lastHandover"];
            let is_it = told["reason"] == reason && told["to"] == to && told["from"].as_str() == from;
            ensure!(is_it, "it says {told}");
            Ok(Some(()))
        })
    }

    /// Waits for an Event with that reason that names something; gives its words.
    pub fn event(&self, reason: &str, named: &str) -> Result<String> {
        command::until(&format!("an Event {reason} that names {named}"), SOON, || {
            let field = format!("reason={reason}");
            let events =
                self.lab.kubectl(["get", "events", "-A", "--field-selector", &field, "-o", "json"])?.ok()?;
            let events: Value = serde_json::from_str(&events.stdout)?;
            let notes = events["items"].as_array().into_iter().flatten();
            let mut notes = notes.filter_map(|event| event["message"].as_str());
            Ok(notes.rfind(|note| note.contains(named)).map(str::to_owned))
        })
    }
}
