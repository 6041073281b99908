//! The thread that keeps the kernel as it should be: applies differences, watches for foreign flushes, retries.
//!
//! Netlink calls block, so they have a thread of their own and never delay what the agent says to vrrp.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{info, warn};
use vip_core::api::Scheduler;
use vip_core::desired::Trouble;
use vip_core::plan::{Along, Change, ServiceKey, Tables, plan};

use super::audit::{Audit, Seen};
use super::census::{Census, Counts};
use crate::dataplane::{Dataplane, DataplaneError, blocks};

/// How often one of our entries is looked up: kube-proxy in nftables mode flushes the whole IPVS table at its start. Two
/// small messages to the kernel each time.
const SENTINEL: Duration = Duration::from_millis(50);
/// First and longest pause after a failure.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// Steps between two looks at whether something newer is desired: some 20 ms, or a second where the kernel is slow because
/// its table was flushed.
const AT_ONCE: usize = 512;

/// What the kernel holds of ours.
#[derive(Clone, Debug, Default)]
pub struct Programmed {
    /// The last desired tables that were worked on; `None` until there was a first attempt.
    pub generation: Option<u64>,
    /// Virtual services that are in the kernel, ours and as desired.
    pub present: Arc<BTreeSet<ServiceKey>>,
    /// Virtual services of ours that another program holds.
    pub conflicts: Arc<BTreeSet<ServiceKey>>,
    /// Virtual services that the kernel refused, and why.
    pub refused: Arc<BTreeMap<ServiceKey, Trouble>>,
    /// Virtual services that are served by the default scheduler because the kernel lacks theirs.
    pub substituted: Arc<BTreeMap<ServiceKey, Trouble>>,
    /// Chains of the node's own firewall that drop by default.
    pub firewalls: Arc<BTreeSet<String>>,
    /// Open connections to what is behind the addresses that are bound here. Of the moment: that they change wakes nobody.
    pub connections: Arc<Counts>,
    /// What keeps this node from being programmed at all.
    pub trouble: Option<Trouble>,
}

impl Programmed {
    /// Whether all of these virtual services are served by this kernel.
    pub fn serves(&self, keys: &[ServiceKey]) -> bool {
        self.trouble.is_none() && keys.iter().all(|key| self.present.contains(key))
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
        let (publish, state) = watch::channel(Programmed::default());
        let worker = Worker::new(dataplane, publish);
        let newest = Arc::clone(&worker.newest);
        let thread =
            std::thread::Builder::new().name("programmer".into()).spawn(move || worker.run(&inbox))?;
        Ok(Self { commands, newest, state, thread })
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
    /// Compares everything with the mirror, for what the sentinel cannot see.
    audit: Audit,
    census: Census,
    /// When the sentinel looked last.
    watched: Instant,
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
            audit: Audit::new(),
            census: Census::new(),
            watched: Instant::now(),
            retry: RETRY.0,
            reported: None,
            failures: 0,
            firewalls: Arc::default(),
            lacking: BTreeMap::new(),
        }
    }

    /// Begins an audit; whether there is something to try again.
    fn begin_audit(&mut self) -> bool {
        self.audit.begin();
        let again = self.mirror.is_none() || !self.lacking.is_empty();
        self.lacking.clear();
        again
    }

    /// Takes the next piece of the audit; whether the kernel is not as it was known.
    fn look(&mut self) -> bool {
        let Some(mirror) = &self.mirror else { return false };
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
            let audits = self.mirror.is_some() && self.audit.is_under_way();
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
                self.watched = Instant::now();
                if self.is_lost() {
                    info!("entries of ours are gone from the kernel, putting them back");
                    self.mirror = None;
                    work = true;
                }
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

    /// Whether one of our entries is missing. Any error counts: the full look that follows will say more. Asked of what
    /// was there last, also while something else waits to be tried again.
    fn is_lost(&mut self) -> bool {
        let Some(key) = self.publish.borrow().present.first().copied() else { return false };
        !matches!(self.dataplane.sentinel(&key), Ok(true))
    }

    /// Brings the kernel to what is desired; whether nothing is left to retry. Publishes only what holds afterwards,
    /// so that a repair in between does not look like a loss.
    fn attempt(&mut self) -> bool {
        loop {
            let known = self.lacking.len();
            let outcome = self.approach();
            match outcome {
                // What is desired now is in the inbox.
                Outcome::Overtaken => return true,
                // A scheduler that has turned out to be missing is replaced at once.
                _ if self.lacking.len() != known => {}
                Outcome::Unheard => return false,
                Outcome::Reached(state) => return self.conclude(state),
            }
        }
    }

    /// Takes the steps to what is desired, as far as the kernel has the schedulers, and tells what holds then.
    /// Stops on the way when something newer is desired: the order of the plan allows it everywhere.
    fn approach(&mut self) -> Outcome {
        let Some((generation, desired)) = self.desired.as_ref() else { return Outcome::Unheard };
        let known = self.mirror.take();
        let (desired, substituted) = substitute(desired, &self.lacking);
        let mut state = Programmed {
            generation: Some(*generation),
            substituted: Arc::new(substituted),
            firewalls: Arc::clone(&self.firewalls),
            connections: self.census.counts(),
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
        if self.publish.borrow().generation.is_none() {
            let (found, steps) = (observed.ledger.len(), plan.changes.len());
            info!(found, steps, "services of ours found in the kernel, steps to what they should be");
        }
        let mut mirror = observed;
        let mut refused = BTreeMap::new();
        let mut failed: BTreeMap<usize, Trouble> = BTreeMap::new();
        let mut taken = 0;
        for (index, error) in take(&mut self.dataplane, &plan.changes, &mut taken, || {
            self.newest.load(Ordering::Acquire) > *generation
        }) {
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
        let conflicts: BTreeSet<ServiceKey> = plan.conflicts.into_iter().collect();
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
        // After a refusal the mirror may be wrong in more than that one entry.
        self.mirror = failed.is_empty().then_some(mirror);
        match taken == plan.changes.len() {
            true => Outcome::Reached(state),
            false => Outcome::Overtaken,
        }
    }

    fn conclude(&mut self, state: Programmed) -> bool {
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

/// Takes steps in portions until they are all taken or `stop` says so after one. `taken` counts those that were tried; the
/// failed ones are returned by their index. A portion keeps from steps that depend on a failed one of an earlier portion.
fn take(
    dataplane: &mut impl Dataplane,
    changes: &[Change],
    taken: &mut usize,
    stop: impl Fn() -> bool,
) -> Vec<(usize, DataplaneError)> {
    let mut failures = Vec::new();
    let mut blocked: BTreeSet<ServiceKey> = BTreeSet::new();
    for (n, portion) in changes.chunks(AT_ONCE).enumerate() {
        if n > 0 && stop() {
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
mod tests {
    use super::*;
    use crate::dataplane::Recorder;
    use vip_core::api::Reason;
    use vip_core::plan::{Protocol, Settings, VirtualService};

    fn key(port: u16) -> ServiceKey {
        ServiceKey { address: [10, 87, 2, 50].into(), protocol: Protocol::Tcp, port }
    }

    /// One service on port 80 with that many destinations.
    fn tables(destinations: u8) -> Tables {
        let mut tables = Tables::default();
        tables.guarded.insert(key(80).address);
        tables.ledger.insert(key(80));
        let destinations = (1..=destinations).map(|n| (([10, 244, 1, n], 8080).into(), 1)).collect();
        let settings = Settings::new(Scheduler::Wlc, None);
        tables.services.insert(key(80), VirtualService { settings, destinations });
        tables
    }

    fn wait(programmer: &Programmer, what: impl Fn(&Programmed) -> bool) -> Programmed {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let state = programmer.state().borrow().clone();
            if what(&state) {
                return state;
            }
            assert!(Instant::now() < deadline, "not in time: {state:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn until(what: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !what() {
            assert!(Instant::now() < deadline, "not in time");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn worker(kernel: &Recorder, desired: Tables) -> Worker<Recorder> {
        let mut worker = Worker::new(kernel.clone(), watch::channel(Programmed::default()).0);
        worker.desired = Some((1, Arc::new(desired)));
        worker
    }

    /// A whole audit, and what follows from it.
    fn audit(worker: &mut Worker<Recorder>) {
        let mut work = worker.begin_audit();
        while !work && worker.audit.is_under_way() {
            work = worker.look();
        }
        assert!(work && worker.attempt());
    }

    #[test]
    fn one_endpoint_more_is_one_message_more() {
        let kernel = Recorder::default();
        let programmer = Programmer::start(kernel.clone()).unwrap();
        programmer.desire(1, Arc::new(tables(3)));
        let state = wait(&programmer, |s| s.generation == Some(1));
        assert!(state.serves(&[key(80)]));
        wait(&programmer, |s| *s.firewalls == kernel.clone().firewalls().unwrap());
        kernel.forget();
        programmer.desire(2, Arc::new(tables(4)));
        wait(&programmer, |s| s.generation == Some(2));
        assert_eq!(kernel.forget(), [Change::AddDestination(key(80), ([10, 244, 1, 4], 8080).into(), 1)]);
        programmer.clear();
        assert_eq!(kernel.tables(), Tables::default());
    }

    #[test]
    fn a_successor_finds_everything_and_sends_nothing() {
        let kernel = Recorder::new(tables(3));
        let programmer = Programmer::start(kernel.clone()).unwrap();
        programmer.desire(1, Arc::new(tables(3)));
        wait(&programmer, |s| s.serves(&[key(80)]));
        assert_eq!(kernel.applied(), []);
    }

    #[test]
    fn what_others_flush_is_put_back_and_never_looks_lost() {
        let kernel = Recorder::default();
        let programmer = Programmer::start(kernel.clone()).unwrap();
        programmer.desire(1, Arc::new(tables(3)));
        wait(&programmer, |s| s.serves(&[key(80)]));
        // The rules of others are looked at once our entries are there.
        wait(&programmer, |s| !s.firewalls.is_empty());
        let mut states = programmer.state();
        kernel.meddle(|tables| tables.services.clear());
        until(|| kernel.tables() == tables(3));
        assert!(states.borrow_and_update().serves(&[key(80)]));
    }

    #[test]
    fn what_is_bound_here_is_put_back_first() {
        let kernel = Recorder::default();
        let mut wanted = tables(1);
        let mine = ServiceKey { address: [10, 87, 2, 99].into(), ..key(80) };
        wanted.ledger.insert(mine);
        wanted.services.insert(mine, wanted.services[&key(80)].clone());
        let mut worker = worker(&kernel, wanted);
        worker.owned.insert(mine.address);
        assert!(worker.attempt());
        kernel.meddle(|tables| tables.services.clear());
        kernel.forget();
        audit(&mut worker);
        let order: Vec<ServiceKey> =
            kernel.forget().iter().filter_map(|change| change.key().copied()).collect();
        assert_eq!(order, [mine, mine, key(80), key(80)]);
    }

    #[test]
    fn an_entry_of_somebody_else_is_reported_and_left_alone() {
        let mut foreign = tables(1);
        foreign.ledger.clear();
        foreign.guarded.clear();
        let kernel = Recorder::new(foreign.clone());
        let programmer = Programmer::start(kernel.clone()).unwrap();
        programmer.desire(1, Arc::new(tables(3)));
        let state = wait(&programmer, |s| s.generation == Some(1));
        assert!(state.conflicts.contains(&key(80)) && !state.serves(&[key(80)]));
        assert_eq!(kernel.tables().services, foreign.services);
    }

    #[test]
    fn a_kernel_without_ipvs_is_a_trouble_until_it_has_it() {
        let kernel = Recorder::default();
        kernel.fail(Some(DataplaneError::IpvsUnavailable));
        let programmer = Programmer::start(kernel.clone()).unwrap();
        programmer.desire(1, Arc::new(tables(3)));
        let state = wait(&programmer, |s| s.generation == Some(1));
        assert_eq!(state.trouble.as_ref().map(|t| t.reason), Some(Reason::IPVSUnavailable));
        assert!(!state.serves(&[]));
        kernel.fail(None);
        wait(&programmer, |s| s.serves(&[key(80)]));
    }

    #[test]
    fn connections_are_counted_for_some_services_at_a_time_and_only_of_what_is_bound_here() {
        let kernel = Recorder::default();
        let mut wanted = many(40);
        let other = ServiceKey { address: [10, 87, 2, 99].into(), ..key(80) };
        wanted.ledger.insert(other);
        wanted.services.insert(other, wanted.services[&key(1000)].clone());
        let mut worker = worker(&kernel, wanted);
        assert!(worker.attempt());
        worker.owned.insert(key(80).address);
        let mut state = worker.publish.subscribe();
        let mut counted = || {
            worker.count();
            let all =
                worker.publish.borrow().connections.keys().map(|(key, _)| *key).collect::<BTreeSet<_>>();
            (all.len(), all.contains(&key(1000)), all.contains(&other))
        };
        assert_eq!(counted(), (32, true, false));
        assert_eq!(counted(), (40, true, false), "those that are left, and the first again");
        assert!(!state.has_changed().unwrap(), "nobody is woken for it");
        worker.owned.clear();
        worker.count();
        assert!(state.borrow_and_update().connections.is_empty());
    }

    #[test]
    fn one_failed_look_is_not_a_trouble_yet() {
        let kernel = Recorder::default();
        let mut worker = worker(&kernel, tables(1));
        assert!(worker.attempt());
        worker.mirror = None;
        kernel.fail(Some(DataplaneError::IpvsUnavailable));
        assert!(!worker.attempt());
        assert!(worker.publish.borrow().serves(&[key(80)]));
        assert!(!worker.attempt());
        assert!(!worker.publish.borrow().serves(&[key(80)]));
    }

    #[test]
    fn one_refused_service_does_not_keep_the_others_out() {
        let kernel = Recorder::default();
        kernel.refuse(key(81), true);
        let mut wanted = tables(1);
        wanted.ledger.insert(key(81));
        wanted.services.insert(key(81), VirtualService::default());
        let programmer = Programmer::start(kernel.clone()).unwrap();
        programmer.desire(1, Arc::new(wanted));
        let state = wait(&programmer, |s| s.generation == Some(1));
        assert!(state.serves(&[key(80)]) && !state.serves(&[key(81)]));
        kernel.meddle(|tables| tables.services.clear());
        until(|| kernel.tables().services.contains_key(&key(80)));
        kernel.refuse(key(81), false);
        wait(&programmer, |s| s.serves(&[key(81)]));
    }

    #[test]
    fn a_missing_scheduler_is_replaced_until_it_is_there() {
        let kernel = Recorder::default();
        kernel.lack(Some("mh"));
        let mut wanted = tables(2);
        wanted.services.get_mut(&key(80)).unwrap().settings.scheduler = "mh".to_owned();
        let mut worker = worker(&kernel, wanted.clone());
        assert!(worker.attempt());
        assert_eq!(kernel.tables(), tables(2));
        let state = worker.publish.borrow().clone();
        assert!(state.serves(&[key(80)]) && state.refused.is_empty());
        let trouble = &state.substituted[&key(80)];
        assert_eq!(trouble.reason, Reason::SchedulerUnavailable);
        assert!(trouble.message.ends_with("; until then wlc is used"), "{}", trouble.message);
        kernel.lack(None);
        kernel.forget();
        audit(&mut worker);
        assert_eq!((kernel.tables(), kernel.forget().len()), (wanted, 1));
        assert!(worker.publish.borrow().substituted.is_empty());
    }

    /// Services on that many ports from 1,000 on, with four destinations each.
    fn many(services: u16) -> Tables {
        let service = tables(4).services[&key(80)].clone();
        let services: BTreeMap<_, _> = (0..services).map(|n| (key(1000 + n), service.clone())).collect();
        let ledger = services.keys().copied().collect();
        Tables { services, ledger, ..tables(0) }
    }

    #[test]
    fn what_is_newer_is_taken_up_in_the_middle_of_a_refill() {
        let kernel = Recorder::default();
        let mut worker = worker(&kernel, many(1000));
        worker.newest.store(2, Ordering::Release);
        assert!(worker.attempt());
        assert_eq!(kernel.forget().len(), AT_ONCE);
        assert_eq!(worker.publish.borrow().generation, None);
        worker.desired = Some((2, Arc::new(tables(3))));
        assert!(worker.attempt());
        assert_eq!(kernel.tables(), tables(3));
        assert_eq!(worker.publish.borrow().generation, Some(2));
    }

    #[test]
    fn a_change_waits_for_one_piece_of_an_audit_and_the_audit_goes_on() {
        let kernel = Recorder::default();
        let mut worker = worker(&kernel, many(1000));
        assert!(worker.attempt());
        let (first, last, other) = (key(1000), key(1999), ([10, 245, 0, 1], 80).into());
        kernel.meddle(|tables| tables.services.get_mut(&last).unwrap().destinations.clear());
        kernel.forget();
        assert!(!worker.begin_audit());
        assert!(!worker.look() && !worker.look(), "the first services are as they should be");
        let mut wanted = many(1000);
        wanted.services.get_mut(&first).unwrap().destinations.insert(other, 1);
        worker.desired = Some((2, Arc::new(wanted.clone())));
        assert!(worker.attempt());
        assert_eq!(kernel.forget(), [Change::AddDestination(first, other, 1)]);
        while !worker.look() {
            assert!(worker.audit.is_under_way(), "the last service was not looked at");
        }
        assert!(worker.attempt());
        assert_eq!((kernel.forget().len(), kernel.tables()), (4, wanted));
    }

    #[test]
    fn a_flush_in_the_middle_of_an_audit_is_no_refusal() {
        let kernel = Recorder::default();
        let mut worker = worker(&kernel, many(1000));
        assert!(worker.attempt());
        assert!(!worker.begin_audit() && !worker.look());
        kernel.meddle(|tables| tables.services.clear());
        assert!(worker.look() && worker.attempt());
        assert_eq!(kernel.tables(), many(1000));
        assert!(worker.publish.borrow().refused.is_empty());
    }

    #[test]
    fn a_refusal_keeps_from_what_depends_on_it_in_later_portions() {
        let kernel = Recorder::default();
        kernel.refuse(key(1000), true);
        let mut worker = worker(&kernel, many(1000));
        assert!(!worker.attempt());
        let mut others = many(1000);
        others.services.remove(&key(1000));
        others.ledger.remove(&key(1000));
        assert_eq!(kernel.tables(), others);
        let state = worker.publish.borrow().clone();
        assert!(state.refused[&key(1000)].message.ends_with("as the test wants"));
    }

    #[test]
    fn a_thousand_endpoints_that_come_and_go_and_five_thousand_services_deleted_at_once() {
        let kernel = Recorder::default();
        let programmer = Programmer::start(kernel.clone()).unwrap();
        let mut crowd = many(5000);
        programmer.desire(1, Arc::new(crowd.clone()));
        let some: Vec<_> =
            (0..1000u32).map(|n| (([10, 245, (n / 250) as u8, (n % 250) as u8], 80).into(), 1)).collect();
        for generation in 2..12 {
            let destinations = &mut crowd.services.get_mut(&key(1000)).unwrap().destinations;
            match generation % 2 {
                0 => destinations.extend(some.iter().copied()),
                _ => destinations.retain(|to, _| some.iter().all(|(other, _)| other != to)),
            }
            programmer.desire(generation, Arc::new(crowd.clone()));
        }
        wait(&programmer, |s| s.generation == Some(11));
        assert_eq!(kernel.tables(), many(5000));
        programmer.desire(12, Arc::new(tables(1)));
        wait(&programmer, |s| s.generation == Some(12));
        assert_eq!(kernel.tables(), tables(1));
    }
}
