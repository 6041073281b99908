//! When to announce which address, and the bytes of an announcement: a burst when it is bound, again some seconds later,
//! then seldom. The first announcement of every address comes before the second of any, and hundreds are spaced.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use vip_core::vrrp::RouterId;

/// Times after the takeover. The kernel of a node whose processes died may answer for the lifetime of the address, so
/// the announcements go on until that has passed.
const BURST: [Duration; 9] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(350),
    Duration::from_millis(750),
    Duration::from_millis(1500),
    Duration::from_millis(2500),
    Duration::from_millis(3500),
    Duration::from_secs(5),
];
/// The slow refresh, for switches that forget.
const REFRESH: Duration = Duration::from_secs(60);
/// At most so many announcements at once; the next after [`SPACING`].
const AT_ONCE: usize = 32;
const SPACING: Duration = Duration::from_millis(2);

/// A burst is not begun anew before this time: a router that cannot hear us may claim our addresses many times a second.
const PATIENCE: Duration = Duration::from_secs(1);

/// What is still to be announced.
#[derive(Debug, Default)]
pub struct Announcer {
    plan: BTreeMap<IpAddr, Plan>,
    /// Not before this time, for the sake of spacing.
    pause: Duration,
}

/// The announcements of one address.
#[derive(Debug)]
struct Plan {
    router: RouterId,
    /// When its burst began.
    begun: Duration,
    /// How many were made since then.
    made: usize,
    /// When the next is due.
    due: Duration,
}

impl Announcer {
    /// Starts a burst for addresses that are bound now.
    pub fn announce(&mut self, now: Duration, router: &RouterId, addresses: &[IpAddr]) {
        for address in addresses {
            if self.plan.get(address).is_none_or(|plan| plan.begun + PATIENCE <= now) {
                self.plan.insert(*address, Plan { router: router.clone(), begun: now, made: 0, due: now });
            }
        }
    }

    /// Forgets an address that is released.
    pub fn forget(&mut self, address: IpAddr) {
        self.plan.remove(&address);
    }

    /// When [`Announcer::due`] has something to say.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.plan.values().map(|plan| plan.due).min().map(|due| due.max(self.pause))
    }

    /// What is to be announced now: addresses with the fewest announcements so far come first.
    pub fn due(&mut self, now: Duration) -> Vec<(RouterId, IpAddr)> {
        if now < self.pause {
            return Vec::new();
        }
        let waiting = self.plan.iter().filter(|(_, plan)| plan.due <= now);
        let mut due: Vec<(usize, IpAddr)> = waiting.map(|(address, plan)| (plan.made, *address)).collect();
        due.sort_unstable();
        if due.len() > AT_ONCE {
            self.pause = now + SPACING;
        }
        due.truncate(AT_ONCE);
        let mut announcements = Vec::with_capacity(due.len());
        for (_, address) in due {
            if let Some(plan) = self.plan.get_mut(&address) {
                plan.made += 1;
                plan.due = now
                    + match BURST.get(plan.made) {
                        Some(next) => *next - BURST[plan.made - 1],
                        None => REFRESH,
                    };
                announcements.push((plan.router.clone(), address));
            }
        }
        announcements
    }
}

/// The bytes of a gratuitous ARP request (RFC 5227 section 3, RFC 9568 section 6.4.2), without the Ethernet header.
pub fn gratuitous_arp(mac: [u8; 6], address: Ipv4Addr) -> [u8; 28] {
    let mut bytes = [0; 28];
    // Ethernet, IPv4, lengths 6 and 4, request.
    bytes[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    bytes[8..14].copy_from_slice(&mac);
    bytes[14..18].copy_from_slice(&address.octets());
    // Target hardware address: ignored, zero.
    bytes[24..].copy_from_slice(&address.octets());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use vip_core::vrrp::Family;

    fn router() -> RouterId {
        RouterId { interface: "eth0".into(), family: Family::V4, vrid: 7 }
    }

    fn ip(n: u16) -> IpAddr {
        let [high, low] = n.to_be_bytes();
        [10, 87, high, low].into()
    }

    #[test]
    fn an_address_is_announced_in_a_burst_and_then_seldom() {
        let mut announcer = Announcer::default();
        announcer.announce(Duration::from_secs(10), &router(), &[ip(50)]);
        let mut times = Vec::new();
        while times.len() < 11 {
            let at = announcer.next_deadline().unwrap();
            assert_eq!(announcer.due(at), [(router(), ip(50))]);
            times.push(at - Duration::from_secs(10));
        }
        assert_eq!(times[..9], BURST);
        assert_eq!(times[9..], [Duration::from_secs(65), Duration::from_secs(125)]);
        announcer.forget(ip(50));
        assert_eq!(announcer.next_deadline(), None);
    }

    #[test]
    fn a_quarrel_makes_no_storm() {
        let mut announcer = Announcer::default();
        let mut made = 0;
        for millis in 0..10_000 {
            let now = Duration::from_millis(millis);
            announcer.announce(now, &router(), &[ip(50)]);
            made += announcer.due(now).len();
        }
        assert_eq!(made, 50, "five in each second");
        announcer.forget(ip(50));
        let now = Duration::from_millis(10_000);
        announcer.announce(now, &router(), &[ip(50)]);
        assert_eq!(announcer.due(now).len(), 1, "a new takeover is announced at once");
    }

    #[test]
    fn the_first_of_each_comes_first_and_hundreds_are_spaced() {
        let mut announcer = Announcer::default();
        let all: Vec<IpAddr> = (0..250).map(ip).collect();
        announcer.announce(Duration::ZERO, &router(), &all);
        let mut heard = Vec::new();
        while heard.len() < 250 {
            let now = announcer.next_deadline().unwrap();
            let due = announcer.due(now);
            assert!(due.len() <= AT_ONCE);
            heard.extend(due.into_iter().map(|(_, address)| address));
        }
        heard.sort_unstable();
        assert_eq!(heard, all);
    }

    #[test]
    fn the_bytes_of_a_gratuitous_arp() {
        let bytes = gratuitous_arp([0x52, 0x54, 0, 0, 0, 1], Ipv4Addr::new(10, 87, 2, 50));
        let expected = "0001080006040001525400000001\
                        0a5702320000000000000a570232";
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, expected);
    }
}
