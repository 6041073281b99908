//! Who was heard, and what was refused. Both are bounded, whatever the LAN sends.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use vip_core::vrrp::RouterId;
use vip_core::vrrp::packet::Refusal;

use crate::link;

/// A peer that was not heard for this long is forgotten.
const LIFETIME: Duration = Duration::from_secs(10);
/// At most so many peers are remembered.
const LIMIT: usize = 1024;

/// The senders of accepted advertisements, and a counter for each kind of refusal.
#[derive(Debug, Default)]
pub struct Heard {
    peers: BTreeMap<(RouterId, IpAddr), (u8, Duration)>,
    refused: BTreeMap<&'static str, u64>,
}

impl Heard {
    /// An advertisement was accepted.
    pub fn accept(&mut self, now: Duration, id: &RouterId, source: IpAddr, priority: u8) {
        let key = (id.clone(), source);
        if self.peers.len() >= LIMIT && !self.peers.contains_key(&key) {
            self.peers.retain(|_, (_, heard)| *heard + LIFETIME > now);
        }
        if self.peers.len() < LIMIT || self.peers.contains_key(&key) {
            self.peers.insert(key, (priority, now));
        }
    }

    /// A packet was refused.
    pub fn refuse(&mut self, refusal: Refusal) {
        *self.refused.entry(refusal.kind()).or_default() += 1;
    }

    /// Peers heard lately.
    pub fn peers(&self, now: Duration) -> Vec<link::Heard> {
        let lately = self.peers.iter().filter(|(_, (_, heard))| *heard + LIFETIME > now);
        lately
            .map(|((id, address), (priority, _))| link::Heard {
                id: id.clone(),
                address: *address,
                priority: *priority,
            })
            .collect()
    }

    /// Refused packets by kind.
    pub fn refused(&self) -> BTreeMap<String, u64> {
        self.refused.iter().map(|(kind, count)| ((*kind).to_owned(), *count)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vip_core::vrrp::Family;

    #[test]
    fn peers_are_forgotten_and_never_too_many() {
        let id = RouterId { interface: "eth0".into(), family: Family::V4, vrid: 7 };
        let mut heard = Heard::default();
        for number in 0..5000_u32 {
            heard.accept(Duration::ZERO, &id, IpAddr::V4(number.into()), 100);
        }
        assert_eq!(heard.peers(Duration::ZERO).len(), LIMIT);
        heard.accept(Duration::ZERO, &id, IpAddr::V4(0.into()), 50);
        assert_eq!(heard.peers(Duration::ZERO)[0].priority, 50);
        assert_eq!(heard.peers(LIFETIME), []);
        heard.accept(LIFETIME, &id, IpAddr::V4(9999.into()), 100);
        assert_eq!(heard.peers(LIFETIME).len(), 1);
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
