//! A look at everything in the kernel, in pieces of some milliseconds: a change never waits for more than one of them.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use vip_core::plan::{ServiceKey, Settings, Tables};

use crate::dataplane::{Dataplane, DataplaneError, ours};

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
    /// Something else.
    News,
    /// The chains of other programs that drop by default.
    Firewalls(BTreeSet<String>),
}

impl Audit {
    /// For a kernel that is about to be read as a whole: only the rules of others are left to look at.
    pub fn new() -> Self {
        Self { due: Instant::now() + EVERY, pieces: [Piece::Firewalls].into() }
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

    /// Compares the next piece with what is known of the kernel.
    ///
    /// # Errors
    /// Those of the dataplane.
    pub fn look(&mut self, dataplane: &mut impl Dataplane, known: &Tables) -> Result<Seen, DataplaneError> {
        let same = match self.pieces.pop_front() {
            None => true,
            Some(Piece::Outline) => {
                let outline = dataplane.outline()?;
                let ours = ours(&outline);
                self.pieces.extend(ours.chunks(AT_ONCE).map(|some| Piece::Destinations(some.to_vec())));
                self.pieces.push_back(Piece::Firewalls);
                agree(&outline, known)
            }
            Some(Piece::Destinations(keys)) => {
                // One that a change has deleted meanwhile is nobody's concern.
                let same = |(key, found)| {
                    known.services.get(&key).is_none_or(|service| service.destinations == found)
                };
                dataplane.destinations(&keys)?.into_iter().all(same)
            }
            // That they can't be seen is said where our own table can't be.
            Some(Piece::Firewalls) => return Ok(Seen::Firewalls(dataplane.firewalls().unwrap_or_default())),
        };
        Ok(if same { Seen::Known } else { Seen::News })
    }
}

/// Whether two tables are the same but for destinations.
fn agree(a: &Tables, b: &Tables) -> bool {
    fn settings(tables: &Tables) -> impl Iterator<Item = (&ServiceKey, &Settings)> {
        tables.services.iter().map(|(key, service)| (key, &service.settings))
    }
    settings(a).eq(settings(b))
        && (&a.ledger, &a.guarded, &a.direct, &a.sources) == (&b.ledger, &b.guarded, &b.direct, &b.sources)
}
