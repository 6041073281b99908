//! A look at everything in the kernel, in pieces of some milliseconds: a change never waits for more than one of them.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use vip_core::plan::{ServiceKey, Tables};

use crate::dataplane::{Dataplane, DataplaneError};

/// From the begin of one audit to that of the next.
const EVERY: Duration = Duration::from_secs(10);
/// Services whose destinations are read in one piece.
const AT_ONCE: usize = 64;

/// What is still to be looked at.
#[derive(Debug)]
pub struct Audit {
    due: Instant,
    pieces: VecDeque<Piece>,
}

#[derive(Debug)]
enum Piece {
    /// Everything but destinations.
    Outline,
    Destinations(Vec<ServiceKey>),
    /// The rules of others, last: to look through them takes long while they are being written.
    Firewalls,
}

/// What a piece has shown.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen {
    /// What was known.
    Known,
    /// Something else, which is known now.
    News,
    /// The chains of other programs that drop by default.
    Firewalls(BTreeSet<String>),
}

impl Audit {
    /// One that is due.
    pub fn new() -> Self {
        Self { due: Instant::now(), pieces: VecDeque::new() }
    }

    /// Whether it is time to begin.
    pub fn is_due(&self) -> bool {
        Instant::now() >= self.due
    }

    /// Begins, also anew.
    pub fn begin(&mut self) {
        self.due = Instant::now() + EVERY;
        self.pieces = [Piece::Outline].into();
    }

    /// Whether there is something to look at.
    pub fn is_under_way(&self) -> bool {
        !self.pieces.is_empty()
    }

    /// Looks at the next piece, and brings what is known of the kernel up to date with it.
    ///
    /// # Errors
    /// Those of the dataplane; what is known is then as it was.
    pub fn look(
        &mut self,
        dataplane: &mut impl Dataplane,
        known: &mut Tables,
    ) -> Result<Seen, DataplaneError> {
        let news = match self.pieces.pop_front() {
            None => false,
            Some(Piece::Outline) => {
                let mut outline = dataplane.outline()?;
                let ours: Vec<ServiceKey> =
                    outline.services.keys().filter(|key| outline.ledger.contains(key)).copied().collect();
                self.pieces.extend(ours.chunks(AT_ONCE).map(|some| Piece::Destinations(some.to_vec())));
                self.pieces.push_back(Piece::Firewalls);
                for (key, service) in &mut outline.services {
                    if let Some(known) = known.services.get(key) {
                        service.destinations.clone_from(&known.destinations);
                    }
                }
                let news = outline != *known;
                *known = outline;
                news
            }
            Some(Piece::Destinations(keys)) => {
                let mut news = false;
                for (key, found) in dataplane.destinations(&keys)? {
                    // One that a change has deleted meanwhile is nobody's concern.
                    let Some(service) = known.services.get_mut(&key) else { continue };
                    news |= service.destinations != found;
                    service.destinations = found;
                }
                news
            }
            // That they can't be seen is said where our own table can't be.
            Some(Piece::Firewalls) => return Ok(Seen::Firewalls(dataplane.firewalls().unwrap_or_default())),
        };
        Ok(if news { Seen::News } else { Seen::Known })
    }
}
