//! The dataplane of a real node: IPVS, our nftables table and the sysctls, put together.

use std::collections::BTreeSet;
use std::path::PathBuf;

use vip_core::plan::{Change, ServiceKey, Tables};

use super::ipvs::Ipvs;
use super::nat::{Element, Nat};
use super::{Dataplane, DataplaneError, blocks, sysctl};

/// The kernel of this network namespace (of the thread that opens the sockets: the first call does).
#[derive(Debug)]
pub struct Kernel {
    sysctls: PathBuf,
    ipvs: Option<Ipvs>,
    nat: Option<Nat>,
    /// What our sets held when a socket was given up.
    known: BTreeSet<Element>,
}

impl Kernel {
    /// Does nothing yet. `sysctls`: where `/proc/sys/net` can be written.
    pub fn new(sysctls: impl Into<PathBuf>) -> Self {
        Self { sysctls: sysctls.into(), ipvs: None, nat: None, known: BTreeSet::new() }
    }

    fn ipvs(&mut self) -> Result<&mut Ipvs, DataplaneError> {
        let ipvs = match self.ipvs.take() {
            Some(ipvs) => ipvs,
            None => Ipvs::open()?,
        };
        Ok(self.ipvs.insert(ipvs))
    }

    fn nat(&mut self) -> Result<&mut Nat, DataplaneError> {
        let nat = match self.nat.take() {
            Some(nat) => nat,
            None => Nat::open(std::mem::take(&mut self.known))?,
        };
        Ok(self.nat.insert(nat))
    }

    /// Gives the sockets up when something went wrong: an answer may still be on its way.
    fn checked<T>(&mut self, result: Result<T, DataplaneError>) -> Result<T, DataplaneError> {
        if result.is_err() {
            self.ipvs = None;
            self.known = self.nat.take().map(Nat::into_known).unwrap_or_default();
        }
        result
    }

    fn try_observe(&mut self) -> Result<Tables, DataplaneError> {
        self.ipvs()?;
        sysctl::set(&self.sysctls)?;
        let (guarded, ledger) = self.nat()?.observe()?;
        let services = self.ipvs()?.observe(&ledger)?;
        Ok(Tables { services, ledger, guarded })
    }

    fn try_sentinel(&mut self, key: &ServiceKey) -> Result<bool, DataplaneError> {
        Ok(self.ipvs()?.service(key)?.is_some() && self.nat()?.is_there()?)
    }

    fn try_remove_everything(&mut self) -> Result<(), DataplaneError> {
        let (_, ledger) = self.nat()?.observe()?;
        let deletions: Vec<Change> = ledger.into_iter().map(Change::DeleteService).collect();
        let failed = match self.ipvs() {
            // Without IPVS there are no services.
            Err(DataplaneError::IpvsUnavailable) => Vec::new(),
            Err(error) => return Err(error),
            Ok(ipvs) => ipvs.apply(&deletions.iter().collect::<Vec<_>>())?,
        };
        match failed.into_iter().next() {
            // The ledger has to stay as long as something of ours does.
            Some((_, error)) => Err(error),
            None => self.nat()?.remove(),
        }
    }

    /// Takes steps of one kind. Each that fails is returned by its place in `changes`.
    fn run(&mut self, kind: Kind, changes: &[&Change]) -> Vec<(usize, DataplaneError)> {
        let result = match kind {
            Kind::Ipvs => self.ipvs().and_then(|ipvs| ipvs.apply(changes)),
            Kind::Nat => self.nat().and_then(|nat| nat.apply(changes)),
        };
        match self.checked(result) {
            Ok(failed) => failed,
            Err(error) => (0..changes.len()).map(|index| (index, error.clone())).collect(),
        }
    }
}

/// Which table a step is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ipvs,
    Nat,
}

fn kind(change: &Change) -> Kind {
    match change {
        Change::Guard(_) | Change::Unguard(_) | Change::Open(_) | Change::Close(_) => Kind::Nat,
        Change::AddService(..)
        | Change::SetService(..)
        | Change::DeleteService(_)
        | Change::AddDestination(..)
        | Change::SetDestination(..)
        | Change::DeleteDestination(..) => Kind::Ipvs,
    }
}

impl Dataplane for Kernel {
    fn observe(&mut self) -> Result<Tables, DataplaneError> {
        let result = self.try_observe();
        self.checked(result)
    }

    fn apply(&mut self, changes: &[Change]) -> Vec<(usize, DataplaneError)> {
        let mut failures = Vec::new();
        let mut blocked: BTreeSet<ServiceKey> = BTreeSet::new();
        let mut start = 0;
        // A plan has three runs: nftables, IPVS, nftables.
        for run in changes.chunk_by(|a, b| kind(a) == kind(b)) {
            let Some(first) = run.first() else { continue };
            let (indices, steps): (Vec<usize>, Vec<&Change>) = (start..)
                .zip(run)
                .filter(|(_, change)| !change.key().is_some_and(|key| blocked.contains(key)))
                .unzip();
            let tried: BTreeSet<usize> = indices.iter().copied().collect();
            let skipped = (start..).zip(run).filter(|(index, _)| !tried.contains(index));
            failures.extend(skipped.map(|(index, change)| (index, DataplaneError::Skipped(change.clone()))));
            let mut unmade = Vec::new();
            for (n, error) in self.run(kind(first), &steps) {
                let (Some(index), Some(change)) = (indices.get(n), steps.get(n)) else { continue };
                let known = change.key().filter(|key| blocked.contains(key));
                let error = known.map_or(error, |_| DataplaneError::Skipped((*change).clone()));
                failures.push((*index, error));
                blocked.extend(change.key().filter(|_| blocks(change)));
                if let Change::AddService(key, _) = change {
                    unmade.push(Change::Close(*key));
                }
            }
            // What could not be made is not ours: its port is shut again. Should that fail too, the next plan sees it.
            if !unmade.is_empty() {
                self.run(Kind::Nat, &unmade.iter().collect::<Vec<_>>());
            }
            start += run.len();
        }
        failures.sort_by_key(|(index, _)| *index);
        failures
    }

    fn sentinel(&mut self, key: &ServiceKey) -> Result<bool, DataplaneError> {
        let result = self.try_sentinel(key);
        self.checked(result)
    }

    fn remove_everything(&mut self) -> Result<(), DataplaneError> {
        let result = self.try_remove_everything();
        self.checked(result)
    }
}
