//! A dataplane in memory: holds what it was told, remembers every step, and fails on demand. For tests.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vip_core::plan::{Change, ServiceKey, Tables};

use super::{Dataplane, DataplaneError, Destinations, Sight, blocks};

/// The model kernel. Clones share it, so that a test keeps one while the agent has the other.
#[derive(Clone, Debug, Default)]
pub struct Recorder(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    tables: Tables,
    applied: Vec<Change>,
    refused: BTreeSet<ServiceKey>,
    lacking: Option<String>,
    broken: Option<DataplaneError>,
    looks: usize,
}

impl Recorder {
    /// A kernel that holds something already.
    pub fn new(tables: Tables) -> Self {
        let this = Self::default();
        this.state().tables = tables;
        this
    }

    /// What it holds now.
    pub fn tables(&self) -> Tables {
        self.state().tables.clone()
    }

    /// All the steps taken since the start or since [`Recorder::forget`], in their order. Failed ones are not among them.
    pub fn applied(&self) -> Vec<Change> {
        self.state().applied.clone()
    }

    /// Empties the list of steps taken and returns it.
    pub fn forget(&self) -> Vec<Change> {
        std::mem::take(&mut self.state().applied)
    }

    /// How often it was looked at as a whole.
    pub fn looks(&self) -> usize {
        self.state().looks
    }

    /// Changes the tables behind the agent's back, as other programs do.
    pub fn meddle(&self, work: impl FnOnce(&mut Tables)) {
        work(&mut self.state().tables);
    }

    /// Refuses every step for a service from now on, or no longer.
    pub fn refuse(&self, key: ServiceKey, refuse: bool) {
        match refuse {
            true => self.state().refused.insert(key),
            false => self.state().refused.remove(&key),
        };
    }

    /// Has no scheduler of that name from now on, or all of them.
    pub fn lack(&self, scheduler: Option<&str>) {
        self.state().lacking = scheduler.map(str::to_owned);
    }

    /// Fails every call with an error from now on, or no longer.
    pub fn fail(&self, error: Option<DataplaneError>) {
        self.state().broken = error;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn working(&self) -> Result<(), DataplaneError> {
        self.broken.clone().map_or(Ok(()), Err)
    }

    /// What the kernel says of a step that makes no sense in the state that it is in.
    fn nonsense(&self, change: &Change) -> Option<&'static str> {
        let service = change.key().and_then(|key| self.tables.services.get(key));
        match (change, service) {
            (Change::SetService(..) | Change::AddDestination(..) | Change::SetDestination(..), None) => {
                Some("the virtual service is gone")
            }
            (Change::SetDestination(_, to, _), Some(service)) if !service.destinations.contains_key(to) => {
                Some("the destination is gone")
            }
            (Change::AddService(_, settings), Some(service)) if service.settings != *settings => {
                Some("another program has made a service at the same address and port")
            }
            _ => None,
        }
    }

    fn step(&mut self, change: &Change) -> Result<(), DataplaneError> {
        self.working()?;
        if change.key().is_some_and(|key| self.refused.contains(key)) {
            return Err(DataplaneError::Refused {
                change: change.clone(),
                text: "as the test wants".to_owned(),
            });
        }
        if let Change::AddService(_, settings) | Change::SetService(_, settings) = change
            && self.lacking.as_ref() == Some(&settings.scheduler)
        {
            let (scheduler, text) = (settings.scheduler.clone(), "as the test wants".to_owned());
            return Err(DataplaneError::SchedulerUnavailable { scheduler, text });
        }
        if let Some(text) = self.nonsense(change) {
            return Err(DataplaneError::Refused { change: change.clone(), text: text.to_owned() });
        }
        self.tables.apply(change);
        self.applied.push(change.clone());
        Ok(())
    }
}

impl Dataplane for Recorder {
    fn outline(&mut self) -> Result<Tables, DataplaneError> {
        let mut state = self.state();
        state.working()?;
        state.looks += 1;
        let mut tables = state.tables.clone();
        tables.services.values_mut().for_each(|service| service.destinations.clear());
        Ok(tables)
    }

    fn destinations(
        &mut self,
        keys: &[ServiceKey],
    ) -> Result<Vec<(ServiceKey, Destinations)>, DataplaneError> {
        let state = self.state();
        state.working()?;
        let its = |key: &ServiceKey| {
            let service = state.tables.services.get(key);
            (*key, service.map(|service| service.destinations.clone()).unwrap_or_default())
        };
        Ok(keys.iter().map(its).collect())
    }

    fn services(&mut self, keys: &BTreeSet<ServiceKey>) -> Result<Tables, DataplaneError> {
        let state = self.state();
        state.working()?;
        let mut tables = Tables { guarded: BTreeSet::new(), ..state.tables.clone() };
        tables.services.retain(|key, _| keys.contains(key));
        tables.ledger.retain(|key| keys.contains(key));
        tables.direct.retain(|key, _| keys.contains(key));
        tables.sources.retain(|key, _| keys.contains(key));
        Ok(tables)
    }

    fn connections(&mut self, key: &ServiceKey) -> Result<Destinations, DataplaneError> {
        // Each has one connection, as long as it may have new ones.
        let found = self.destinations(&[*key])?.pop().map(|(_, destinations)| destinations);
        Ok(found.unwrap_or_default().into_iter().filter(|(_, weight)| *weight > 0).collect())
    }

    fn apply(&mut self, changes: &[Change]) -> Vec<(usize, DataplaneError)> {
        let mut state = self.state();
        let mut failed = Vec::new();
        let mut blocked: BTreeSet<ServiceKey> = BTreeSet::new();
        for (index, change) in changes.iter().enumerate() {
            if change.key().is_some_and(|key| blocked.contains(key)) {
                failed.push((index, DataplaneError::Skipped(change.clone())));
            } else if let Err(error) = state.step(change) {
                failed.push((index, error));
                blocked.extend(change.key().filter(|_| blocks(change)));
            }
        }
        failed
    }

    fn sentinel(&mut self, key: &ServiceKey) -> Result<Sight, DataplaneError> {
        let state = self.state();
        state.working()?;
        Ok(if state.tables.services.contains_key(key) { Sight::Both } else { Sight::Table })
    }

    fn reread_ipvs(&mut self, known: Tables) -> Result<Tables, DataplaneError> {
        let state = self.state();
        state.working()?;
        Ok(Tables { services: state.tables.services.clone(), ..known })
    }

    fn firewalls(&mut self) -> Result<BTreeSet<String>, DataplaneError> {
        // One is found while there are services only, so that it tells when it was looked for.
        let services = self.state().tables.services.len();
        Ok((services > 0).then(|| "inet filter input".to_owned()).into_iter().collect())
    }

    fn remove_everything(&mut self) -> Result<(), DataplaneError> {
        let mut state = self.state();
        state.working()?;
        let Tables { services, ledger, guarded, direct, sources, kept: _ } = &mut state.tables;
        services.retain(|key, _| !ledger.contains(key));
        ledger.clear();
        guarded.clear();
        direct.clear();
        sources.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vip_core::plan::{Protocol, Settings, plan};

    use super::*;

    fn key() -> ServiceKey {
        ServiceKey { address: [10, 87, 2, 50].into(), protocol: Protocol::Tcp, port: 80 }
    }

    fn desired() -> Tables {
        let mut tables = Tables::default();
        let settings = Settings { scheduler: "wlc".to_owned(), persistence: None };
        tables.apply(&Change::Open(key()));
        tables.apply(&Change::AddService(key(), settings));
        tables.apply(&Change::AddDestination(key(), ([10, 244, 1, 1], 8080).into(), 1));
        tables
    }

    #[test]
    fn holds_and_counts() {
        let mut recorder = Recorder::default();
        let seen = recorder.clone();
        let steps = plan(&desired(), &recorder.observe().unwrap()).changes;
        assert_eq!(recorder.apply(&steps), vec![]);
        assert_eq!(seen.tables(), desired());
        assert_eq!(seen.forget(), steps);
        assert_eq!(recorder.sentinel(&key()), Ok(Sight::Both));
        seen.meddle(|tables| tables.services.clear());
        assert_eq!(recorder.sentinel(&key()), Ok(Sight::Table));
        recorder.remove_everything().unwrap();
        assert_eq!(seen.tables(), Tables::default());
    }

    #[test]
    fn what_depends_on_a_refused_step_is_not_tried() {
        let mut recorder = Recorder::default();
        recorder.refuse(key(), true);
        let steps = plan(&desired(), &Tables::default()).changes;
        let failed = recorder.apply(&steps);
        assert_eq!(failed.len(), steps.len());
        assert!(matches!(failed[0].1, DataplaneError::Refused { .. }));
        assert!(failed[1..].iter().all(|(_, error)| matches!(error, DataplaneError::Skipped(_))));
        assert_eq!(recorder.applied(), vec![]);
    }
}
