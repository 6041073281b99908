//! Whether an address is in use by somebody else, asked before it is bound for the first time ever (RFC 5227 section
//! 2.1.1, RFC 4862 section 5.4). Pure: time is given, what is to be sent is returned, what was heard is told.
//!
//! The RFCs' seconds of waiting are for a crowd of hosts that start at once; here the whole takes half a second.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use crate::vrrp::announce::{AT_ONCE, SPACING};

/// So many probes are sent for an address (`PROBE_NUM`) ...
const PROBES: usize = 3;
/// ... so far apart ...
const INTERVAL: Duration = Duration::from_millis(150);
/// ... and after the last one is listened for so long. In all 500 ms; for hundreds of addresses a few more.
const LISTENING: Duration = Duration::from_millis(200);

/// What came of probing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody else has the address.
    Free,
    /// The machine with this hardware address has it, or is about to take it.
    InUse([u8; 6]),
}

/// The addresses that are being probed, by interface.
#[derive(Debug, Default)]
pub struct Prober {
    probing: BTreeMap<(String, IpAddr), Probing>,
    /// No probe before this time, for the sake of spacing.
    pause: Duration,
}

#[derive(Debug)]
struct Probing {
    sent: usize,
    /// When the next probe is due, or the verdict.
    due: Duration,
    taken: Option<[u8; 6]>,
}

impl Probing {
    fn is_over(&self, now: Duration) -> bool {
        self.taken.is_some() || (self.sent == PROBES && self.due <= now)
    }
}

impl Prober {
    /// Begins to probe an address, unless it is being probed already. The first probe is due at once.
    pub fn start(&mut self, now: Duration, interface: &str, address: IpAddr) {
        let fresh = Probing { sent: 0, due: now, taken: None };
        self.probing.entry((interface.to_owned(), address)).or_insert(fresh);
    }

    /// Whether an address is being probed; false once the verdict was taken.
    pub fn is_probing(&self, interface: &str, address: IpAddr) -> bool {
        self.probing.contains_key(&(interface.to_owned(), address))
    }

    /// Stops probing what is not wanted any more; there is no verdict on it.
    pub fn retain(&mut self, mut wanted: impl FnMut(&str, IpAddr) -> bool) {
        self.probing.retain(|(interface, address), _| wanted(interface, *address));
    }

    /// The probes to send now: those with the fewest sent come first. After a failure to send, a probe counts as sent.
    pub fn due(&mut self, now: Duration) -> Vec<(String, IpAddr)> {
        if now < self.pause {
            return Vec::new();
        }
        let mut due: Vec<(usize, (String, IpAddr))> = self
            .probing
            .iter()
            .filter(|(_, it)| it.taken.is_none() && it.sent < PROBES && it.due <= now)
            .map(|(key, it)| (it.sent, key.clone()))
            .collect();
        due.sort_unstable();
        if due.len() > AT_ONCE {
            self.pause = now + SPACING;
        }
        due.truncate(AT_ONCE);
        for (_, key) in &due {
            if let Some(it) = self.probing.get_mut(key) {
                it.sent += 1;
                it.due = now + if it.sent < PROBES { INTERVAL } else { LISTENING };
            }
        }
        due.into_iter().map(|(_, key)| key).collect()
    }

    /// A machine that is neither this node nor a peer says that it has an address, or is about to take it.
    pub fn heard(&mut self, now: Duration, interface: &str, address: IpAddr, mac: [u8; 6]) {
        if let Some(it) = self.probing.get_mut(&(interface.to_owned(), address))
            && it.taken.is_none()
        {
            it.taken = Some(mac);
            it.due = now;
        }
    }

    /// Takes the verdicts that are known now. What was received must have been told before: a process that was paused
    /// would otherwise believe in a silence that it did not hear.
    pub fn verdicts(&mut self, now: Duration) -> Vec<(String, IpAddr, Verdict)> {
        let mut verdicts = Vec::new();
        self.probing.retain(|(interface, address), it| {
            let over = it.is_over(now);
            if over {
                let verdict = it.taken.map_or(Verdict::Free, Verdict::InUse);
                verdicts.push((interface.clone(), *address, verdict));
            }
            !over
        });
        verdicts
    }

    /// When [`Prober::due`] or [`Prober::verdicts`] has something to say.
    pub fn next_deadline(&self) -> Option<Duration> {
        let deadline = |it: &Probing| match it.taken {
            None if it.sent < PROBES => it.due.max(self.pause),
            _ => it.due,
        };
        self.probing.values().map(deadline).min()
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

    type Judged = (Duration, IpAddr, Verdict);

    /// Goes from deadline to deadline until nothing is probed: the probes and the verdicts, with their times.
    fn play(prober: &mut Prober) -> (Vec<(Duration, IpAddr)>, Vec<Judged>) {
        let (mut sent, mut verdicts) = (Vec::new(), Vec::new());
        while let Some(now) = prober.next_deadline() {
            let due = prober.due(now);
            assert!(due.len() <= AT_ONCE);
            sent.extend(due.into_iter().map(|(_, address)| (now, address)));
            verdicts.extend(prober.verdicts(now).into_iter().map(|(_, address, it)| (now, address, it)));
        }
        (sent, verdicts)
    }

    #[test]
    fn an_address_is_free_after_three_probes_and_some_listening() {
        let mut prober = Prober::default();
        prober.start(at(1000), "eth0", ip(50));
        assert!(prober.is_probing("eth0", ip(50)));
        assert!(!prober.is_probing("eth1", ip(50)));
        let (sent, verdicts) = play(&mut prober);
        assert_eq!(sent, [1000, 1150, 1300].map(|millis| (at(millis), ip(50))));
        assert_eq!(verdicts, [(at(1500), ip(50), Verdict::Free)]);
        assert!(!prober.is_probing("eth0", ip(50)));
    }

    #[test]
    fn a_claim_ends_it_at_once_and_the_first_one_counts() {
        let mut prober = Prober::default();
        prober.start(at(0), "eth0", ip(50));
        prober.start(at(0), "eth0", ip(51));
        assert_eq!(prober.due(at(0)).len(), 2);
        prober.start(at(1), "eth0", ip(50));
        assert_eq!(prober.due(at(1)), [], "it is being probed already");
        prober.heard(at(2), "eth1", ip(50), MAC);
        prober.heard(at(2), "eth0", ip(52), MAC);
        assert_eq!(prober.verdicts(at(2)), [], "another interface, another address");
        prober.heard(at(3), "eth0", ip(50), MAC);
        prober.heard(at(4), "eth0", ip(50), [7; 6]);
        assert_eq!(prober.next_deadline(), Some(at(3)));
        assert_eq!(prober.verdicts(at(4)), [("eth0".to_owned(), ip(50), Verdict::InUse(MAC))]);
        let (_, verdicts) = play(&mut prober);
        assert_eq!(verdicts, [(at(500), ip(51), Verdict::Free)]);
    }

    #[test]
    fn a_process_that_was_paused_still_sends_all_probes_and_listens() {
        let mut prober = Prober::default();
        prober.start(at(0), "eth0", ip(50));
        prober.due(at(0));
        assert_eq!(prober.verdicts(at(9000)), []);
        assert_eq!(prober.due(at(9000)).len(), 1);
        let (sent, verdicts) = play(&mut prober);
        assert_eq!(sent, [(at(9150), ip(50))]);
        assert_eq!(verdicts, [(at(9350), ip(50), Verdict::Free)]);
        // What was heard while it was paused counts, although the time is over.
        prober.start(at(10_000), "eth0", ip(50));
        for millis in [10_000, 10_150, 10_300] {
            prober.due(at(millis));
        }
        prober.heard(at(20_000), "eth0", ip(50), MAC);
        assert_eq!(prober.verdicts(at(20_000)), [("eth0".to_owned(), ip(50), Verdict::InUse(MAC))]);
    }

    #[test]
    fn hundreds_are_spaced_and_judged_in_time() {
        let mut prober = Prober::default();
        for n in 0..1000 {
            prober.start(at(0), "eth0", ip(n));
        }
        let (sent, verdicts) = play(&mut prober);
        assert_eq!((sent.len(), verdicts.len()), (3000, 1000));
        let mut first: Vec<IpAddr> = sent[..1000].iter().map(|(_, address)| *address).collect();
        first.sort_unstable();
        first.dedup();
        assert_eq!(first.len(), 1000, "the first of each comes first");
        assert!(sent[999].0 <= at(15));
        assert!(verdicts.iter().all(|(time, _, verdict)| *time < at(700) && *verdict == Verdict::Free));
    }

    #[test]
    fn what_is_not_wanted_any_more_is_not_probed() {
        let mut prober = Prober::default();
        prober.start(at(0), "eth0", ip(50));
        prober.start(at(0), "eth0", ip(51));
        prober.retain(|_, address| address == ip(51));
        let (_, verdicts) = play(&mut prober);
        assert_eq!(verdicts, [(at(500), ip(51), Verdict::Free)]);
    }
}
