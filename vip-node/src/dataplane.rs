//! What the agent wants of the kernel: see its tables, change them, notice when somebody emptied them.
//!
//! [`Kernel`] does it by netlink, [`Recorder`] in memory for tests. Neither decides anything: what to change is the plan
//! of `vip_core::plan`, and nothing outside its steps is ever touched.

mod firewall;
mod ipvs;
mod kept;
mod kernel;
mod nat;
mod netlink;
mod recorder;
mod sysctl;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use vip_core::api::Reason;
use vip_core::plan::{Change, ServiceKey, Tables};

pub use ipvs::Ipvs;
pub use kernel::Kernel;
pub use nat::Nat;
pub use recorder::Recorder;

/// The destinations of a virtual service, each with its weight or its connections.
pub type Destinations = BTreeMap<SocketAddr, u32>;

/// The tables of a kernel. Calls block for as long as the kernel takes (microseconds for a step, milliseconds for
/// thousands), so they belong on a thread where that does no harm.
pub trait Dataplane: Send {
    /// Reads everything. The ledger and the guards are in the kernel too, so they outlive the agent; destinations are read
    /// of services in the ledger only.
    ///
    /// Prepares what the dataplane stands on as well (IPVS, sysctls, and our nftables table if somebody deleted it), and
    /// its errors say what the node lacks. After an error the next call starts afresh.
    fn observe(&mut self) -> Result<Tables, DataplaneError> {
        let mut tables = self.outline()?;
        self.fill(&mut tables)?;
        Ok(tables)
    }

    /// Reads the destinations of those services in a table that are ours.
    fn fill(&mut self, tables: &mut Tables) -> Result<(), DataplaneError> {
        for (key, destinations) in self.destinations(&ours(tables))? {
            if let Some(service) = tables.services.get_mut(&key) {
                service.destinations = destinations;
            }
        }
        Ok(())
    }

    /// The same without destinations, which take by far the longest to read.
    fn outline(&mut self) -> Result<Tables, DataplaneError>;

    /// The destinations of these services; none of one that is not there.
    fn destinations(
        &mut self,
        keys: &[ServiceKey],
    ) -> Result<Vec<(ServiceKey, Destinations)>, DataplaneError>;

    /// Everything about these services; what concerns an address is left out.
    fn services(&mut self, keys: &BTreeSet<ServiceKey>) -> Result<Tables, DataplaneError>;

    /// The open connections of a service's destinations, where there are any; none of a service that is not there.
    fn connections(&mut self, key: &ServiceKey) -> Result<Destinations, DataplaneError>;

    /// Takes the steps in their order and returns those that failed, by their index. Steps that depend on a failed one are
    /// not tried and returned too ([`DataplaneError::Skipped`]). A step that is done already is no failure.
    fn apply(&mut self, changes: &[Change]) -> Vec<(usize, DataplaneError)>;

    /// Whether a service of ours, and our nftables table, are still there: a cheap look (two small messages) at whether
    /// somebody flushed. The answer is no as well when asked for a service that was never there.
    fn sentinel(&mut self, key: &ServiceKey) -> Result<Sight, DataplaneError>;

    /// What is known, with IPVS as it is now: what somebody flushed of it is read in less time than everything, above all
    /// while others write into nftables.
    fn reread_ipvs(&mut self, known: Tables) -> Result<Tables, DataplaneError>;

    /// Chains of the node's own firewall that drop by default what it receives or forwards, such as `inet filter input`.
    fn firewalls(&mut self) -> Result<BTreeSet<String>, DataplaneError>;

    /// Deletes our services (those in the ledger), then the ledger and the guards, and puts sysctls back. What others made
    /// stays.
    fn remove_everything(&mut self) -> Result<(), DataplaneError>;
}

/// What a quick look shows of our entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight {
    /// The service and our nftables table.
    Both,
    /// The table without the service: somebody flushed IPVS.
    Table,
    /// Not even the table.
    Nothing,
}

/// The services that are there and ours: those whose destinations are of interest.
pub fn ours(tables: &Tables) -> Vec<ServiceKey> {
    tables.services.keys().filter(|key| tables.ledger.contains(key)).copied().collect()
}

/// Why the kernel's tables are not as they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DataplaneError {
    /// The generic netlink family of IPVS is unknown, also after asking for it, which loads the module where that is allowed.
    #[error(
        "the kernel has no IPVS: run `modprobe ip_vs` on the node, or install a kernel that has the module"
    )]
    IpvsUnavailable,
    /// The kernel can't do what our nftables table needs.
    #[error(
        "the kernel lacks a part of nftables ({0}): run `modprobe -a nf_tables nft_chain_nat nft_masq nft_ct \
         nft_fib_inet nft_reject_inet` on the node"
    )]
    NftablesUnavailable(String),
    /// EPERM.
    #[error("not permitted to change {0}: the agent's container needs the capability NET_ADMIN")]
    NotPermitted(&'static str),
    /// A sysctl has another value than it should, and can't be set or is not ours to set.
    #[error(
        "the sysctl {name} is not {value} ({text}): run `sysctl -w {name}={value}` on the node, and keep it in \
         /etc/sysctl.d"
    )]
    SysctlNotSet {
        /// Its name, such as `net.ipv4.ip_forward`.
        name: &'static str,
        /// The value that it should have.
        value: &'static str,
        /// What the system said, or why it is not set.
        text: String,
    },
    /// The kernel has no scheduler of that name, or must not be asked for it.
    #[error(
        "{text}: run `modprobe ip_vs_{scheduler}` on the node, and list it in /etc/modules-load.d, or choose another scheduler"
    )]
    SchedulerUnavailable {
        /// Its name, as in `ipvsadm -s`.
        scheduler: String,
        /// What is in the way.
        text: String,
    },
    /// A sysctl still has the value that it was given here.
    #[error("the sysctl {name} is not {value} again ({text}): run `sysctl -w {name}={value}` on the node")]
    SysctlNotPutBack {
        /// Its name.
        name: &'static str,
        /// The value that it had before.
        value: String,
        /// What the system said.
        text: String,
    },
    /// The kernel said no to one step.
    #[error("the kernel refused to {change}: {text}")]
    Refused {
        /// The step.
        change: Change,
        /// The kernel's error, with what it means here.
        text: String,
    },
    /// A step was not tried because one that it depends on failed.
    #[error("did not try to {0}: an earlier step for the same service failed")]
    Skipped(Change),
    /// The conversation with the kernel broke down.
    #[error("can't talk to the kernel about {0}: {1}")]
    Broken(&'static str, String),
}

impl DataplaneError {
    /// The word for it in conditions.
    pub fn reason(&self) -> Reason {
        match self {
            Self::IpvsUnavailable => Reason::IPVSUnavailable,
            Self::NotPermitted(_) => Reason::NotPermitted,
            Self::SysctlNotSet { .. } | Self::SysctlNotPutBack { .. } => Reason::SysctlNotSet,
            Self::SchedulerUnavailable { .. } => Reason::SchedulerUnavailable,
            Self::NftablesUnavailable(_) | Self::Refused { .. } | Self::Skipped(_) | Self::Broken(..) => {
                Reason::KernelRefused
            }
        }
    }
}

/// Whether later steps for the same service make no sense once this one failed: a service that is not in the ledger must
/// not be added, nor opened to more clients than it should be, and one that is still there must stay in the ledger.
pub(crate) fn blocks(change: &Change) -> bool {
    matches!(
        change,
        Change::Restrict(..)
            | Change::Direct(..)
            | Change::Open(_)
            | Change::AddService(..)
            | Change::DeleteService(_)
    )
}
