//! Our nftables table, `inet kubectl-vip`: masquerades what clients send to a virtual IP, shuts its other ports, and holds
//! the ledger of the IPVS services that are ours.
//!
//! ```text
//! set vips  { type ipv4_addr }                                  the guarded addresses
//! set ports { type ipv4_addr . inet_proto . inet_service }      the open ports = the ledger
//! set restricted, direct: services as in `ports` of which some clients may connect, or are masqueraded
//! set sources, near { type ... . ipv4_addr ; flags interval }   these clients
//! chain postrouting { type nat hook postrouting priority srcnat
//!     ct direction original (ct original ip daddr . meta l4proto . ct original proto-dst) @direct (... . ip saddr) != @near accept
//!     ct direction original ct original ip daddr @vips masquerade fully-random }
//! chain prerouting { type filter hook prerouting priority mangle
//!     ip daddr @vips meta l4proto icmp accept
//!     ip daddr . meta l4proto . th dport @ports (the same) != @restricted accept
//!     ip daddr . meta l4proto . th dport @ports (the same . ip saddr) @sources accept
//!     ip daddr @vips ct state established,related accept
//!     ip daddr @vips fib daddr type local meta l4proto tcp reject with tcp reset
//!     ip daddr @vips fib daddr type local reject with icmpx port-unreachable }
//! chain output { type filter hook output priority mangle
//!     new connections to @ports and @restricted whose source is not in @sources: rejected as above
//!     new connections to @vips, local, neither ICMP nor to @ports: rejected as above }
//! ```
//!
//! IPv6 has the same sets and rules beside these: `vips6`, `ports6`, `ip6 daddr`, `ipv6-icmp`. They are there on nodes without
//! IPv6 too: a table `inet` takes them whether or not there is ever a packet for them.
//!
//! Pods answer to the client by their own node's route, so without the first chain only those on this node could. Those are
//! asked directly, if so desired, except by clients whose answer would not pass through this node either (`near`). No other
//! table is ever looked at or changed. The table stays when the agent goes.

pub(super) mod codec;
mod rules;
mod sets;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use ipnet::IpNet;
use nix::errno::Errno;
use nix::sys::socket::SockProtocol;
use tracing::warn;
use vip_core::plan::{Change, ServiceKey, Tables};

use self::sets::{Element, Limit};
use super::kept::Kept;
use super::netlink::{Request, Socket, Trouble};
use super::{DataplaneError, blocks};

/// The file with the ledger, a service in each line.
const FILE: &str = "ledger.state";

/// Elements in one transaction: 100 to 200 bytes each, well below what a socket without privileges may send at once. A step
/// with more has one of its own.
const AT_ONCE: usize = 500;

/// One element to add or to delete, for a step.
struct Part<'a> {
    /// The step's place.
    index: usize,
    step: &'a Change,
    element: Element,
    add: bool,
}

/// What was not done.
#[derive(Default)]
struct Failed {
    steps: BTreeMap<usize, DataplaneError>,
    /// Services for which nothing more makes sense after that step.
    services: BTreeMap<ServiceKey, usize>,
}

impl Failed {
    fn add(&mut self, index: usize, step: &Change, error: DataplaneError) {
        self.steps.entry(index).or_insert(error);
        if let Some(key) = step.key().filter(|_| blocks(step)) {
            self.services.entry(*key).or_insert(index);
        }
    }

    /// Whether a part is still worth trying. One that is not because of an earlier step is noted.
    fn leaves(&mut self, part: &Part) -> bool {
        let after = part.step.key().and_then(|key| self.services.get(key));
        if after.is_some_and(|index| *index < part.index) {
            self.steps.entry(part.index).or_insert(DataplaneError::Skipped(part.step.clone()));
        }
        !self.steps.contains_key(&part.index)
    }
}

/// Our table, and what its sets should hold as far as this process knows.
#[derive(Debug, Default)]
pub struct Nat {
    /// Given up when something went wrong: an answer may still be on its way.
    socket: Option<Socket>,
    known: BTreeSet<Element>,
    /// The table was looked at.
    is_seen: bool,
    /// Where the ledger is kept as well; `None`: nowhere.
    file: Option<Kept>,
    /// Whether the file says something else than the table.
    is_stale: bool,
}

impl Nat {
    /// Does nothing yet. The table is that of the network namespace of the thread that makes the first call.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps the ledger in a folder of the node as well: should somebody delete the table while no agent runs, our services
    /// are known all the same.
    pub fn remember_in(&mut self, folder: &Path) {
        self.file = Some(Kept::new(folder, FILE));
    }

    /// All that the table says: everything but the services themselves. What somebody deleted of it since this process knows
    /// it is put back first: without the ledger our services would look like those of others.
    ///
    /// # Errors
    /// When nftables is not there, not permitted, or does not answer.
    pub fn observe(&mut self) -> Result<Tables, DataplaneError> {
        let result = self.try_observe();
        self.keep();
        self.checked(result)
    }

    /// What is known of these services, without a look.
    pub fn known(&self, keys: &BTreeSet<ServiceKey>) -> Tables {
        let of = |element: &&Element| element.service().is_some_and(|key| keys.contains(key));
        sets::sort(&self.known.iter().filter(of).copied().collect())
    }

    /// Takes the steps that concern the table, in transactions; returns those that failed, by index. Makes the table first
    /// if need be.
    ///
    /// # Errors
    /// A conversation that broke down: nobody knows how far it came.
    pub fn apply(&mut self, changes: &[&Change]) -> Result<Vec<(usize, DataplaneError)>, DataplaneError> {
        let result = self.try_apply(changes);
        self.keep();
        self.checked(result)
    }

    /// Whether the table is there. Rules are not looked at.
    ///
    /// # Errors
    /// When nftables is not there, not permitted, or does not answer.
    pub fn is_there(&mut self) -> Result<bool, DataplaneError> {
        let result = match self.socket()?.ask(&codec::get_table(), |_| Some(())) {
            Ok(_) => Ok(true),
            Err(Trouble::Errno(Errno::ENOENT)) => Ok(false),
            Err(trouble) => Err(unavailable(&trouble)),
        };
        self.checked(result)
    }

    /// Deletes the table and forgets what it held.
    ///
    /// # Errors
    /// When nftables is not permitted or does not answer.
    pub fn remove(&mut self) -> Result<(), DataplaneError> {
        let result = match self.run(&[codec::delete_table()]) {
            Ok(()) | Err(Trouble::Errno(Errno::ENOENT)) => {
                self.known.clear();
                let removed = self.file.as_ref().map_or(Ok(()), Kept::remove);
                removed.map_err(|error| DataplaneError::Broken("the ledger", error.to_string()))
            }
            Err(trouble) => Err(unavailable(&trouble)),
        };
        self.checked(result)
    }

    /// Writes the ledger down if it has changed.
    fn keep(&mut self) {
        let Some(file) = self.file.as_ref().filter(|_| self.is_stale) else { return };
        let ledger = self.known.iter().filter_map(|element| match element {
            Element::Port(key) => Some(key.to_string()),
            _ => None,
        });
        if let Err(error) = file.write(ledger) {
            let file = file.path().display();
            warn!(
                "the ledger cannot be kept in {file} ({error}): if somebody deletes the nftables table while no agent runs, \
                 its services have to be removed by hand"
            );
            self.file = None;
        }
        self.is_stale = false;
    }

    fn socket(&mut self) -> Result<&mut Socket, DataplaneError> {
        self.open().map_err(|trouble| unavailable(&trouble))
    }

    fn open(&mut self) -> Result<&mut Socket, Trouble> {
        let socket = match self.socket.take() {
            Some(socket) => socket,
            None => Socket::open(SockProtocol::NetlinkNetFilter).map_err(Trouble::Errno)?,
        };
        Ok(self.socket.insert(socket))
    }

    fn checked<T>(&mut self, result: Result<T, DataplaneError>) -> Result<T, DataplaneError> {
        if result.is_err() {
            self.socket = None;
        }
        result
    }

    fn try_observe(&mut self) -> Result<Tables, DataplaneError> {
        if !self.is_seen && !self.is_there()? {
            let lines = self.file.as_ref().map(Kept::lines).unwrap_or_default();
            self.known.extend(lines.iter().filter_map(|line| line.parse().ok()).map(Element::Port));
        }
        let found = self.elements()?;
        self.known.extend(found.iter().copied());
        self.is_stale |= !self.is_seen && !self.known.is_empty();
        self.is_seen = true;
        if self.known.is_empty() {
            return Ok(sets::sort(&found));
        }
        if !self.ensure()? {
            let missing: Vec<Request> =
                self.known.difference(&found).map(|element| codec::element(element, true)).collect();
            self.run(&missing).map_err(|trouble| unavailable(&trouble))?;
        }
        Ok(sets::sort(&self.known))
    }

    fn try_apply(&mut self, changes: &[&Change]) -> Result<Vec<(usize, DataplaneError)>, DataplaneError> {
        // What a range takes the place of has to be known.
        if self.known.is_empty() {
            self.known = self.elements()?;
        }
        if changes.iter().any(|change| adds(change)) {
            self.ensure()?;
        }
        let mut failed = Failed::default();
        let mut parts: Vec<Part> = Vec::new();
        for (index, step) in changes.iter().copied().enumerate() {
            let elements = self.elements_of(step);
            if parts.len() + elements.len() > AT_ONCE {
                self.transact(std::mem::take(&mut parts), &mut failed)?;
            }
            parts.extend(elements.into_iter().map(|(element, add)| Part { index, step, element, add }));
        }
        self.transact(parts, &mut failed)?;
        Ok(failed.steps.into_iter().collect())
    }

    /// The elements that a step adds and deletes; none of a step that is not for this table.
    fn elements_of(&self, step: &Change) -> Vec<(Element, bool)> {
        match step {
            Change::Guard(address) => vec![(Element::Vip(*address), true)],
            Change::Unguard(address) => vec![(Element::Vip(*address), false)],
            Change::Open(key) => vec![(Element::Port(*key), true)],
            Change::Close(key) => vec![(Element::Port(*key), false)],
            Change::Restrict(key, ranges) => self.limit(Limit::Restricted, *key, Some(ranges)),
            Change::Unrestrict(key) => self.limit(Limit::Restricted, *key, None),
            Change::Direct(key, ranges) => self.limit(Limit::Direct, *key, Some(ranges)),
            Change::Indirect(key) => self.limit(Limit::Direct, *key, None),
            Change::AddService(..)
            | Change::SetService(..)
            | Change::DeleteService(_)
            | Change::AddDestination(..)
            | Change::SetDestination(..)
            | Change::DeleteDestination(..) => Vec::new(),
        }
    }

    /// From the ranges of a service that there are to others. Those that go make room first: ranges must not overlap.
    fn limit(&self, limit: Limit, key: ServiceKey, ranges: Option<&BTreeSet<IpNet>>) -> Vec<(Element, bool)> {
        let known: BTreeSet<IpNet> = Element::ranges_of(&self.known, limit, key).collect();
        let none = BTreeSet::new();
        let wanted = ranges.unwrap_or(&none);
        let range = |net: &IpNet, add| (Element::Range(limit, key, *net), add);
        let gone = known.difference(wanted).map(|net| range(net, false));
        let new = wanted.difference(&known).map(|net| range(net, true));
        gone.chain(new).chain([(Element::Limited(limit, key), ranges.is_some())]).collect()
    }

    /// One transaction; without the steps that fail, tried again, because one that fails undoes them all.
    fn transact(&mut self, mut parts: Vec<Part>, failed: &mut Failed) -> Result<(), DataplaneError> {
        loop {
            parts.retain(|part| failed.leaves(part));
            let requests: Vec<Request> =
                parts.iter().map(|part| codec::element(&part.element, part.add)).collect();
            let errors = match self.socket()?.transaction(&requests, &codec::begin(), &codec::end()) {
                Ok(errors) => errors,
                Err(trouble) => return Err(unavailable(&trouble)),
            };
            if errors.is_empty() {
                break;
            }
            let mut gone = BTreeSet::new();
            for (n, errno) in errors {
                let Some(part) = parts.get(n) else { continue };
                // Gone already: done. The others are tried again without it.
                if part.add || errno != Errno::ENOENT {
                    failed.add(part.index, part.step, errno_of(part.step, errno));
                } else {
                    self.known.remove(&part.element);
                    self.is_stale = true;
                    gone.insert(part.element);
                }
            }
            parts.retain(|part| part.add || !gone.contains(&part.element));
        }
        for Part { element, add, .. } in parts {
            self.is_stale |= matches!(element, Element::Port(_));
            match add {
                true => self.known.insert(element),
                false => self.known.remove(&element),
            };
        }
        Ok(())
    }

    /// Makes the table, or makes it again when it is not as this version makes it; with all that it held, in one
    /// transaction, so that no packet meets half of it. Whether there was anything to do.
    fn ensure(&mut self) -> Result<bool, DataplaneError> {
        let rules = self.socket()?.dump(&codec::get_rules(), codec::rule_mark);
        if rules.map_err(|trouble| unavailable(&trouble))? == rules::marks() {
            return Ok(false);
        }
        let mut requests = vec![codec::new_table(), codec::delete_table(), codec::new_table()];
        requests.extend(rules::requests());
        requests.extend(self.known.iter().map(|element| codec::element(element, true)));
        self.run(&requests).map_err(|trouble| unavailable(&trouble))?;
        Ok(true)
    }

    /// Everything in our sets.
    fn elements(&mut self) -> Result<BTreeSet<Element>, DataplaneError> {
        let mut all = BTreeSet::new();
        for set in sets::sets() {
            match self
                .socket()?
                .dump(&codec::get_elements(set.name), |answer| Some(codec::elements(answer, set)))
            {
                Ok(found) => all.extend(found.into_iter().flatten()),
                Err(Trouble::Errno(Errno::ENOENT)) => {}
                Err(trouble) => return Err(unavailable(&trouble)),
            }
        }
        Ok(all)
    }

    /// A transaction that should succeed as a whole.
    fn run(&mut self, requests: &[Request]) -> Result<(), Trouble> {
        match self.open()?.transaction(requests, &codec::begin(), &codec::end())?.first() {
            Some((_, errno)) => Err(Trouble::Errno(*errno)),
            None => Ok(()),
        }
    }
}

/// Whether a step puts something into the table, which has to be there then.
fn adds(change: &Change) -> bool {
    matches!(change, Change::Guard(_) | Change::Open(_) | Change::Restrict(..) | Change::Direct(..))
}

fn errno_of(change: &Change, errno: Errno) -> DataplaneError {
    match errno {
        Errno::EPERM => DataplaneError::NotPermitted("nftables"),
        errno => {
            DataplaneError::Refused { change: change.clone(), text: format!("{} ({errno:?})", errno.desc()) }
        }
    }
}

pub(super) fn unavailable(trouble: &Trouble) -> DataplaneError {
    match trouble {
        Trouble::Errno(Errno::EPERM) => DataplaneError::NotPermitted("nftables"),
        // What the kernel says when a module is missing.
        Trouble::Errno(errno @ (Errno::ENOENT | Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT)) => {
            DataplaneError::NftablesUnavailable(errno.desc().to_owned())
        }
        Trouble::Errno(errno) => DataplaneError::Broken("nftables", errno.desc().to_owned()),
        Trouble::Lost(text) => DataplaneError::Broken("nftables", text.clone()),
    }
}
