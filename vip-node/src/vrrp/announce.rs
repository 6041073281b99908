//! When to announce which address: a burst when it is bound, again some seconds later, then seldom. The first
//! announcement of every address comes before the second of any, and hundreds are spaced: the first announcements of 250
//! addresses leave within 3 ms, and of 1,000 within 15 ms, not counting how much later than asked a process wakes up.
//!
//! Bytes and sockets are `neighbours`' affair; both families are alike here.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use vip_core::vrrp::RouterId;

/// Milliseconds after the takeover. The kernel of a node whose processes are dead or stopped may answer until the lifetime of
/// the address ends, three seconds after it was renewed last. A host that asked meanwhile and believed it is without an
/// answer from then until the next announcement, so there is one every quarter of a second until that bound has passed.
const BURST: [u64; 18] =
    [0, 50, 150, 350, 600, 850, 1100, 1350, 1600, 1850, 2100, 2350, 2600, 2850, 3100, 3350, 3600, 5000];
/// The slow refresh, for switches that forget.
const REFRESH: Duration = Duration::from_secs(60);
/// At most so many frames at once, announcements or probes; the next after [`SPACING`]. That is 56 Mbit/s of neighbour
/// advertisements, half of what the slowest Ethernet that serves a cluster bears, and a quarter of a socket's send buffer.
pub const AT_ONCE: usize = 64;
/// See [`AT_ONCE`].
pub const SPACING: Duration = Duration::from_millis(1);

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
            match self.plan.get_mut(address) {
                Some(plan) if plan.begun + PATIENCE > now => plan.router.clone_from(router),
                _ => {
                    let plan = Plan { router: router.clone(), begun: now, made: 0, due: now };
                    self.plan.insert(*address, plan);
                }
            }
        }
    }

    /// Forgets an address that an election releases, unless another one has it by now.
    pub fn forget(&mut self, router: &RouterId, address: IpAddr) {
        if self.plan.get(&address).is_some_and(|plan| plan.router == *router) {
            self.plan.remove(&address);
        }
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
                        Some(next) => Duration::from_millis(*next - BURST[plan.made - 1]),
                        None => REFRESH,
                    };
                announcements.push((plan.router.clone(), address));
            }
        }
        announcements
    }
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
        while times.len() < 20 {
            let at = announcer.next_deadline().unwrap();
            assert_eq!(announcer.due(at), [(router(), ip(50))]);
            times.push((at - Duration::from_secs(10)).as_millis());
        }
        assert_eq!(times[..18], BURST.map(u128::from));
        assert_eq!(times[18..], [65_000, 125_000]);
        // It has moved to another election, which had it before this one let go.
        let other = RouterId { vrid: 5, ..router() };
        announcer.announce(Duration::from_secs(200), &other, &[ip(50)]);
        announcer.forget(&router(), ip(50));
        assert_eq!(announcer.due(Duration::from_secs(200)), [(other.clone(), ip(50))]);
        announcer.announce(Duration::from_millis(200_100), &router(), &[ip(50)]);
        announcer.forget(&other, ip(50));
        assert_eq!(announcer.due(Duration::from_millis(200_100)), [(router(), ip(50))], "during a burst too");
        announcer.forget(&router(), ip(50));
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
        assert_eq!(made, 60, "six in each second");
        announcer.forget(&router(), ip(50));
        let now = Duration::from_millis(10_000);
        announcer.announce(now, &router(), &[ip(50)]);
        assert_eq!(announcer.due(now).len(), 1, "a new takeover is announced at once");
    }

    #[test]
    fn the_first_of_each_comes_first_and_hundreds_are_spaced() {
        for (count, last) in [(64, 0), (250, 3), (1000, 15)] {
            let mut announcer = Announcer::default();
            let all: Vec<IpAddr> = (0..count).map(ip).collect();
            announcer.announce(Duration::ZERO, &router(), &all);
            let (mut heard, mut now) = (Vec::new(), Duration::ZERO);
            while heard.len() < all.len() {
                now = announcer.next_deadline().unwrap();
                let due = announcer.due(now);
                assert!(due.len() <= AT_ONCE);
                heard.extend(due.into_iter().map(|(_, address)| address));
            }
            heard.sort_unstable();
            assert_eq!(heard, all);
            assert_eq!(now, Duration::from_millis(last), "{count} addresses");
        }
    }

    #[test]
    fn both_families_are_alike() {
        let six = IpAddr::from([0xfd87, 0, 0, 0, 0, 0, 2, 0x50]);
        let id = RouterId { family: Family::V6, ..router() };
        let mut announcer = Announcer::default();
        announcer.announce(Duration::ZERO, &router(), &[ip(50)]);
        announcer.announce(Duration::ZERO, &id, &[six]);
        assert_eq!(announcer.due(Duration::ZERO), [(router(), ip(50)), (id, six)]);
    }
}
