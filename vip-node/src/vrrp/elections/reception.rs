//! Advertisements that arrive: checked, counted, handed to the router they are for.

use std::net::IpAddr;
use std::time::Duration;

use tracing::{debug, error, warn};
use vip_core::api::VrrpState;
use vip_core::vrrp::packet::{self, Advert, Context, Refusal};
use vip_core::vrrp::{Family, RouterId, timers};

use super::Elections;
use crate::vrrp::wire::Packet;

/// So many packets of one socket are read before the timers are looked at: more than a socket's queue holds, of which the
/// smallest takes 768 bytes.
const BATCH: usize = 12_000;

impl Elections {
    pub(super) fn receive(&mut self) {
        self.backlog = false;
        for key in self.sockets.keys() {
            for read in 0.. {
                if read == BATCH {
                    self.backlog = true;
                    break;
                }
                match self.sockets.receive(&key) {
                    Ok(Some((packet, age))) => {
                        let packet = packet.ok_or(Refusal::Malformed);
                        if let Err(refusal) = packet.and_then(|packet| self.accept(&key.0, packet, age)) {
                            self.heard.refuse(refusal);
                            self.news.later(self.now());
                        }
                    }
                    Ok(None) => break,
                    // The socket reports once that its interface went down; the kernel's message tells the rest.
                    Err(error) => {
                        debug!(interface = key.0, %error, "cannot receive");
                        break;
                    }
                }
            }
        }
    }

    fn accept(&mut self, interface: &str, packet: Packet, age: Duration) -> Result<(), Refusal> {
        let Packet { source, destination, hop_limit, payload } = packet;
        let local = Some(destination).filter(|address| self.network.has(interface, *address));
        let checksum = self.lan.checksum.accepted();
        let advert = packet::decode(&payload, &Context { source, destination, local, hop_limit, checksum })?;
        let id = RouterId { interface: interface.to_owned(), family: Family::of(source), vrid: advert.vrid };
        let known = self.lan.peer(source).is_some();
        if self.network.has(interface, source) {
            return Err(Refusal::Own);
        }
        let Some(running) = self.running.get_mut(&id) else {
            // One of us, in an election that this node has no part in.
            if known {
                return Ok(());
            }
            self.ignore(&id, source, &advert);
            return Err(Refusal::Vrid(advert.vrid));
        };
        if !known && !running.router.config().is_claimed_by(&advert) {
            self.ignore(&id, source, &advert);
            return Err(Refusal::Foreign);
        }
        if advert.priority > 0 && running.router.state() == VrrpState::Backup {
            running.inherits.clone_from(&advert.addresses);
        }
        let rival = advert.priority == 255 && running.router.config().priority == 255;
        if rival && !std::mem::replace(&mut running.rivalled, true) {
            error!(vrid = id.vrid, interface, %source, "two routers have priority 255: one of them is misconfigured");
        }
        let now = self.epoch.elapsed();
        let arrived = arrived(now, age, timers::from_centiseconds(advert.interval), self.worked);
        let master = running.router.master();
        let actions = running.router.receive(arrived, source, &advert);
        let before = running.rival(now);
        running.note_rival(now, source, advert.priority);
        if running.rival(now) != before {
            self.news.now();
        }
        let another = running.router.master() != master;
        if self.heard.accept(now, &id, source, &advert) || another {
            self.news.now();
        }
        self.act(&id, actions);
        Ok(())
    }

    /// A router that speaks for others is remembered, and never obeyed.
    fn ignore(&mut self, id: &RouterId, source: IpAddr, advert: &Advert) {
        let now = self.now();
        let known = self.heard.ignores(now, id, source);
        if !self.heard.ignore(now, id, source, advert) {
            return;
        }
        self.news.later(now);
        if !known && self.running.contains_key(id) {
            warn!(vrid = id.vrid, interface = id.interface, %source, "a foreign router has the same identifier");
        }
    }
}

/// When a packet arrived. Silence begins then, not when this process was woken up for it. But of one that was starved the queue may
/// have overflown and its last packet be old, and a wall clock that was set makes an age of anything: so it was never long ago, and not
/// before the turn in which it was not there yet.
fn arrived(now: Duration, age: Duration, interval: Duration, turn: Duration) -> Duration {
    now.saturating_sub(age.min(interval / 10)).max(turn)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_of_the_wall_clock_moves_no_packet_by_more_than_a_tenth_of_an_interval() {
        let at = Duration::from_millis;
        let arrived = |age| arrived(at(10_000), age, at(100), at(9_995));
        assert_eq!(arrived(Duration::from_micros(300)), at(10_000) - Duration::from_micros(300));
        for age in [at(6), at(200), Duration::from_secs(3600), Duration::MAX] {
            assert_eq!(arrived(age), at(9_995), "{age:?}: the turn before");
        }
        for age in [at(11), Duration::from_secs(1 << 40), Duration::MAX] {
            assert_eq!(super::arrived(at(10_000), age, at(100), Duration::ZERO), at(9_990), "{age:?}");
        }
        assert_eq!(super::arrived(at(1), Duration::MAX, at(100), Duration::ZERO), Duration::ZERO);
    }
}
