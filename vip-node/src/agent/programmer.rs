//! The thread that keeps the kernel as it should be: applies differences, watches for foreign flushes, retries.
//!
//! Netlink calls block, so they have a thread of their own and never delay what the agent says to vrrp.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{info, warn};
use vip_core::api::Reason;
use vip_core::desired::Trouble;
use vip_core::plan::{Change, ServiceKey, Tables, plan};

use crate::dataplane::Dataplane;

/// How often one of our entries is looked up: kube-proxy in nftables mode flushes the whole IPVS table at its start.
const SENTINEL: Duration = Duration::from_millis(200);
/// How often everything is compared, for what the sentinel cannot see.
const AUDIT: Duration = Duration::from_secs(10);
/// First and longest pause after a failure.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// What the kernel holds of ours.
#[derive(Clone, Debug, Default)]
pub struct Programmed {
    /// The last desired tables that were worked on; `None` until there was a first attempt.
    pub generation: Option<u64>,
    /// Virtual services that are in the kernel, ours and as desired.
    pub present: Arc<BTreeSet<ServiceKey>>,
    /// Virtual services of ours that another program holds.
    pub conflicts: Arc<BTreeSet<ServiceKey>>,
    /// Virtual services that the kernel refused, with its words.
    pub refused: Arc<BTreeMap<ServiceKey, String>>,
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
    Desire(u64, Tables),
    /// Remove all that is ours, then end.
    Clear,
}

/// The handle of the thread.
pub struct Programmer {
    commands: Sender<Command>,
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
        let thread = std::thread::Builder::new().name("programmer".into()).spawn(move || {
            Worker { dataplane, publish, desired: None, mirror: None, retry: RETRY.0, reported: None }.run(&inbox);
        })?;
        Ok(Self { commands, state, thread })
    }

    /// States what the kernel should hold from now on.
    pub fn desire(&self, generation: u64, tables: Tables) {
        // The thread ends only after `clear`, which consumes the handle.
        let _ = self.commands.send(Command::Desire(generation, tables));
    }

    /// What the kernel holds; changes wake the receiver.
    pub fn state(&self) -> watch::Receiver<Programmed> {
        self.state.clone()
    }

    /// Removes all that is ours from the kernel and ends the thread.
    pub fn clear(self) {
        let _ = self.commands.send(Command::Clear);
        let _ = self.thread.join();
    }
}

struct Worker<D> {
    dataplane: D,
    publish: watch::Sender<Programmed>,
    desired: Option<(u64, Tables)>,
    /// The kernel as we left it; `None` when it has to be read.
    mirror: Option<Tables>,
    retry: Duration,
    /// The trouble that was logged last, to say each once.
    reported: Option<String>,
}

impl<D: Dataplane> Worker<D> {
    fn run(mut self, inbox: &Receiver<Command>) {
        let mut audit = Instant::now() + AUDIT;
        let mut again: Option<Instant> = None;
        loop {
            let command = match inbox.recv_timeout(SENTINEL) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            // Only the newest word counts.
            let mut newest = command;
            while !matches!(newest, Some(Command::Clear)) {
                match inbox.try_recv() {
                    Ok(command) => newest = Some(command),
                    Err(_) => break,
                }
            }
            let mut work = again.is_some_and(|at| Instant::now() >= at);
            match newest {
                Some(Command::Desire(generation, tables)) => {
                    self.desired = Some((generation, tables));
                    work = true;
                }
                Some(Command::Clear) => {
                    if let Err(error) = self.dataplane.remove_everything() {
                        warn!(%error, "not everything of ours could be removed from the kernel");
                    }
                    return;
                }
                None => {}
            }
            if Instant::now() >= audit {
                audit = Instant::now() + AUDIT;
                self.mirror = None;
                work = true;
            } else if !work && again.is_none() && self.is_lost() {
                info!("entries of ours are gone from the kernel, putting them back");
                self.mirror = None;
                work = true;
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

    /// Whether one of our entries is missing. Any error counts: the full look that follows will say more.
    fn is_lost(&mut self) -> bool {
        let Some(key) = self.mirror.as_ref().and_then(|mirror| mirror.ledger.first().copied()) else { return false };
        !matches!(self.dataplane.sentinel(&key), Ok(true))
    }

    /// Brings the kernel to what is desired; whether nothing is left to retry. Publishes only what holds afterwards,
    /// so that a repair in between does not look like a loss.
    fn attempt(&mut self) -> bool {
        let Some((generation, desired)) = &self.desired else { return true };
        let mut state = Programmed { generation: Some(*generation), ..Programmed::default() };
        let observed = match self.mirror.take().map_or_else(|| self.dataplane.observe(), Ok) {
            Ok(observed) => observed,
            Err(error) => {
                state.trouble = Some(Trouble::new(error.reason(), error.to_string()));
                return self.conclude(state);
            }
        };
        let plan = plan(desired, &observed);
        let failures = self.dataplane.apply(&plan.changes);
        let mut mirror = observed;
        let mut refused = BTreeMap::new();
        let failed: BTreeMap<usize, String> = failures.into_iter().map(|(index, error)| (index, error.to_string())).collect();
        for (index, change) in plan.changes.iter().enumerate() {
            match (failed.get(&index), service_of(change)) {
                (None, _) => mirror.apply(change),
                (Some(words), Some(key)) => {
                    refused.insert(key, words.clone());
                }
                (Some(words), None) => state.trouble = Some(Trouble::new(Reason::KernelRefused, words.clone())),
            }
        }
        let conflicts: BTreeSet<ServiceKey> = plan.conflicts.into_iter().collect();
        let present = desired.ledger.iter().filter(|key| {
            mirror.ledger.contains(key) && mirror.services.contains_key(key) && !refused.contains_key(key) && !conflicts.contains(key)
        });
        state.present = Arc::new(present.copied().collect());
        state.conflicts = Arc::new(conflicts);
        state.refused = Arc::new(refused);
        // After a refusal the mirror may be wrong in more than that one entry.
        self.mirror = failed.is_empty().then_some(mirror);
        self.conclude(state)
    }

    fn conclude(&mut self, state: Programmed) -> bool {
        let words = state.trouble.as_ref().map(|t| t.message.clone()).or_else(|| state.refused.values().next().cloned());
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

/// The virtual service that a change is about; guards are about a whole address.
fn service_of(change: &Change) -> Option<ServiceKey> {
    match change {
        Change::Guard(_) | Change::Unguard(_) => None,
        Change::Open(key)
        | Change::AddService(key, _)
        | Change::SetService(key, _)
        | Change::AddDestination(key, ..)
        | Change::SetDestination(key, ..)
        | Change::DeleteDestination(key, _)
        | Change::DeleteService(key)
        | Change::Close(key) => Some(*key),
    }
}
