//! Which other machines claim addresses of ours, and how often one is told again whose they are. Pure, and bounded
//! whatever the LAN sends.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use crate::link;

/// A claim that was not heard again for this long is forgotten.
const LIFETIME: Duration = Duration::from_secs(60);
/// At most so many machines are remembered for an address, ...
const MACHINES: usize = 8;
/// ... and so many claims in all: what comes then is not remembered until something is forgotten.
const LIMIT: usize = 1024;
/// How often what is told of a claim changes, and how often one is looked for that can be forgotten.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often an address is defended at most. RFC 5227 section 2.4 (c) has ten seconds, for hosts that cannot know which
/// of them is right; here an election has decided, and clients must not be misled for so long.
const DEFENCE: Duration = Duration::from_secs(1);

/// Claims that were heard.
#[derive(Debug, Default)]
pub struct Claims {
    heard: BTreeMap<(IpAddr, String, [u8; 6]), Heard>,
    defended: BTreeMap<IpAddr, Duration>,
    /// Nothing can be forgotten before this time.
    sweep: Duration,
}

#[derive(Debug)]
struct Heard {
    yielded: bool,
    count: u64,
    last: Duration,
    /// The count that is told, and since when.
    told: (u64, Duration),
}

impl Claims {
    /// A machine that is neither this node nor a peer claims an address of ours. `yielded`: the address is left to it.
    pub fn note(&mut self, now: Duration, interface: &str, address: IpAddr, mac: [u8; 6], yielded: bool) {
        let key = (address, interface.to_owned(), mac);
        if let Some(it) = self.heard.get_mut(&key).filter(|it| it.last + LIFETIME > now) {
            it.yielded = yielded;
            it.count = it.count.saturating_add(1);
            it.last = now;
            if it.told.1 + PATIENCE <= now {
                it.told = (it.count, now);
            }
            return;
        }
        self.sweep(now);
        let machines = self.heard.range((address, String::new(), [0; 6])..);
        let machines = machines.take_while(|((of, _, _), _)| *of == address).take(MACHINES).count();
        if machines < MACHINES && self.heard.len() < LIMIT {
            self.heard.insert(key, Heard { yielded, count: 1, last: now, told: (1, now) });
        }
    }

    /// Whether to say once more, and only once, whose the address is: at most once a second for each address.
    pub fn defend(&mut self, now: Duration, address: IpAddr) -> bool {
        self.sweep(now);
        let lately = self.defended.get(&address).is_some_and(|at| *at + DEFENCE > now);
        let room = self.defended.len() < LIMIT || self.defended.contains_key(&address);
        if lately || !room {
            return false;
        }
        self.defended.insert(address, now);
        true
    }

    /// An address is not ours any more, or is not in conflict any more: what was heard of it is forgotten.
    pub fn forget(&mut self, address: IpAddr) {
        self.heard.retain(|(of, _, _), _| *of != address);
        self.defended.remove(&address);
    }

    /// The claims of the last minute. The count of a claim that is heard without end changes once or twice a second
    /// only, so that a report is no storm.
    pub fn report(&self, now: Duration) -> Vec<link::Claim> {
        let lately = self.heard.iter().filter(|(_, it)| it.last + LIFETIME > now);
        lately
            .map(|((address, interface, mac), it)| link::Claim {
                address: *address,
                interface: interface.clone(),
                mac: *mac,
                yielded: it.yielded,
                count: if it.told.1 + PATIENCE <= now { it.count } else { it.told.0 },
            })
            .collect()
    }

    fn sweep(&mut self, now: Duration) {
        if now >= self.sweep {
            self.sweep = now + PATIENCE;
            self.heard.retain(|_, it| it.last + LIFETIME > now);
            self.defended.retain(|_, at| *at + DEFENCE > now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 9];

    fn ip(n: u16) -> IpAddr {
        let [high, low] = n.to_be_bytes();
        [10, 87, high, low].into()
    }

    fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn mac(n: u32) -> [u8; 6] {
        let [a, b, c, d] = n.to_be_bytes();
        [2, 0, a, b, c, d]
    }

    #[test]
    fn a_claim_is_counted_and_forgotten_after_a_minute() {
        let mut claims = Claims::default();
        claims.note(at(0), "eth0", ip(50), MAC, true);
        let first =
            link::Claim { address: ip(50), interface: "eth0".into(), mac: MAC, yielded: true, count: 1 };
        assert_eq!(claims.report(at(0)), std::slice::from_ref(&first));
        claims.note(at(1500), "eth0", ip(50), MAC, false);
        assert_eq!(claims.report(at(1500)), [link::Claim { yielded: false, count: 2, ..first.clone() }]);
        assert_eq!(claims.report(at(61_499)).len(), 1);
        assert_eq!(claims.report(at(61_500)), []);
        claims.note(at(61_500), "eth0", ip(50), MAC, true);
        assert_eq!(claims.report(at(61_500)), [first], "counted anew");
        claims.forget(ip(50));
        assert_eq!(claims.report(at(61_500)), []);
    }

    #[test]
    fn a_claim_without_end_makes_no_storm_of_reports() {
        let mut claims = Claims::default();
        let mut told = Vec::new();
        for millis in 0..5000 {
            claims.note(at(millis), "eth0", ip(50), MAC, false);
            told.extend(claims.report(at(millis)).iter().map(|claim| claim.count));
        }
        told.dedup();
        assert!(told.len() <= 10, "{told:?}");
        assert_eq!(claims.report(at(6000))[0].count, 5000, "and the last count is right");
    }

    #[test]
    fn there_are_never_too_many() {
        let mut claims = Claims::default();
        for n in 0..100 {
            claims.note(at(0), "eth0", ip(50), mac(n), false);
        }
        assert_eq!(claims.report(at(0)).len(), MACHINES);
        for n in 0..5000 {
            claims.note(at(1), "eth0", ip(n), MAC, false);
            claims.defend(at(1), ip(n));
        }
        assert_eq!(claims.report(at(1)).len(), LIMIT);
        assert_eq!((claims.heard.len(), claims.defended.len()), (LIMIT, LIMIT));
        assert!(!claims.defend(at(1), ip(5000)));
        claims.note(at(61_000), "eth0", ip(9999), MAC, false);
        assert_eq!(claims.report(at(61_000)).len(), 1, "there is room again");
        assert!(claims.defend(at(61_000), ip(9999)));
    }

    #[test]
    fn an_address_is_defended_once_a_second() {
        let mut claims = Claims::default();
        let defended = (0..3000).filter(|millis| claims.defend(at(*millis), ip(50))).count();
        assert_eq!(defended, 3);
        assert!(claims.defend(at(2500), ip(51)), "each address for itself");
    }
}
