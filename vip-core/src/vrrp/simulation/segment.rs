//! The simulated LAN: hosts with a router each, links that delay, lose, double and disorder what is sent, and a record
//! of who owned the address when.
//!
//! The engine is given one monotonic time and compares it with nothing of another host's, so a step of a wall clock cannot
//! reach it. To show that it does not even by accident, each host counts from a moment of its own, and from another one
//! after each restart.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, VecDeque};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use crate::api::VrrpState;
use crate::vrrp::packet::{Advert, Checksum, Context, HOP_LIMIT, decode, group};
use crate::vrrp::router::{Action, Router};
use crate::vrrp::{Family, RouterConfig, RouterId, rank, timers};

/// Numbers that follow from a seed (splitmix64): the schedule is the seed.
#[derive(Clone, Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (bits ^ (bits >> 31)) % limit.max(1)
    }

    pub(super) fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    pub(super) fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(u64::try_from(length).unwrap())).unwrap()
    }

    /// From zero to a limit.
    pub(super) fn time(&mut self, limit: Duration) -> Duration {
        Duration::from_nanos(self.below(u64::try_from(limit.as_nanos()).unwrap() + 1))
    }
}

/// What all links do with a packet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    /// Of 100 packets, so many are lost.
    pub(super) loss: u64,
    /// Of 100 packets, so many arrive twice.
    pub(super) doubled: u64,
    /// The longest time on the way; the shortest is 0.1 ms.
    pub(super) flight: Duration,
    /// Whether packets from one host to another arrive in the order in which they were sent, as on a LAN.
    pub(super) ordered: bool,
}

impl Link {
    pub(super) const SHORTEST: Duration = Duration::from_micros(100);
    /// A LAN in good health.
    pub(super) const CALM: Self =
        Self { loss: 0, doubled: 0, flight: Duration::from_micros(300), ordered: true };
}

/// A packet on its way; the earlier one first, of two the one that was sent first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Flight {
    at: Duration,
    number: u64,
    from: usize,
    to: usize,
    bytes: Rc<[u8]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Running,
    /// A stopped process: what is sent to it waits in its socket, what it has bound stays.
    Paused,
    /// Switched off, or it has left.
    Gone,
}

pub(super) struct Host {
    pub(super) router: Router,
    pub(super) life: Life,
    pub(super) leaving: bool,
    pub(super) started: Duration,
    pub(super) takeovers: usize,
    /// Since when it has the address.
    bound: Option<Duration>,
    /// What its clock shows when the LAN's shows zero.
    epoch: Duration,
    inbox: VecDeque<(usize, Rc<[u8]>)>,
    /// How much its socket still takes while it is paused: other virtual routers share it.
    room: usize,
}

/// What was seen of the address since it was asked last.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Record {
    /// How long two certain hosts had it at the same time, at most.
    pub(super) shared: Duration,
    /// How long nobody had it, at most.
    pub(super) bare: Duration,
}

pub(super) struct Segment {
    pub(super) now: Duration,
    pub(super) hosts: Vec<Host>,
    pub(super) link: Link,
    pub(super) random: Random,
    /// Whether what one host sends does not reach another, by sender and receiver.
    cut: Vec<bool>,
    flights: BinaryHeap<Reverse<Flight>>,
    /// When the last packet from one host to another arrives.
    last: Vec<Duration>,
    sent: u64,
    record: Record,
    /// Since when nobody has the address.
    bare: Option<Duration>,
    traced: bool,
}

pub(super) fn address(host: usize) -> IpAddr {
    [10, 87, 0, u8::try_from(host).unwrap() + 11].into()
}

pub(super) fn config(
    host: usize,
    count: usize,
    interval: Duration,
    preempt: Option<Duration>,
) -> RouterConfig {
    let names: Vec<String> = (0..count).map(|host| format!("node-{host}")).collect();
    let vrid = 7;
    RouterConfig {
        id: RouterId { interface: "eth0".into(), family: Family::V4, vrid },
        priority: rank::priority(&names[host], names.iter().map(String::as_str), vrid, None),
        interval,
        preempt,
        addresses: vec![[10, 87, 2, 50].into()],
        fresh: BTreeSet::new(),
        contested: BTreeSet::new(),
    }
}

impl Segment {
    /// Hosts on a calm LAN, all started at once.
    pub(super) fn new(configs: Vec<RouterConfig>, random: Random, traced: bool) -> Self {
        let count = configs.len();
        let mut this = Self {
            now: Duration::ZERO,
            hosts: vec![],
            link: Link::CALM,
            random,
            cut: vec![false; count * count],
            flights: BinaryHeap::new(),
            last: vec![Duration::ZERO; count * count],
            sent: 0,
            record: Record::default(),
            bare: Some(Duration::ZERO),
            traced,
        };
        this.hosts = (configs.into_iter().enumerate())
            .map(|(host, config)| Host {
                router: Router::new(config, address(host)),
                life: Life::Gone,
                leaving: false,
                started: Duration::ZERO,
                takeovers: 0,
                bound: None,
                epoch: Duration::ZERO,
                inbox: VecDeque::new(),
                room: 0,
            })
            .collect();
        (0..count).for_each(|host| this.revive(host));
        this
    }

    pub(super) fn trace(&self, what: impl FnOnce() -> String) {
        if self.traced {
            println!("{:>12.6} {}", self.now.as_secs_f64(), what());
        }
    }

    /// A host comes (back) with nothing but its settings.
    pub(super) fn revive(&mut self, host: usize) {
        if self.hosts[host].life != Life::Gone {
            return;
        }
        self.trace(|| format!("{host} starts"));
        let epoch = self.random.time(Duration::from_secs(1 << 30));
        let this = &mut self.hosts[host];
        *this = Host {
            router: Router::new(this.router.config().clone(), address(host)),
            life: Life::Running,
            leaving: false,
            started: self.now,
            takeovers: 0,
            bound: None,
            epoch,
            inbox: VecDeque::new(),
            room: 0,
        };
        self.with(host, Router::start);
    }

    /// The machine dies: its addresses go with it.
    pub(super) fn kill(&mut self, host: usize) {
        self.trace(|| format!("{host} dies"));
        self.unbind(host);
        self.hosts[host].life = Life::Gone;
    }

    pub(super) fn pause(&mut self, host: usize) {
        if self.hosts[host].life == Life::Running {
            self.trace(|| format!("{host} is paused"));
            self.hosts[host].life = Life::Paused;
            self.hosts[host].room = [0, 1, 3, usize::MAX][self.random.index(4)];
        }
    }

    /// What is queued is read before anything else, and then the timers have their say.
    pub(super) fn resume(&mut self, host: usize) {
        if self.hosts[host].life == Life::Paused {
            self.trace(|| format!("{host} goes on"));
            self.hosts[host].life = Life::Running;
            while let Some((from, bytes)) = self.hosts[host].inbox.pop_front() {
                self.deliver(from, host, bytes);
            }
            self.run(Duration::ZERO);
        }
    }

    pub(super) fn leave(&mut self, host: usize) {
        if self.hosts[host].life == Life::Running {
            self.trace(|| format!("{host} leaves"));
            self.hosts[host].leaving = true;
            self.with(host, Router::leave);
        }
    }

    pub(super) fn offer(&mut self, host: usize) {
        if self.hosts[host].life == Life::Running {
            self.trace(|| format!("{host} offers"));
            self.with(host, Router::offer);
        }
    }

    pub(super) fn configure(&mut self, host: usize, change: impl FnOnce(&mut RouterConfig)) {
        if self.hosts[host].life == Life::Running {
            let mut config = self.hosts[host].router.config().clone();
            change(&mut config);
            self.trace(|| {
                format!("{host} gets {} {:?} {:?}", config.priority, config.interval, config.preempt)
            });
            self.with(host, |router, now| router.configure(now, config));
        }
    }

    /// Hosts in the same part hear each other, others do not.
    pub(super) fn partition(&mut self, part: impl Fn(usize) -> u64) {
        let count = self.hosts.len();
        for link in 0..self.cut.len() {
            self.cut[link] = part(link / count) != part(link % count);
        }
        self.trace(|| format!("parts {:?}", (0..count).map(part).collect::<Vec<_>>()));
    }

    /// One direction of one link is cut.
    pub(super) fn cut(&mut self, from: usize, to: usize) {
        let count = self.hosts.len();
        self.cut[from * count + to] = true;
        self.trace(|| format!("{to} does not hear {from}"));
    }

    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let timers = self.hosts.iter().filter_map(Host::next_deadline);
            let arrival = self.flights.peek().map(|Reverse(flight)| flight.at);
            let Some(next) = timers.chain(arrival).min().filter(|next| *next <= end) else { break };
            self.now = self.now.max(next);
            // What has arrived is read before any timer fires.
            while self.flights.peek().is_some_and(|Reverse(flight)| flight.at <= self.now) {
                if let Some(Reverse(Flight { from, to, bytes, .. })) = self.flights.pop() {
                    self.deliver(from, to, bytes);
                }
            }
            for host in 0..self.hosts.len() {
                if self.hosts[host].next_deadline().is_some_and(|at| at <= self.now) {
                    self.with(host, Router::timeout);
                }
            }
        }
        self.now = end;
    }

    fn deliver(&mut self, from: usize, to: usize, bytes: Rc<[u8]>) {
        match self.hosts[to].life {
            Life::Gone => {}
            // The newest is dropped when there is no room, as by a socket.
            Life::Paused if self.hosts[to].inbox.len() < self.hosts[to].room => {
                self.hosts[to].inbox.push_back((from, bytes));
            }
            Life::Paused => {}
            Life::Running => {
                let context = Context {
                    source: address(from),
                    destination: group(Family::V4),
                    local: None,
                    hop_limit: HOP_LIMIT,
                    checksum: None,
                };
                let advert = decode(&bytes, &context).unwrap();
                self.with(to, |router, now| router.receive(now, address(from), &advert));
            }
        }
    }

    /// Calls a router with its own time and does what it says.
    fn with(&mut self, host: usize, call: impl FnOnce(&mut Router, Duration) -> Vec<Action>) {
        let now = self.now + self.hosts[host].epoch;
        for action in call(&mut self.hosts[host].router, now) {
            match action {
                Action::Send(advert) => self.send(host, &advert, |_| true),
                Action::Tell(to, advert) => self.send(host, &advert, |host| address(host) == to),
                Action::Bind(_) => self.bind(host),
                // Announcements are not simulated: there is no time between the first word of an owner and its first announcement.
                Action::Release(_) | Action::Yield(..) => self.unbind(host),
                Action::Enter(state) => self.trace(|| format!("{host} is {state:?}")),
                Action::Announce(_) => {}
                Action::Left => self.hosts[host].life = Life::Gone,
            }
        }
    }

    fn send(&mut self, from: usize, advert: &Advert, is_meant: impl Fn(usize) -> bool) {
        self.trace(|| format!("{from} sends {}", advert.priority));
        let bytes: Rc<[u8]> = advert.encode(address(from), group(Family::V4), Checksum::PseudoHeader).into();
        for to in (0..self.hosts.len()).filter(|to| *to != from && is_meant(*to)) {
            let link = from * self.hosts.len() + to;
            if self.cut[link] || self.random.percent(self.link.loss) {
                continue;
            }
            for _ in 0..1 + u8::from(self.random.percent(self.link.doubled)) {
                let spread = self.link.flight.saturating_sub(Link::SHORTEST);
                let mut at = self.now + Link::SHORTEST + self.random.time(spread);
                if self.link.ordered {
                    at = at.max(self.last[link]);
                    self.last[link] = at;
                }
                self.sent += 1;
                self.flights.push(Reverse(Flight { at, number: self.sent, from, to, bytes: bytes.clone() }));
            }
        }
    }

    fn bind(&mut self, host: usize) {
        self.trace(|| format!("{host} has the address"));
        if let Some(since) = self.bare.take() {
            self.record.bare = self.record.bare.max(self.now - since);
        }
        self.hosts[host].bound = Some(self.now);
        self.hosts[host].takeovers += 1;
    }

    fn unbind(&mut self, host: usize) {
        let Some(since) = self.hosts[host].bound.take() else { return };
        self.trace(|| format!("{host} has the address no more"));
        for other in self.hosts.iter().filter_map(|other| other.bound) {
            self.record.shared = self.record.shared.max(self.now - since.max(other));
        }
        if self.owners().is_empty() {
            self.bare = Some(self.now);
        }
    }

    /// What was seen since the last time, and what still lasts.
    pub(super) fn record(&mut self) -> Record {
        let mut record = std::mem::take(&mut self.record);
        if let Some(since) = self.bare {
            record.bare = record.bare.max(self.now - since);
            self.bare = Some(self.now);
        }
        let mut since: Vec<Duration> = self.hosts.iter().filter_map(|host| host.bound).collect();
        since.sort_unstable();
        // Of those that have it now, the second that got it is the one that has shared it longest.
        if let Some(second) = since.get(1) {
            record.shared = record.shared.max(self.now - *second);
        }
        record
    }

    pub(super) fn owners(&self) -> Vec<usize> {
        (0..self.hosts.len()).filter(|host| self.hosts[*host].bound.is_some()).collect()
    }

    /// The only owner, or who is wrong about it.
    pub(super) fn owner(&self) -> Result<usize, String> {
        match self.owners()[..] {
            [owner] => Ok(owner),
            ref owners => Err(format!("owners at {:?}: {owners:?}", self.now)),
        }
    }

    /// The longest interval.
    pub(super) fn interval(&self) -> Duration {
        self.hosts.iter().map(|host| host.router.config().interval).max().unwrap_or_default()
    }

    /// The longest down interval of any rank.
    pub(super) fn down(&self) -> Duration {
        timers::down(1, self.interval())
    }
}

impl Host {
    fn next_deadline(&self) -> Option<Duration> {
        let at = self.router.next_deadline().filter(|_| self.life == Life::Running)?;
        Some(at.saturating_sub(self.epoch))
    }

    /// How long it has had the address.
    pub(super) fn owned(&self, now: Duration) -> Duration {
        self.bound.map_or(Duration::ZERO, |since| now - since)
    }

    /// Whether it can take over: it has been there for so long, and stays.
    pub(super) fn is_ready(&self, now: Duration, after: Duration) -> bool {
        self.life == Life::Running
            && !self.leaving
            && self.router.state() == VrrpState::Backup
            && now >= self.started + after
    }
}
