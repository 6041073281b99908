//! Which addresses are bound to which interface for which election, and what is still to be done about them: released,
//! bound, renewed, in batches, so that advertisements go out between two of them. It does nothing to the kernel itself.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use vip_core::vrrp::RouterId;

use super::address::{Key, RENEW};

/// So many addresses are worked on at once: less than a millisecond of the kernel's time.
const AT_ONCE: usize = 32;

/// The addresses of all elections.
#[derive(Debug, Default)]
pub struct Bindings {
    entries: BTreeMap<Key, Entry>,
    releases: VecDeque<Key>,
    /// Bound still, until the successor announces them: by which election, and for how long at most.
    handed: BTreeMap<Key, (RouterId, Duration)>,
    /// To be bound: those that were taken off first, of each kind in the order of their keys.
    wishes: BTreeSet<(Kind, Key)>,
    /// One that does not agree with its entry is out of date.
    renewals: BTreeSet<(Duration, Key)>,
}

/// Why an address is to be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Lost,
    Won,
}

#[derive(Debug)]
struct Entry {
    router: RouterId,
    /// When it is to be renewed; `None` until it is bound.
    renew: Option<Duration>,
    /// Bound, and the kernel has not said yet that it answers for it.
    unready: bool,
}

/// What is to be done next.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Take these off.
    pub release: Vec<Key>,
    /// Bind these.
    pub bind: Vec<Key>,
    /// Renew these.
    pub renew: Vec<Key>,
}

impl Bindings {
    /// An election wants an address on an interface. Whether it is there already, and hosts can be told.
    pub fn want(&mut self, router: &RouterId, key: Key) -> bool {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.router.clone_from(router);
            return entry.renew.is_some() && !entry.unready;
        }
        self.handed.remove(&key);
        self.entries.insert(key, Entry { router: router.clone(), renew: None, unready: false });
        self.wishes.insert((Kind::Won, key));
        false
    }

    /// An election does not want an address any more; nothing happens to one that another election has taken over.
    pub fn give_up(&mut self, router: &RouterId, key: Key) {
        if self.drop_out(router, key) {
            self.releases.push_back(key);
        }
    }

    /// Gives an address up when its successor announces it, or at a time, which is to come before its lifetime ends.
    pub fn hand_over(&mut self, router: &RouterId, key: Key, until: Duration) {
        if self.drop_out(router, key) {
            self.handed.insert(key, (router.clone(), until));
        }
    }

    /// Another router announces an address that was handed over.
    pub fn taken(&mut self, key: Key) {
        if self.handed.remove(&key).is_some() {
            self.releases.push_back(key);
        }
    }

    /// Whether an election is rid of an address that is bound.
    fn drop_out(&mut self, router: &RouterId, key: Key) -> bool {
        self.entries.get(&key).is_some_and(|entry| entry.router == *router)
            && self.forget(key).is_some_and(|entry| entry.renew.is_some())
    }

    /// An address was taken off by another program: it is wanted anew, before all others. Its election, if it is ours.
    pub fn lost(&mut self, key: Key) -> Option<RouterId> {
        let entry = self.entries.get_mut(&key)?;
        if entry.renew.take().is_some() {
            self.wishes.insert((Kind::Lost, key));
        }
        Some(entry.router.clone())
    }

    /// An address is not ours any more; it is left as it is.
    pub fn disown(&mut self, key: Key) -> Option<RouterId> {
        self.forget(key).map(|entry| entry.router)
    }

    fn forget(&mut self, key: Key) -> Option<Entry> {
        self.wishes.remove(&(Kind::Won, key));
        self.wishes.remove(&(Kind::Lost, key));
        self.entries.remove(&key)
    }

    /// An address is bound; `ready`: hosts can be told. Its election, unless it has lost interest.
    pub fn bound(&mut self, now: Duration, key: Key, ready: bool) -> Option<RouterId> {
        let entry = self.entries.get_mut(&key)?;
        // The kernel's word about a renewal is the same as that it is ready, so there is time for the latter first.
        let renew = now + if ready { RENEW } else { 2 * RENEW };
        entry.renew = Some(renew);
        entry.unready = !ready;
        self.renewals.insert((renew, key));
        Some(entry.router.clone())
    }

    /// The kernel answers for an address. Its election, if it has waited for that.
    pub fn ready(&mut self, key: Key) -> Option<RouterId> {
        let entry = self.entries.get_mut(&key)?;
        std::mem::take(&mut entry.unready).then(|| entry.router.clone())
    }

    /// What is to be done next; releases come first, for another node may have the address by now.
    pub fn next_batch(&mut self, now: Duration) -> Batch {
        let mut batch = Batch::default();
        let late = self.handed.iter().filter(|(_, (_, until))| *until <= now).map(|(key, _)| *key);
        for key in late.collect::<Vec<_>>() {
            self.taken(key);
        }
        batch.release.extend(self.releases.drain(..self.releases.len().min(AT_ONCE)));
        let room = AT_ONCE - batch.release.len();
        batch.bind.extend((0..room).map_while(|_| self.wishes.pop_first()).map(|(_, key)| key));
        let mut room = room - batch.bind.len();
        while room > 0
            && let Some((due, key)) = self.renewals.first().copied()
            && due <= now
        {
            self.renewals.pop_first();
            if let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.renew == Some(due)) {
                entry.renew = Some(now + RENEW);
                self.renewals.insert((now + RENEW, key));
                batch.renew.push(key);
                room -= 1;
            }
        }
        batch
    }

    /// When [`Bindings::next_batch`] has something; `Some(ZERO)`: at once.
    pub fn next_deadline(&self) -> Option<Duration> {
        if !self.releases.is_empty() || !self.wishes.is_empty() {
            return Some(Duration::ZERO);
        }
        let renewal = self.renewals.first().map(|(due, _)| *due);
        self.handed.values().map(|(_, until)| *until).chain(renewal).min()
    }

    /// Whether nothing of ours is left anywhere.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.releases.is_empty() && self.handed.is_empty()
    }

    /// Whether an address is bound.
    pub fn is_bound(&self, key: Key) -> bool {
        self.entries.get(&key).is_some_and(|entry| entry.renew.is_some())
    }

    /// All that are bound, each with its election.
    pub fn all(&self) -> impl Iterator<Item = (Key, &RouterId)> {
        let bound = self.entries.iter().filter(|(_, entry)| entry.renew.is_some());
        bound.map(|(key, entry)| (*key, &entry.router))
    }

    /// Whether an address is bound and handed over.
    pub fn is_handed(&self, key: Key) -> bool {
        self.handed.contains_key(&key)
    }

    /// All that are bound and handed over, each with the election that had it.
    pub fn handed(&self) -> impl Iterator<Item = (Key, &RouterId)> {
        self.handed.iter().map(|(key, (router, _))| (*key, router))
    }

    /// All that an election has or wants.
    pub fn of(&self, router: &RouterId) -> Vec<Key> {
        self.entries.iter().filter(|(_, entry)| entry.router == *router).map(|(key, _)| *key).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use vip_core::vrrp::Family;

    const NOW: Duration = Duration::from_secs(10);

    fn router(vrid: u8) -> RouterId {
        RouterId { interface: "eth0".into(), family: Family::V4, vrid }
    }

    fn key(number: u32) -> Key {
        (2, IpAddr::V4(number.into()))
    }

    #[test]
    fn addresses_are_bound_in_batches_and_renewed_in_turn() {
        let mut bindings = Bindings::default();
        for number in 0..40 {
            assert!(!bindings.want(&router(7), key(number)));
        }
        let mut sizes = Vec::new();
        while bindings.next_deadline() == Some(Duration::ZERO) {
            let batch = bindings.next_batch(NOW);
            sizes.push(batch.bind.len());
            for key in batch.bind {
                assert_eq!(bindings.bound(NOW, key, true), Some(router(7)));
            }
        }
        assert_eq!(sizes, [AT_ONCE, 40 - AT_ONCE]);
        assert_eq!(bindings.next_deadline(), Some(NOW + RENEW));
        assert_eq!(bindings.next_batch(NOW), Batch::default());
        assert_eq!(bindings.next_batch(NOW + RENEW).renew.len(), AT_ONCE);
        assert_eq!(bindings.next_batch(NOW + RENEW).renew.len(), 40 - AT_ONCE);
        assert_eq!(bindings.next_deadline(), Some(NOW + RENEW * 2));
        assert_eq!(bindings.all().count(), 40);
    }

    #[test]
    fn what_is_given_up_is_released_if_it_was_bound() {
        let mut bindings = Bindings::default();
        for number in 0..2 {
            bindings.want(&router(7), key(number));
        }
        bindings.next_batch(NOW);
        bindings.bound(NOW, key(0), true);
        for number in 0..2 {
            bindings.give_up(&router(7), key(number));
        }
        assert!(!bindings.is_empty());
        assert_eq!(bindings.bound(NOW, key(1), true), None, "nobody wants it any more");
        // Bound again while its release waits: off first, then on.
        bindings.want(&router(7), key(0));
        let batch = bindings.next_batch(NOW);
        assert_eq!((batch.release, batch.bind), (vec![key(0)], vec![key(0)]));
        bindings.give_up(&router(7), key(0));
        assert!(bindings.is_empty());
        assert_eq!(bindings.next_batch(NOW + RENEW), Batch::default(), "no renewal is left over");
    }

    #[test]
    fn what_is_handed_over_stays_until_it_is_taken_or_late() {
        let mut bindings = Bindings::default();
        let until = NOW + RENEW / 2;
        for number in 0..4 {
            bindings.want(&router(7), key(number));
        }
        for key in bindings.next_batch(NOW).bind {
            bindings.bound(NOW, key, true);
        }
        for number in 0..3 {
            bindings.hand_over(&router(7), key(number), until);
        }
        assert_eq!((bindings.all().count(), bindings.handed().count()), (1, 3));
        bindings.taken(key(0));
        bindings.taken(key(3));
        assert!((bindings.is_bound(key(3)), bindings.is_handed(key(0))) == (true, false));
        // It is won back.
        assert!(!bindings.want(&router(7), key(1)));
        let batch = bindings.next_batch(NOW);
        assert_eq!((batch.release, batch.bind), (vec![key(0)], vec![key(1)]));
        assert_eq!(bindings.next_deadline(), Some(until));
        assert_eq!(bindings.next_batch(until).release, [key(2)]);
        assert_eq!(bindings.handed().count(), 0);
    }

    #[test]
    fn an_address_that_moves_to_another_election_stays() {
        let mut bindings = Bindings::default();
        bindings.want(&router(7), key(0));
        bindings.bound(NOW, key(0), true);
        assert!(bindings.want(&router(8), key(0)));
        bindings.give_up(&router(7), key(0));
        assert!(bindings.is_bound(key(0)));
        assert_eq!(bindings.of(&router(8)), [key(0)]);
    }

    #[test]
    fn an_election_learns_once_that_an_address_is_ready() {
        let mut bindings = Bindings::default();
        bindings.want(&router(7), key(0));
        assert_eq!(bindings.ready(key(0)), None, "it is not bound");
        bindings.next_batch(NOW);
        bindings.bound(NOW, key(0), false);
        assert_eq!(bindings.next_batch(NOW + RENEW), Batch::default(), "its renewal would look the same");
        assert_eq!(bindings.ready(key(0)), Some(router(7)));
        assert_eq!(bindings.ready(key(0)), None, "it was renewed");
        bindings.bound(NOW, key(0), true);
        assert_eq!(bindings.ready(key(0)), None);
    }

    #[test]
    fn what_is_lost_is_wanted_first() {
        let mut bindings = Bindings::default();
        bindings.want(&router(7), key(2));
        bindings.next_batch(NOW);
        bindings.bound(NOW, key(2), true);
        bindings.want(&router(7), key(0));
        assert_eq!(bindings.lost(key(9)), None);
        assert_eq!(bindings.lost(key(2)), Some(router(7)));
        assert_eq!(bindings.lost(key(2)), Some(router(7)), "twice is once");
        assert_eq!(bindings.next_batch(NOW).bind, [key(2), key(0)]);
        assert_eq!(bindings.disown(key(2)), Some(router(7)));
        assert!(!bindings.is_bound(key(2)));
    }
}
