//! Who was heard, and what was refused. Both are bounded, whatever the LAN sends.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use vip_core::vrrp::packet::{Advert, Refusal};
use vip_core::vrrp::{RouterId, timers};

use crate::link;

/// A peer that was not heard for this long, or for four of its intervals, is forgotten.
const LIFETIME: Duration = Duration::from_secs(10);
/// A router of others is remembered for longer: its identifier is to be avoided, and it may speak seldom.
const FOREIGN_LIFETIME: Duration = Duration::from_secs(60);
/// At most so many of each are remembered.
const LIMIT: usize = 1024;

/// The senders of advertisements, and a counter for each kind of refusal.
#[derive(Debug)]
pub struct Heard {
    peers: Senders,
    foreign: Senders,
    refused: BTreeMap<&'static str, u64>,
}

impl Default for Heard {
    fn default() -> Self {
        Self {
            peers: Senders::new(LIFETIME),
            foreign: Senders::new(FOREIGN_LIFETIME),
            refused: BTreeMap::new(),
        }
    }
}

impl Heard {
    /// An advertisement was accepted. Whether that is news.
    pub fn accept(&mut self, now: Duration, id: &RouterId, source: IpAddr, advert: &Advert) -> bool {
        self.peers.note(now, id, source, advert)
    }

    /// A valid advertisement was heard that is none of ours. Whether that is news.
    pub fn ignore(&mut self, now: Duration, id: &RouterId, source: IpAddr, advert: &Advert) -> bool {
        self.foreign.note(now, id, source, advert)
    }

    /// Whether a router of others was heard lately.
    pub fn ignores(&self, now: Duration, id: &RouterId, source: IpAddr) -> bool {
        self.foreign.heard.get(&(id.clone(), source)).is_some_and(|last| last.until > now)
    }

    /// Some of the routers of others turn out to be ours.
    pub fn acquit(&mut self, mut ours: impl FnMut(IpAddr) -> bool) {
        self.foreign.heard.retain(|(_, source), _| !ours(*source));
    }

    /// A packet was refused.
    pub fn refuse(&mut self, refusal: Refusal) {
        *self.refused.entry(refusal.kind()).or_default() += 1;
    }

    /// Peers heard lately.
    pub fn peers(&self, now: Duration) -> Vec<link::Heard> {
        self.peers.lately(now)
    }

    /// Routers of others heard lately.
    pub fn foreign(&self, now: Duration) -> Vec<link::Heard> {
        self.foreign.lately(now)
    }

    /// Refused packets by kind.
    pub fn refused(&self) -> BTreeMap<String, u64> {
        self.refused.iter().map(|(kind, count)| ((*kind).to_owned(), *count)).collect()
    }
}

/// Who spoke in which election.
#[derive(Debug)]
struct Senders {
    lifetime: Duration,
    heard: BTreeMap<(RouterId, IpAddr), Last>,
}

/// The last word of a sender.
#[derive(Clone, Copy, Debug)]
struct Last {
    priority: u8,
    /// When it is forgotten.
    until: Duration,
}

impl Senders {
    fn new(lifetime: Duration) -> Self {
        Self { lifetime, heard: BTreeMap::new() }
    }

    fn note(&mut self, now: Duration, id: &RouterId, source: IpAddr, advert: &Advert) -> bool {
        let key = (id.clone(), source);
        let silence = timers::from_centiseconds(advert.interval) * 4;
        let last = Last { priority: advert.priority, until: now + self.lifetime.max(silence) };
        if let Some(known) = self.heard.get_mut(&key) {
            let before = std::mem::replace(known, last);
            return before.priority != last.priority || before.until <= now;
        }
        if self.heard.len() >= LIMIT {
            self.heard.retain(|_, last| last.until > now);
        }
        let room = self.heard.len() < LIMIT;
        if room {
            self.heard.insert(key, last);
        }
        room
    }

    fn lately(&self, now: Duration) -> Vec<link::Heard> {
        let lately = self.heard.iter().filter(|(_, last)| last.until > now);
        lately
            .map(|((id, address), last)| link::Heard {
                id: id.clone(),
                address: *address,
                priority: last.priority,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vip_core::vrrp::Family;

    fn said(priority: u8) -> Advert {
        Advert { vrid: 7, priority, interval: 10, addresses: Vec::new() }
    }

    #[test]
    fn who_speaks_seldom_is_remembered_for_longer() {
        let id = RouterId { interface: "eth0".into(), family: Family::V4, vrid: 7 };
        let mut heard = Heard::default();
        let source = IpAddr::from([10, 87, 0, 12]);
        heard.accept(Duration::ZERO, &id, source, &Advert { interval: 4000, ..said(100) });
        assert_eq!(heard.peers(Duration::from_secs(159)).len(), 1);
        assert_eq!(heard.peers(Duration::from_secs(160)), []);
    }

    #[test]
    fn peers_are_forgotten_and_never_too_many() {
        let id = RouterId { interface: "eth0".into(), family: Family::V4, vrid: 7 };
        let mut heard = Heard::default();
        for number in 0..5000_u32 {
            heard.accept(Duration::ZERO, &id, IpAddr::V4(number.into()), &said(100));
        }
        assert_eq!(heard.peers(Duration::ZERO).len(), LIMIT);
        heard.accept(Duration::ZERO, &id, IpAddr::V4(0.into()), &said(50));
        assert_eq!(heard.peers(Duration::ZERO)[0].priority, 50);
        assert_eq!(heard.peers(LIFETIME), []);
        heard.accept(LIFETIME, &id, IpAddr::V4(9999.into()), &said(100));
        assert_eq!(heard.peers(LIFETIME).len(), 1);
    }

    #[test]
    fn news_is_who_was_not_there_or_has_another_priority() {
        let id = RouterId { interface: "eth0".into(), family: Family::V4, vrid: 7 };
        let (mut heard, source) = (Heard::default(), IpAddr::from([10, 87, 0, 12]));
        let words = [(0, 100), (1, 100), (2, 90), (3, 90), (70, 90)];
        let news =
            words.map(|(at, priority)| heard.ignore(Duration::from_secs(at), &id, source, &said(priority)));
        assert_eq!(news, [true, false, true, false, true]);
        assert_eq!(heard.foreign(Duration::from_secs(129)).len(), 1);
        let known = [129, 130].map(|at| heard.ignores(Duration::from_secs(at), &id, source));
        assert_eq!(known, [true, false]);
        assert_eq!(heard.peers(Duration::from_secs(70)), []);
        heard.acquit(|address| address == source);
        assert_eq!(heard.foreign(Duration::from_secs(70)), []);
    }

    #[test]
    fn refusals_are_counted_by_kind() {
        let mut heard = Heard::default();
        heard.refuse(Refusal::HopLimit(254));
        heard.refuse(Refusal::HopLimit(1));
        heard.refuse(Refusal::Foreign);
        assert_eq!(heard.refused(), BTreeMap::from([("foreign".to_owned(), 1), ("ttl".to_owned(), 2)]));
    }
}
