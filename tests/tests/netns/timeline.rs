//! Owners over time while frames are lost: three routers on one bridge, adverts every 100 ms, what is seen in each one's
//! kernel and in each one's report, written down at every change.

use std::{
    fmt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use lab::{Segment, command};
use nix::ifaddrs::getifaddrs;
use vip_core::{api::VrrpState, vrrp::timers};

use crate::vrrp::{SOON, VIP, Vrrp};

/// Of hosts 1 to 3; the first is the owner.
const PRIORITIES: [u8; 3] = [254, 224, 194];
const INTERVAL: Duration = Duration::from_millis(100);
/// Between two looks at a host.
const PACE: Duration = Duration::from_millis(5);

/// What goes wrong on the bridge.
#[derive(Clone, Copy, Debug)]
pub enum Trouble {
    /// The host hears nothing and is heard.
    Deaf(u8),
    /// The host hears and is not heard.
    Mute(u8),
    /// That many of a hundred frames are lost by chance, of all hosts.
    Lossy(u8),
    /// The host is alone.
    Apart(u8),
}

/// Who had the address and who called itself master, from the beginning of a trouble to long after its end.
#[derive(Debug)]
pub struct Timeline {
    trouble: Trouble,
    events: Vec<(Duration, Event)>,
    healed: Duration,
    settled: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Began,
    Ended,
    Owners(Owners),
}

/// Hosts by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Owners {
    bound: Vec<u8>,
    masters: Vec<u8>,
}

/// Twice the longest active down interval of the three.
pub fn twice_down() -> Duration {
    PRIORITIES.iter().map(|priority| timers::down(*priority, INTERVAL)).max().unwrap_or_default() * 2
}

impl Timeline {
    /// Lets a trouble last that long, and watches for ten active down intervals after it.
    pub fn record(trouble: Trouble, lasting: Duration) -> Result<Self> {
        let segment = Segment::new(3)?;
        let mut all = Vec::new();
        for (host, priority) in segment.hosts().iter().zip(PRIORITIES) {
            let vrrp = Vrrp::start(host, host.number())?;
            vrrp.elect_with(priority)?;
            all.push(vrrp);
            command::until("the first to be the owner", SOON, || Ok(all[0].is_bound()?.then_some(())))?;
        }
        // Until the others have heard the owner.
        thread::sleep(Duration::from_millis(500));
        let recorder = Recorder::new();
        let done = AtomicBool::new(false);
        let healed = thread::scope(|scope| -> Result<Duration> {
            let watchers: Vec<_> =
                all.iter().map(|vrrp| scope.spawn(|| recorder.watch(vrrp, &done))).collect();
            let acted = recorder.go_through(&segment, trouble, lasting);
            done.store(true, Ordering::Relaxed);
            for watcher in watchers {
                watcher.join().ok().context("a watcher ended badly")??;
            }
            acted
        })?;
        let events = recorder.events.into_inner().unwrap_or_else(PoisonError::into_inner);
        let settled = settled(&events, healed);
        Ok(Self { trouble, events, healed, settled })
    }

    /// How long after the end of the trouble there was exactly one owner, for good. `None`: never.
    pub fn settled(&self) -> Option<Duration> {
        self.settled
    }
}

/// From `healed` to the last change to exactly one, that is master too.
fn settled(events: &[(Duration, Event)], healed: Duration) -> Option<Duration> {
    let mut since = None;
    for (at, event) in events {
        if let Event::Owners(owners) = event {
            let one = owners.bound.len() == 1 && owners.bound == owners.masters;
            since = one.then(|| since.unwrap_or(*at));
        }
    }
    since.map(|at: Duration| at.saturating_sub(healed))
}

struct Recorder {
    start: Instant,
    now: Mutex<Owners>,
    events: Mutex<Vec<(Duration, Event)>>,
}

impl Recorder {
    fn new() -> Self {
        Self { start: Instant::now(), now: Mutex::default(), events: Mutex::default() }
    }

    /// Begins and ends the trouble, and gives the time of its end.
    fn go_through(&self, segment: &Segment, trouble: Trouble, lasting: Duration) -> Result<Duration> {
        thread::sleep(Duration::from_millis(200));
        self.note(Event::Began);
        trouble.begin(segment)?;
        thread::sleep(lasting);
        // The command itself takes a while; its effect comes within it.
        let healed = self.note(Event::Ended);
        trouble.end(segment)?;
        thread::sleep(twice_down() * 5);
        Ok(healed)
    }

    /// Looks at a host until it is done.
    fn watch(&self, vrrp: &Vrrp<'_>, done: &AtomicBool) -> Result<()> {
        vrrp.host.run(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                let bound = getifaddrs()?.any(|interface| {
                    let address = interface.address;
                    address.and_then(|address| address.as_sockaddr_in().map(|v4| v4.ip() == VIP))
                        == Some(true)
                });
                self.saw(vrrp.number, bound, vrrp.state() == VrrpState::Master);
                thread::sleep(PACE);
            }
            Ok(())
        })?
    }

    fn saw(&self, number: u8, bound: bool, master: bool) {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let before = now.clone();
        let Owners { bound: having, masters } = &mut *now;
        for (list, is) in [(having, bound), (masters, master)] {
            list.retain(|one| *one != number);
            if is {
                list.push(number);
                list.sort_unstable();
            }
        }
        if *now != before {
            self.note(Event::Owners(now.clone()));
        }
    }

    fn note(&self, event: Event) -> Duration {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let at = self.start.elapsed();
        events.push((at, event));
        at
    }
}

impl Trouble {
    fn begin(self, segment: &Segment) -> Result<()> {
        match self {
            Self::Deaf(host) => segment.deafen(host),
            Self::Mute(host) => segment.mute(host),
            Self::Lossy(percent) => segment.lose(percent),
            Self::Apart(host) => segment.isolate(host),
        }
    }

    fn end(self, segment: &Segment) -> Result<()> {
        match self {
            Self::Apart(host) => segment.rejoin(host),
            Self::Deaf(_) | Self::Mute(_) | Self::Lossy(_) => segment.heal(),
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = |host: &u8| if *host == 1 { "the owner".to_owned() } else { format!("backup {host}") };
        match self {
            Self::Deaf(host) => write!(f, "{} hears nothing and is heard", who(host)),
            Self::Mute(host) => write!(f, "{} hears and is not heard", who(host)),
            Self::Lossy(percent) => write!(f, "{percent} % of all frames are lost"),
            Self::Apart(host) => write!(f, "{} is cut off", who(host)),
        }
    }
}

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}:", self.trouble)?;
        writeln!(f, "  {:>9}  {:12}  {:12}", "s", "address on", "masters")?;
        let list = |hosts: &[u8]| match hosts {
            [] => "nobody".to_owned(),
            some => some.iter().map(u8::to_string).collect::<Vec<_>>().join(" and "),
        };
        for (at, event) in &self.events {
            let at = at.as_secs_f64();
            match event {
                Event::Began => writeln!(f, "  {at:9.3}  -- {}", self.trouble)?,
                Event::Ended => writeln!(f, "  {at:9.3}  -- healed")?,
                Event::Owners(Owners { bound, masters }) => {
                    writeln!(f, "  {at:9.3}  {:12}  {:12}", list(bound), list(masters))?;
                }
            }
        }
        let two = twice_down().as_millis();
        match self.settled {
            Some(settled) => {
                write!(f, "  one owner {} ms after healing (2 x Down = {two} ms)", settled.as_millis())
            }
            None => {
                let waited =
                    self.events.last().map_or(Duration::ZERO, |(at, _)| at.saturating_sub(self.healed));
                write!(f, "  not one owner {} ms after healing (2 x Down = {two} ms)", waited.as_millis())
            }
        }
    }
}
