//! The thread that keeps the kernel as it should be: applies differences, watches for foreign flushes, retries.
//!
//! Netlink calls block, so they have a thread of their own and never delay what the agent says to vrrp.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{info, warn};
use vip_core::api::Scheduler;
use vip_core::desired::{Trouble, VipPlan};
use vip_core::plan::{Along, Change, ServiceKey, Tables, plan};

use super::audit::{Audit, Seen};
use super::census::{Census, Counts};
use crate::dataplane::{Dataplane, DataplaneError, Sight, blocks};

/// How often one of our entries is looked up: kube-proxy in nftables mode flushes the whole IPVS table at its start. Two
/// small messages to the kernel each time.
const SENTINEL: Duration = Duration::from_millis(50);
/// First and longest pause after a failure.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// Work that takes longer is told of while it lasts: what waits for it is better served by other nodes.
const LONG: Duration = Duration::from_secs(1);

/// Steps between two looks at whether something newer is desired: some 20 ms, or a second where the kernel is slow because
/// its table was flushed.
const AT_ONCE: usize = 512;

/// What the kernel holds of ours.
#[derive(Clone, Debug, Default)]
pub struct Programmed {
    /// The last desired tables that were worked on to the end; `None` until there was a first attempt.
    pub generation: Option<u64>,
    /// Virtual services that are in the kernel, ours and as desired.
    pub present: Arc<BTreeSet<ServiceKey>>,
    /// Virtual services of ours that another program holds.
    pub conflicts: Arc<BTreeSet<ServiceKey>>,
    /// Virtual services that were present and have been gone for a while: putting everything back takes long.
    pub missing: Arc<BTreeSet<ServiceKey>>,
    /// Virtual services that the kernel refused, and why.
    pub refused: Arc<BTreeMap<ServiceKey, Trouble>>,
    /// Virtual services that are served by the default scheduler because the kernel lacks theirs.
    pub substituted: Arc<BTreeMap<ServiceKey, Trouble>>,
    /// Chains of the node's own firewall that drop by default.
    pub firewalls: Arc<BTreeSet<String>>,
    /// Open connections to what is behind the addresses that are bound here. Of the moment: that they change wakes nobody.
    pub connections: Arc<Counts>,
    /// How often something of ours was gone from the kernel or changed by another program, and put right, since the start.
    pub repairs: u64,
    /// What keeps this node from being programmed at all.
    pub trouble: Option<Trouble>,
}

impl Programmed {
    /// Whether all of these virtual services are served by this kernel; `None`: there are some that were not tried yet.
    pub fn serves(&self, keys: &[ServiceKey]) -> Option<bool> {
        let fails = |key: &ServiceKey| {
            self.refused.contains_key(key) || self.conflicts.contains(key) || self.missing.contains(key)
        };
        if self.trouble.is_some() || keys.iter().any(fails) {
            return Some(false);
        }
        keys.iter().all(|key| self.present.contains(key)).then_some(true)
    }

    /// The names of the virtual IPs that this kernel serves. Of one that was not tried yet the last word stands, so that
    /// nothing has to wait until the kernel has come to it.
    pub fn serving(&self, vips: &[VipPlan], last: &BTreeSet<String>) -> BTreeSet<String> {
        let serves = |vip: &&VipPlan| self.serves(&vip.keys).unwrap_or_else(|| last.contains(&vip.name));
        vips.iter().filter(serves).map(|vip| vip.name.clone()).collect()
    }

    /// What holds in the middle of long work with these steps left.
    fn tell_of(&mut self, ledger: &BTreeSet<ServiceKey>, conflicts: &BTreeSet<ServiceKey>, rest: &[Change]) {
        let left = rest.iter().filter_map(|change| match change {
            Change::AddService(key, _) => Some(*key),
            _ => None,
        });
        let left: BTreeSet<ServiceKey> = left.collect();
        let was = |key: &&ServiceKey| self.present.contains(key) || self.missing.contains(key);
        self.missing = Arc::new(left.iter().filter(was).copied().collect());
        let is = |key: &&ServiceKey| {
            !left.contains(key) && !conflicts.contains(key) && !self.refused.contains_key(key)
        };
        self.present = Arc::new(ledger.iter().filter(is).copied().collect());
    }
}

enum Command {
    Desire(u64, Arc<Tables>),
    /// These addresses are bound here.
    Own(BTreeSet<IpAddr>),
    /// Remove all that is ours, then end.
    Clear,
}

/// The handle of the thread.
pub struct Programmer {
    commands: Sender<Command>,
    found: Receiver<Tables>,
    newest: Arc<AtomicU64>,
    state: watch::Receiver<Programmed>,
    thread: std::thread::JoinHandle<()>,
}

impl Programmer {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(dataplane: impl Dataplane + 'static) -> std::io::Result<Self> {
        let (commands, inbox) = channel();
        let (tell, found) = channel();
        let (publish, state) = watch::channel(Programmed::default());
        let mut worker = Worker::new(dataplane, publish);
        let newest = Arc::clone(&worker.newest);
        let thread = std::thread::Builder::new().name("programmer".into()).spawn(move || {
            // Nobody may want to know.
            let _ = tell.send(worker.begin());
            worker.publish.send_modify(|_| ());
            worker.run(&inbox);
        })?;
        Ok(Self { commands, found, newest, state, thread })
    }

    /// What the kernel held when the thread started, once; the receiver of [`Programmer::state`] wakes when it is there.
    /// Nothing of what could not be read.
    pub fn found(&self) -> Option<Tables> {
        self.found.try_recv().ok()
    }

    /// States what the kernel should hold from now on.
    pub fn desire(&self, generation: u64, tables: Arc<Tables>) {
        // The thread ends only after `clear`, which consumes the handle.
        let _ = self.commands.send(Command::Desire(generation, tables));
        // Said after it is in the inbox, where a thread that stops for it must find it.
        self.newest.fetch_max(generation, Ordering::Release);
    }

    /// States which addresses are bound here: what they need comes first.
    pub fn own(&self, addresses: BTreeSet<IpAddr>) {
        let _ = self.commands.send(Command::Own(addresses));
    }

    /// What the kernel holds; changes wake the receiver.
    pub fn state(&self) -> watch::Receiver<Programmed> {
        self.state.clone()
    }

    /// Removes all that is ours from the kernel and ends the thread.
    pub fn clear(self) {
        let _ = self.commands.send(Command::Clear);
        self.newest.store(u64::MAX, Ordering::Release);
        let _ = self.thread.join();
    }
}

/// How far an attempt came.
enum Outcome {
    /// To its end, with this state.
    Reached(Programmed),
    /// It was stopped for something newer.
    Overtaken,
    /// A single failure that nobody needs to hear of.
    Unheard,
}

struct Worker<D> {
    dataplane: D,
    publish: watch::Sender<Programmed>,
    desired: Option<(u64, Arc<Tables>)>,
    /// The generation that was desired last; it may still be in the inbox.
    newest: Arc<AtomicU64>,
    /// The addresses that are bound here.
    owned: BTreeSet<IpAddr>,
    /// The kernel as we left it; `None` when it has to be read.
    mirror: Option<Tables>,
    /// Services that were refused something, as they are by the mirror.
    doubtful: BTreeSet<ServiceKey>,
    /// Compares everything with the mirror, for what the sentinel cannot see.
    audit: Audit,
    census: Census,
    /// When the sentinel looked last, and for which service.
    watched: Instant,
    asked: Option<ServiceKey>,
    /// Something was gone when it looked.
    is_robbed: bool,
    /// When the work that has no end yet was begun, or told of last.
    under_way: Option<Instant>,
    retry: Duration,
    /// The trouble that was logged last, to say each once.
    reported: Option<String>,
    /// Looks at the kernel that failed in a row.
    failures: u32,
    /// As at the last look at the kernel.
    firewalls: Arc<BTreeSet<String>>,
    /// Schedulers that the kernel lacks, and what it said; asked for again at the next audit.
    lacking: BTreeMap<String, Trouble>,
}

impl<D: Dataplane> Worker<D> {
    fn new(dataplane: D, publish: watch::Sender<Programmed>) -> Self {
        Self {
            dataplane,
            publish,
            desired: None,
            newest: Arc::new(AtomicU64::new(0)),
            owned: BTreeSet::new(),
            mirror: None,
            doubtful: BTreeSet::new(),
            audit: Audit::new(),
            census: Census::new(),
            watched: Instant::now(),
            asked: None,
            is_robbed: false,
            under_way: None,
            retry: RETRY.0,
            reported: None,
            failures: 0,
            firewalls: Arc::default(),
            lacking: BTreeMap::new(),
        }
    }

    /// The first look at the kernel.
    fn begin(&mut self) -> Tables {
        self.mirror = self.dataplane.observe().ok();
        self.mirror.clone().unwrap_or_default()
    }

    /// Begins an audit; whether there is something to try again.
    fn begin_audit(&mut self) -> bool {
        self.audit.begin();
        let again = self.mirror.is_none() || !self.lacking.is_empty() || !self.doubtful.is_empty();
        self.lacking.clear();
        again
    }

    /// Takes the next piece of the audit; whether the kernel is not as it was known.
    fn look(&mut self) -> bool {
        // What is to come first is not there before anything is desired.
        let (Some(mirror), Some(_)) = (&self.mirror, &self.desired) else { return false };
        match self.audit.look(&mut self.dataplane, mirror) {
            Ok(Seen::Known) => false,
            Ok(Seen::Firewalls(found)) => {
                if found != *self.firewalls {
                    self.firewalls = Arc::new(found);
                    self.publish.send_modify(|state| state.firewalls = Arc::clone(&self.firewalls));
                }
                false
            }
            // Pieces of different moments don't make a whole: the full look that follows does.
            Ok(Seen::News) | Err(_) => {
                self.mirror = None;
                true
            }
        }
    }

    fn run(mut self, inbox: &Receiver<Command>) {
        let mut again: Option<Instant> = None;
        loop {
            let audits = self.desired.is_some() && self.mirror.is_some() && self.audit.is_under_way();
            let pause = if audits { Duration::ZERO } else { SENTINEL };
            let first = match inbox.recv_timeout(pause) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let mut work = again.is_some_and(|at| Instant::now() >= at);
            // Of several words only the newest counts.
            for command in first.into_iter().chain(inbox.try_iter()) {
                match command {
                    Command::Desire(generation, tables) => {
                        self.desired = Some((generation, tables));
                        work = true;
                    }
                    Command::Own(addresses) => self.owned = addresses,
                    Command::Clear => {
                        if let Err(error) = self.dataplane.remove_everything() {
                            warn!(%error, "not everything of ours could be removed from the kernel");
                        }
                        return;
                    }
                }
            }
            if !work && self.watched.elapsed() >= SENTINEL {
                work = self.is_lost();
            }
            if self.audit.is_due() {
                work |= self.begin_audit();
            } else if !work {
                work = self.look();
            }
            if !work && self.census.is_due() {
                self.count();
            }
            if work && self.desired.is_some() {
                again = (!self.attempt()).then(|| {
                    let at = Instant::now() + self.retry;
                    self.retry = (self.retry * 2).min(RETRY.1);
                    at
                });
                if again.is_none() {
                    self.retry = RETRY.0;
                }
            }
        }
    }

    fn count(&mut self) {
        let Some(mirror) = &self.mirror else { return };
        self.census.count(&mut self.dataplane, &mirror.ledger, &self.owned);
        self.publish.send_if_modified(|state| {
            state.connections = self.census.counts();
            false
        });
    }

    /// Whether one of our entries is missing: then IPVS is read again, and everything if more is gone or after an error. Each
    /// is asked for in its turn.
    fn is_lost(&mut self) -> bool {
        self.watched = Instant::now();
        let Some(mirror) = &self.mirror else { return false };
        let behind = (self.asked.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded);
        let mut ours = mirror.ledger.range(behind).chain(&mirror.ledger);
        let key = ours.find(|key| mirror.services.contains_key(key)).copied();
        self.asked = key;
        let sight = key.map_or(Ok(Sight::Both), |key| self.dataplane.sentinel(&key));
        if sight == Ok(Sight::Both) {
            return false;
        }
        info!("entries of ours are gone from the kernel, putting them back");
        let known = self.mirror.take().filter(|_| sight == Ok(Sight::Table));
        self.mirror = known.and_then(|known| self.dataplane.reread_ipvs(known).ok());
        self.is_robbed = true;
        true
    }

    /// Brings the kernel to what is desired; whether nothing is left to retry. Publishes only what holds afterwards,
    /// so that a repair in between does not look like a loss.
    fn attempt(&mut self) -> bool {
        // A flush may be younger than the last look for one.
        self.is_lost();
        loop {
            let known = self.lacking.len();
            let unread = self.mirror.is_some();
            match self.approach() {
                // What is desired now is in the inbox.
                Outcome::Overtaken => return true,
                // A scheduler that has turned out to be missing is replaced at once.
                _ if self.lacking.len() != known => {}
                Outcome::Unheard => return false,
                // The kernel was not as it was known: it is read, before anybody hears of what it refused.
                Outcome::Reached(_) if unread && self.mirror.is_none() => {}
                Outcome::Reached(state) => return self.conclude(state),
            }
        }
    }

    /// Takes the steps to what is desired, as far as the kernel has the schedulers, and tells what holds then.
    /// Stops on the way when something newer is desired: the order of the plan allows it everywhere.
    fn approach(&mut self) -> Outcome {
        let Some((generation, desired)) = self.desired.as_ref() else { return Outcome::Unheard };
        let known = self.mirror.take();
        let whole = known.is_none();
        let is_robbed = std::mem::take(&mut self.is_robbed) || whole;
        let (desired, substituted) = substitute(desired, &self.lacking);
        let mut state = Programmed {
            generation: Some(*generation),
            substituted: Arc::new(substituted),
            firewalls: Arc::clone(&self.firewalls),
            connections: self.census.counts(),
            repairs: self.publish.borrow().repairs,
            ..Programmed::default()
        };
        let observed = match known.map_or_else(|| self.dataplane.observe(), Ok) {
            Ok(observed) => observed,
            Err(error) => {
                // One failed look at a kernel that was fine is no reason to give every address away.
                self.failures += 1;
                let last = self.publish.borrow();
                if self.failures == 1 && last.generation.is_some() && last.trouble.is_none() {
                    return Outcome::Unheard;
                }
                state.trouble = Some(Trouble::new(error.reason(), error.to_string()));
                return Outcome::Reached(state);
            }
        };
        self.failures = 0;
        let plan = plan(&desired, &observed).first(&self.owned);
        let last = self.publish.borrow().generation;
        if last.is_none() {
            let (found, steps) = (observed.ledger.len(), plan.changes.len());
            info!(found, steps, "services of ours found in the kernel, steps to what they should be");
        }
        // Once all was as desired, only others can have changed it.
        if is_robbed && last == Some(*generation) && self.reported.is_none() && !plan.changes.is_empty() {
            state.repairs += 1;
        }
        let mut mirror = observed;
        let mut refused = BTreeMap::new();
        let mut failed: BTreeMap<usize, Trouble> = BTreeMap::new();
        let mut taken = 0;
        let conflicts: BTreeSet<ServiceKey> = plan.conflicts.iter().copied().collect();
        let mut since = *self.under_way.get_or_insert_with(Instant::now);
        let failures = take(&mut self.dataplane, &plan.changes, &mut taken, |rest| {
            if since.elapsed() >= LONG {
                since = Instant::now();
                self.publish.send_modify(|state| state.tell_of(&desired.ledger, &conflicts, rest));
            }
            self.newest.load(Ordering::Acquire) > *generation
        });
        self.under_way = Some(since);
        for (index, error) in failures {
            let trouble = Trouble::new(error.reason(), error.to_string());
            if let DataplaneError::SchedulerUnavailable { scheduler, .. } = error {
                self.lacking.insert(scheduler, trouble.clone());
            }
            failed.insert(index, trouble);
        }
        for (index, change) in plan.changes.iter().enumerate().take(taken) {
            match (failed.get(&index), change.key()) {
                (None, _) => mirror.apply(change),
                // The first failure is the cause of those after it.
                (Some(trouble), Some(key)) => {
                    refused.entry(*key).or_insert_with(|| trouble.clone());
                }
                (Some(trouble), None) => state.trouble = Some(trouble.clone()),
            }
        }
        let mut ledger = Along::new(mirror.ledger.iter().map(|key| (key, ())));
        let mut services = Along::new(&mirror.services);
        let present = desired.ledger.iter().filter(|key| {
            ledger.at(key).is_some()
                && services.at(key).is_some()
                && !refused.contains_key(key)
                && !conflicts.contains(key)
        });
        state.present = Arc::new(present.copied().collect());
        state.conflicts = Arc::new(conflicts);
        state.refused = Arc::new(refused);
        // What was refused before, and read since, says nothing new about the rest.
        let news = !whole && state.refused.keys().any(|key| !self.doubtful.contains(key));
        self.doubtful = state.refused.keys().copied().collect();
        self.mirror =
            (state.trouble.is_none() && !news).then_some(mirror).and_then(|mirror| self.reread(mirror));
        match taken == plan.changes.len() {
            true => Outcome::Reached(state),
            false => Outcome::Overtaken,
        }
    }

    /// What a refused step has left of its service is not what was known of it.
    fn reread(&mut self, mut mirror: Tables) -> Option<Tables> {
        if !self.doubtful.is_empty() {
            let found = self.dataplane.services(&self.doubtful).ok()?;
            mirror.replace(&self.doubtful, found);
        }
        Some(mirror)
    }

    fn conclude(&mut self, state: Programmed) -> bool {
        self.under_way = None;
        let words = state
            .trouble
            .as_ref()
            .map(|t| t.message.clone())
            .or_else(|| state.refused.values().next().map(|t| t.message.clone()));
        let done = words.is_none();
        if words != self.reported {
            match &words {
                Some(words) => warn!("{words}; retrying"),
                None => info!("the dataplane is as it should be"),
            }
            self.reported = words;
        }
        self.publish.send_replace(state);
        done
    }
}

/// Takes steps in portions until they are all taken or `stop`, given those that are left, says so after one. `taken` counts
/// those that were tried; the failed ones are returned by their index. A portion keeps from steps that depend on a failed one
/// of an earlier portion.
fn take(
    dataplane: &mut impl Dataplane,
    changes: &[Change],
    taken: &mut usize,
    mut stop: impl FnMut(&[Change]) -> bool,
) -> Vec<(usize, DataplaneError)> {
    let mut failures = Vec::new();
    let mut blocked: BTreeSet<ServiceKey> = BTreeSet::new();
    for (n, portion) in changes.chunks(AT_ONCE).enumerate() {
        if n > 0 && stop(changes.get(*taken..).unwrap_or_default()) {
            break;
        }
        let is_vain = |change: &Change| change.key().is_some_and(|key| blocked.contains(key));
        let (vain, steps): (Vec<usize>, Vec<usize>) =
            (*taken..*taken + portion.len()).partition(|index| changes.get(*index).is_some_and(is_vain));
        let tried: Cow<'_, [Change]> = match vain.is_empty() {
            true => Cow::Borrowed(portion),
            false => portion.iter().filter(|change| !is_vain(change)).cloned().collect(),
        };
        for (at, error) in dataplane.apply(&tried) {
            let (Some(index), Some(change)) = (steps.get(at), tried.get(at)) else { continue };
            blocked.extend(change.key().filter(|_| blocks(change)));
            failures.push((*index, error));
        }
        for index in vain {
            failures.extend(changes.get(index).map(|c| (index, DataplaneError::Skipped(c.clone()))));
        }
        *taken += portion.len();
    }
    failures
}

/// What is desired with the default scheduler in place of those that the kernel lacks, and which services that concerns.
fn substitute<'a>(
    desired: &'a Tables,
    lacking: &BTreeMap<String, Trouble>,
) -> (Cow<'a, Tables>, BTreeMap<ServiceKey, Trouble>) {
    let default = Scheduler::default().as_str();
    let mut substituted = BTreeMap::new();
    for (key, service) in &desired.services {
        if let Some(trouble) = lacking.get(&service.settings.scheduler) {
            let message = format!("{}; until then {default} is used", trouble.message);
            substituted.insert(*key, Trouble::new(trouble.reason, message));
        }
    }
    if substituted.is_empty() {
        return (Cow::Borrowed(desired), substituted);
    }
    let mut tables = desired.clone();
    for key in substituted.keys() {
        if let Some(service) = tables.services.get_mut(key) {
            default.clone_into(&mut service.settings.scheduler);
        }
    }
    (Cow::Owned(tables), substituted)
}

#[cfg(test)]
mod tests;
