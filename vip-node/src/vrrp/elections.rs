//! The elections of this node: which routers run, on which interface, and what their actions do to the world. Nothing in
//! it waits but [`Elections::wait`].

mod binding;
mod neighbourhood;
mod reception;
mod reporting;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};
use vip_core::api::{Reason, VrrpState};
use vip_core::vrrp::packet::{self, Advert};
use vip_core::vrrp::router::{Action, Router};
use vip_core::vrrp::{Lan, RouterConfig, RouterId};

use self::reporting::News;
use super::address::{Addresses, Key};
use super::announce::Announcer;
use super::bindings::Bindings;
use super::heard::Heard;
use super::neighbours::{Claims, Prober};
use super::network::{Network, Obstacle, Place};
use super::sockets::Sockets;
use super::timer::Timer;
use crate::link::Order;

/// After a failure on an interface; twice as long after the next, up to [`RETRY_MAX`].
const RETRY: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(32);
/// Interfaces are looked at anew at least this often, should a message of the kernel have been lost.
const LOOK: Duration = Duration::from_secs(10);
/// Who is late by less than this counts as on time.
const PUNCTUAL: Duration = Duration::from_millis(1);
/// The longest sleep: whoever slept much longer was paused.
const TURN: Duration = Duration::from_secs(1);

struct Running {
    router: Router,
    index: u32,
    /// What another master was heard to have: whoever takes over from it does not bind that for the first time.
    inherits: Vec<IpAddr>,
    /// Another router with the priority of an address owner was complained of.
    rivalled: bool,
    /// Another router of ours that advertises although we are master.
    rival: Option<Rival>,
}

/// Another master beside this one, between two answers of ours.
#[derive(Clone, Copy, Debug)]
struct Rival {
    address: IpAddr,
    /// When it was heard first and last.
    since: Duration,
    last: Duration,
}

impl Running {
    /// Notes an advertisement that was accepted: while we are master it is a rival's.
    fn note_rival(&mut self, now: Duration, source: IpAddr, priority: u8) {
        let same = |rival: &Rival| rival.address == source && now < rival.last + self.patience();
        let since = self.rival.filter(same).map_or(now, |rival| rival.since);
        let rivals = priority > 0 && self.router.state() == VrrpState::Master;
        self.rival = rivals.then_some(Rival { address: source, since, last: now });
    }

    /// A rival that has gone on for some intervals in spite of our answers, until it was silent for as long.
    fn rival(&self, now: Duration) -> Option<IpAddr> {
        let patience = self.patience();
        let lasts = |rival: &Rival| rival.last - rival.since >= patience && now < rival.last + patience;
        self.rival.filter(lasts).map(|rival| rival.address)
    }

    fn patience(&self) -> Duration {
        self.router.config().interval * 5
    }
}

/// What failed when an election was entered or its addresses were bound.
#[derive(Default)]
struct Failure {
    /// How often in a row.
    count: u32,
    /// It was the binding: that the next attempt gets as far as the socket does not mend it.
    binding: bool,
}

/// All that `vip-node vrrp` knows.
pub struct Elections {
    epoch: Instant,
    timer: Timer,
    addresses: Addresses,
    network: Network,
    sockets: Sockets,
    /// A socket's queue was not read to its end.
    backlog: bool,
    /// What the agent said of the LAN last.
    lan: Lan,
    /// What the agent ordered last.
    ordered: BTreeMap<RouterId, RouterConfig>,
    running: BTreeMap<RouterId, Running>,
    troubles: BTreeMap<RouterId, (Reason, String)>,
    failures: BTreeMap<RouterId, Failure>,
    bindings: Bindings,
    /// Whether the kernel keeps our mark on an address: known once one was bound.
    marks: bool,
    /// Elections that are not entered before this time; then it is tried again.
    barred: BTreeMap<RouterId, Duration>,
    announcer: Announcer,
    prober: Prober,
    claims: Claims,
    /// Fresh addresses that nobody else had when they were probed.
    proven: BTreeSet<(RouterId, IpAddr)>,
    /// Addresses that are left to another machine, and when to probe again.
    yielded: BTreeMap<(RouterId, IpAddr), Duration>,
    heard: Heard,
    /// How often each address was taken off by another program and put back.
    repaired: BTreeMap<IpAddr, u64>,
    news: News,
    look: Duration,
    /// When work was done last.
    worked: Duration,
    /// How long the agent may be silent.
    grace: Duration,
    /// Why the agent's last order could not be taken.
    untaken: Option<String>,
    /// When the agent said something last; `None`: never.
    agent: Option<Duration>,
    /// The agent has been silent for too long; when the addresses are offered next.
    orphaned: Option<Duration>,
    stopping: bool,
}

impl Elections {
    /// Looks at the node and removes what an earlier run left behind. `grace` is how long the agent may be silent before
    /// the addresses are offered to other nodes.
    ///
    /// # Errors
    /// When the kernel does not talk to us.
    pub fn new(grace: Duration) -> io::Result<Self> {
        let mut addresses = Addresses::open()?;
        let nics = addresses.nics()?;
        let left: Vec<Key> =
            nics.values().flat_map(|nic| nic.ours.iter().map(|address| (nic.index, *address))).collect();
        for ((index, address), result) in left.iter().zip(addresses.release(&left)?) {
            match result {
                Ok(()) => info!(%address, index, "removed what an earlier run left"),
                Err(error) => warn!(%address, index, %error, "what an earlier run left could not be removed"),
            }
        }
        let mut this = Self {
            epoch: Instant::now(),
            timer: Timer::new()?,
            addresses,
            network: Network::new(nics),
            sockets: Sockets::default(),
            backlog: false,
            lan: Lan::default(),
            ordered: BTreeMap::new(),
            running: BTreeMap::new(),
            troubles: BTreeMap::new(),
            failures: BTreeMap::new(),
            bindings: Bindings::default(),
            marks: false,
            barred: BTreeMap::new(),
            announcer: Announcer::default(),
            prober: Prober::default(),
            claims: Claims::default(),
            proven: BTreeSet::new(),
            yielded: BTreeMap::new(),
            heard: Heard::default(),
            repaired: BTreeMap::new(),
            news: News::default(),
            look: LOOK,
            worked: Duration::ZERO,
            grace,
            untaken: None,
            agent: None,
            orphaned: None,
            stopping: false,
        };
        this.sockets.listen(&this.network, &BTreeSet::new());
        Ok(this)
    }

    /// Whether all was left by plan, as was asked.
    pub fn is_over(&self) -> bool {
        self.stopping && self.running.is_empty() && self.bindings.is_empty()
    }

    /// Waits until something is to be done: a packet, a change of an interface, a timer, at the latest the time that is
    /// given. Dropping it loses nothing.
    pub async fn wait(&self, latest: Duration) {
        let now = self.now();
        let deadline = self.next_deadline().min(latest);
        if deadline <= now {
            return;
        }
        tokio::select! {
            biased;
            () = self.sockets.readable() => {}
            () = self.addresses.changed() => {}
            slept = self.timer.sleep(deadline - now) => if let Err(error) = slept {
                warn!(%error, "the timer does not work");
                tokio::time::sleep(deadline - now).await;
            }
        }
    }

    /// Does what is due, and one batch of what can be done in parts. Everything that was received, said or changed is
    /// looked at before any timer is: a process that was paused learns first what happened meanwhile. `stop`: leaves every
    /// election by plan, and nothing is entered any more.
    pub fn work(&mut self, orders: Vec<Result<Order, String>>, stop: bool) {
        self.receive();
        self.hear_claims();
        self.follow_changes();
        for order in orders {
            self.obey(order);
        }
        if stop && !self.stopping {
            self.stopping = true;
            self.ordered.clear();
            self.settle();
        }
        let now = self.now();
        self.watch_agent(now);
        self.advance(now);
        self.take_verdicts(now);
        self.bind_some();
        if now >= self.look {
            self.look();
        }
        if self.barred.values().any(|at| *at <= now) {
            self.settle();
        }
        self.announce_some();
        self.prove_marks();
    }

    /// Advertisements and takeovers whose time has come.
    fn advance(&mut self, now: Duration) {
        let mut acting = Vec::new();
        for (id, running) in &mut self.running {
            if let Some(at) = running.router.next_deadline().filter(|at| *at <= now) {
                // A little lateness is not carried on to the next advertisement.
                let time = if now - at < PUNCTUAL { at } else { now };
                acting.push((id.clone(), running.router.timeout(time)));
            }
        }
        for (id, actions) in acting {
            self.act(&id, actions);
        }
    }

    fn obey(&mut self, order: Result<Order, String>) {
        let returned = self.orphaned.take().is_some();
        self.agent = Some(self.now());
        match order {
            Err(why) => {
                warn!("an order of the agent could not be taken, the one before it stands: {why}");
                self.untaken = Some(why);
                self.news.now();
                if returned {
                    self.settle();
                }
            }
            Ok(Order::Elect(_)) if self.stopping => {}
            Ok(Order::Elect(elect)) => {
                self.untaken = None;
                self.lan = elect.lan;
                let ordered = elect.routers.into_iter().map(|config| (config.id.clone(), config)).collect();
                let before = std::mem::replace(&mut self.ordered, ordered);
                // Other settings deserve another attempt at once.
                let same = |id: &RouterId| self.ordered.get(id) == before.get(id);
                self.failures.retain(|id, _| same(id));
                self.barred.retain(|id, _| same(id));
                self.heard.acquit(|address| self.lan.peer(address).is_some());
                self.settle();
            }
            Ok(Order::Alive) if returned => self.settle(),
            Ok(Order::Alive) => {}
        }
        if returned {
            info!("the agent is back, the node competes as before");
        }
    }

    /// When the agent is gone for long, what it programmed grows old: other nodes may have the addresses, if they can.
    fn watch_agent(&mut self, now: Duration) {
        let gap = now.saturating_sub(self.worked);
        self.worked = now;
        let Some(agent) = &mut self.agent else { return };
        if gap > TURN * 2 {
            // We were paused, and have not listened.
            *agent += gap;
        }
        if now < self.orphaned.unwrap_or(*agent + self.grace) {
            return;
        }
        let before = self.orphaned.replace(now + self.grace);
        if self.ordered.is_empty() {
            return;
        }
        if before.is_none() {
            warn!(
                "nothing was heard of the agent for {:?}: the addresses are offered to other nodes, again and again",
                self.grace
            );
            self.settle();
        }
        let offers: Vec<(RouterId, Vec<Action>)> =
            self.running.iter_mut().map(|(id, running)| (id.clone(), running.router.offer(now))).collect();
        for (id, actions) in offers {
            self.act(&id, actions);
        }
    }

    /// Time since the start.
    pub fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    fn next_deadline(&self) -> Duration {
        if self.backlog {
            return Duration::ZERO;
        }
        let routers = self.running.values().filter_map(|running| running.router.next_deadline());
        let others = [
            self.announcer.next_deadline(),
            self.prober.next_deadline(),
            self.bindings.next_deadline(),
            self.orphaned.or(self.agent.map(|at| at + self.grace)),
        ];
        routers
            .chain(others.into_iter().flatten())
            .chain(self.barred.values().copied())
            .chain(self.yielded.values().copied())
            .chain([self.look])
            .fold(self.worked + TURN, Duration::min)
    }

    /// Brings what runs in line with what was ordered and with what the interfaces allow.
    fn settle(&mut self) {
        let now = self.now();
        self.news.now();
        self.barred.retain(|id, at| *at > now && self.ordered.contains_key(id));
        self.troubles.retain(|id, _| self.ordered.contains_key(id));
        self.failures.retain(|id, _| self.ordered.contains_key(id));
        let fresh = |(id, address): &(RouterId, IpAddr)| {
            self.ordered.get(id).is_some_and(|config| config.fresh.contains(address))
        };
        self.proven.retain(fresh);
        let left: Vec<RouterId> =
            self.running.keys().filter(|id| !self.ordered.contains_key(*id)).cloned().collect();
        for id in left {
            let actions = self.running.get_mut(&id).map(|running| running.router.leave(now));
            self.act(&id, actions.unwrap_or_default());
        }
        for config in self.ordered.values().cloned().collect::<Vec<_>>() {
            if self.barred.contains_key(&config.id) {
                continue;
            }
            match self.network.place(now, &config) {
                Ok(place) => self.enter(self.effective(config), place),
                Err(obstacle) => self.bar(&config.id, obstacle),
            }
        }
        let handed = self.bindings.handed().map(|(_, id)| id);
        let used = self.running.keys().chain(handed).map(|id| (id.interface.clone(), id.family)).collect();
        self.sockets.listen(&self.network, &used);
    }

    /// An order as it is followed: last of all without an agent.
    fn effective(&self, config: RouterConfig) -> RouterConfig {
        if self.is_orphaned() { RouterConfig { priority: 1, preempt: None, ..config } } else { config }
    }

    fn is_orphaned(&self) -> bool {
        self.orphaned.is_some()
    }

    fn enter(&mut self, config: RouterConfig, place: Place) {
        let id = config.id.clone();
        let (now, orphaned) = (self.now(), self.is_orphaned());
        if let Some(running) = self.running.get_mut(&id) {
            if running.index == place.index && running.router.source() == place.source {
                running.router.hold_back(orphaned);
                let actions = running.router.configure(now, config);
                return self.act(&id, actions);
            }
            // Another card or another address of ours: a new router.
            let actions = running.router.stop();
            self.act(&id, actions);
        }
        if let Err(error) = self.sockets.open(&id, place.index) {
            let (reason, hint) = permission(&error, "NET_RAW");
            let message = format!("cannot open a packet socket on {}: {error}{hint}", id.interface);
            return self.fail(&id, reason, message, false);
        }
        if !self.failures.get(&id).is_some_and(|failure| failure.binding) {
            self.recover(&id);
        }
        let mut router = Router::new(config, place.source);
        router.hold_back(orphaned);
        let actions = router.start(now);
        let running =
            Running { router, index: place.index, inherits: Vec::new(), rivalled: false, rival: None };
        self.running.insert(id.clone(), running);
        self.act(&id, actions);
    }

    /// Nothing is in the way any more.
    fn recover(&mut self, id: &RouterId) {
        self.failures.remove(id);
        if self.troubles.remove(id).is_some() {
            self.news.now();
            info!(vrid = id.vrid, interface = id.interface, "can take part again");
        }
    }

    /// Takes no part in an election for a while, longer from time to time.
    fn fail(&mut self, id: &RouterId, reason: Reason, message: String, binding: bool) {
        let failure = self.failures.entry(id.clone()).or_default();
        let wait = RETRY_MAX.min(RETRY * 2_u32.saturating_pow(failure.count));
        *failure = Failure { count: failure.count + 1, binding };
        let until = Some(self.now() + wait);
        self.bar(id, Obstacle { reason, message, until });
    }

    /// Takes no part in an election and says why, once.
    fn bar(&mut self, id: &RouterId, obstacle: Obstacle) {
        if let Some(running) = self.running.get_mut(id) {
            let actions = running.router.stop();
            self.act(id, actions);
        }
        if let Some(until) = obstacle.until {
            self.barred.insert(id.clone(), until);
        }
        let trouble = (obstacle.reason, obstacle.message);
        if self.troubles.get(id) != Some(&trouble) {
            warn!(vrid = id.vrid, interface = id.interface, "takes no part: {}", trouble.1);
            self.troubles.insert(id.clone(), trouble);
            self.news.now();
        }
    }

    fn act(&mut self, id: &RouterId, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Enter(state) => {
                    info!(vrid = id.vrid, interface = id.interface, "{state:?}");
                    self.news.now();
                }
                Action::Send(advert) => self.send(id, &advert),
                Action::Tell(peer, advert) => self.tell(id, peer, &advert),
                Action::Bind(addresses) => self.want(id, &addresses),
                Action::Announce(addresses) => self.announce(id, &addresses),
                Action::Release(addresses) => self.release(id, &addresses, None),
                Action::Yield(addresses, until) => self.release(id, &addresses, Some(until)),
                Action::Left => self.forget(id),
            }
        }
    }

    /// An election was left. If it was ordered again meanwhile, it is entered anew.
    fn forget(&mut self, id: &RouterId) {
        let rest: Vec<IpAddr> = self.bindings.of(id).into_iter().map(|(_, address)| address).collect();
        self.release(id, &rest, None);
        self.running.remove(id);
        if self.ordered.contains_key(id) {
            let now = self.now();
            self.barred.insert(id.clone(), now);
        }
    }

    fn send(&mut self, id: &RouterId, advert: &Advert) {
        let Some(running) = self.running.get(id) else { return };
        let source = running.router.source();
        if self.lan.unicast {
            let peers: Vec<IpAddr> = self.network.peers(running.index, id.family, &self.lan).collect();
            for peer in peers {
                self.tell(id, peer, advert);
            }
        } else if let Some(wire) = self.sockets.wire(id) {
            let bytes = advert.encode(source, packet::group(id.family), self.lan.checksum.sent());
            note_unsent(id, wire.advertise(source, &bytes));
        }
    }

    /// An advertisement for one router alone.
    fn tell(&mut self, id: &RouterId, peer: IpAddr, advert: &Advert) {
        let Some(running) = self.running.get(id) else { return };
        let Some(wire) = self.sockets.wire(id) else { return };
        let source = running.router.source();
        let bytes = advert.encode(source, peer, self.lan.checksum.sent());
        note_unsent(id, wire.advertise_to(&id.interface, source, peer, &bytes));
    }

    fn is_master(&self, id: &RouterId) -> bool {
        self.running.get(id).is_some_and(|running| running.router.state() == VrrpState::Master)
    }
}

/// A link that just went down says so by the kernel's own message.
fn note_unsent(id: &RouterId, sent: io::Result<()>) {
    if let Err(error) = sent {
        debug!(vrid = id.vrid, interface = id.interface, %error, "an advertisement was not sent");
    }
}

/// The word for an error, and what to do about it.
fn permission(error: &io::Error, capability: &str) -> (Reason, String) {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            (Reason::NotPermitted, format!("; the container needs the capability {capability}"))
        }
        _ => (Reason::NoInterface, String::new()),
    }
}
