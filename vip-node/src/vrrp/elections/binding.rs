//! Addresses on the interfaces: bound, renewed, put back and released as the elections want it.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use tracing::{info, warn};
use vip_core::api::Reason;
use vip_core::vrrp::RouterId;

use super::{Elections, LOOK, permission};
use crate::vrrp::address::{Change, Key};

impl Elections {
    /// An election won addresses: they are bound batch by batch, those that are fresh after they were probed.
    pub(super) fn want(&mut self, id: &RouterId, addresses: &[IpAddr]) {
        let Some(running) = self.running.get(id) else { return };
        let (index, now) = (running.index, self.now());
        for address in addresses {
            let config = running.router.config();
            let inherited = running.inherits.contains(address) && !config.contested.contains(address);
            if config.fresh.contains(address) && !inherited && !self.proven.contains(&(id.clone(), *address))
            {
                self.prober.start(now, &id.interface, *address);
            } else if self.bindings.want(id, (index, *address)) {
                self.announcer.announce(now, id, &[*address]);
            }
        }
    }

    /// An election has lost addresses: they are taken off at once, or when its successor announces them (at the latest at a
    /// time).
    pub(super) fn release(&mut self, id: &RouterId, addresses: &[IpAddr], until: Option<Duration>) {
        let Some(running) = self.running.get(id) else { return };
        let index = running.index;
        for address in addresses {
            match until {
                Some(until) => self.bindings.hand_over(id, (index, *address), until),
                None => self.bindings.give_up(id, (index, *address)),
            }
            self.announcer.forget(id, *address);
            self.claims.forget(*address);
            self.yielded.remove(&(id.clone(), *address));
        }
        self.prober.retain(|interface, address| interface != id.interface || !addresses.contains(&address));
        self.news.now();
    }

    /// One batch of what is to be released, bound and renewed.
    pub(super) fn bind_some(&mut self) {
        let now = self.now();
        let batch = self.bindings.next_batch(now);
        if !batch.release.is_empty() {
            self.news.now();
        }
        let release = self.addresses.release(&batch.release);
        for ((key, address), error) in failures(&batch.release, release) {
            warn!(%address, index = key, %error, "could not be released, its lifetime will end");
        }
        let bind = self.addresses.bind(&batch.bind);
        self.bound(&batch.bind, bind);
        let renew = self.addresses.renew(&batch.renew);
        for ((key, address), error) in failures(&batch.renew, renew) {
            warn!(%address, index = key, %error, "could not be renewed");
        }
    }

    fn bound(&mut self, keys: &[Key], results: io::Result<Vec<io::Result<()>>>) {
        let failed = failures(keys, results);
        let now = self.now();
        // An address that is there already may be our own.
        let doubtful = failed.iter().any(|(_, error)| error.kind() == io::ErrorKind::AlreadyExists);
        let ours = if doubtful { self.addresses.ours().unwrap_or_default() } else { BTreeSet::new() };
        for key in keys {
            let error = failed.iter().find(|(failed, _)| failed == key).map(|(_, error)| error);
            if error.is_some() && !ours.contains(key) {
                continue;
            }
            // IPv6: the kernel's own route to a new address comes later, from a queue that may be slow, and until then what is
            // sent there is dropped. `follow_changes` hears when (`addrconf_dad_completed`).
            let ready = key.1.is_ipv4() || error.is_some();
            if let Some(id) = self.bindings.bound(now, *key, ready) {
                if ready {
                    self.announcer.announce(now, &id, &[key.1]);
                }
                self.recover(&id);
                self.news.now();
            }
        }
        for (key, error) in failed {
            if !ours.contains(&key)
                && let Some(id) = self.bindings.disown(key)
            {
                let (reason, message) = refused(&id, key.1, &error);
                self.fail(&id, reason, message, true);
            }
        }
    }

    /// Once something was bound and announced: whether the kernel keeps our mark on it. If not, all is released.
    pub(super) fn prove_marks(&mut self) {
        if self.marks {
            return;
        }
        let bound: Vec<(Key, RouterId)> = self.bindings.all().map(|(key, id)| (key, id.clone())).collect();
        if bound.is_empty() {
            return;
        }
        let ours = self.addresses.ours().unwrap_or_default();
        self.marks = bound.iter().any(|(key, _)| ours.contains(key));
        if self.marks {
            return;
        }
        for id in bound.into_iter().map(|(_, id)| id).collect::<BTreeSet<_>>() {
            let message = "the kernel keeps no mark on an address (IFA_PROTO, since Linux 5.18): virtual IPs could not be told \
                           from the addresses of others";
            self.fail(&id, Reason::KernelRefused, message.to_owned(), true);
        }
    }

    /// Follows all changes that are known: many at once need one look.
    pub(super) fn follow_changes(&mut self) {
        let changes = self.addresses.changes().unwrap_or_else(|error| {
            warn!(%error, "changes of the interfaces were lost");
            vec![Change::Other]
        });
        let mut ready = Vec::new();
        for change in &changes {
            match change {
                Change::Lost(index, address) => self.put_back((*index, *address)),
                Change::Ready(index, address) => {
                    let key = (*index, *address);
                    ready.extend(self.bindings.ready(key).map(|id| (key, id)));
                }
                Change::Other => {}
            }
        }
        self.announce_ready(ready);
        if changes.contains(&Change::Other) {
            self.look();
        }
    }

    /// Announces addresses that the kernel has just called ready.
    fn announce_ready(&mut self, ready: Vec<(Key, RouterId)>) {
        if ready.is_empty() {
            return;
        }
        // The word comes a moment before the route, under the kernel's lock for interfaces (`__ipv6_ifa_notify`). Whoever has had
        // that lock since has waited for the route, and a renewal takes it.
        let keys: Vec<Key> = ready.iter().map(|(key, _)| *key).collect();
        let renewed = self.addresses.renew(&keys);
        for ((key, address), error) in failures(&keys, renewed) {
            warn!(%address, index = key, %error, "could not be renewed");
        }
        let now = self.now();
        for ((_, address), id) in ready {
            self.announcer.announce(now, &id, &[address]);
        }
    }

    /// An address was taken off. If it is still ours it is bound again with the next batch.
    fn put_back(&mut self, key: Key) {
        if let Some(id) = self.bindings.lost(key) {
            info!(address = %key.1, interface = id.interface, "was taken off by another program, putting it back");
            *self.repaired.entry(key.1).or_default() += 1;
            self.news.later(self.now());
        }
    }

    pub(super) fn look(&mut self) {
        let now = self.now();
        self.look = now + LOOK;
        let nics = match self.addresses.nics() {
            Ok(nics) => nics,
            Err(error) => return warn!(%error, "cannot look at the interfaces"),
        };
        let news = self.network.update(now, nics);
        let bound: Vec<(Key, RouterId)> = self.bindings.all().map(|(key, id)| (key, id.clone())).collect();
        for (key, id) in bound {
            let (index, address) = key;
            if self.network.is_foreign(index, address) {
                // What another program has made its own (`ip address replace`) is not for us to remove.
                self.bindings.disown(key);
            } else if self.network.is_missing(index, address) {
                self.put_back(key);
            } else if news.hardware.contains(&index) {
                self.announcer.announce(now, &id, &[address]);
            }
        }
        if news.any {
            self.settle();
        }
    }
}

/// The addresses for which it went wrong, and why.
fn failures(keys: &[Key], results: io::Result<Vec<io::Result<()>>>) -> Vec<(Key, io::Error)> {
    match results {
        Ok(results) => {
            let pairs = keys.iter().zip(results);
            pairs.filter_map(|(key, result)| Some((*key, result.err()?))).collect()
        }
        Err(error) => {
            let same =
                || error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error);
            keys.iter().map(|key| (*key, same())).collect()
        }
    }
}

/// Why an address could not be bound.
fn refused(id: &RouterId, address: IpAddr, error: &io::Error) -> (Reason, String) {
    if error.kind() == io::ErrorKind::AlreadyExists {
        let message = format!("{address} is on {} already, put there by another program", id.interface);
        return (Reason::Rejected, message);
    }
    let (reason, hint) = permission(error, "NET_ADMIN");
    (reason, format!("cannot bind {address} to {}: {error}{hint}", id.interface))
}
