//! How many connections the destinations behind our addresses have: counted for some services at a time, and seldom. Nothing
//! depends on it: it is told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vip_core::plan::ServiceKey;

use crate::dataplane::Dataplane;

/// From one count to the next.
const EVERY: Duration = Duration::from_secs(30);
/// Services that are counted together: about a millisecond, and at most so many objects that are written anew.
const AT_ONCE: usize = 32;

/// Open connections, where there are any.
pub type Counts = BTreeMap<(ServiceKey, SocketAddr), u32>;

/// What was counted.
#[derive(Debug)]
pub struct Census {
    due: Instant,
    /// The service that was counted last.
    last: Option<ServiceKey>,
    counts: Arc<Counts>,
}

impl Census {
    /// Nothing was counted.
    pub fn new() -> Self {
        Self { due: Instant::now() + EVERY, last: None, counts: Arc::default() }
    }

    /// Whether it is time to count.
    pub fn is_due(&self) -> bool {
        Instant::now() >= self.due
    }

    /// What was counted last of each.
    pub fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }

    /// Counts for the services of these addresses that are next in turn. What cannot be counted now is the next time.
    pub fn count(
        &mut self,
        dataplane: &mut impl Dataplane,
        ours: &BTreeSet<ServiceKey>,
        owned: &BTreeSet<IpAddr>,
    ) {
        self.due = Instant::now() + EVERY;
        let after = self.last.map_or(Bound::Unbounded, Bound::Excluded);
        let turn = ours.range((after, Bound::Unbounded));
        let again = self.last.into_iter().flat_map(|last| ours.range(..=last));
        let next = turn.chain(again).filter(|key| owned.contains(&key.address)).take(AT_ONCE);
        let mut counts: Counts = self
            .counts
            .iter()
            .filter(|((key, _), _)| owned.contains(&key.address))
            .map(|(at, n)| (*at, *n))
            .collect();
        for key in next {
            let Ok(found) = dataplane.connections(key) else { continue };
            self.last = Some(*key);
            counts.retain(|(counted, _), _| counted != key);
            counts.extend(found.into_iter().map(|(to, count)| ((*key, to), count)));
        }
        self.counts = Arc::new(counts);
    }
}
