//! Our nftables table, `inet kubectl-vip`: masquerades what clients send to a virtual IP, shuts its other ports, and holds
//! the ledger of the IPVS services that are ours.
//!
//! ```text
//! set vips  { type ipv4_addr }                                  the guarded addresses
//! set ports { type ipv4_addr . inet_proto . inet_service }      the open ports = the ledger
//! chain postrouting { type nat hook postrouting priority srcnat
//!     ct direction original ct original ip daddr @vips masquerade fully-random }
//! chain prerouting { type filter hook prerouting priority mangle
//!     ip daddr @vips meta l4proto icmp accept
//!     ip daddr . meta l4proto . th dport @ports accept
//!     ip daddr @vips ct state established,related accept
//!     ip daddr @vips fib daddr type local meta l4proto tcp reject with tcp reset
//!     ip daddr @vips fib daddr type local reject with icmpx port-unreachable }
//! ```
//!
//! IPv6 has the same sets and rules beside these: `vips6`, `ports6`, `ip6 daddr`, `ipv6-icmp`. They are there on nodes without
//! IPv6 too: a table `inet` takes them whether or not there is ever a packet for them.
//!
//! Pods answer to the client by their own node's route, so without the first chain only those on this node could. No other
//! table is ever looked at or changed. The table stays when the agent goes.

mod codec;
mod rules;

use std::collections::BTreeSet;
use std::net::IpAddr;

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;
use vip_core::plan::{Change, ServiceKey};

use self::rules::Element;
use super::DataplaneError;
use super::netlink::{Request, Socket, Trouble};

/// Steps in one transaction: about 100 bytes each, well below what a socket without privileges may send at once.
const AT_ONCE: usize = 500;

/// Our table, and what its sets should hold as far as this process knows.
#[derive(Debug, Default)]
pub struct Nat {
    /// Given up when something went wrong: an answer may still be on its way.
    socket: Option<Socket>,
    known: BTreeSet<Element>,
}

impl Nat {
    /// Does nothing yet. The table is that of the network namespace of the thread that makes the first call.
    pub fn new() -> Self {
        Self::default()
    }

    /// The guarded addresses and the ledger. What somebody deleted of our table since this process knows it is put back
    /// first: without the ledger our services would look like those of others.
    ///
    /// # Errors
    /// When nftables is not there, not permitted, or does not answer.
    pub fn observe(&mut self) -> Result<(BTreeSet<IpAddr>, BTreeSet<ServiceKey>), DataplaneError> {
        let result = self.try_observe();
        self.checked(result)
    }

    /// Takes the steps that concern the table, in transactions; returns those that failed, by index. Makes the table first
    /// if need be.
    ///
    /// # Errors
    /// A conversation that broke down: nobody knows how far it came.
    pub fn apply(&mut self, changes: &[&Change]) -> Result<Vec<(usize, DataplaneError)>, DataplaneError> {
        let result = self.try_apply(changes);
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
                Ok(())
            }
            Err(trouble) => Err(unavailable(&trouble)),
        };
        self.checked(result)
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

    fn try_observe(&mut self) -> Result<(BTreeSet<IpAddr>, BTreeSet<ServiceKey>), DataplaneError> {
        let found = self.elements()?;
        self.known.extend(found.iter().copied());
        if self.known.is_empty() {
            return Ok(rules::sort(&found));
        }
        if !self.ensure()? {
            let missing: Vec<Request> =
                self.known.difference(&found).map(|element| codec::element(element, true)).collect();
            self.run(&missing).map_err(|trouble| unavailable(&trouble))?;
        }
        Ok(rules::sort(&self.known))
    }

    fn try_apply(&mut self, changes: &[&Change]) -> Result<Vec<(usize, DataplaneError)>, DataplaneError> {
        let mut failures = Vec::new();
        let mut steps: Vec<(usize, &Change, Element, bool)> = Vec::new();
        for (index, change) in changes.iter().enumerate() {
            let (element, add) = match change {
                Change::Guard(address) => (Element::Vip(*address), true),
                Change::Unguard(address) => (Element::Vip(*address), false),
                Change::Open(key) => (Element::Port(*key), true),
                Change::Close(key) => (Element::Port(*key), false),
                _ => continue,
            };
            steps.push((index, change, element, add));
        }
        if steps.iter().any(|(.., add)| *add) {
            self.ensure()?;
        }
        for chunk in steps.chunks(AT_ONCE) {
            self.transact(chunk, &mut failures)?;
        }
        failures.sort_by_key(|(index, _)| *index);
        Ok(failures)
    }

    /// One transaction; without the steps that fail, tried again, because one that fails undoes them all.
    fn transact(
        &mut self,
        steps: &[(usize, &Change, Element, bool)],
        failures: &mut Vec<(usize, DataplaneError)>,
    ) -> Result<(), DataplaneError> {
        let mut open: Vec<_> = steps.to_vec();
        while !open.is_empty() {
            let requests: Vec<Request> =
                open.iter().map(|(.., element, add)| codec::element(element, *add)).collect();
            let failed = match self.socket()?.transaction(&requests, &codec::begin(), &codec::end()) {
                Ok(failed) => failed,
                Err(trouble) => return Err(unavailable(&trouble)),
            };
            if failed.is_empty() {
                break;
            }
            let mut without = BTreeSet::new();
            for (n, errno) in failed {
                let Some((index, change, element, add)) = open.get(n) else { continue };
                // Gone already: done. The others are tried again without it.
                if *add || errno != Errno::ENOENT {
                    failures.push((*index, errno_of(change, errno)));
                } else {
                    self.known.remove(element);
                }
                without.insert(*index);
            }
            open.retain(|(index, ..)| !without.contains(index));
        }
        for (.., element, add) in open {
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
        for set in rules::sets() {
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

fn errno_of(change: &Change, errno: Errno) -> DataplaneError {
    match errno {
        Errno::EPERM => DataplaneError::NotPermitted("nftables"),
        errno => {
            DataplaneError::Refused { change: change.clone(), text: format!("{} ({errno:?})", errno.desc()) }
        }
    }
}

fn unavailable(trouble: &Trouble) -> DataplaneError {
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
