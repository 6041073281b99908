//! What the kinds of Services are checked with: pods, virtual IPs for them, and questions to clients and kernels.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use lab::{Lab, client::Connection, command, guest, image::AGNHOST, product, workload::SLOW};
use serde_json::Value;
use vip_core::api::name_of;

use crate::SOON;

/// The namespace of these Services and their pods.
pub const KINDS: &str = "kinds";
/// Requests of which each of two pods gets one, and the most until it has.
const TRIES: (usize, usize) = (6, 60);
/// Connections in a row that are refused: a kernel that refuses by ICMP does so six times, and then once in a second.
const REFUSALS: usize = 20;
/// Less than a client waits before it tries again.
const AT_ONCE: Duration = Duration::from_millis(900);
/// How many of them a machine that stands still for a moment may make late.
const LATE: usize = 2;

/// How a hand-written endpoint stands.
pub const READY: &str = "ready: true";
/// It ends, and answers.
pub const LEAVING: &str = "ready: false, serving: true, terminating: true";

/// Pods `a` on node-1, `b` on node-2, `host` in the network of node-3 and `never`, which never becomes ready, there too.
/// Their ports have the same names and other numbers.
fn pods() -> String {
    let pod = |name: &str, node: u8, base: u16, labels: &str, more: &str| {
        format!(
            "apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {KINDS}, labels: {{app: {name}{labels}}}}}
spec:
  nodeName: node-{node}
  terminationGracePeriodSeconds: 2
  {more}
  containers:
  - name: web
    image: {AGNHOST}
    imagePullPolicy: Never
    args: [netexec, --http-port={base}, --udp-port={udp}, --sctp-port={sctp}]
    ports: [{{name: http, containerPort: {base}}}, {{name: udp, containerPort: {udp}, protocol: UDP}},
            {{name: sctp, containerPort: {sctp}, protocol: SCTP}}]
    readinessProbe: {{httpGet: {{path: /{path}, port: http}}, periodSeconds: 5, timeoutSeconds: 5}}
---
",
            udp = base + 1,
            sctp = base + 2,
            path = if name == "never" { "nothing" } else { "healthz" },
        )
    };
    let namespace = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {KINDS}}}\n---\n");
    namespace
        + &pod("a", 1, 8080, ", tier: both", "")
        + &pod("b", 2, 9080, ", tier: both", "")
        + &pod("host", 3, 18080, "", "hostNetwork: true")
        + &pod("never", 3, 8080, "", "")
}

/// What the rows are checked with.
pub struct Scene {
    pub lab: &'static Lab,
    /// Addresses of the pods by name, IPv4 before IPv6.
    pods: BTreeMap<String, Vec<IpAddr>>,
}

impl Scene {
    /// Creates the pods and waits for those that become ready.
    pub fn new(lab: &'static Lab) -> Result<Self> {
        {
            // Of two tests that create the same at once, one is told that it exists.
            static CREATION: Mutex<()> = Mutex::new(());
            let _held = CREATION.lock().unwrap_or_else(PoisonError::into_inner);
            lab.apply(&pods())?;
        }
        let mut pods = BTreeMap::new();
        for name in ["a", "b", "host", "never"] {
            let found = command::until(&format!("pod {name}"), SLOW, || {
                let pod = lab.kubectl(["get", "pod", name, "-n", KINDS, "-o", "json"])?.ok()?;
                let pod: Value = serde_json::from_str(&pod.stdout)?;
                let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
                let ready = conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
                let running = pod["status"]["containerStatuses"][0]["state"]["running"].is_object();
                let addresses =
                    pod["status"]["podIPs"].as_array().filter(|_| ready || name == "never" && running);
                Ok(addresses.map(|all| {
                    all.iter().filter_map(|one| one["ip"].as_str()?.parse().ok()).collect::<Vec<IpAddr>>()
                }))
            })?;
            pods.insert(name.to_owned(), found);
        }
        Ok(Self { lab, pods })
    }

    /// Makes a Service.
    pub fn service(&self, name: &str, spec: &str) -> Result<()> {
        let meta = format!("{{name: {name}, namespace: {KINDS}}}");
        let service = format!("apiVersion: v1\nkind: Service\nmetadata: {meta}\nspec: {{{spec}}}\n");
        self.lab.apply(&service).map(drop)
    }

    /// Writes an EndpointSlice of a Service that nobody but its author looks after: pods, and how each stands.
    pub fn slice(&self, service: &str, name: &str, port: u16, endpoints: &[(&str, &str)]) -> Result<()> {
        let mut list = Vec::new();
        for (pod, state) in endpoints {
            let node = if *pod == "a" { 1 } else { 2 };
            list.push(format!(
                "{{addresses: [{}], nodeName: node-{node}, conditions: {{{state}}}}}",
                self.pod(pod, false)?
            ));
        }
        let slice = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {service}-{name}, namespace: {KINDS}, \
             labels: {{kubernetes.io/service-name: {service}}}}}\naddressType: IPv4\nendpoints: [{}]\n\
             ports: [{{name: http, port: {port}}}]\n",
            list.join(", ")
        );
        self.lab.apply(&slice).map(drop)
    }

    /// Gives a Service a virtual IP.
    pub fn expose(&self, name: &str, flags: &[&str]) -> Result<IpAddr> {
        let service = format!("svc/{name}");
        let words = ["vip", "expose", &service, "-n", KINDS].into_iter().chain(flags.iter().copied());
        self.lab.kubectl_for(Duration::from_secs(60), words)?.ok()?;
        product::address_of(self.lab, KINDS, name)
    }

    /// Writes a VirtualIP by hand, with a virtual router of its own.
    pub fn reserve(&self, address: impl Into<IpAddr>, router: u8, services: &[&str]) -> Result<()> {
        let address = address.into();
        let services: Vec<String> =
            services.iter().map(|name| format!("{{namespace: {KINDS}, name: {name}}}")).collect();
        let vip = format!(
            "apiVersion: kubectl-vip.io/v1alpha1\nkind: VirtualIP\nmetadata: {{name: \"{}\"}}\n\
             spec: {{address: \"{address}\", virtualRouter: {router}, services: [{}]}}\n",
            name_of(address),
            services.join(", ")
        );
        self.lab.apply(&vip).map(drop)
    }

    /// Takes all virtual IPs from a Service, and removes it.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.lab.kubectl(["vip", "unexpose", &format!("svc/{name}"), "-n", KINDS])?.ok()?;
        self.lab.kubectl(["delete", "service", name, "-n", KINDS, "--wait=false"])?.ok().map(drop)
    }

    /// The address of a pod.
    pub fn pod(&self, name: &str, six: bool) -> Result<IpAddr> {
        let mut addresses = self.pods.get(name).into_iter().flatten();
        addresses
            .find(|address| address.is_ipv6() == six)
            .copied()
            .with_context(|| format!("pod {name} has none"))
    }

    /// Waits until every kernel has exactly these destinations at a port, given as `TCP :80 wlc`, each of weight 1.
    pub fn table(&self, vip: impl Into<IpAddr>, head: &str, to: &[(&str, u16)]) -> Result<()> {
        let to: Vec<_> = to.iter().map(|(name, port)| (*name, *port, 1)).collect();
        self.weights(vip, head, &to)
    }

    /// The same with a weight for each.
    pub fn weights(&self, vip: impl Into<IpAddr>, head: &str, to: &[(&str, u16, u32)]) -> Result<()> {
        let vip = vip.into();
        let wanted = self.destinations(vip, to)?;
        command::until(&format!("{head} of {vip} to be {wanted:?}"), SOON, || {
            let tables = self.lab.each_node(|node| product::table(&node, vip))?;
            ensure!(tables.iter().all(|table| table.get(head) == Some(&wanted)), "they have {tables:?}");
            Ok(Some(()))
        })
    }

    /// Waits until the kernel of one node has these destinations.
    pub fn table_of(&self, node: u8, vip: IpAddr, head: &str, to: &[(&str, u16, u32)]) -> Result<()> {
        let wanted = self.destinations(vip, to)?;
        command::until(&format!("{head} of {vip} on node-{node} to be {wanted:?}"), SOON, || {
            let table = product::table(&self.lab.node(node), vip)?;
            ensure!(table.get(head) == Some(&wanted), "it has {table:?}");
            Ok(Some(()))
        })
    }

    /// Destinations as the kernel shows them.
    fn destinations(&self, vip: IpAddr, to: &[(&str, u16, u32)]) -> Result<BTreeMap<String, u32>> {
        let shown = |(name, port, weight): &(&str, u16, u32)| {
            Ok((SocketAddr::new(self.pod(name, vip.is_ipv6())?, *port).to_string(), *weight))
        };
        to.iter().map(shown).collect()
    }

    /// Waits until these, all of them and nobody else, answer a run of requests. They see the owner's address, or that of their own
    /// node's network when the owner is that node. (The slices of a Service that was deleted may outlive it, and go when it
    /// is there again: for that moment it has no endpoint.)
    pub fn answer(&self, scheme: &str, at: impl Into<SocketAddr>, who: &[&str]) -> Result<()> {
        let at = at.into();
        let (seen, client) = self.reach(scheme, at, who)?;
        let of_nodes = (1..=3).flat_map(|node| {
            [
                guest::address(node).into(),
                guest::address6(node).into(),
                IpAddr::from([10, 244, node, 1]),
                IpAddr::from([0xfd10, 0x244, u16::from(node), 0, 0, 0, 0, 1]),
            ]
        });
        let of_nodes: BTreeSet<IpAddr> = of_nodes.collect();
        ensure!(of_nodes.contains(&seen.ip()), "{scheme}://{at}: a pod sees {seen}, the client is {client}");
        Ok(())
    }

    /// The same, where the pods see the client itself.
    pub fn answer_to_client(&self, scheme: &str, at: impl Into<SocketAddr>, who: &[&str]) -> Result<()> {
        let at = at.into();
        let (seen, client) = self.reach(scheme, at, who)?;
        ensure!(seen == client, "{scheme}://{at}: a pod sees {seen}, the client is {client}");
        Ok(())
    }

    /// Waits until these, and nobody else, answer. The client's address as a pod sees it, and as it is.
    fn reach(&self, scheme: &str, at: SocketAddr, who: &[&str]) -> Result<(SocketAddr, SocketAddr)> {
        let wanted = names(who);
        command::until(&format!("{wanted:?} to answer {scheme}://{at}"), SOON, || {
            let mut heard = BTreeSet::new();
            for turn in 1..=TRIES.1 {
                heard.insert(self.lab.client().get(&format!("{scheme}://{at}/hostname"))?.body);
                if heard == wanted && turn >= TRIES.0 * who.len() {
                    break;
                }
            }
            ensure!(heard == wanted, "{heard:?} answer");
            let answer = self.lab.client().get(&format!("{scheme}://{at}/clientip"))?;
            let seen = answer.body.parse().with_context(|| answer.body.clone())?;
            Ok(Some((seen, answer.source)))
        })
    }

    /// A connection that a pod has taken.
    pub fn connection_to(&self, at: impl Into<SocketAddr>, pod: &str) -> Result<Connection> {
        let at = at.into();
        for _ in 0..TRIES.1 {
            let mut connection = self.lab.client().connect(at)?;
            if connection.get("hostname")?.body == pod {
                return Ok(connection);
            }
        }
        bail!("{at}: no connection came to {pod}");
    }

    /// A client stays with its backend.
    pub fn one_answers(&self, at: impl Into<SocketAddr>) -> Result<()> {
        let url = format!("http://{}/hostname", at.into());
        let heard = (0..2 * TRIES.0)
            .map(|_| Ok(self.lab.client().get(&url)?.body))
            .collect::<Result<BTreeSet<_>>>()?;
        ensure!(heard.len() == 1, "{heard:?} answer");
        Ok(())
    }

    /// Waits until a connection is refused. From then on all are, and at once.
    pub fn refuses(&self, at: impl Into<SocketAddr>) -> Result<()> {
        let at = at.into();
        command::until(&format!("{at} to refuse"), SOON, || {
            Ok(self.lab.client().tcp_refused(at)?.then_some(()))
        })?;
        let client = self.lab.client().limit(AT_ONCE);
        let mut late = Vec::new();
        for turn in 1..=REFUSALS {
            match client.tcp_refused(at) {
                Ok(refused) => {
                    ensure!(refused, "{at} accepts connection {turn} after the first that it refused");
                }
                Err(error) => late.push(format!("{turn}: {error:#}")),
            }
        }
        ensure!(
            late.len() <= LATE,
            "of {REFUSALS} connections to {at} these were not refused at once: {late:?}"
        );
        Ok(())
    }

    /// Waits until `Programmed` is as said, as `True Programmed`.
    pub fn programmed(&self, vip: impl Into<IpAddr>, wanted: &str) -> Result<()> {
        product::wait_condition(self.lab, vip, "Programmed", wanted, SOON).map(drop)
    }
}

pub fn names(who: &[&str]) -> BTreeSet<String> {
    who.iter().map(|name| (*name).to_owned()).collect()
}
