//! The dataplane of a real node: IPVS, our nftables table and the sysctls, put together.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use vip_core::plan::{Change, ServiceKey, Tables, VirtualService};

use super::ipvs::Ipvs;
use super::nat::Nat;
use super::sysctl::Sysctls;
use super::{Dataplane, DataplaneError, Destinations, Sight, blocks, firewall};

/// The kernel of this network namespace (of the thread that makes the first call).
#[derive(Debug)]
pub struct Kernel {
    sysctls: Sysctls,
    ipvs: Ipvs,
    nat: Nat,
}

impl Kernel {
    /// Does nothing yet. `sysctls`: where `/proc/sys/net` can be written.
    pub fn new(sysctls: impl Into<PathBuf>) -> Self {
        let sysctls = sysctls.into();
        Self { ipvs: Ipvs::new(&sysctls), nat: Nat::new(), sysctls: Sysctls::new(sysctls) }
    }

    /// Keeps in a folder of the node what another process may need: the values of sysctls that are changed, to put them back
    /// with [`Dataplane::remove_everything`] (without it they stay), and the ledger.
    #[must_use]
    pub fn remembering_in(mut self, folder: &Path) -> Self {
        self.sysctls.remember_in(folder);
        self.nat.remember_in(folder);
        self
    }

    /// Marks what is there and can't serve.
    fn judged(&self, mut tables: Tables) -> Tables {
        if self.sysctls.check_ipv6().is_err() {
            let Tables { services, ledger, .. } = &mut tables;
            for (_, service) in
                services.iter_mut().filter(|(key, _)| key.address.is_ipv6() && ledger.contains(key))
            {
                UNFIT.clone_into(&mut service.settings.scheduler);
            }
        }
        tables
    }

    /// Takes steps of one kind. Each that fails is returned by its place in `changes`.
    fn run(&mut self, kind: Kind, changes: &[&Change]) -> Vec<(usize, DataplaneError)> {
        let Self { sysctls, ipvs, .. } = self;
        let removes =
            |change: &&Change| matches!(change, Change::DeleteDestination(..) | Change::DeleteService(_));
        let result = match kind {
            Kind::Ipvs if changes.iter().any(removes) => sysctls.expiring(|| ipvs.apply(changes)),
            Kind::Ipvs => ipvs.apply(changes),
            Kind::Nat => self.nat.apply(changes),
        };
        match result {
            Ok(failed) => failed,
            Err(error) => (0..changes.len()).map(|index| (index, error.clone())).collect(),
        }
    }
}

/// The scheduler under which a service shows that can't serve although it is there: no service is desired with it, so that
/// the next plan sets its settings again, and [`Dataplane::apply`] says what is wrong.
const UNFIT: &str = "";

/// Which table a step is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ipvs,
    Nat,
}

fn kind(change: &Change) -> Kind {
    match change {
        Change::Guard(_)
        | Change::Unguard(_)
        | Change::Restrict(..)
        | Change::Unrestrict(_)
        | Change::Direct(..)
        | Change::Indirect(_)
        | Change::Open(_)
        | Change::Close(_) => Kind::Nat,
        Change::AddService(..)
        | Change::SetService(..)
        | Change::DeleteService(_)
        | Change::AddDestination(..)
        | Change::SetDestination(..)
        | Change::DeleteDestination(..) => Kind::Ipvs,
    }
}

impl Dataplane for Kernel {
    fn outline(&mut self) -> Result<Tables, DataplaneError> {
        // The sysctls of IPVS are there only once IPVS is.
        self.ipvs.find()?;
        self.sysctls.set()?;
        let tables = self.nat.observe()?;
        let services = self.ipvs.services()?;
        Ok(self.judged(Tables { services, ..tables }))
    }

    fn services(&mut self, keys: &BTreeSet<ServiceKey>) -> Result<Tables, DataplaneError> {
        let mut tables = self.nat.known(keys);
        for key in keys {
            if let Some(settings) = self.ipvs.service(key)? {
                tables.services.insert(*key, VirtualService { settings, ..VirtualService::default() });
            }
        }
        self.fill(&mut tables)?;
        Ok(self.judged(tables))
    }

    fn destinations(
        &mut self,
        keys: &[ServiceKey],
    ) -> Result<Vec<(ServiceKey, Destinations)>, DataplaneError> {
        self.ipvs.destinations(keys)
    }

    fn connections(&mut self, key: &ServiceKey) -> Result<Destinations, DataplaneError> {
        self.ipvs.connections(key)
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
        // Taken all the same, so that nothing is missing once the node forwards. Services of IPv4 are not concerned.
        if let Err(error) = self.sysctls.check_ipv6() {
            let failed: BTreeSet<usize> = failures.iter().map(|(index, _)| *index).collect();
            let unfit = changes.iter().enumerate().filter(|(index, change)| {
                matches!(change, Change::AddService(key, _) | Change::SetService(key, _) if key.address.is_ipv6())
                    && !failed.contains(index)
            });
            failures.extend(unfit.map(|(index, _)| (index, error.clone())));
        }
        failures.sort_by_key(|(index, _)| *index);
        failures
    }

    fn sentinel(&mut self, key: &ServiceKey) -> Result<Sight, DataplaneError> {
        let service = self.ipvs.service(key)?;
        Ok(match (self.nat.is_there()?, service) {
            (true, Some(_)) => Sight::Both,
            (true, None) => Sight::Table,
            (false, _) => Sight::Nothing,
        })
    }

    fn reread_ipvs(&mut self, known: Tables) -> Result<Tables, DataplaneError> {
        let mut tables = Tables { services: self.ipvs.services()?, ..known };
        self.fill(&mut tables)?;
        Ok(self.judged(tables))
    }

    fn firewalls(&mut self) -> Result<BTreeSet<String>, DataplaneError> {
        firewall::dropping_chains()
    }

    fn remove_everything(&mut self) -> Result<(), DataplaneError> {
        let deletions: Vec<Change> =
            self.nat.observe()?.ledger.into_iter().map(Change::DeleteService).collect();
        let Self { sysctls, ipvs, .. } = self;
        let failed = match sysctls.expiring(|| ipvs.apply(&deletions.iter().collect::<Vec<_>>())) {
            // Without IPVS there are no services.
            Err(DataplaneError::IpvsUnavailable) => Vec::new(),
            result => result?,
        };
        // The ledger has to stay as long as something of ours does.
        if let Some((_, error)) = failed.into_iter().next() {
            return Err(error);
        }
        self.nat.remove()?;
        self.sysctls.put_back()
    }
}
