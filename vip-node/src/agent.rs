//! `vip-node agent`: the process that may stop. It turns the objects of the API into the kernel's tables and into
//! orders for vrrp, and what happened into status.
//!
//! ```text
//!   API server --watch--> cluster --+                      +--> programmer (thread) --netlink--> kernel
//!                                   +--> loop (this file) -+--> partner (task) --socket--> vip-node vrrp
//!   programmer, partner --reports---+                      +--> writer (task) --status, Events--> API server
//!   checks (tasks) ------verdicts---+                      +--> checks --connections--> backends
//! ```
//!
//! The loop turns at each change and once a second; nothing in it waits for the API server or for the kernel.

mod audit;
mod census;
mod checks;
mod cluster;
mod guard;
mod health;
mod memory;
mod partner;
mod programmer;
mod report;
mod speech;
#[cfg(test)]
mod tests;
mod trust;
mod view;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use jiff::{Timestamp, Unit};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Client;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};
use vip_core::api::{DataplaneStatus, Reason, VIPNodeStatus};
use vip_core::desired::{Carrier, Desired, Node, Planner, VipPlan};
use vip_core::plan::Tables;
use vip_core::vrrp::{Lan, Peers, router};

use self::checks::Checker;
use self::cluster::Cluster;
use self::health::Health;
use self::memory::{Memory, Refusal};
use self::partner::Partner;
use self::programmer::{Programmed, Programmer};
use self::speech::{Scene, Speaker};
use self::trust::Trust;
use self::view::View;
use self::writer::Writer;
use crate::args::AgentArgs;
use crate::dataplane::{Dataplane, Kernel};
use crate::link::{Elect, Interface, Report};

/// Changes that come together are worked on together.
const GATHER: Duration = Duration::from_millis(5);
/// The loop turns at least this often.
const TICK: Duration = Duration::from_secs(1);
/// How long the API server may take to answer a starting agent before it goes on from what it remembers.
const PATIENCE: Duration = Duration::from_secs(3);
/// A change is on its way to the disk after this, together with those that came meanwhile: to write thousands of Services takes
/// long, and keeps a processor from what is to follow the change at once.
const REMEMBER: Duration = Duration::from_secs(2);
/// How long vrrp may take to leave its elections when both processes are asked to end, at least; ...
const HANDOVER: Duration = Duration::from_secs(5);
/// ... and what releasing takes after its successors had their time.
const RELEASE: Duration = Duration::from_secs(2);
/// How long after this node was written into the cluster the others know it, for sure.
const SPREAD: Duration = Duration::from_secs(2);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// When the process cannot start: no credentials, no thread. Everything later is reported and retried.
pub async fn run(args: AgentArgs) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("signals")?;
    let connection = cluster::connect(args.kubeconfig.as_deref()).await?;
    let client = connection.client;
    let kernel = Kernel::new(&args.sysctl_dir).remembering_in(&args.state_dir);
    let mut agent = Agent::new(args, &client, &connection.cluster, kernel)?;
    tokio::spawn(agent.health.clone().serve(agent.args.health));
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
    checker: Checker,
    partner: Partner,
    programmer: Programmer,
    trust: Trust,
    speaker: Speaker,
    health: Health,
    started: Instant,
    /// The API server has told all that there is.
    synced: bool,
    /// What to go on from if the API server does not answer; taken when it was looked into.
    memory: Option<Memory>,
    remember: watch::Sender<View>,
    /// Since when something is to be remembered.
    unremembered: Option<Instant>,
    /// The cluster as it was at the last turn.
    view: Option<View>,
    planner: Planner,
    desired: Desired,
    /// The addresses that are bound here, as the programmer was told.
    bound: BTreeSet<IpAddr>,
    /// What an earlier agent has left in the kernel, until the API server has told all that there is.
    found: Option<Tables>,
    /// The virtual IPs that the kernel serves, by their names.
    serving: BTreeSet<String>,
    /// vrrp was asked to end too when it was heard last.
    stopping: bool,
    /// Whether the others know this node.
    debut: Debut,
    /// Counts the tables given to the programmer; 0: none yet.
    generation: u64,
    /// The other agents, and how to speak with them.
    lan: Lan,
    /// This node.
    node: Node,
    /// Its interfaces, as last reported by vrrp.
    interfaces: Option<Vec<Interface>>,
    /// The addresses of the other nodes, as last seen.
    others: Arc<BTreeMap<IpAddr, Carrier>>,
}

impl Agent {
    /// Starts what works beside the loop. `cluster` is anything that no other cluster has.
    fn new(
        args: AgentArgs,
        client: &Client,
        cluster: &[u8],
        dataplane: impl Dataplane + 'static,
    ) -> anyhow::Result<Self> {
        let memory = Memory::new(&args.state_dir, &args.node, cluster);
        let writer = Writer::new(client, &args.node);
        Ok(Self {
            cluster: Cluster::watch(client, &args.node),
            checker: Checker::new(),
            partner: Partner::start(&args.link).context("thread")?,
            programmer: Programmer::start(dataplane).context("thread")?,
            trust: Trust::new(writer.heard()),
            speaker: Speaker::new(writer),
            health: Health::new(),
            started: Instant::now(),
            synced: false,
            remember: memory.clone().keep().context("thread")?,
            unremembered: None,
            memory: Some(memory),
            view: None,
            planner: Planner::default(),
            desired: Desired::default(),
            bound: BTreeSet::new(),
            found: None,
            serving: BTreeSet::new(),
            stopping: false,
            debut: Debut::default(),
            generation: 0,
            lan: Lan { peers: Peers::default(), unicast: args.unicast, checksum: args.checksum },
            node: Node { name: args.node.clone(), ..Node::default() },
            interfaces: None,
            others: Arc::default(),
            args,
        })
    }

    async fn work(&mut self) {
        let mut programmed = self.programmer.state();
        let mut reports = self.partner.reports.clone();
        loop {
            tokio::select! {
                () = self.cluster.synced(), if !self.synced => self.synced = true,
                () = self.cluster.changed() => {}
                () = self.checker.changed() => {}
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
        self.partner.beat();
        if self.generation == 0 && self.found.is_none() {
            self.found = self.programmer.found();
            if self.found.is_none() {
                return self.health.turn(Some("the agent has not seen the kernel yet".to_owned()));
            }
        }
        let news = self.look();
        let Some(view) = &self.view else {
            return self.health.turn(Some("the API server has not answered yet".to_owned()));
        };
        if let Some(report) = report {
            self.stopping = report.stopping;
            let bound = report.bound();
            if bound != self.bound {
                self.programmer.own(bound.clone());
                self.bound = bound;
            }
        }
        self.lan.peers.clone_from(&view.peers);
        self.node.drained = view.drained;
        self.node.labels.clone_from(&view.labels);
        let moved =
            report.map(|report| &report.interfaces).filter(|now| self.interfaces.as_ref() != Some(*now));
        if moved.is_some() || !Arc::ptr_eq(&self.others, &view.carried) {
            self.interfaces = moved.cloned().or(self.interfaces.take());
            self.others = Arc::clone(&view.carried);
            let interfaces = self.interfaces.as_deref().unwrap_or_default();
            self.node.interfaces = view::places(interfaces);
            self.node.carried = Arc::new(view::carriers(&self.node.name, interfaces, &self.others));
        }
        let mut desired = self.planner.plan(&view.objects, &self.node);
        desired.guard(&self.bound);
        // What is remembered may be older than what is in the kernel: nothing is taken away for it.
        if let Some(found) = self.found.as_ref().filter(|_| !self.synced) {
            let tables = Arc::make_mut(&mut desired.tables);
            tables.adopt(found);
            tables.guarded.retain(|address| !self.node.carried.contains_key(address));
        }
        if let Some(found) = self.found.as_ref().filter(|_| self.generation == 0) {
            self.checker.recall(found, &desired);
        }
        self.checker.turn(view, &self.lan, report, &mut desired);
        // A virtual IP may turn out to be an address of this node, and to shut that would lock everybody out: before its addresses
        // are known the kernel is left as it is.
        if self.interfaces.is_some() && (self.generation == 0 || desired.tables != self.desired.tables) {
            self.generation += 1;
            self.programmer.desire(self.generation, Arc::clone(&desired.tables));
        }
        self.desired = desired;
        if self.synced && self.generation > 0 {
            self.found = None;
        }
        if news {
            self.unremembered.get_or_insert_with(Instant::now);
        }
        if self.unremembered.is_some_and(|since| since.elapsed() >= REMEMBER) {
            self.unremembered = None;
            self.remember.send_replace(view.clone());
        }
        // By unicast nobody is heard who does not know this node yet: it would take over from an owner that lives.
        let heard = !self.args.unicast
            || !self.synced
            || self.debut.is_over(view.knows(&self.node.name), Instant::now());
        if programmed.generation.is_some() && heard {
            self.serving = programmed.serving(&self.desired.vips, &self.serving);
            let can_serve = |vip: &VipPlan| self.serving.contains(&vip.name);
            let (peers, interval) = (&self.lan.peers, self.args.advert_interval);
            let routers = self.desired.elections(&self.node, peers, interval, can_serve);
            self.partner.order(Elect { lan: self.lan.clone(), routers });
        }
        let dataplane = report::dataplane(report, programmed);
        let unready = match (dataplane.ready, dataplane.message) {
            (true, _) => None,
            (false, message) => Some(message.unwrap_or_else(|| "not ready".to_owned())),
        };
        if !self.synced {
            let stale = "the API server has not answered yet: this node serves what it knew last";
            let more = unready.map(|why| format!("; {why}")).unwrap_or_default();
            return self.health.turn(Some(format!("{stale}{more}")));
        }
        self.health.turn(unready);
        let now = now();
        self.speaker.speak(&Scene {
            node: &self.node.name,
            view,
            desired: &self.desired,
            lan: &self.lan,
            report,
            programmed,
            checks: self.checker.checks(),
            now: &now,
        });
    }

    /// Brings the view up to date, from the API server or, if that does not answer, from the disk. Whether there is
    /// something to remember.
    fn look(&mut self) -> bool {
        if self.synced {
            if let Some(memory) = self.memory.take() {
                self.view = self.inherit(&memory);
            }
            let view = self.view.get_or_insert_default();
            return self.cluster.refresh(&self.node.name, &mut self.trust, view);
        }
        if self.started.elapsed() >= PATIENCE
            && let Some(memory) = self.memory.take()
        {
            match memory.recall(SystemTime::now()) {
                Ok(remembered) => {
                    warn!(age = ?remembered.age, "the API server does not answer: going on from the last known state");
                    self.view = Some(remembered.view);
                }
                Err(Refusal::Missing) => {
                    warn!("the API server does not answer, and nothing is known of the cluster")
                }
                Err(refusal) => {
                    warn!("the API server does not answer, and the last known state is of no use: {refusal}")
                }
            }
        }
        if self.view.is_some() {
            self.trust.doubt(Instant::now());
        }
        false
    }

    /// What the agent before this one knew, to compare with what the API server says first, if that may have been away until now:
    /// nothing was written of this node for so long, and yet the kernel serves.
    fn inherit(&mut self, memory: &Memory) -> Option<View> {
        let serves = self.found.as_ref().is_some_and(|found| !found.ledger.is_empty());
        let written = self.cluster.written(&self.args.node)?;
        if !serves || !self.trust.begin(&written, &now(), Instant::now()) {
            return None;
        }
        memory.recall(SystemTime::now()).ok().map(|remembered| remembered.view)
    }

    /// The end: vrrp hands its addresses over first, then the kernel is cleaned. When vrrp does not end too, only this
    /// process is being restarted: traffic goes on, and the successor finds everything as it is.
    async fn leave(self, client: &Client) {
        let limit = HANDOVER.max(router::leaving(self.args.advert_interval) + RELEASE);
        if !has_left(self.partner.reports.clone(), self.stopping, limit).await {
            info!("vrrp goes on: the dataplane is left as it is for the next agent");
            return;
        }
        let status = VIPNodeStatus {
            dataplane: DataplaneStatus {
                ready: false,
                reason: Some(Reason::VrrpUnavailable),
                message: Some("the agent was stopped and its addresses are released".to_owned()),
            },
            ..report::node(None, &Programmed::default(), &self.lan, &BTreeSet::new(), None, &now())
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

/// The time until the others know this node.
#[derive(Default)]
struct Debut {
    /// When the node was not in the cluster last.
    unknown: Option<Instant>,
}

impl Debut {
    /// Whether everybody knows it. `known`: it is written in the cluster.
    fn is_over(&mut self, known: bool, now: Instant) -> bool {
        if !known {
            self.unknown = Some(now);
        }
        self.unknown.is_none_or(|last| now >= last + SPREAD)
    }
}

/// Waits until vrrp has left its elections, where it was asked to; `stopping`: it was when it was heard last. One that is not heard
/// may be about to say that it serves: it is there within milliseconds, or it is not there at all.
async fn has_left(mut reports: watch::Receiver<Option<Report>>, mut stopping: bool, limit: Duration) -> bool {
    let left = reports.wait_for(|report| {
        stopping = report.as_ref().map_or(stopping, |report| report.stopping);
        stopping && report.as_ref().is_none_or(|report| report.bound().is_empty())
    });
    let left = matches!(timeout(limit, left).await, Ok(Ok(_)));
    left || reports.borrow().is_none()
}

/// The wall clock in whole seconds, as Kubernetes writes times.
fn now() -> Time {
    let now = Timestamp::now();
    Time(now.round(Unit::Second).unwrap_or(now))
}
