//! `vip-node agent`: the process that may stop. It turns the objects of the API into the kernel's tables and into
//! orders for vrrp, and what happened into status.
//!
//! ```text
//!   API server --watch--> cluster --+                      +--> programmer (thread) --netlink--> kernel
//!                                   +--> loop (this file) -+--> partner (task) --socket--> vip-node vrrp
//!   programmer, partner --reports---+                      +--> writer (task) --status, Events--> API server
//! ```
//!
//! The loop turns at each change and once a second; nothing in it waits for the API server or for the kernel.

mod cluster;
mod health;
mod partner;
mod programmer;
mod report;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::Context;
use jiff::{Timestamp, Unit};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use kube::{Client, Resource, ResourceExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};
use vip_core::api::{
    DataplaneStatus, RENEW_SECONDS, Reason, SILENT_AFTER_SECONDS, VIPNode, VIPNodeStatus, VIPPoolStatus,
    VrrpState,
};
use vip_core::desired::{Desired, Node, VipPlan};
use vip_core::pool;
use vip_core::validate::check_pools;
use vip_core::vrrp::Lan;

use self::cluster::Cluster;
use self::health::Health;
use self::partner::Partner;
use self::programmer::{Programmed, Programmer};
use self::writer::{Happening, Outbox, Writer};
use crate::args::AgentArgs;
use crate::dataplane::Kernel;
use crate::link::{Elect, Report};

/// Changes that come together are worked on together.
const GATHER: Duration = Duration::from_millis(5);
/// The loop turns at least this often.
const TICK: Duration = Duration::from_secs(1);
/// A virtual IP without an owner for this long is said to have none: a takeover is shorter.
const UNOWNED: Duration = Duration::from_secs(3);
/// How long vrrp may take to leave its elections when both processes are asked to end.
const HANDOVER: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// When the process cannot start: no credentials, no thread. Everything later is reported and retried.
pub async fn run(args: AgentArgs) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("signals")?;
    let client = cluster::connect(args.kubeconfig.as_deref()).await?;
    let health = Health::new();
    tokio::spawn(health.clone().serve(args.health));
    let mut agent = Agent {
        cluster: Cluster::watch(&client, &args.node),
        partner: Partner::new(&args.link),
        programmer: Programmer::start(Kernel::new(&args.sysctl_dir)).context("thread")?,
        writer: Writer::new(&client, &args.node),
        health,
        synced: false,
        desired: Desired::default(),
        generation: 0,
        node: Node { name: args.node.clone(), ..Node::default() },
        lan: Lan { peers: Vec::new(), unicast: args.unicast, checksum: args.checksum },
        owned: BTreeSet::new(),
        orphans: BTreeMap::new(),
        args,
    };
    info!(node = agent.args.node, version = env!("CARGO_PKG_VERSION"), "agent started");
    tokio::select! {
        () = agent.work() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    agent.leave(&client).await;
    Ok(())
}

struct Agent {
    args: AgentArgs,
    cluster: Cluster,
    partner: Partner,
    programmer: Programmer,
    writer: Writer,
    health: Health,
    synced: bool,
    desired: Desired,
    /// Counts the tables given to the programmer; 0: none yet.
    generation: u64,
    /// The other agents, and how to speak with them.
    lan: Lan,
    /// This node, interfaces as last reported by vrrp.
    node: Node,
    /// Virtual IPs that this node owned at the last turn.
    owned: BTreeSet<String>,
    /// Virtual IPs without an owner anywhere, since when.
    orphans: BTreeMap<String, Instant>,
}

impl Agent {
    async fn work(&mut self) {
        let mut programmed = self.programmer.state();
        let mut reports = self.partner.reports.clone();
        loop {
            tokio::select! {
                () = self.cluster.synced(), if !self.synced => self.synced = true,
                () = self.cluster.changed() => {}
                _ = programmed.changed() => {}
                _ = reports.changed() => {}
                () = sleep(TICK) => {}
            }
            sleep(GATHER).await;
            let programmed = programmed.borrow_and_update().clone();
            let report = reports.borrow_and_update().clone();
            self.turn(report.as_ref(), &programmed);
        }
    }

    fn turn(&mut self, report: Option<&Report>, programmed: &Programmed) {
        if !self.synced {
            self.health.turn(Some("the API server has not answered yet".to_owned()));
            return;
        }
        if let Some(report) = report {
            self.node.interfaces =
                report.interfaces.iter().map(|i| (i.name.clone(), i.addresses.clone())).collect();
        }
        self.lan.peers = self.cluster.peers(&self.node.name);
        self.node.drained = self.cluster.is_drained(&self.node.name);
        self.node.labels = self.cluster.own().map(|node| node.labels().clone()).unwrap_or_default();
        let desired = Desired::new(&self.cluster.objects(), &self.node);
        if self.generation == 0 || desired.tables != self.desired.tables {
            self.generation += 1;
            self.programmer.desire(self.generation, desired.tables.clone());
        }
        self.desired = desired;
        // A verdict on older tables says nothing about these: until the new ones were tried, the last order stands.
        let current = programmed.generation == Some(self.generation);
        if current && !self.node.interfaces.is_empty() {
            let can_serve = |vip: &VipPlan| programmed.serves(&vip.keys);
            let (peers, interval) = (&self.lan.peers, self.args.advert_interval);
            let routers = self.desired.elections(&self.node, peers, interval, can_serve);
            self.partner.order(Elect { lan: self.lan.clone(), routers });
        }
        let now = now();
        self.speak(report, programmed, &now);
        let dataplane = report::dataplane(report, programmed);
        self.health.turn(match (dataplane.ready, dataplane.message) {
            (true, _) => None,
            (false, message) => Some(message.unwrap_or_else(|| "not ready".to_owned())),
        });
    }

    /// Puts into the outbox what this node has to say.
    fn speak(&mut self, report: Option<&Report>, programmed: &Programmed, now: &Time) {
        let mut outbox = Outbox::default();
        let nodes = self.cluster.nodes();
        let own = nodes.iter().find(|node| node.name_any() == self.node.name);
        let previous = own.and_then(|node| node.status.as_ref());
        let status = report::node(report, programmed, &self.lan, previous, now);
        if is_due(previous, &status) {
            outbox.node = Some((status, self.owner_reference()));
        }

        let owned = self.owned_now(report);
        for plan in &self.desired.vips {
            let Some(vip) = self.cluster.vip(&plan.name) else { continue };
            let Some(interface) = owned.get(&plan.name) else { continue };
            let status = report::owned(&vip, plan, &self.node.name, interface, programmed, now);
            if vip.status.as_ref() != Some(&status) {
                outbox.vips.insert(plan.name.clone(), status);
            }
            if !self.owned.contains(&plan.name)
                && vip.status.as_ref().and_then(|s| s.node.as_ref()) != Some(&self.node.name)
            {
                let from =
                    vip.status.as_ref().and_then(|s| s.node.clone()).map(|node| format!(", was on {node}"));
                let note = format!(
                    "{} is announced by {} on {interface}{}",
                    plan.name,
                    self.node.name,
                    from.unwrap_or_default()
                );
                self.writer.tell(Happening { vip: vip.as_ref().clone(), reason: "Announced", note });
            }
        }
        for name in self.owned.iter().filter(|name| !owned.contains_key(*name)) {
            if let Some(vip) = self.cluster.vip(name) {
                let note = format!("{name} is no longer announced by {}", self.node.name);
                self.writer.tell(Happening { vip: vip.as_ref().clone(), reason: "Released", note });
            }
        }
        self.owned = owned.into_keys().collect();

        if self.is_scribe(&nodes, now) {
            self.speak_for_orphans(&nodes, programmed, now, &mut outbox);
            self.speak_for_pools(&mut outbox);
        } else {
            self.orphans.clear();
        }
        self.writer.write(outbox);
    }

    /// The virtual IPs that are bound here with this node as master, and the interface of each.
    fn owned_now(&self, report: Option<&Report>) -> BTreeMap<String, String> {
        let mut owned = BTreeMap::new();
        for router in report.iter().flat_map(|report| report::mastered(report)) {
            for plan in self.desired.vips.iter().filter(|plan| plan.candidate.is_ok()) {
                if plan.address.is_some_and(|address| router.bound.contains(&address)) {
                    owned.insert(plan.name.clone(), router.id.interface.clone());
                }
            }
        }
        owned
    }

    /// Whether this node speaks for what nobody owns: the first by name of those that are not silent.
    fn is_scribe(&self, nodes: &[std::sync::Arc<VIPNode>], now: &Time) -> bool {
        nodes.iter().filter(|node| is_live(node, now)).all(|node| self.node.name <= node.name_any())
    }

    fn speak_for_orphans(
        &mut self,
        nodes: &[std::sync::Arc<VIPNode>],
        programmed: &Programmed,
        now: &Time,
        outbox: &mut Outbox,
    ) {
        let mastered: BTreeSet<u8> = nodes
            .iter()
            .filter(|node| is_live(node, now))
            .filter_map(|node| node.status.as_ref())
            .flat_map(|status| &status.virtual_routers)
            .filter(|router| router.state == VrrpState::Master)
            .map(|router| router.virtual_router)
            .collect();
        let is_orphan = |plan: &VipPlan| !self.owned.contains(&plan.name) && !mastered.contains(&plan.vrid);
        let orphans: BTreeSet<String> =
            self.desired.vips.iter().filter(|p| is_orphan(p)).map(|p| p.name.clone()).collect();
        self.orphans.retain(|name, _| orphans.contains(name));
        for plan in &self.desired.vips {
            if !orphans.contains(&plan.name)
                || self.orphans.entry(plan.name.clone()).or_insert_with(Instant::now).elapsed() < UNOWNED
            {
                continue;
            }
            match self.cluster.vip(&plan.name) {
                Some(vip) => {
                    let status = report::unowned(&vip, plan, programmed, now);
                    if vip.status.as_ref() != Some(&status) {
                        outbox.vips.insert(plan.name.clone(), status);
                    }
                }
                None => {
                    outbox.vips.insert(plan.name.clone(), report::malformed(plan, now));
                }
            }
        }
    }

    fn speak_for_pools(&self, outbox: &mut Outbox) {
        let raw = self.cluster.pools();
        let taken = self.desired.vips.iter().filter_map(|plan| plan.address).collect();
        for pool in check_pools(raw.iter().map(AsRef::as_ref)).0 {
            let total = pool.addresses.len_u64();
            let allocated = pool::used(&pool.addresses, &taken);
            let status = VIPPoolStatus { total, allocated, available: total.saturating_sub(allocated) };
            let known = raw.iter().find(|raw| raw.name_any() == pool.name).and_then(|raw| raw.status);
            if known != Some(status) {
                outbox.pools.insert(pool.name, status);
            }
        }
    }

    /// The VIPNode goes when the Node goes.
    fn owner_reference(&self) -> Option<OwnerReference> {
        self.cluster.own().and_then(|node| node.owner_ref(&()))
    }

    /// The end: vrrp hands its addresses over first, then the kernel is cleaned. When vrrp does not end too, only this
    /// process is being restarted: traffic goes on, and the successor finds everything as it is.
    async fn leave(self, client: &Client) {
        let mut reports = self.partner.reports.clone();
        let left = timeout(
            HANDOVER,
            reports.wait_for(|report| {
                report.as_ref().is_none_or(|r| r.stopping && r.routers.iter().all(|r| r.bound.is_empty()))
            }),
        );
        if !matches!(left.await, Ok(Ok(_))) {
            info!("vrrp goes on: the dataplane is left as it is for the next agent");
            return;
        }
        let status = VIPNodeStatus {
            dataplane: DataplaneStatus {
                ready: false,
                reason: Some(Reason::VrrpUnavailable),
                message: Some("the agent was stopped and its addresses are released".to_owned()),
            },
            ..report::node(None, &Programmed::default(), &self.lan, None, &now())
        };
        let programmer = self.programmer;
        if tokio::task::spawn_blocking(move || programmer.clear()).await.is_err() {
            warn!("the kernel could not be cleaned");
        }
        if let Err(error) = writer::write_node(client, &self.args.node, &status).await {
            warn!("the last status could not be written: {error:#}");
        }
        info!("agent stopped, nothing of ours is left in the kernel");
    }
}

/// The wall clock in whole seconds, as Kubernetes writes times.
fn now() -> Time {
    let now = Timestamp::now();
    Time(now.round(Unit::Second).unwrap_or(now))
}

fn is_live(node: &VIPNode, now: &Time) -> bool {
    let renewed = node.status.as_ref().and_then(|status| status.renew_time.as_ref());
    renewed.is_some_and(|renewed| now.0.as_second() - renewed.0.as_second() <= SILENT_AFTER_SECONDS)
}

/// Whether a VIPNode has to be written: it differs in more than its time, or is old enough to be renewed.
fn is_due(previous: Option<&VIPNodeStatus>, status: &VIPNodeStatus) -> bool {
    let Some(previous) = previous else { return true };
    let seconds = |status: &VIPNodeStatus| status.renew_time.as_ref().map_or(0, |time| time.0.as_second());
    let same = VIPNodeStatus { renew_time: previous.renew_time.clone(), ..status.clone() } == *previous;
    !same || seconds(status) - seconds(previous) >= i64::try_from(RENEW_SECONDS).unwrap_or(i64::MAX)
}
