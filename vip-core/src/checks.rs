//! Active checks of backends: which destination is to be probed when, and what its answers mean. No clock and no socket: the
//! time comes in as an argument (since any fixed moment, monotonic), what to probe goes out.
//!
//! A destination counts as Kubernetes says until its probes have said otherwise. One on a node that has just fallen
//! silent is suspected: it comes after those that are not, and is probed first.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::api::Reason;
use crate::desired::{Desired, Trouble, VipPlan};
use crate::plan::{Protocol, Tables};

/// Most probes that are under way at once.
pub const AT_ONCE: usize = 64;
/// Most probes that are started together, and the pause until the next: 500 a second, whatever the number of backends.
const BATCH: usize = 16;
const PAUSE: Duration = Duration::from_millis(32);

/// How a destination is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Settings {
    /// From the start of one probe to the start of the next, give or take a tenth.
    pub interval: Duration,
    /// After this time a probe has failed.
    pub timeout: Duration,
    /// Failures in a row that make a destination failing.
    pub failures: u32,
    /// Successes in a row that end that.
    pub successes: u32,
}

/// What is held of a destination. What is better comes later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Verdict {
    /// Its probes fail.
    Failing,
    /// Its node fell silent, or an earlier process found it failing, and no probe has told yet.
    Suspected,
    /// Nothing speaks against it.
    Healthy,
}

/// A probe to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Where to connect.
    pub to: SocketAddr,
    /// How long to wait.
    pub timeout: Duration,
    /// Tells this probe from earlier ones of the same destination.
    pub ticket: u64,
}

/// How a probe ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The destination took the connection.
    Answered,
    /// It did not.
    Failed,
    /// The probe could not be made, for a reason that lies with this node.
    Untold,
}

#[derive(Clone, Debug)]
struct Target {
    settings: Settings,
    verdict: Verdict,
    /// Probes in a row that speak against the verdict.
    against: u32,
    phase: Phase,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// To be probed at that time: it is in the queue.
    Waits(Duration),
    /// A probe is under way.
    Runs { ticket: u64, since: Duration },
}

/// The checks of all destinations that this node is to check.
#[derive(Clone, Debug)]
pub struct Checks {
    targets: BTreeMap<SocketAddr, Target>,
    /// Those that wait, the next one first.
    queue: BTreeSet<(Duration, SocketAddr)>,
    running: usize,
    /// The endpoints of silent nodes that were not heard of since, by the name of the node.
    suspects: BTreeMap<String, BTreeSet<IpAddr>>,
    /// Those that an earlier process has found failing, until they are checked here.
    recalled: BTreeSet<SocketAddr>,
    /// Nothing is started before this time.
    resume: Duration,
    last_ticket: u64,
    random: u64,
}

impl Checks {
    /// Checks nothing yet. The seed spreads the probes of several nodes and destinations.
    pub fn new(seed: u64) -> Self {
        Self {
            targets: BTreeMap::new(),
            queue: BTreeSet::new(),
            running: 0,
            suspects: BTreeMap::new(),
            recalled: BTreeSet::new(),
            resume: Duration::ZERO,
            last_ticket: 0,
            random: seed,
        }
    }

    /// The destinations to check from now on. What is known of those that stay is kept, those that are gone are forgotten.
    pub fn want(&mut self, now: Duration, wanted: &BTreeMap<SocketAddr, Settings>) {
        let gone: Vec<SocketAddr> =
            self.targets.keys().filter(|to| !wanted.contains_key(to)).copied().collect();
        for to in gone {
            if let Some(target) = self.targets.remove(&to) {
                self.unschedule(to, target.phase);
            }
        }
        for (to, settings) in wanted {
            let known = self.targets.get(to).map(|target| (target.settings, target.phase));
            if known.is_some_and(|(same, _)| same == *settings) {
                continue;
            }
            let first = self.between(now, settings.interval);
            let suspected = self.recalled.remove(to) || self.is_suspected(to.ip());
            match (known, self.targets.get_mut(to)) {
                (Some((_, phase)), Some(target)) => {
                    target.settings = *settings;
                    if let Phase::Waits(due) = phase {
                        self.schedule(*to, due.min(first));
                    }
                }
                _ if suspected => self.add(*to, *settings, Verdict::Suspected, Duration::ZERO),
                _ => self.add(*to, *settings, Verdict::Healthy, first),
            }
        }
    }

    /// Suspects what an earlier process has taken new connections from: what the kernel holds at weight 0 although Kubernetes
    /// calls it ready.
    pub fn recall(&mut self, found: &Tables, desired: &Tables) {
        for (key, service) in found.services.iter().filter(|(key, _)| key.protocol == Protocol::Tcp) {
            let Some(wanted) = desired.services.get(key) else { continue };
            let shunned = service.destinations.iter().filter(|(to, weight)| {
                **weight == 0 && wanted.destinations.get(to).is_some_and(|now| *now > 0)
            });
            self.recalled.extend(shunned.map(|(to, _)| *to));
        }
    }

    /// A node fell silent: its endpoints are suspected, and probed before all others.
    pub fn suspect(&mut self, node: &str, pods: BTreeSet<IpAddr>) {
        let concerned: Vec<SocketAddr> =
            self.targets.keys().filter(|to| pods.contains(&to.ip())).copied().collect();
        for to in concerned {
            let Some(target) = self.targets.get_mut(&to) else { continue };
            target.verdict = target.verdict.min(Verdict::Suspected);
            target.against = 0;
            // The answer to a probe that is under way may be older than the silence.
            self.schedule(to, Duration::ZERO);
        }
        self.suspects.insert(node.to_owned(), pods);
    }

    /// All other nodes are heard again. Where probes can tell of their endpoints, they do.
    pub fn suspect_only(&mut self, is_silent: impl Fn(&str) -> bool) {
        self.suspects.retain(|node, _| is_silent(node));
    }

    /// What to probe now, what is suspected first. Each ends with [`Checks::finish`], unless it is no longer
    /// [awaited](Checks::awaits).
    pub fn start(&mut self, now: Duration) -> Vec<Probe> {
        let room = if now < self.resume { 0 } else { AT_ONCE.saturating_sub(self.running).min(BATCH) };
        let due: Vec<SocketAddr> =
            self.queue.iter().take_while(|(due, _)| *due <= now).take(room).map(|(_, to)| *to).collect();
        if due.is_empty() {
            return Vec::new();
        }
        self.resume = now + PAUSE;
        let mut probes = Vec::with_capacity(due.len());
        for to in due {
            let Some(target) = self.targets.get_mut(&to) else { continue };
            self.last_ticket += 1;
            let ticket = self.last_ticket;
            probes.push(Probe { to, timeout: target.settings.timeout, ticket });
            let before = std::mem::replace(&mut target.phase, Phase::Runs { ticket, since: now });
            self.unschedule(to, before);
            self.running += 1;
        }
        probes
    }

    /// Whether the outcome of a probe still means something.
    pub fn awaits(&self, probe: &Probe) -> bool {
        let phase = self.targets.get(&probe.to).map(|target| target.phase);
        matches!(phase, Some(Phase::Runs { ticket, .. }) if ticket == probe.ticket)
    }

    /// A probe has ended. Says what is held of its destination now if that has changed.
    pub fn finish(&mut self, now: Duration, probe: &Probe, outcome: Outcome) -> Option<Verdict> {
        if !self.awaits(probe) {
            return None;
        }
        let target = self.targets.get_mut(&probe.to)?;
        let Phase::Runs { since, .. } = target.phase else { return None };
        let before = target.verdict;
        let Settings { interval, failures, successes, .. } = target.settings;
        let (enough, next) = match (before, outcome) {
            (_, Outcome::Untold) => (None, before),
            (Verdict::Healthy, Outcome::Answered) | (Verdict::Failing, Outcome::Failed) => (Some(0), before),
            (Verdict::Suspected, Outcome::Answered) => (Some(1), Verdict::Healthy),
            (Verdict::Failing, Outcome::Answered) => (Some(successes), Verdict::Healthy),
            (Verdict::Healthy | Verdict::Suspected, Outcome::Failed) => (Some(failures), Verdict::Failing),
        };
        match enough {
            None => {}
            Some(0) => target.against = 0,
            Some(enough) => {
                target.against += 1;
                if target.against >= enough {
                    (target.verdict, target.against) = (next, 0);
                }
            }
        }
        let after = target.verdict;
        let tenth = interval / 10;
        let due = self.between(since + interval - tenth, tenth * 2).max(now);
        self.schedule(probe.to, due);
        if outcome == Outcome::Answered {
            for pods in self.suspects.values_mut() {
                pods.remove(&probe.to.ip());
            }
        }
        (after != before).then_some(after)
    }

    /// When [`Checks::start`] is to be called; `None`: not before a probe has ended or other destinations are wanted.
    pub fn next_deadline(&self) -> Option<Duration> {
        let room = self.running < AT_ONCE;
        self.queue.first().filter(|_| room).map(|(due, _)| self.resume.max(*due))
    }

    /// What is held of a destination. One that no connection can probe, as of UDP, is as good as the best of its pod's
    /// that can be; where there is none, only the silence of its node speaks against it.
    pub fn verdict(&self, protocol: Protocol, to: SocketAddr) -> Verdict {
        if protocol == Protocol::Tcp {
            return self.targets.get(&to).map_or(Verdict::Healthy, |target| target.verdict);
        }
        let ports = SocketAddr::new(to.ip(), 0)..=SocketAddr::new(to.ip(), u16::MAX);
        let best = self.targets.range(ports).map(|(_, target)| target.verdict).max();
        let silent = if self.is_suspected(to.ip()) { Verdict::Suspected } else { Verdict::Healthy };
        best.unwrap_or(silent)
    }

    /// The destinations to check: of TCP, and behind the addresses that this node owns. One behind two virtual IPs is
    /// checked once, as the more impatient of them wants it.
    pub fn wanted(desired: &Desired, owned: &BTreeSet<IpAddr>) -> BTreeMap<SocketAddr, Settings> {
        let mut wanted = BTreeMap::new();
        for (plan, settings) in checked(&desired.vips, owned) {
            for key in plan.keys.iter().filter(|key| key.protocol == Protocol::Tcp) {
                let destinations = desired.tables.services.get(key).map(|service| &service.destinations);
                for (to, _) in destinations.into_iter().flatten().filter(|(_, weight)| **weight > 0) {
                    wanted
                        .entry(*to)
                        .and_modify(|known: &mut Settings| *known = settings.min(*known))
                        .or_insert(settings);
                }
            }
        }
        wanted
    }

    /// Takes the connections from the destinations that something speaks against, where better ones are left. When all of
    /// a service fail, all are kept, and its virtual IP says so.
    pub fn apply(&self, desired: &mut Desired, owned: &BTreeSet<IpAddr>) {
        let flawless = self.targets.values().all(|target| target.verdict == Verdict::Healthy);
        if flawless && self.suspects.is_empty() {
            return;
        }
        let Desired { tables, vips } = desired;
        let tables = Arc::make_mut(tables);
        for plan in vips {
            if settings_of(plan, owned).is_none() {
                continue;
            }
            let mut failing = Vec::new();
            for part in plan.parts.clone() {
                let (mut before, mut after) = (BTreeSet::new(), BTreeSet::new());
                for key in plan.keys.get(part).unwrap_or_default() {
                    let Some(service) = tables.services.get_mut(key) else { continue };
                    let serving: Vec<(Verdict, SocketAddr, &mut u32)> = service
                        .destinations
                        .iter_mut()
                        .filter(|(_, weight)| **weight > 0)
                        .map(|(to, weight)| (self.verdict(key.protocol, *to), *to, weight))
                        .collect();
                    let Some(best) = serving.iter().map(|(verdict, ..)| *verdict).max() else { continue };
                    if best == Verdict::Failing {
                        let message = format!(
                            "none of the {} backends of {key} passes its check: all of them are kept",
                            serving.len()
                        );
                        failing.push(Trouble::new(Reason::BackendsFailing, message));
                    }
                    let mut worse = Vec::new();
                    for (verdict, to, weight) in serving {
                        before.insert(to.ip());
                        if verdict == best {
                            after.insert(to.ip());
                        } else {
                            *weight = 0;
                            worse.push(to);
                        }
                    }
                    // At weight 0 a flow of UDP would stay for as long as its client sends.
                    if key.protocol == Protocol::Udp {
                        service.destinations.retain(|to, _| !worse.contains(to));
                    }
                    plan.shunned.extend(worse);
                }
                let lost = u32::try_from(before.len() - after.len()).unwrap_or(u32::MAX);
                plan.backends.ready = plan.backends.ready.saturating_sub(lost);
            }
            failing.into_iter().for_each(|trouble| plan.suffers(trouble));
        }
    }

    fn is_suspected(&self, pod: IpAddr) -> bool {
        self.suspects.values().any(|pods| pods.contains(&pod))
    }

    fn add(&mut self, to: SocketAddr, settings: Settings, verdict: Verdict, due: Duration) {
        self.targets.insert(to, Target { settings, verdict, against: 0, phase: Phase::Waits(due) });
        self.queue.insert((due, to));
    }

    /// Puts a destination into the queue; a probe that is under way counts no more.
    fn schedule(&mut self, to: SocketAddr, due: Duration) {
        let Some(target) = self.targets.get_mut(&to) else { return };
        let before = std::mem::replace(&mut target.phase, Phase::Waits(due));
        self.unschedule(to, before);
        self.queue.insert((due, to));
    }

    fn unschedule(&mut self, to: SocketAddr, phase: Phase) {
        match phase {
            Phase::Waits(due) => {
                self.queue.remove(&(due, to));
            }
            Phase::Runs { .. } => self.running -= 1,
        }
    }

    /// Some time in a span, by SplitMix64.
    fn between(&mut self, from: Duration, span: Duration) -> Duration {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.random;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^= word >> 31;
        // 32 of the bits are enough for a share of the span.
        from + span.mul_f64(f64::from((word >> 32) as u32) / f64::from(u32::MAX))
    }
}

/// The virtual IPs whose backends are to be checked here.
fn checked<'a>(
    vips: &'a [VipPlan],
    owned: &'a BTreeSet<IpAddr>,
) -> impl Iterator<Item = (&'a VipPlan, Settings)> {
    vips.iter().filter_map(|plan| Some((plan, settings_of(plan, owned)?)))
}

fn settings_of(plan: &VipPlan, owned: &BTreeSet<IpAddr>) -> Option<Settings> {
    plan.check.filter(|_| plan.address.is_some_and(|address| owned.contains(&address)))
}

#[cfg(test)]
mod tests;
