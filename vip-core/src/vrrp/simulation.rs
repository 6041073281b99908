//! A LAN of routers on simulated time, with delay, loss, partitions, pauses and restarts.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;

use super::packet::{Advert, Checksum, Context, HOP_LIMIT, decode, group};
use super::rank;
use super::router::{Action, Router};
use super::{Family, RouterConfig, RouterId, timers};
use crate::api::VrrpState;

const INTERVAL: Duration = Duration::from_millis(100);
const VRID: u8 = 7;

/// A packet on its way.
struct Flight {
    at: Duration,
    from: usize,
    to: usize,
    bytes: Vec<u8>,
}

struct Host {
    router: Router,
    bound: bool,
    alive: bool,
    /// A stopped process: what is sent to it waits in its socket.
    paused: bool,
    takeovers: usize,
}

struct Segment {
    now: Duration,
    hosts: Vec<Host>,
    flights: Vec<Flight>,
    /// Hosts in the same part hear each other.
    parts: Vec<u8>,
    /// Of 100 packets, so many are lost.
    loss: u64,
    random: u64,
}

fn name(host: usize) -> String {
    format!("node-{host}")
}

fn address(host: usize) -> IpAddr {
    [10, 87, 0, u8::try_from(host).unwrap() + 11].into()
}

impl Host {
    fn awake(&self) -> bool {
        self.alive && !self.paused
    }
}

impl Segment {
    fn new(count: usize, seed: u64) -> Self {
        let mut this = Self {
            now: Duration::ZERO,
            hosts: vec![],
            flights: vec![],
            parts: vec![0; count],
            loss: 0,
            random: seed | 1,
        };
        this.hosts = (0..count)
            .map(|host| Host {
                router: this.fresh(host),
                bound: false,
                alive: true,
                paused: false,
                takeovers: 0,
            })
            .collect();
        (0..count).for_each(|host| this.start(host));
        this
    }

    fn fresh(&self, host: usize) -> Router {
        let names: Vec<String> = (0..self.parts.len()).map(name).collect();
        let config = RouterConfig {
            id: RouterId { interface: "eth0".into(), family: Family::V4, vrid: VRID },
            priority: rank::priority(&name(host), names.iter().map(String::as_str), VRID, None),
            interval: INTERVAL,
            preempt: None,
            addresses: vec![[10, 87, 2, 50].into()],
            fresh: BTreeSet::new(),
        };
        Router::new(config, address(host))
    }

    /// xorshift: the schedule is the seed.
    fn random(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    fn start(&mut self, host: usize) {
        let actions = self.hosts[host].router.start(self.now);
        self.act(host, actions);
    }

    fn act(&mut self, host: usize, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send(advert) => self.send(host, &advert),
                Action::Bind(_) => {
                    self.hosts[host].bound = true;
                    self.hosts[host].takeovers += 1;
                }
                Action::Release(_) => self.hosts[host].bound = false,
                Action::Enter(_) | Action::Announce(_) | Action::Left => {}
            }
        }
    }

    fn send(&mut self, from: usize, advert: &Advert) {
        let bytes = advert.encode(address(from), group(Family::V4), Checksum::PseudoHeader);
        for to in 0..self.hosts.len() {
            let heard = to != from && self.parts[to] == self.parts[from];
            if heard && self.random(100) >= self.loss {
                // 0.1 to 0.3 ms on the way.
                let at = self.now + Duration::from_micros(100 + self.random(200));
                self.flights.push(Flight { at, from, to, bytes: bytes.clone() });
            }
        }
    }

    /// Runs until a moment; what arrives is read before any timer fires.
    fn run_until(&mut self, end: Duration) {
        loop {
            let timers = self.hosts.iter().filter(|h| h.awake()).filter_map(|h| h.router.next_deadline());
            let next = self.arriving().map(|(_, flight)| flight.at).chain(timers).min();
            let Some(next) = next.filter(|next| *next <= end) else { break };
            self.now = self.now.max(next);
            while let Some(index) = self.arrived() {
                let Flight { from, to, bytes, .. } = self.flights.swap_remove(index);
                if self.hosts[to].alive && self.parts[to] == self.parts[from] {
                    let context = Context {
                        source: address(from),
                        destination: group(Family::V4),
                        local: None,
                        hop_limit: HOP_LIMIT,
                        checksum: None,
                    };
                    let advert = decode(&bytes, &context).unwrap();
                    let actions = self.hosts[to].router.receive(self.now, address(from), &advert);
                    self.act(to, actions);
                }
            }
            for host in 0..self.hosts.len() {
                if self.hosts[host].awake() {
                    let actions = self.hosts[host].router.timeout(self.now);
                    self.act(host, actions);
                }
            }
        }
        self.now = end;
    }

    /// Packets on their way to those who can read them.
    fn arriving(&self) -> impl Iterator<Item = (usize, &Flight)> {
        self.flights.iter().enumerate().filter(|(_, flight)| !self.hosts[flight.to].paused)
    }

    /// The oldest packet that can be read now.
    fn arrived(&self) -> Option<usize> {
        let due = self.arriving().filter(|(_, flight)| flight.at <= self.now);
        due.min_by_key(|(_, flight)| flight.at).map(|(index, _)| index)
    }

    fn run(&mut self, time: Duration) {
        self.run_until(self.now + time);
    }

    fn owners(&self) -> Vec<usize> {
        (0..self.hosts.len()).filter(|host| self.hosts[*host].alive && self.hosts[*host].bound).collect()
    }

    fn owner(&self) -> usize {
        let owners = self.owners();
        assert_eq!(owners.len(), 1, "owners: {owners:?}");
        owners[0]
    }

    /// The machine dies: its addresses go with it.
    fn kill(&mut self, host: usize) {
        self.hosts[host].alive = false;
        self.hosts[host].bound = false;
    }

    fn revive(&mut self, host: usize) {
        if !self.hosts[host].alive {
            self.hosts[host] =
                Host { router: self.fresh(host), bound: false, alive: true, paused: false, takeovers: 0 };
            self.start(host);
        }
    }

    /// The longest down interval of any rank.
    fn settle(&mut self) {
        self.run(timers::down(1, INTERVAL) * 2);
    }
}

#[test]
fn one_owner_settles_and_one_takes_over() {
    for count in [2, 3, 5, 20] {
        for seed in 1..20 {
            let mut lan = Segment::new(count, seed);
            lan.settle();
            let first = lan.owner();
            lan.kill(first);
            lan.run(timers::down(1, INTERVAL));
            let second = lan.owner();
            assert_ne!(first, second);
            let takers = lan.hosts.iter().filter(|host| host.alive && host.takeovers > 0).count();
            assert_eq!(takers, 1, "{count} hosts, seed {seed}");
            lan.revive(first);
            lan.settle();
            assert_eq!(lan.owner(), second, "a living master is not preempted");
        }
    }
}

#[test]
fn a_healed_partition_leaves_one_owner() {
    for seed in 1..50 {
        let mut lan = Segment::new(5, seed);
        lan.settle();
        lan.parts = vec![0, 0, 1, 1, 1];
        lan.settle();
        assert_eq!(lan.owners().len(), 2);
        lan.parts = vec![0; 5];
        lan.run(INTERVAL * 2);
        lan.owner();
    }
}

#[test]
fn a_planned_handover_is_never_without_an_owner() {
    for seed in 1..50 {
        let mut lan = Segment::new(3, seed);
        lan.settle();
        let owner = lan.owner();
        let now = lan.now;
        let actions = lan.hosts[owner].router.leave(now);
        lan.act(owner, actions);
        for _ in 0..500 {
            lan.run(Duration::from_micros(500));
            assert!(!lan.owners().is_empty());
        }
        assert_ne!(lan.owner(), owner);
        assert_eq!(lan.hosts[owner].router.state(), VrrpState::Init);
    }
}

#[test]
fn a_master_that_was_paused_hears_first_that_it_was_replaced() {
    let mut lan = Segment::new(3, 1);
    lan.settle();
    let owner = lan.owner();
    lan.hosts[owner].paused = true;
    lan.run(Duration::from_secs(5));
    lan.hosts[owner].paused = false;
    lan.run(Duration::ZERO);
    assert_ne!(lan.owner(), owner, "it spoke before it listened");
    let next = lan.owner();
    lan.run(INTERVAL * 10);
    assert_eq!(lan.owner(), next);
}

#[derive(Clone, Debug)]
enum Fault {
    Loss(u64),
    Partition(Vec<u8>),
    Kill(usize),
    Revive(usize),
    Pause(usize),
    Resume(usize),
    Quiet,
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        (0..80u64).prop_map(Fault::Loss),
        proptest::collection::vec(0..3u8, 8).prop_map(Fault::Partition),
        (0..8usize).prop_map(Fault::Kill),
        (0..8usize).prop_map(Fault::Revive),
        (0..8usize).prop_map(Fault::Pause),
        (0..8usize).prop_map(Fault::Resume),
        Just(Fault::Quiet),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn after_the_last_fault_there_is_one_owner(
        count in 2..8usize,
        seed in 1..u64::MAX,
        faults in proptest::collection::vec((fault(), 0..1000u64), 0..12),
    ) {
        let mut lan = Segment::new(count, seed);
        for (fault, millis) in faults {
            match fault {
                Fault::Loss(loss) => lan.loss = loss,
                Fault::Partition(parts) => lan.parts = parts[..count].to_vec(),
                Fault::Kill(host) => lan.kill(host % count),
                Fault::Revive(host) => lan.revive(host % count),
                Fault::Pause(host) => lan.hosts[host % count].paused = true,
                Fault::Resume(host) => lan.hosts[host % count].paused = false,
                Fault::Quiet => {}
            }
            lan.run(Duration::from_millis(millis));
        }
        lan.loss = 0;
        lan.parts = vec![0; count];
        (0..count).for_each(|host| lan.revive(host));
        lan.hosts.iter_mut().for_each(|host| host.paused = false);
        lan.settle();
        let owner = lan.owner();
        // And it stays: no second router speaks up any more.
        let before: BTreeSet<usize> = lan.owners().into_iter().collect();
        lan.run(Duration::from_secs(2));
        prop_assert_eq!(before, BTreeSet::from([owner]));
        prop_assert_eq!(lan.owner(), owner);
    }
}
