//! What the elections have to do with the neighbours on the LAN: bound addresses are announced, fresh ones are probed
//! before they are bound, and claims of other machines are noticed.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use tracing::{debug, warn};
use vip_core::vrrp::{Family, RouterId};

use super::Elections;
use crate::vrrp::neighbours::{Claimed, Received, Verdict, is_friend};

/// How long an address is left to the machine that has it before it is asked for again.
const YIELD: Duration = Duration::from_secs(30);
/// So many frames of one socket are read before the timers are looked at.
const BATCH: usize = 256;

impl Elections {
    /// Announces those of the addresses that are bound; the others are announced when they are.
    pub(super) fn announce(&mut self, id: &RouterId, addresses: &[IpAddr]) {
        let Some(index) = self.running.get(id).map(|running| running.index) else { return };
        let mut bound = addresses.to_vec();
        bound.retain(|address| self.bindings.is_bound((index, *address)));
        self.announcer.announce(self.now(), id, &bound);
    }

    /// What is due of announcements and probes.
    pub(super) fn announce_some(&mut self) {
        let now = self.now();
        for (id, address) in self.announcer.due(now) {
            self.announce_one(&id, address);
        }
        for (interface, address) in self.prober.due(now) {
            let Some((index, socket)) = self.sockets.neighbours(&interface, Family::of(address)) else {
                continue;
            };
            if let Err(error) = socket.probe(address, self.network.mac(index)) {
                warn!(%address, interface, %error, "could not be probed");
            }
        }
    }

    fn announce_one(&self, id: &RouterId, address: IpAddr) {
        let Some(running) = self.running.get(id) else { return };
        let Some((index, socket)) = self.sockets.neighbours(&id.interface, id.family) else { return };
        let link_local = match running.router.source() {
            IpAddr::V6(source) => Some(source),
            IpAddr::V4(_) => None,
        };
        let router = id.family == Family::V6 && forwards(&id.interface);
        if let Err(error) = socket.announce(address, self.network.mac(index), router, link_local) {
            warn!(%address, interface = id.interface, %error, "could not be announced");
        }
    }

    /// Reads what the neighbours say of themselves.
    pub(super) fn hear_claims(&mut self) {
        for key in self.sockets.neighbour_keys() {
            for read in 0.. {
                if read == BATCH {
                    self.backlog = true;
                    break;
                }
                let Some((index, socket)) = self.sockets.neighbours(&key.0, key.1) else { break };
                match socket.receive() {
                    Ok(Received::Claim(claim)) => self.claimed(&key.0, index, claim),
                    Ok(Received::Other) => {}
                    Ok(Received::Nothing) => break,
                    Err(error) => {
                        debug!(interface = key.0, %error, "cannot receive");
                        break;
                    }
                }
            }
        }
    }

    fn claimed(&mut self, interface: &str, index: u32, claim: Claimed) {
        let Claimed { address, mac, tentative } = claim;
        let probing = self.prober.is_probing(interface, address);
        let bound = self.bindings.is_bound((index, address)) && !tentative;
        let handed = self.bindings.is_handed((index, address)) && !tentative;
        if !probing && !bound && !handed {
            return;
        }
        let own: BTreeSet<[u8; 6]> = self.network.nics().map(|nic| nic.mac).collect();
        if handed && !own.contains(&mac) {
            return self.bindings.taken((index, address));
        }
        if is_friend(mac, &own, &self.lan) {
            return;
        }
        let now = self.now();
        if probing {
            return self.prober.heard(now, interface, address, mac);
        }
        self.claims.note(now, interface, address, mac, false);
        self.news.later(now);
        if self.claims.defend(now, address) {
            warn!(%address, interface, mac = text(mac), "another machine claims an address of ours, announcing it again");
            let owner =
                self.bindings.all().find(|(key, _)| *key == (index, address)).map(|(_, id)| id.clone());
            if let Some(id) = owner {
                self.announce_one(&id, address);
            }
        }
    }

    /// What came of probing: free addresses are bound, others are left alone and probed again later.
    pub(super) fn take_verdicts(&mut self, now: Duration) {
        for (interface, address, verdict) in self.prober.verdicts(now) {
            if let Some((_, socket)) = self.sockets.neighbours(&interface, Family::of(address)) {
                socket.probed(address);
            }
            let seeks = |id: &&RouterId| {
                id.interface == interface
                    && self.ordered.get(*id).is_some_and(|config| config.addresses.contains(&address))
                    && self.is_master(id)
            };
            let Some(id) = self.running.keys().find(seeks).cloned() else { continue };
            let key = (id.clone(), address);
            self.news.now();
            match verdict {
                Verdict::Free => {
                    self.yielded.remove(&key);
                    self.claims.forget(address);
                    self.proven.insert(key);
                    self.want(&id, &[address]);
                }
                Verdict::InUse(mac) => {
                    warn!(%address, interface, mac = text(mac), "is in use by another machine, it is left to it");
                    self.claims.note(now, &interface, address, mac, true);
                    self.yielded.insert(key, now + YIELD);
                }
            }
        }
        let again: Vec<(RouterId, IpAddr)> =
            self.yielded.iter().filter(|(_, at)| **at <= now).map(|(key, _)| key.clone()).collect();
        self.yielded.retain(|_, at| *at > now);
        for (id, address) in again {
            if self.is_master(&id) {
                self.want(&id, &[address]);
            }
        }
    }
}

/// Whether the node forwards what comes in by an interface: neighbours are told (RFC 4861 section 4.4).
fn forwards(interface: &str) -> bool {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/forwarding");
    std::fs::read_to_string(path).is_ok_and(|text| text.trim() != "0")
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
